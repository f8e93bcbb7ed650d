"""Start a run on two ranks, stop it midway, and resume it on one: a checkpoint does not depend on the ranks.

python examples/resume_on_other_ranks.py WORK [KEY=VALUE ...]
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import bigincubate as bi


def stop_at_first_checkpoint(folder: Path, done: threading.Event) -> None:
    """Send SIGINT, as Ctrl-C does, to this process as soon as the phase has a checkpoint."""
    while not done.is_set():
        if list((folder / "checkpoints").glob("step-*")):
            os.kill(os.getpid(), signal.SIGINT)
            return
        time.sleep(0.05)


def main(work: Path, *sets: str) -> list[dict[str, object]]:
    """Train the meta model of the digits on two ranks, then on one; return the record of both attempts."""
    recipe, done = bi.load_recipe("digits", ["checkpoint.every_steps=20", *sets]), threading.Event()
    stopper = threading.Thread(target=stop_at_first_checkpoint, args=(work / "meta", done))
    stopper.start()
    try:
        bi.run(recipe, work, ranks=2)
    except bi.errors.Preempted as stopped:
        print(stopped)
    finally:
        done.set()
        stopper.join()

    result = bi.train_phase(recipe, work, "pretrain")  # on one rank, in this process
    print(f"done after {result['steps']} steps: {result['metrics']}")
    attempts = [json.loads(file.read_text()) for file in sorted((work / "meta" / "attempts").glob("*.json"))]
    for attempt in attempts:
        print(f"attempt {attempt['attempt']}: {attempt['world']} rank(s), {attempt['state']}")
    return attempts


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Measure a gate's look at a queue of 100,000 jobs, of which 1,002 are those of its run.

``python benchmarks/queue_scale.py`` prints CPU seconds of this process. ``squeue`` is a script that prints a prepared
answer; reading the answer is counted, what Slurm itself computes is not.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from bigincubate.launchers.slurm.submission_log import Submission, SubmissionLog, list_queued_jobs, run_comment
from bigincubate.storage.run_directory import RunDir

MODULES, OTHERS = 1000, 100_000


def main() -> None:
    """Write the answer of ``squeue``, and measure reading it three times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = RunDir(folder / "run")
        kinds = {"10": ("pretrain", ()), "11": ("incubate", tuple(range(MODULES))), "12": ("gate", ())}
        log = [Submission(kind, f"run-{kind}", job, modules=modules) for job, (kind, modules) in kinds.items()]
        run.path.mkdir()
        SubmissionLog(run, log).write()
        comment = run_comment(run)
        lines = [
            f"{1000 + number}|N/A|PENDING||Priority|other|{folder / str(number)}/of/another/user"
            for number in range(OTHERS)
        ]
        lines[5000:5000] = [f"11|{module}|PENDING||Dependency|run-incubate|{comment}" for module in range(MODULES)]
        lines += [f"10|N/A|RUNNING|n1|None|run-pretrain|{comment}", f"12|N/A|PENDING||Dependency|run-gate|{comment}"]
        (folder / "answer").write_text("\n".join(lines) + "\n")
        squeue = folder / "squeue"
        squeue.write_text(f"#!/bin/sh\nexec cat {folder / 'answer'}\n")
        squeue.chmod(0o755)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        for _ in range(3):
            started = time.process_time()
            found = list_queued_jobs(run)
            print(f"{len(lines)} entries, {len(found)} of this run: {time.process_time() - started:.2f} CPU s")


if __name__ == "__main__":
    main()

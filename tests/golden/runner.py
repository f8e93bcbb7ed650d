"""Run many commands of ``bigincubate`` in one process, or in the ranks of one launch.

    python runner.py JOBS.json
    torchrun ... runner.py JOBS.json

``JOBS.json`` has ``commands``, a list of argument lists, and ``streams``: run directories whose training streams are
read afterwards and written to ``streams.json`` in the same folder. Stops at the first command that fails and exits with
its code.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def share_process_group() -> None:
    """Let all commands use one process group: a second one would find the first one's addresses in the store."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.init_process_group = lambda *_, **__: None
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: destroy(group) if group is not None else None


def run_commands(commands: list[list[str]]) -> int:
    """Run each command as the command line would, and return the exit code of the first that fails, else 0."""
    from bigincubate.cli import main

    for command in commands:
        sys.argv = ["bigincubate", *command]
        try:
            main()
        except SystemExit as end:
            if end.code:
                print("failed:", *command, file=sys.stderr)
                return int(end.code)
    return 0


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        share_process_group()
    file = Path(sys.argv[1])
    jobs = json.loads(file.read_text())
    if code := run_commands(jobs["commands"]):
        raise SystemExit(code)
    if jobs["streams"]:
        from probe import read_stream

        streams = {name: read_stream(file.with_name(name)) for name in jobs["streams"]}
        file.with_name("streams.json").write_text(json.dumps(streams))

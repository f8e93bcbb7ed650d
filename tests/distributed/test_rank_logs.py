"""Logs of real ranks: steps are rank 0's, warnings everyone's."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launching import environment, torchrun

SCRIPT = """
import logging
from bigincubate.cli import main
from bigincubate.training.trainer import Trainer

step = Trainer.step

def warn(self, batch):
    if self.state.step == 3:
        logging.getLogger("bigincubate.test").warning("an odd step")
    return step(self, batch)

Trainer.step = warn
main()
"""


def test_two_ranks_log_the_steps_once_and_all_warnings(harness: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    trained = harness()
    ended = subprocess.run(
        torchrun(script, *trained.command("pretrain")),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    steps = re.findall(r"rank (\d) INFO: \S.*: step (\d+) of 12, loss \d.*, \d.* images/s, .*, ETA ", ended.stdout)
    assert steps == [("0", str(step)) for step in range(2, 13, 2)]
    assert " rank 1 INFO" not in ended.stdout + ended.stderr
    warnings = re.findall(r"^\d{4}-.* rank (\d) WARNING: an odd step$", ended.stderr, re.MULTILINE)
    assert sorted(warnings) == ["0", "1"]
    rows = trained.log("pretrain")
    assert [row["step"] for row in rows] == list(range(2, 13, 2))

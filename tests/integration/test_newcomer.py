"""The newcomer's path, from a wheel: what the README shows, in a directory that has nothing to do with the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("bigincubate", "ds_configs", "slurm", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def test_newcomer_trains_own_images_with_an_installed_wheel(tmp_path: Path) -> None:
    source, target, home = (tmp_path / name for name in ("source", "installed", "home"))
    home.mkdir()
    for name in BUILT_FROM:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source)
    pip = (sys.executable, "-m", "pip")
    run(home, *pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    run(home, *pip, "install", "--quiet", "--no-deps", "--no-compile", "--target", target, wheel)
    found = run(home, sys.executable, "-c", "import bigincubate; print(bigincubate.__file__)", path=target)
    assert Path(found.strip()).is_relative_to(target)
    print(run(home, sys.executable, ROOT / "tests" / "newcomer.py", path=target))


def run(cwd: Path, *words: object, path: Path | None = None) -> str:
    """Run a command that must succeed, with only ``path`` on the path of Python, and return its output."""
    settings = {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = inherited | settings | ({"PYTHONPATH": str(path)} if path else {})
    command = [str(word) for word in words]
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout

"""Files that come with the project outside its Python code: DeepSpeed configurations and sbatch scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .errors import EnvironmentFault

PACKAGE = Path(__file__).parent


def resource_folder(name: Literal["ds_configs", "slurm"]) -> Path:
    """Return the folder inside the installed package, or else the one at the top level of the checkout.

    Raises:
        EnvironmentFault: Neither exists.
    """
    candidates = [PACKAGE / name, PACKAGE.parent / name]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise EnvironmentFault(f"no folder {name} at {' or '.join(map(str, candidates))}; install bigincubate again")

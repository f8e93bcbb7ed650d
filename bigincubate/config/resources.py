"""Find the data files of the package: DeepSpeed configurations and sbatch scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import ConfigError, MissingDependencyError

PACKAGE = Path(__file__).parents[1]


def resource_folder(name: Literal["ds_configs", "slurm"]) -> Path:
    """Return the folder inside the installed package, or otherwise the one at the top level of the checkout.

    Raises:
        MissingDependencyError: Neither folder exists.
    """
    candidates = [PACKAGE / name, PACKAGE.parent / name]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MissingDependencyError(f"no folder {name} at {' or '.join(map(str, candidates))}; install bigincubate again")


def copy_scripts(destination: Path) -> list[Path]:
    """Copy the sbatch scripts into a folder, which is created if needed.

    Returns:
        The files that were written.

    Raises:
        ConfigError: An existing file differs from the script of the same name. No file is written.
    """
    scripts = {destination / file.name: file.read_bytes() for file in sorted(resource_folder("slurm").glob("*.sbatch"))}
    changed = [str(file) for file, content in scripts.items() if file.exists() and file.read_bytes() != content]
    if changed:
        raise ConfigError(
            f"--copy {destination}: not overwriting changed files: {', '.join(changed)};"
            " move them, or choose another folder"
        )
    destination.mkdir(parents=True, exist_ok=True)
    for file, content in scripts.items():
        file.write_bytes(content)
    return list(scripts)

"""Packages of the wheel; everything else about the project is in pyproject.toml.

`ds_configs/` and `slurm/` of the top level are installed as folders of the package.
"""

from setuptools import find_packages, setup

FOLDERS = ("ds_configs", "slurm")

setup(
    packages=[*find_packages(include=["bigincubate", "bigincubate.*"]), *(f"bigincubate.{name}" for name in FOLDERS)],
    package_dir={f"bigincubate.{name}": name for name in FOLDERS},
)

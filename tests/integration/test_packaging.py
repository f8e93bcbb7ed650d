"""Files outside the Python code are found in every kind of installation, each built and installed for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import Command

import bigincubate as package
from bigincubate.config import resources
from bigincubate.errors import MissingDependencyError

ROOT = Path(package.__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))

# A ZeRO configuration, then the jobs of a run. The two share a process because importing torch takes seconds.
PROBE = """
import sys
import bigincubate
from bigincubate.cli import main
from bigincubate.sharding.zero_config import read_config, shipped_config_path

print(bigincubate.__file__)
print(shipped_config_path("zero3"), read_config(shipped_config_path("zero3"))["zero_optimization"]["stage"])
sys.argv = ["bigincubate", "submit", "digits", "--run-dir", "run", "--dry-run"]
main()
"""


def run(*words: object, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command that must succeed, without network and without this checkout on the path; return its output."""
    settings = {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(word) for word in words]
    ended = subprocess.run(
        command, cwd=cwd, env=inherited | settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return `git archive` of the working tree (not only of HEAD) as a zip, which turns symbolic links into text."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("archive")
    index = str(folder / "index")
    run("git", "add", "--all", GIT_INDEX_FILE=index)
    tree = run("git", "write-tree", GIT_INDEX_FILE=index).strip()
    run("git", "archive", f"--output={folder / 'source.zip'}", tree)
    return folder / "source.zip"


@pytest.fixture(scope="session")
def source(archive: Path) -> Path:
    """Return the unpacked archive."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(archive.parent / "source")
    return archive.parent / "source"


@pytest.fixture(scope="session")
def sdist(source: Path) -> Path:
    """Build the source distribution with the build backend of pyproject.toml."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, source.parent, cwd=source)
    return next(source.parent.glob("*.tar.gz"))


def make_environment(folder: Path, *install: object) -> Path:
    """Make a virtual environment that sees the dependencies of this one and has the package installed from `install`.

    Returns:
        Its Python.
    """
    venv.create(folder, symlinks=True)
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (next(folder.glob("lib/python*/site-packages")) / "dependencies.pth").write_text("\n".join(dependencies))
    python = folder / "bin" / "python"
    if install:
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile")
        run(*pip, "--no-deps", "--no-build-isolation", *install)
    return python


@pytest.fixture(scope="session")
def pythons(source: Path, sdist: Path) -> Mapping[str, Path]:
    """Return interpreters with the package installed from a wheel, from an sdist, as editable, and not at all."""
    folder = source.parent
    return {
        "wheel": make_environment(folder / "wheel", source),
        "sdist": make_environment(folder / "sdist", sdist),
        "editable": make_environment(folder / "editable", "--editable", source),
        "archive": make_environment(folder / "bare"),
    }


def test_archive_holds_no_symbolic_link(archive: Path) -> None:
    """Unpacking a zip on any system gives the folders as they are in the repository."""
    with zipfile.ZipFile(archive) as file:
        assert not [entry.filename for entry in file.infolist() if entry.external_attr >> 28 == 0o12]
        assert {"ds_configs/zero3.json", "slurm/gate.sbatch"} <= set(file.namelist())


def test_sdist_holds_every_tracked_file(archive: Path, sdist: Path) -> None:
    """Tests, documents and benchmarks can be used from a source distribution."""
    with tarfile.open(sdist) as file:
        shipped = {name.partition("/")[2] for name in file.getnames()}
    with zipfile.ZipFile(archive) as zipped:
        tracked = {name for name in zipped.namelist() if not name.endswith("/")}
    assert len(tracked) > 200
    assert tracked - shipped == set()


def test_tests_of_the_sdist_can_run(pythons: Mapping[str, Path], sdist: Path, tmp_path: Path) -> None:
    """Every test module finds its helpers, and tests of files outside the package pass."""
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.iterdir())
    python = pythons["sdist"]
    collected = run(python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=unpacked)
    assert {file.name for file in (ROOT / "tests").rglob("test_*.py")} <= set(re.findall(r"test_\w+\.py", collected))
    files = ("tests/unit/test_docs_links.py", "tests/unit/test_recipe_keys.py", "tests/unit/test_config.py")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=unpacked)


def packages_of(extra: str) -> set[str]:
    """Return the names of the packages that an extra installs, those of extras that it includes among them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names: set[str] = set()
    for requirement in extras[extra]:
        name, included = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?.*", requirement).groups()  # type: ignore[union-attr]
        names |= {name} if name != "bigincubate" else set().union(*map(packages_of, included.split(",")))
    return names


def test_extra_all_has_what_users_want_and_no_test_tools() -> None:
    """Extra `dev` adds what developers need."""
    wanted = set().union(*map(packages_of, ("report", "text", "deepspeed", "fairscale", "parquet")))
    assert packages_of("all") == wanted
    assert {"matplotlib", "transformers", "deepspeed", "fairscale", "pyarrow"} <= wanted
    assert packages_of("dev") - wanted >= {"pytest", "mypy", "ruff", "mkdocs", "codespell"}
    assert not wanted & {"pytest", "mypy", "ruff", "mkdocs"}


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable", "archive"])
def test_installation_finds_scripts_and_deepspeed_files(
    pythons: Mapping[str, Path], source: Path, tmp_path: Path, kind: str
) -> None:
    """The command line and the trainer read the files of their own installation."""
    python = pythons[kind]
    cwd = source if kind == "archive" else tmp_path
    where = python.parents[1] if kind in ("wheel", "sdist") else source
    module = run(python, "-m", "bigincubate", "scripts", cwd=cwd)
    files = [Path(line) for line in module.splitlines()]
    assert [file.name for file in files] == [file.name for file in SCRIPTS]
    assert all(file.is_relative_to(where) for file in files)
    if kind != "archive":
        assert run(python.with_name("bigincubate"), "scripts", cwd=cwd) == module

    imported, configuration, jobs = run(python, "-c", PROBE, cwd=cwd).split("\n", 2)
    assert Path(imported).is_relative_to(where)
    file, stage = configuration.rsplit(" ", 1)
    assert Path(file).is_relative_to(where)
    assert stage == "3"
    assert all(script.read_text() in jobs for script in SCRIPTS)
    assert re.search(
        rf"{re.escape(str(files[-1]))} PYTHON=\S+ (\S+=\S+ )*pretrain {re.escape(str(cwd))}/run/recipe.toml", jobs
    )


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable", "archive"])
def test_installation_has_the_list_of_the_standard_library(
    pythons: Mapping[str, Path], source: Path, tmp_path: Path, kind: str
) -> None:
    """Built-in text consists of modules of the interpreter, from a list that is installed with the package."""
    code = "from bigincubate.data.text.files import find_text; print(len(find_text('stdlib').files))"
    assert int(run(pythons[kind], "-c", code, cwd=source if kind == "archive" else tmp_path)) > 500


def test_missing_folder_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names both places and the remedy."""
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "bigincubate")
    with pytest.raises(MissingDependencyError, match=r"no folder slurm at .*install bigincubate again$"):
        resources.resource_folder("slurm")


def test_scripts_are_copied_but_never_over_a_changed_file(tmp_path: Path, bigincubate: Command) -> None:
    """A refused copy writes nothing at all."""
    folder = tmp_path / "my" / "slurm"
    for _ in range(2):  # a second copy over the same files is fine
        copied = bigincubate("scripts", "--copy", folder)
        assert copied.returncode == 0, copied.stderr
        assert copied.stdout.split() == [str(folder / file.name) for file in SCRIPTS]
    assert [file.read_bytes() for file in sorted(folder.iterdir())] == [file.read_bytes() for file in SCRIPTS]

    (folder / "gate.sbatch").write_text("mine\n")
    (folder / "phase.sbatch").unlink()
    refused = bigincubate("scripts", "--copy", folder)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert str(folder / "gate.sbatch") in refused.stderr
    assert not (folder / "phase.sbatch").exists()
    assert (folder / "gate.sbatch").read_text() == "mine\n"

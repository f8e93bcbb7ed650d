"""The house rules: who may import whom, and what must not be imported to answer a simple question."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigincubate

ROOT = Path(bigincubate.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path, *, top: bool = False) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere, or (``top``) when it is imported itself."""
    package = ["bigincubate", *file.relative_to(ROOT).parent.parts]
    for node in _top_level(ast.parse(file.read_text())) if top else ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run at import: not those inside functions, nor what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


def room(file: Path) -> str:
    """``data`` for a file of that package, ``trainer`` for a module at the top."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms_importing(name: str) -> set[str]:
    return {room(file) for file in FILES if any(f"{i}.".startswith(f"{name}.") for i in imports(file))}


def rooms_of(owner: str, *, top: bool = False) -> set[str]:
    """The rooms of this package that a room imports from."""
    found = {
        name.split(".")[1]
        for file in FILES
        if room(file) == owner
        for name in imports(file, top=top)
        if name.startswith("bigincubate.")
    }
    return found - {owner}


def test_the_reader_of_imports_sees_them() -> None:
    names = set(imports(ROOT / "trainer.py"))
    assert {"time", "torch", "torch.Tensor", "bigincubate.config.Recipe", "bigincubate.models.extract"} <= names
    assert "bigincubate.errors.ConfigError" in set(imports(ROOT / "data" / "streams.py"))
    assert "torch" not in set(imports(ROOT / "doctor.py", top=True))
    assert "torch" in set(imports(ROOT / "doctor.py"))
    assert len(FILES) > 30


@pytest.mark.parametrize(
    ("package", "allowed"), [("streaming", {"data"}), ("deepspeed", {"compat"}), ("fairscale", {"compat"})]
)
def test_a_heavy_dependency_has_one_room(package: str, allowed: set[str]) -> None:
    assert rooms_importing(package) == allowed


def test_models_know_nothing_of_ranks() -> None:
    for file in FILES:
        if room(file) == "models":
            assert not [name for name in imports(file) if "distributed" in name], file
    assert rooms_of("models") <= {"errors", "config", "kernels", "seeds"}
    assert rooms_of("kernels") == set()


def test_sharding_knows_neither_tasks_nor_models() -> None:
    assert not rooms_of("sharding") & {"tasks", "models", "trainer", "data", "plan"}


@pytest.mark.parametrize(
    ("owner", "forbidden"),
    [
        ("config", {"cli", "trainer", "models", "data", "plan", "tasks", "cluster", "checkpoint"}),
        ("errors", {"config", "cli", "trainer"}),
        ("files", {"config", "cli", "trainer", "rundir"}),
        ("data", {"models", "trainer", "tasks", "sharding", "plan", "cluster", "checkpoint"}),
        ("plan", {"trainer", "data", "tasks", "cluster", "checkpoint", "sharding"}),
        ("tasks", {"trainer", "sharding"}),
        ("checkpoint", {"trainer", "models", "tasks", "data", "sharding"}),
        ("optim", {"models", "trainer", "sharding", "data"}),
        ("cluster", {"trainer", "models", "data", "tasks", "sharding"}),
        ("trainer", {"cli", "export", "attempt"}),
        ("report", {"cli", "trainer", "models", "tasks", "sharding", "attempt", "plan"}),
        ("attempt", {"cli", "export", "models", "sharding", "tasks"}),
    ],
)
def test_a_room_does_not_import_those_above_it(owner: str, forbidden: set[str]) -> None:
    assert rooms_of(owner) & forbidden == set()


def test_only_the_edge_imports_the_command_line() -> None:
    assert {room(file) for file in FILES if "bigincubate.cli.main" in set(imports(file))} == {"__main__"}


def loaded_after(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` of a new process."""
    tail = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}"], capture_output=True, text=True, timeout=120, check=True
    )
    return set(ended.stdout.split())


HEAVY = {"torch", "timm", "streaming", "torchvision", "numpy", "sklearn", "tensorboard", "PIL", "matplotlib"}


def test_importing_the_edge_imports_nothing_heavy() -> None:
    loaded = loaded_after("import bigincubate, bigincubate.cli, bigincubate.config, bigincubate.errors")
    assert "pydantic" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["recipes"], ["plan", "nothing"]])
def test_small_commands_import_nothing_heavy(words: list[str]) -> None:
    code = f"""
import contextlib, io, sys
sys.argv = ["bigincubate", *{words!r}]
from bigincubate.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""
    assert loaded_after(code) & HEAVY == set()


def test_a_status_needs_no_torch(lab: object) -> None:
    run = lab().run.path  # type: ignore[operator]
    code = f"""
import contextlib, io, sys
sys.argv = ["bigincubate", "status", {str(run)!r}]
from bigincubate.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""
    assert "streaming" not in loaded_after(code)


def test_every_file_says_what_it_is_for() -> None:
    for file in FILES:
        assert file.name == "__main__.py" or ast.get_docstring(ast.parse(file.read_text())), file

"""Which package may import which, what small commands must not load, and what the trainer must not know."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import bigincubate
from bigincubate.report.verify import Verdict, verify_run
from bigincubate.storage.run_directory import RunDir

ROOT = Path(bigincubate.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The packages of the tree, lowest first. A package imports only packages above it in this list; `files`,
# `errors` and `api` are single files. docs/architecture.md says what each is for.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "compat": {"errors"},
    "config": {"errors", "files"},
    "kernels": set(),
    "distributed": {"compat", "errors"},
    "storage": {"config", "distributed", "errors", "files"},
    "models": {"compat", "config", "errors", "kernels"},
    "data": {"compat", "config", "distributed", "errors", "files", "storage"},
    "optim": {"compat", "config", "errors", "storage"},
    "sharding": {"compat", "config", "distributed", "errors", "optim", "storage"},
    "tasks": {"compat", "config", "data", "distributed", "errors", "files", "models"},
    "planning": {
        *("config", "data", "distributed", "errors", "files", "models", "optim", "sharding", "storage"),
        "tasks",
    },
    "interchange": {"compat", "config", "errors", "files", "models", "storage"},
    "launchers": {"compat", "config", "distributed", "errors", "files", "planning", "storage"},
    "report": {
        *("config", "data", "errors", "files", "interchange", "launchers", "models", "planning", "storage", "tasks"),
    },
    "training": {
        *("compat", "config", "data", "distributed", "errors", "files", "interchange", "models", "optim", "planning"),
        *("sharding", "storage", "tasks"),
    },
    "experimental": {
        *("config", "data", "distributed", "errors", "kernels", "optim", "planning", "sharding", "storage", "tasks"),
        *("launchers", "training"),
    },
    "api": {
        "files",
        *("config", "data", "distributed", "errors", "interchange", "launchers", "planning", "report", "storage"),
        *("tasks", "training"),
    },
    "cli": {
        *(
            "api",
            "config",
            "data",
            "distributed",
            "errors",
            "experimental",
            "files",
            "interchange",
            "launchers",
            "models",
        ),
        *("planning", "report", "storage", "tasks", "training"),
    },
    "__main__": {"cli", "compat", "distributed"},
}
HEAVY = {
    *("torch", "timm", "streaming", "torchvision", "numpy", "sklearn", "tensorboard", "PIL", "matplotlib"),
    "huggingface_hub",
}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(file: Path, root: Path = ROOT, *, top: bool = False) -> Iterator[str]:
    """Yield absolute names of what a file imports, anywhere, or (``top``) when it is itself imported."""
    package = ["bigincubate", *file.relative_to(root).parent.parts]
    for node in _top_level(parse(file)) if top else ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield statements that run at import: none inside functions, none that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


def box(file: Path, root: Path = ROOT) -> str:
    """Return ``data`` for a file of that package, ``errors`` for a module at the top."""
    return file.relative_to(root).parts[0].removesuffix(".py")


def module_name(file: Path, root: Path = ROOT) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(["bigincubate", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def file_graph(root: Path = ROOT, *, top: bool = False) -> dict[str, set[str]]:
    """Return module -> modules of this package that it imports (``top``: when it is itself imported)."""
    files = {module_name(file, root): file for file in sorted(root.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        found = set()
        for imported in imports(file, root, top=top):
            target = imported if imported in files else imported.rpartition(".")[0]
            if target in files and target != name:
                found.add(target)
        graph[name] = found
    return graph


def package_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return package (or top-level module) -> packages that it imports, at import or later."""
    graph: dict[str, set[str]] = {}
    for name, found in file_graph(root).items():
        if "." in name:
            own = name.split(".")[1]
            others = {other.split(".")[1] for other in found if "." in other}
            graph[own] = graph.get(own, set()) | (others - {own})
    return graph


def find_cycle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Return one cycle of a graph as a list of nodes, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            if cycle := visit(other, [*path, node]):
                return cycle
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


def test_import_reader_finds_imports() -> None:
    names = set(imports(ROOT / "training" / "trainer.py"))
    assert {"time", "torch", "torch.Tensor", "bigincubate.errors.NonFiniteError"} <= names
    assert "torch" not in set(imports(ROOT / "cli" / "training.py", top=True))
    assert len(FILES) > 30


def test_packages_have_no_cycle() -> None:
    assert find_cycle(package_graph()) is None


def test_files_have_no_cycle_at_import() -> None:
    assert find_cycle(file_graph(top=True)) is None


@pytest.mark.parametrize(
    "statement", ["from ..training import trainer", "def late():\n    from ..training import trainer"]
)
def test_deliberate_cycle_of_packages_is_found(statement: str, tmp_path: Path) -> None:
    for file in FILES:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (tmp_path / "distributed" / "deliberate.py").write_text(f"{statement}\n")
    cycle = find_cycle(package_graph(tmp_path))
    assert cycle is not None
    assert {"distributed", "training"} <= set(cycle)


@pytest.mark.parametrize("package", sorted({box(file) for file in FILES} - {"__init__"}))
def test_package_imports_only_lower_ones(package: str) -> None:
    assert package_graph().get(package, set()) <= LAYERS[package]


def test_tree_has_at_most_24_entries() -> None:
    entries = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 24, sorted(path.name for path in entries)


def test_core_never_imports_experimental() -> None:
    found = {box(file) for file in FILES if any("experimental" in name.split(".") for name in imports(file))}
    assert found <= {"experimental", "cli"}
    assert not [
        file for file in FILES if "cli" in box(file) and any("experimental" in n for n in imports(file, top=True))
    ]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("streaming", {"data", "compat"}),
        ("deepspeed", {"sharding", "compat"}),
        ("fairscale", {"sharding", "compat"}),
    ],
)
def test_heavy_library_is_imported_in_one_package(library: str, allowed: set[str]) -> None:
    found = {box(file) for file in FILES if any(f"{name}.".startswith(f"{library}.") for name in imports(file))}
    assert found
    assert found <= allowed


@pytest.mark.parametrize("package", ["distributed", "storage"])
def test_package_knows_neither_slurm_nor_launchers(package: str) -> None:
    for file in (ROOT / package).glob("*.py"):
        code = ast.unparse(without_docstrings(parse(file)))
        assert "slurm" not in code.lower(), file
        assert "launcher" not in code.lower(), file


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Return a syntax tree whose docstrings are empty."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant(""))
    return tree


# ------------------------------------------------------------------------------------------------ vocabulary

TASK_FREE = ("training", "sharding", "storage", "planning", "launchers", "report", "distributed", "optim")
TASK_WORDS = {"top1", "top5", "num_classes", "img_size"}
TASK_PACKAGES = {"image_classification", "masked_image_modeling", "causal_lm", "vision", "language"}


def vocabulary(tree: ast.AST) -> Iterator[str]:
    """Yield every identifier, attribute, argument and imported name of a syntax tree; strings are exempt."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.ImportFrom(module=module, names=names):
                yield from (module or "").split(".")
                yield from (part for alias in names for part in alias.name.split("."))
            case ast.Import(names=names):
                yield from (part for alias in names for part in alias.name.split("."))


def test_vocabulary_reader_finds_task_words() -> None:
    code = "from ..tasks.image_classification import x\ndef f(num_classes): return a.top1 + g(img_size=1)"
    assert TASK_WORDS - {"top5"} <= set(vocabulary(ast.parse(code)))
    assert "image_classification" in set(vocabulary(ast.parse(code)))


@pytest.mark.parametrize("package", TASK_FREE)
def test_package_knows_no_task(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        words = set(vocabulary(parse(file)))
        assert not words & (TASK_WORDS | TASK_PACKAGES), file


# ------------------------------------------------------------------------------------------------ start-up


def loaded_after(code: str) -> set[str]:
    """Return top-level packages in ``sys.modules`` of a new process."""
    tail = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}"], capture_output=True, text=True, timeout=120, check=True
    )
    return set(ended.stdout.split())


def run_command(*words: str) -> str:
    """Return code that runs a command line in its process and discards what it prints."""
    return f"""
import contextlib, io, sys
sys.argv = ["bigincubate", *{words!r}]
from bigincubate.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_after("import bigincubate, bigincubate.cli, bigincubate.config, bigincubate.errors")
    assert "pydantic" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["recipes"], ["plan", "nothing"]])
def test_small_commands_load_nothing_heavy(words: list[str]) -> None:
    assert loaded_after(run_command(*words)) & HEAVY == set()


@pytest.fixture(scope="module")
def started(harness: Callable[..., Any]) -> RunDir:
    """A run with an artifact and a checkpoint."""
    made = harness("train.max_steps=1", "checkpoint.every_steps=1")
    made.train("pretrain")
    run: RunDir = made.run
    verdicts = {(finding.path.name, finding.verdict) for finding in verify_run(run)}
    assert {("artifact", Verdict.GOOD), ("step-00000001", Verdict.GOOD)} <= verdicts
    return run


@pytest.mark.parametrize("command", ["status", "logs", "verify", "report", "compare", "plan"])
def test_command_that_computes_nothing_does_not_load_torch(command: str, started: RunDir) -> None:
    loaded = loaded_after(run_command(command, str(started.recipe_file if command == "plan" else started.path)))
    assert "pydantic" in loaded
    assert loaded & (HEAVY - {"numpy", "matplotlib"}) <= {"PIL"}


def test_phase_of_an_image_task_loads_no_library_that_it_does_not_use() -> None:
    phase = (
        "import bigincubate.training.run_phase, bigincubate.tasks.image_classification.task, bigincubate.data.streams"
    )
    unused = {"transformers", "sklearn", "scipy", "pandas", "botocore", "boto3", "matplotlib"}
    loaded = loaded_after(phase)
    assert {"streaming", "tensorboard", "timm"} <= loaded
    assert not loaded & unused
    # they are loaded when they are used, and before
    use = "import streaming.text; assert issubclass(streaming.text.StreamingC4, streaming.StreamingDataset)"
    assert "transformers" in loaded_after(f"{phase}\n{use}")
    before = "from transformers import BatchEncoding; from streaming.base import dataloader as used"
    assert "streaming" in loaded_after(
        f"import transformers\n{phase}\n{before}\nassert used.BatchEncoding is BatchEncoding"
    )


def test_streaming_is_imported_in_one_place() -> None:
    users = {file.name for file in FILES if "streaming" in {name.partition(".")[0] for name in imports(file)}}
    assert users == {"streaming_package.py"}


# what the Python of job scripts and gates needs besides bigincubate, with their dependencies (docs/slurm.md)
HOST_PACKAGES = {"typer", "rich", "pydantic", "safetensors"}
HOST_DEPENDENCIES = {
    *("annotated_doc", "annotated_types", "click", "markdown_it", "mdurl", "pydantic_core", "pygments", "shellingham"),
    *("typing_extensions", "typing_inspection"),
}


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "{run}", "--gate"],
        ["handle-job-exit", "{run}", "--phase", "finetune", "--job", "7", "--code", "75"],
        ["cancel", "{run}"],
        ["status", "{run}"],
    ],
)
def test_job_scripts_and_gates_need_a_small_python(
    command: list[str], started: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run on the host if the ranks run in a container."""
    for name, answer in {"sbatch": "12", "squeue": "", "scontrol": "MaxArraySize = 1001", "scancel": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\necho '{answer}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    loaded = loaded_after(run_command(*(word.format(run=started.path) for word in command)))
    third_party = {name for name in loaded & packages_distributions().keys() if not name.startswith("_")}
    assert third_party <= HOST_PACKAGES | HOST_DEPENDENCIES | {"bigincubate", "setuptools"}
    if "--gate" in command:
        submitted = json.loads((started.path / "jobs.json").read_text())["jobs"]
        assert [entry["kind"] for entry in submitted] == ["incubate", "gate"]


def test_every_file_has_a_docstring() -> None:
    for file in FILES:
        assert file.name == "__main__.py" or ast.get_docstring(parse(file)), file

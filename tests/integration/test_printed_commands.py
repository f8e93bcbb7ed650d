"""Commands in messages can be pasted: they are complete, and paths with spaces or quotes are quoted."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import bigincubate
from bigincubate.cli.app import app
from bigincubate.errors import BigincubateError, format_command
from bigincubate.interchange.export import load_model

PACKAGE = Path(bigincubate.__file__).parent
COMMAND = re.compile(r"\bbigincubate (?:[a-z]+)\b")


def parse(text: str) -> dict[str, Any]:
    """Parse the command at the end of a message as the command line does, and return its parameters."""
    words = shlex.split(text[text.index("bigincubate ") :])[1:]
    group = typer.main.get_command(app)
    with group.make_context("bigincubate", list(words)) as context:
        name, command, rest = group.resolve_command(context, words)  # type: ignore[attr-defined]
        with command.make_context(name, rest, parent=context) as parsed:
            return dict(parsed.params)


@pytest.fixture
def spaced(done: Any, tmp_path: Path) -> Any:
    """A finished run in a directory whose name a shell would split."""
    return done.copy(tmp_path / "it's my run")


def test_format_command_can_be_parsed_by_a_shell() -> None:
    words = ["evaluate", "it's my run", "--data", "$HOME/*", "--probe", ""]
    assert shlex.split(format_command(*words)) == ["bigincubate", *words]


def test_unfinished_run_names_the_command_that_resumes_it(spaced: Any, digits: Path, call: Callable[..., Any]) -> None:
    shutil.rmtree(spaced.run.path / "finetune")
    code, _, err = call("evaluate", spaced.run.path, "--data", digits)
    assert code == 4
    parameters = parse(err)
    assert (parameters["recipe"], parameters["directory"].path) == (str(spaced.run.recipe_file), spaced.run.path)
    with pytest.raises(BigincubateError, match="no finished model"):
        load_model(spaced.run.path)


def test_missing_phases_name_the_commands_that_train_them(spaced: Any) -> None:
    shutil.rmtree(spaced.run.path / "finetune")
    shutil.rmtree(spaced.run.path / "modules" / "01")
    with pytest.raises(BigincubateError, match="cannot assemble") as caught:
        spaced.train("finetune")
    parameters = parse(str(caught.value))
    assert (parameters["directory"].path, parameters["phase"], parameters["module"]) == (
        spaced.run.path,
        "incubate",
        "1",
    )
    shutil.rmtree(spaced.run.path / "meta")
    with pytest.raises(BigincubateError, match="the meta model is missing") as caught:
        spaced.train("incubate", 1)
    parameters = parse(str(caught.value))
    assert (parameters["directory"].path, parameters["phase"]) == (spaced.run.path, "pretrain")


def test_run_prints_commands_that_can_be_pasted(
    spaced: Any, digits: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    code, out, err = call("run", spaced.run.recipe_file, "--run-dir", spaced.run.path)
    assert (code, err) == (0, "")
    lines = {line.partition(":")[0]: line for line in out.splitlines()}
    parameters = parse(lines["next"])
    assert (parameters["source"], parameters["data"]) == (spaced.run.path, [digits])
    assert shlex.split(lines["curves"])[1:] == ["tensorboard", "--logdir", str(spaced.run.path)]
    names: dict[str, Any] = {}
    exec(next(line for line in out.splitlines() if "timm.create_model" in line).strip(), names)
    assert len(names["model"].blocks) == 4
    code, _, err = call("evaluate", spaced.run.path, "--data", tmp_path / "no data")
    assert (code, err.rstrip().endswith(f"--out '{tmp_path / 'no data'}'")) == (3, True)


def messages() -> Iterator[tuple[str, ast.Constant | ast.JoinedStr]]:
    """Yield the file and the node of each string of the package, except docstrings."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            text = (isinstance(node, ast.Constant) and isinstance(node.value, str)) or isinstance(node, ast.JoinedStr)
            if text and id(node) not in docs | inner:
                yield str(file.relative_to(PACKAGE)), node  # type: ignore[misc]


def test_no_message_has_an_incomplete_or_unquoted_command() -> None:
    """`format_command` quotes what it is given. A value inserted after the name of a command is not quoted."""
    found, wrong = 0, []
    for file, node in messages():
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
        for match in COMMAND.finditer(text := "".join(map(str, texts))):
            found += 1
            rest = re.split(r"[`;)\n]", text[match.start() :])[0]
            if "..." in rest or "…" in rest or "\0" in rest:
                wrong.append((file, rest))
    assert found > 5
    assert wrong == []

"""Commands that evaluate, export or import finished models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import ConfigError
from .app import (
    MAX_COUNT,
    JsonOption,
    RecipeArgument,
    SetOption,
    app,
    parse_path,
    say,
    say_json,
)


@app.command()
def evaluate(
    source: Annotated[
        Path, Argument(metavar="DIR_OR_ARTIFACT", parser=parse_path, help="A run, an artifact or an export.")
    ],
    data: Annotated[
        Path,
        Option(
            "--data", metavar="DIR", parser=parse_path, help="Prepared data, of which the validation split is used."
        ),
    ],
    batch_size: Annotated[int, Option(min=1, max=MAX_COUNT, metavar="N")] = 256,
    probe: Annotated[
        str | None, Option(help="Evaluate the features instead: linear or knn, fitted on the training split.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a finished model on a validation split."""
    from ..api import evaluate as score

    if probe not in (None, "linear", "knn"):
        raise ConfigError(f"--probe {probe}: expected linear or knn")
    lines: list[str] = []
    scores = score(source, data, batch_size=batch_size, probe=probe, report=lines.append)  # type: ignore[arg-type]
    if as_json:
        say_json(scores)
    else:
        say("\n".join(lines))


@app.command("export")
def export_weights(
    source: Annotated[
        Path, Argument(metavar="DIR", parser=parse_path, help="A run, a phase's directory or an artifact.")
    ],
    out: Annotated[
        Path, Option(metavar="PATH", parser=parse_path, help="The output folder; with --as official, the output file.")
    ],
    form: Annotated[str, Option("--as", help="library (a folder) or official (a .pth file).")] = "library",
) -> None:
    """Write a finished model as a folder that its library loads (timm, transformers), or as an official checkpoint."""
    if form not in ("library", "official"):
        raise ConfigError(f"--as {form}: expected library or official")
    from ..interchange.export import export, export_official

    if form == "official":
        export_official(source, out)
        say(f"written to {out}")
        return
    say(f"written to {out}; in Python:\n  {export(source, out)}")


@app.command("import")
def import_weights(
    recipe: RecipeArgument,
    files: Annotated[
        list[Path],
        Argument(
            metavar="FILE...",
            parser=parse_path,
            help="Official checkpoints: one, or one per module. Or another run directory.",
        ),
    ],
    part: Annotated[str, Option("--as", help="meta, modules or model.")],
    to: Annotated[
        Path, Option(metavar="DIR", parser=parse_path, help="A run directory; with --as model, the output folder.")
    ],
    sets: SetOption = None,
) -> None:
    """Import a meta model, modules or a complete model from checkpoints of the official implementation.

    With --as meta or modules, FILE may also be a run directory, whose finished modules are imported.
    """
    from ..config import load_recipe

    loaded = load_recipe(recipe, sets or ())
    from ..launchers.slurm.job_queue import SlurmQueue
    from ..storage.run_directory import RunDir
    from ..tasks.metric import describe_metrics
    from ..training.import_official import import_model, import_part

    if part == "model":
        say(f"written to {to}; in Python:\n  {import_model(loaded, files, to)}")
    elif part in ("meta", "modules"):
        for context, result in import_part(loaded, part, files, RunDir(to), SlurmQueue()):  # type: ignore[arg-type]
            say(f"{context.row.title}: imported, {describe_metrics(context.task.metrics, result['metrics'])}")
    else:
        raise ConfigError(f"--as {part}: expected meta, modules or model")

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
    console,
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
        list[Path],
        Option(
            "--data",
            metavar="DIR",
            parser=parse_path,
            help="Prepared data. Repeat it for a table of several data sets.",
        ),
    ],
    batch_size: Annotated[int, Option(min=1, max=MAX_COUNT, metavar="N")] = 256,
    probe: Annotated[
        str | None, Option(help="Evaluate the features instead: linear or knn, fitted on the training split.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        Option(
            "--classes",
            metavar="FILE",
            help="For data with other classes: the model's class of each class (JSON, CSV or text), or the valid labels"
            " of each image (JSON). For several data sets: one file, or one for each of them in order, - for none.",
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        Option(
            "--split",
            metavar="SPLIT",
            help="val, train, or all for both (default: val). For several data sets: one, or one for each, in order.",
        ),
    ] = None,
    per_class: Annotated[bool, Option("--per-class", help="Also print the score of each class.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a finished model on one or more data sets."""
    from ..training.evaluation import evaluate_model

    if probe not in (None, "linear", "knn"):
        raise ConfigError(f"--probe {probe}: expected linear or knn")
    files = [None if name == "-" else parse_path(name) for name in classes or ["-"]]
    found = [
        *evaluate_model(
            source,
            data,
            batch_size=batch_size,
            probe=probe,
            classes=files,
            per_class=per_class,
            split=split or "val",
        )
    ]
    if as_json:
        several = [{"data": str(each.data), **each.values()} for each in found]
        say_json(several if len(found) > 1 else found[0].values())
        return
    from ..report.evaluation_tables import class_table, evaluation_table

    if len(found) == 1:
        say(found[0].describe())
    else:
        console().print(evaluation_table(source, found))
    for each in found:
        if each.result.per_class is not None:
            console().print("", class_table(each))


@app.command("export")
def export_weights(
    source: Annotated[
        Path, Argument(metavar="DIR", parser=parse_path, help="A run, a phase's directory or an artifact.")
    ],
    out: Annotated[
        Path | None,
        Option(metavar="PATH", parser=parse_path, help="The output folder; with --as official, the output file."),
    ] = None,
    form: Annotated[str, Option("--as", help="library (a folder) or official (a .pth file).")] = "library",
    repository: Annotated[
        str | None,
        Option("--push-to-hub", metavar="OWNER/NAME", help="Also push the folder to the Hugging Face Hub."),
    ] = None,
    private: Annotated[bool, Option("--private", help="The repository of --push-to-hub is private.")] = False,
    license_name: Annotated[
        str | None,
        Option("--license", metavar="NAME", help="The license in the model card, such as apache-2.0 (default: none)."),
    ] = None,
) -> None:
    """Write a finished model as a folder that its library loads (timm, transformers), or as an official checkpoint.

    The folder has a model card, README.md, with the data, scores, cost, lineage and recipe of the run.
    """
    if form not in ("library", "official"):
        raise ConfigError(f"--as {form}: expected library or official")
    if out is None and repository is None:
        raise ConfigError("nothing to write: give --out, --push-to-hub, or both")
    if private and repository is None:
        raise ConfigError("--private is for the repository of --push-to-hub; give that too, or omit it")
    if form == "official":
        _export_official(source, out, repository or license_name)
        return
    from ..interchange.hub import check_license, check_repository, push_folder

    if license_name is not None:
        check_license(license_name)
    if repository is not None:
        check_repository(repository)
    from tempfile import TemporaryDirectory

    from ..report.model_card import export_with_card

    with TemporaryDirectory() as temporary:
        folder = out or Path(temporary) / "model"
        code = export_with_card(source, folder, repository=repository, license_name=license_name)
        if out is not None:
            say(f"written to {out}; in Python:\n  {code}")
        if repository is not None:
            say(f"pushed to {push_folder(folder, repository, private=private)}")


def _export_official(source: Path, out: Path | None, unused: str | None) -> None:
    """Write an official checkpoint.

    Args:
        source: What to export.
        out: The file to write.
        unused: The value of an option that is only for folders.

    Raises:
        ConfigError: There is no file to write to, or an option that is only for folders.
    """
    if out is None or unused is not None:
        raise ConfigError("--as official writes a file: give --out, and neither --push-to-hub nor --license")
    from ..interchange.export import export_official

    export_official(source, out)
    say(f"written to {out}")


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

"""The model card of an exported model (``README.md``), from what its run recorded.

It has metadata for a model hub, and text: what the model is, how to load it, its data, scores, cost, lineage and
recipe. What is not known is left out. It has no local paths, host names or user names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..config import PHASES, Recipe
from ..config.recipe import is_execution
from ..errors import ConfigError
from ..files import drop_folders
from ..interchange.export import FORMATS, export
from ..models.library import find_family
from ..storage.artifacts import ModelSpec
from ..tasks.base import Task
from ..tasks.metric import Metric
from ..tasks.registry import task_class
from .console_tables import common_unit, format_depths, metric_columns
from .machines import describe_devices, describe_versions
from .origin import Origin, find_origin
from .run_data import PhaseData
from .units import format_quantity

CITATION = """\
@inproceedings{ni2023deep,
  title     = {Deep Incubation: Training Large Models by Divide-and-Conquering},
  author    = {Ni, Zanlin and Wang, Yulin and Yu, Jiangwei and Jiang, Haojun and Cao, Yue and Huang, Gao},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {17335--17345},
  year      = {2023},
}"""


def export_with_card(source: Path, out: Path, *, repository: str | None = None, license_name: str | None = None) -> str:
    """Export a model with its card; see :func:`.interchange.export.export`.

    Args:
        source: A run directory, a phase's directory, an artifact, or an exported folder.
        out: The folder to write.
        repository: Name of the repository of a hub that the folder will be pushed to.
        license_name: The license that the card states, as the hub names it; None to state none.

    Returns:
        Python code that loads the model.

    Raises:
        ArtifactError: There is no complete model in ``source``, or the tokenizer of its data is missing.
        ConfigError: ``out`` contains other files.
    """
    origin = find_origin(source)
    return export(source, out, repository=repository, card=partial(render_card, origin, license_name))


# ------------------------------------------------------------------------------------------------ the card


def render_card(
    origin: Origin | None, license_name: str | None, model: nn.Module, spec: ModelSpec, code: Sequence[str]
) -> str:
    """Return a model card.

    Args:
        origin: The run that trained the model, if it is known.
        license_name: The license, as the hub names it; None to state none.
        model: The model.
        spec: Its description.
        code: The lines of Python code that load it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    task = _find_task(spec)
    hub_name = task.hub_name if task else None
    results = _hub_results(origin, hub_name) if origin and hub_name else []
    metadata = ModelCardData(
        license=license_name,
        library_name=spec.model.library if spec.model.library in FORMATS else None,
        pipeline_tag=hub_name,
        tags=["bigincubate", "deep-incubation"],
        model_name=_title(origin, spec) if results else None,
        eval_results=results or None,
    )
    sections = {
        "": _describe_model(origin, task, model, spec),
        "How to load it": f"```python\n{chr(10).join(code)}\n```",
        **(_run_sections(origin, task) if origin else {}),
        "Limits": _limits(origin),
        "Citation": f"The method is that of this paper:\n\n```bibtex\n{CITATION}\n```",
    }
    text = "\n\n".join(f"## {heading}\n\n{content}" if heading else content for heading, content in sections.items())
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# {_title(origin, spec)}\n\n{text}\n"))


def _title(origin: Origin | None, spec: ModelSpec) -> str:
    return origin.recipe.name if origin else spec.model.name


def _find_task(spec: ModelSpec) -> type[Task] | None:
    """Return the class of a model's task, or None if it cannot be imported here."""
    try:
        return task_class(spec.task.name)
    except ConfigError:
        return None


def _hub_results(origin: Origin, hub_name: str) -> list[Any]:
    """Return the scores of the exported model in the form of a hub."""
    from huggingface_hub import EvalResult

    if origin.result is None or origin.data_name is None:
        return []
    return [
        EvalResult(
            task_type=hub_name,
            dataset_type=origin.data_name,
            dataset_name=origin.data_name,
            dataset_split="validation",
            metric_type=metric.name,
            metric_name=metric.column,
            metric_value=float(metric.text(value)),
        )
        for metric in _own_metrics(origin)
        if (value := metric.value_in(origin.result)) is not None
    ]


def _own_metrics(origin: Origin) -> Sequence[Metric]:
    """Return the metrics of the last phase."""
    return origin.phases[-1].metrics if origin.phases else ()


def _describe_model(origin: Origin | None, task: type[Task] | None, model: nn.Module, spec: ModelSpec) -> str:
    """Return what the model is, and how it was trained."""
    family = find_family(spec.model)
    parameters, widths = sum(each.numel() for each in model.parameters()), family.widths(model)
    size = [
        f"{sum(map(sum, spec.depths)):,} blocks ({format_depths(spec.depths)} in its modules)",
        *([f"width {', '.join(f'{width:,}' for width in widths)}"] if widths else []),
        f"{parameters:,} parameters",
    ]
    about = (
        f"This is a model of the family {family.name} (`{spec.model.name}`, library `{spec.model.library}`) with"
        f" {', '.join(size[:-1])} and {size[-1]}."
    )
    sentences = [about, (task and task.describe_model(spec.model)) or "", _describe_training(origin) if origin else ""]
    if spec.initial_weights is not None:
        sentences.append(f"Training started from `{_one_line(spec.initial_weights)}`.")
    if origin and origin.manifest.weights == "ema":
        sentences.append("The weights are an exponential moving average of those in training.")
    description = f"{origin.recipe.description}\n\n" if origin and origin.recipe.description else ""
    return description + " ".join(filter(None, sentences))


def _one_line(text: str) -> str:
    """Return text without what would end a span of code in Markdown."""
    return " ".join(text.split()).replace("`", "'")


def _describe_training(origin: Origin) -> str:
    """Return how the model was trained, in a sentence."""
    plan, phase = origin.recipe.plan, origin.manifest.phase
    if phase == "end_to_end":
        return "It was trained end to end, without modules, by `bigincubate`."
    if phase == "pretrain":
        return "It is the meta model of a Deep Incubation run by `bigincubate`, not its final model."
    if origin.recipe.finetune.init is not None:
        return "It is a finished model that `bigincubate` fine-tuned on other data."
    depth = sum(map(sum, origin.run_data.plan["meta_depths"]))
    if len(plan.incubated) == plan.number:
        modules = f"then each of the {plan.number} modules of this model was trained separately inside of it"
    elif not plan.incubated:
        modules = f"then this model was made from it (depth expansion, `{origin.recipe.expand.init}`)"
    else:
        verb = "was" if len(plan.incubated) == 1 else "were"
        modules = (
            f"then {len(plan.incubated)} of the {plan.number} modules of this model {verb} trained separately inside of"
            f" it, and the others were made from it (`{origin.recipe.expand.init}`)"
        )
    last = "finally, the model was fine-tuned" if phase == "finetune" else "it was not fine-tuned after that"
    method = "depth expansion" if not plan.incubated else "Deep Incubation"
    return (
        f"It was trained by {method} with `bigincubate`: first, a meta model with {depth} blocks was trained;"
        f" {modules}; {last}."
    )


def _limits(origin: Origin | None) -> str:
    if origin is None:
        return "The run that trained this model is not known here, and so are its data and scores."
    seed = origin.recipe.settings("finetune" if origin.run_data.main else "end_to_end").train.seed
    return (
        f"The scores are those of one training run (seed {seed}) on the validation split of its own data. No"
        " other evaluation is recorded here: evaluate the model on your data before you use it."
    )


# ------------------------------------------------------------------------------------------------ the run


def _run_sections(origin: Origin, task: type[Task] | None) -> dict[str, str]:
    """Return the sections about the run, without those about which nothing is known."""
    missing = "" if origin.recipe.data.source else " To train with it, name the data with `data.path`."
    tasks = {origin.recipe.settings(phase).task.name for phase in PHASES}
    unused = task.unused_keys if task and len(tasks) == 1 else ()
    recipe = public_recipe(origin.recipe, unused)
    fence = "`" * (4 + max(map(len, re.findall("`+", recipe)), default=0))
    sections = {
        "Data": _describe_data(origin),
        "Scores": _score_table(origin),
        "Training": _describe_cost(origin),
        "Lineage": _lineage_table(origin),
        "Recipe": (
            f"This is what was computed, without the settings of where and how.{missing}\n\n<details>\n"
            "<summary>recipe.toml</summary>\n\n"
            f"{fence}toml\n{recipe}{fence}\n\n</details>"
        ),
    }
    return {heading: content for heading, content in sections.items() if content}


def _describe_data(origin: Origin) -> str:
    name, recipe = origin.data_name, origin.recipe
    kind = "built-in data" if recipe.data.source else "a prepared data set"
    lines = [f"- name: `{name}` ({kind})"] if name else []
    if origin.data is not None:
        samples = origin.data.samples
        lines.append(f"- samples: {samples['train']:,} for training, {samples['val']:,} for validation")
    lines.append(f"- SHA-256: `{origin.manifest.data}`")
    if recipe.data.decentralized and origin.modules:
        lines.append("- partitions: each module was trained only on a part of the training samples")
    return "\n".join(lines)


def _score_table(origin: Origin) -> str:
    """Return the scores of the phases as a table: of all modules, the range from the worst to the best hybrid."""
    if not origin.phases:
        return ""
    metrics = metric_columns(phase.metrics for phase in origin.phases)
    unit = common_unit(phase.unit for phase in origin.phases)
    rows: dict[str, tuple[list[dict[str, Any]], list[PhaseData]]] = {}
    for phase in origin.phases:
        many = phase.planned["phase"] == "incubate" and len(origin.modules) > 1
        results, phases = rows.setdefault("modules, as hybrids" if many else phase.title, ([], []))
        results.append(phase.result or {})
        phases.append(phase)
    if origin.assembled:
        last = rows.pop(origin.phases[-1].title) if origin.manifest.phase == "finetune" else None
        rows["assembled"] = ([origin.assembled], [])
        if last:
            rows[origin.phases[-1].title] = last
    table = [["", *(metric.column for metric in metrics), unit, "FLOPs"]]
    for title, (results, phases) in rows.items():
        scores = [_score_range(metric, results) for metric in metrics]
        seen, flops = (sum(phase.spent[key] for phase in phases) for key in ("seen", "flops"))
        table.append([title, *scores, *([f"{seen:,.0f}", format_quantity(flops, "FLOP")] if phases else ["", ""])])
    samples = (origin.result or origin.phases[-1].result or {})["samples"]
    note = f"On {samples:,} validation {unit}."
    if origin.modules:
        note += (
            " A module is evaluated as a hybrid: in its place in the meta model. Of several modules, the range from the"
            " worst to the best is shown, and the sums of their costs."
        )
    return f"{_markdown_table(table)}\n\n{note}"


def _score_range(metric: Metric, results: Sequence[Mapping[str, Any]]) -> str:
    values = [value for result in results if (value := metric.value_in(result)) is not None]
    ends = sorted(values, reverse=not metric.higher_is_better)
    return " to ".join(dict.fromkeys(map(metric.text, (ends[0], ends[-1])))) if ends else ""


def _describe_cost(origin: Origin) -> str:
    """Return the FLOPs of all phases, and the machines and software."""
    if not origin.phases:
        return ""
    attempts = [attempt for phase in origin.phases for attempt in phase.attempts]
    flops = sum(phase.spent["flops"] for phase in origin.phases)
    before = ", without the training of the model that it started from" if origin.recipe.finetune.init else ""
    counted = format_quantity(flops, "FLOP")
    lines = [f"- FLOPs of all phases together: {counted} (matrix products and convolutions{before})"]
    if devices := describe_devices(attempts):
        lines.append(f"- devices: {devices}")
    if versions := describe_versions(attempts):
        lines.append(f"- versions: {versions}")
    return "\n".join(lines)


def _lineage_table(origin: Origin) -> str:
    titles = {phase.key: phase.title for phase in origin.run_data.phases}
    rows = [
        [titles.get(key, key), manifest.weights, f"`{manifest.digest}`"] for key, manifest in origin.lineage.items()
    ]
    table = _markdown_table([["phase", "weights", "SHA-256"], *rows])
    return f"The phases whose weights this model was made from, and its own:\n\n{table}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join('---' for _ in rows[0])} |", *lines[1:]])


def public_recipe(recipe: Recipe, unused: Sequence[str] = ()) -> str:
    """Return the identity keys of a recipe and its name as TOML, with files named without their folders.

    Args:
        recipe: The recipe.
        unused: Keys and tables that its task does not read, which are left out.
    """
    import tomli_w

    return tomli_w.dumps({"name": recipe.name, **_public_table(recipe.model_dump(exclude_none=True), "", unused)})


def _public_table(table: Mapping[str, Any], prefix: str, unused: Sequence[str]) -> dict[str, Any]:
    """Return the identity keys of a table that are used, and its tables that have some."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if f"{prefix}{key}" in unused:
            continue
        if isinstance(value, dict):
            if inner := _public_table(value, f"{prefix}{key}.", unused):
                found[key] = inner
        elif not is_execution(f"{prefix}{key}"):
            found[key] = _without_folders(value)
    return found


def _without_folders(value: Any) -> Any:
    """Return a value of a recipe in which absolute paths are only the names of their files."""
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    is_path = isinstance(value, str) and re.match(r"([\w-]+:)*(~|/(?!/))", value)
    return drop_folders(value) if is_path else value

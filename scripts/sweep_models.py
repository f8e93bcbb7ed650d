"""Cut and assemble every timm model that a family claims, without weights, and write docs/models.md.

    python scripts/sweep_models.py [--write] [NAME ...]

Each named model (default: all) is built on the meta device as a meta model of two modules, as each hybrid and as a
target; the modules of the hybrids are assembled; the costs of the first of each configuration are counted. With
``--write`` the results become docs/models.md. Exit codes: 0 each model passed or was refused with a message, 1 some
failed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

import timm
import torch

from bigincubate.config import ModelConfig, Settings
from bigincubate.errors import ConfigError
from bigincubate.models.base import Depths
from bigincubate.models.checks import check_model
from bigincubate.models.partition import Partition, check_depths
from bigincubate.models.surgery import assemble, extract, rename_tensors
from bigincubate.models.vision.build import TimmFamily
from bigincubate.models.vision.families import FAMILIES, find_timm_family
from bigincubate.planning.cost import count_cost
from bigincubate.planning.phases import Plan, phase_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
TABLE_HEAD = ("| name | blocks | image | parameters M | configuration |", "| --- | --- | ---: | ---: | --- |")
COMMAND = "python scripts/sweep_models.py --write"


@dataclass(frozen=True, order=True)
class Result:
    """What the sweep found about one timm name.

    Attributes:
        family: Name of the family that claims it.
        configuration: Kind of block and names of the tensors; equal for models that are cut in the same way.
        name: timm's name.
        depths: Blocks per stage of the model as timm defines it.
        img_size: Side of its input in pixels.
        parameters: Parameters with 1000 classes.
        refused: The message with which the family refuses the model; empty if it is supported.
    """

    family: str
    configuration: str
    name: str
    depths: tuple[int, ...] = ()
    img_size: int = 0
    parameters: int = 0
    refused: str = ""


def claimed_names() -> list[str]:
    """Return timm's names whose class a family claims.

    Only names from Python modules that use one of the classes are built to see which one they have.
    """
    classes = {name for family in FAMILIES for name in family.classes}
    names = []
    for name in timm.list_models():
        module = sys.modules[timm.models.model_entrypoint(name).__module__]
        if classes & vars(module).keys():
            names.append(name)
    return names


def sweep_model(name: str, priced: Collection[str] = ()) -> Result:
    """Cut and assemble one model on the meta device and count its costs.

    Args:
        name: timm's name.
        priced: Configurations whose costs need not be counted again.

    Raises:
        AssertionError: The assembled model has other tensors than the target.
        Exception: Anything that building the model raises, except a refusal.
    """
    built = timm.create_model(name, num_classes=1000, drop_path_rate=0.0, device="meta")
    family = find_timm_family(name, built)
    depths = family.count_blocks(built.state_dict())
    parameters = sum(parameter.numel() for parameter in built.parameters())
    config = timm.models.get_pretrained_cfg(name)
    size = config.input_size[-1] if config else 224
    settings = Settings(model=ModelConfig(name=name, img_size=size))
    try:
        check_model(built, Partition(family, (depths,)))
        plan = _smallest_plan(family)
        configuration = _describe(_assemble(settings, plan), plan)
        if configuration not in priced:
            count_cost(plan.row("pretrain"), settings, plan)
    except ConfigError as error:
        return Result(family.name, "refused", name, depths, size, parameters, str(error))
    return Result(family.name, configuration, name, depths, size, parameters)


def _smallest_plan(family: TimmFamily) -> Plan:
    """Return a plan of two modules: the shallowest meta model, and a target with more blocks in both modules."""
    meta: Depths
    target: Depths
    if family.stages == 1:
        meta, target = ((1,), (1,)), ((2,), (2,))
    else:
        least = family.parity
        meta, target = ((1, 1, least, 0), (0, 0, 1, 1)), ((1, 1, 2 * least, 0), (0, 0, 2, 1))
    check_depths(family, target, meta)
    return Plan(family, target, meta)


def _assemble(settings: Settings, plan: Plan) -> torch.nn.Module:
    """Return the target after checking that the modules of the hybrids have exactly its tensors."""
    target = phase_model(plan.row("finetune"), settings, plan.family, device="meta")
    whole, parts = Partition(plan.family, plan.target), []
    for module in range(plan.modules):
        row = plan.row("incubate", module)
        hybrid = phase_model(row, settings, plan.family, device="meta")
        own = Partition(plan.family, row.depths)
        parts.append(rename_tensors(extract(hybrid.state_dict(), own, module), own, whole))
    expected = target.state_dict()
    for name, tensor in assemble(parts, expected).items():
        assert tensor.shape == expected[name].shape, name
    return target


def _describe(model: torch.nn.Module, plan: Plan) -> str:
    """Return the classes of the blocks, and the names of all tensors without the indices of blocks and layers."""
    partition = Partition(plan.family, plan.target)
    blocks = {type(model.get_submodule(block.path)).__name__ for block in partition.blocks()}
    tensors = {re.sub(r"\.\d+", "", name) for name in model.state_dict()}
    return f"{' '.join(sorted(blocks))}: {' '.join(sorted(tensors))}"


def sample(results: Iterable[Result]) -> list[str]:
    """Return the first name of each configuration of each family."""
    first: dict[tuple[str, str], str] = {}
    for found in sorted(results):
        if not found.refused:
            first.setdefault((found.family, found.configuration), found.name)
    return list(first.values())


def render(results: Sequence[Result]) -> str:
    """Return docs/models.md."""
    good = sorted(found for found in results if not found.refused)
    lines = [
        "# Supported timm models",
        "",
        f"This page lists every model of timm {timm.__version__} whose class belongs to a family in",
        f"`bigincubate/models/vision/families.py`. It is generated by `{COMMAND}`:",
        "each model was built without weights, cut into two modules and assembled, and the costs of the first model of",
        "each configuration were counted. None was trained for this table. Models with the same configuration have the",
        "same kinds of blocks and the same tensor names. `make test` repeats these checks for the models marked as",
        "sampled; `make test-full` repeats them for all models and counts the costs of each. Pretrained tags, other",
        "depths and other image sizes of these models work as well. To support another family, see",
        "[where a change goes](architecture.md#where-a-change-goes).",
        "",
        f"{len(good)} names are supported; {len(results) - len(good)} are refused with a message.",
    ]
    sampled = set(sample(results))
    for family in FAMILIES:
        rows = [found for found in good if found.family == family.name]
        kinds = list(dict.fromkeys(found.configuration for found in rows))
        lines += ["", f"## {family.covers}", "", *TABLE_HEAD]
        for found in rows:
            kind = f"{family.name} {kinds.index(found.configuration) + 1}"
            mark = " (sampled)" if found.name in sampled else ""
            depths = " + ".join(map(str, found.depths))
            lines.append(
                f"| `{found.name}` | {depths} | {found.img_size} | {found.parameters / 1e6:.1f} | {kind}{mark} |"
            )
    lines += ["", "## Refused", "", "| name | message |", "| --- | --- |"]
    lines += [f"| `{found.name}` | {found.refused} |" for found in sorted(results) if found.refused]
    return "\n".join(lines) + "\n"


def sampled_names(page: str) -> list[str]:
    """Return the names that a page marks as the first of their configuration."""
    return re.findall(r"^\| `(\S+)` \|.*\(sampled\) \|$", page, flags=re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    asked = parser.parse_args(arguments)
    if asked.write and asked.names:
        parser.error("--write needs all names: leave NAME out")
    results: list[Result] = []
    failed = 0
    for name in asked.names or claimed_names():
        try:
            found = sweep_model(name, priced={earlier.configuration for earlier in results})
        except Exception as error:  # the sweep lists every failure
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
            continue
        results.append(found)
        print(f"{name}: {found.refused or found.family}", flush=True)
    print(f"{len(results)} passed or refused, {failed} failed, {len(sample(results))} configurations")
    if asked.write and not failed:
        PAGE.write_text(render(results))
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

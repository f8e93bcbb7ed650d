"""Identity of phases: which results each recipe key invalidates, and what a run directory does about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bigincubate.config import PHASES, ModelConfig, Recipe, Settings, load_recipe
from bigincubate.data.dataset import DatasetInfo
from bigincubate.data.images import labelled_image_schema
from bigincubate.errors import ArtifactError, ConfigError
from bigincubate.files import read_json, write_json
from bigincubate.launchers.slurm.scheduler import _is_valid
from bigincubate.models.base import ModelFamily
from bigincubate.models.vision.families import find_timm_family
from bigincubate.planning import identity
from bigincubate.planning.identity import invalidated_rows, phase_digest, phase_identity
from bigincubate.planning.job_graph import build_job_graph
from bigincubate.planning.lineage import expected_lineage
from bigincubate.planning.phases import Plan, make_plan
from bigincubate.planning.planned_row import PlannedRow
from bigincubate.planning.prepare_run import count_rows
from bigincubate.storage.artifacts import load_artifact, load_manifest, save_artifact

RECIPE = """
name = "base"
[model]
name = "vit_tiny_patch16_224"
img_size = 8
num_classes = 10
args = { patch_size = 2, embed_dim = 24, num_heads = 3 }
[plan]
target_depths = [2, 2]
meta_depths = [1, 1]
[meta]
init = "timm:vit_tiny_patch16_224"
[train]
batch_size = 32
epochs = 2
[drop_path]
rate = 0.1
[schedule]
name = "wsd"
[ema]
decay = 0.9
"""
# 416 samples: 13 batches of 32 in an epoch; the length of an epoch differs for other batch sizes
DATA = DatasetInfo(
    Path("data"), labelled_image_schema([str(label) for label in range(10)]), {"train": 416, "val": 64}, "d" * 64, "pq"
)

# Phases that compute something else when a key changes: Pretrain, Incubate (every module), Finetune, End to end (with
# the FLOPs of the others). A table stands for all its keys that are not listed.
TABLE = {
    "name": "",
    "description": "",
    # the digest of the data says what it is, wherever it lies
    "data": "",
    "data.decentralized": "I",
    "data.canonical_nodes": "PIFE",
    "data.shuffle": "PIFE",
    "data.shuffle_block_size": "PIFE",
    "plan.modules": "",  # target_depths has as many
    "plan.target_depths": "IFE",
    "plan.meta_depths": "PIFE",
    "plan.incubate": "F",
    "expand": "",  # every module is incubated
    "meta.init": "P",
    "meta.select": "P",
    "incubate.init": "I",
    "incubate.boundary": "I",
    "incubate.optimizer": "F",  # modules start from random weights, which have no optimizer state
    "finetune.budget": "",  # every module is incubated
    "end_to_end.budget": "E",
    "pretrain.handover": "PE",  # the baseline at equal FLOPs is as much shorter
    "end_to_end.init": "E",
    "pretrain.export": "P",
    "incubate.export": "I",
    "finetune.export": "F",
    "end_to_end.export": "E",
    "log": "",
    "checkpoint": "",
    "slurm": "",
    # the settings of all phases
    "task": "PIFE",
    "model": "PIFE",
    "train": "PIFE",
    "train.micro_batch": "",
    "train.compile": "",
    "train.deterministic": "",
    "train.subset_drop_path": "",
    "train.last_block_cls_only": "",
    "train.profile": "",
    "optim": "PIFE",
    "schedule": "PIFE",
    "augment": "PIFE",
    "mixup": "PIFE",
    "drop_path.rate": "PIFE",
    "drop_path.ramp_over": "I",  # where the whole model is trained, both ramps are the same
    "loss": "PIFE",
    "text": "PIFE",
    "text.prompt": "",
    "text.example_tokens": "",
    "ema": "PIFE",
    "sharding": "",
}
# Modules read the meta model, and fine-tuning reads the modules: their results become invalid with what they read.
READERS = {"P": "PIF", "I": "IF", "F": "F", "E": "E"}
# they change the FLOPs of a phase, and with them the length of the baseline at equal FLOPs
FLOPS_KEYS = {"train.epochs", "train.max_steps", "train.batch_size", "augment.repeated_aug", "model.img_size"}
FLOPS_KEYS |= {"model.args"}
LENGTH_KEYS = {"train.epochs", "train.max_steps"}  # of no effect on a baseline at equal FLOPs
CONSTANT_KEYS = {"model.library", "model.name"}  # a phase cannot change them
OTHER_TASKS = {"model.context_length", "text.mask_documents"}  # refused for images
WITHOUT_META = {"finetune.init"}  # refused together with meta.init

# Examples where the type of a key does not suggest one
VALUES = {
    "name": '"other"',
    "description": '"other"',
    "task.name": '"bigincubate.tasks.image_classification.task:ImageClassification"',
    "task.args": "{ x = 1 }",
    "model.name": '"deit_tiny_patch16_224"',
    "model.library": f'"{__name__}:timm_library"',
    "model.args": "{ mlp_ratio = 2.0 }",
    "data.source": '"digits"',
    "data.path": '"/elsewhere"',
    "data.remote": '"s3://elsewhere"',
    "data.local_cache": '"/tmp"',
    "data.local_cache_gib": "1.0",
    "data.train_samples": "416",
    "plan.modules": "2",
    "plan.target_depths": "[2, 3]",
    "plan.meta_depths": "[1, 2]",
    "plan.incubate": '"none"',
    "meta.init": '"timm:deit_tiny_patch16_224"',
    "meta.select": "[0, 1]",
    "train.max_steps": "7",
    "train.micro_batch": "16",
    "train.profile": "[2, 3]",
    "optim.name": '"sgd"',
    "optim.betas": "[0.9, 0.99]",
    "optim.layer_decay": "0.9",
    "optim.lr_scaling": '"linear"',
    "augment.crop_scale": "[0.5, 1.0]",
    "augment.rand_augment": '"rand-m9-mstd0.5-inc1"',
    "augment.distinct_epochs": "2",
    "augment.mean": "[0.5, 0.5, 0.5]",
    "augment.std": "[0.5, 0.5, 0.5]",
    "augment.batch_transform": '"bigincubate.experimental.device_augment.transform:DeviceAugment"',
    "loss.name": '"bce"',
    "sharding.deepspeed_config": '"zero2"',
    "log.trackers": '["csv"]',
    **{f"slurm.{kind}": "{ nodes = 2 }" for kind in (*PHASES, "gate")},
    **{f"slurm.{key}": "2" for key in ("cpus", "array_parallelism")},
    "slurm.umask": '"007"',
    "slurm.extra": '["--exclusive"]',
    "slurm.srun": '["--cpu-bind=cores"]',
}


def timm_library(model: ModelConfig) -> ModelFamily:
    return find_timm_family(model.name)


def leaves(table: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted keys of a table and of the tables in it; of a phase, only those that are its own."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        elif not (prefix.removesuffix(".") in PHASES and name in Settings.model_fields):
            yield f"{prefix}{name}", field


def example(key: str, field: FieldInfo) -> str:
    """Return a value that differs from the key's default, and from that of ``RECIPE``, as TOML."""
    if key in VALUES:
        return VALUES[key]
    default = LOADED.flat().get(key, field.default)
    if get_origin(field.annotation) is Literal:
        return json.dumps(next(choice for choice in get_args(field.annotation) if choice != default))
    if isinstance(default, bool):
        return json.dumps(not default)
    if isinstance(default, int):
        return str(2 * default or 1)
    if isinstance(default, float):
        return str(default / 2 or 0.25)
    return '"some"'  # the remaining keys hold text


PLANS: dict[str, Plan] = {}
LOADED: Recipe
ROWS: list[PlannedRow]  # of the recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, counted: None) -> Iterator[Path]:
    """The recipe, with drop-path rates remembered: building the models for them takes most of the time."""
    global LOADED, ROWS
    file = tmp_path_factory.mktemp("recipe") / "base.toml"
    file.write_text(RECIPE)
    LOADED = load_recipe(str(file))
    rates, known = identity._drop_path_rates, {}

    def remembered(plan: Any, row: Any, settings: Settings) -> dict[str, float]:
        key = (plan, row, settings.drop_path.model_dump_json())
        if key not in known:
            known[key] = rates(plan, row, settings)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "_drop_path_rates", remembered)
        ROWS = rows(file)
        yield file


def rows(base: Path, *sets: str) -> list[PlannedRow]:
    recipe = load_recipe(str(base), sets)
    key = recipe.model.model_dump_json() + recipe.plan.model_dump_json() + str(recipe.finetune.init)
    if key not in PLANS:  # making one takes half a second
        PLANS[key] = make_plan(recipe)
    return count_rows(recipe, PLANS[key], DATA)


def invalidated(base: Path, item: str) -> str:
    """Return the initials of the phases that a setting invalidates; modules must agree."""
    keys = [row.key for row in invalidated_rows(ROWS, rows(base, item))]
    assert ("incubate/0" in keys) == ("incubate/1" in keys), (item, keys)
    return "".join(dict.fromkeys(key[0].upper() for key in keys))


def recomputed(key: str) -> str:
    """Return the initials of the phases that compute something else when a key changes, by the table."""
    return next(TABLE[part] for part in (key, key.rpartition(".")[0], key.split(".")[0]) if part in TABLE)


def test_key_invalidates_the_phases_of_the_table(base: Path) -> None:
    keys = {key: field for key, field in leaves(Recipe) if key not in OTHER_TASKS | WITHOUT_META}
    found = {key: set(invalidated(base, f"{key}={example(key, field)}")) for key, field in keys.items()}
    expected = {key: {reader for phase in recomputed(key) for reader in READERS[phase]} for key in found}
    assert {key: (found[key], expected[key]) for key in found if found[key] != expected[key]} == {}
    assert all(any(f"{key}.".startswith(f"{entry}.") for key in found) for entry in TABLE)


@pytest.mark.parametrize(
    ("incubated", "table", "init", "phases"),
    [
        ("all", "incubate", "grow", "IF"),
        ("all", "incubate", "fresh", "F"),
        ("none", "expand", "grow", "F"),
        ("none", "expand", "fresh", ""),
    ],
)
def test_random_tensors_have_no_optimizer_state_to_keep(
    base: Path, incubated: str, table: str, init: str, phases: str
) -> None:
    common = (f"plan.incubate={incubated}", f"{table}.init={init}")
    changed = invalidated_rows(rows(base, *common), rows(base, *common, f"{table}.optimizer=kept"))
    assert "".join(dict.fromkeys(row.key[0].upper() for row in changed)) == phases


def test_finished_model_invalidates_fine_tuning_and_the_baseline_with_its_flops(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.toml"
    file.write_text(RECIPE.replace('[meta]\ninit = "timm:vit_tiny_patch16_224"\n', ""))
    found = [rows(file, *sets) for sets in ((), ("finetune.init=timm:a",), ("finetune.init=timm:b",))]
    assert [row.key for row in found[1]] == ["finetune", "end_to_end"]
    assert [row.key for row in invalidated_rows(found[0], found[1])] == ["finetune", "end_to_end"]
    assert [row.key for row in invalidated_rows(found[1], found[2])] == ["finetune"]


@pytest.mark.parametrize("phase", PHASES)
def test_setting_of_one_phase_invalidates_it_and_what_reads_it(base: Path, phase: str) -> None:
    wrong = {}
    for key, field in leaves(Settings):
        if key in CONSTANT_KEYS | OTHER_TASKS:
            continue
        own = phase[0].upper()
        affected = own in recomputed(key) and not (phase == "end_to_end" and key in LENGTH_KEYS)
        phases = set(READERS[own] if affected else "") | set("E" if affected and key in FLOPS_KEYS else "")
        if (found := set(invalidated(base, f"{phase}.{key}={example(key, field)}"))) != phases:
            wrong[key] = (found, phases)
    assert wrong == {}


def test_identity_has_resolved_facts_and_no_defaults(base: Path) -> None:
    recipe = load_recipe(str(base), ["train.seed=0", "finetune.train.lr=0.5", "finetune.export=ema"])
    plan = make_plan(recipe)
    found = phase_identity(recipe, plan, plan.row("finetune"), replace(ROWS[-2], steps=26))
    assert found == {
        "schema_version": 1,
        "phase": "finetune",
        "steps": 26,
        "slots": [{"modules": 2, "depths": [2], "source": "module"}],
        "drop_path": pytest.approx({"blocks.1": 0.1 / 3, "blocks.2": 0.2 / 3, "blocks.3": 0.1}),
        "ema.decay": 0.9,
        "finetune.export": "ema",
        "model.args.embed_dim": 24,
        "model.args.num_heads": 3,
        "model.args.patch_size": 2,
        "model.img_size": 8,
        "model.name": "vit_tiny_patch16_224",
        "model.num_classes": 10,
        "schedule.name": "wsd",
        "train.batch_size": 32,
        "train.lr": 0.5,
    }
    module = phase_identity(recipe, plan, plan.row("incubate", 1), replace(ROWS[2], steps=26))
    assert module["slots"] == [
        {"modules": 1, "depths": [1], "source": "meta"},
        {"modules": 1, "depths": [2], "source": "fresh"},
    ]
    assert module["drop_path"] == pytest.approx({"blocks.1": 0.2 / 3, "blocks.2": 0.1})  # blocks.0 is the meta model's


def test_default_that_is_written_down_changes_no_identity(base: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in Settings().flat().items() if key not in LOADED_KEYS]
    settings += [
        "incubate.init=fresh",
        "pretrain.handover=end",
        "data.shuffle=py1e",
        "finetune.export=raw",
        "end_to_end.budget=equal_flops",
    ]
    settings += ["end_to_end.init=plain"]
    assert [row.identity for row in rows(base, *settings)] == [row.identity for row in ROWS]


LOADED_KEYS = {"model.name", "model.img_size", "model.num_classes", "train.batch_size", "train.epochs"}
LOADED_KEYS |= {"drop_path.rate", "ema.decay", "schedule.name"}


def test_digest_depends_on_identity_data_and_inputs() -> None:
    digests = {
        phase_digest({"steps": 1}, "data", {"meta": "m"}),
        phase_digest({"steps": 2}, "data", {"meta": "m"}),
        phase_digest({"steps": 1}, "other", {"meta": "m"}),
        phase_digest({"steps": 1}, "data", {"meta": "n"}),
        phase_digest({"steps": 1}, "data", {"module/0": "m"}),
    }
    assert len(digests) == 5
    assert phase_digest({"a": 1, "b": 2}, "data", {}) == phase_digest({"b": 2, "a": 1}, "data", {})


# ------------------------------------------------------------------------------------------------ run directories


def test_changed_fine_tuning_keeps_modules(harness: Callable[..., Any]) -> None:
    sets = ("train.max_steps=2", "finetune.train.max_steps=3")
    first = harness(*sets)
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1)):
        first.train(phase, module)
    before = [load_manifest(first.run.phase("incubate", module).artifact) for module in range(2)]

    changed = harness(sets[0], "finetune.train.max_steps=4", folder=first.run.path)
    assert changed.run.load_recipe() == changed.recipe
    events = (first.run.path / "events.jsonl").read_text().splitlines()
    assert json.loads(events[-1])["changes"] == ["finetune.train.max_steps: 3 -> 4"]
    assert changed.train("finetune")["steps"] == 4
    assert [load_manifest(first.run.phase("incubate", module).artifact) for module in range(2)] == before
    manifest = load_manifest(changed.run.phase("finetune").artifact)
    assert manifest.inputs == {f"module/{module}": before[module].digest for module in range(2)}
    assert manifest.identity == expected_lineage(changed.run, "finetune").identity

    with pytest.raises(ConfigError) as caught:
        harness(sets[0], "finetune.train.max_steps=5", folder=first.run.path)
    message = str(caught.value)
    assert "finetune.train.max_steps: 4 -> 5 would invalidate fine-tuning;" in message
    assert f"remove {changed.run.phase('finetune').path} to train again" in message
    assert "\n" not in message
    assert changed.run.load_recipe() == changed.recipe
    harness(sets[0], "finetune.train.max_steps=4", "log.every_steps=1", 'name="renamed"', folder=first.run.path)


def test_checkpoint_of_other_settings_is_refused(harness: Callable[..., Any]) -> None:
    one = harness("train.max_steps=4")
    one.train("pretrain")
    (one.run.phase("pretrain").path / "DONE").unlink()
    one.rows[0].identity["train.lr"] = 0.5
    plan = read_json(one.run.path / "plan.json")
    assert plan is not None
    plan["rows"][0]["identity"]["train.lr"] = 0.5
    write_json(one.run.path / "plan.json", plan)
    with pytest.raises(ArtifactError, match="saved with other settings"):
        one.train("pretrain")


def test_stale_module_is_trained_again_from_its_start(harness: Callable[..., Any]) -> None:
    one = harness("train.max_steps=2")
    one.train("pretrain")
    one.train("incubate", 0)
    folder = one.run.phase("incubate", 0)
    job = next(job for job in build_job_graph(one.rows, baseline=False) if job.key == "incubate/0")

    def is_valid() -> bool:
        return _is_valid(job, one.run)

    assert is_valid()
    meta = one.run.phase("pretrain").artifact
    tensors, manifest = load_artifact(meta)
    manifest = save_artifact(meta, {name: tensor + 1 for name, tensor in tensors.items()}, manifest)
    assert not is_valid()
    assert folder.result is None
    assert not folder.checkpoints.exists()
    events = (one.run.path / "events.jsonl").read_text().splitlines()
    assert "trained from another meta model" in json.loads(events[-1])["reason"]
    one.train("incubate", 0)
    assert load_manifest(folder.artifact).inputs == {"meta": manifest.digest}
    assert is_valid()


def test_embedded_data_of_another_source_is_refused_once_a_phase_is_trained(
    smoke: Path, tmp_path: Path, counted: None
) -> None:
    from conftest import TrainingHarness

    TrainingHarness(smoke, tmp_path / "run", "train.max_steps=1").train("pretrain")
    with pytest.raises(ConfigError, match=r"data\.source = 'digits', but .* has 'digits-dev'"):
        TrainingHarness(smoke, tmp_path / "run", "data.source=digits")

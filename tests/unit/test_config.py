"""Recipes: what is refused and how it is said, the order of overrides, identity and execution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigincubate.config import PHASES, is_execution, list_shipped_recipes, load_recipe
from bigincubate.config.keys import list_recipe_keys
from bigincubate.config.modules import PlanConfig
from bigincubate.errors import ConfigError
from bigincubate.planning.phases import make_plan
from bigincubate.planning.smoke import smoke as make_smoke_tables
from bigincubate.storage.run_directory import RunDir


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("incubate.train.lrr=3", "unknown key 'incubate.train.lrr'; did you mean 'incubate.train.lr'?"),
        ("sharding.stratgy=ddp", "did you mean 'sharding.strategy'?"),
        ("batch_size=8", "unknown key 'batch_size'; did you mean 'train.batch_size'?"),
        ("slurm.gate.tim=1", "unknown key 'slurm.gate.tim'; did you mean 'slurm.gate.time'?"),
        (
            "train.lr=abc",
            "train.lr: Input should be a valid number (given: 'abc'); expected a value such as train.lr = 0.001",
        ),
        ("train.compile=maybe", "(given: 'maybe'); expected a value such as train.compile = false"),
        (
            "slurm.gate.nodes=x",
            "slurm.gate.nodes: Input should be a valid integer (given: 'x'); expected a value such as",
        ),
        ("train.seed=" + "9" * 5000, "train.seed: Input should be a valid integer"),
        (
            "train={lr=-1, epoch=3, seed=-1}",
            "train.lr: Input should be greater than or equal to 0 (given: -1); train.seed",
        ),
        (
            "plan.target_depths=[1, 'a']",
            "digits.toml with --set: plan.target_depths.1: Input should be a valid integer",
        ),
        ("model.args=" + "[" * 30 + "]" * 30, "nested more than 20 levels"),
        ("name=a\udcff", "not UTF-8"),
        ("data.path=$NOT_SET/x", "data.path: the environment variable $NOT_SET is not set"),
        ("data.path=", "data.path: '' is not a path"),
        ("train.lr=-1", "train.lr: Input should be greater than or equal to 0"),
        ("train.batch_size=2.5", "train.batch_size: Input should be a valid integer"),
        ("train.batch_size=true", "train.batch_size: Input should be a valid integer"),
        ("incubate.train.batch_size=0", "incubate.train.batch_size"),
        ("train.lr=nan", "train.lr: Input should be a finite number"),
        ("plan.modules=3", "modules = 3, but target_depths lists 4"),
        ("plan.incubate=some", 'incubate: expected "all", "none", or numbers of modules in ascending order, counted'),
        ("plan.incubate=[]", "plan.incubate: expected"),
        ("plan.incubate=[3, 1]", "counted from 0: [1, 3] (given: [3, 1])"),
        ("plan.incubate=[1, 1]", "plan.incubate: expected"),
        ("plan.incubate=[-1]", "plan.incubate: expected"),
        ("plan.incubate=[0.5]", "plan.incubate: expected"),
        ("plan.incubate=[true]", "plan.incubate: expected"),
        ("plan.incubate=2", "plan.incubate: expected"),
        ("plan.incubate=[1, 4]", "plan: incubate lists module 4, but the modules are 0 to 3"),
        ("incubate.export=ema", "needs incubate.ema.decay"),
        ("augment.repeated_aug=0", "augment.repeated_aug: Input should be greater than or equal to 1"),
        (
            "data.source=imagenet",
            "data.source: Input should be 'digits', 'digits-dev', 'made-up'",
        ),
        ("train=3", "train: Input should be a valid dictionary"),
        ("train.lr", "expected KEY=VALUE"),
    ],
)
def test_wrong_value_is_one_line_that_names_key_and_file(item: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("digits", [item])
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert "digits.toml" in message or item[:200] in message


NUMERIC = [entry for entry in list_recipe_keys() if "number" in entry.type or "integer" in entry.type]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "-1.5"])
def test_no_numeric_key_accepts_an_impossible_number(value: str) -> None:
    assert len(NUMERIC) > 50
    for entry in NUMERIC:
        count = 3 if entry.key in ("augment.mean", "augment.std") else 2
        text = f"[{', '.join([value] * count)}]" if "list of" in entry.type else value
        with pytest.raises(ConfigError) as caught:
            load_recipe("digits", [f"{entry.key}={text}"])
        assert entry.key.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(
    "item",
    [
        "augment.std=[0, 0, 0]",
        "augment.std=[0.2, 0.2, 1e-45]",
        "augment.std=[58.4, 57.1, 57.4]",
        "augment.mean=[123.7, 116.3, 103.5]",
        "augment.eval_crop=0",
        "augment.eval_crop=1e-9",
        "augment.flip=1.1",
        "augment.erase=2",
        "augment.crop_scale=[0, 1]",
        "augment.crop_scale=[0.9, 0.1]",
        "augment.pad=8",  # of an image of 8 pixels
        "mixup.prob=1.5",
        "mixup.switch_prob=1.01",
        "optim.betas=[0.9, 1.0]",
        "optim.eps=0",
        "optim.layer_decay=0",
        "drop_path.rate=1.0",
        "loss.label_smoothing=1",
        "ema.decay=1",
        "model.args.init_values=nan",
        "model.args.inner.list=[1, inf]",
        "task.args.weight=-inf",
        "finetune.augment.std=[0, 0, 0]",
        "finetune.model.args.init_values=nan",
        "incubate.train.lr=inf",
        "plan.target_depths=[8, 8, 8, -8]",
    ],
)
def test_impossible_constant_is_refused(item: str) -> None:
    key = item.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        make_plan(load_recipe("digits", [item]))
    assert key.rpartition(".")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contradictions_in_a_phase_are_found_without_running_it() -> None:
    with pytest.raises(ConfigError, match=r"finetune: .*mixup pairs the halves"):
        load_recipe("digits", ["finetune.mixup.mixup=0.8", "finetune.train.batch_size=33"])


def test_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_recipe("digit")
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe("nowhere/x.toml")


def test_byte_order_mark_is_no_part_of_a_recipe(smoke: Path, tmp_path: Path) -> None:
    file = tmp_path / "marked.toml"
    file.write_text(smoke.read_text(), "utf-8-sig")
    assert load_recipe(str(file)).flat() == load_recipe(str(smoke)).flat()


def test_bad_toml_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[train\nlr = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load_recipe(str(file))


def test_order_is_defaults_then_recipe_then_set_and_a_phase_comes_over_the_common(smoke: Path) -> None:
    recipe = load_recipe(str(smoke), ["train.lr=5e-3", "finetune.train.lr=1e-4"])
    assert recipe.settings("incubate").train.lr == 5e-3
    assert recipe.settings("finetune").train.lr == 1e-4
    assert recipe.settings("finetune").train.batch_size == 32  # the recipe's
    assert recipe.settings("finetune").train.precision == "fp32"  # the default


def test_identity_leaves_out_execution_keys_and_nothing_else() -> None:
    base = load_recipe("digits")
    same = ["train.micro_batch=16", "sharding.strategy=none", "log.every_steps=3", "data.workers=2", "data.path=/x"]
    same += ["incubate.train.micro_batch=8", "checkpoint.every_steps=7"]
    assert load_recipe("digits", same).identity == base.identity
    assert load_recipe("digits", ["train.seed=1"]).identity != base.identity
    assert load_recipe("digits", ["incubate.train.lr=0.9"]).identity != base.identity
    assert load_recipe("digits", ["data.shuffle=py1s"]).identity != base.identity
    assert load_recipe("digits", ["model.args.embed_dim=96"]).identity != base.identity


def test_whole_and_decimal_numbers_are_the_same_recipe() -> None:
    one, other = (load_recipe("digits", [f"incubate.train.epochs={n}"]) for n in ("7", "7.0"))
    assert one.identity == other.identity


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("slurm.time=01:00:00", "01:00:00"),
        ("slurm.time=2026-01-01", "2026-01-01"),
        ("slurm.time=60", "60"),
        ("slurm.time=true", "true"),
        ("slurm.time=nan", "nan"),
        ("slurm.time=[1]", "[1]"),
        ("slurm.time=1\nnodes = 2", "1\nnodes = 2"),
        ('slurm.time="01:00:00"', "01:00:00"),
        ("slurm.gate.time=01:00:00", "01:00:00"),
    ],
)
def test_text_of_a_key_that_takes_text_is_kept(item: str, expected: str) -> None:
    kind = "gate" if "gate" in item else "pretrain"
    assert load_recipe("digits", [item]).slurm.job(kind).time == expected


def test_list_of_a_key_that_takes_text_or_lists_is_a_list() -> None:
    read = [load_recipe("digits", ["meta.init=x", f"meta.select={value}"]).meta.select for value in ("even", "[0, 2]")]
    assert read == ["even", [0, 2]]


def test_time_without_quotes_in_a_recipe_is_refused_with_the_way_to_write_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "digits"\n[slurm]\ntime = 01:00:00\n[slurm.gate]\ntime = 5\n')
    with pytest.raises(ConfigError, match=r'given: 01:00:00\); write it in quotes: slurm.time = "01:00:00"$'):
        load_recipe(file)


def test_all_problems_of_a_recipe_are_listed_up_to_ten() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("digits", ["train.lr=-1", "augment.flip=2", "optim.name=3", "mixup.prob=-1"])
    assert [key in str(caught.value) for key in ("train.lr", "augment.flip", "mixup.prob")] == [True] * 3
    with pytest.raises(ConfigError, match=r"a10.*; and 2 more problems$"):
        load_recipe("digits", [f"train.a{n}=1" for n in range(1, 13)])


@pytest.mark.parametrize("name", sorted(list_shipped_recipes()))
def test_written_recipe_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.toml())
    assert load_recipe(str(file)) == recipe
    assert load_recipe(str(file)).identity == recipe.identity


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.micro_batch", True),
        ("finetune.train.micro_batch", True),
        ("train.lr", False),
        ("finetune.train.lr", False),
        ("sharding.strategy", True),
        ("model.args.embed_dim", False),
        ("incubate.init", False),
        ("description", True),
        ("name", True),
        ("data.train_samples", True),
    ],
)
def test_keys_are_identity_or_execution(key: str, expected: bool) -> None:
    assert is_execution(key) is expected


def test_set_value_overrides_a_small_version_of_the_recipe_also_where_a_phase_has_its_own_value() -> None:
    plain = load_recipe("digits", [], make_smoke_tables)
    assert {plain.settings(phase).train.max_steps for phase in PHASES} == {6}
    changed = load_recipe("digits", ["train.max_steps=3", "finetune.train.max_steps=4"], make_smoke_tables)
    steps = {phase: changed.settings(phase).train.max_steps for phase in PHASES}
    assert steps == {"pretrain": 3, "incubate": 3, "finetune": 4, "end_to_end": 3}
    assert changed.settings("pretrain").train.batch_size == 16
    text = load_recipe("docs-llama", ["train.max_steps=1", "schedule.warmup_epochs=0"], make_smoke_tables)
    for phase in PHASES:  # the recipe itself has other values for some of them
        settings = text.settings(phase)
        assert (settings.train.max_steps, settings.schedule.warmup_epochs) == (1, 0)


def test_run_directory_keeps_its_recipe_until_it_is_updated(smoke: Path, tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "run"), load_recipe(str(smoke))
    run.create(recipe)
    changed = load_recipe(str(smoke), ["log.every_steps=3", "train.lr=0.5"])
    run.create(changed)
    assert run.load_recipe() == recipe
    run.update_recipe(changed)
    assert run.load_recipe() == changed
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["created", "recipe_changed"]
    assert events[1]["changes"] == ["train.lr: 0.002 -> 0.5", "log.every_steps: 2 -> 3"]


def test_number_of_modules_that_is_too_large_takes_no_memory() -> None:
    """It is compared with the model's blocks only later."""
    plan = PlanConfig(modules=10**15)
    assert (len(plan.incubated), plan.incubated[-1]) == (10**15, 10**15 - 1)
    assert list(PlanConfig(modules=10**15, incubate="none").incubated) == []

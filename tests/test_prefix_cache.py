"""What reaches a module, computed once: the same bits as in every step, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMOKE
from launching import launch, words
from test_incubation import EXAMPLES, Example

from bigincubate.checkpoint.store import load_artifact, save_artifact
from bigincubate.config import load_recipe
from bigincubate.data.dataset import open_dataset
from bigincubate.data.features import outstanding
from bigincubate.errors import ConfigError, EnvironmentFault, Preempted
from bigincubate.models import (
    Partition,
    apply_masks,
    begin_at,
    build,
    draw_masks,
    drop_paths,
    family_of,
    freeze,
    hybrid_depths,
    normalise_depths,
    reaching,
    set_rates,
    skip_unused,
)
from bigincubate.plan import cost_plan, make_plan
from bigincubate.tasks.prefix import prefix_cache
from bigincubate.verify import Verdict, verify_run

Labs = Callable[..., Any]
FIXED = ["incubate.mixup.prob=0.0", "incubate.augment.views=2", "log.every_steps=1"]
THREE = ["plan.target_depths=[1, 2, 2]", "plan.meta_depths=[1, 1, 1]"]
CACHED = "incubate.prefix_cache=true"
OTHER_FAMILIES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        "{ patch_size = 2, embed_dim = 8, num_heads = [1, 2, 2, 2], window_size = 2 }",
        "target_depths = [[2, 2, 0, 0], [0, 0, 2, 2]]\nmeta_depths = [[2, 1, 0, 0], [0, 0, 2, 1]]",
    ),
    "convnext": (
        "convnext_atto",
        "{ dims = [16, 32, 16, 16] }",
        # cut inside a stage: there a convolution's gradients depend on how its input lies in memory
        "target_depths = [[1, 2, 0, 0], [0, 2, 2, 1]]\nmeta_depths = [[1, 1, 0, 0], [0, 1, 1, 1]]",
    ),
    "mixer": (
        "mixer_s16_224",
        "{}",
        "target_depths = [2, 2]\nmeta_depths = [1, 1]",
    ),
}


def pair(lab: Labs, folder: Path, *sets: str) -> tuple[Any, Any]:
    """The same run without a cache and with one, after the meta model."""
    plain = lab(*FIXED, *sets, folder=folder / "plain")
    plain.train("pretrain")
    cached = lab(*FIXED, *sets, CACHED, folder=folder / "cached")
    shutil.copytree(plain.run.path / "meta", cached.run.path / "meta")
    return plain, cached


def assert_same(plain: Any, cached: Any, module: int) -> None:
    ours, theirs = cached.weights("incubate", module), plain.weights("incubate", module)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    tags = ("train/loss", "train/grad_norm", "val/loss", "val/top1")
    logs = [[[row.get(tag) for tag in tags] for row in each.log("incubate", module)] for each in (cached, plain)]
    assert logs[0] == logs[1]


# ------------------------------------------------------------------------------------------------ the cut model


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_from_its_features_a_cut_hybrid_computes_what_the_whole_one_does(example: Example) -> None:
    family = family_of(example.name)
    target, meta = (normalise_depths(depths, family.stages) for depths in (example.target, example.meta))
    images, _ = example.batch()
    for module in range(1, len(target)):
        partition = Partition(family, hybrid_depths(target, meta, module))
        made = []
        for _ in range(2):
            torch.manual_seed(0)
            depths = partition.depths
            model = build(example.name, depths, num_classes=5, img_size=example.img_size, args=example.args)
            freeze(model, partition, module)
            if family.name in ("vit", "swin") and "v2" not in example.name:
                skip_unused(model, partition)
            made.append(model.train())
        whole, cut = made
        begin_at(cut, partition, module)
        assert {partition.owner(name) for name, _ in cut.named_parameters()} == set(range(module, len(target)))
        results = []
        for model, take in ((whole, images), (cut, reaching(whole, partition, module, images))):
            set_rates(model, partition, "target", 0.5, target, module)
            apply_masks(model, draw_masks(0, 1, len(drop_paths(model)), len(images)))
            out = model(take)
            out.square().sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append((out, gradients))
        (out, gradients), (again, same) = results
        assert torch.equal(out, again)
        assert gradients.keys() == same.keys()
        assert all(torch.equal(gradients[name], same[name]) for name in gradients)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "more",
    [
        ["augment.repeats=2"],
        ["train.micro_batch=64", "data.workers=1"],
        ["augment.device=true", "augment.erase=0.5"],
        ["train.precision=bf16", "train.skip_unused=true"],
    ],
    ids=lambda more: more[0],
)
def test_modules_are_the_same_bits(more: list[str], lab: Labs, tmp_path: Path) -> None:
    plain, cached = pair(lab, tmp_path, *THREE, "train.batch_size=256", *more)  # twelve steps see both views
    for module in range(3):
        before, after = plain.train("incubate", module), cached.train("incubate", module)
        assert_same(plain, cached, module)
        assert {key: before[key] for key in ("top1", "top5", "loss")} == {
            key: after[key] for key in ("top1", "top5", "loss")
        }
        assert plain.run.phase("incubate", module).partial == cached.run.phase("incubate", module).partial
        assert not cached.run.phase("incubate", module).features.exists()
    told = [json.loads(line) for line in (cached.run.path / "events.jsonl").read_text().splitlines()]
    made = [event for event in told if event["event"] == "prefix_cached"]
    rows = 2 * cached.data.samples["train"] + cached.data.samples["val"]
    assert [(event["phase"], event["rows"]) for event in made] == [("incubate/1", rows), ("incubate/2", rows)]


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_modules_of_other_families_are_the_same_bits(family: str, digits: Path, counted: None, tmp_path: Path) -> None:
    from conftest import Lab

    name, args, plan = OTHER_FAMILIES[family]
    text = SMOKE.replace('source = "digits-dev"', f'path = "{digits}"').replace("vit_tiny_patch16_224", name)
    text = text.replace("args = { patch_size = 2, embed_dim = 24, num_heads = 3 }", f"args = {args}")
    text = text.replace("target_depths = [2, 2]\nmeta_depths = [1, 1]", plan)
    text = text.replace("img_size = 8", "img_size = 32").replace("max_steps = 12", "max_steps = 3")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    plain, cached = pair(lambda *sets, folder: Lab(recipe, folder, *sets), tmp_path, "incubate.augment.views=1")
    for each in (plain, cached):
        each.train("incubate", 1)
    assert_same(plain, cached, 1)


def test_under_each_strategy_two_ranks_train_the_same_bits_with_it(lab: Labs, tmp_path: Path) -> None:
    plain, cached = pair(lab, tmp_path, *THREE)
    jobs, runs = [], []
    for strategy in ("ddp", "fsdp2", "zero3"):
        for each in (plain, cached):
            runs.append(each.copy(tmp_path / f"{strategy}-{len(runs)}"))
            more = [CACHED] if each is cached else []
            sets = [f"sharding.strategy={strategy}", *FIXED, *THREE, *more]
            jobs.append(words(runs[-1], "incubate", 2, *(word for item in sets for word in ("--set", item))))
    found = launch(tmp_path, jobs)
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert [rank["code"] for rank in (*before, *after)] == [0] * 4, (before, after)
        whole, cut = before[0]["weights"], after[0]["weights"]  # of the hybrid, and of what is left of it
        assert len(runs[0].weights("incubate", 2)) <= len(cut) < len(whole)
        assert cut == {name: whole[name] for name in cut}
    for run in runs[1::2]:
        told = [json.loads(line)["event"] for line in (run.run.path / "events.jsonl").read_text().splitlines()]
        assert (told.count("prefix_cache_begun"), told.count("prefix_cached")) == (1, 1)  # one rank clears, for both


def test_without_views_an_image_that_never_changes_is_computed_once(lab: Labs, tmp_path: Path) -> None:
    still = ["augment.crop=none", "mixup.prob=0.0"]
    plain = lab(*still, "log.every_steps=1", folder=tmp_path / "plain")
    plain.train("pretrain")
    cached = lab(*still, "log.every_steps=1", CACHED, folder=tmp_path / "cached")
    shutil.copytree(plain.run.path / "meta", cached.run.path / "meta")
    for each in (plain, cached):
        each.train("incubate", 1)
    assert_same(plain, cached, 1)


def test_views_come_again_after_so_many_epochs(lab: Labs) -> None:
    trainer = lab(*FIXED, "augment.views=2").trainer("pretrain")
    images = trainer.stream._loader.dataset
    looks = [images.look(5, epoch)[0][0][0].tobytes() for epoch in range(4)]
    assert looks[:2] == looks[2:]
    assert looks[0] != looks[1]


# ------------------------------------------------------------------------------------------------ made, and made again


@pytest.fixture(scope="module")
def ready(lab: Labs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose meta model is trained."""
    folder = tmp_path_factory.mktemp("ready") / "run"
    made = lab(*FIXED, CACHED, folder=folder)
    made.train("pretrain")
    return made


def make(run: Any, stopped: Callable[[], bool] = lambda: False) -> Any:
    from bigincubate.tasks.classification import ClassificationTask

    recipe, plan, row, planned, directory, data, env = run.arguments("incubate", 1)
    return prefix_cache(
        ClassificationTask(recipe, plan, row, data), directory, env, stopped, steps=planned.steps, micro_batches=1
    )


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_stopped_it_goes_on_with_the_next_chunk(ready: Any, tmp_path: Path) -> None:
    whole = make(ready.copy(tmp_path / "whole"))
    whole_size = sum(file.stat().st_size for file in whole.path.glob("*/*/*.mds"))
    run = ready.copy(tmp_path / "run")
    folder = run.run.phase("incubate", 1).features
    asked = iter([False, False, True])
    with pytest.raises(Preempted, match="stopped before what reaches it was computed"):
        make(run, lambda: next(asked))
    before = files(folder)
    assert [found.verdict for found in verify_run(run.run) if found.path == folder] == [Verdict.UNFINISHED]
    assert sorted(path.name for path in (folder / "train").iterdir()) == ["00000", "00001"]
    (folder / ".tmp-train-00002-1").mkdir()  # of one that was killed in it
    done = sum(len(data) for name, (_, data) in before.items() if name.endswith("mds"))
    assert 0.9 * (whole_size - done) < outstanding(folder) < whole_size - done  # which has headers besides
    assert outstanding(whole.path) == 0
    info = make(run)
    after = files(folder)
    assert not list(folder.glob(".tmp-*"))
    assert info.digest == whole.digest
    assert {name: after[name] for name in before if name != ".making.json"} == {
        name: value for name, value in before.items() if name != ".making.json"
    }
    make(run)
    assert files(folder) == after


def test_features_of_another_meta_model_are_made_anew(ready: Any, tmp_path: Path) -> None:
    run = ready.copy(tmp_path / "run")
    first = make(run)
    partly = run.copy(tmp_path / "partly")
    shutil.rmtree(partly.run.phase("incubate", 1).features)
    asked = iter([False, True])
    with pytest.raises(Preempted):
        make(partly, lambda: next(asked))
    tensors, manifest = load_artifact(run.run.phase("pretrain").artifact)
    tensors["blocks.0.mlp.fc1.bias"] += 1
    save_artifact(run.run.phase("pretrain").artifact, tensors, manifest)
    second = make(run)
    shutil.copytree(run.run.path / "meta", partly.run.path / "meta", dirs_exist_ok=True)
    assert make(partly).digest == second.digest  # nothing of what was begun stays
    assert first.features.grown["meta"] == manifest.digest != second.features.grown["meta"]
    assert first.digest != second.digest


def test_what_a_killed_attempt_left_behind_a_result_goes(ready: Any, tmp_path: Path) -> None:
    run = ready.copy(tmp_path / "run")
    run.train("incubate", 1)
    features = run.run.phase("incubate", 1).features
    assert not features.exists()
    (features / "train").mkdir(parents=True)
    run.train("incubate", 1)
    assert not features.exists()


@pytest.mark.parametrize("file", ["dataset.json", "train/index.json"])
def test_a_damaged_description_is_made_anew(file: str, ready: Any, tmp_path: Path) -> None:
    run = ready.copy(tmp_path / "run")
    digest = make(run).digest
    (run.run.phase("incubate", 1).features / file).write_text("{}")
    assert make(run).digest == digest


def test_a_damaged_row_is_refused_by_name(ready: Any, tmp_path: Path) -> None:
    run = ready.copy(tmp_path / "run")
    make(run)
    features = run.run.phase("incubate", 1).features
    assert [found.verdict for found in verify_run(run.run) if found.path == features] == [Verdict.GOOD]
    shard = next((features / "train").rglob("*.mds"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = [found for found in verify_run(run.run) if found.verdict is Verdict.DAMAGED]
    assert [(found.part, found.path) for found in damaged] == [("incubate/1", shard)]
    with pytest.raises(EnvironmentFault, match=r"features/train/.*\.mds is damaged: SHA-256"):
        run.train("incubate", 1)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ready.copy(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(EnvironmentFault, match=r"takes 0\.00\d+ GiB for this module; 0\.000977 GiB are free"):
        make(run)
    assert not list(run.run.phase("incubate", 1).features.rglob("*.mds"))


def test_room_is_left_for_what_other_modules_will_write(
    ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ready.copy(tmp_path / "run")
    other = run.run.phase("incubate", 0).features
    other.mkdir(parents=True)
    (other / ".making.json").write_text(json.dumps({"features": {}, "bytes": 1 << 30}))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 29))
    with pytest.raises(EnvironmentFault, match=r"for this module, and 1 GiB more for other modules; 0\.5 GiB are free"):
        make(run)


def test_features_are_no_data_to_train_on(ready: Any, tmp_path: Path, bigincubate: Any) -> None:
    run = ready.copy(tmp_path / "run")
    path = make(run).path
    ended = bigincubate("run", run.run.recipe_file, "--run-dir", tmp_path / "other", "--set", f"data.path={path}")
    assert ended.returncode == 3
    assert ended.stderr.count("\n") == 1
    assert "holds what reaches a module, no images" in ended.stderr
    assert open_dataset(path).features is not None


# ------------------------------------------------------------------------------------------------ refused, and counted


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (
            ["incubate.mixup.prob=0.0"],
            "augmentation shows a sample anew in each epoch; set incubate.augment.views, to 1",
        ),
        (["incubate.augment.views=1"], "of mixed images other features .* set incubate.mixup.prob = 0"),
        ([*FIXED, "drop_path.rates=hybrid"], 'set incubate.drop_path.rates = "target"'),
    ],
)
def test_what_would_not_be_exact_is_refused(sets: list[str], says: str, fast: Path) -> None:
    with pytest.raises(ConfigError, match=f"incubate.prefix_cache: .*{says}.*, or incubate.prefix_cache = false"):
        load_recipe(str(fast), [*sets, CACHED])


@pytest.mark.parametrize("rate", ["proj_drop_rate", "pos_drop_rate", "patch_drop_rate"])
def test_dropout_before_the_module_is_refused(rate: str, lab: Labs, tmp_path: Path) -> None:
    args = f"model.args={{ patch_size = 2, embed_dim = 24, num_heads = 3, {rate} = 0.1 }}"
    run = lab(*FIXED, CACHED, args, folder=tmp_path / "run")
    run.train("pretrain")
    with pytest.raises(ConfigError, match=r"Dropout before module 1 drops at random.*model\.args"):
        run.train("incubate", 1)


def test_dropout_behind_the_module_is_not_its_business(lab: Labs, tmp_path: Path) -> None:
    args = "model.args={ patch_size = 2, embed_dim = 24, num_heads = 3, drop_rate = 0.1 }"  # before the head
    run = lab(*FIXED, CACHED, args, folder=tmp_path / "run")
    run.train("pretrain")
    assert make(run).features is not None


def test_a_cache_that_is_switched_on_later_is_counted_as_it_is_computed(fast: Path, tmp_path: Path) -> None:
    from conftest import Lab

    before = Lab(fast, tmp_path / "run", *FIXED)
    after = Lab(fast, tmp_path / "run", *FIXED, CACHED)
    again = Lab(fast, tmp_path / "run", *FIXED)
    flops = [
        [(row.cost.training_flops, row.cost.prefix_flops, row.steps) for row in each.rows]
        for each in (before, after, again)
    ]
    assert flops[0] == flops[2]
    changed = [key for key, (one, other) in enumerate(zip(*flops[:2], strict=True)) if one != other]
    assert [before.rows[index].key for index in changed] == ["incubate/1"]
    (full, none, steps), (less, prefix, same) = (each[changed[0]] for each in flops[:2])
    assert (none, full - less, steps) == (0, prefix, same)


def test_it_is_no_other_experiment(fast: Path) -> None:
    plain, cached = load_recipe(str(fast), FIXED), load_recipe(str(fast), [*FIXED, CACHED])
    assert plain.digest == cached.digest
    assert plain.digest != load_recipe(str(fast), [*FIXED, "incubate.augment.views=3"]).digest


@pytest.mark.parametrize(("steps", "views"), [(31, 1), (32, 2), (500, 2)])  # 31 make an epoch
def test_the_plan_counts_the_prefix_once_for_each_view_that_is_seen(steps: int, views: int, fast: Path) -> None:
    length = f"train.max_steps={steps}"
    plain, cached = (load_recipe(str(fast), [*FIXED, *THREE, length, *more]) for more in ([], [CACHED]))
    before, after = ({row.key: row for row in cost_plan(each, make_plan(each), 1000)} for each in (plain, cached))
    assert before["incubate/0"] == after["incubate/0"]
    for key in ("incubate/1", "incubate/2"):
        old, new = before[key], after[key]
        assert old.cost.training_flops - new.cost.training_flops == new.cost.prefix_flops > 0
        assert new.total_flops == new.images * new.cost.training_flops + 1000 * views * new.cost.prefix_flops
        assert new.cost.parameters < old.cost.parameters
        assert new.cost.trainable == old.cost.trainable
        assert new.cost.activation_bytes == old.cost.activation_bytes

"""Decentralized data: parts that do not overlap, and modules that see their own and nothing else."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMOKE, Command, TrainingHarness

from bigincubate.config import load_recipe
from bigincubate.data import verification
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.partitions import (
    open_module_partition,
    partition_by_class,
    partition_by_hash,
    partition_from_file,
)
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.samples import Sample
from bigincubate.data.sources import read_source
from bigincubate.errors import ArtifactError, BigincubateError, ConfigError, DataError
from bigincubate.files import hash_file
from bigincubate.planning.prepare_run import ensure_data
from bigincubate.report.verify import Verdict, verify_run
from bigincubate.storage.artifacts import load_manifest, save_artifact
from bigincubate.storage.run_directory import RunDir

SAMPLES = [Sample(f"{n}", n * n % 7, np.zeros((1, 1), np.uint8)) for n in range(997)]  # uneven classes
PARTS = 3  # one more than the smoke recipe has modules


def images(info: DatasetInfo, split: str = "train") -> list[bytes]:
    from bigincubate.data.shards import Shards
    from bigincubate.tasks.image_classification.views import LabelledImages

    shards = Shards(info, split, LabelledImages(10))
    return [shards.read(sample)[0].tobytes() for sample in range(info.samples[split])]


# ------------------------------------------------------------------------------------------------ cutting


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
def test_partition_by_class_is_even_in_each_class_and_in_all(parts: int) -> None:
    cut = partition_by_class(SAMPLES, parts)
    assert sorted(sample.name for part in cut for sample in part) == sorted(sample.name for sample in SAMPLES)
    counts = [Counter(sample.label for sample in part) for part in cut]
    assert all(max(each) - min(each) <= 1 for each in ([count[label] for count in counts] for label in range(7)))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_partition_by_class_takes_no_consecutive_run() -> None:
    names = sorted(int(sample.name) for sample in partition_by_class(SAMPLES, 4)[0])
    assert len({b - a for a, b in pairwise(names)}) > 5


def test_partition_by_hash_keeps_samples_when_others_are_added() -> None:
    before, after = (partition_by_hash(SAMPLES[:count], 3) for count in (500, 997))
    assert [[s.name for s in part if int(s.name) < 500] for part in after] == [[s.name for s in p] for p in before]
    assert all(len(part) > 250 for part in after)


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
def test_partition_from_file_is_as_uneven_as_the_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    told = [(sample.name, 0 if int(sample.name) < 900 else 1) for sample in SAMPLES]
    if name.endswith("csv"):
        file.write_text("sample,part\n" + "".join(f"{name},{part}\n" for name, part in told))
    else:
        file.write_text("".join(json.dumps({"sample": name, "part": part}) + "\n" for name, part in told))
    assert [len(part) for part in partition_from_file(SAMPLES, file)] == [900, 97]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sample,part\n0,0\n", r"996 training samples, such as '1'"),
        ("sample,part\n0,0\n0,1\n", "row 2: '0' is listed twice"),
        ("sample,part\nx.png,0\n", "row 1: 'x.png' is not a training sample"),
        ("sample,part\n0,left\n", "row 1: the part 'left' is not an integer"),
        ("sample,part\n0,-1\n", "row 1: part -1"),
        ("name,part\n0,0\n", "expected CSV"),
        ("", "expected CSV"),
    ],
)
def test_file_that_does_not_fit_the_source_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        partition_from_file(SAMPLES, tmp_path / "mine.csv")


# ------------------------------------------------------------------------------------------------ preparing


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parted") / "data"
    prepare_dataset("digits-dev", out, partition=lambda samples: partition_by_class(samples, PARTS))
    return out


@pytest.fixture
def mine(parted: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(parted, tmp_path / "data"))


def test_partitions_are_data_sets_and_together_the_whole(parted: Path, digits: Path) -> None:
    whole = open_dataset(parted)
    parts = [open_dataset(parted / "parts" / f"{number:02d}") for number in range(PARTS)]
    assert [part.digest for part in parts] == list(whole.parts)
    assert [(part.part, part.epoch) for part in parts] == [(n, whole.samples["train"]) for n in range(PARTS)]
    assert Counter(images(whole)) == sum((Counter(images(part)) for part in parts), Counter())
    assert Counter(images(whole)) == Counter(images(open_dataset(digits)))  # and nothing else than without parts
    for part in parts:
        assert images(part, "val") == images(whole, "val")
    assert len({whole.digest, open_dataset(digits).digest, *whole.parts}) == PARTS + 2


def test_partitions_are_verified_with_the_whole_and_links_hashed_once(
    parted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def noted(file: Path) -> str:
        hashed.append(file)
        return hash_file(file)

    monkeypatch.setattr(verification, "hash_file", noted)
    mine = tmp_path / "data"
    shutil.copytree(parted, mine)  # partitions are copies here, not links
    assert list(verification.find_damaged_shards(open_dataset(parted))) == []
    assert len(hashed) == len({file.stat().st_ino for file in parted.rglob("*.mds")})
    shard = next(mine.glob("parts/01/train/**/*.mds"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert [file for file, _ in verification.find_damaged_shards(open_dataset(mine))] == [shard]
    (mine / "parts" / "00" / "dataset.json").write_text("{")
    found = dict(verification.find_damaged_shards(open_dataset(mine)))
    assert found.keys() == {shard, mine / "parts" / "00"}


def test_partitions_store_no_shard_twice(parted: Path) -> None:
    shards = list(parted.rglob("*.mds"))
    stored = {file.stat().st_ino: file.stat().st_size for file in shards}
    assert len(shards) > len(stored)
    assert sum(stored.values()) == sum(file.stat().st_size for file in parted.glob("*/*/*.mds"))


def test_folder_with_other_partitions_is_refused_and_with_the_same_reused(parted: Path) -> None:
    before = open_dataset(parted)
    assert prepare_dataset("digits-dev", parted, partition=lambda samples: partition_by_class(samples, PARTS)) == before
    for cut in (None, lambda samples: partition_by_class(samples, 2)):
        with pytest.raises(DataError, match="other parts"):
            prepare_dataset("digits-dev", parted, partition=cut)


def test_killed_preparation_of_partitions_resumes(mine: Path) -> None:
    before = open_dataset(mine)
    (mine / "dataset.json").rename(mine / ".preparing.json")
    shutil.rmtree(mine / "parts" / "02")
    shutil.rmtree(mine / "parts" / "01" / "val")
    assert prepare_dataset("digits-dev", mine, partition=lambda samples: partition_by_class(samples, PARTS)) == before
    assert open_dataset(mine / "parts" / "02").digest == before.parts[2]


def test_renamed_partition_is_refused(mine: Path) -> None:
    file = mine / "parts" / "01" / "dataset.json"
    file.write_text(file.read_text().replace('"part": 1', '"part": 0'))
    with pytest.raises(DataError, match="its digest does not match"):
        open_dataset(mine / "parts" / "01")


def test_empty_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="part 1 would have no samples"):
        prepare_dataset("digits-dev", tmp_path / "data", partition=lambda samples: [list(samples), []])


def test_data_prepare_refuses_two_ways_of_partitioning(tmp_path: Path, bigincubate: Command) -> None:
    file = tmp_path / "by.csv"
    train = read_source("digits-dev", 0.2).splits["train"]
    file.write_text("sample,part\n" + "".join(f"{sample.name},{sample.label % 2}\n" for sample in train))
    done = bigincubate("data", "prepare", "digits-dev", "--out", tmp_path / "data", "--by", file)
    assert done.returncode == 0, done.stderr
    assert "2 partitions" in done.stdout
    assert open_dataset(tmp_path / "data/parts/01").samples["train"] == sum(s.label % 2 for s in train)
    for wrong in (["--by", file, "--parts", 2], ["--parts", 2, "--balanced", "colour"]):
        done = bigincubate("data", "prepare", "digits-dev", "--out", tmp_path / "other", *wrong)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture
def recipe(mine: Path, tmp_path: Path) -> Path:
    """The smoke recipe, decentralized, an epoch a phase."""
    file = tmp_path / "dmt.toml"
    text = SMOKE.replace('source = "digits-dev"', f'path = "{mine}"\ndecentralized = true')
    file.write_text(text.replace("epochs = 100\nmax_steps = 12", "epochs = 1") + "[schedule]\nwarmup_epochs = 0.2\n")
    return file


def test_module_trains_with_its_partition_alone_on_disk(
    recipe: Path, mine: Path, tmp_path: Path, counted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigincubate.data import shards

    harness = TrainingHarness(recipe, tmp_path / "run")
    harness.train("pretrain")
    whole = Path(shutil.copytree(mine, tmp_path / "elsewhere"))
    parts = [set(images(open_dataset(mine / "parts" / f"{number:02d}"))) for number in range(PARTS)]
    for other in ("train", "val", "parts/00", "parts/02"):
        shutil.rmtree(mine / other)
    with pytest.raises(DataError):
        ensure_data(harness.recipe, harness.run)
    assert ensure_data(harness.recipe, harness.run, module=1).digest == harness.data.digest

    read: list[bytes] = []
    original = shards.Shards.read

    def spy(self: Any, sample: int) -> Any:
        image, label = original(self, sample)
        if self.folder.name == "train":
            read.append(image.tobytes())
        return image, label

    monkeypatch.setattr(shards.Shards, "read", spy)
    result = harness.train("incubate", 1)
    assert set(read) <= parts[1]
    assert len(set(read)) > 0.9 * len(parts[1])
    steps = harness.data.samples["train"] // 32
    assert result["steps"] == steps > 2 * (len(parts[1]) // 32)
    assert len(read) >= 32 * steps
    # the learning rate warms up over a fifth of the whole's epoch, not of the part's
    rates = [line["train/lr"] for line in harness.log("incubate", 1)]
    assert rates[0] < rates[1] < rates[2] > rates[-1]
    assert round(0.2 * steps) >= 6 > round(0.2 * steps / PARTS)
    assert load_manifest(harness.run.phase("incubate", 1).artifact).data == harness.data.parts[1]
    with pytest.raises(DataError, match=r"no data in .*parts/00"):
        harness.train("incubate", 0)

    # all of it is needed to fine-tune; and a module that saw another part is refused by name
    shutil.rmtree(mine)
    whole.rename(mine)
    harness.train("incubate", 0)
    harness.train("finetune")
    assert {finding.verdict for finding in verify_run(harness.run)} == {Verdict.GOOD}
    folder = harness.run.phase("incubate", 1).artifact
    spoiled = load_manifest(folder).model_copy(update={"data": harness.data.parts[0]})
    save_artifact(folder, harness.weights("incubate", 1), spoiled)
    with pytest.raises(ArtifactError, match=r"module 1: stale: .*another data"):
        harness.trainer("finetune")
    assert [f.part for f in verify_run(harness.run) if f.verdict is Verdict.STALE] == [
        "incubate/1",
        "finetune",
        "assembled",
    ]


def test_opening_another_part_is_an_error(recipe: Path, mine: Path, tmp_path: Path, counted: None) -> None:
    from bigincubate.training.builder import build_phase

    harness = TrainingHarness(recipe, tmp_path / "run")
    assert harness.context("incubate", 0).data.part == 0
    for module, phase, data in (
        (0, "incubate", open_dataset(mine / "parts/01")),
        (0, "incubate", harness.data),
        (None, "pretrain", open_dataset(mine / "parts/00")),
    ):
        # building a phase checks its data, whatever was opened for it
        with pytest.raises(ConfigError, match=r"data\.decentralized"):
            build_phase(replace(harness.context(phase, module), data=data))
    # a part in another's place
    shutil.rmtree(mine / "parts/00")
    (mine / "parts/01").rename(mine / "parts/00")
    with pytest.raises(DataError, match="is not part 0"):
        open_module_partition(harness.recipe, harness.data, 0)


@pytest.mark.parametrize(
    ("cut", "has"), [(None, "no parts"), (lambda samples: partition_by_class(samples, 1), "1 part")]
)
def test_fewer_parts_than_modules_are_refused_in_one_line(cut: Any, has: str, tmp_path: Path) -> None:
    prepare_dataset("digits-dev", tmp_path / "data", partition=cut)
    (tmp_path / "smoke.toml").write_text(SMOKE)
    recipe = load_recipe(str(tmp_path / "smoke.toml"), [f"data.path={tmp_path / 'data'}", "data.decentralized=true"])
    with pytest.raises(BigincubateError, match=rf"has {has}, .*prepare it with --parts"):
        ensure_data(recipe, RunDir(tmp_path / "run"))


def test_remote_partition_downloads_only_itself_and_the_description(recipe: Path, mine: Path, tmp_path: Path) -> None:
    from bigincubate.data.local_staging import use_local_cache

    here = tmp_path / "here"
    sets = [f"data.remote={mine}", f"data.path={here}", f"data.local_cache={tmp_path / 'disk'}"]
    loaded = load_recipe(str(recipe), sets)
    data = ensure_data(loaded, RunDir(tmp_path / "run"), module=1)
    own, part = open_module_partition(loaded, data, 1)
    assert {str(file.relative_to(here)) for file in here.rglob("*.json")} == {
        "dataset.json",
        *(f"parts/01/{name}" for name in ("dataset.json", "train/index.json", "val/index.json")),
    }
    assert own.identity == loaded.identity
    with use_local_cache(own, part) as (there, copy):
        from bigincubate.data.shards import Shards
        from bigincubate.tasks.image_classification.views import LabelledImages

        assert (copy.part, copy.digest) == (1, data.parts[1])
        Shards(copy, "train", LabelledImages(10), remote=there.data.remote).read(0)


def test_made_up_data_is_partitioned_for_the_modules(tmp_path: Path) -> None:
    (tmp_path / "smoke.toml").write_text(SMOKE)
    sets = ["data.source=made-up", "data.decentralized=true"]
    data = ensure_data(load_recipe(str(tmp_path / "smoke.toml"), sets), RunDir(tmp_path / "run"))
    assert (data.samples, len(data.parts)) == ({"train": 256, "val": 64}, 2)


def test_only_modules_that_are_incubated_need_their_partitions(
    recipe: Path, mine: Path, tmp_path: Path, counted: None
) -> None:
    """Module 1 of four on data in three partitions: it reads its own, and the others are not missed."""
    depths = ("plan.target_depths=[2, 2, 1, 1]", "plan.meta_depths=[1, 1, 1, 1]")
    short = ("train.max_steps=2", "schedule.warmup_epochs=0")
    harness = TrainingHarness(recipe, tmp_path / "run", *depths, "plan.incubate=[1]", *short)
    for phase, module in (("pretrain", None), ("incubate", 1), ("finetune", None)):
        harness.train(phase, module)
    assert load_manifest(harness.run.phase("incubate", 1).artifact).data == harness.data.parts[1]
    for whole in ("pretrain", "finetune"):
        assert load_manifest(harness.run.phase(whole).artifact).data == harness.data.digest
    assert {finding.verdict for finding in verify_run(harness.run)} == {Verdict.GOOD}
    with pytest.raises(BigincubateError, match=r"has 3 parts, .*module 3 trains only on part 3"):
        TrainingHarness(recipe, tmp_path / "other", *depths, "plan.incubate=[1, 3]")


def test_expansion_needs_no_partitions(recipe: Path, digits: Path, tmp_path: Path, counted: None) -> None:
    sets = ("plan.incubate=none", f"data.path={digits}", "train.max_steps=2", "schedule.warmup_epochs=0")
    harness = TrainingHarness(recipe, tmp_path / "run", *sets)
    harness.train("pretrain")
    assert harness.train("finetune")["metrics"]

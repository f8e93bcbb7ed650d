"""`bigincubate evaluate`: data with other labels than the training data, intervals, and scores of classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from image_trees import read_samples
from PIL import Image
from sklearn.datasets import load_digits

import bigincubate as bi
from bigincubate.config import DataConfig
from bigincubate.data.dataset import open_dataset
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.sample_names import NAMES_FILE, read_names
from bigincubate.errors import ConfigError, DataError
from bigincubate.interchange.export import load_model
from bigincubate.tasks.evaluation import bootstrap_intervals
from bigincubate.tasks.registry import task_class
from bigincubate.training.evaluation import evaluate_model

Call = Callable[..., tuple[int, str, str]]
SOME = {"three": 3, "eight": 8, "seven": 7}  # their order by name differs from their order in the model


def write_digits(root: Path, folders: dict[str, int]) -> Path:
    """Write the first 60 images of some digits as class folders, with a third of them for validation."""
    images, labels = load_digits(return_X_y=True)
    for name, digit in folders.items():
        for number, pixels in enumerate(images[labels == digit][:60]):
            folder = root / ("val" if number % 3 == 0 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            scaled = (pixels.reshape(8, 8) * 255 / 16).astype(np.uint8)
            Image.fromarray(scaled).convert("RGB").save(folder / f"{digit}_{number:03}.png")
    return root


class Digits(NamedTuple):
    """A trained model and data for it.

    Attributes:
        model: The folder of a phase that was trained on ten digits.
        whole: The data that it was trained on.
        subset: Three classes with the model's names.
        renamed: The same images, in classes with other names.
    """

    model: Path
    whole: Path
    subset: Path
    renamed: Path


@pytest.fixture(scope="module")
def trained(harness: Callable[..., Any], digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Digits:
    made = harness("train.max_steps=40", "log.every_steps=20", "mixup.mixup=0.0")
    made.train("pretrain")
    folder = tmp_path_factory.mktemp("sets")
    for name, classes in (("subset", {str(digit): digit for digit in SOME.values()}), ("renamed", SOME)):
        prepare_dataset(str(write_digits(folder / f"{name}-images", classes)), folder / name)
    return Digits(made.run.phase("pretrain").path, digits, folder / "subset", folder / "renamed")


def predict(model: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and labels of the validation split, computed without `evaluate`."""
    loaded, spec = load_model(model)
    task_type = task_class(spec.task.name)
    stream = task_type(task_type.artifact_settings(spec.model, spec.metadata), DataConfig())
    batches = [*stream.eval_stream(open_dataset(data), "val", batch_size=64)]
    with torch.no_grad():
        logits = torch.cat([loaded.eval()(batch["images"]) for batch in batches])
    return logits.numpy(), torch.cat([batch["labels"] for batch in batches]).numpy()


def write_file(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ------------------------------------------------------------------------------------------------ classes


def test_subset_of_the_classes_is_found_by_its_names(trained: Digits) -> None:
    logits, labels = predict(trained.model, trained.subset)
    limited = logits[:, [3, 7, 8]]
    scores = bi.evaluate(trained.model, trained.subset)
    assert scores["top1"] == pytest.approx(100 * (limited.argmax(1) == labels).mean())
    assert (scores["top5"], scores["samples"]) == (100.0, 60)
    log_shares = limited - np.log(np.exp(limited).sum(1, keepdims=True))
    assert scores["loss"] == pytest.approx(-log_shares[np.arange(60), labels].mean(), rel=1e-5)
    assert scores["matching"] == "3 of 10 classes, matched by name"
    among_all = 100 * (logits.argmax(1) == np.array([3, 7, 8])[labels]).mean()
    assert scores["top1"] > among_all  # predictions are limited to the classes of the data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.json", SOME),
        ("names.json", {name: str(digit) for name, digit in SOME.items()}),
        ("more.json", {**SOME, "nine": 9}),
        ("numbers.json", {"0": 8, "1": 7, "2": 3}),
        ("list.json", [8, 7, 3]),
        ("map.csv", "# digits\nthree,3\neight,8\nseven,7\n"),
        ("map.tsv", "three\t3\neight\t8\nseven\t7\n"),
        ("map.txt", "three 3\n\neight 8\nseven 7"),
        ("list.txt", "8\n7\n3\n"),
    ],
)
def test_file_maps_the_classes(name: str, content: Any, trained: Digits, tmp_path: Path) -> None:
    by_name = bi.evaluate(trained.model, trained.subset)
    scores = bi.evaluate(trained.model, trained.renamed, classes=write_file(tmp_path / name, content))
    assert scores.pop("matching") == f"3 of 10 classes, matched by {name}"
    assert scores["top1"] == by_name["top1"]
    assert scores["loss"] == pytest.approx(by_name["loss"], rel=1e-6)


def test_classes_with_the_names_of_numbers_are_found_by_number(trained: Digits, monkeypatch: Any) -> None:
    """Folders named 0, 1, 10, 2, …, whose order by name differs from the order of the numbers, as in ImageNet-V2."""
    from bigincubate.tasks.image_classification.targets import find_targets

    info = open_dataset(trained.whole)
    assert find_targets(info, 10, None, None).columns is None
    folders = sorted(str(number) for number in range(12))
    monkeypatch.setitem(info.schema.metadata, "classes", folders)
    names = [f"n{number:02}" for number in range(12)]
    found = find_targets(info, 12, names, None)
    assert found.columns is not None
    assert found.columns.tolist() == [int(folder) for folder in folders]
    monkeypatch.setitem(info.schema.metadata, "classes", names[::-1])
    found = find_targets(info, 12, names, None)
    assert found.columns is not None
    assert found.columns.tolist() == [*range(12)][::-1]
    monkeypatch.setitem(info.schema.metadata, "classes", [f"x{number}" for number in range(12)])
    found = find_targets(info, 12, names, None)
    assert (found.columns, found.matching[:27]) == (None, "classes matched by position")


WRONG: dict[str, tuple[Any, ...]] = {
    "no file": ("nowhere.json", None, "No such file"),
    "not JSON": ("map.json", "{three", "is not JSON"),
    "a number": ("map.json", "3", "has no classes"),
    "nothing": ("map.csv", "", "lists 0 classes"),
    "an empty object": ("map.json", {}, "has no classes"),
    "a missing class": ("map.json", {"three": 3, "eight": 8}, "no class of the model for the class 'seven'"),
    "a number that is too large": ("map.json", {**SOME, "seven": 10}, "10 (for 'seven') is not a class of the model"),
    "an unknown name": ("map.csv", "three,3\neight,8\nseven,sieben", "'sieben' (for 'seven') is not a class"),
    "several classes": ("map.json", {**SOME, "seven": [7, 1]}, "[7, 1] (for 'seven') is not a class of the model"),
    "a truth value": ("map.json", {**SOME, "seven": True}, "True (for 'seven') is not a class"),
    "a class twice": ("map.json", {**SOME, "seven": 3}, "'seven' and 'three' of"),
    "a line twice": ("map.csv", "three,3\neight,8\nseven,7\nthree,3", "'three' twice"),
    "a line with three cells": ("map.csv", "three,3\neight,8,7", "'eight,8,7' is not a class of the data"),
    "a list that is too short": ("list.json", [3, 8], "lists 2 classes, but"),
    "too few lists": ("real.json", [[3], [8]], "valid labels for 2 images, but"),
    "a valid label that is too large": ("real.json", [[3]] * 59 + [[10]], "label 10 of image 59 is not a class"),
    "no valid label": ("real.json", [[]] * 60, "no valid label for any image"),
    "lists for other classes": ("real.json", [[3]] * 60, "3 classes, but model.num_classes = 10"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_refused_in_one_line(name: str, trained: Digits, tmp_path: Path, call: Call) -> None:
    file, content, message = WRONG[name]
    if content is not None:
        write_file(tmp_path / file, content)
    code, out, err = call("evaluate", trained.model, "--data", trained.renamed, "--classes", tmp_path / file)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert "--classes" in err


def test_data_of_other_classes_without_a_file_is_refused(trained: Digits, call: Call) -> None:
    code, _, err = call("evaluate", trained.model, "--data", trained.whole, "--data", trained.renamed)
    assert code == 2
    assert "has 3 classes, but model.num_classes = 10" in err
    assert "--classes FILE" in err
    subset, whole = trained.subset, trained.whole
    code, _, err = call("evaluate", trained.model, "--data", subset, "--data", whole, *["--classes", "-"] * 3)
    assert code == 2
    assert "2 data sets, but 3 files of classes" in err
    with pytest.raises(ConfigError, match="there is no data set"):
        bi.evaluate(trained.model, [])


def test_both_splits_are_evaluated(trained: Digits, tmp_path: Path, call: Call) -> None:
    """In data that is only used for evaluation, the same images may be in both splits."""
    words = ["evaluate", trained.model, "--data", trained.subset, "--data", trained.subset, "--json"]
    val, both = json.loads(call(*words, "--split", "val", "--split", "all")[1])
    train = bi.evaluate(trained.model, trained.subset, split="train", per_class=True)
    assert [each["samples"] for each in (val, train, both)] == [60, 120, 180]
    assert both["top1"] == pytest.approx((val["top1"] + 2 * train["top1"]) / 3)
    assert (both["split"], train["split"]) == ("all", "train")
    assert [each["samples"] for each in train["per_class"]] == [40, 40, 40]
    code, out, _ = call(*words[:-1], "--split", "val", "--split", "all")
    assert [row.split("  ")[0] for row in out.splitlines()[2:]] == ["subset", "subset, both splits"]
    code, out, _ = call(*words[:4], "--split", "all")
    assert code == 0
    assert " on 180 images of " in out
    assert ", both splits (3 of 10 classes, matched by name)" in out
    lists = write_file(tmp_path / "real.json", [[3]] * open_dataset(trained.whole).samples["val"])
    for options in (["--split", "test"], ["--split", "all", "--classes", lists], ["--split", "all", "--probe", "knn"]):
        code, _, err = call("evaluate", trained.model, "--data", trained.whole, *options)
        assert code == 2
        assert "split" in err
        assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------ valid labels


def test_prediction_is_right_if_it_is_a_valid_label(trained: Digits, tmp_path: Path) -> None:
    """ReaL has a list of labels per image, in the order of the file names. Images with an empty list do not count."""
    logits, labels = predict(trained.model, trained.whole)
    names = read_names(open_dataset(trained.whole))
    draws = np.random.default_rng(0)
    lists = {name: draws.choice(10, size=draws.integers(0, 4), replace=False).tolist() for name in sorted(names)}
    file = write_file(tmp_path / "real.json", [*lists.values()])
    scores = bi.evaluate(trained.model, trained.whole, classes=file, per_class=True)
    kept = [(row, lists[name], label) for row, name, label in zip(logits, names, labels, strict=True) if lists[name]]
    assert 0 < len(kept) < len(names)
    best = [np.argsort(-row)[:5] for row, _, _ in kept]
    top1 = np.mean([order[0] in valid for order, (_, valid, _) in zip(best, kept, strict=True)])
    top5 = np.mean([bool({*order} & {*valid}) for order, (_, valid, _) in zip(best, kept, strict=True)])
    assert (scores["top1"], scores["top5"]) == (pytest.approx(100 * top1), pytest.approx(100 * top5))
    assert scores["samples"] == len(kept)
    assert "loss" not in scores
    assert scores["matching"] == "valid labels of real.json"
    counted = np.bincount([label for _, _, label in kept])
    assert [each["samples"] for each in scores["per_class"]] == counted[counted > 0].tolist()


def test_lists_of_the_labels_give_the_usual_score(trained: Digits, tmp_path: Path) -> None:
    info = open_dataset(trained.whole)
    by_name = dict(zip(read_names(info), [label for _, label in read_samples(trained.whole, "val")], strict=True))
    file = write_file(tmp_path / "labels.json", [[by_name[name]] for name in sorted(by_name)])
    usual, valid = bi.evaluate(trained.model, [trained.whole] * 2, classes=[None, file])
    assert [valid[name] for name in ("top1", "top5", "samples")] == [usual[n] for n in ("top1", "top5", "samples")]
    assert valid["intervals"] == usual["intervals"]


def test_names_of_images_are_added_to_data_of_an_earlier_version(trained: Digits, tmp_path: Path) -> None:
    source = write_digits(tmp_path / "images", {str(digit): digit for digit in range(10)})
    (source / "val" / "3" / "3_999.png").write_bytes(b"no image")
    prepare_dataset(str(source), tmp_path / "skipped", skip_bad=True)
    names = read_names(open_dataset(tmp_path / "skipped"))
    assert "val/3/3_999.png" not in names
    (source / "val" / "3" / "3_999.png").unlink()
    data = tmp_path / "data"
    prepare_dataset(str(source), data)
    written = (data / NAMES_FILE).read_bytes()
    names = read_names(open_dataset(data))
    images = {(source / name).read_bytes() for name in names}
    assert [image for image, _ in read_samples(data, "val")] == [(source / name).read_bytes() for name in names]
    assert len(images) == 200
    file = write_file(
        tmp_path / "real.json", [[int(name.split("/")[1])] for name in sorted(names, key=lambda n: n[6:])]
    )
    expected = bi.evaluate(trained.model, data, classes=file)["top1"]
    assert expected == bi.evaluate(trained.model, data)["top1"]
    (data / NAMES_FILE).unlink()
    with pytest.raises(DataError, match="does not hold the names of its validation images; run the same"):
        bi.evaluate(trained.model, data, classes=file)
    prepare_dataset(str(source), data)
    assert (data / NAMES_FILE).read_bytes() == written
    (data / NAMES_FILE).write_text(json.dumps({"digest": "of other data", "names": names}))
    with pytest.raises(DataError, match="does not belong to this data"):
        bi.evaluate(trained.model, data, classes=file)


# ------------------------------------------------------------------------------------------------ intervals, tables


def test_intervals_are_those_of_a_direct_bootstrap(trained: Digits) -> None:
    logits, labels = predict(trained.model, trained.whole)
    scores = bi.evaluate(trained.model, trained.whole)
    assert scores == bi.evaluate(trained.model, trained.whole)
    order = np.argsort(-logits, axis=1)
    draws = np.random.default_rng(0)
    hits = {"top1": order[:, 0] == labels, "top5": (order[:, :5] == labels[:, None]).any(1)}
    samples = [draws.integers(len(labels), size=len(labels)) for _ in range(1000)]
    for name, right in hits.items():
        assert scores[name] == pytest.approx(100 * right.mean())
        low, high = scores["intervals"][name]
        resampled = sorted(right[rows].mean() for rows in samples)
        assert [low, high] == pytest.approx([100 * np.percentile(resampled, at) for at in (2.5, 97.5)])
        assert low < scores[name] < high
        half = 196 * np.sqrt(right.mean() * (1 - right.mean()) / len(labels))  # of the normal approximation
        assert high - low == pytest.approx(2 * half, rel=0.15)


def test_interval_of_equal_outcomes_is_a_point() -> None:
    outcomes = np.stack([np.ones(7, dtype=bool), np.zeros(7, dtype=bool)], axis=1)
    assert bootstrap_intervals(outcomes).tolist() == [[1, 1], [0, 0]]
    assert bootstrap_intervals(outcomes[:1]).tolist() == [[1, 1], [0, 0]]


def test_scores_of_training_do_not_change(trained: Digits) -> None:
    """The metrics of a finished model are bitwise those of its phase, no matter what else is computed."""
    (found,) = evaluate_model(trained.model, [trained.whole], batch_size=32, per_class=True)
    model, spec = load_model(trained.model)
    task_type = task_class(spec.task.name)
    task = task_type(task_type.artifact_settings(spec.model, spec.metadata), DataConfig())
    stream = task.eval_stream(open_dataset(trained.whole), "val", batch_size=32)
    from bigincubate.distributed.process_group import DistributedContext

    assert task.evaluate(model, stream, DistributedContext()) == found.result.scores


def test_scores_of_classes(trained: Digits, call: Call) -> None:
    logits, labels = predict(trained.model, trained.whole)
    predicted = logits.argmax(1)
    words = ["evaluate", trained.model, "--data", trained.whole, "--per-class"]
    scores = json.loads(call(*words, "--json")[1])
    assert [each["name"] for each in scores["per_class"]] == [str(digit) for digit in range(10)]
    confusions = 0
    for digit, found in enumerate(scores["per_class"]):
        own = predicted[labels == digit]
        assert (found["samples"], found["score"]) == (len(own), pytest.approx(100 * (own == digit).mean()))
        wrong = np.bincount(own[own != digit], minlength=10)
        confusions += int(wrong.any())
        expected = (str(wrong.argmax()), wrong.max()) if wrong.any() else (None, 0)
        assert (found["wrong"], found["wrong_samples"]) == expected
    assert confusions > 5
    code, out, _ = call(*words)
    assert code == 0
    first, _, title, *lines = out.splitlines()
    assert first.startswith("top-1 ")
    assert title.startswith("classes of ")
    while not lines[0].startswith("class "):  # skip the rest of the title, which is wrapped if the path is long
        lines.pop(0)
    heading, *rows = lines
    assert heading.split() == ["class", "images", "top-1", "%", "most", "frequent", "wrong", "class", "times"]
    for row, each in zip(rows, scores["per_class"], strict=True):
        mistaken = [each["wrong"], str(each["wrong_samples"])] if each["wrong"] else ["-", "-"]
        assert row.split() == [each["name"], str(each["samples"]), f"{each['score']:.2f}", *mistaken]


def test_several_data_sets_are_a_table(trained: Digits, tmp_path: Path, call: Call) -> None:
    file = write_file(tmp_path / "map.json", SOME)
    words = ["evaluate", trained.model]
    for each in (trained.whole, trained.subset, trained.renamed):
        words += ["--data", each]
    words += ["--classes", "-", "--classes", "-", "--classes", file]
    code, out, err = call(*words, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    lines: list[str] = []
    data = [trained.whole, trained.subset, trained.renamed]
    assert found == bi.evaluate(trained.model, data, classes=[None, None, file], report=lines.append)
    assert [each["data"] for each in found] == [str(path) for path in data]
    assert len(lines) == 3
    single = bi.evaluate(trained.model, trained.whole)
    assert found[0] == {"data": str(trained.whole), **single}
    assert "matching" not in single
    code, out, _ = call(*words)
    assert code == 0
    _, heading, *rows = out.splitlines()
    assert re.split(r"\s{2,}", heading.strip()) == [
        *("data", "images", "top-1 %", "95% interval", "top-5 %", "95% interval", "loss", "classes")
    ]
    for row, name, each in zip(rows, ("data", "subset", "renamed"), found, strict=True):
        low, high = each["intervals"]["top1"]
        expected = [name, f"{each['samples']}", f"{each['top1']:.2f}", f"{low:.2f} to {high:.2f}"]
        assert re.split(r"\s{2,}", row.strip())[:4] == expected


def test_probe_of_several_data_sets(trained: Digits, call: Call) -> None:
    """A probe learns the classes of the data, which may differ from those of the model."""
    words = ["evaluate", trained.model, "--data", trained.subset, "--data", trained.renamed, "--probe", "knn"]
    found = json.loads(call(*words, "--json")[1])
    assert [each["samples"] for each in found] == [60, 60]
    assert found[0]["top1"] == found[1]["top1"] > 40
    for option in (["--per-class"], ["--classes", "map.json"]):
        code, _, err = call(*words, *option)
        assert code == 2
        assert f"{option[0]} is not for a probe" in err
        assert err.count("\n") == 1

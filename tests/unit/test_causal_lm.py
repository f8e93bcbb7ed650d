"""The task `causal_lm` on data sets of a few windows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from token_data import SEPARATOR, WINDOW, write_recipe, write_windows
from torch import Tensor, nn

from bigincubate.config import Recipe, load_recipe
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import ConfigError, DataError
from bigincubate.models.language.causal_lm import CHUNK_TOKENS, IGNORED
from bigincubate.models.library import find_family
from bigincubate.planning.cost import cost_plan
from bigincubate.planning.memory import estimate_footprints
from bigincubate.planning.phases import make_plan
from bigincubate.tasks.causal_lm.generate import complete
from bigincubate.tasks.causal_lm.task import CausalLanguageModeling
from bigincubate.tasks.image_classification.task import ImageClassification

ONE = DistributedContext()


def random_windows(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.RandomState(seed)
    return [generator.randint(0, 257, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(str(write_recipe(tmp_path_factory.mktemp("recipe"))))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """Windows of different lengths."""
    train = random_windows(*(2 + index % WINDOW for index in range(32)))
    val = [[SEPARATOR, *range(97, 97 + WINDOW)], [SEPARATOR, 97, 98, SEPARATOR, 99]]
    return open_dataset(write_windows(tmp_path_factory.mktemp("windows") / "data", train, val))


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    return find_family(recipe.model).build(recipe.model, ((2,), (2,)))


def make_task(recipe: Recipe, **settings: Any) -> CausalLanguageModeling:
    return CausalLanguageModeling(recipe.settings("pretrain").model_copy(update=settings), recipe.data)


def reference_losses(model: nn.Module, windows: list[list[int]]) -> Iterator[Tensor]:
    """Yield the losses of each window's targets, from logits."""
    for window in windows:
        tokens = torch.tensor([window])
        yield F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="none")


# ------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradient_is_that_of_the_mean_over_all_targets(
    recipe: Recipe, data: DatasetInfo, model: nn.Module, ranks: int, micro_batches: int
) -> None:
    """Streams of several ranks in one process, which adds up their sums. tests/distributed has real ranks."""
    streams = [make_task(recipe).train_stream(data, rank=rank, world=ranks) for rank in range(ranks)]
    batches = [next(stream.batches(0)) for stream in streams]
    counts = [int((batch["targets"] != IGNORED).sum()) for batch in batches]
    assert len({(row != IGNORED).sum().item() for batch in batches for row in batch["targets"]}) > 5

    class Summed(DistributedContext):
        def sum_over_ranks(self, tensor: Tensor) -> Tensor:
            return torch.full_like(tensor, sum(counts))

    model.zero_grad()
    for rank, batch in enumerate(batches):
        task = make_task(recipe)
        env = replace(Summed(), rank=rank, world=ranks)
        prepared = task.prepare_batch(batch, env)
        for index in range(micro_batches):
            loss = task.loss(model, prepared.micro_batch(index, micro_batches), 0)
            (loss / micro_batches / ranks).backward()
    found = {name: grad.clone() for name, p in model.named_parameters() if (grad := p.grad) is not None}

    model.zero_grad()
    rows = [row for batch in batches for row in zip(batch["inputs"], batch["targets"], strict=True)]
    windows = [[*inputs[: (t != IGNORED).sum()].tolist(), int(t[t != IGNORED][-1])] for inputs, t in rows]
    torch.cat(list(reference_losses(model, windows))).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_equal_windows_need_no_communication(recipe: Recipe, data: DatasetInfo, tmp_path: Path) -> None:
    class Silent(DistributedContext):
        def sum_over_ranks(self, tensor: Tensor) -> Tensor:
            raise AssertionError("a collective")

    equal = open_dataset(write_windows(tmp_path / "data", random_windows(*[WINDOW + 1] * 16), [[256, 1]], equal=True))
    task, env = make_task(recipe), replace(Silent(), world=2)
    batch = next(task.train_stream(equal, rank=0, world=2).batches(0))
    assert set(task.prepare_batch(batch, env)["mean_targets"].tolist()) == {WINDOW}
    task.train_stream(data, rank=0, world=2)
    with pytest.raises(AssertionError, match="a collective"):
        task.prepare_batch(batch, env)


# ------------------------------------------------------------------------------------------------ evaluation


def test_bits_per_byte_do_not_include_separators(recipe: Recipe, data: DatasetInfo, model: nn.Module) -> None:
    task = make_task(recipe)
    scores = task.evaluate(model, task.eval_stream(data, "val", batch_size=1), ONE)
    windows = [[SEPARATOR, *range(97, 97 + WINDOW)], [SEPARATOR, 97, 98, SEPARATOR, 99]]
    with torch.no_grad():
        first, second = reference_losses(model, windows)
    separator = second[2].item()
    total = first.sum().item() + second.sum().item()
    size = WINDOW + 3
    assert scores["samples"] == WINDOW + 4
    assert scores["bits_per_byte"] == pytest.approx((total - separator) / math.log(2) / size, rel=1e-6)
    assert scores["separator_bits"] == pytest.approx(separator / math.log(2) / size, rel=1e-6)
    assert scores["loss"] == pytest.approx(total / (WINDOW + 4), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert 0 <= scores["accuracy"] <= 100


def test_scores_depend_neither_on_ranks_nor_on_the_batch_size(
    recipe: Recipe, data: DatasetInfo, model: nn.Module
) -> None:
    task = make_task(recipe)
    expected = task.evaluate(model, task.eval_stream(data, "val", batch_size=2), ONE)
    found = task.evaluate(model, task.eval_stream(data, "val", batch_size=1), ONE)
    assert found == pytest.approx(expected, rel=1e-6)
    parts = [len(task.eval_stream(data, "val", rank=rank, world=2, batch_size=1)) for rank in (0, 1)]
    assert parts == [1, 1]


def test_masked_documents_are_scored_as_if_they_were_alone(recipe: Recipe, data: DatasetInfo, model: nn.Module) -> None:
    masked = make_task(recipe, text=recipe.text.model_copy(update={"mask_documents": True}))
    batch = next(iter(masked.eval_stream(data, "val", batch_size=2)))
    assert batch["documents"][1, :5].tolist() == [1, 1, 1, 2, 2]
    losses = model(batch["inputs"], batch["targets"], batch["documents"])
    with torch.no_grad():
        alone = next(reference_losses(model, [[SEPARATOR, 99]]))
    assert losses[1, 3].item() == pytest.approx(alone[0].item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ example


def test_example_is_a_function_of_the_seed_and_reads_the_last_window(model: nn.Module) -> None:
    options: Any = {"window": WINDOW, "vocabulary": 257, "end": SEPARATOR, "env": ONE}
    start = [SEPARATOR, 97]
    with torch.no_grad():
        texts = [complete(model, start, 40, seed=seed, **options) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert WINDOW + 4 < len(texts[0]) <= 42
    assert max(texts[0]) < 257
    expected, generator = list(start), torch.Generator().manual_seed(0)
    while len(expected) < len(texts[0]):  # without padding
        with torch.no_grad():
            logits = model(torch.tensor([expected[-WINDOW:]]))[0, -1]
        expected.append(int(torch.multinomial(logits.double().softmax(-1), 1, generator=generator)))
    assert texts[0] == expected


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"augment": {"flip": 0.1}}, "augment.flip"),
        ({"mixup": {"mixup": 0.5}}, "mixup.mixup"),
        ({"drop_path": {"rate": 0.1}}, "drop_path.rate"),
        ({"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing"),
    ],
)
def test_keys_that_the_task_does_not_use_are_refused(recipe: Recipe, changes: dict[str, Any], says: str) -> None:
    settings = type(recipe.settings("pretrain")).model_validate(recipe.settings("pretrain").model_dump() | changes)
    with pytest.raises(ConfigError, match=says):
        CausalLanguageModeling(settings, recipe.data)


def test_data_that_does_not_fit_is_refused(recipe: Recipe, data: DatasetInfo) -> None:
    make_task(recipe).check_dataset(data)
    longer = recipe.model.model_copy(update={"context_length": 32})
    with pytest.raises(ConfigError, match=r"model\.context_length = 32: set it to 16"):
        make_task(recipe, model=longer).check_dataset(data)
    smaller = recipe.model.model_copy(update={"args": recipe.model.args | {"vocab_size": 256}})
    with pytest.raises(ConfigError, match=r"model\.args\.vocab_size = 256"):
        make_task(recipe, model=smaller).check_dataset(data)


@pytest.mark.parametrize("window", [[1], [0] * (WINDOW + 2), [300, 1], [[1, 2], [3, 4]]])
def test_damaged_window_is_named(recipe: Recipe, tmp_path: Path, window: Any) -> None:
    data = open_dataset(write_windows(tmp_path / "data", [[1, 2]], [window]))
    with pytest.raises(DataError, match="val sample 0"):
        next(iter(make_task(recipe).eval_stream(data, "val")))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["model.img_size=64"], "model.img_size = 64 is not used by the task causal_lm; remove it"),
        (["model.num_classes=10"], "model.num_classes = 10 is not used by the task causal_lm; remove it"),
        (["model.library=timm"], 'the task causal_lm cannot train models of model.library = "timm"'),
    ],
)
def test_keys_and_models_of_images_are_refused(sets: list[str], says: str) -> None:
    other = load_recipe("stdlib-llama", sets)
    with pytest.raises(ConfigError, match=re.escape(says)):
        CausalLanguageModeling(other.settings("pretrain"), other.data)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["text.mask_documents=true"], "text.mask_documents = True is not used by the task image_classification"),
        (["model.context_length=9"], "model.context_length = 9 is not used by the task image_classification"),
        (["model.library=transformers"], 'image_classification cannot train models of model.library = "transformers"'),
    ],
)
def test_keys_and_models_of_text_are_refused_for_images(sets: list[str], says: str) -> None:
    other = load_recipe("digits", sets)
    with pytest.raises(ConfigError, match=re.escape(says)):
        ImageClassification(other.settings("pretrain"), other.data)


# ------------------------------------------------------------------------------------------------ memory


def test_planned_memory_has_the_logits_of_a_chunk_and_never_those_of_a_batch(recipe: Recipe) -> None:
    plan = make_plan(recipe)
    found = {}
    for size in (257, 10_000):
        args = recipe.model.args | {"vocab_size": size}
        larger = recipe.model_copy(update={"model": recipe.model.model_copy(update={"args": args})})
        rows = cost_plan(larger, plan, 1000)
        (footprint,) = estimate_footprints(larger, plan, rows[:1], [1], ["ddp"])["pretrain"]
        found[size] = footprint.activations
    tokens = 16 * WINDOW  # in a batch; fewer than in a chunk
    assert found[10_000] - found[257] == 12 * tokens * (10_000 - 257)
    family = find_family(recipe.model)
    assert family.workspace_bytes(recipe.model, 10**6) == 12 * CHUNK_TOKENS * 257


@pytest.mark.parametrize("depths", [[2, 3], [1, 1]])
def test_target_of_another_depth_than_the_configuration_is_refused(recipe: Recipe, depths: list[int]) -> None:
    other = recipe.model_copy(update={"plan": recipe.plan.model_copy(update={"target_depths": depths})})
    with pytest.raises(ConfigError, match=rf"num_hidden_layers is 4, but plan\.target_depths has {sum(depths)} blocks"):
        make_plan(other)

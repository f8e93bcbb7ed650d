"""The strings that enter seeds, and the numbers that come out: changing one changes the results of every recipe.

A failure here means that something was renamed that must keep its name. Do not adapt the values.
"""

from __future__ import annotations

import pytest

from bigincubate.config import PHASES, seeds


def test_seed_strings_keep_their_names() -> None:
    strings = (seeds.INIT, seeds.MIX, seeds.DROP_PATH, seeds.PARTITION)
    assert strings == ("init", "mix", "drop_path", "part of")
    assert PHASES == ("pretrain", "incubate", "finetune", "end_to_end")
    assert [seeds.phase_key(phase, None) for phase in PHASES] == list(PHASES)
    assert seeds.phase_key("incubate", 3) == "incubate/3"


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ("pretrain", 581951696171999637),
        ("incubate/0", 4391932381698903912),
        ("incubate/3", 3193458614686530194),
        ("finetune", 241686083287299975),
        ("end_to_end", 5301359107307672514),
    ],
)
def test_seed_of_initial_weights(key: str, seed: int) -> None:
    assert seeds.stable_seed(0, seeds.INIT, key) == seed


def test_seed_of_mixing() -> None:
    assert seeds.generator_seed(seeds.MIX, 0, 5) == 578308798148718860


def test_seed_of_an_augmented_view() -> None:
    """Of seed 0, epoch 1, sample 17, view 1."""
    assert seeds.generator_seed(0, 1, 17, 1) == 4319705485392308498


def test_seed_of_drop_path_masks() -> None:
    assert seeds.drop_path_seed(0, 5) == 4334281637873287816


def test_seed_of_the_order_of_samples() -> None:
    assert [seeds.shuffle_seed(seed) for seed in (0, 7)] == [613549620, 973742608]


def test_number_that_assigns_a_sample_to_a_partition() -> None:
    assert seeds.partition_number("train/0/a.png") == 3391624324874972863

"""Odd values of every option and recipe key end with a documented exit code and one line.

``make fuzz SECONDS=3600`` (``FUZZ_SECONDS=3600 pytest tests/integration/test_fuzz.py -k round -s``) runs examples for
an hour from the seed ``FUZZ_SEED``, and prints each new fault with a line for the corpus.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_line import iterate_commands
from conftest import SMOKE
from fuzz_examples import list_keys, make_example
from fuzzing import LIMIT_S, World, offline, run_example

CORPUS = Path(__file__).parent / "fuzz_corpus.jsonl"
FOUND = [json.loads(line) for line in CORPUS.read_text().splitlines()] if CORPUS.exists() else []
SHORT_ROUND = 60  # examples


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, done: Any, digits: Path) -> World:
    recipe = SMOKE.replace('source = "digits-dev"', f'path = "{digits}"') + "[slurm]\nmax_submissions = 1\n"
    return World(tmp_path_factory.mktemp("fuzz"), done.run.path, digits, recipe)


@pytest.mark.parametrize("found", FOUND, ids=[each["about"] for each in FOUND])
def test_value_that_once_gave_a_traceback_gives_one_line(found: dict[str, Any], world: World) -> None:
    with offline():
        ending = run_example(found, world)
    assert not ending.fault
    if "code" in found:
        assert ending.code == found["code"], ending.message


def test_random_round_has_only_documented_endings(world: World) -> None:
    seconds, seed = float(os.environ.get("FUZZ_SECONDS", 0)), int(os.environ.get("FUZZ_SEED", 0))
    end, codes, faults = time.monotonic() + seconds, Counter[str](), dict[str, str]()
    with offline():
        while time.monotonic() < end if seconds else seed < SHORT_ROUND:
            example = make_example(seed)
            ending = run_example(example, world)
            codes[str(ending.place if ending.code is None else ending.code)] += 1
            if ending.place == "TooSlow":
                print(f"seed {seed}: stopped after {LIMIT_S} s: {json.dumps(example)[:2000]}", flush=True)
            if ending.fault and ending.place not in faults:
                line = json.dumps({"about": ending.place, **example})
                faults[ending.place] = f"seed {seed}: {ending.place}\n{line}\n{ending.fault}"
                print(f"\n{faults[ending.place]}", flush=True)
            seed += 1
            if seconds and seed % 100 == 0:
                print(f"{sum(codes.values())} examples, {len(faults)} faults: {dict(codes)}", flush=True)
    print(f"{sum(codes.values())} examples: {dict(codes)}")
    assert not faults, "\n".join(faults.values())


def test_examples_use_every_command_and_option_and_most_keys() -> None:
    examples = [make_example(seed) for seed in range(4000)]
    texts = [json.dumps(example) for example in examples]
    words = {word for example in examples for word in example["words"]}
    commands = list(iterate_commands())
    called = {tuple(example["words"][:length]) for example in examples for length in (1, 2)}
    assert {command for command, _ in commands} <= called
    options = {each.option for _, parameters in commands for each in parameters if each.option}
    assert options <= words
    names = {key.rpartition(".")[2] for key in list_keys()}
    assert {name for name in names if not any(name in text for text in texts)} == set()

"""Make the examples of the fuzz test: commands and recipes with wrong, extreme and odd values.

Commands and options are derived from the application, keys from the schema, so that new ones are included. An example
is JSON: the words of a command, and tables of a recipe (``{mine}``). Words may have placeholders for paths of `World`.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from datetime import date, datetime
from datetime import time as day_time
from typing import Any, Literal, get_args, get_origin

import tomli_w
from command_line import Parameter, is_path, iterate_commands

from bigincubate.config import PHASES, Recipe
from bigincubate.config.schema import find_field, find_path_mark, inner_table, list_alternatives

Example = dict[str, Any]

ODD_TEXT = [
    *(
        "",
        " ",
        "x",
        "-",
        "--",
        "ünï",
        "日本語",
        "²",
        "٣",
        "a\udcffb",
        "x" * 3000,
        "a\nb",
        "\x1b[31m",
        "[/x]",
        "[",
        "{",
        "%s",
    ),
    *(
        "{0}",
        "..",
        "a/b",
        "'",
        '"',
        "\\",
        "#",
        "none",
        "None",
        "null",
        "true",
        "=",
        ",",
        "os:getcwd",
        "nowhere.module:Thing",
    ),
    *("json:nothing", "math:pi", "2026-01-01", "01:00:00", "[1", "{a=1}", "[]"),
]
ODD_NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "1.5", "-0.0", "1e-300", "1e300", "1e3", "nan", "inf", "-inf", "true", str(2**31)),
    *(
        str(2**63),
        str(-(2**63)),
        str(10**30),
        "9" * 5000,
        "0x10",
        "1_000",
        "²",
        "٣",
        "",
        "x",
        "1 2",
        "0.999999999999999999",
    ),
]
ODD_PATHS = [
    *("{missing}", "{file}", "{file}/below", "{binary}", "{huge}", "{empty}", "{run}", "{odd}", "{part}", "{data}"),
    *("{images}", "{recipe}", "{mine}", "{run}/meta", "{run}/meta/artifact", "{run}/meta/checkpoints", "{loop}"),
    *("{run}/meta/checkpoints/step-00000002", "{run}/finetune/artifact/weights.safetensors", "{run}/plan.json"),
    *(
        "{fifo}",
        "{unreadable}",
        "",
        ".",
        "~",
        "~/x",
        "$NOT_SET/x",
        "$HOME/x",
        "a\udcffb",
        "x" * 300,
        "a\nb",
        "ünï",
        "[/x]",
    ),
    *(
        "{empty}/" + "x/" * 2000,
        "digits",
        "s3://bucket/x",
        "http://localhost/x",
        "timm:nothing",
        "timm:vit_tiny_patch16_224",
    ),
]
ODD_TOML: list[Any] = [
    *(
        0,
        -1,
        1,
        2,
        3,
        2**31,
        2**63 - 1,
        -(2**63),
        10**30,
        0.0,
        0.5,
        -0.5,
        1.0,
        1e300,
        1e-300,
        float("nan"),
        float("inf"),
    ),
    *(True, False, [], [1], ["x"], [[1]], [[], [1]], [0.5, 0.9], [1, 1], {}, {"x": 1}, {"x": {"y": [1]}}),
    *(date(2026, 1, 1), day_time(1, 0), datetime(2026, 1, 1), "a\0b"),
]
# values that are right or nearly so, by the name of the parameter of a command
GOOD: dict[str, list[str]] = {
    "recipe": ["{recipe}", "{recipe}", "{mine}", "digits"],
    "directory": ["{new}", "{new}", "{part}", "{part}", "{run}"],
    "phase": [*PHASES, *["pretrain", "end_to_end"] * 4],
    "module": ["0", "1", "auto"],
    "job": ["1", "1_0"],
    "code": ["0", "1", "75", "143"],
    "source": ["{images}", "digits-dev", "{run}", "{run}/meta", "{run}/finetune/artifact"],
    "out": ["{new}", "{new}/x"],
    "to": ["{new}"],
    "data": ["{data}"],
    "files": ["{binary}", "{run}/finetune/artifact/weights.safetensors", "{official}"],
    "part": ["meta", "modules", "model"],
    "checkpoint": ["{run}/meta/checkpoints/step-00000002"],
    "folder": ["{run}", "{run}/meta", "{run}/meta/checkpoints/step-00000002"],
    "runs": ["{run}", "{part}", "{odd}"],
    "form": ["library", "official"],
    "probe": ["linear", "knn"],
    "balanced": ["class", "hash"],
    "world": ["1", "1,2,8"],
    "cluster": ["nodes=1,gpus=2,tflops=1", "nodes=2,gpus=2,rates={run}"],
    "by": ["{parts}"],
    "parts": ["1", "2"],
    "jobs": ["1", "2"],
    "pattern": ["train.*", "lr"],
    "copy": ["{new}"],
}
# the same for recipe keys
GOOD_VALUES: dict[str, list[Any]] = {
    "model.name": [
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "mixer_s32_224",
        "deit3_small_patch16_224",
    ],
    "model.args": [
        *(
            {name: value}
            for name in ("embed_dim", "num_heads", "patch_size", "depth", "unknown", "mlp_ratio", "img_size")
            for value in (0, -1, 1, 7, 2**20, 2**40, 0.5, "x", [1], True)
        ),
        *(
            {name: True}
            for name in ("pretrained", "qkv_bias", "no_embed_class", "class_token", "norm_layer", "act_layer")
        ),
    ],
    "optim.name": ["sgd", "lamb", "lion", "adafactor", "lookahead_adam", "adahessian", "adamp", "muon", "bnb_adam"],
    "augment.rand_augment": [
        "v0",
        "rand",
        "rand-m9",
        "rand-m9-mstd0.5-inc1",
        "rand-x",
        "rand-m",
        "rand-mx9",
        "augmix-m3",
        "original",
        "rand-n0",
        "rand-n99",
        "rand-m-1",
        "rand-w1",
        "rand-m1e999",
        "rand-p2-m5",
        "3a",
        "-",
    ],
    "plan.target_depths": [[2, 2], [1, 3], [4], [0, 4], [-1, 5], [[2], [2]], [[2, 2], [2]], [2**40, 1], [2.0, 2]],
    "plan.meta_depths": [[1, 1], [0, 0], [2, 2], [3, 1], [1], [1, 1, 1], [[1], [1]]],
    "plan.modules": [1, 2, 3, 10**6],
    "meta.select": ["even", "odd", [0, 1], [1, 0], [[0], [1]], [99]],
    "task.name": ["json:loads", "math:pi", "nowhere:Task"],
    "slurm.umask": ["007", "0777", "8"],
    "slurm.memory": ["64G"],
    "slurm.container": ["apptainer exec x.sif", "'"],
}


@functools.cache
def list_keys() -> list[str]:
    """Return every dotted key of the schema, also those by which phases and kinds of jobs override others."""

    def walk(table: Any, prefix: str) -> Iterator[str]:
        for name, field in table.model_fields.items():
            yield f"{prefix}{name}"
            if (inner := inner_table(field)) is not None:
                yield from walk(inner, f"{prefix}{name}.")

    return list(walk(Recipe, ""))


def make_example(seed: int) -> Example:
    """Return the example of a seed: any command with an odd parameter, or a phase with one key of its type."""
    chance = random.Random(seed)
    if chance.random() < 0.4:
        return _one_key(chance)
    words, parameters = chance.choice(_weighted_commands())
    odd = chance.choice([*parameters, None]) if parameters else None
    arguments: list[str] = []
    tables: dict[str, Any] = {}
    uses_mine = False
    for each in parameters:
        if each.name == "sets":
            for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
                key = chance.choice(list_keys())
                key, value = chance.choice([(key, _odd_value(chance, key)), (key, _odd_value(chance, key))])
                if chance.random() < 0.5:
                    arguments += [each.option or "", f"{key}={_as_set(chance, value)}"]
                else:
                    _put(tables, key, value)
            continue
        if not each.required and each is not odd and chance.random() > 0.2:
            continue
        count = chance.choice([1, 1, 2, 3]) if each.repeated else 1
        for _ in range(count):
            wrong = each is odd and chance.random() < 0.8
            value = chance.choice(_odd_words(each) if wrong or each.name not in GOOD else GOOD[each.name])
            value = "{mine}" if value == "{recipe}" and tables else value
            uses_mine |= value == "{mine}"
            if each.kind is bool:
                arguments.append(each.option or "")
            else:
                arguments += [each.option, value] if each.option else [value]
    if tables and not uses_mine:
        arguments = ["{mine}" if word == "{recipe}" else word for word in arguments]
    return {"words": [*words, *arguments], "tables": _jsonable(tables)}


def _one_key(chance: random.Random) -> Example:
    """Return an example that most often reaches training: one key has another value, usually of its type."""
    phase = chance.choice(["pretrain", "pretrain", "end_to_end"])
    key, tables = chance.choice(list_keys()), dict[str, Any]()
    _put(tables, key, _odd_value(chance, key))
    train = ["train", "{mine}", "--run-dir", "{new}", "--phase", phase]
    words = chance.choice([train, train, ["plan", "{mine}"], ["submit", "{mine}", "--run-dir", "{new}", "--dry-run"]])
    return {"words": words, "tables": _jsonable(tables)}


@functools.cache
def _weighted_commands() -> list[tuple[tuple[str, ...], list[Parameter]]]:
    """Return the commands, those that read a recipe several times."""
    found = list(iterate_commands())
    return [each for each in found for _ in range(4 if any(p.name == "sets" for p in each[1]) else 1)]


def _odd_words(parameter: Parameter) -> list[str]:
    """Return odd values of a parameter."""
    if get_origin(parameter.kind) is Literal:
        return [*map(str, get_args(parameter.kind)), *ODD_TEXT]
    if is_path(parameter) or parameter.name in ("recipe", "source"):
        return ODD_PATHS
    known = GOOD.get(parameter.name, [])
    return ODD_NUMBERS if parameter.kind in (int, float) else [*ODD_TEXT, *ODD_NUMBERS, *ODD_PATHS, *known]


def _odd_value(chance: random.Random, key: str) -> Any:
    """Return a value for a key: of its type or not."""
    plain = key.split(".", 1)[1] if key.split(".")[0] in PHASES and "." in key else key
    field = find_field(Recipe, key)
    assert field is not None
    pools: list[list[Any]] = [ODD_TOML, ODD_TEXT]
    if find_path_mark(field) is not None:
        pools += [list(ODD_PATHS)] * 4
    for known in (key, plain):
        pools += [GOOD_VALUES[known]] * 6 if known in GOOD_VALUES else []
    for kind in list_alternatives(field.annotation):
        if get_origin(kind) is Literal:
            pools += [list(get_args(kind))] * 4
        elif kind in (int, float):
            pools += [[kind(value) for value in (0, 1, 2, 3, 4, 8, 0.1, 0.5, 0.9)]] * 4
            pools += [[value for value in ODD_TOML if isinstance(value, int | float)]] * 4
        elif kind is bool:
            pools += [[True, False]] * 4
    return chance.choice(chance.choice(pools))


def _as_set(chance: random.Random, value: Any) -> str:
    """Return a value as the text of ``--set``."""
    if isinstance(value, str):
        return value if chance.random() < 0.8 or "\udcff" in value else json.dumps(value)
    return (
        tomli_w.dumps({"value": value}, multiline_strings=False).partition("=")[2].strip()
        if not isinstance(value, dict)
        else "{" + ", ".join(f"{key} = {_as_set(chance, inner)}" for key, inner in value.items()) + "}"
    )


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        inner = tables.get(part)
        tables[part] = tables = inner if isinstance(inner, dict) else {}
    tables[last] = value


def _jsonable(value: Any) -> Any:
    """Return tables in which dates are marked, so that they can be written as JSON."""
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, datetime | date | day_time):
        return {"$": type(value).__name__, "iso": value.isoformat()}
    return value


def from_json(value: Any) -> Any:
    """Return the tables of an example, with their dates."""
    if isinstance(value, dict):
        if "$" in value:
            kinds: dict[str, Any] = {"datetime": datetime, "date": date, "time": day_time}
            return kinds[value["$"]].fromisoformat(value["iso"])
        return {key: from_json(inner) for key, inner in value.items()}
    return value

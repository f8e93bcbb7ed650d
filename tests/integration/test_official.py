"""Checkpoints of the official implementation: into a run or a folder, and back, and never a line of their code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import build_timm
from test_export import artifact
from torch import Tensor

from bigincubate.cli import main
from bigincubate.config import load_recipe
from bigincubate.errors import ArtifactError, ConfigError
from bigincubate.files import hash_file
from bigincubate.interchange.export import export_official, load_model
from bigincubate.interchange.official_format import read_stages
from bigincubate.report.verify import Verdict, verify_run
from bigincubate.storage.artifacts import load_artifact, load_manifest
from bigincubate.storage.run_directory import RunDir
from bigincubate.training.import_official import Part, import_model, import_part

Harnesses = Callable[..., Any]
ARGS = {"patch_size": 2, "embed_dim": 24, "num_heads": 3}


def stages(depths: list[int], seed: int, img_size: int = 8) -> list[dict[str, Tensor]]:
    """A ViT as the official implementation cuts it, written down by hand: stem in the first module, blocks counted from
    each module's start, norm and head in the last."""
    torch.manual_seed(seed)
    name = "vit_tiny_patch16_224"
    state = build_timm(name, ((sum(depths),),), num_classes=10, img_size=img_size, args=ARGS).state_dict()
    modules: list[dict[str, Tensor]] = [{} for _ in depths]
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if first != "blocks":
            modules[-1 if first in ("norm", "head") else 0][name] = tensor
            continue
        index, _, rest = rest.partition(".")
        place = int(index)
        for module, depth in enumerate(depths):
            if 0 <= place < depth:
                modules[module][f"blocks.{place}.{rest}"] = tensor
            place -= depth
    return modules


def save(file: Path, modules: list[dict[str, Tensor]]) -> Path:
    """With all that the official implementation leaves in a file."""
    flat = {f"stages.{k}.{name}": tensor for k, stage in enumerate(modules) for name, tensor in stage.items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"model": flat, "model_stages": modules, "optimizer": optimizer, "epoch": 299, "scaler": {}}, file)
    return file


Called = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Called:
    """Exit code, and all that a command says."""

    def called(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bigincubate", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), "".join(capsys.readouterr())

    return called


@pytest.fixture
def empty(harness: Harnesses) -> Any:
    return harness("train.max_steps=2", "log.every_steps=1")


def import_all(harness: Any, part: Part, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Return the results of the phases by title."""
    return {context.row.title: result for context, result in import_part(harness.recipe, part, files, harness.run)}


def test_import_puts_meta_model_and_modules_into_a_run(empty: Any, tmp_path: Path) -> None:
    meta = save(tmp_path / "finished_checkpoint.pth", stages([1, 1], seed=0))
    hybrids = [save(tmp_path / f"{k}.pth", stages([2, 1] if k == 0 else [1, 2], seed=1 + k)) for k in range(2)]
    with pytest.raises(ArtifactError, match="the meta model is missing"):
        list(import_part(empty.recipe, "modules", hybrids, empty.run))
    results = import_all(empty, "meta", [meta])
    assert set(results) == {"meta model"}
    assert 0 <= results["meta model"]["metrics"]["top1"] <= 100
    assert list(import_all(empty, "modules", hybrids)) == ["module 0", "module 1"]

    assert torch.equal(
        empty.weights("pretrain")["blocks.1.mlp.fc1.weight"], stages([1, 1], 0)[1]["blocks.0.mlp.fc1.weight"]
    )
    second = empty.weights("incubate", 1)
    own = stages([1, 2], seed=2)[1]
    assert second.keys() == {name.replace("blocks.1", "blocks.3").replace("blocks.0", "blocks.2") for name in own}
    for index in (0, 1):
        name = "attn.qkv.weight"
        assert torch.equal(second[f"blocks.{2 + index}.{name}"], own[f"blocks.{index}.{name}"])
    empty.train("finetune")
    imported = {file: f"{file} (SHA-256 {hash_file(file)})" for file in (meta, *hybrids)}
    for phase, module, expected in (
        ("pretrain", None, imported[meta]),
        ("incubate", 0, imported[hybrids[0]]),
        ("incubate", 1, imported[hybrids[1]]),
        ("finetune", None, f"{imported[hybrids[0]]}, {imported[hybrids[1]]}"),
    ):
        manifest = load_manifest(empty.run.phase(phase, module).artifact)
        assert manifest.model.initial_weights == expected
    assert {finding.verdict for finding in verify_run(empty.run)} == {Verdict.GOOD}
    with pytest.raises(ConfigError, match="already has results or checkpoints"):
        list(import_part(empty.recipe, "meta", [meta], empty.run))


def test_checkpoint_converts_to_a_folder_and_back(empty: Any, tmp_path: Path) -> None:
    modules = stages([2, 2], seed=3)
    file = save(tmp_path / "vit.pth", modules)
    import_model(empty.recipe, [file], tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())["pretrained_cfg"]
    assert config["description"] == f"initialized from {file.name} (SHA-256 {hash_file(file)})"
    export_official(tmp_path / "vit", tmp_path / "again" / "vit.pth")
    again = read_stages(tmp_path / "again" / "vit.pth")
    assert [list(stage) for stage in again] == [list(stage) for stage in modules]
    for mine, theirs in zip(again, modules, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match="exists; choose another"):
        export_official(tmp_path / "vit", tmp_path / "again" / "vit.pth")


def test_position_embeddings_are_resampled_for_larger_images(fast: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "vit.pth", stages([2, 2], seed=3))
    import_model(load_recipe(str(fast), ["finetune.model.img_size=12"]), [file], tmp_path / "large")
    model, spec = load_model(tmp_path / "large")
    assert spec.model.img_size == 12
    assert model(torch.zeros(1, 3, 12, 12)).shape == (1, 10)
    tokens = load_file(tmp_path / "large" / "model.safetensors")["pos_embed"]
    before = read_stages(file)[0]["pos_embed"]
    assert (before.shape, tokens.shape) == ((1, 17, 24), (1, 37, 24))
    assert torch.equal(tokens[:, 0], before[:, 0])  # of the class token, as it was


def test_import_cuts_a_whole_model_into_modules(empty: Any, tmp_path: Path) -> None:
    list(import_part(empty.recipe, "meta", [save(tmp_path / "meta.pth", stages([1, 1], seed=0))], empty.run))
    modules = stages([2, 2], seed=3)
    list(import_part(empty.recipe, "modules", [save(tmp_path / "vit.pth", modules)], empty.run))
    tensors, _ = load_artifact(empty.run.phase("incubate", 0).artifact)
    assert torch.equal(tensors["pos_embed"], modules[0]["pos_embed"])


def test_official_meta_model_is_expanded_and_modules_are_refused(fast: Path, tmp_path: Path, call: Called) -> None:
    meta = save(tmp_path / "meta.pth", stages([1, 1], seed=0))
    hybrids = [save(tmp_path / f"{k}.pth", stages([2, 1] if k == 0 else [1, 2], seed=1 + k)) for k in range(2)]
    to = ("--to", tmp_path / "run", "--set", "plan.incubate=none", "--set", "train.max_steps=2")
    code, out = call("import", fast, meta, "--as", "meta", *to)
    assert code == 0, out
    for files in (hybrids, [save(tmp_path / "vit.pth", stages([2, 2], seed=3))], [tmp_path / "run"]):
        code, out = call("import", fast, *files, "--as", "modules", *to)
        line = 'bigincubate: plan.incubate = "none": there is no module to import; list the modules to import in it\n'
        assert (code, out) == (2, line)
    assert not (tmp_path / "run" / "modules").exists()
    code, out = call("train", tmp_path / "run" / "recipe.toml", "--run-dir", tmp_path / "run", "--phase", "finetune")
    assert code == 0, out
    manifest = load_manifest(RunDir(tmp_path / "run").phase("finetune").artifact)
    assert manifest.model.initial_weights == f"{meta} (SHA-256 {hash_file(meta)})"


class Code:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    witness, file = tmp_path / "witness", tmp_path / "evil.pth"
    torch.save({"model_stages": [Code(witness)]}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match=r"reading it would run code .*system") as refused:
        read_stages(file)
    assert not witness.exists()
    assert "\n" not in str(refused.value)


def test_file_that_is_no_official_checkpoint_is_refused(empty: Any, tmp_path: Path) -> None:
    def refused(says: str, *files: Path, error: type[Exception] = ArtifactError) -> None:
        with pytest.raises(error, match=says) as caught:
            import_model(empty.recipe, files, tmp_path / "out")
        assert "\n" not in str(caught.value)

    good = stages([2, 2], seed=0)
    (tmp_path / "junk.pth").write_text("nonsense")
    refused("damaged", tmp_path / "junk.pth")
    refused("No such file", tmp_path / "nowhere.pth")
    torch.save({"model": good[0]}, tmp_path / "other.pth")
    refused("no list model_stages", tmp_path / "other.pth")
    refused("has 3 modules, but the recipe has 2", save(tmp_path / "3.pth", stages([1, 1, 2], seed=0)))
    refused(
        r"modules of \[1, 1\] blocks, but the recipe's target has \[2, 2\]", save(tmp_path / "1.pth", stages([1, 1], 0))
    )
    refused("3 files: pass one", *[tmp_path / "1.pth"] * 3, error=ConfigError)
    good[1]["head.bias"] = torch.zeros(3)
    refused("tensor 'head.bias'", save(tmp_path / "shape.pth", good))
    del good[1]["head.bias"]
    refused("tensor 'head.bias'", save(tmp_path / "less.pth", good))
    good[1]["cls_token"] = torch.zeros(1)
    refused("module 1 .* has no tensor 'cls_token'", save(tmp_path / "place.pth", good))


def test_model_without_official_form_is_refused(tmp_path: Path) -> None:
    for name in ("deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"):
        artifact(name, tmp_path / name)
        with pytest.raises(ConfigError, match="only plain ViTs"):
            export_official(tmp_path / name, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_import_and_export_commands(fast: Path, tmp_path: Path, call: Called) -> None:
    meta = save(tmp_path / "meta.pth", stages([1, 1], seed=0))
    code, out = call("import", fast, meta, "--as", "meta", "--to", tmp_path / "run")
    assert (code, out.startswith("meta model: imported, top-1 ")) == (0, True), out
    code, out = call("export", tmp_path / "run" / "meta", "--out", tmp_path / "meta2.pth", "--as", "official")
    assert code == 0
    assert torch.equal(read_stages(tmp_path / "meta2.pth")[0]["cls_token"], stages([1, 1], 0)[0]["cls_token"])
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events == ["created", "imported", "done"]
    for words in (("import", fast, meta, "--as", "x", "--to", "y"), ("export", "x", "--as", "x", "--out", "y")):
        code, out = call(*words)
        assert (code, out.count("\n")) == (2, 1), out

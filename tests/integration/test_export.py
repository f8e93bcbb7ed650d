"""An exported folder is timm's: its own loader builds the very model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from denied import deny, limit_file_size, solution_for
from safetensors.torch import load_file
from small_models import build_timm
from torch import nn

from bigincubate.config import ModelConfig, TaskConfig
from bigincubate.errors import ArtifactError, ConfigError, SystemResourceError
from bigincubate.interchange.export import export, export_official, load_model
from bigincubate.interchange.timm_format import timm_arguments
from bigincubate.storage.artifacts import ArtifactManifest, ModelSpec, save_artifact
from bigincubate.storage.finished_models import best_artifact
from bigincubate.storage.run_directory import RunDir

CASES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depths": [[2], [1]], "args": {"patch_size": 4, "embed_dim": 24, "num_heads": 3}},
    "deit_tiny_distilled_patch16_224": {
        "depths": [[1], [1]],
        "args": {"patch_size": 4, "embed_dim": 24, "num_heads": 3},
    },
    "swin_tiny_patch4_window7_224": {
        "depths": [[2, 1, 0, 0], [0, 1, 2, 1]],
        "args": {"patch_size": 2, "window_size": 2, "embed_dim": 12, "num_heads": [1, 1, 2, 2]},
    },
    "convnext_atto": {"depths": [[1, 2, 0, 0], [0, 0, 1, 1]], "args": {"dims": [8, 12, 16, 24]}},
    "mixer_s16_224": {"depths": [[1], [1]], "args": {}},  # timm builds eight blocks
}


def artifact(name: str, folder: Path, seed: int = 0, *, initial_weights: str | None = None) -> ModelSpec:
    """A trained model of this kind, as a phase hands it on: every parameter is something of its own."""
    case = CASES[name.split(".")[0]]
    spec = ModelSpec(
        task=TaskConfig(),
        model=ModelConfig(name=name, num_classes=7, img_size=32, args=case["args"]),
        depths=case["depths"],
        metadata={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "eval_crop": 0.9},
        initial_weights=initial_weights,
    )
    torch.manual_seed(seed)
    depths = tuple(tuple(stages) for stages in spec.depths)
    model = build_timm(name, depths, num_classes=7, img_size=32, args=spec.model.args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    manifest = ArtifactManifest(kind="model", phase="finetune", model=spec, weights="raw", identity={}, data="d")
    save_artifact(folder, model.state_dict(), manifest)
    return spec


def logits(model: nn.Module) -> torch.Tensor:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"mixer_s16_224"}))
def test_timm_loads_the_folder_and_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    spec = artifact(name, tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out")
    file = str(tmp_path / "out" / "model.safetensors")
    overlay = {"file": file, "num_classes": spec.model.num_classes}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **timm_arguments(spec))
    ours, _ = load_model(tmp_path / "artifact")
    assert torch.equal(logits(model), logits(ours))
    assert load_file(file).keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", sorted(CASES))
def test_printed_python_loads_the_folder(name: str, tmp_path: Path) -> None:
    artifact(name, tmp_path / "artifact")
    snippet = export(tmp_path / "artifact", tmp_path / "out")
    known: dict[str, Any] = {}
    exec(snippet, known)
    assert torch.equal(logits(known["model"]), logits(load_model(tmp_path / "artifact")[0]))
    settings = timm.data.resolve_model_data_config(known["model"])
    assert (list(settings["input_size"]), settings["crop_pct"]) == ([3, 32, 32], 0.9)
    assert (list(settings["mean"]), list(settings["std"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_exported_folder_loads_here_as_well(tmp_path: Path) -> None:
    spec = artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out")
    model, read = load_model(tmp_path / "out")
    assert read == spec
    assert torch.equal(logits(model), logits(load_model(tmp_path / "artifact")[0]))


def test_config_json_says_how_to_feed_it(tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["num_classes"] == 7
    told = config["pretrained_cfg"]
    assert (told["input_size"], told["mean"], told["std"]) == ([3, 32, 32], [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (told["interpolation"], told["crop_pct"]) == ("bilinear", 0.9)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (
            "/home/me/a, b/vit.pth (SHA-256 12ab), /data/meta.pth (SHA-256 cd34)",
            "a, vit.pth (SHA-256 12ab), meta.pth (SHA-256 cd34)",
        ),
        ("/home/me/runs/digits", "digits"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("transformers:me/model", "transformers:me/model"),
    ],
)
def test_export_names_weights_without_folders_of_this_machine(weights: str, named: str, tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact", initial_weights=weights)
    export(tmp_path / "artifact", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["description"] == f"initialized from {named}"
    assert config["bigincubate"]["initial_weights"] == named


def test_second_export_replaces_the_first(tmp_path: Path) -> None:
    for seed in (0, 1):
        artifact("vit_tiny_patch16_224", tmp_path / f"artifact-{seed}", seed)
        export(tmp_path / f"artifact-{seed}", tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), logits(load_model(tmp_path / "artifact-1")[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact-0", "artifact-1", "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out in ("out", "file"):
        with pytest.raises(ConfigError, match="is not an exported model"):
            export(tmp_path / "artifact", tmp_path / out)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_export_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    deny(monkeypatch, weights)
    with pytest.raises(SystemResourceError, match=f"^{weights}: Permission denied; {solution_for(weights, weights)}$"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize("size", [0, 100, 10_000, 20_000, 30_000])
@pytest.mark.parametrize("write", [export, export_official], ids=["timm", "official"])
def test_export_that_does_not_fit_is_an_error_of_the_system(
    write: Callable[..., Any], size: int, tmp_path: Path
) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    with limit_file_size(size), pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "artifact", tmp_path / "out")
    assert caught.value.filename == str(tmp_path / ".out.unfinished")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"bigincubate": {"name": "x"}}'),
        ("config.json", '{"bigincubate": 3}'),
        ("model.safetensors", "nonsense"),
        ("model.safetensors", None),
    ],
)
def test_damaged_export_is_refused_in_one_line(name: str, text: str | None, tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    if text is not None:
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(ArtifactError) as caught:
        load_model(tmp_path / "out")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    for name in ("vit_tiny_patch16_224", "mixer_s16_224"):
        artifact(name, tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}-out")
    (tmp_path / "mixer_s16_224-out" / "model.safetensors").replace(
        tmp_path / "vit_tiny_patch16_224-out" / "model.safetensors"
    )
    with pytest.raises(ArtifactError, match="does not hold the model") as caught:
        load_model(tmp_path / "vit_tiny_patch16_224-out")
    assert "\n" not in str(caught.value)


def test_run_exports_its_fine_tuned_model_and_a_module_is_refused(harness: Callable[..., Any], tmp_path: Path) -> None:
    made = harness("train.max_steps=2")
    with pytest.raises(ArtifactError, match="no finished model yet"):
        best_artifact(RunDir(made.run.path))
    made.train("end_to_end")
    assert best_artifact(made.run) == made.run.phase("end_to_end").artifact
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        made.train(phase, module)
    export(made.run.path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in made.weights("finetune").items():
        assert torch.equal(weights[name], tensor)
    with pytest.raises(ArtifactError, match="is module 1, a part of a model"):
        export(made.run.phase("incubate", 1).artifact, tmp_path / "module")
    meta, spec = load_model(made.run.phase("pretrain").path)  # a phase's directory
    assert spec.depths == [[1], [1]]
    assert len(meta.blocks) == 2  # type: ignore[arg-type]

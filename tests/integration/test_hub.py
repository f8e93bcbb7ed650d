"""Model cards, and exports that are pushed to a hub, from which timm loads them.

The hub is a server of the test (`hub_server`), because the Hugging Face Hub is out of reach; its clients are real.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, Repository, code_of, serve_hub
from huggingface_hub import ModelCard
from huggingface_hub.utils import reset_sessions
from test_export import artifact, logits

from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError
from bigincubate.files import read_json
from bigincubate.interchange.export import load_model
from bigincubate.interchange.hub import push_folder
from bigincubate.report.model_card import export_with_card
from bigincubate.storage.artifacts import load_manifest

FILES = {"README.md", "config.json", "model.safetensors"}
Command = Callable[..., Any]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        yield served


@pytest.fixture
def logged_in(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, for what this process pushes."""
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reset_sessions()  # one that was opened offline by another test stays offline
    return hub


@pytest.fixture(scope="module")
def exported(done: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_with_card(done.run.path, out, license_name="mit")
    return out


# ------------------------------------------------------------------------------------------------ card


def test_metadata_has_what_a_hub_reads(exported: Path, done: Any) -> None:
    data = ModelCard.load(exported / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "mit")
    assert (data.datasets, data.language) == (None, None)
    result = done.run.phase("finetune").result
    found = {each.metric_type: each.metric_value for each in data.eval_results}
    assert found.keys() == result["metrics"].keys()
    for name, value in result["metrics"].items():
        assert found[name] == pytest.approx(value, abs=0.005)
    assert {each.dataset_name for each in data.eval_results} == {Path(done.recipe.data.path).name}


def test_text_says_how_the_model_was_trained(exported: Path, done: Any) -> None:
    text = (exported / "README.md").read_text()
    for row in done.rows:
        if row.phase != "end_to_end":
            folder = done.run.phase(row.phase, row.module)
            assert load_manifest(folder.artifact).digest in text
    assert f"samples: {done.data.samples['train']:,} for training" in text
    assert done.data.digest in text
    parameters = sum(each.numel() for each in load_model(exported)[0].parameters())
    assert f"4 blocks (2+2 in its modules), width 24 and {parameters:,} parameters" in text
    assert f"{done.run.assembled.result['metrics']['top1']:.2f}" in text
    assert "| modules, as hybrids |" in text


def test_recipe_in_the_card_computes_the_same(exported: Path, done: Any, tmp_path: Path) -> None:
    text = (exported / "README.md").read_text()
    file = tmp_path / "recipe.toml"
    file.write_text(re.findall(r"````toml\n(.*?)````", text, re.DOTALL)[0])
    assert load_recipe(str(file)).identity == done.recipe.identity


def test_exports_of_a_run_are_equal_and_name_nothing_of_this_machine(exported: Path, done: Any, tmp_path: Path) -> None:
    export_with_card(done.run.path, tmp_path / "other", license_name="mit")
    content = {file.name: file.read_bytes() for file in exported.iterdir()}
    assert content == {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()}
    assert content.keys() == FILES
    words = [str(Path.home()), str(done.run.path.parent), str(done.data.path), f"/{getpass.getuser()}/"]
    for word in words:
        assert not [name for name, data in content.items() if word.encode() in data], word
    for name in ("README.md", "config.json"):
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", content[name].decode())


def test_recipe_in_the_card_names_files_without_their_folders(harness: Command, tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "weights")
    sets = ("model.args={patch_size=4, embed_dim=24, num_heads=3}", "model.img_size=32", "augment.pad=4")
    made = harness("train.max_steps=1", *sets, f"meta.init={tmp_path / 'weights'}", "meta.select=[0, 1]")
    made.train("pretrain")
    export_with_card(made.run.phase("pretrain").path, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'init = "weights"' in text
    assert "Training started from `weights`." in text
    assert not [file for file in (tmp_path / "out").iterdir() if str(tmp_path).encode() in file.read_bytes()]


def test_card_of_an_unknown_run_states_no_scores(tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    for source, out in (("artifact", "out"), ("out", "again")):
        export_with_card(tmp_path / source, tmp_path / out)
        card = ModelCard.load(tmp_path / out / "README.md")
        assert (card.data.library_name, card.data.eval_results, card.data.license) == ("timm", None, None)
        assert "## Scores" not in card.text
        assert "is not known" in card.text


def test_card_of_a_changed_run_is_that_of_an_unknown_one(harness: Command, tmp_path: Path) -> None:
    made = harness("train.max_steps=1")
    made.train("end_to_end")
    plan = read_json(made.run.path / "plan.json")
    assert plan is not None
    for row in plan["rows"]:
        row["identity"]["train.lr"] = 0.5
    (made.run.path / "plan.json").write_text(json.dumps(plan))
    export_with_card(made.run.path, tmp_path / "out")
    assert "## Scores" not in (tmp_path / "out" / "README.md").read_text()


def test_code_in_the_card_loads_the_folder(exported: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    names: dict[str, Any] = {}
    exec(code_of((exported / "README.md").read_text()), names)
    expected = load_model(done.run.path)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in names["model"].state_dict().items())


@pytest.mark.parametrize("complete", [True, False])
def test_readme_of_the_user_is_kept(complete: bool, tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    out = tmp_path / "out"
    export_with_card(tmp_path / "artifact", out)
    export_with_card(tmp_path / "artifact", out)  # replaces its own
    (out / "README.md").write_text("years of work")
    if not complete:
        (out / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"README\.md is not the file of an earlier export"):
        export_with_card(tmp_path / "artifact", out)
    assert (out / "README.md").read_text() == "years of work"
    (out / "README.md").unlink()
    os.mkfifo(out / "README.md")  # reading it would never end
    with pytest.raises(ConfigError, match=r"README\.md is not the file of an earlier export"):
        export_with_card(tmp_path / "artifact", out)


def test_text_of_others_stays_in_its_place(tmp_path: Path) -> None:
    """In the description of a foreign export, and in the strings of a recipe."""
    artifact("vit_tiny_patch16_224", tmp_path / "artifact")
    export_with_card(tmp_path / "artifact", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["bigincubate"]["initial_weights"] = "x`\n# A HEADING\n<script>"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    export_with_card(tmp_path / "out", tmp_path / "again")
    text = (tmp_path / "again" / "README.md").read_text()
    assert "Training started from `x' # A HEADING <script>`." in text


# ------------------------------------------------------------------------------------------------ hub


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s16_224"])
def test_pushed_model_is_loaded_by_the_code_in_its_card(
    name: str, hub: Hub, bigincubate: Command, tmp_path: Path
) -> None:
    artifact(name, tmp_path / "artifact")
    environment = hub.environment(tmp_path / "home")
    ended = bigincubate("export", tmp_path / "artifact", "--push-to-hub", "me/model", "--private", env=environment)
    assert (ended.returncode, ended.stdout) == (0, f"pushed to {hub.url}/me/model/commit/{1:040x}\n"), ended.stderr
    repository = hub.repositories["me/model"]
    assert (repository.private, repository.commits, repository.files.keys()) == (True, 1, FILES)
    code = code_of(repository.files["README.md"].decode())
    assert "me/model" in code
    script = "import sys, torch; images = torch.load(sys.argv[1]); torch.save(model.eval()(images), sys.argv[2])"
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / "images")
    hub.run_python(f"{code}\n{script}", tmp_path / "images", tmp_path / "logits", home=tmp_path / "home")
    assert torch.equal(torch.load(tmp_path / "logits"), logits(load_model(tmp_path / "artifact")[0]))


def test_second_push_replaces_only_what_was_exported(exported: Path, logged_in: Hub) -> None:
    before = {"tokenizer.json": b"{}", "notes.txt": b"mine", "README.md": b"old"}
    logged_in.repositories["me/model"] = repository = Repository(files=dict(before))
    (exported / "thesis.tex").write_text("private")
    try:
        push_folder(exported, "me/model")
    finally:
        (exported / "thesis.tex").unlink()
    assert repository.files.keys() == FILES | {"notes.txt"}
    assert repository.files["README.md"] == (exported / "README.md").read_bytes()
    assert repository.commits == 1


REFUSALS: dict[str, tuple[int, str, list[str]]] = {
    "no owner": (2, "expected OWNER/NAME", ["--push-to-hub", "model"]),
    "bad name": (2, "expected OWNER/NAME", ["--push-to-hub", "me/a--b"]),
    "three parts": (2, "expected OWNER/NAME", ["--push-to-hub", "models/me/model"]),
    "private without a repository": (2, "--push-to-hub", ["--private"]),
    "bad license": (2, "apache-2.0", ["--license", "MIT License"]),
    "official": (2, "--as official", ["--as", "official", "--push-to-hub", "me/model"]),
    "is public": (2, "exists and is public", ["--push-to-hub", "me/public", "--private"]),
    "is private": (2, "exists and is private", ["--push-to-hub", "me/private"]),
    "no token": (3, "HF_TOKEN", ["--push-to-hub", "me/model"]),
    "wrong token": (3, "401", ["--push-to-hub", "me/model"]),
    "no permission": (3, "You may not write here", ["--push-to-hub", "me/model"]),
    "no hub": (3, "Connection refused", ["--push-to-hub", "me/model"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_is_one_line_and_keeps_the_export(
    case: str, call: Command, done: Any, logged_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged_in.repositories = {"me/public": Repository(), "me/private": Repository(private=True)}
    logged_in.refuse_uploads = case == "no permission"
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    if case == "no hub":
        with socket.socket() as unused:  # a port without a server
            unused.bind(("127.0.0.1", 0))
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    status, says, options = REFUSALS[case]
    out = tmp_path / "out"
    code, printed, error = call("export", done.run.path, "--out", out, *options)
    assert (code, error.count("\n")) == (status, 1), error
    assert says in error
    assert ("but its repository was created" in error) == ("me/model" in logged_in.repositories)
    assert "hf_secret" not in printed + error
    assert not any(repository.files for repository in logged_in.repositories.values())
    if "exists" in says or status == 3:
        assert {file.name for file in out.iterdir()} == FILES
        assert str(out) in printed
    else:
        assert not out.exists()


def test_export_needs_somewhere_to_write(call: Command, done: Any) -> None:
    code, _, error = call("export", done.run.path)
    assert (code, error) == (2, "bigincubate: nothing to write: give --out, --push-to-hub, or both\n")

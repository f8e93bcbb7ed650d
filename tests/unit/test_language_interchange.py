"""Exchange language models with transformers: exported folders, tokenizers, pretrained meta models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from language_models import FAMILIES, LENGTH, build, random_tokens, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigincubate.config import MetaConfig, ModelConfig, TaskConfig
from bigincubate.errors import ArtifactError, BigincubateError, ConfigError, DataError
from bigincubate.files import hash_file
from bigincubate.interchange.export import export, load_model, write_folder
from bigincubate.interchange.pretrained import pretrained_meta
from bigincubate.interchange.tokenizer_files import write_tokenizer_files
from bigincubate.models.language.families import find_transformers_family
from bigincubate.models.partition import Partition
from bigincubate.storage.artifacts import ArtifactManifest, ModelSpec, save_artifact

BYTES = {"tokenizer": {"name": "bytes"}, "separator": 256, "vocabulary": 257, "window": LENGTH}
CUT = ((2,), (3,))
TEXTS = [
    "",
    " ",
    "<|endoftext|>",
    "a <|endoftext|> b",
    "\r\n\t\0 x  y",
    "naïve 東京 🙂 e\u0301",
    "\ufeff\u00a0.",
    " ,'s . !",
]


def artifact(name: str, folder: Path, records: dict[str, Any], **args: Any) -> ModelSpec:
    """Write the artifact of a model whose depth is not the target's."""
    spec = ModelSpec(
        task=TaskConfig(),
        model=settings(name, **args),
        depths=[list(row) for row in CUT],
        metadata={},
        records=records,
    )
    model, _ = build(spec.model, CUT)
    manifest = ArtifactManifest(kind="model", phase="finetune", model=spec, weights="raw", identity={}, data="d")
    save_artifact(folder, dict(model.state_dict()), manifest)
    return spec


def random_texts(count: int) -> list[str]:
    """Return strings from all Unicode planes, and strings that tokenizers tend to change."""
    generator = random.Random(0)
    ranges = [(0, 0x7F), (0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    letters = [
        [generator.randint(*generator.choice(ranges)) for _ in range(generator.randrange(30))] for _ in range(count)
    ]
    return TEXTS + ["".join(map(chr, row)) for row in letters[len(TEXTS) :]]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_the_folder_and_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    spec = artifact(name, tmp_path / "artifact", {})
    snippet = export(tmp_path / "artifact", tmp_path / "out")
    ours, _ = load_model(tmp_path / "artifact")
    known: dict[str, Any] = {}
    exec(snippet, known)
    tokens = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(known["model"](tokens).logits, ours.eval()(tokens), atol=1e-5, rtol=1e-5)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[1].values())  # no key is missing or unexpected
    again, read = load_model(tmp_path / "out")
    assert read == spec
    assert torch.equal(again.eval()(tokens), ours(tokens))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["use_cache"], config["tie_word_embeddings"], config["dtype"]) == (True, False, "float32")
    assert config["n_layer" if name == "gpt2" else "num_hidden_layers"] == 5
    generated = known["model"].generate(tokens[:1, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[0, 4], ours(tokens[:1, :4])[0, -1].argmax())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_exported_bytes_tokenizer_encodes_every_text_as_its_bytes(tmp_path: Path) -> None:
    artifact("llama", tmp_path / "artifact", BYTES, vocab_size=257)
    known: dict[str, Any] = {}
    exec(export(tmp_path / "artifact", tmp_path / "out"), known)
    tokenizer, config = known["tokenizer"], known["model"].config
    texts = random_texts(10_000)
    for text, tokens in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokens == list(text.encode()) == tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 256, None)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (256, 256, 257)
    assert tokenizer.model_max_length == LENGTH
    assert tokenizer.decode([104, 105, 256], skip_special_tokens=True) == "hi"


def test_bits_per_byte_are_those_of_plain_transformers(tmp_path: Path) -> None:
    artifact("gpt2", tmp_path / "artifact", BYTES, vocab_size=257)
    known: dict[str, Any] = {}
    exec(export(tmp_path / "artifact", tmp_path / "out"), known)
    text = "Bytes, é and 🙂."
    stream = torch.tensor([[known["tokenizer"].bos_token_id, *known["tokenizer"](text)["input_ids"]]])
    with torch.no_grad():
        theirs = F.cross_entropy(known["model"](stream[:, :-1]).logits.transpose(1, 2), stream[:, 1:], reduction="sum")
        ours = load_model(tmp_path / "artifact")[0](stream[:, :-1], stream[:, 1:]).sum()
    assert stream.shape[1] == 1 + len(text.encode())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-6)


def write_bpe(file: Path) -> None:
    """Write a byte-level BPE tokenizer with a merge, a separator that is not special, and steps that add tokens."""
    write_tokenizer_files("bytes", file.parent, separator=256, window=8)
    content = json.loads((file.parent / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"he": 257, "<unused>": 258}
    content["model"]["merges"] = [["h", "e"]]
    content["added_tokens"][0]["special"] = False
    piece = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))


def test_exported_tokenizer_of_a_file_is_that_of_the_data(tmp_path: Path) -> None:
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    write_bpe(data / "tokenizer.json")
    records = {"tokenizer": {"name": "bpe", "sha256": hash_file(data / "tokenizer.json")}, "separator": 256}
    artifact("llama", tmp_path / "run" / "finetune" / "artifact", records)
    (tmp_path / "run" / "recipe.toml").write_text(
        '[data]\nsource = "digits"\n[plan]\nmodules = 2\n[model]\nname = "vit_tiny_patch16_224"\n'
    )
    known: dict[str, Any] = {}
    exec(export(tmp_path / "run" / "finetune" / "artifact", tmp_path / "out"), known)
    he = [257, *b"llo <|endoftext|>"]
    assert known["tokenizer"]("hello <|endoftext|>")["input_ids"] == he
    assert known["tokenizer"].decode(he) == "hello <|endoftext|>"
    (data / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"the tokenizer of .*artifact \(SHA-256 .*\) is not at .*data/tokenizer"):
        export(tmp_path / "run" / "finetune" / "artifact", tmp_path / "other")


def test_tokenizer_without_the_separator_is_refused(tmp_path: Path) -> None:
    write_bpe(tmp_path / "own.json")
    with pytest.raises(ArtifactError, match="has no special token 3, which is the separator"):
        write_tokenizer_files(tmp_path / "own.json", tmp_path, separator=3, window=8)


def test_second_export_leaves_no_tokenizer_of_the_first(tmp_path: Path) -> None:
    artifact("llama", tmp_path / "artifact", BYTES)
    export(tmp_path / "artifact", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 4
    model, spec = load_model(tmp_path / "artifact")
    write_folder(model, spec, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


# ------------------------------------------------------------------------------------------------ pretrained models


def pretrained(name: str, folder: Path, depth: int = 6, **changes: Any) -> Any:
    """Write a random model of transformers with tied weights, in place of a trained one."""
    family = find_transformers_family(name)
    config = family.configuration(settings(name, depth))
    config.tie_word_embeddings = True
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def meta_of(init: Path | str, model: ModelConfig, select: Any = None) -> dict[str, Tensor]:
    built, family = build(model, CUT)
    meta = MetaConfig(init=str(init), select=select)
    return pretrained_meta(meta, model, Partition(family, CUT), built.state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_model_has_all_blocks_of_a_pretrained_model(name: str, tmp_path: Path) -> None:
    theirs = pretrained(name, tmp_path / "hub", depth=5)
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight
    model, _ = build(settings(name), CUT)
    model.load_state_dict(meta_of(tmp_path / "hub", settings(name)))
    torch.testing.assert_close(model(random_tokens()), theirs(random_tokens()).logits, atol=1e-5, rtol=1e-5)
    embedding = model.model.wte if name == "gpt2" else model.model.embed_tokens
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_meta_model_takes_the_selected_blocks(tmp_path: Path) -> None:
    theirs = pretrained("gpt2", tmp_path / "hub", depth=9).state_dict()
    for select, blocks in ((None, [0, 2, 4, 6, 8]), ([1, 2, 5, 7, 8], [1, 2, 5, 7, 8])):
        state = meta_of(tmp_path / "hub", settings("gpt2"), select)
        for new, old in enumerate(blocks):
            assert torch.equal(state[f"model.h.{new}.ln_1.weight"], theirs[f"transformer.h.{old}.ln_1.weight"])
        assert "model.h.5.ln_1.weight" not in state


def test_meta_model_comes_from_an_artifact_or_an_export(tmp_path: Path) -> None:
    artifact("gpt2", tmp_path / "artifact", {})
    export(tmp_path / "artifact", tmp_path / "out")
    found = [meta_of(tmp_path / folder, settings("gpt2")) for folder in ("artifact", "out")]
    wanted = load_model(tmp_path / "artifact")[0].state_dict()
    for state in found:
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    with pytest.raises(ConfigError, match=r"artifact' is a gpt2 model, but model\.name = 'llama'"):
        meta_of(tmp_path / "artifact", settings("llama"))


@pytest.mark.parametrize(
    ("name", "changes", "model", "says"),
    [
        ("gpt2", {}, settings("llama"), "is a gpt2 model, but model.name = 'llama'"),
        ("llama", {"hidden_size": 64}, settings("llama"), "set model.args.hidden_size = 64"),
        ("llama", {"rope_theta": 5e5}, settings("llama"), "has rope_theta = 500000.0, the recipe 10000.0: set"),
        ("gpt2", {"n_head": 4}, settings("gpt2"), "has n_head = 4, the recipe 2: set model.args.n_head = 4"),
        ("gpt2", {"n_positions": 32}, settings("gpt2"), "has n_positions = 32, the recipe 1024"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, settings("gpt2"), "has scale_attn_by_inverse_layer_idx"),
        ("llama", {"vocab_size": 99}, settings("llama"), "has vocab_size = 99, the recipe 67"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"] * 3, "sliding_window": 4},
            settings("qwen3"),
            "it has blocks with attention in a sliding window",
        ),
        ("llama", {"num_hidden_layers": 4}, settings("llama"), "meta.init has 4 blocks, fewer than the meta model's 5"),
    ],
)
def test_pretrained_model_that_does_not_fit_is_refused_in_one_line(
    name: str, changes: dict[str, Any], model: ModelConfig, says: str, tmp_path: Path
) -> None:
    pretrained(name, tmp_path / "hub", **changes)
    with pytest.raises(ConfigError) as caught:
        meta_of(tmp_path / "hub", model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_or_damaged_pretrained_model_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained("llama", tmp_path / "hub", tie_word_embeddings=False)
    weights = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusals: list[tuple[type[BigincubateError], str, str | Path]] = [
        (ArtifactError, "has no tensor model.layers.2.mlp.up_proj.weight", tmp_path / "hub"),
        (ArtifactError, "no such directory", tmp_path / "nothing"),
        (DataError, "cannot be downloaded", "transformers:missing/model"),
    ]
    for kind, says, init in refusals:
        with pytest.raises(kind, match=says) as caught:
            meta_of(init, settings("llama"))
        assert "\n" not in str(caught.value)
    weights.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        meta_of(tmp_path / "hub", settings("llama"))

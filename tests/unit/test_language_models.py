"""Causal language models: outputs as in transformers, modules, and losses without all logits in memory."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from language_models import FAMILIES, LENGTH, build, random_tokens, settings
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import compile_fx
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigincubate.config import ModelConfig, Recipe, load_recipe
from bigincubate.errors import ConfigError
from bigincubate.models.activation_checkpointing import checkpoint_activations
from bigincubate.models.checks import check_model
from bigincubate.models.compilation import compile_blocks
from bigincubate.models.initialization import initialize_model
from bigincubate.models.language.causal_lm import IGNORED, CausalLM
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition, hybrid_depths
from bigincubate.models.surgery import extract, freeze_other_modules, initialize, insert
from bigincubate.planning.cost import count_cost
from bigincubate.planning.phases import make_plan
from bigincubate.planning.smoke import smoke

TARGET, META = ((3,), (4,), (3,), (2,)), ((1,), (1,), (1,), (1,))
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 12 + [4] * 7, [2] * LENGTH])


class AttentionCalls(TorchFunctionMode):
    """Record the mask of each call of torch's attention, and whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, bool]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            mask = kwargs["attn_mask"]
            self.calls.append((None if mask is None else mask.data_ptr(), kwargs["is_causal"]))
        return function(*args, **(kwargs or {}))


class LargestFloat(TorchDispatchMode):
    """Record the number of elements of the largest float32 tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        floats = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.dtype == torch.float32]
        self.elements = max([self.elements, *(each.numel() for each in floats)])
        return result


def build_hybrid(name: str, module: int, init: Any) -> tuple[CausalLM, CausalLM]:
    """Return a meta model, and its hybrid with one module of the target."""
    model = settings(name)
    meta, family = build(model, META)
    depths = hybrid_depths(TARGET, META, module)
    hybrid, _ = build(model, depths, seed=2)
    own, shallow = Partition(family, depths), Partition(family, META)
    insert(hybrid, own, extract(meta.state_dict(), shallow, *({0, 1, 2, 3} - {module})), shallow)
    initialize(hybrid, own, [module], meta.state_dict(), shallow, init)
    return meta, hybrid


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_names_are_those_of_transformers(name: str) -> None:
    model, family = build(settings(name, 4), ((4,),))
    config = family.configuration(settings(name, 4))
    theirs = getattr(transformers, family.exported_class)(config).eval()
    theirs.load_state_dict({family.exported_name(key): value for key, value in model.state_dict().items()})
    tokens = random_tokens()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(tokens), model(tokens))  # in training mode, but without dropout


@pytest.mark.parametrize("module", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_grown_hybrid_computes_the_logits_of_the_meta_model_to_the_bit(name: str, module: int) -> None:
    meta, hybrid = build_hybrid(name, module, "grow")
    tokens = random_tokens()
    assert torch.equal(hybrid(tokens), meta(tokens))
    _, fresh = build_hybrid(name, module, "boundary")
    assert not torch.allclose(fresh(tokens), meta(tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_first_and_last_module_own_the_embeddings_and_the_head(name: str) -> None:
    model, family = build(settings(name), TARGET)
    partition = Partition(family, TARGET)
    check_model(model, partition)
    outside = {key: partition.owner(key) for key in model.state_dict() if partition.block_of(key) is None}
    embeddings = {"model.wte.weight", "model.wpe.weight"} if name == "gpt2" else {"model.embed_tokens.weight"}
    assert {key for key, owner in outside.items() if owner == 0} == embeddings == model.no_weight_decay()
    tail = {"model.ln_f.weight", "model.ln_f.bias"} if name == "gpt2" else {"model.norm.weight"}
    assert {key for key, owner in outside.items() if owner == 3} == tail | {"lm_head.weight"}
    assert family.count_blocks(model.state_dict()) == family.default_depths(settings(name)) == (12,)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_windows_with_masked_documents_need_a_mask(name: str) -> None:
    model, _ = build(settings(name), META)
    with AttentionCalls() as plain:
        model(random_tokens())
    assert plain.calls == [(None, True)] * 4
    with AttentionCalls() as packed:
        model(random_tokens(), documents=DOCUMENTS)
    assert len(packed.calls) == 4
    assert len(set(packed.calls)) == 1
    assert packed.calls[0][0] is not None
    assert packed.calls[0][1] is False


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_document_has_the_same_logits_as_alone(name: str) -> None:
    model, _ = build(settings(name), META)
    tokens = random_tokens()
    packed = model(tokens, documents=DOCUMENTS)
    for row, start, end in [(0, 0, 5), (0, 5, 17), (0, 17, 24), (1, 0, 24)]:
        alone = model(tokens[row : row + 1, start:end])
        torch.testing.assert_close(packed[row : row + 1, start:end], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed[0, 5:], model(tokens)[0, 5:], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 16, 48, 1000])
def test_losses_in_chunks_are_the_cross_entropy(chunk: int) -> None:
    model, _ = build(settings("llama"), META)
    tokens = random_tokens()
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    logits = model(tokens)
    targets[0, 3] = logits[0, 3].argmax()
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    expected.sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    model.lm_head.chunk_tokens = chunk
    losses, hits = model(tokens, targets, with_hits=True)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-5)
    assert (losses.dtype, losses[:, -1].tolist()) == (torch.float32, [0, 0])
    assert torch.equal(hits, logits.argmax(-1) == targets)
    assert hits[0, 3]
    assert not hits[:, -1].any()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(tokens, targets), losses)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_of_all_tokens_are_never_in_memory_in_float32(precision: str) -> None:
    model, _ = build(settings("llama", vocab_size=4096), META)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)  # its gradient is smaller than the logits
    model.lm_head.chunk_tokens = 16
    tokens = random_tokens(8)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestFloat() as largest, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = model(tokens, tokens)
        losses.sum().backward()
    assert 0 < sum(saved) < tokens.numel() * 4096 / 10  # the backward pass recomputes the logits of a chunk
    assert largest.elements == max(16 * 4096, 32 * 4096)  # logits of a chunk; gradient of the weight
    with LargestFloat() as largest:
        model(tokens)
    assert largest.elements == 8 * LENGTH * 4096


def test_hybrid_with_a_frozen_head_trains_its_module() -> None:
    _, hybrid = build_hybrid("llama", 1, "boundary")
    family = find_family(settings("llama"))
    freeze_other_modules(hybrid, Partition(family, hybrid_depths(TARGET, META, 1)), 1)
    hybrid(random_tokens(), random_tokens()).sum().backward()
    assert {name.split(".")[2] for name in gradients(hybrid)} == {"1", "2", "3", "4"}


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("name", FAMILIES)
def test_activation_checkpointing_gives_the_same_gradients(name: str, how: str) -> None:
    found = []
    for one in ("none", how):
        model, family = build(settings(name), META)
        checkpoint_activations(model, [block.path for block in Partition(family, META).blocks()], one)
        model(random_tokens(), random_tokens(), DOCUMENTS).sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_twelve_compiled_blocks_share_at_most_four_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[GraphModule] = []

    def take(graph: GraphModule, inputs: list[Tensor], **_: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx", take)
    torch._dynamo.reset()
    depths = ((4,), (4,), (4,))
    plain, family = build(settings(name), depths)
    model, _ = build(settings(name), depths)
    partition = Partition(family, depths)
    for each in (plain, model):
        freeze_other_modules(each, partition, 1)
    compile_blocks(model, [block.path for block in partition.blocks()])
    for seed in range(2):
        tokens = random_tokens(seed=seed)
        for each in (plain, model):
            each(tokens, tokens).sum().backward()
    found, expected = gradients(model), gradients(plain)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)
    assert 1 <= len(graphs) <= 4
    graphs.clear()
    with torch.no_grad():
        for length in (LENGTH, 9, 5):  # the last windows of a validation split are shorter
            torch.testing.assert_close(model(random_tokens(3, length)), plain(random_tokens(3, length)))
    assert len(graphs) <= 4


def test_gpt2_has_the_initialization_of_the_target_at_every_depth() -> None:
    family = find_family(settings("gpt2"))
    models = []
    for depth in (6, 24):
        torch.manual_seed(0)
        models.append(family.build(settings("gpt2", depth), ((6,),)).state_dict())
    for name, value in models[0].items():
        factor = 0.5 if name.endswith("c_proj.weight") else 1.0
        torch.testing.assert_close(models[1][name], factor * value)
    deviation = models[1]["model.h.3.mlp.c_proj.weight"].std().item()
    assert deviation == pytest.approx(0.02 / math.sqrt(2 * 24), rel=0.1)
    model = family.build(settings("gpt2", 6), ((6,),))
    with pytest.raises(
        ConfigError, match=r'end_to_end\.init = "scaled": new gpt2 models are scaled in this way already'
    ):
        initialize_model(model, Partition(family, ((6,),)), "scaled")


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("llama", {"tie_word_embeddings": True}, "model.args.tie_word_embeddings = true is not supported: embedding"),
        ("gpt2", {"tie_word_embeddings": True}, "model.args.tie_word_embeddings = true is not supported"),
        ("llama", {"attention_dropout": 0.1}, "model.args.attention_dropout = 0.1 is not supported: blocks draw no"),
        ("gpt2", {"resid_pdrop": 0.1}, "model.args.resid_pdrop = 0.1 is not supported"),
        ("gpt2", {"embd_pdrop": 0.1}, "model.args.embd_pdrop = 0.1 is not supported"),
        ("gpt2", {"attn_pdrop": 0.1}, "model.args.attn_pdrop = 0.1 is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "would depend on the index of its block"),
        ("gpt2", {"scale_attn_weights": False}, "model.args.scale_attn_weights = false is not supported"),
        ("olmo2", {"pad_token_id": 1}, "model.args.pad_token_id = 1 is not supported: windows are not padded"),
        ("gpt2", {"summary_type": "mean"}, 'model.args.summary_type = "mean" is not supported: a language model has'),
        ("llama", {"hidden_sise": 8}, "model.args.hidden_sise: LlamaConfig has no such key; did you mean hidden_size?"),
        ("gpt2", {"hidden_size": 8}, "model.args.hidden_size: GPT2Config has no such key; did you mean n_embd?"),
        ("gpt2", {"xyz": 8}, "model.args.xyz: GPT2Config has no such key; its keys are activation_function,"),
        ("gpt2", {"n_positions": 16}, "model.context_length = 24 is larger than n_positions = 16: lower it, or set"),
        ("llama", {"max_position_embeddings": 16}, "larger than max_position_embeddings = 16"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling: type 'dynamic' is not"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: type 'dynamic' is not"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "model 'llama' cannot be built with these arguments"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 4}, "model.args.use_sliding_window: blocks with"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 6}, "model.args.layer_types: blocks with"),
        ("qwen3", {"layer_types": ["full_attention"] * 5}, "model 'qwen3' cannot be built with these arguments"),
        ("gpt2", {"n_layer": "12"}, 'model.args.n_layer = "12": expected a positive integer'),
        ("llama", {"num_hidden_layers": 0}, "model.args.num_hidden_layers = 0: expected a positive integer"),
        ("llama", {"vocab_size": True}, "model.args.vocab_size = true: expected a positive integer"),
        ("llama", {"intermediate_size": -1}, "model.args.intermediate_size = -1: expected a positive integer"),
        ("llama", {"intermediate_size": 1.5}, "model.args.intermediate_size = 1.5: expected a positive integer"),
        ("llama", {"head_dim": 0}, "model.args.head_dim = 0: expected a positive integer"),
        ("gpt2", {"n_inner": "64"}, 'model.args.n_inner = "64": expected a positive integer'),
        ("llama", {"attention_bias": "no"}, 'model.args.attention_bias = "no": expected true or false'),
        ("llama", {"mlp_bias": 3}, "model.args.mlp_bias = 3: expected true or false"),
        ("llama", {"rope_theta": 0}, "model.args.rope_theta = 0: expected a positive number"),
        ("llama", {"rms_norm_eps": -1.0}, "model.args.rms_norm_eps = -1.0: expected a positive number"),
        ("gpt2", {"initializer_range": "x"}, 'model.args.initializer_range = "x": expected a positive number'),
        ("llama", {"hidden_act": 3}, "model.args.hidden_act = 3: expected text"),
        ("llama", {"bos_token_id": "a"}, 'model.args.bos_token_id = "a": expected an integer of 0 or more'),
        ("gpt2", {"n_embd": 33}, "model 'gpt2' cannot be built with these arguments"),
        ("llama", {"hidden_act": "relu7"}, 'model.args.hidden_act = "relu7": transformers has no such activation'),
    ],
)
def test_unsupported_argument_is_refused_in_one_line(name: str, args: dict[str, Any], says: str) -> None:
    model = settings(name, **args)
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        find_family(model).build(model, META, device="meta")
    assert "\n" not in str(caught.value)


def test_missing_vocabulary_long_window_and_unknown_family_are_refused() -> None:
    model = ModelConfig(library="transformers", name="llama")
    with pytest.raises(ConfigError, match=r"model\.args\.vocab_size is missing"):
        find_family(model).default_depths(model)
    model = ModelConfig(library="transformers", name="gpt2", context_length=2048, args={"vocab_size": 257})
    with pytest.raises(ConfigError, match=r"model\.context_length = 2048 is larger than n_positions = 1024"):
        find_family(model).check_input_size(model)
    with pytest.raises(ConfigError, match=r"model\.name = 'lama' is not supported.*OLMo 2.*did you mean llama\?"):
        find_family(ModelConfig(library="transformers", name="lama"))


def test_layers_of_one_kind_are_cut_to_any_depth() -> None:
    full: dict[str, Any] = {"layer_types": ["full_attention"] * 12, "use_sliding_window": True, "max_window_layers": 12}
    model, _ = build(settings("qwen3", **full), META)
    same, _ = build(settings("qwen3"), META)
    assert torch.equal(model(random_tokens()), same(random_tokens()))


def load_small_recipe(tmp_path: Any, name: str) -> Recipe:
    family = find_family(settings(name))
    args = ", ".join(f"{key} = {value}" for key, value in settings(name, 5).args.items())
    file = tmp_path / "small.toml"
    file.write_text(
        '[task]\nname = "causal_lm"\n'
        f'[model]\nlibrary = "transformers"\nname = "{name}"\ncontext_length = 16\nargs = {{ {args} }}\n'
        "[plan]\ntarget_depths = [2, 3]\nmeta_depths = [1, 1]\n"
    )
    assert family.name == name
    return load_recipe(str(file))


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_counted_without_storage(name: str, tmp_path: Any) -> None:
    recipe = load_small_recipe(tmp_path, name)
    plan = make_plan(recipe)
    cost = count_cost(plan.row("finetune"), recipe.settings("finetune"), plan)
    model, _ = build(settings(name, 5, length=16), ((5,),))
    matrices = [p.numel() for key, p in model.named_parameters() if p.ndim == 2 and key not in model.no_weight_decay()]
    attention = (
        5 * 4 * 16 * 16 * (64 if name in ("llama", "qwen3") else 32)
    )  # counted in full, not only the causal half
    assert cost.forward_flops == 2 * 16 * sum(matrices) + attention
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.activation_bytes > 0
    hybrid = count_cost(plan.row("incubate", 1), recipe.settings("incubate"), plan)
    assert hybrid.trainable < hybrid.parameters


def test_smoke_model_is_narrow_and_keeps_the_depth(tmp_path: Any) -> None:
    recipe = load_small_recipe(tmp_path, "llama")
    table = smoke(recipe)["model"]
    assert (table["context_length"], table["args"]["vocab_size"]) == (32, 257)
    family = find_family(recipe.model)
    assert family.smoke_overrides(recipe.model, larger_inputs=True)["context_length"] == 64
    assert family.example_inputs(recipe.model, 3, "cpu").shape == (3, 16)
    assert "num_hidden_layers" not in table["args"]

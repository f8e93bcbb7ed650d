"""The families of causal language models that are supported."""

from __future__ import annotations

import difflib

from ...errors import ConfigError
from .build import TransformersFamily

LLAMA = TransformersFamily(
    name="llama",
    covers="Llama",
    classes="Llama",
    block="model.layers.{block}",
    stem=("model.embed_tokens",),
    tail=("model.norm", "lm_head"),
    embedding="embed_tokens",
    norm="norm",
    depth_key="num_hidden_layers",
    length_key="max_position_embeddings",
    dropouts=("attention_dropout",),
    zeroed_outputs=("self_attn.o_proj", "mlp.down_proj"),
    smoke_args={
        **{"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    },
)
FAMILIES: tuple[TransformersFamily, ...] = (
    LLAMA,
    LLAMA.variant(name="qwen3", covers="Qwen3", classes="Qwen3"),
    LLAMA.variant(
        name="olmo2",
        covers="OLMo 2",
        classes="Olmo2",
        zeroed_outputs=("post_attention_layernorm", "post_feedforward_layernorm"),
        smoke_args={key: value for key, value in LLAMA.smoke_args.items() if key != "head_dim"},
    ),
    TransformersFamily(
        name="gpt2",
        covers="GPT-2",
        classes="GPT2",
        causal_class="GPT2LMHeadModel",
        exported_prefix="transformer.",
        block="model.h.{block}",
        stem=("model.wte", "model.wpe"),
        tail=("model.ln_f", "lm_head"),
        embedding="wte",
        positions="wpe",
        norm="ln_f",
        depth_key="n_layer",
        length_key="n_positions",
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        zeroed_outputs=("attn.c_proj", "mlp.c_proj"),
        scales_residual_outputs=True,
        smoke_args={"vocab_size": 257, "n_embd": 32, "n_head": 2, "n_inner": 64},
    ),
)


def find_transformers_family(name: str) -> TransformersFamily:
    """Return the family of ``model.name``, without importing transformers.

    Raises:
        ConfigError: The family is not supported; the message lists the supported ones.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    names = [family.name for family in FAMILIES]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    supported = "; ".join(f"{family.name} ({family.covers})" for family in FAMILIES)
    raise ConfigError(
        f'model.name = {name!r} is not supported for model.library = "transformers"; supported are {supported}{hint}'
    )

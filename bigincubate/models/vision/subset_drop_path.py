"""Skip computation whose result is unused, in ViT and Swin blocks.

`use_subset_drop_path`: residual branches are computed only for the samples that stochastic depth keeps.
`compute_last_block_for_cls_token_only`: in a model that classifies by its class token, the last block computes only
this token. Its first norm still covers all tokens, but its matrix products cost a hundredth.

Both give the result of the normal forward pass up to rounding, and do not change parameter names.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import Attention, LayerScale
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.branch import add_branch
from ..drop_path import DropPath, find_drop_paths
from ..partition import Partition


def use_subset_drop_path(model: nn.Module, partition: Partition) -> None:
    """Compute residual branches only for the samples that stochastic depth keeps.

    Call this before `compute_last_block_for_cls_token_only`, which also replaces the forward method of the last block.

    Args:
        model: A timm model built by its family.
        partition: The model's partition.

    Raises:
        ConfigError: Blocks of this class are not supported.
    """
    for reference in partition.blocks():
        block = model.get_submodule(reference.path)
        forward = FORWARDS.get(type(block))
        if forward is None:
            raise ConfigError(
                f"train.subset_drop_path: supported only for ViT, DeiT, DeiT III and Swin, not for blocks of type "
                f"{type(block).__name__}; set it to false"
            )
        block.forward = types.MethodType(forward, block)
    for drop_path in find_drop_paths(model):
        drop_path.computes_subset = True


def compute_last_block_for_cls_token_only(model: nn.Module, partition: Partition) -> None:
    """Compute only the class token in the last block, if the head reads nothing else.

    Args:
        model: A timm model built by its family.
        partition: The model's partition.

    Raises:
        ConfigError: The head reads other tokens, or blocks of this class are not supported.
    """
    *_, reference = partition.blocks()
    last: Any = model.get_submodule(reference.path)
    plain = type(last) is Block and type(last.attn) is Attention and last.attn.gate is None
    if not (plain and reads_only_cls_token(model)):
        raise ConfigError(
            f"train.last_block_cls_only: supported only for ViT, DeiT and DeiT III that classify by their class token, "
            f"not for this {type(model).__name__}; set it to false"
        )
    last.forward = types.MethodType(cls_token_block, last)
    last.skip_compile = True  # for `compile_blocks`: too small to be worth compiling


def reads_only_cls_token(model: nn.Module) -> bool:
    """Return whether the model's output depends only on the first token of the last block."""
    return (
        type(model) is VisionTransformer
        and model.global_pool == "token"
        and model.attn_pool is None
        and model.cls_token is not None
    )


def add_residual(
    x: Tensor, onto: Tensor, drop_path: nn.Module, scale: nn.Module, branch: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return ``onto + drop_path(scale(branch(x)))``; the branch is computed only for the samples that are kept."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.kept_samples is None:
        return onto + drop_path(scale(branch(x)))
    assert drop_path.scale is not None
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    return add_branch(
        onto, branch(x.index_select(0, drop_path.kept_samples)), drop_path.kept_samples, drop_path.scale, gamma
    )


def vit_block(self: Any, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
    """Compute `timm.models.vision_transformer.Block`, ``[batch, tokens, channels]``."""
    x = add_residual(x, x, self.drop_path1, self.ls1, lambda rows: self.attn(self.norm1(rows)))
    return add_residual(x, x, self.drop_path2, self.ls2, lambda rows: self.mlp(self.norm2(rows)))


def cls_token_block(self: Any, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
    """Compute the first token of `vit_block`: ``[batch, tokens, channels]`` to ``[batch, 1, channels]``."""
    first = add_residual(
        x, x[:, :1], self.drop_path1, self.ls1, lambda rows: first_token_attention(self.attn, self.norm1(rows))
    )
    return add_residual(first, first, self.drop_path2, self.ls2, lambda rows: self.mlp(self.norm2(rows)))


def first_token_attention(attn: Attention, x: Tensor) -> Tensor:
    """Compute `timm.layers.Attention` for the first token: ``[batch, tokens, channels]`` to ``[batch, 1, channels]``.

    With one query per head, the keys and values of all tokens are not needed: ``q (W_k x) = (q W_k) x`` and
    ``a (W_v x) = W_v (a x)``, where ``a`` are the attention weights. The bias of the keys adds the same number to all
    scores, which does not change their softmax.
    """
    batch, heads = len(x), (attn.num_heads, attn.head_dim)
    of_query, of_key, of_value = attn.qkv.weight.unflatten(0, (3, *heads))  # each [heads, head_dim, channels]
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, (3, *heads)).unbind()
    q = F.linear(x[:, 0], of_query.flatten(0, 1), None if biases[0] is None else biases[0].flatten())
    q = attn.q_norm(q.unflatten(-1, heads).transpose(0, 1)) * attn.scale  # [heads, batch, head_dim]
    if isinstance(attn.k_norm, nn.Identity):
        scores = (q @ of_key).transpose(0, 1) @ x.transpose(1, 2)
    else:  # each key is normalized, so the keys are needed
        k = F.linear(x, of_key.flatten(0, 1), None if biases[1] is None else biases[1].flatten())
        scores = (attn.k_norm(k.unflatten(-1, heads)).permute(2, 0, 1, 3) @ q.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
    weights = attn.attn_drop(scores.softmax(-1))  # [batch, heads, tokens]
    out = ((weights @ x).transpose(0, 1) @ of_value.transpose(1, 2)).transpose(0, 1)  # [batch, heads, head_dim]
    if biases[2] is not None:
        out = out + weights.sum(-1, keepdim=True) * biases[2]
    return attn.proj_drop(attn.proj(attn.norm(out.reshape(batch, 1, attn.attn_dim))))


def swin_block(self: Any, x: Tensor) -> Tensor:
    """Compute `timm.models.swin_transformer.SwinTransformerBlock`, ``[batch, height, width, channels]``."""
    shape, no_scale = x.shape, nn.Identity()
    x = add_residual(x, x, self.drop_path1, no_scale, lambda rows: self._attn(self.norm1(rows))).flatten(1, 2)
    return add_residual(x, x, self.drop_path2, no_scale, lambda rows: self.mlp(self.norm2(rows))).view(shape)


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {Block: vit_block, SwinTransformerBlock: swin_block}

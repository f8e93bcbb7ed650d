"""What nobody reads is not computed: branches of samples that stochastic depth drops, and in the last block of a model
that classifies by its class token, all tokens but that one.

Both give what the plain forward gives, to rounding. What is left of the last block is its first norm, of all tokens,
and products for the class token alone: a hundredth.
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
from ...kernels import add_branch
from ..drop_path import DropPath, find_drop_paths
from ..partition import Partition


def skip_unused(model: nn.Module, partition: Partition, *, subset_drop_path: bool, last_block_cls_only: bool) -> None:
    """Make the blocks of a model skip computation whose result is unused. Names of parameters do not change.

    Args:
        model: A model made by `build`; it is changed in place.
        partition: The partition of the model.
        subset_drop_path: Compute the branches that drop-path may drop only for the samples that are kept.
        last_block_cls_only: Compute only the class token in the last block.

    Raises:
        ConfigError: If the model does not support what is asked for.
    """
    paths = [block.path for block in partition.blocks()]
    if subset_drop_path:
        for path in paths:
            block = model.get_submodule(path)
            forward = FORWARDS.get(type(block))
            if forward is None:
                raise ConfigError(
                    f"train.subset_drop_path: not supported for blocks of type {type(block).__name__}, only for ViT, "
                    "DeiT, DeiT III and Swin; set it to false"
                )
            block.forward = types.MethodType(forward, block)
        for drop_path in find_drop_paths(model):
            drop_path.computes_subset = True
    if last_block_cls_only:
        last: Any = model.get_submodule(paths[-1])
        plain = type(last) is Block and type(last.attn) is Attention and last.attn.gate is None
        if not (plain and reads_class_token(model)):
            raise ConfigError(
                f"train.last_block_cls_only: not supported for this {type(model).__name__}, only for ViT, DeiT and "
                "DeiT III that classify by their class token; set it to false"
            )
        last.forward = types.MethodType(class_token_block, last)
        last.serves_class_token = True  # for `compile_blocks`


def reads_class_token(model: nn.Module) -> bool:
    """Return whether everything after the last block is a function of its first token."""
    return (
        type(model) is VisionTransformer
        and model.global_pool == "token"
        and model.attn_pool is None
        and model.cls_token is not None
    )


def residual(
    x: Tensor, onto: Tensor, drop_path: nn.Module, scale: nn.Module, branch: Callable[[Tensor], Tensor]
) -> Tensor:
    """``onto + drop_path(scale(branch(x)))``, where the branch is computed for the samples that are kept alone."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.kept_samples is None:
        return onto + drop_path(scale(branch(x)))
    assert drop_path.scale is not None
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    return add_branch(
        onto, branch(x.index_select(0, drop_path.kept_samples)), drop_path.kept_samples, drop_path.scale, gamma
    )


# ------------------------------------------------------------------------------------------------ timm's blocks


def vit_block(self: Any, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
    """`timm.models.vision_transformer.Block`."""
    x = residual(x, x, self.drop_path1, self.ls1, lambda rows: self.attn(self.norm1(rows)))
    return residual(x, x, self.drop_path2, self.ls2, lambda rows: self.mlp(self.norm2(rows)))


def class_token_block(self: Any, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
    """The same of which only the first token is read: ``[batch, tokens, channels]`` to ``[batch, 1, channels]``."""
    first = residual(x, x[:, :1], self.drop_path1, self.ls1, lambda rows: first_query(self.attn, self.norm1(rows)))
    return residual(first, first, self.drop_path2, self.ls2, lambda rows: self.mlp(self.norm2(rows)))


def first_query(attn: Attention, x: Tensor) -> Tensor:
    """`timm.layers.Attention` for the query of the first token: ``[batch, tokens, channels]`` to ``[batch, 1, …]``.

    With one query a head, keys and values of all tokens need not be made: ``q (W_k x) = (q W_k) x`` and
    ``a (W_v x) = W_v (a x)``, where ``a`` weighs the tokens. What the keys' bias adds is the same for all tokens,
    and a softmax does not see that.
    """
    batch, heads = len(x), (attn.num_heads, attn.head_dim)
    of_query, of_key, of_value = attn.qkv.weight.unflatten(0, (3, *heads))  # each [heads, head_dim, channels]
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, (3, *heads)).unbind()
    q = F.linear(x[:, 0], of_query.flatten(0, 1), None if biases[0] is None else biases[0].flatten())
    q = attn.q_norm(q.unflatten(-1, heads).transpose(0, 1)) * attn.scale  # [heads, batch, head_dim]
    if isinstance(attn.k_norm, nn.Identity):
        scores = (q @ of_key).transpose(0, 1) @ x.transpose(1, 2)
    else:  # a norm of each key: they are needed
        k = F.linear(x, of_key.flatten(0, 1), None if biases[1] is None else biases[1].flatten())
        scores = (attn.k_norm(k.unflatten(-1, heads)).permute(2, 0, 1, 3) @ q.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
    weights = attn.attn_drop(scores.softmax(-1))  # [batch, heads, tokens]
    out = ((weights @ x).transpose(0, 1) @ of_value.transpose(1, 2)).transpose(0, 1)  # [batch, heads, head_dim]
    if biases[2] is not None:
        out = out + weights.sum(-1, keepdim=True) * biases[2]
    return attn.proj_drop(attn.proj(attn.norm(out.reshape(batch, 1, attn.attn_dim))))


def swin_block(self: Any, x: Tensor) -> Tensor:
    """`timm.models.swin_transformer.SwinTransformerBlock`, ``[batch, height, width, channels]``."""
    shape, whole = x.shape, nn.Identity()
    x = residual(x, x, self.drop_path1, whole, lambda rows: self._attn(self.norm1(rows))).flatten(1, 2)
    return residual(x, x, self.drop_path2, whole, lambda rows: self.mlp(self.norm2(rows))).view(shape)


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {Block: vit_block, SwinTransformerBlock: swin_block}

"""The network in the released order of operations: oracle of the tests, and the other side of the benchmark.

It computes with the modules, and so with the weights, of a `GroupMixFormer`: q, k and v are stacked on the batch axis
by a copy, segments are slices of it, and heads lie before tokens. `models/groupmixformer.py` and `models/cpu/fused.py`
order memory differently; what they compute must be this.
"""

import torch
from torch import Tensor, nn

from .groupmixformer import ConvPosEnc, ConvRelPosEnc, GMABlock, GroupAggregator, GroupMixAttention, GroupMixFormer


class ReferenceNetwork(nn.Module):
    """(B, in_chans, H, W) -> logits (B, num_classes), by the weights of `network`, which it shares."""

    def __init__(self, network: GroupMixFormer) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        stem = network.conv_stem
        x = stem.act1(stem.norm1(stem.proj1(x)))
        x = stem.act2(stem.norm2(stem.proj2(x)))
        for embed, stage in zip(network.patch_embed_layers, network.groupmixformer_backbone):
            x = embed(x)
            B, C, H, W = x.shape
            x = x.flatten(2).transpose(1, 2)
            for block in stage.gma_stage:
                x = block_forward(block, x, (H, W))
            x = x.reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous()
        return network.forward_head(network.norm4(x))


def block_forward(block: GMABlock, x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, N, C)."""
    x = position_encoding(block.cpe, x, size)
    x = x + block.drop_path(attention_forward(block.att, block.norm1(x), size))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def position_encoding(cpe: ConvPosEnc, x: Tensor, size: tuple[int, int]) -> Tensor:
    B, _, C = x.shape
    maps = x.transpose(1, 2).view(B, C, *size)
    return (cpe.proj(maps) + maps).flatten(2).transpose(1, 2)


def attention_forward(attention: GroupMixAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, N, C)."""
    B, N, C = x.shape
    qkv = attention.qkv(x).reshape(B, N, 3, C).permute(2, 0, 1, 3).reshape(3 * B, N, C)
    proxies, local = aggregate(attention.aggregator, attention.num_heads, qkv, size)
    q, k, v = proxies.unbind(0)
    k = attention.attn_drop(k.softmax(dim=2))
    context = torch.einsum("bhnk,bhnv->bhkv", k, v)
    attended = torch.einsum("bhnk,bhkv->bhnv", q, context)
    attended = attention.scale * attended
    if attention.crpe is not None:
        attended = attended + relative_position(attention.crpe, q, v, size)
    attended = attended.transpose(1, 2).reshape(B, N, -1)
    return attention.proj_drop(attention.proj(torch.cat([attended, *local], dim=-1)))


def aggregate(
    aggregator: GroupAggregator, heads: int, qkv: Tensor, size: tuple[int, int]
) -> tuple[Tensor, list[Tensor]]:
    """(3B, N, C), first all q, then all k, then all v -> proxies (3, B, h, N, d), local branch [(B, N, s)] or []."""
    B, N, C = qkv.shape[0] // 3, qkv.shape[1], qkv.shape[2]
    s = aggregator.segment_dim
    segments = qkv.transpose(1, 2).view(3 * B, C, *size).split(s, dim=1)
    tokens, *groups = segments[: aggregator.num_attending]
    mixed = [aggregator.act0(aggregator.norm0(tokens))]
    for i, group in enumerate(groups, 1):
        aggregate, norm, act = (getattr(aggregator, f"{layer}{i}") for layer in ("agg", "norm", "act"))
        mixed.append(act(norm(aggregate(group))))
    proxies = torch.cat(mixed, dim=1).reshape(3, B, heads, -1, N).permute(0, 1, 2, 4, 3)
    if aggregator.agg0 is None:
        return proxies, []
    local = segments[-1].reshape(3, B, s, *size).permute(1, 0, 2, 3, 4).reshape(B, 3 * s, *size)
    return proxies, [aggregator.agg0(local)]


def relative_position(crpe: ConvRelPosEnc, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
    """q, v: (B, h, N, d) -> (B, h, N, d)."""
    B, h, N, d = v.shape
    windows = v.transpose(-1, -2).reshape(B, h * d, *size).split(crpe.channel_splits, dim=1)
    position = torch.cat([conv(maps) for conv, maps in zip(crpe.conv_list, windows)], dim=1)
    return q * position.reshape(B, h, d, N).transpose(-1, -2)

"""GroupMixFormer: "Advancing Vision Transformers with Group-Mix Attention" (https://arxiv.org/abs/2311.15157).

This file needs torch and timm only, so that it can be copied into another project as it is.

Shapes are written with these letters:

    B  images in the batch             H, W  height and width of a stage's map
    C  channels of a stage             N     tokens of a stage, N = H * W
    S  segments of the channels        s     channels of a segment, C / S
    A  channels that attend, C - s     d     channels of a head, A / h
    h  attention heads

The S segments are the single tokens, one for each group size, and the local branch: S = 5 for the published (3, 5, 7).
Without the local branch, all channels attend: A = C.

Module names are an interface: released weights carry them. `norm4` is the batch norm after the last stage, `att` the
Group-Mix Attention, `agg1..3` its 3x3, 5x5 and 7x7 group aggregators, `agg0` its local branch, `cpe` and `crpe` the
convolutional position encodings of tokens and of attention.
"""

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn
from torch.serialization import add_safe_globals
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

__all__ = ["VARIANTS", "GroupMixFormer"]

GROUP_SIZES = (3, 5, 7)  # edges of the token groups that the segments are mixed with, as published (section 3.2)
POSITION_WINDOWS = (3, 5, 7)  # edges of the relative position's windows ...
POSITION_EIGHTHS = (2, 3, 3)  # ... and the eighths of the attending channels that have each: of 8 heads, whole ones
STEM_STRIDE = 4
EXPENSIVE = ("::mm", "::addmm", "::bmm", "convolution", "conv2d")  # operators that selective checkpointing runs once

# Files are opened with weights_only=True, by timm too. It refuses released training checkpoints for the yacs CfgNode in
# them. Read as the mapping that it is, a CfgNode runs no code.
add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])

# Table 1 of the paper, with the released drop path rates. Large: its released file says 0.1 and that it needs
# adjusting; the one public re-implementation uses 0.5, as base does.
VARIANTS: dict[str, dict[str, Any]] = {
    "groupmixformer_miny": dict(
        embed_dims=(40, 80, 160, 160), depths=(3, 3, 12, 4), mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.1
    ),
    "groupmixformer_tiny": dict(
        embed_dims=(80, 160, 200, 240), depths=(4, 4, 12, 4), mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.1
    ),
    "groupmixformer_small": dict(
        embed_dims=(80, 160, 320, 320), depths=(2, 4, 12, 4), mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.2
    ),
    "groupmixformer_base": dict(
        embed_dims=(200, 240, 320, 480), depths=(8, 8, 12, 8), mlp_ratios=(2, 2, 4, 4), drop_path_rate=0.5
    ),
    "groupmixformer_large": dict(
        embed_dims=(240, 320, 360, 480), depths=(8, 10, 30, 10), mlp_ratios=(4, 4, 2, 2), drop_path_rate=0.5
    ),
}


class SeparableConv2d(nn.Module):
    """Depthwise k x k convolution, then pointwise convolution, both without bias: (B, in, H, W) -> (B, out, H', W')."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_chans, in_chans, kernel_size, stride, padding=kernel_size // 2, groups=in_chans, bias=False
        )
        self.pointwise_conv = nn.Conv2d(in_chans, out_chans, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.conv1(x))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with batch norm and Hardswish: (B, in, H, W) -> (B, C1, H/4, W/4)."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(embed_dim // 2)
        self.act1 = nn.Hardswish()
        self.proj2 = nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(embed_dim)
        self.act2 = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        # Channels last from here on: maps and tokens are then two views of the same memory, everywhere. By permuting,
        # because `contiguous(memory_format=...)` is not there under torch.func.vmap.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.act1(self.norm1(self.proj1(x)))
        return self.act2(self.norm2(self.proj2(x)))


class PatchEmbed(nn.Module):
    """Separable 3x3 convolution, batch norm, Hardswish: (B, C_in, H, W) -> (B, C, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, in_chans: int, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.proj = SeparableConv2d(in_chans, embed_dim, 3, stride)
        self.norm = nn.BatchNorm2d(embed_dim)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.proj(x)))


class ConvPosEnc(nn.Module):
    """Convolutional position encoding, x + DW3x3(x): (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, _, C = x.shape
        x = x.transpose(1, 2).view(B, C, size[0], size[1])  # (B, N, C) -> (B, C, H, W), no copy: channels last
        x = self.proj(x) + x
        return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)


class ConvRelPosEnc(nn.Module):
    """Convolutional relative position, DWConv(v) with one of three windows on every head; q is multiplied by it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channel_splits = [eighths * dim // 8 for eighths in POSITION_EIGHTHS]
        self.conv_list = nn.ModuleList(
            nn.Conv2d(chans, chans, window, padding=window // 2, groups=chans)
            for chans, window in zip(self.channel_splits, POSITION_WINDOWS)
        )

    def forward(self, v: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, h, d) -> (B, N, h, d)."""
        B, N, h, d = v.shape
        v_map = v.flatten(2).transpose(1, 2).view(B, h * d, size[0], size[1])  # -> (B, A, H, W), no copy
        v_maps = torch.split(v_map, self.channel_splits, dim=1)
        outs = []
        for i, conv in enumerate(self.conv_list):
            outs.append(conv(v_maps[i]))
        return torch.cat(outs, dim=1).flatten(2).transpose(1, 2).reshape(B, N, h, d)  # (B, A, H, W) -> as v


class LocalBranch(nn.Module):
    """The last segment, which takes no part in attention: (B, 3s, H, W) of q, k and v -> (B, N, s)."""

    def __init__(self, segment_dim: int) -> None:
        super().__init__()
        self.conv = SeparableConv2d(3 * segment_dim, segment_dim, 3)
        self.norm = nn.LayerNorm(segment_dim)  # epsilon 1e-5 here, 1e-6 in the blocks: as released
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x).flatten(2).transpose(1, 2)))


class GroupAggregator(nn.Module):
    """Replaces the tokens of q, k and v by group proxies: single tokens, 3x3, 5x5 and 7x7 groups (section 3.2)."""

    def __init__(self, dim: int, group_sizes: Sequence[int], local_branch: bool) -> None:
        super().__init__()
        self.num_attending = len(group_sizes) + 1  # segments that take part in attention
        self.num_segments = self.num_attending + local_branch
        self.segment_dim = dim // self.num_segments
        # Single tokens go through norm and activation only; the paper's group size 1 needs no convolution.
        self.norm0 = nn.BatchNorm2d(self.segment_dim)
        self.act0 = nn.Hardswish()
        for number, size in enumerate(group_sizes, 1):
            self.add_module(f"agg{number}", SeparableConv2d(self.segment_dim, self.segment_dim, size))
            self.add_module(f"norm{number}", nn.BatchNorm2d(self.segment_dim))
            self.add_module(f"act{number}", nn.Hardswish())
        self.agg0 = LocalBranch(self.segment_dim) if local_branch else None

    def forward(self, qkv: Tensor, size: tuple[int, int]) -> tuple[list[Tensor], Tensor | None]:
        """(B, N, 3, S, s), the segments of q, k and v -> their proxies, 3 x (B, N, A), local branch (B, N, s)."""
        B, N, _, _, s = qkv.shape
        segments = qkv.unbind(3)  # whose backward pass writes each gradient once
        maps = [self.as_maps(segments[i], size) for i in range(self.num_attending)]
        # The layers of each segment, in order. TorchScript can walk over modules, but not look one up by a made name.
        for name, layer in self.named_children():
            if name != "agg0":
                number = int(name[-1])
                maps[number] = layer(maps[number])
        # q, k and v in memory of their own: after its softmax, k is not needed any more.
        thirds = [segment.view(3, B, s, size[0], size[1]).unbind(0) for segment in maps]
        proxies = [torch.cat([third[i] for third in thirds], dim=1).flatten(2).transpose(1, 2) for i in range(3)]

        if self.agg0 is None:
            return proxies, None
        # (B, N, 3, s) -> (B, 3s, H, W): the segments of q, k and v of one image side by side
        local = segments[-1].reshape(B, N, 3 * s).transpose(1, 2).view(B, 3 * s, size[0], size[1])
        return proxies, self.agg0(local)

    def as_maps(self, segment: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, 3, s) -> (3B, s, H, W): q, k and v as one batch of maps, in channels-last order by a copy (B > 1)."""
        B, N, _, s = segment.shape
        return segment.permute(2, 0, 1, 3).reshape(3 * B, N, s).transpose(1, 2).view(3 * B, s, size[0], size[1])


class GroupMixAttention(nn.Module):
    """Group-Mix Attention (equations 3 to 5): (B, N, C) -> (B, N, C), in time and memory linear in N."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        group_sizes: Sequence[int] = GROUP_SIZES,
        local_branch: bool = True,
        relative_position: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        # The released scale counts all C channels, although attention runs on A of them, and rounds C / h down.
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.aggregator = GroupAggregator(dim, group_sizes, local_branch)
        attending_dim = self.aggregator.num_attending * self.aggregator.segment_dim
        self.crpe = ConvRelPosEnc(attending_dim) if relative_position else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        s, h = self.aggregator.segment_dim, self.num_heads
        # q, k and v share the aggregators, whose batch norms see all three as one batch.
        qkv = self.qkv(x).view(B, N, 3, C // s, s)
        proxies, local = self.aggregator(qkv, size)
        q, k, v = proxies[0], proxies[1], proxies[2]  # each (B, N, A)

        # Factorised attention: softmax of k alone, over the tokens; q is not normalised.
        k = self.attn_drop(k.softmax(dim=1))
        d = q.shape[2] // h
        q, k, v = q.view(B, N, h, d), k.view(B, N, h, d), v.view(B, N, h, d)
        context = self.scale * torch.einsum("bnhk,bnhv->bhkv", k, v)  # (B, h, d, d)
        attended = torch.einsum("bnhk,bhkv->bnhv", q, context)
        if self.crpe is not None:
            attended = attended + q * self.crpe(v, size)
        attended = attended.flatten(2)  # (B, N, h, d) -> (B, N, A)
        if local is not None:
            attended = torch.cat([attended, local], dim=-1)
        return self.proj_drop(self.proj(attended))


class GMABlock(nn.Module):
    """Position encoding, then attention and MLP, each after a layer norm and on a residual path: (B, N, C) -> same."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module],
        attn_layer: Callable[[int], GroupMixAttention],
    ) -> None:
        super().__init__()
        self.cpe = ConvPosEnc(dim)
        self.norm1 = norm_layer(dim)
        self.att = attn_layer(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU, drop=proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x, attended = self.attention_branch(x, size)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp_branch(x))

    # Two functions without the drop path, whose rate differs from block to block: compiled, they serve a whole stage.
    def attention_branch(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = self.cpe(x, size)
        return x, self.att(self.norm1(x), size)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class GMAStage(nn.Module):
    """The blocks of one stage: map (B, C, H, W) -> map (B, C, H, W)."""

    def __init__(self, blocks: Sequence[GMABlock]) -> None:
        super().__init__()
        self.gma_stage = nn.ModuleList(blocks)
        self.grad_checkpointing = self.selective = False

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, N, C), no copy: channels last
        for block in self.gma_stage:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = _checkpoint(block, x, (H, W), self.selective)
            else:
                x = block(x, (H, W))
        return x.transpose(1, 2).reshape(B, C, H, W)  # (B, N, C) -> (B, C, H, W), no copy


def _checkpoint(block: nn.Module, x: Tensor, size: tuple[int, int], selective: bool) -> Tensor:
    """Run a block now, and once more in the backward pass instead of keeping its intermediate results."""
    if torch.compiler.is_compiling():  # a compiled graph counts a batch once by itself, and takes no contexts
        return checkpoint(block, x, size)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        first, again = create_selective_checkpoint_contexts(_policy) if selective else (nullcontext(), nullcontext())
        return first, _frozen_running_statistics(block, again)

    return checkpoint(block, x, size, context_fn=contexts)


def _policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name().endswith(EXPENSIVE) else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _frozen_running_statistics(module: nn.Module, inner: AbstractContextManager) -> Iterator[None]:
    """Keep batch norms from counting a batch twice while a checkpointed block is recomputed.

    Momentum 0 leaves the statistics as they are, and the batch is counted on a copy of the counter. Switching
    `track_running_stats` off would save other tensors than the forward pass did, which checkpointing refuses.
    """
    norms = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        with inner:
            yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def _check_sizes(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    mlp_ratios: Sequence[float],
    num_heads: int,
    group_sizes: Sequence[int],
    local_branch: bool,
    relative_position: bool,
) -> None:
    """Raise ValueError, naming the numbers, where widths and heads cannot be cut evenly."""
    if not len(embed_dims) == len(depths) == len(mlp_ratios) >= 1:
        raise ValueError(
            f"embed_dims, depths and mlp_ratios need one value per stage, got {len(embed_dims)}, {len(depths)} and "
            f"{len(mlp_ratios)} values"
        )
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: must be at least 1")
    sizes = tuple(group_sizes)
    if len(sizes) > 9 or not all(size >= 3 and size % 2 for size in sizes):
        raise ValueError(
            f"group_sizes={sizes}: must be at most 9 odd numbers of at least 3; single tokens come by themselves"
        )
    # Equal segments, of which the attending ones give equal heads and, for the relative position, eighths. That is a
    # multiple of 10 for 5 segments and 8 heads.
    num_attending = len(sizes) + 1
    num_segments = num_attending + local_branch
    parts = math.lcm(num_heads, 8) if relative_position else num_heads
    divisor = num_segments * parts // math.gcd(num_attending, parts)
    for stage, dim in enumerate(embed_dims):
        if dim <= 0 or dim % divisor:
            whose = f"whose first {num_attending} give" if local_branch else "which give"
            windows = " and 8 equal parts for the relative position" if relative_position and num_heads % 8 else ""
            raise ValueError(
                f"embed_dims[{stage}]={dim} cannot be cut into {num_segments} segments, for group_sizes={sizes}, "
                f"{whose} {num_heads} equal heads{windows}: it must be a positive multiple of {divisor}"
            )


class GroupMixFormer(nn.Module):
    """GroupMixFormer, a four-stage backbone at strides 4, 8, 16 and 32 with a linear classifier.

    Args:
        num_classes: outputs of the classifier; 0 leaves it out, and the model returns pooled features (B, C4).
        in_chans: channels of the input images.
        embed_dims: channels of each stage; multiples of 10 for 8 heads and three group sizes.
        depths: blocks of each stage.
        mlp_ratios: hidden width of the MLP over the width of the stage, of each stage.
        num_heads: attention heads in every block; 1, 2, 4 and 8 need the same `embed_dims`, 16 multiples of 20.
        group_sizes: edges of the token groups in every block, odd and at least 3, in any order. Their number cuts the
            channels into segments: for 8 heads, one size needs `embed_dims` that are multiples of 12, two of 32,
            three of 10, four of 48.
        local_branch: keep one segment out of attention, for the local branch; without it all segments attend, and three
            group sizes need `embed_dims` that are multiples of 8.
        relative_position: add the relative position to the attended values.
        qkv_bias: give the projection to q, k and v a bias.
        qk_scale: factor on the attended values; None means (C / h) ** -0.5.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention's projection and in the MLP (the released DROP_RATE).
        attn_drop_rate: dropout on the softmax of k.
        drop_path_rate: stochastic depth of the last block; rates rise linearly from 0 over all blocks.
        global_pool: 'avg' (the paper's), 'max', 'avgmax', 'catavgmax', or '' for maps without pooling.
        return_interm_layers: `forward` returns the list of the stage maps [(B, C_i, H/stride_i, W/stride_i)] instead.

    Input: (B, in_chans, H, W), H and W of at least 32; sizes that are not multiples of 32 round up at every stride.
    Raises ValueError where widths and heads cannot be cut evenly.
    """

    return_interm_layers: Final[bool]

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (80, 160, 320, 320),
        depths: Sequence[int] = (2, 4, 12, 4),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        num_heads: int = 8,
        group_sizes: Sequence[int] = GROUP_SIZES,
        local_branch: bool = True,
        relative_position: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        return_interm_layers: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(embed_dims, depths, mlp_ratios, num_heads, group_sizes, local_branch, relative_position)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.group_sizes = tuple(group_sizes)
        self.num_features = embed_dims[-1]  # `head_hidden_size`, the width behind the pooling, follows from it
        self.return_interm_layers = return_interm_layers
        self.feature_info = [
            dict(num_chs=dim, reduction=STEM_STRIDE * 2**i, module=f"groupmixformer_backbone.{i}")
            for i, dim in enumerate(embed_dims)
        ]
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        attn_layer = partial(
            GroupMixAttention,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
            group_sizes=group_sizes,
            local_branch=local_branch,
            relative_position=relative_position,
        )
        block_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.conv_stem = Stem(in_chans, embed_dims[0])
        self.patch_embed_layers = nn.ModuleList(
            PatchEmbed(embed_dims[max(i - 1, 0)], dim, stride=1 if i == 0 else 2) for i, dim in enumerate(embed_dims)
        )
        self.groupmixformer_backbone = nn.ModuleList(
            GMAStage([GMABlock(dim, mlp_ratio, proj_drop_rate, rate, norm_layer, attn_layer) for rate in rates])
            for dim, mlp_ratio, rates in zip(embed_dims, mlp_ratios, block_rates)
        )
        self.norm4 = nn.BatchNorm2d(self.num_features)
        self.global_pool = self.head_drop = self.head = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise weights and running statistics again, for a network that was made on `meta` and `to_empty`."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for timm's layer-wise learning rate decay."""
        if coarse:
            blocks: Any = r"^(?:patch_embed_layers|groupmixformer_backbone)\.(\d+)"
        else:
            blocks = [
                (r"^patch_embed_layers\.(\d+)", (0,)),
                (r"^groupmixformer_backbone\.(\d+)\.gma_stage\.(\d+)", None),
                (r"^norm4", (99999,)),
            ]
        return dict(stem=r"^conv_stem", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, selective: bool = False) -> None:
        """Recompute every block in the backward pass: same gradients and running statistics, less memory.

        With `selective`, results of matrix products and convolutions are kept: only what is cheap is computed again.
        """
        for stage in self.groupmixformer_backbone:
            stage.grad_checkpointing, stage.selective = enable, selective

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one (0: by none), and the pooling where one is named.

        A network without pooling that gets classes pools by 'avg' again. Raises ValueError where both '' and classes
        are asked for: a linear classifier needs one vector an image.
        """
        if global_pool is None and num_classes > 0 and self.global_pool.is_identity():
            global_pool = "avg"
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if num_classes > 0 and self.global_pool.is_identity():
            raise ValueError(f"num_classes={num_classes} needs pooling: global_pool='' goes with num_classes=0")
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(self.drop_rate)
        self.head = nn.Identity()
        if num_classes > 0:
            reference = self.conv_stem.proj1.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes)
            self.head.to(device=reference.device, dtype=reference.dtype)
            _init_weights(self.head)
        for module in (self.global_pool, self.head_drop, self.head):  # fresh modules are in training mode
            module.train(self.training)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the maps of all stages, (B, C_i, ceil(H / stride_i), ceil(W / stride_i))."""
        x = self.conv_stem(x)
        maps = []
        for embed, stage in zip(self.patch_embed_layers, self.groupmixformer_backbone):
            x = stage(embed(x))
            maps.append(x)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, as timm defines it.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to return, counted from 0; an int means the last so many; None means all.
            norm: pass the last stage's map through the final batch norm.
            stop_early: do not compute stages after the last one asked for.
            output_fmt: 'NCHW' is the only one.
            intermediates_only: return the list of maps alone, not (final features, maps).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt='{output_fmt}': GroupMixFormer returns 'NCHW' maps only")
        num_stages = len(self.groupmixformer_backbone)
        take_indices, max_index = feature_take_indices(num_stages, indices)
        num_run = max_index + 1 if stop_early else num_stages
        x = self.conv_stem(x)
        intermediates = []
        for i, (embed, stage) in enumerate(zip(self.patch_embed_layers, self.groupmixformer_backbone)):
            if i < num_run:  # TorchScript can neither slice nor leave a loop over modules
                x = stage(embed(x))
                if i in take_indices:
                    intermediates.append(self.norm4(x) if norm and i == num_stages - 1 else x)
        if intermediates_only:
            return intermediates
        return (self.norm4(x) if num_run == num_stages else x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates(indices)` does not need; returns the stages it will return."""
        num_stages = len(self.groupmixformer_backbone)
        take_indices, max_index = feature_take_indices(num_stages, indices)
        self.patch_embed_layers = self.patch_embed_layers[: max_index + 1]
        self.groupmixformer_backbone = self.groupmixformer_backbone[: max_index + 1]
        if prune_norm or max_index + 1 < num_stages:  # the norm belongs to the last stage
            self.norm4 = nn.Identity()
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head:
            self.reset_classifier(0)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the normalised last map (B, C4, ceil(H/32), ceil(W/32))."""
        x = self.conv_stem(x)
        for embed, stage in zip(self.patch_embed_layers, self.groupmixformer_backbone):
            x = stage(embed(x))
        return self.norm4(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C4, H, W) -> logits (B, num_classes), or with `pre_logits` the pooled features (B, C4)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor):
        """(B, in_chans, H, W) -> logits (B, num_classes), or the list of stage maps (`return_interm_layers`)."""
        if self.return_interm_layers:
            return self.forward_stages(x)
        # not redundant: TorchScript compiles only the branch that the constant selects
        return self.forward_head(self.forward_features(x))


class StageMaps(FeatureGetterNet):
    """timm's wrapper for `features_only`, which detectors and segmentation networks take.

    Beyond timm's, it loads state dicts of whole networks, as files hold them, checkpoints gradients, and orders its
    parameters by depth.
    """

    def __init__(self, model: GroupMixFormer, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.register_load_state_dict_pre_hook(_take_what_the_maps_need)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return prefixed_matcher(self.model.group_matcher(coarse), "model.")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def prefixed_matcher(matcher: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A `group_matcher` of a network for one that contains it: its patterns, with `prefix` before every name.

    With it a detector or a segmentation network has timm's layer decay, which silently does nothing without one:
    `return prefixed_matcher(self.backbone.group_matcher(coarse), "backbone.")`. What no pattern matches, such as its
    heads, is the last layer, and learns at the full rate.
    """

    def prefixed(pattern: str) -> str:
        return f"^{re.escape(prefix)}{pattern.removeprefix('^')}"

    return {
        name: prefixed(patterns) if isinstance(patterns, str) else [(prefixed(p), place) for p, place in patterns]
        for name, patterns in matcher.items()
    }


def _take_what_the_maps_need(wrapper: StageMaps, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Turn the names of a whole network, in place, into those of its wrapper, without the parts that were pruned."""
    if any(name.startswith(f"{prefix}model.") for name in state_dict):
        return
    info, stages = wrapper.model.feature_info, wrapper.model.groupmixformer_backbone
    pruned_stages = [str(stage) for stage in range(len(stages), len(info))]
    for name in [name for name in state_dict if name.startswith(prefix)]:
        value, inner = state_dict.pop(name), name.removeprefix(prefix)
        part, index, *_ = [*inner.split("."), "", ""]
        if part in ("norm4", "head"):
            pruned = isinstance(getattr(wrapper.model, part), nn.Identity)
        else:
            pruned = part in ("patch_embed_layers", "groupmixformer_backbone") and index in pruned_stages
        if not pruned:
            state_dict[f"{prefix}model.{inner}"] = value


def _init_weights(module: nn.Module) -> None:
    """Linear weights truncated normal with sigma 0.02, biases 0; everything else as PyTorch initialises it."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Reduce a released file or a training checkpoint to the state dict of the raw model."""
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    return unwrap(state_dict)


def unwrap(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The entries of this network under its own names, whatever it was part of; others are left out.

    torch.compile, DDP, Lightning and detectors put `_orig_mod.`, `module.`, `model.` and `backbone.` before its names.
    Raises ValueError where several such networks are in it, as of a student and a teacher.
    """
    names = {re.sub(r"(?<![^.])_(orig_mod|\w+_wrapped_module)\.", "", name): name for name in state_dict}
    found = (re.match(r"(.*?)(?<![^.])groupmixformer_backbone\.", name) for name in names)
    prefixes = sorted({match[1] for match in found if match})
    if len(prefixes) > 1 and "" not in prefixes:
        raise ValueError(
            f"holds {len(prefixes)} networks, under {', '.join(map(repr, prefixes))}; save one of them alone"
        )
    prefix = prefixes[0] if prefixes else ""
    return {own.removeprefix(prefix): state_dict[name] for own, name in names.items() if own.startswith(prefix)}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return dict(
        url="",  # weights are not hosted; load a file with create_model(..., checkpoint_path=...)
        num_classes=1000,
        input_size=(3, 224, 224),
        min_input_size=(3, 32, 32),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="conv_stem.proj1",
        classifier="head",
        license="mit",
        paper_ids="arXiv:2311.15157",
        **kwargs,
    )


# Without this file, timm's error shows the architecture that a folder of weights names, tag included. The tag then says
# what to do. It changes nothing else.
HUB_TAG = "needs pip install of this folder, then import groupmixformer"
default_cfgs = generate_default_cfgs({name + tag: _cfg() for tag in ("", f".{HUB_TAG}") for name in VARIANTS})


def _create_groupmixformer(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)  # timm's factory arguments
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            GroupMixFormer,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=out_indices, feature_cls=StageMaps),
            **{**VARIANTS[variant], **kwargs},
        )
    return model if dtype is None else model.to(dtype)


def _register(entry_point: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's register_model, without its warning where this file was imported before under another module name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Overwriting groupmixformer_")
        return register_model(entry_point)


@_register
def groupmixformer_miny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-M, 5.7 M parameters."""
    return _create_groupmixformer("groupmixformer_miny", pretrained, **kwargs)


@_register
def groupmixformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-T, 10.9 M parameters."""
    return _create_groupmixformer("groupmixformer_tiny", pretrained, **kwargs)


@_register
def groupmixformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-S, 22.4 M parameters."""
    return _create_groupmixformer("groupmixformer_small", pretrained, **kwargs)


@_register
def groupmixformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-B, 45.8 M parameters."""
    return _create_groupmixformer("groupmixformer_base", pretrained, **kwargs)


@_register
def groupmixformer_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-L, 71.8 M parameters as released; the paper gives 70.3 M."""
    return _create_groupmixformer("groupmixformer_large", pretrained, **kwargs)

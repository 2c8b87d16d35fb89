"""GroupMixFormer for inference: the same function with fewer passes over memory.

`fuse(network)` gives a network for evaluation alone; the one it is made from, and its state dict, stay as they are.
It differs from the plain network by rounding (float32 logits: relative error below 1e-6).

What is done, and why it is exact:

- batch norms and the affine parts of layer norms are folded into the weights beside them;
- the residual of the position encoding is the centre of its 3x3 window;
- q, k and v of a segment come from one Linear and lie side by side in memory, (B, N, 3s), so that nothing is stacked,
  sliced and permuted: convolutions read them as maps in channels-last order;
- attention runs on a segment at a time, which holds a quarter of the heads (of all segments together where group sizes
  are such that a head lies in two of them). Products of one head with another are masked, which is cheaper than to
  bring heads into an order of their own;
- windows of 5x5 positions are padded with zeros where they share a segment with 7x7 ones;
- on a CPU, the blocks of a stage take a few images at a time, which stay in its caches;
- on a CPU in float32, Linears and convolutions run with packed weights and their activation in oneDNN, where PyTorch
  has it.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..groupmixformer import (
    ConvRelPosEnc,
    GMABlock,
    GroupAggregator,
    GroupMixAttention,
    GroupMixFormer,
    LocalBranch,
    PatchEmbed,
    SeparableConv2d,
    Stem,
)
from . import packed

_ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "hardswish": F.hardswish}


def fuse(network: GroupMixFormer) -> "FusedGroupMixFormer":
    """A network for evaluation with the present weights of `network`: (B, in_chans, H, W) -> logits.

    Its weights are copies: later changes of `network` do not reach it. Changes of the copies do, but for those that
    PyTorch does not count, through `.data` or in inference mode. It gives no gradients, does no dropout, and has
    no training mode. Device and dtype are those of `network`.
    """
    with torch.no_grad():
        return FusedGroupMixFormer(network)


class FusedLinear(nn.Module):
    """Linear, then activation, or the sum with a residual: (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if packed.takes_packed_weights(x, self.weight):
            run = torch.ops.groupmixformer.packed_linear if torch.compiler.is_compiling() else packed.packed_linear
            return run(x, self.weight, self.bias, self.activation, residual)
        x = _ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))
        return x if residual is None else x + residual


class FusedMLP(nn.Module):
    """x + MLP(x without mean and scale), whose first Linear takes in the layer norm's weights: (B, N, C) -> same."""

    def __init__(self, norm: nn.LayerNorm, mlp: nn.Module) -> None:
        super().__init__()
        self.eps = norm.eps
        self.fc1 = FusedLinear(*_after_affine(mlp.fc1.weight, mlp.fc1.bias, norm), "gelu")
        self.fc2 = FusedLinear(mlp.fc2.weight, mlp.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        if packed.takes_packed_weights(x, self.fc1.weight):
            run = torch.ops.groupmixformer.packed_mlp if torch.compiler.is_compiling() else packed.packed_mlp
            return run(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.eps)
        return self.fc2(self.fc1(F.layer_norm(x, x.shape[2:], eps=self.eps)), residual=x)


class FusedConv2d(nn.Module):
    """Convolution with 'same' padding, then activation, on maps in channels-last order."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int = 1, groups: int = 1, activation: str = "none"
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.stride, self.groups, self.activation = stride, groups, activation

    def forward(self, x: Tensor) -> Tensor:
        if packed.takes_packed_weights(x, self.weight):
            run = torch.ops.groupmixformer.packed_conv2d if torch.compiler.is_compiling() else packed.packed_conv2d
            return run(x, self.weight, self.bias, self.stride, self.groups, self.activation)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.weight.shape[-1] // 2, groups=self.groups)
        return _ACTIVATIONS[self.activation](x)


class FusedSegment(nn.Module):
    """A segment that takes part in attention, from tokens to its q, k and v side by side: (B, N, C) -> (B, N, 3s)."""

    def __init__(self, aggregator: GroupAggregator, index: int, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        norm = getattr(aggregator, f"norm{index}")
        if index == 0:
            repeated = [x.repeat(3) for x in _scale_and_shift(norm)]
            self.linear = FusedLinear(*_scaled(weight, bias, *repeated), "hardswish")
            self.depthwise = self.pointwise = None
        else:
            aggregate: SeparableConv2d = getattr(aggregator, f"agg{index}")
            self.linear = FusedLinear(weight, bias)
            self.depthwise = FusedConv2d(aggregate.conv1.weight.repeat(3, 1, 1, 1), None, groups=weight.shape[0])
            self.pointwise = FusedLinear(*_folded(aggregate.pointwise_conv, norm, flat=True), "hardswish")

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.linear(x)
        if self.depthwise is not None:
            x = _tokens(self.depthwise(_maps(x, size)))
            x = self.pointwise(x.unflatten(2, (3, x.shape[2] // 3))).flatten(2)
        return x


class FusedHeads(nn.Module):
    """Attention of the heads on channels `first` to `last`: q, k and v (B, N, last - first) -> same."""

    def __init__(self, attention: GroupMixAttention, head_dim: int, first: int, last: int) -> None:
        super().__init__()
        self.position = None
        if attention.crpe is not None:
            self.position = FusedConv2d(*_position_windows(attention.crpe, first, last), groups=last - first)
        heads = torch.arange(first, last, device=attention.proj.weight.device) // head_dim
        same_head = (heads[:, None] == heads).to(attention.proj.weight.dtype)
        self.register_buffer("scaled_mask", same_head * attention.scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        context = torch.bmm(k.softmax(dim=1).transpose(1, 2), v) * self.scaled_mask
        if self.position is None:
            return torch.bmm(q, context)
        position = _tokens(self.position(_maps(v, size)))
        return torch.bmm(q, context).addcmul_(position, q)


class FusedLocalBranch(nn.Module):
    """The last segment: (B, N, C) -> (B, N, s)."""

    def __init__(self, branch: LocalBranch, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.linear = FusedLinear(weight, bias)
        self.depthwise = FusedConv2d(branch.conv.conv1.weight, None, groups=weight.shape[0])
        self.pointwise = FusedLinear(branch.conv.pointwise_conv.weight.flatten(1), None)
        self.norm = copy.deepcopy(branch.norm).requires_grad_(False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = _tokens(self.depthwise(_maps(self.linear(x), size)))
        return F.hardswish(self.norm(self.pointwise(x)))


class FusedBlock(nn.Module):
    """(B, N, C) -> (B, N, C)."""

    def __init__(self, block: GMABlock) -> None:
        super().__init__()
        attention, aggregator, C = block.att, block.att.aggregator, block.att.proj.in_features
        S, s = aggregator.num_segments, aggregator.segment_dim
        window = block.cpe.proj.weight.clone()
        window[:, :, 1, 1] += 1
        self.position = FusedConv2d(window, block.cpe.proj.bias, groups=C)

        self.eps = block.norm1.eps
        bias = torch.zeros_like(attention.qkv.weight[:, 0]) if attention.qkv.bias is None else attention.qkv.bias
        weight, bias = _after_affine(attention.qkv.weight, bias, block.norm1)
        weight, bias = weight.view(3, S, s, C), bias.view(3, S, s)
        parts = [(weight[:, i].reshape(3 * s, C), bias[:, i].reshape(3 * s)) for i in range(S)]
        self.segments = nn.ModuleList(FusedSegment(aggregator, i, *parts[i]) for i in range(aggregator.num_attending))
        attending_dim = aggregator.num_attending * s
        head_dim = attending_dim // attention.num_heads
        width = s if s % head_dim == 0 else attending_dim  # of the channels that attend together: whole heads
        self.heads = nn.ModuleList(
            FusedHeads(attention, head_dim, first, first + width) for first in range(0, attending_dim, width)
        )
        self.local = None if aggregator.agg0 is None else FusedLocalBranch(aggregator.agg0, *parts[-1])
        self.proj = FusedLinear(attention.proj.weight, attention.proj.bias)
        self.mlp = FusedMLP(block.norm2, block.mlp)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = _tokens(self.position(_maps(x, size)))
        y = F.layer_norm(x, x.shape[2:], eps=self.eps)
        parts = self.attend(y, size)
        if self.local is not None:
            parts.append(self.local(y, size))
        return self.mlp(self.proj(torch.cat(parts, dim=2), residual=x))

    def attend(self, y: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """(B, N, C) -> attended values of each segment [(B, N, s)], or of all together [(B, N, A)]."""
        if len(self.heads) == len(self.segments):
            return [heads(*segment(y, size).chunk(3, dim=2), size) for segment, heads in zip(self.segments, self.heads)]
        qkv = zip(*(segment(y, size).chunk(3, dim=2) for segment in self.segments))
        return [self.heads[0](*(torch.cat(segments, dim=2) for segments in qkv), size)]


class FusedGroupMixFormer(nn.Module):
    """What `fuse` returns; `forward_stages`, `forward_features` and `forward_head` are as in `GroupMixFormer`."""

    def __init__(self, network: GroupMixFormer) -> None:
        super().__init__()
        self.num_classes, self.return_interm_layers = network.num_classes, network.return_interm_layers
        self.stem = _fused_stem(network.conv_stem)
        self.patch_embeds = nn.ModuleList(_fused_patch_embed(embed) for embed in network.patch_embed_layers)
        self.stages = nn.ModuleList(
            nn.ModuleList(FusedBlock(block) for block in stage.gma_stage) for stage in network.groupmixformer_backbone
        )
        self.register_buffer("norm_scale", _scale_and_shift(network.norm4)[0][:, None, None].to(network.norm4.weight))
        self.register_buffer("norm_shift", _scale_and_shift(network.norm4)[1][:, None, None].to(network.norm4.weight))
        self.global_pool = network.global_pool
        self.head = nn.Identity()
        if isinstance(network.head, nn.Linear):
            self.head = FusedLinear(network.head.weight, network.head.bias)
        self.eval()

    def train(self, mode: bool = True) -> "FusedGroupMixFormer":
        if mode:
            raise RuntimeError("a fused network is for evaluation only; train the network that it was made from")
        return super().train(False)

    @torch.no_grad()
    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the maps of all stages, in channels-last order."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for embed, blocks in zip(self.patch_embeds, self.stages):
            x = embed(x)
            size = (x.shape[2], x.shape[3])
            parts = [_run_blocks(blocks, part, size) for part in _tokens(x).split(_images_at_a_time(blocks, x))]
            x = _maps(parts[0] if len(parts) == 1 else torch.cat(parts), size)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the normalised last map."""
        return self.forward_stages(x)[-1] * self.norm_scale + self.norm_shift

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.return_interm_layers:
            return self.forward_stages(x)
        return self.forward_head(self.forward_features(x))


def _run_blocks(blocks: nn.ModuleList, x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, N, C)."""
    for block in blocks:
        x = block(x, size)
    return x


def _images_at_a_time(blocks: nn.ModuleList, x: Tensor) -> int:
    """Images of `x` (B, C, H, W) that blocks take together: on a CPU as many as its caches hold."""
    if x.device.type != "cpu":
        return max(1, len(x))
    return max(1, packed.SLAB_VALUES // (x.shape[2] * x.shape[3] * blocks[0].mlp.fc1.weight.shape[0]))


def _maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, C, H, W) in channels-last order, without a copy."""
    return x.transpose(1, 2).unflatten(2, size)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last order -> (B, N, C), without a copy."""
    return x.flatten(2).transpose(1, 2)


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation as x * scale + shift, in float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _scaled(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, ...) and bias of a layer followed by `x * scale + shift`."""
    shift = shift if bias is None else shift + bias.double() * scale
    weight64 = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return weight64.to(weight.dtype), shift.to(weight.dtype)


def _folded(conv: nn.Conv2d, norm: nn.Module, flat: bool = False) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that takes in the batch norm behind it; `flat`: as those of a Linear."""
    weight, bias = _scaled(conv.weight, conv.bias, *_scale_and_shift(norm))
    return (weight.flatten(1) if flat else weight), bias


def _after_affine(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias of a Linear that takes in the affine part of the layer norm before it."""
    weight64 = weight.double()
    shifted = bias.double() + weight64 @ norm.bias.double()
    return (weight64 * norm.weight.double()).to(weight.dtype), shifted.to(weight.dtype)


def _position_windows(position: ConvRelPosEnc, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The relative position's windows (last - first, 1, k, k) and biases for the channels `first` to `last`."""
    weights, biases, start = [], [], 0
    for conv, chans in zip(position.conv_list, position.channel_splits):
        here = slice(max(first - start, 0), max(min(last - start, chans), 0))
        weights.append(conv.weight[here])
        biases.append(conv.bias[here])
        start += chans
    widest = max(weight.shape[-1] for weight in weights if len(weight))
    padded = [F.pad(weight, [(widest - weight.shape[-1]) // 2] * 4) for weight in weights if len(weight)]
    return torch.cat(padded), torch.cat(biases)


def _fused_stem(stem: Stem) -> nn.Sequential:
    return nn.Sequential(
        FusedConv2d(*_folded(stem.proj1, stem.norm1), stride=2, activation="hardswish"),
        FusedConv2d(*_folded(stem.proj2, stem.norm2), stride=2, activation="hardswish"),
    )


def _fused_patch_embed(embed: PatchEmbed) -> nn.Sequential:
    depthwise = embed.proj.conv1
    return nn.Sequential(
        FusedConv2d(depthwise.weight, None, stride=depthwise.stride[0], groups=depthwise.groups),
        FusedConv2d(*_folded(embed.proj.pointwise_conv, embed.norm), activation="hardswish"),
    )

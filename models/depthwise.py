"""Depthwise convolutions of 5x5 and 7x7 windows whose gradients are fast on CPUs.

oneDNN, which PyTorch convolves with on CPUs, has a kernel for the weight gradient of depthwise convolutions up to three
columns wide. For wider ones it takes the one for dense convolutions, on weights that are padded with zeros to 16 times
their size: ten times as slow as the forward pass in float32, fifty times in bfloat16. Here the window is cut into
strips of up to three columns, and the gradient of the input is a forward convolution with the window turned round.
Outputs keep their bits; gradients differ by rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAST_COLUMNS = 3  # widest window that oneDNN has a depthwise kernel of its own for


def use_fast_gradients(network: nn.Module) -> None:
    """Make the wide depthwise convolutions of a network `DepthwiseConv2d`, in place; names and weights stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.__class__ = DepthwiseConv2d  # it has the very same parameters, hooks and settings


def _fits(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    same = conv.stride == conv.dilation == (1, 1) and conv.padding == tuple(edge // 2 for edge in conv.kernel_size)
    odd = all(edge % 2 for edge in conv.kernel_size) and conv.padding_mode == "zeros"
    return depthwise and same and odd and conv.kernel_size[1] > FAST_COLUMNS


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with 'same' padding: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        strips_meet_image = x.shape[3] >= self.padding[1]
        if x.device.type != "cpu" or not torch.is_grad_enabled() or not strips_meet_image:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):  # what autocast does to convolutions; it does not know this operator
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return torch.ops.groupmixformer.depthwise_conv2d(x, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    of_weight = torch.ops.groupmixformer.depthwise_weight if torch.compiler.is_compiling() else weight_gradient
    return (
        _convolve(gradient, weight.flip(2, 3), None) if ctx.needs_input_grad[0] else None,
        of_weight(x, gradient, weight.shape[2:]) if ctx.needs_input_grad[1] else None,
        gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None,
    )


def weight_gradient(x: Tensor, gradient: Tensor, window: Sequence[int]) -> Tensor:
    """Gradient (C, 1, h, w) of the weight of a depthwise convolution, strip by strip.

    Args:
        x: the convolution's input, (B, C, H, W); W at least w // 2.
        gradient: that of its output, (B, C, H, W).
        window: h and w, odd.
    """
    C, (height, width) = x.shape[1], window
    x = x.contiguous(memory_format=torch.channels_last)
    strips = []
    for first in range(0, width, FAST_COLUMNS):
        columns = min(FAST_COLUMNS, width - first)
        # The columns of x that the strip sees while the window moves, zeros outside the image: a negative pad cuts.
        left, right = width // 2 - first, first + columns - 1 - width // 2
        _, strip, _ = torch.ops.aten.convolution_backward(
            gradient,
            F.pad(x, (left, right)),
            x.new_empty(C, 1, height, columns),
            None,
            [1, 1],
            [height // 2, 0],
            [1, 1],
            False,
            [0, 0],
            C,
            [False, True, False],
        )
        strips.append(strip)
    return torch.cat(strips, dim=3)


# Operators, because compilers keep no cache of functions with gradients of their own, and would compile the copies of
# all strips one by one, which takes a fifth of their time.
_library = torch.library.Library("groupmixformer", "FRAGMENT")
_library.define("depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("depthwise_conv2d", _convolve, "CPU")
torch.library.register_fake("groupmixformer::depthwise_conv2d", _convolve, lib=_library)
torch.library.register_autograd(
    "groupmixformer::depthwise_conv2d", _backward, setup_context=_save_for_backward, lib=_library
)
_library.define("depthwise_weight(Tensor x, Tensor gradient, int[] window) -> Tensor")
_library.impl("depthwise_weight", weight_gradient, "CPU")


@torch.library.register_fake("groupmixformer::depthwise_weight", lib=_library)
def _(x: Tensor, gradient: Tensor, window: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[1], 1, *window)

"""Depthwise convolutions of 5x5 and 7x7 windows whose gradients are fast on CPUs.

oneDNN, which PyTorch convolves with on CPUs, has a kernel for the weight gradient of depthwise convolutions up to three
columns wide. For wider ones it takes the one for dense convolutions, on weights that are padded with zeros to 16 times
their size: ten times as slow as the forward pass in float32, 25 to 60 times in bfloat16. Here the window is cut into
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
    """Make the wide depthwise convolutions of a network `DepthwiseConv2d`, in place; names and weights stay.

    For training loops: torch.func, TorchScript and exporters take the network as it was before.
    """
    if not torch.backends.mkldnn.is_available():
        return
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
        in_training = x.device.type == "cpu" and torch.is_grad_enabled()
        if not in_training or x.dim() != 4 or x.shape[3] < self.kernel_size[1]:  # smaller images gain nothing
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # autocast does not know this operator
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return torch.ops.groupmixformer.depthwise_same_conv2d(x, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # Gradients are recorded during a backward pass only where they are to be differentiated once more.
    run = gradients if torch.is_grad_enabled() else torch.ops.groupmixformer.depthwise_same_conv2d_backward
    found = run(*ctx.saved_tensors, gradient, list(ctx.needs_input_grad))
    return tuple(value if needed else None for value, needed in zip(found, ctx.needs_input_grad))


def gradients(x: Tensor, weight: Tensor, gradient: Tensor, needed: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, from that of the output; those that are not needed are empty."""
    none = x.new_empty(0)
    with torch.autocast("cpu", enabled=False):  # as PyTorch's own: they keep the dtype of the forward pass
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return (
            _convolve(gradient, weight.flip(2, 3), None) if needed[0] else none,
            weight_gradient(x, gradient, weight.shape[2:]) if needed[1] else none.clone(),
            gradient.sum((0, 2, 3)) if needed[2] else none.clone(),
        )


def weight_gradient(x: Tensor, gradient: Tensor, window: Sequence[int]) -> Tensor:
    """Gradient (C, 1, h, w) of the weight of a depthwise convolution, strip by strip.

    Args:
        x: the convolution's input, (B, C, H, W); W at least w // 2, so that every strip meets the image.
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


# Operators, because a compiler's cache takes no functions with gradients of their own; and the backward pass is one of
# its own, because that cache would keep the old one when this file changes, and because the copies of all strips,
# compiled one by one, take a fifth of the compiler's time.
_library = torch.library.Library("groupmixformer", "FRAGMENT")
_library.define("depthwise_same_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("depthwise_same_conv2d", _convolve, "CPU")
torch.library.register_fake("groupmixformer::depthwise_same_conv2d", _convolve, lib=_library)
torch.library.register_autograd(
    "groupmixformer::depthwise_same_conv2d", _backward, setup_context=_save_for_backward, lib=_library
)
_library.define(
    "depthwise_same_conv2d_backward(Tensor x, Tensor weight, Tensor gradient, bool[] needed)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("depthwise_same_conv2d_backward", gradients, "CPU")


@torch.library.register_fake("groupmixformer::depthwise_same_conv2d_backward", lib=_library)
def _(x: Tensor, weight: Tensor, gradient: Tensor, needed: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0)
    return (
        torch.empty_like(gradient, memory_format=torch.channels_last) if needed[0] else none,
        torch.empty_like(weight) if needed[1] else none.clone(),
        gradient.new_empty(weight.shape[0]) if needed[2] else none.clone(),
    )

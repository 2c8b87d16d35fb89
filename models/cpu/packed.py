"""Layers with packed weights in oneDNN, and their activation in the same call: float32 on a CPU, for inference."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Weights in oneDNN's own layout, with the version of the weight that they were made from. They cannot be buffers: such
# tensors have no storage that could be saved, moved or handed to a compiled graph.
_packed_weights = WeakTensorKeyDictionary()
SLAB_VALUES = 2**22  # hidden values of the MLP that are kept at a time on a CPU, 16 MB: of images, or rows of one


def _packed(weight: Tensor, pack: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`pack(weight, *arguments)`, kept until the weight goes, or changes in a way that PyTorch counts."""
    version = 0 if weight.is_inference() else weight._version
    packed_version, packed = _packed_weights.get(weight, (None, None))
    if packed is None or packed_version != version:
        packed = pack(weight, *arguments)
        _packed_weights[weight] = version, packed
    return packed


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """Linear, then activation or residual, in one oneDNN call: (..., in) -> (..., out), float32 on a CPU."""
    packed = _packed(weight, torch.ops.mkldnn._reorder_linear_weight, x.numel() // x.shape[-1])
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")


def packed_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, activation: str) -> Tensor:
    """Convolution with 'same' padding, then activation, in one oneDNN call, on maps in channels-last order."""
    settings = [weight.shape[-1] // 2] * 2, [stride] * 2, [1, 1], groups
    packed = _packed(weight, torch.ops.mkldnn._reorder_convolution_weight, *settings, x.shape)
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *settings, activation, [], "none")


def packed_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, eps: float) -> Tensor:
    """x + MLP(layer norm of x) with packed Linears: (B, N, C) -> (B, N, C), float32 on a CPU.

    Hidden values are made a slab at a time: 32 MB of them, which one large image may need, go back to the system when
    they are freed, and every page of them is then faulted in again at each call.
    """
    results = []
    for rows in x.flatten(0, 1).split(max(1, SLAB_VALUES // weight1.shape[0])):
        hidden = packed_linear(F.layer_norm(rows, rows.shape[1:], eps=eps), weight1, bias1, "gelu", None)
        results.append(packed_linear(hidden, weight2, bias2, "none", rows))
    return (results[0] if len(results) == 1 else torch.cat(results)).view_as(x)


# Inductor calls the same kernels where it may treat weights as constants ("freezing"); as operators of their own they
# let one compiled block serve all blocks of its stage. `torch.library.custom_op` would define them in fewer lines, but
# costs 50 us a call, a twentieth of the whole network: it prepares for gradients, which these do not have. The tag
# allows inputs of any strides, which oneDNN's kernels take: without it, inductor would write a copy for each operator
# that reads a tensor. Strides of outputs do not depend on those of inputs.
_library = torch.library.Library("groupmixformer", "DEF")
for _signature, _operator in (
    ("packed_linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual)", packed_linear),
    ("packed_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride, int groups, str activation)", packed_conv2d),
    ("packed_mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, float eps)", packed_mlp),
):
    _library.define(f"{_signature} -> Tensor", tags=(torch.Tag.flexible_layout,))
    _library.impl(_signature.partition("(")[0], _operator, "CPU")


@torch.library.register_fake("groupmixformer::packed_linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("groupmixformer::packed_conv2d", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, activation: str) -> Tensor:
    size = [(edge - 1) // stride + 1 for edge in x.shape[2:]]
    return x.new_empty(x.shape[0], weight.shape[0], *size).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("groupmixformer::packed_mlp", lib=_library)
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


HAS_PACKED_WEIGHTS = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and not torch.ops.mkldnn._is_mkldnn_acl_supported()  # ARM's library takes no activations in
)


def takes_packed_weights(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's kernels for packed weights take `x`: float32 on a CPU, outside autocast."""
    on_cpu = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return HAS_PACKED_WEIGHTS and on_cpu and x.dtype == weight.dtype == torch.float32 and x.numel() > 0

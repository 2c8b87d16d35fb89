"""models/cpu/depthwise.py: the gradients of `nn.Conv2d`, by kernels that oneDNN has for depthwise convolutions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import runs
import timm
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import models
import train
from models.cpu.depthwise import DepthwiseConv2d, gradients, use_fast_gradients


def pair(window: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A depthwise convolution as it is, and a copy with fast gradients."""
    torch.manual_seed(0)
    plain = nn.Conv2d(20, 20, window, padding=window // 2, groups=20, bias=bias).to(dtype)
    fast = nn.Sequential(copy.deepcopy(plain))
    use_fast_gradients(fast)
    assert type(fast[0]) is DepthwiseConv2d
    return plain, fast[0]


def outcome(conv: nn.Conv2d, x: Tensor, gradient: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output, and gradients of input and parameters, for the gradient of the output."""
    conv.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = conv(x)
    output.backward(gradient.to(output.dtype))
    return {"output": output, "input": x.grad, **{name: value.grad for name, value in conv.named_parameters()}}


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("window", [5, 7, 9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(14, 14), (9, 12), (2, 9), (4, 3)], ids=str)  # some smaller than the window
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_gradients_are_those_of_the_plain_convolution(
    window: int, bias: bool, size: tuple[int, int], order: torch.memory_format
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        plain, fast = pair(window, bias, dtype)
        x = torch.randn(3, 20, *size, dtype=dtype).to(memory_format=order)
        gradient = torch.randn(3, 20, *size, dtype=dtype)
        expected, got = outcome(plain, x, gradient), outcome(fast, x, gradient)
        assert torch.equal(got.pop("output"), expected.pop("output"))
        assert got.keys() == expected.keys()
        for name in expected:
            assert relative_error(got[name], expected[name]) < tolerance, (dtype, name)


def test_autocast_computes_in_its_dtype_and_is_as_exact_as_the_plain_convolution() -> None:
    plain, fast = pair(7)
    x, gradient = torch.randn(3, 20, 14, 14), torch.randn(3, 20, 14, 14)
    exact = outcome(plain, x, gradient.bfloat16().float())
    expected, got = outcome(plain, x, gradient, autocast=True), outcome(fast, x, gradient, autocast=True)
    assert got["output"].dtype == torch.bfloat16 and torch.equal(got["output"], expected["output"])
    for name in ("input", "weight", "bias"):
        assert got[name].dtype == torch.float32
        assert relative_error(got[name], exact[name]) < 1.5 * relative_error(expected[name], exact[name]), name


def test_what_needs_no_gradient_gets_none() -> None:
    _, fast = pair(5)
    fast.weight.requires_grad_(False)
    x = torch.randn(1, 20, 6, 6)
    fast(x).sum().backward()
    assert fast.weight.grad is None and x.grad is None and fast.bias.grad is not None
    with torch.no_grad(), _Calls() as calls:
        assert not fast(x).requires_grad
    assert not any("groupmixformer" in name for name in calls.names)


@pytest.mark.filterwarnings("error")
def test_gradients_of_gradients_are_those_of_the_plain_convolution() -> None:
    plain, fast = pair(5, dtype=torch.float64)
    x = torch.randn(2, 20, 7, 7, dtype=torch.float64, requires_grad=True)
    penalties = []
    for conv in (plain, fast):
        (gradient,) = torch.autograd.grad(conv(x).pow(3).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.pow(2).sum(), [x, conv.weight]))
    for got, expected in zip(penalties[1], penalties[0]):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class _Calls(TorchDispatchMode):
    """Notes the operators that run, and the windows of gradients of depthwise weights."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.windows: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func is torch.ops.aten.convolution_backward.default and args[2].shape[1] == 1 and args[-1][1]:
            self.windows.add(tuple(args[2].shape[2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("window", "strips"), [(5, {3, 2}), (7, {3, 1}), (9, {3})])
def test_strips_are_at_most_three_columns_wide(window: int, strips: set[int]) -> None:
    _, fast = pair(window)
    x = torch.randn(2, 20, 12, 12)
    with _Calls() as calls:
        gradients(x, fast.weight.detach(), torch.randn_like(x), [True, True, True])
    assert calls.windows == {(window, columns) for columns in strips}


def test_a_network_trains_by_them_alone_and_stays_the_same_otherwise() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("groupmixformer_miny", depths=(1, 1, 1, 1), drop_path_rate=0.0).double()
    fast = copy.deepcopy(plain)
    weights = dict(fast.named_parameters())
    use_fast_gradients(fast)
    wide = [module for module in fast.modules() if type(module) is DepthwiseConv2d]
    assert len(wide) == 4 * 4, "5x5 and 7x7, of the aggregators and of the relative position"
    assert all(value is weights[name] for name, value in fast.named_parameters())
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in copy.deepcopy(fast).modules()] == [type(module) for module in fast.modules()]

    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    seen = {}
    for name, network in (("plain", plain), ("fast", fast)):
        with _Calls() as seen[name]:
            network(x).pow(2).sum().backward()
    assert {width for _, width in seen["plain"].windows} == {3, 5, 7}
    assert {width for _, width in seen["fast"].windows} == {3}
    assert seen["fast"].names.count("groupmixformer.depthwise_same_conv2d_backward.default") == len(wide)
    for got, expected in zip(fast.parameters(), plain.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("needed", [[True, True, True], [False, True, False], [True, False, True]], ids=str)
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_operators_are_what_they_tell_compilers(needed: list[bool], order: torch.memory_format) -> None:
    x, weight, bias = torch.randn(2, 6, 9, 8).to(memory_format=order), torch.randn(6, 1, 7, 7), torch.randn(6)
    operators = torch.ops.groupmixformer
    inputs = [value.requires_grad_(which) for value, which in zip((x, weight, bias), needed)]
    torch.library.opcheck(operators.depthwise_same_conv2d.default, tuple(inputs))
    plain = [value.detach() for value in (x, weight)]
    torch.library.opcheck(operators.depthwise_same_conv2d_backward.default, (*plain, torch.randn_like(x), needed))


def test_compiled_gradients_are_those_of_the_plain_convolution_and_are_one_operator() -> None:
    plain, fast = pair(7, dtype=torch.float64)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def note(traced: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(str(traced.graph))
            return make_boxed_func(traced.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=note)

    x, gradient = torch.randn(2, 20, 9, 9, dtype=torch.float64), torch.randn(2, 20, 9, 9, dtype=torch.float64)
    expected = outcome(plain, x, gradient)
    fast.compile(backend=backend, fullgraph=True)
    got = outcome(fast, x, gradient)
    for name in expected:
        assert relative_error(got[name], expected[name]) < 1e-13, name
    assert "groupmixformer.depthwise_same_conv2d_backward" in graphs[-1] and "aten.convolution" not in graphs[-1]


def test_a_backward_pass_under_autocast_keeps_the_dtype_of_the_forward_pass() -> None:
    _, fast = pair(7)
    x, gradient = torch.randn(2, 20, 9, 9, requires_grad=True), torch.randn(2, 20, 9, 9)
    (expected,) = torch.autograd.grad(fast(x), x, gradient)
    output = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(output, x, gradient)
    assert torch.equal(got, expected)


def test_an_image_without_a_batch_is_left_to_pytorch() -> None:
    plain, fast = pair(7)
    image = torch.randn(20, 9, 9)
    assert torch.equal(fast(image), plain(image))


def test_autocast_leaves_float64_alone() -> None:
    plain, fast = pair(5, dtype=torch.float64)
    x = torch.randn(1, 20, 6, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x)) and fast(x).dtype == torch.float64


class _OwnConv2d(nn.Conv2d):
    pass


def test_other_convolutions_are_left_alone() -> None:
    others = nn.Sequential(
        _OwnConv2d(8, 8, 7, padding=3, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 7, padding=3),
        nn.Conv2d(8, 8, 7, padding=3, groups=8, stride=2),
        nn.Conv2d(8, 8, 7, padding=2, groups=8),
        nn.Conv2d(8, 8, 5, padding=4, groups=8, dilation=2),
        nn.Conv2d(8, 8, 4, padding=2, groups=8),
        nn.Conv2d(8, 8, 5, padding=2, groups=8, padding_mode="reflect"),
        nn.Conv2d(8, 16, 5, padding=2, groups=8),
    )
    use_fast_gradients(others)
    assert {type(module) for module in others} == {nn.Conv2d, _OwnConv2d}


def test_train_py_uses_them_on_a_cpu(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[models.GroupMixFormer] = []
    trainer = train.TrainState

    def note(**parts: Any) -> train.TrainState:
        trained.append(parts["model"])
        return trainer(**parts)

    monkeypatch.setattr(train, "TrainState", note)
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path), stop_at=1) == 75
    assert sum(type(module) is DepthwiseConv2d for module in trained[0].modules()) == 2 * 4

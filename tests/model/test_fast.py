"""Every fast path against the plain formulation: values, and gradients where it gives them."""

import copy
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import golden_numbers
import pytest
import runs
import timm
import torch
from small_networks import ABLATIONS, OTHER_GROUPS, relative_error
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from configs import UserError
from models.cpu import packed as packed_layers
from models.cpu.fused import fuse
from models.reference import ReferenceNetwork
from tasks import keys_of, networks
from tasks.classification.evaluation import evaluate
from tasks.networks import compile_blocks, compile_for_training
from utils.precision import Precision
from utils.session import start_session

WIDE = dict(embed_dims=(40, 80, 120, 160), depths=(1, 1, 2, 1), drop_path_rate=0.0, num_classes=7)


def network_of(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A small network with weights and running statistics that are a function of their names."""
    network = timm.create_model("groupmixformer_miny", **{**WIDE, **options})
    state = {
        name: 3 * golden_numbers.weight(name, tuple(value.shape)) if value.ndim > 1 else value
        for name, value in network.state_dict().items()
    }
    for name, value in state.items():
        noise = golden_numbers.weight(name, tuple(value.shape)) if value.ndim == 1 else value
        if name.endswith("running_mean") or (value.ndim == 1 and name.endswith("bias")):
            state[name] = noise
        elif name.endswith("running_var"):
            state[name] = 1 + 0.5 * torch.tanh(noise)
    network.load_state_dict(state)
    return network.to(dtype).eval()


def images(height: int = 64, width: int = 96, batch: int = 3) -> Tensor:
    return golden_numbers.images(batch, height, width)


# ---------------------------------------------------------------------------------------------- the order of operations
@pytest.mark.parametrize(
    ("training", "options"),
    [(False, {}), (True, {}), (True, OTHER_GROUPS[1]), *((True, options) for options in ABLATIONS)],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_released_order(training: bool, options: dict[str, Any]) -> None:
    network = network_of(torch.float64, **options).train(training)
    reference = ReferenceNetwork(copy.deepcopy(network)).train(training)
    x = images(33, 47).double()
    got, expected = network(x), reference(x)
    assert relative_error(got, expected) < 1e-13
    got.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in reference.network.named_parameters()}
    floor = 1e-12 * max(gradient.norm() for gradient in gradients.values())
    for name, parameter in network.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-10 * gradients[name].norm() + floor, name
    for name, value in reference.network.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, rtol=1e-12, atol=1e-14), name


# ---------------------------------------------------------------------------------------------------------------- fused
@pytest.mark.parametrize(("size", "heads"), [((64, 96), 8), ((33, 47), 16)], ids=str)
def test_fused_is_the_network_in_float64(size: tuple[int, int], heads: int) -> None:
    network = network_of(torch.float64, num_heads=heads, embed_dims=(40, 80, 120, 160))
    x = images(*size, batch=2).double()
    with torch.no_grad():
        assert relative_error(fuse(network)(x), network(x)) < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        *OTHER_GROUPS,
        *ABLATIONS,
        dict(qkv_bias=False),
        dict(qk_scale=0.3),
        dict(in_chans=1),
        dict(num_classes=0),
        dict(global_pool="avgmax"),
        dict(global_pool="catavgmax"),
        dict(num_classes=0, global_pool=""),
        dict(drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5),
    ],
    ids=str,
)
def test_fused_takes_every_option_of_the_network(options: dict[str, Any]) -> None:
    network = network_of(torch.float64, **options)
    x = images().double()[:, : options.get("in_chans", 3)]
    with torch.no_grad():
        assert relative_error(fuse(network)(x), network(x)) < 1e-13


def test_fused_stage_maps_are_those_of_the_network() -> None:
    network, x = network_of(torch.float64), images().double()
    with torch.no_grad():
        for got, expected in zip(fuse(network).forward_stages(x), network.forward_stages(x), strict=True):
            assert relative_error(got, expected) < 1e-13
        network.return_interm_layers = True
        assert len(fuse(network)(x)) == 4


@pytest.mark.parametrize("packed", [True, False])
def test_the_difference_of_fused_float32_is_rounding(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr(packed_layers, "HAS_PACKED_WEIGHTS", False)
    network = network_of()
    exact, fused = network_of(torch.float64), fuse(network)
    for size in ((224, 224), (64, 96), (33, 47), (16, 16)):  # weights are packed once, for the first
        x = images(*size)
        with torch.no_grad():
            expected = exact(x.double())
            assert relative_error(network(x), expected) < 1e-6
            assert relative_error(fused(x), expected) < 1e-6


@pytest.mark.parametrize("autocast", [True, False])
def test_the_difference_of_fused_bfloat16_is_that_of_the_network(autocast: bool) -> None:
    network, x = network_of(), images()
    with torch.no_grad():
        expected = network(x)
        if not autocast:
            network, x = network.bfloat16(), x.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain, fused = network(x), fuse(network)(x)
    eps = torch.finfo(torch.bfloat16).eps
    assert relative_error(plain, expected) < 8 * eps
    assert relative_error(fused, expected) < 8 * eps


def test_fusing_leaves_the_network_alone() -> None:
    network = network_of()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = fuse(network)
    with torch.no_grad():
        for buffer in fused.buffers():
            buffer.zero_()
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_packed_weights_follow_the_weights_they_were_made_from() -> None:
    network, other = network_of(), network_of()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        fused = fuse(network)
        before = fused(images())
        fused.load_state_dict(fuse(other).state_dict())
        assert relative_error(fused(images()), fuse(other)(images())) < 1e-6
        assert relative_error(before, fused(images())) > 1e-2


def test_fused_copies_saves_and_moves(tmp_path: Any) -> None:
    fused, x = fuse(network_of()), images()
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    torch.save(fused, tmp_path / "fused.pt")
    assert torch.equal(torch.load(tmp_path / "fused.pt", weights_only=False)(x), expected)
    assert relative_error(fused.double()(x.double()), expected) < 1e-6


def test_fused_gives_no_gradients_and_has_no_training_mode() -> None:
    fused = fuse(network_of())
    assert not any(p.requires_grad for p in fused.parameters())
    assert not fused(images().requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match="for evaluation only"):
        fused.train()


def test_fused_stages_take_as_many_images_at_a_time_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(torch.float64)
    fused, batch = fuse(network), images(64, 96, batch=5).double()
    together = fused.forward_stages(batch)
    taken: list[list[int]] = [[] for _ in fused.stages]
    for stage, sizes in zip(fused.stages, taken):
        stage[0].register_forward_pre_hook(lambda block, arguments, sizes=sizes: sizes.append(len(arguments[0])))
    tokens, hidden = 16 * 24, 4 * WIDE["embed_dims"][0]
    monkeypatch.setattr(packed_layers, "SLAB_VALUES", 2 * tokens * hidden)
    maps = fused.forward_stages(batch)
    assert taken[0] == [2, 2, 1] and taken[1] == [4, 1] and taken[2] == taken[3] == [5]
    for got, expected in zip(maps, together):
        assert relative_error(got, expected) < 1e-13
        assert got.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(packed_layers, "SLAB_VALUES", 1)
    assert relative_error(fused(batch), network(batch)) < 1e-12


def test_fused_runs_on_an_empty_batch() -> None:
    assert fuse(network_of())(images()[:0]).shape == (0, 7)


# ------------------------------------------------------------------------------------------------------------- compiled
@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch.compile with a backend that runs the graph as it is; gives the sizes of the graphs that it was handed."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    options = dict(backend=backend, dynamic=False)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, **options))
    block_compiler = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: block_compiler(module, **options))
    return graphs


@pytest.mark.compile
def test_blocks_of_a_stage_share_one_compilation(eager_compiler: list[int]) -> None:
    network = network_of(depths=(3, 2, 4, 2), drop_path_rate=0.3).train()
    plain = copy.deepcopy(network)
    compile_blocks(network)
    results = []
    for candidate in (network, plain):
        torch.manual_seed(0)
        logits = candidate(images())
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in candidate.parameters()]))
    assert len(eager_compiler) == 2 * 4, "two branches of a block, four stages"
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))
    assert list(network.state_dict()) == list(plain.state_dict())


@pytest.mark.compile
def test_fused_blocks_of_a_stage_share_one_compilation(eager_compiler: list[int]) -> None:
    fused = fuse(network_of(depths=(3, 2, 4, 2)))
    expected = fused(images())
    compile_blocks(fused)
    assert torch.equal(fused(images()), expected)
    assert len(eager_compiler) == 4


@pytest.mark.compile
def test_ddp_does_not_cut_large_blocks(eager_compiler: list[int], tmp_path: Path) -> None:
    """Else those with gradient checkpointing fail: the recomputation is not cut."""
    network = network_of(embed_dims=(40, 40, 320, 320)).train()  # whose last two stages have more than 1 MB
    compile_blocks(network)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(network)(images())
    finally:
        torch.distributed.destroy_process_group()
    assert len(eager_compiler) == 2 * 4


@pytest.mark.compile
@pytest.mark.parametrize("fused", [False, True])
def test_many_sizes_are_all_compiled(eager_compiler: list[int], fused: bool) -> None:
    """torch.compile otherwise gives up, silently, at so many variants of one function."""
    network = fuse(network_of()) if fused else network_of().eval()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True), torch.no_grad():
        compile_blocks(network)
        for size in (32, 48, 64):
            network(torch.randn(1, 3, size, size))
    assert len(eager_compiler) >= 3 * 4 > 8


@pytest.fixture
def memory_budget() -> Iterator[None]:
    """Puts the compiler's own one back afterwards."""
    with torch._functorch.config.patch(activation_memory_budget=torch._functorch.config.activation_memory_budget):
        yield


@pytest.mark.parametrize(
    ("device", "autocast", "refused"), [("cpu", True, True), ("cpu", False, False), ("cuda", True, False)]
)
def test_compiled_gradients_that_may_not_be_finite_are_refused(
    device: str, autocast: bool, refused: bool, eager_compiler: list[int], memory_budget: None
) -> None:
    precision = Precision(device, torch.bfloat16, enabled=autocast)
    with pytest.raises(UserError, match=r"bfloat16 on a CPU.*--amp-opt-level O0") if refused else nullcontext():
        compile_for_training(network_of(), precision, memory=0.75)
        assert torch._functorch.config.activation_memory_budget == 0.75


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_by_inductor_is_the_network(dtype: torch.dtype, memory_budget: None) -> None:
    """In float32 with half the memory: what is computed again gives the same gradients, and counts once."""
    torch._dynamo.reset()
    eps = torch.finfo(dtype).eps
    two_stages = dict(
        embed_dims=(40, 120), depths=(1, 2), mlp_ratios=(4, 4)
    )  # each stage is half a minute of compiling
    network, x = network_of(**two_stages).train(), images()
    compiled, exact = copy.deepcopy(network), copy.deepcopy(network).double()
    if dtype == torch.float32:  # train.py refuses the other
        compile_for_training(compiled, Precision("cpu", torch.float32, enabled=False), memory=0.5)
    else:
        compile_blocks(compiled)
    logits = []
    for candidate in (compiled, network, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and candidate is not exact):
            logits.append(candidate(x.double() if candidate is exact else x))
        if dtype == torch.float32:
            logits[-1].square().sum().backward()
    assert relative_error(logits[0], logits[1]) < 16 * eps
    if dtype == torch.float32:
        for (name, got), plain, truth in zip(*(each.named_parameters() for each in (compiled, network, exact))):
            # Biases before a batch norm have no gradient of their own: rounding only, in the plain network too.
            rounding = 4 * (plain[1].grad - truth[1].grad).norm() + 16 * eps * truth[1].grad.norm()
            assert (got.grad - truth[1].grad).norm() <= rounding, name
        for (name, got), plain in zip(compiled.named_buffers(), network.buffers()):
            torch.testing.assert_close(got, plain, msg=name)  # a batch norm that is computed again counts once

    fused, compiled = fuse(network.eval()), fuse(network.eval())
    compile_blocks(compiled)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert relative_error(compiled(x), fused(x)) < 16 * eps


@pytest.mark.compile
def test_compiled_segments_read_one_copy_of_the_tokens() -> None:
    """Inductor writes one for each operator that asks for strides, and each costs a pass over memory."""
    torch._dynamo.reset()
    block = fuse(network_of()).stages[0][0]
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(block, dynamic=False), torch.randn(2, 24, 40), (4, 6))
    assert code.count("empty_strided_cpu((2, 24, 40)") <= 2, "normalised tokens, and the segments' joined outputs"


# ----------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.compile
def test_a_compiled_run_is_stopped_and_continued_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (runs.arguments(data, tmp_path / name, flags=["--compile"]) for name in ("whole", "stopped"))
    assert runs.train_here(monkeypatch, whole) == 0
    assert runs.train_here(monkeypatch, stopped, stop_at=3) == 75
    assert runs.train_here(monkeypatch, stopped) == 0
    name = "ckpt_epoch_1.pth"
    assert runs.digest(runs.run_folder(tmp_path / "whole") / name) == runs.digest(
        runs.run_folder(tmp_path / "stopped") / name
    )


def test_test_py_fuses_and_finds_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path)) == 0
    weights = ["--resume", str(runs.run_folder(tmp_path) / "ckpt_best.pth")]
    fused_networks = []
    monkeypatch.setattr(networks, "fuse", lambda network: fused_networks.append(fuse(network)) or fused_networks[-1])
    results = []
    for name, flags in (("plain", []), ("fused", ["--fuse"])):
        output = tmp_path / f"{name}.json"
        args = runs.arguments(data, tmp_path, flags=[*weights, *flags, "--json", str(output)])
        monkeypatch.setattr("sys.argv", ["test.py", *args])
        evaluate(start_session("", keys_of))
        results.append(json.loads(output.read_text()))
    assert len(fused_networks) == 1
    assert results[0]["acc1"] == results[1]["acc1"]
    assert results[0]["nll"] == pytest.approx(results[1]["nll"], rel=1e-5)

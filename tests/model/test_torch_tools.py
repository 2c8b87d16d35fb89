"""Gradient checkpointing, TorchScript, tracing, torch.export, torch.compile, copies, layouts and dtypes."""

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import golden_numbers
import pytest
import timm
import torch
from small_networks import ABLATIONS, OTHER_GROUPS, SHALLOW, WIDE, modules_of, relative_error, small_network, train_step
from timm.layers import DropPath
from timm.models._features_fx import GraphExtractNet
from torch import Tensor, nn

# torch deprecates TorchScript; users of timm's contract still need it
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:FutureWarning")


# ----------------------------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_changes_neither_gradients_nor_running_statistics(dtype: torch.dtype) -> None:
    images, network = golden_numbers.images(2, 64, 96), small_network(drop_path_rate=0.5)
    recomputed = copy.deepcopy(network)
    recomputed.set_grad_checkpointing()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        expected, got = train_step(network, images), train_step(recomputed, images)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("selective", [False, True])
def test_both_ways_of_checkpointing_give_the_plain_gradients_and_count_a_batch_once(selective: bool) -> None:
    images = golden_numbers.images(2, 64, 96).double()
    network = small_network(drop_path_rate=0.5).double()
    recomputed = copy.deepcopy(network)
    recomputed.set_grad_checkpointing(selective=selective)
    expected, got = train_step(network, images), train_step(recomputed, images)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


def test_checkpointing_may_be_switched_off_again_and_leaves_the_norms_as_they_were() -> None:
    images, network = golden_numbers.images(2, 64, 96), small_network()
    expected = train_step(copy.deepcopy(network), images)
    network.set_grad_checkpointing()
    train_step(copy.deepcopy(network), images)
    network.set_grad_checkpointing(False)
    got = train_step(network, images)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert {norm.momentum for norm in modules_of(network, nn.BatchNorm2d)} == {0.1}


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network.train()(images)
    kept = sum(storages.values())
    out.sum().backward()
    return kept


def test_checkpointing_needs_less_memory() -> None:
    images = golden_numbers.images(2, 64, 96)
    network = small_network(depths=(2, 2, 6, 2), drop_path_rate=0.5)
    kept = kept_bytes(network, images)
    network.set_grad_checkpointing()
    assert kept_bytes(network, images) < kept / 3


# -------------------------------------------------------------------------------------------------------- torch's tools
@pytest.mark.parametrize(
    ("training", "options"),
    [(False, {}), (True, {}), (True, OTHER_GROUPS[1]), (True, ABLATIONS[0]), (True, ABLATIONS[1])],
    ids=str,
)
def test_torchscript_gives_the_same_values(training: bool, options: dict[str, Any]) -> None:
    network = small_network(drop_path_rate=0.2, **options).train(training)
    images = golden_numbers.images(2, 33, 47)
    for drop_path in modules_of(network, DropPath):
        drop_path.drop_prob = 0.0  # TorchScript draws other random numbers
    scripted = torch.jit.script(copy.deepcopy(network))
    torch.testing.assert_close(scripted(images), network(images))


@pytest.mark.parametrize(
    "options", [dict(return_interm_layers=True), dict(features_only=True, out_indices=(1, 2))], ids=str
)
def test_torchscript_gives_the_same_maps(options: dict[str, Any]) -> None:
    network, images = small_network(**options), golden_numbers.images(2, 33, 47)
    torch.testing.assert_close(torch.jit.script(network)(images), network(images))


def test_a_traced_network_takes_other_sizes() -> None:
    network, images = small_network(), golden_numbers.images(3, 33, 47)
    traced = torch.jit.trace(network, golden_numbers.images(2, 64, 96))
    torch.testing.assert_close(traced(images), network(images))


@pytest.mark.parametrize("training", [False, True])
def test_a_symbolically_traced_network_takes_any_size(training: bool) -> None:
    network, images = small_network(drop_path_rate=0.2).train(training), golden_numbers.images(3, 33, 47)
    traced = torch.fx.symbolic_trace(copy.deepcopy(network))
    torch.manual_seed(0)
    expected = network(images)
    torch.manual_seed(0)
    torch.testing.assert_close(traced(images), expected)


def test_feature_extraction_finds_inner_modules() -> None:
    network, images = small_network(), golden_numbers.images(2, 64, 96)
    extractor = GraphExtractNet(network, ["groupmixformer_backbone.2", "norm4"])
    features, maps = network.forward_intermediates(images)
    torch.testing.assert_close(extractor(images), [maps[2], features])


@pytest.mark.compile
def test_export_gives_the_same_values_for_any_batch() -> None:
    network = small_network(**SHALLOW)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(network, (golden_numbers.images(2, 33, 47),), dynamic_shapes=batch).module()
    images = golden_numbers.images(3, 33, 47)
    torch.testing.assert_close(exported(images), network(images))


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, dict(ABLATIONS[0], relative_position=False, num_heads=1)], ids=str)
def test_export_gives_the_same_values_for_any_size(options: dict[str, Any]) -> None:
    network = small_network(**SHALLOW, **options)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    exported = torch.export.export(network, (golden_numbers.images(2, 64, 96),), dynamic_shapes=sizes).module()
    images = golden_numbers.images(3, 33, 47)
    torch.testing.assert_close(exported(images), network(images))


@pytest.fixture
def fresh_compiler() -> Iterable[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.compile
def test_compile_breaks_no_graph(fresh_compiler: None) -> None:
    network, images = small_network(**SHALLOW).train(), golden_numbers.images(2, 33, 47)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), network(images))


@pytest.mark.compile
def test_compile_and_checkpointing_go_together(fresh_compiler: None) -> None:
    network, images = small_network(**SHALLOW, drop_path_rate=0.2), golden_numbers.images(2, 64, 96)
    expected = train_step(copy.deepcopy(network), images)
    network.set_grad_checkpointing()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    got = train_step(compiled, images)
    for name, value in expected.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}"], value, msg=name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_compute_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    network, images = small_network(drop_path_rate=0.2), golden_numbers.images(2, 33, 47)
    assert torch.equal(copied(network)(images), network(images))


@pytest.mark.parametrize(
    ("training", "memory_format"), [(False, torch.channels_last), (True, torch.contiguous_format)], ids=str
)
def test_tokens_and_maps_share_one_layout(training, memory_format) -> None:
    """Whatever the layout of the images: a transposed one would be copied in every norm and convolution."""
    network = timm.create_model("groupmixformer_miny", depths=(1, 2, 2, 1), num_classes=10).train(training)
    layouts = []

    def note(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        else:
            layouts.append(inputs[0].is_contiguous())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.LayerNorm | nn.Linear):
            module.register_forward_hook(note)
    network(torch.randn(2, 3, 64, 96).contiguous(memory_format=memory_format))
    assert len(layouts) > 80 and all(layouts)


def test_channels_last_gives_the_same_values() -> None:
    network, images = small_network().double(), golden_numbers.images(2, 64, 96).double()
    expected = network(images)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images), expected)
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite_and_near(dtype: torch.dtype) -> None:
    network, images = small_network(**WIDE), golden_numbers.images(2, 64, 96)
    with torch.autocast("cpu", dtype=dtype):
        logits, step = network(images), train_step(copy.deepcopy(network), images)
    assert logits.dtype == dtype
    assert relative_error(logits, network(images)) < 8 * torch.finfo(dtype).eps
    assert all(value.isfinite().all() for value in step.values())


def test_an_empty_batch_gives_no_logits() -> None:
    assert small_network()(torch.empty(0, 3, 64, 64)).shape == (0, 7)


def test_gradients_of_each_image_by_vmap() -> None:
    """As for influence functions or private training; the layout of the maps must not stand in the way."""
    network, images = small_network().double(), golden_numbers.images(2, 32, 64).double()
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(network, values, (image[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for number, image in enumerate(images):
        alone = torch.func.grad(loss)(parameters, image)
        got = torch.cat([together[name][number].flatten() for name in alone])
        assert relative_error(got, torch.cat([value.flatten() for value in alone.values()])) < 1e-12

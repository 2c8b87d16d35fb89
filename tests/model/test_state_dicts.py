"""What state dicts say about the network: sizes, variant, classes; heads that are mapped or replaced."""

import pytest
import timm
import torch
from small_networks import ABLATIONS, OTHER_GROUPS, SMALL, small_network
from torch import Tensor

from models import VARIANTS, GroupMixFormer
from models.weights import Architecture, architecture_of, map_head, network_of, num_classes_of, take_head


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_recognised_by_their_shapes(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=3, in_chans=1, qkv_bias=False).state_dict()
    assert str(architecture_of(state)) == architecture_of(state).variant == name
    shapes = {key: value.shape for key, value in network_of(state).state_dict().items()}
    assert shapes == {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize(
    "options", [{}, *OTHER_GROUPS, dict(group_sizes=(), embed_dims=(16,) * 4), *ABLATIONS[:3]], ids=str
)
def test_sizes_are_read_off_the_shapes(options: dict) -> None:
    sizes = {**SMALL, "group_sizes": (3, 5, 7), "local_branch": True, "relative_position": True, **options}
    num_classes, _ = sizes.pop("num_classes"), sizes.pop("num_heads", None)
    state = small_network(**options).state_dict()
    architecture = architecture_of(state)
    assert {key: getattr(architecture, key) for key in sizes} == sizes
    assert architecture == Architecture.of(**sizes) and not architecture.variant
    assert num_classes_of(state) == num_classes
    words = ("group_sizes", "without the local branch", "without the relative position")
    changed = (sizes["group_sizes"] != (3, 5, 7), not sizes["local_branch"], not sizes["relative_position"])
    assert tuple(word in str(architecture) for word in words) == changed
    shapes = {key: value.shape for key, value in network_of(state).state_dict().items()}
    assert shapes == {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize(
    "options", [dict(group_sizes=(3, 3, 3)), dict(local_branch=False), dict(relative_position=False)], ids=str
)
def test_a_changed_variant_has_no_name(options: dict) -> None:
    with torch.device("meta"):
        state = timm.create_model("groupmixformer_miny", **options).state_dict()
    assert not architecture_of(state).variant


def test_a_ratio_whose_product_rounds_down_is_recovered() -> None:
    hidden = GroupMixFormer(embed_dims=(100,) * 4, depths=(1,) * 4, mlp_ratios=(1.15,) * 4, num_classes=0)
    assert int(100 * (114 / 100)) == 113, "the case"
    network_of(hidden.state_dict()).load_state_dict(hidden.state_dict(), assign=True)


MLP = "groupmixformer_backbone.{}.gma_stage.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(2, 3)},
        {MLP.format(1): torch.zeros(20, 10)},
        {MLP.format(0): torch.zeros(20, 0)},
        {MLP.format(0): torch.zeros(20)},
        {MLP.format(0): torch.zeros(20, 10)},
        {MLP.format(0): torch.zeros(20, 10), "conv_stem.proj1.weight": torch.zeros(5)},
        {MLP.format(0): torch.zeros(20, 11), "conv_stem.proj1.weight": torch.zeros(5, 3, 3, 3)},
    ],
    ids=lambda state: " ".join(f"{name}{tuple(value.shape)}" for name, value in state.items()),
)
def test_what_is_no_such_network_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError):
        network_of(state)


def test_heads_are_mapped_and_replaced() -> None:
    state, rows = small_network().state_dict(), [6, 0, 0]
    before = dict(state)
    map_head(state, rows, num_classes=3)
    assert torch.equal(state["head.weight"], before["head.weight"][rows]) and num_classes_of(state) == 3
    assert torch.equal(state["head.bias"], before["head.bias"][rows])
    other = small_network(num_classes=2)
    take_head(state, other)
    assert state["head.weight"] is not before["head.weight"] and num_classes_of(state) == 2
    other.load_state_dict(state)


@pytest.mark.parametrize(
    ("rows", "words"), [([0, 7], "from 0 to 6, has 2 from 0 to 7"), ([0], "needs 2"), ([-1, 0], "from -1")], ids=str
)
def test_rows_that_do_not_fit_are_refused_with_their_numbers(rows: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        map_head(small_network().state_dict(), rows, num_classes=2)
    with pytest.raises(ValueError, match=r"head\.weight and head\.bias"):
        map_head({"head.weight": torch.zeros(9, 4)}, rows, num_classes=2)

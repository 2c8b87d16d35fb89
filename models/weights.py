"""What the names and shapes in a state dict of this network mean. Needs torch and timm alone; raises ValueError.

Here are only state dicts: reading files, and messages that name a file, belong to the callers.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from .groupmixformer import GROUP_SIZES, VARIANTS, GroupMixFormer, unwrap

FIRST_CONVOLUTION = "conv_stem.proj1.weight"
HEAD_KEYS = ("head.weight", "head.bias")
_FIRST_MLP_LAYER = re.compile(r"groupmixformer_backbone\.(\d+)\.gma_stage\.(\d+)\.mlp\.fc1\.weight")
_ATTENTION = "groupmixformer_backbone.0.gma_stage.0.att."
_GROUP_CONVOLUTION = re.compile(re.escape(_ATTENTION) + r"aggregator\.agg(\d)\.conv1\.weight")


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network that its weights show. The number of heads leaves no trace in them."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_dims: tuple[int, ...]  # hidden channels of the MLP, of each stage
    group_sizes: tuple[int, ...]
    local_branch: bool = True
    relative_position: bool = True

    @classmethod
    def of(
        cls,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        group_sizes: Sequence[int] = GROUP_SIZES,
        local_branch: bool = True,
        relative_position: bool = True,
    ) -> "Architecture":
        """From the arguments of `GroupMixFormer`."""
        mlp_dims = (int(dim * ratio) for dim, ratio in zip(embed_dims, mlp_ratios))
        sizes = map(tuple, (embed_dims, depths, mlp_dims, group_sizes))
        return cls(*sizes, local_branch, relative_position)

    @property
    def mlp_ratios(self) -> tuple[float, ...]:
        """Ratios that give `mlp_dims`."""
        ratios = ((hidden, dim, hidden / dim) for hidden, dim in zip(self.mlp_dims, self.embed_dims))
        # The network rounds dim * ratio down, and the ratio of the division may be a little too small.
        return tuple(r if int(dim * r) == hidden else math.nextafter(r, math.inf) for hidden, dim, r in ratios)

    @property
    def variant(self) -> str:
        """Name of the published variant of these sizes, '' for none."""
        sizes = ("embed_dims", "depths", "mlp_ratios")
        return next((name for name, of in VARIANTS.items() if self == self.of(*(of[size] for size in sizes))), "")

    def __str__(self) -> str:
        sizes = ("embed_dims", "depths", "mlp_ratios") + ("group_sizes",) * (self.group_sizes != GROUP_SIZES)
        words = [f"{size} {getattr(self, size)}" for size in sizes]
        words += ["without the local branch"] * (not self.local_branch)
        words += ["without the relative position"] * (not self.relative_position)
        return self.variant or "GroupMixFormer " + ", ".join(words)


def normalize(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict of a GroupMixFormer under its own names, whatever has wrapped it, and the names of all else.

    Counters of batch norms that a file lacks are 0, as torch's strict load takes them. Raises ValueError where it holds
    no such network, or several.
    """
    names = unwrap({name: name for name in state})
    own = {name: state[before] for name, before in names.items()}
    architecture_of(own)
    for name in [name for name in own if name.endswith("running_var")]:
        own.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    taken = set(names.values())
    return own, [name for name in state if name not in taken]


def num_classes_of(state: dict[str, Tensor]) -> int:
    """Rows of the classifier; 0 where there is none."""
    head = state.get("head.weight")
    return 0 if head is None or head.ndim != 2 else len(head)


def architecture_of(state: dict[str, Tensor]) -> Architecture:
    """Sizes of the network whose state dict this is; ValueError where it is not one of a GroupMixFormer."""
    mlps = {found: state[name] for name in state if (found := _FIRST_MLP_LAYER.fullmatch(name))}
    blocks = {(int(m[1]), int(m[2])): weight.shape for m, weight in mlps.items() if weight.ndim == 2 and weight.numel()}
    num_stages = len({stage for stage, _ in blocks})
    if not blocks or any((stage, 0) not in blocks for stage in range(num_stages)):
        raise ValueError("holds no weights of a GroupMixFormer")
    groups = {int(m[1]): state[name] for name in state if (m := _GROUP_CONVOLUTION.fullmatch(name))}
    attends = f"{_ATTENTION}proj.weight" in state  # else what is missing there says nothing
    return Architecture(
        embed_dims=tuple(blocks[stage, 0][1] for stage in range(num_stages)),
        depths=tuple(sum(stage == s for s, _ in blocks) for stage in range(num_stages)),
        mlp_dims=tuple(blocks[stage, 0][0] for stage in range(num_stages)),
        group_sizes=tuple(groups[number].shape[-1] for number in sorted(groups) if groups[number].ndim == 4),
        local_branch=not attends or f"{_ATTENTION}aggregator.agg0.conv.conv1.weight" in state,
        relative_position=not attends or f"{_ATTENTION}crpe.conv_list.0.weight" in state,
    )


def network_of(state: dict[str, Tensor]) -> GroupMixFormer:
    """The network whose state dict this is, without storage (on `meta`); ValueError where it is none.

    Its sizes follow from some of the entries: the state dict may lack others, or have more.
    """
    sizes, stem = architecture_of(state), state.get(FIRST_CONVOLUTION)
    if stem is None or stem.ndim != 4:
        raise ValueError("holds no weights of a GroupMixFormer")
    with torch.device("meta"):
        return GroupMixFormer(
            num_classes_of(state),
            in_chans=stem.shape[1],
            embed_dims=sizes.embed_dims,
            depths=sizes.depths,
            mlp_ratios=sizes.mlp_ratios,
            num_heads=1,  # whatever it is, the shapes are these
            group_sizes=sizes.group_sizes,
            local_branch=sizes.local_branch,
            relative_position=sizes.relative_position,
            qkv_bias="groupmixformer_backbone.0.gma_stage.0.att.qkv.bias" in state,
        )


def map_head(state: dict[str, Tensor], rows: Sequence[int], num_classes: int) -> None:
    """Make row `rows[i]` of the head the one of class i, in place: of ImageNet-21k's rows, the 1000 of ImageNet-1k.

    Raises ValueError where the head has no such rows, or they are not as many as the classes.
    """
    if not set(HEAD_KEYS) <= set(state):
        raise ValueError(f"no {' and '.join(HEAD_KEYS)}")
    last = num_classes_of(state) - 1
    if len(rows) != num_classes or not all(0 <= row <= last for row in rows):
        raise ValueError(
            f"needs {num_classes} row numbers from 0 to {last}, has {len(rows)} from {min(rows, default=0)} to "
            f"{max(rows, default=0)}"
        )
    state.update({key: state[key][list(rows)] for key in HEAD_KEYS})


def take_head(state: dict[str, Tensor], network: GroupMixFormer) -> None:
    """Replace the head in a state dict by that of a network, in place."""
    state.update({key: value for key, value in network.state_dict().items() if key in HEAD_KEYS})


def sum_colours(state: dict[str, Tensor], network: GroupMixFormer) -> bool:
    """Fit the stem of a state dict for colour to a network for grey images, in place, as timm does; whether it did."""
    weight = state.get(FIRST_CONVOLUTION)
    if network.in_chans != 1 or weight is None or weight.ndim != 4 or weight.shape[1] != 3:
        return False
    state[FIRST_CONVOLUTION] = adapt_input_conv(1, weight)
    return True


def take_last_norm(state: dict[str, Tensor], network: GroupMixFormer) -> bool:
    """Where a state dict has no last norm, as backbones of detectors, take the network's, in place; whether it did."""
    norm = {key: value for key, value in network.state_dict().items() if key.startswith("norm4.")}
    if norm.keys() & state.keys():
        return False
    state.update(norm)
    return True

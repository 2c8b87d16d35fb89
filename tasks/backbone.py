"""The network's four stage maps as the backbone of detectors and segmenters, and the keys that these tasks share."""

from typing import Any

from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError
from configs.keys import Key, Rule, network, one_of
from models.groupmixformer import prefixed_matcher
from models.weights import normalize
from utils.checkpoint import load_exactly, load_file, select_weights

from .networks import build_model

_COLOUR = Rule(lambda value, _: value == 3, "must be 3: TASK {TASK} reads its images in colour")

# fmt: off
KEYS: dict[str, Key] = {
    "MODEL.GMA.IN_DIM": network(3, "channels of the input", _COLOUR),
    "MODEL.STAGE_NORM": network(
        "none", "norm on each stage map: none as released, 'layer' as in Swin, or 'batch'",
        one_of("none", "layer", "batch")),
    "MODEL.BATCH_NORM": network(
        "train", "batch norms of the backbone: trained, or frozen as pretrained", one_of("train", "frozen")),
}
# fmt: on
_NORMS = {"none": lambda dim: nn.Identity(), "layer": LayerNorm2d, "batch": nn.BatchNorm2d}
_CLASSIFIER = ("norm4.", "head.")  # parameters behind the last stage map


class Backbone(nn.Module):
    """(B, 3, H, W) -> maps of the four stages at strides 4, 8, 16, 32, [(B, C_i, ceil(H/stride), ceil(W/stride))].

    Args:
        config: MODEL.GMA describes the network, MODEL.STAGE_NORM the norm of each map; with MODEL.BATCH_NORM 'frozen',
            batch norms are a fixed scale and shift by their running statistics (timm's).
        first_stage: maps of earlier stages, counted from 0, are left out.

    `body` is the network without its last norm and classifier; its names are those of released files.
    """

    def __init__(self, config: CfgNode, first_stage: int = 0) -> None:
        super().__init__()
        self.body = build_model(config)
        self.first_stage = first_stage
        channels: list[int] = [info["num_chs"] for info in self.body.feature_info]
        self.body.prune_intermediate_layers(len(channels), prune_norm=True)  # unused parameters stop DDP
        self.channels = channels[first_stage:]  # of the maps
        if config.MODEL.BATCH_NORM == "frozen":
            freeze_batch_norm_2d(self.body)
        self.norms = nn.ModuleList(_NORMS[config.MODEL.STAGE_NORM](dim) for dim in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.forward_stages(images)[self.first_stage :]
        return [norm(stage_map) for norm, stage_map in zip(self.norms, maps)]

    def load(self, path: str) -> str:
        """Load a classifier's weights, released or ours, without norm and head; returns what was loaded, for the log.

        Raises UserError where they do not fit.
        """
        state, kind = select_weights(load_file(path), "best", path)
        try:
            state, _ = normalize(state)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        own = self.body.state_dict()
        fits = {
            name: value
            for name, value in state.items()
            # Frozen batch norms have no counter.
            if name in own or not (name.startswith(_CLASSIFIER) or name.endswith(".num_batches_tracked"))
        }
        load_exactly(self.body, fits, path)
        return f"{kind} of {path}, for the backbone; the rest is fresh"

    def group_matcher(self, prefix: str, coarse: bool = False) -> dict[str, Any]:
        """The body's patterns for layer-wise learning rate decay, for a network whose `prefix` it is ('backbone.').

        What is not the body's, and the maps' norms, come last: they get the full learning rate.
        """
        return prefixed_matcher(self.body.group_matcher(coarse), f"{prefix}body.")


def check_frozen_norms(config: CfgNode) -> None:
    """Raise UserError where fresh batch norms would be frozen: they would normalise nothing."""
    if config.MODEL.BATCH_NORM == "frozen" and not config.MODEL.PRETRAINED and not config.MODEL.RESUME:
        raise UserError(
            "MODEL.BATCH_NORM = 'frozen': needs pretrained statistics; give weights with --pretrained, or set it to "
            "'train'"
        )

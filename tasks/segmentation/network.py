"""The network of segmentation: backbone, head, auxiliary head."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError
from configs.errors import first_line

from ..backbone import Backbone
from .heads import FCNHead, SemanticFPN, UPerNet, resize
from .smp import SmpDecoder

_HEADS = {"semantic_fpn": SemanticFPN, "upernet": UPerNet}
AUX_STAGE = 2  # the auxiliary head is on stage 3, counted from 1
_SMP_STRIDE = 32  # decoders of segmentation_models_pytorch join maps that must double in size


class Segmenter(nn.Module):
    """(B, 3, H, W) -> logits (B, K, H, W); in training, the list of these and of the auxiliary head's, if it has one.

    Args:
        config: MODEL describes it; MODEL.GMA.NUM_CLASSES is K.
        auxiliary: build the auxiliary head, which only training uses.

    Any height and width of at least 32.
    """

    def __init__(self, config: CfgNode, auxiliary: bool = True) -> None:
        super().__init__()
        model, num_classes = config.MODEL, config.MODEL.GMA.NUM_CLASSES
        self.backbone = Backbone(config)
        channels = self.backbone.channels
        if len(channels) != 4:
            raise UserError(f"MODEL.GMA.NUM_STAGES = {len(channels)}: segmentation heads take the maps of four stages")
        self.divisor = 1
        if model.HEAD.startswith("smp:"):
            self.head: nn.Module = SmpDecoder(model.HEAD.removeprefix("smp:"), channels, num_classes)
            self.divisor = _SMP_STRIDE
        else:
            self.head = _HEADS[model.HEAD](channels, num_classes, model.HEAD_CHANNELS, model.HEAD_DROPOUT)
        auxiliary = auxiliary and model.AUX_WEIGHT > 0
        self.auxiliary = FCNHead(channels[AUX_STAGE], num_classes, model.HEAD_DROPOUT) if auxiliary else None

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        height, width = images.shape[2:]
        padded = [-size % self.divisor for size in (height, width)]
        if any(padded):
            images = F.pad(images, (0, padded[1], 0, padded[0]))
        maps = self.backbone(images)
        size = images.shape[2:]
        logits = resize(self.head(maps), size)[:, :, :height, :width]
        if not self.training:
            return logits
        if self.auxiliary is None:
            return [logits]
        return [logits, resize(self.auxiliary(maps[AUX_STAGE]), size)[:, :, :height, :width]]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return self.backbone.group_matcher("backbone.", coarse)


def check_one_step(network: nn.Module, images_per_step: int, crop: Sequence[int]) -> None:
    """Raise UserError where a batch of this size cannot be trained on, such as one image by UPerNet.

    Nothing is computed: the network runs on torch's `meta` device, which knows shapes alone.
    """
    trial = copy.deepcopy(network).to("meta").train()
    try:
        trial(torch.empty(images_per_step, 3, *crop, device="meta"))
    except (ValueError, RuntimeError) as error:
        if "more than 1 value per channel" in str(error):
            raise UserError(
                f"--batch-size: this network cannot train on {images_per_step} image of {crop[0]} x {crop[1]}, because "
                "a batch norm gets one value of each channel; give at least 2, or MODEL.HEAD 'semantic_fpn'"
            ) from None
        raise UserError(f"MODEL.HEAD: does not train on crops of {crop[0]} x {crop[1]}: {first_line(error)}") from None

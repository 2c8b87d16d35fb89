"""torchvision's detectors on the backbone's stage maps, by way of a feature pyramid."""

import math
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper
from yacs.config import CfgNode

from data import normalize
from tasks.backbone import Backbone

STRIDES = (4, 8, 16, 32)  # of the levels that regions are taken from
BOX_FEATURES = 1024  # outputs of torchvision's box head
ASPECT_RATIOS = (0.5, 1.0, 2.0)
# What depends on the classes: new for a data set of others.
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.", "head.classification_head.cls_logits.")


class Pyramid(nn.Module):
    """(B, 3, H, W) -> {name: map (B, MODEL.PYRAMID_CHANNELS, ...)} of five levels, each half of the one before.

    Two-stage detectors take strides 4 to 64, the last by subsampling. One-stage ones take 8 to 128, the last two by
    convolutions on the last stage map.
    """

    def __init__(self, config: CfgNode, two_stage: bool) -> None:
        super().__init__()
        self.out_channels = config.MODEL.PYRAMID_CHANNELS
        self.maps = Backbone(config, first_stage=0 if two_stage else 1)
        extra = LastLevelMaxPool() if two_stage else LastLevelP6P7(self.maps.channels[-1], self.out_channels)
        self.fpn = FeaturePyramidNetwork(self.maps.channels, self.out_channels, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), stage_map) for level, stage_map in enumerate(self.maps(images))))


class _Normalize(GeneralizedRCNNTransform):
    """Normalises uint8 images (3, H, W) and pads them to one batch. The data set has resized them, by sample.

    Padding is at the right and bottom, to multiples of 32. Detections stay as the heads give them: boxes in pixels of
    the input, masks of 28 x 28 in their box.
    """

    def __init__(self) -> None:
        super().__init__(min_size=0, max_size=0, image_mean=[], image_std=[])

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        normalized = [normalize(image.movedim(0, -1)) if not image.is_floating_point() else image for image in images]
        return ImageList(self.batch_images(normalized, self.size_divisible), sizes), targets

    def postprocess(self, result: list[dict[str, Tensor]], *sizes: Any) -> list[dict[str, Tensor]]:
        return result


class _OnStageMaps:
    """What a run asks of its network, for each of torchvision's detectors."""

    first_label = 0  # of the first class

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for layer-wise learning rate decay: pyramid and heads come last."""
        return self.backbone.maps.group_matcher("backbone.maps.", coarse)


class _MaskRCNN(_OnStageMaps, detection.MaskRCNN):
    first_label = 1  # label 0 is no object


class _FasterRCNN(_OnStageMaps, detection.FasterRCNN):
    first_label = 1


class _RetinaNet(_OnStageMaps, detection.RetinaNet):
    pass


def build_detector(config: CfgNode, num_classes: int) -> nn.Module:
    """MODEL.DETECTOR with fresh weights.

    In training mode: (images, targets) -> {name: loss}. In evaluation mode: images -> a dict for each, with boxes
    (N, 4), scores (N), labels (N) and of mask_rcnn masks (N, 1, 28, 28), probabilities. Images are a list of uint8
    (3, H, W), targets as `transforms` describes them; labels start at the network's `first_label`.
    """
    name, sizes = config.MODEL.DETECTOR, config.MODEL.ANCHOR_SIZES
    channels, kept = config.MODEL.PYRAMID_CHANNELS, config.TEST.MAX_DETECTIONS
    if name in ("mask_rcnn", "faster_rcnn"):
        kind, outputs, masks = _FasterRCNN, num_classes + _FasterRCNN.first_label, {}
        if name == "mask_rcnn":
            kind = _MaskRCNN
            masks["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, dilation=1)
            masks["mask_predictor"] = MaskRCNNPredictor(channels, channels, outputs)
        network = kind(
            Pyramid(config, two_stage=True),
            rpn_anchor_generator=AnchorGenerator([(size,) for size in sizes], [ASPECT_RATIOS] * len(sizes)),
            box_predictor=FastRCNNPredictor(BOX_FEATURES, outputs),
            box_batch_size_per_image=config.TRAIN.REGIONS,
            box_detections_per_img=kept,
            **masks,
        )
        for pool in filter(None, (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool)):
            # Left to itself, it would guess the strides from its first batch and keep the guess. A continued run, which
            # has another first batch, would differ.
            pool.scales = [1 / stride for stride in STRIDES]
            pool.map_levels = initLevelMapper(*(int(math.log2(stride)) for stride in (STRIDES[0], STRIDES[-1])))
    else:
        octaves = [tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in sizes]
        anchors = AnchorGenerator(octaves, [ASPECT_RATIOS] * len(sizes))
        pyramid = Pyramid(config, two_stage=False)
        network = _RetinaNet(pyramid, num_classes, anchor_generator=anchors, detections_per_img=kept)
    network.transform = _Normalize()
    return network

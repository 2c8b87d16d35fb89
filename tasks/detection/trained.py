"""A detector in other code."""

import torch
from PIL import Image
from yacs.config import CfgNode

from data.decoding import to_rgb, upright
from utils.precision import Precision

from ..trained import TrainedModel
from .images import eval_view
from .inference import Detections, detect
from .weights import load_detector


def load(config: CfgNode, path: str, device: torch.device) -> TrainedModel:
    """The detector of a checkpoint; `predict` gives `Detections` in pixels of the picture, upright as its EXIF says.

    The network itself counts labels from its `first_label`; those of `predict` are class indices.
    """
    network, known, _ = load_detector(config, path, None)
    network.to(device).eval()
    precision = Precision(device.type, torch.bfloat16, enabled=False)

    def predict(picture: Image.Image) -> Detections:
        picture = upright(to_rgb(picture))
        view = eval_view(picture, config).to(device)
        return detect(network, view, (picture.height, picture.width), precision)

    return TrainedModel(network, known["classes"], predict, config)

"""A detector in other code."""

import torch
from PIL import Image
from yacs.config import CfgNode

from utils.precision import Precision

from ..trained import TrainedModel
from .images import eval_view
from .inference import Detections, detect
from .weights import load_detector


def load(config: CfgNode, path: str, device: torch.device) -> TrainedModel:
    """The detector of a checkpoint; `predict` gives `Detections` in pixels of the picture.

    The network itself counts labels from its `first_label`; those of `predict` are class indices.
    """
    network, known, _ = load_detector(config, path, None)
    network.to(device).eval()
    precision = Precision(device.type, torch.bfloat16, enabled=False)

    def predict(picture: Image.Image) -> Detections:
        view = eval_view(picture.convert("RGB"), config).to(device)
        return detect(network, view, (picture.height, picture.width), precision)

    return TrainedModel(network, known["classes"], predict, config)

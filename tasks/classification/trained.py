"""A classifier in other code."""

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from data.decoding import to_rgb

from ..trained import TrainedModel
from .inference import class_probabilities
from .transforms import eval_transform
from .weights import load_classifier


def load(config: CfgNode, path: str, device: torch.device) -> TrainedModel:
    """The classifier of a file of weights; `predict` gives the probability of each class, (K,) on the CPU."""
    network, classes, _ = load_classifier(config, path)
    network.to(device)
    transform = eval_transform(config)

    @torch.inference_mode()
    def predict(picture: Image.Image) -> Tensor:
        logits = network(transform(to_rgb(picture))[None].to(device))
        return class_probabilities(config, logits)[0].float().cpu()

    return TrainedModel(network, classes, predict, config)

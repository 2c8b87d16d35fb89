"""Object detection and instance segmentation: COCO's JSON, torchvision's detectors, COCO's average precision."""

import torch
from yacs.config import CfgNode

from utils.session import Session
from utils.task import Task

from ..trained import TrainedModel
from .keys import KEYS

__all__ = ["KEYS", "build", "evaluate", "load"]


def build(session: Session) -> Task:
    from .task import build  # imported lazily: it is slow

    return build(session)


def evaluate(session: Session) -> None:
    from .evaluation import evaluate  # imported lazily: training does not need it

    evaluate(session)


def load(config: CfgNode, path: str, device: torch.device) -> TrainedModel:
    from .trained import load  # imported lazily: it is slow

    return load(config, path, device)

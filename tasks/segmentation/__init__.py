"""Semantic segmentation: images with a mask of classes each, cross-entropy, mean IoU."""

from utils.session import Session
from utils.task import Task

from .keys import KEYS

__all__ = ["KEYS", "build", "evaluate"]


def build(session: Session) -> Task:
    from .task import build  # imported lazily: it is slow

    return build(session)


def evaluate(session: Session) -> None:
    from .evaluation import evaluate  # imported lazily: training does not need it

    evaluate(session)

"""Data: sources (folders, zip files), datasets, transforms, the order of samples, loaders."""

from .loaders import (
    TrainingData,
    build_eval_loader,
    build_prediction_loader,
    check_val_classes,
    open_split,
    usable_workers,
)
from .randomness import TRAINING_STEP, seed_everything
from .sources import Source, fingerprint
from .transforms import build_mixup, denormalize

__all__ = [
    "TRAINING_STEP",
    "Source",
    "TrainingData",
    "build_eval_loader",
    "build_mixup",
    "build_prediction_loader",
    "check_val_classes",
    "denormalize",
    "fingerprint",
    "open_split",
    "seed_everything",
    "usable_workers",
]

"""Data: sources (folders, zip files), datasets, transforms, the order of samples, loaders."""

from .datasets import ImageDataset
from .loaders import (
    TrainingData,
    build_eval_loader,
    build_prediction_loader,
    check_val_classes,
    open_split,
    usable_workers,
)
from .normalization import denormalize, normalize
from .randomness import TRAINING_STEP, seed_everything
from .sources import Source, class_folders, fingerprint

__all__ = [
    "TRAINING_STEP",
    "ImageDataset",
    "Source",
    "TrainingData",
    "build_eval_loader",
    "build_prediction_loader",
    "check_val_classes",
    "class_folders",
    "denormalize",
    "fingerprint",
    "normalize",
    "open_split",
    "seed_everything",
    "usable_workers",
]

"""Data: sources (folders, zip files), datasets, transforms, the order of samples, loaders."""

from .loaders import build_eval_loader, build_train_loader, check_val_classes, open_split, usable_workers
from .randomness import TRAINING_STEP, seed_everything
from .samplers import TrainingOrder
from .sources import Source
from .transforms import build_mixup, denormalize

__all__ = [
    "TRAINING_STEP",
    "Source",
    "TrainingOrder",
    "build_eval_loader",
    "build_mixup",
    "build_train_loader",
    "check_val_classes",
    "denormalize",
    "open_split",
    "seed_everything",
    "usable_workers",
]

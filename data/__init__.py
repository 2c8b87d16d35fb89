"""Data, for any task: sources (folders, zip files), decoding, the order of samples, seeding, loaders."""

from .datasets import ImageDataset
from .files import class_folders
from .loaders import TrainingData, build_eval_loader
from .normalization import denormalize, normalize
from .randomness import TRAINING_STEP, seed_everything
from .samplers import ClassBalance
from .sources import Source, fingerprint
from .stages import as_stages, in_epoch, map_stages
from .workers import end_loader_workers, lost_loader_worker, usable_workers

__all__ = [
    "TRAINING_STEP",
    "ClassBalance",
    "ImageDataset",
    "Source",
    "TrainingData",
    "as_stages",
    "build_eval_loader",
    "class_folders",
    "denormalize",
    "end_loader_workers",
    "fingerprint",
    "in_epoch",
    "lost_loader_worker",
    "map_stages",
    "normalize",
    "seed_everything",
    "usable_workers",
]

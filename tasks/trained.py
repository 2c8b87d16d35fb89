"""A trained network in other code: `tasks.load_model`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image
from torch import nn
from yacs.config import CfgNode


class TrainedModel(NamedTuple):
    """A network in evaluation mode, and what it takes to use it."""

    network: nn.Module  # takes and returns what its class says
    classes: list[str]  # by class index
    predict: Callable[[Image.Image], Any]  # what `test.py --images` computes of a picture; see the task's `load`
    config: CfgNode

"""Configuration: a card for every key, the YAML of each variant, and the command line."""

from .errors import UserError
from .keys import SPLIT_NAMES
from .load import edges, image_size, read_command, read_config, with_num_classes, with_values

__all__ = [
    "SPLIT_NAMES",
    "UserError",
    "edges",
    "image_size",
    "read_command",
    "read_config",
    "with_num_classes",
    "with_values",
]

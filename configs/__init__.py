"""Configuration: every key with its default and meaning, the YAML of each variant, and the command line."""

from .arguments import parse_args
from .defaults import SPLIT_NAMES, get_config, with_num_classes, with_values
from .errors import UserError

__all__ = ["SPLIT_NAMES", "UserError", "get_config", "parse_args", "with_num_classes", "with_values"]

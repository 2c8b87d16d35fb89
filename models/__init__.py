"""The GroupMixFormer network; importing this package registers its variants with timm."""

from argparse import Namespace
from collections import OrderedDict

from torch.serialization import add_safe_globals

from .groupmixformer import VARIANTS, GroupMixFormer

__all__ = ["PLAIN_TYPES", "VARIANTS", "GroupMixFormer"]

# Files are opened with weights_only=True, here and by timm, which refuses released training checkpoints for the yacs
# CfgNode in them: read as the mapping that it is, it runs no code. The Namespace in timm's own is a bag of values.
PLAIN_TYPES = [(OrderedDict, "yacs.config.CfgNode"), Namespace]
add_safe_globals(PLAIN_TYPES)

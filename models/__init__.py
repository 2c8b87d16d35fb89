"""The GroupMixFormer network; importing this package registers its variants with timm."""

from collections import OrderedDict

from torch.serialization import add_safe_globals

from .build import build_model
from .groupmixformer import VARIANTS, GroupMixFormer

__all__ = ["VARIANTS", "GroupMixFormer", "build_model"]

# timm opens files with weights_only=True, and refuses released training checkpoints for the yacs CfgNode in them. Read
# as the mapping that it is, it runs no code.
add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])

"""The GroupMixFormer network; importing this package registers its variants with timm."""

from .build import build_model
from .groupmixformer import VARIANTS, GroupMixFormer

__all__ = ["VARIANTS", "GroupMixFormer", "build_model"]

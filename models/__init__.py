"""The GroupMixFormer network; importing this package registers its variants with timm."""

from .groupmixformer import VARIANTS, GroupMixFormer

__all__ = ["VARIANTS", "GroupMixFormer"]

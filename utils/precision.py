"""The precision of computation: float32, or autocast."""

from dataclasses import dataclass

import torch
from yacs.config import CfgNode

from configs import with_values


@dataclass(frozen=True)
class Precision:
    """How numbers are computed: float32, or autocast to `dtype`."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def __str__(self) -> str:
        return f"autocast to {str(self.dtype).removeprefix('torch.')}" if self.enabled else "float32"


def build_precision(config: CfgNode, device: torch.device) -> Precision:
    """AMP_OPT_LEVEL and AMP_DTYPE as configured; autocast is the default on GPUs, float32 on CPU."""
    level = config.AMP_OPT_LEVEL or ("O1" if device.type == "cuda" else "O0")
    return Precision(device.type, getattr(torch, config.AMP_DTYPE), enabled=level != "O0")


def unusual_precision(config: CfgNode, device: torch.device) -> list[str]:
    """What a folder's name says of the precision: its type, or nothing where it is the device's default."""
    default = with_values(config, {"AMP_OPT_LEVEL": "", "AMP_DTYPE": "bfloat16"})
    precision, usual = (str(build_precision(each, device)) for each in (config, default))
    return [precision.split()[-1]] * (precision != usual)


def build_scaler(precision: Precision) -> torch.amp.GradScaler:
    """Loss scaling for float16; for other precisions it passes everything through."""
    return torch.amp.GradScaler(precision.device_type, enabled=precision.enabled and precision.dtype == torch.float16)

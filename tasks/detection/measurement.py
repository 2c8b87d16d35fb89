"""Size and speed of a detector at 800 x 1280. Needs neither data nor weights."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from tasks.measurement import measure_throughput
from utils.files import write_json
from utils.precision import build_precision
from utils.run_log import peak_memory_mib
from utils.session import Session

from .detectors import build_detector

HEIGHT, WIDTH = 800, 1280  # pixels, as published figures of detectors
PROPOSALS, MASKS = 1000, 100  # regions that a two-stage detector classifies and draws masks of
NUM_CLASSES = 80  # COCO's


def report_flops(session: Session) -> None:
    """Log FLOPs and parameters, by part and in all."""
    parts, parameters = count_flops(session.config)
    total = sum(parts.values())
    for name, flops in parts.items():
        session.logger.info(f"{name:10} {flops / 1e9:8.1f} GFLOPs")
    regions = f", {PROPOSALS} proposals" if "boxes" in parts else ""
    regions += f", {MASKS} masks" if "masks" in parts else ""
    session.logger.info(
        f"{session.config.MODEL.NAME} at {HEIGHT} x {WIDTH}, {NUM_CLASSES} classes{regions}: {total / 1e9:.1f} GFLOPs, "
        f"{parameters:,} parameters"
    )
    _write(session, {"num_classes": NUM_CLASSES, "flops": total, "flops_by_part": parts, "parameters": parameters})


def count_flops(config: CfgNode) -> tuple[dict[str, int], int]:
    """Multiply-adds of one image by part, and the parameters, of the configured detector of COCO's classes."""
    with torch.device("meta"):
        network = build_detector(config, NUM_CLASSES).eval()
    return flops_by_part(network), sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def flops_by_part(network: nn.Module) -> dict[str, int]:
    """Multiply-adds of torchvision's detector, which is on the device 'meta': nothing is computed.

    Which regions there are would depend on the weights; their number is that of published counts.
    """
    images = torch.empty(1, 3, HEIGHT, WIDTH, device="meta")
    kept: list[Any] = []  # what the part before gives
    own = hasattr(network.backbone, "maps")
    parts = {"backbone": _count(lambda: kept.append((network.backbone.maps if own else network.backbone.body)(images)))}
    maps = OrderedDict((str(level), x) for level, x in enumerate(kept[0])) if own else kept[0]
    parts["pyramid"] = _count(lambda: kept.append(network.backbone.fpn(maps)))
    levels = list(kept[1].values())
    if not hasattr(network, "roi_heads"):
        parts["head"] = _count(lambda: network.head(levels))
        return parts
    parts["proposals"] = _count(lambda: network.rpn.head(levels))
    heads = network.roi_heads

    def regions(pool: nn.Module, count: int) -> torch.Tensor:
        return torch.empty(count, network.backbone.out_channels, *pool.output_size, device="meta")

    parts["boxes"] = _count(lambda: heads.box_predictor(heads.box_head(regions(heads.box_roi_pool, PROPOSALS))))
    if heads.has_mask():
        parts["masks"] = _count(lambda: heads.mask_predictor(heads.mask_head(regions(heads.mask_roi_pool, MASKS))))
    return parts


def _count(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two


def report_throughput(session: Session) -> None:
    """Log images/s and peak memory of evaluation on random images, DATA.BATCH_SIZE at a time.

    With fresh weights nothing is found, so that no masks are drawn.
    """
    config, device = session.config, session.processes.device
    network = build_detector(config, NUM_CLASSES).to(device)
    precision = build_precision(config, device)
    steps = {"warmup_steps": 10, "steps": 30} if device.type == "cuda" else {"warmup_steps": 1, "steps": 3}
    speed = measure_throughput(network, (3, HEIGHT, WIDTH), config.DATA.BATCH_SIZE, precision, device, **steps)
    memory = peak_memory_mib(device)
    session.logger.info(
        f"batch size {config.DATA.BATCH_SIZE}, {HEIGHT} x {WIDTH}, {precision}: throughput {speed:.2f} images/s, peak "
        f"memory {memory:.0f} MiB, without masks"
    )
    content = {"batch_size": config.DATA.BATCH_SIZE, "precision": str(precision), "device": str(device)}
    _write(session, {**content, "images_per_second": speed, "peak_memory_mib": memory})


def _write(session: Session, content: dict[str, Any]) -> None:
    if session.args.json and session.processes.is_main:
        about = {"model": session.config.MODEL.NAME, "height": HEIGHT, "width": WIDTH}
        write_json(session.args.json, about | content)

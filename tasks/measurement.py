"""Speed and size of a network: images/s and peak memory, FLOPs and parameters. Needs neither data nor weights."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.files import write_json
from utils.precision import Precision, build_precision
from utils.run_log import peak_memory_mib
from utils.session import Session

Shape = tuple[int, int, int]  # channels, height, width of an image


def report_throughput(session: Session, network: nn.Module, input_shape: Shape) -> None:
    """Log images/s and peak memory of the evaluation forward pass on random images."""
    config, device = session.config, session.processes.device
    precision = build_precision(config, device)
    # A batch takes a GPU some milliseconds, and a CPU many seconds.
    steps = {"warmup_steps": 10, "steps": 30} if device.type == "cuda" else {"warmup_steps": 1, "steps": 5}
    speed = measure_throughput(network, input_shape, config.DATA.BATCH_SIZE, precision, device, **steps)
    memory = peak_memory_mib(device)
    session.logger.info(
        f"batch size {config.DATA.BATCH_SIZE}, {input_shape[1]} x {input_shape[2]}, {precision}: "
        f"throughput {speed:.1f} images/s, peak memory {memory:.0f} MiB"
    )
    _write(
        session,
        {
            "batch_size": config.DATA.BATCH_SIZE,
            "precision": str(precision),
            "device": str(device),
            "images_per_second": speed,
            "peak_memory_mib": memory,
        },
    )


def report_flops(session: Session, network: nn.Module, input_shape: Shape, num_classes: int) -> None:
    """Log FLOPs and parameters, by module and in all."""
    config = session.config
    flops, parameters, table = count_flops(network, input_shape)
    session.logger.info(table)
    session.logger.info(
        f"{config.MODEL.NAME} at {input_shape[1]} x {input_shape[2]}, {num_classes} classes: "
        f"{flops / 1e9:.3f} GFLOPs, {parameters:,} parameters"
    )
    _write(session, {"num_classes": num_classes, "flops": flops, "parameters": parameters})


@torch.no_grad()
def measure_throughput(
    network: nn.Module,
    input_shape: Shape,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    warmup_steps: int,
    steps: int,
) -> float:
    """Images/s of the evaluation forward pass on random images (batch_size, *input_shape), after warming up."""
    network.eval()
    images = torch.randn(batch_size, *input_shape, device=device)
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = 0.0
    for step in range(warmup_steps + steps):
        if step == warmup_steps:
            synchronize()
            start = time.perf_counter()
        with precision.autocast():
            network(images)
    synchronize()
    return steps * batch_size / (time.perf_counter() - start)


def count_flops(network: nn.Module, input_shape: Shape) -> tuple[int, int, str]:
    """FLOPs of one image in evaluation mode, parameters, and the table of both by module.

    fvcore counts, as the paper does: one multiply-add is one.
    """
    with warnings.catch_warnings():  # fvcore compiles a loss of its own at import, with what torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
        from fvcore.nn import FlopCountAnalysis, flop_count_table, parameter_count

    network.eval()
    analysis = FlopCountAnalysis(network, torch.zeros(1, *input_shape, device=next(network.parameters()).device))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(analysis.total()), parameter_count(network)[""], flop_count_table(analysis, max_depth=3)


def _write(session: Session, content: dict[str, Any]) -> None:
    if session.args.json and session.processes.is_main:
        about = {"model": session.config.MODEL.NAME, "image_size": session.config.DATA.IMG_SIZE}
        write_json(session.args.json, about | content)

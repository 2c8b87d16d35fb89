"""What parts of the network reach of the machine's arithmetic and memory speed."""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu.fused import fuse

from .measuring import seconds_of
from .networks import batch_size_of, build_network


def row_roofline(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Speed of the fused network's parts at its third stage, which holds most blocks, against the machine's limits."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    like = {"device": device, "dtype": dtype}
    network = fuse(build_network(args, device).eval()).to(dtype)
    block = network.stages[2][0]
    segment, size = block.segments[3], (args.size // 16, args.size // 16)
    batch_size = batch_size_of(args, device, training=False)
    B, N, C = batch_size, size[0] * size[1], block.proj.weight.shape[0]
    s = C // 5
    tokens = torch.randn(B, N, C, **like)
    hidden = torch.randn(B, N, block.mlp.fc1.weight.shape[0], **like)
    maps3 = torch.randn(B, N, 3 * s, **like).transpose(1, 2).unflatten(2, size)
    maps = tokens.transpose(1, 2).unflatten(2, size)
    # Large enough to show the limits: more than caches hold, and a product that is more than its start.
    edge, mebibytes = (8192, 1024) if on_gpu else (2048, 128)
    square = torch.randn(edge, edge, **like)
    large = torch.ones(mebibytes * 2**20 // square.element_size(), **like)
    parts: dict[str, tuple[Callable[[], Any], float, float]] = {
        f"matrix product {edge}": (lambda: square @ square, 2 * edge**3, 3 * square.nbytes),
        f"copy {mebibytes} MiB": (large.clone, 0, 2 * large.nbytes),
        "MLP 1 with GELU": _linear_part(block.mlp.fc1, tokens),
        "MLP 2": _linear_part(block.mlp.fc2, hidden),
        "q, k, v of a segment": _linear_part(segment.linear, tokens),
        "pointwise of a segment": _linear_part(segment.pointwise, torch.randn(B, N, 3, s, **like)),
        "depthwise 7x7": _conv_part(segment.depthwise, maps3),
        "depthwise 3x3": _conv_part(block.position, maps),
        "layer norm": (lambda: F.layer_norm(tokens, (C,)), 8 * tokens.numel(), 2 * tokens.nbytes),
    }
    calls = 10 if on_gpu else 1  # a GPU is waited for once: what a wait costs is not the part's
    rows = {}
    with torch.inference_mode():
        for name, (run, flops, size_in_bytes) in parts.items():
            times = [seconds_of(lambda run=run: [run() for _ in range(calls)], device) for _ in range(20)][5:]
            rows[name] = {"flops": flops, "bytes": size_in_bytes, "seconds": statistics.median(times) / calls}
    what = str(dtype).removeprefix("torch.")
    return [{"title": f"parts of {args.variant}'s third stage, batch {batch_size}, {what}", "parts": rows}]


def _linear_part(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], float, float]:
    outputs = x.numel() // x.shape[-1] * layer.weight.shape[0]
    moved = x.numel() + outputs + layer.weight.numel()
    return lambda: layer(x), 2.0 * outputs * x.shape[-1], float(x.element_size() * moved)


def _conv_part(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], float, float]:
    return lambda: layer(x), 2.0 * x.numel() * layer.weight[0].numel(), 2.0 * x.nbytes


def plot_roofline(row: dict[str, Any], out: Path) -> None:
    """Draw what `row_roofline` measured to roofline.png in the folder `out`."""
    from matplotlib.figure import Figure  # imported here: measuring needs no matplotlib

    (_, product), (_, copied), *others = row["parts"].items()
    peak, bandwidth = product["flops"] / product["seconds"], copied["bytes"] / copied["seconds"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    intensities = np.geomspace(0.5, 1000, 200)
    axis.loglog(
        intensities,
        np.minimum(peak, bandwidth * intensities) / 1e9,
        "k-",
        label="limit: memory, then arithmetic\n(above the slope: from caches)",
    )
    for number, (name, part) in enumerate(others):
        intensity, speed = part["flops"] / part["bytes"], part["flops"] / part["seconds"] / 1e9
        axis.plot(intensity, speed, "os^vDP*X"[number % 8], label=f"{name}: {speed:.0f} GFLOP/s")
    axis.set(xlabel="operations a byte moved", ylabel="GFLOP/s", title=row["title"])
    axis.legend(fontsize=8)
    figure.savefig(out / "roofline.png", dpi=120)

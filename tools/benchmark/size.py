"""Time and memory against input size, beside a ViT."""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.cpu.fused import fuse

from .measuring import peak_bytes, seconds_of
from .networks import build_network, default_autocast

VIT = "vit_small_patch16_224"  # 22.1 M parameters, as GroupMixFormer-S has 22.4 M
SIZES = (224, 320, 448, 640, 768, 1024)


def row_size(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Forward pass of one image at growing sizes: time and memory a token, against those at the smallest size."""
    network = fuse(build_network(args, device).eval())
    vit = timm.create_model(VIT, dynamic_img_size=True, num_classes=1000).to(device).eval()
    sizes = [size for size in SIZES if size <= args.largest]
    points: dict[str, list[dict[str, float]]] = {args.variant: [], VIT: []}
    for size in tqdm(sizes, desc="size", disable=not sys.stderr.isatty(), leave=False):
        images = torch.randn(1, 3, size, size, device=device)
        seconds: dict[str, list[float]] = {name: [] for name in points}
        for trial in range(args.trials + 1):
            for name, candidate in ((args.variant, network), (VIT, vit)):
                with torch.inference_mode(), default_autocast(device, name):
                    elapsed = seconds_of(lambda c=candidate, x=images: c(x), device)
                if trial:
                    seconds[name].append(elapsed)
        for name, candidate in ((args.variant, network), (VIT, vit)):
            memory = _activation_bytes(candidate, images, device, name)
            points[name].append({"size": size, "seconds": statistics.median(seconds[name]), "bytes": memory})
    for name in points:
        smallest = points[name][0]
        for point in points[name]:
            tokens = (point["size"] / smallest["size"]) ** 2
            point["seconds_over_linear"] = point["seconds"] / (smallest["seconds"] * tokens)
            point["bytes_over_linear"] = point["bytes"] / (smallest["bytes"] * tokens)
    return [{"title": f"time and memory against input size, {args.variant} (fused), batch 1", "points": points}]


def _activation_bytes(network: nn.Module, images: Tensor, device: torch.device, name: str) -> int:
    """Largest sum of live tensors during a forward pass, weights left out: PyTorch's own count on either device."""
    with torch.inference_mode(), default_autocast(device, name):
        if device.type == "cuda":
            return peak_bytes(lambda: network(images), device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            network(images)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def plot_size(row: dict[str, Any], out: Path) -> None:
    """Draw what `row_size` measured to size.png in the folder `out`."""
    from matplotlib.figure import Figure  # imported here: measuring needs no matplotlib

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, key, unit, scale in zip(
        figure.subplots(1, 2), ("seconds", "bytes"), ("time, ms", "activations, MiB"), (1e3, 2**-20)
    ):
        for name, points in row["points"].items():
            tokens = [(point["size"] / points[0]["size"]) ** 2 for point in points]
            line = axis.loglog(tokens, [scale * point[key] for point in points], "o-", label=name)[0]
            linear = [scale * points[0][key] * count for count in tokens]
            axis.loglog(tokens, linear, ":", color=line.get_color(), label="linear in tokens")
        axis.set_xticks(tokens, [f"{point['size']}²" for point in points])
        axis.minorticks_off()
        axis.set(xlabel="input, pixels", ylabel=unit)
        axis.legend()
    figure.suptitle(row["title"])
    figure.savefig(out / "size.png", dpi=120)

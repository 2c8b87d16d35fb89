"""The network against the released order of operations: forward passes and training steps on random images."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from models.cpu.depthwise import use_fast_gradients
from models.cpu.fused import fuse
from models.reference import ReferenceNetwork
from tasks.networks import compile_blocks

from .measuring import time_interleaved

Precision = Callable[[torch.device, str], AbstractContextManager]  # of the device and the candidate's name
RELEASED, PLAIN = "released order", "this network"
LARGEST_ERROR = {"cpu": 1e-5, "cuda": 0.05}  # relative to the reference; float16 and bfloat16 round on GPUs


def batch_size_of(args: argparse.Namespace, device: torch.device, training: bool) -> int:
    """Images of a step: --batch-size, or what keeps the device busy."""
    return args.batch_size or ((128 if training else 256) if device.type == "cuda" else 8)


def build_network(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(args.variant).to(device)


def autocast(device: torch.device, name: str) -> AbstractContextManager:
    """float32 on a CPU; on a GPU bfloat16, but float16 for the released order."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.float16 if name == RELEASED else torch.bfloat16)


def cpu_bfloat16(device: torch.device, name: str) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


def has_cpu_bfloat16() -> bool:
    """Whether the processor has instructions for it: without them it is several times as slow as float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def benchmark_evaluate(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The forward pass. RuntimeError where a candidate computes something else than the reference."""
    network = build_network(args, device).eval()
    with torch.no_grad():
        for module in network.modules():  # fresh statistics are the identity: folding them wrongly would not show
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    networks = {RELEASED: ReferenceNetwork(network).eval(), PLAIN: network, "fused": fuse(network)}
    networks["fused, compiled"] = fuse(network)
    compile_blocks(networks["fused, compiled"])
    batch_size = batch_size_of(args, device, training=False)
    images = torch.randn(batch_size, 3, *args.size, device=device)
    logits: dict[str, Tensor] = {}

    def run(name: str) -> None:
        with torch.no_grad() if "compiled" in name else torch.inference_mode(), autocast(device, name):
            logits[name] = networks[name](images)

    candidates = {name: lambda name=name: run(name) for name in networks}
    title = f"evaluation, {args.variant}, {args.size[0]} x {args.size[1]}, batch {batch_size}"
    result = time_interleaved(title, candidates, args.trials, batch_size, device)
    expected = logits[RELEASED].float()
    for name, values in logits.items():
        error = ((values.float() - expected).norm() / expected.norm()).item()
        if not error <= LARGEST_ERROR[device.type]:
            raise RuntimeError(f"{name}: computes something else than the reference, relative error {error:.1e}")
    return [result]


def benchmark_train(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Forward, backward, clipping, AdamW and EMA; a second table in bfloat16 on CPUs that have it."""
    batch_size = batch_size_of(args, device, training=True)
    images = torch.randn(batch_size, 3, *args.size, device=device)
    labels = torch.randint(0, 1000, (batch_size,), device=device)

    def measure(names: tuple[str, ...], precision: Precision, note: str) -> dict[str, Any]:
        steps = {name: training_step(args, name, precision, images, labels) for name in names}
        title = f"training step, {args.variant}, {args.size[0]} x {args.size[1]}, batch {batch_size}{note}"
        return time_interleaved(title, steps, args.trials, batch_size, device)

    results = [measure((RELEASED, PLAIN, "compiled"), autocast, "")]
    if device.type == "cpu" and has_cpu_bfloat16():
        # Not compiled: train.py refuses that in this precision.
        results.append(measure((RELEASED, PLAIN), cpu_bfloat16, ", autocast to bfloat16"))
    return results


def training_step(
    args: argparse.Namespace, name: str, precision: Precision, images: Tensor, labels: Tensor
) -> Callable[[], float]:
    """A training step of one candidate, which has a network, an optimizer and an average of its own."""
    device = images.device
    network = build_network(args, device).train()
    released = name == RELEASED
    if device.type == "cpu" and not released:
        use_fast_gradients(network)
    ema = ModelEmaV3(network, decay=0.9999)
    scaler = torch.amp.GradScaler(device.type, enabled=released and device.type == "cuda")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=not released)  # released: not fused
    if name == "compiled":
        compile_blocks(network)
    model = ReferenceNetwork(network) if released else network

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with precision(device, name):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        # As in train.py, this is an update's only wait for a GPU; the released code waits more often.
        values = torch.stack([loss.detach(), norm]).tolist()
        scaler.step(optimizer)
        scaler.update()
        ema.update(network)
        return values[0]

    return step

"""The network against the released order of operations: evaluation and training steps."""

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

from .measuring import largest_batch, seconds_of, time_in_turns, without_memory

Autocast = Callable[[torch.device, str], AbstractContextManager]  # of the device and the name of a way


def batch_size_of(args: argparse.Namespace, device: torch.device, training: bool) -> int:
    """Images of a step: those asked for, or what fills the device."""
    return args.batch_size or ((128 if training else 256) if device.type == "cuda" else 8)


def build_network(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(args.variant).to(device)


def default_autocast(device: torch.device, name: str) -> AbstractContextManager:
    """float32 on a CPU; on a GPU bfloat16, and float16 for the released order, as released."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.float16 if name.startswith("released") else torch.bfloat16)


def row_evaluate(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The forward pass of the variant, on random images."""
    network = build_network(args, device).eval()
    with torch.no_grad():
        for module in network.modules():  # not the identity, which folding might get right by accident
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    batch_size = batch_size_of(args, device, training=False)
    images = torch.randn(batch_size, 3, args.size, args.size, device=device)
    fused, compiled = fuse(network), fuse(network)
    compile_blocks(compiled)
    candidates = {
        "released order": ReferenceNetwork(network).eval(),
        "this network": network,
        "fused": fused,
        "fused, compiled": compiled,
    }
    if args.compile_reference:
        candidates["released order, compiled whole"] = torch.compile(ReferenceNetwork(network).eval())

    def run(name: str) -> Tensor:
        with torch.inference_mode() if "compiled" not in name else torch.no_grad(), default_autocast(device, name):
            return candidates[name](images)

    ways = {name: lambda name=name: run(name) for name in candidates}
    first = {name: seconds_of(way, device) for name, way in ways.items()}  # compiles
    expected = run("released order").float()
    for name in candidates:
        error = ((run(name).float() - expected).norm() / expected.norm()).item()
        if error > (0.05 if device.type == "cuda" else 1e-5):
            raise RuntimeError(f"{name} computes something else than the reference: relative error {error:.1e}")
    title = f"evaluation, {args.variant}, {args.size} x {args.size}, batch {batch_size}"
    row = time_in_turns(title, ways, args.trials, batch_size, device)
    for name, seconds in first.items():
        row["ways"][name]["first_seconds"] = seconds
    return [row]


def row_train(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Forward, backward, clipping, AdamW and EMA, on random images; the reference's AdamW is not fused, as released.

    Two rows: on a GPU also with the largest batches that fit; on a CPU that computes in bfloat16, float32
    and all ways by autocast.
    """
    batch_size = batch_size_of(args, device, training=True)
    steps = training_steps(args, device, default_autocast)
    sizes = dict.fromkeys(steps, batch_size)
    rows = [_row_of_steps(f"batch {batch_size}", steps, sizes, args, device)]
    if device.type == "cuda":
        try:
            rows.append(_row_of_largest_batches(steps, args, device))
        except torch.OutOfMemoryError:
            rows.append(without_memory("training step, largest batches that fit"))
    elif torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        steps = training_steps(args, device, lambda device, name: torch.autocast("cpu", torch.bfloat16))
        del steps["compiled"]  # which train.py refuses
        sizes = dict.fromkeys(steps, batch_size)
        rows.append(_row_of_steps(f"batch {batch_size}, autocast to bfloat16", steps, sizes, args, device))
    return rows


def _row_of_largest_batches(
    steps: dict[str, Callable], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    sizes = {
        name: largest_batch(lambda size, step=steps[name]: step(*random_batch(args, size, device)))
        for name in ("released order", "this network")
    }
    sizes["compiled"] = sizes["this network"]  # each size that is tried would be compiled anew
    if not all(sizes.values()):
        raise torch.OutOfMemoryError("eight images do not fit")
    what = f"largest batches that fit: {', '.join(map(str, sizes.values()))}"
    return _row_of_steps(what, steps, sizes, args, device, share_memory=False)


def _row_of_steps(
    what: str,
    steps: dict[str, Callable],
    sizes: dict[str, int],
    args: argparse.Namespace,
    device: torch.device,
    share_memory: bool = True,
) -> dict[str, Any]:
    """Steps with random batches of `sizes`, both by name."""
    if share_memory:
        batches = {size: random_batch(args, size, device) for size in set(sizes.values())}
        ways = {name: lambda step=step, batch=batches[sizes[name]]: step(*batch) for name, step in steps.items()}
    else:  # none but a way's own batch while it runs
        ways = {
            name: lambda step=step, size=sizes[name]: step(*random_batch(args, size, device))
            for name, step in steps.items()
        }
    title = f"training step, {args.variant}, {args.size} x {args.size}, {what}"
    return time_in_turns(title, ways, args.trials, sizes, device, share_memory)


def random_batch(args: argparse.Namespace, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch_size, 3, args.size, args.size, device=device)
    return images, torch.randint(0, 1000, (batch_size,), device=device)


def training_steps(
    args: argparse.Namespace, device: torch.device, autocast: Autocast
) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """The ways of `row_train`, each with a network, an optimizer and an average of its own."""
    steps = {}
    for name in ("released order", "this network", "compiled"):
        network = build_network(args, device).train()
        released = name == "released order"
        if device.type == "cpu" and not released:
            use_fast_gradients(network)
        ema = ModelEmaV3(network, decay=0.9999)
        scaler = torch.amp.GradScaler(device.type, enabled=released and device.type == "cuda")
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=not released)
        if name == "compiled":
            compile_blocks(network)
        model = ReferenceNetwork(network) if released else network
        steps[name] = training_step(name, model, network, optimizer, scaler, ema, device, autocast)
    return steps


def training_step(name, model, network, optimizer, scaler, ema, device, autocast) -> Callable[[Tensor, Tensor], float]:
    def step(images: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)  # those of a step that ran out of memory, too
        with autocast(device, name):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        try:
            norm = nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            # An update's one wait for a GPU, as in train.py; the released code waits more often, and longer.
            values = torch.stack([loss.detach(), norm]).tolist()
            scaler.step(optimizer)
        finally:
            scaler.update()  # behind a step that runs out of memory, too: the next one begins anew
        ema.update(network)
        return values[0]

    return step

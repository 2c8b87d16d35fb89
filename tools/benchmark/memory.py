"""What a training step keeps for its backward pass, and how many bytes its operators read and write."""

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.cpu.depthwise import use_fast_gradients
from models.reference import ReferenceNetwork

from . import networks as ways
from .measuring import time_interleaved
from .networks import PLAIN, RELEASED, autocast, batch_size_of, cpu_bfloat16, has_cpu_bfloat16

RELATIVES = {"Swin-T": "swin_tiny_patch4_window7_224", "ConvNeXt-T": "convnext_tiny"}
BUDGETS = (1.0, 0.5, 0.3)  # of the compiler, as shares of what a compiled step keeps by itself


def benchmark_memory(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Forward and backward pass of every way to save memory, beside the released order and two networks of timm."""
    batch_size = batch_size_of(args, device, training=True)
    images = torch.randn(batch_size, 3, *args.size, device=device)
    results = [_measure(args, images, autocast, "")]
    if device.type == "cpu" and has_cpu_bfloat16():
        results.append(_measure(args, images, cpu_bfloat16, ", autocast to bfloat16"))
    return results


def _measure(args: argparse.Namespace, images: Tensor, precision: Callable, note: str) -> dict[str, Any]:
    device, batch_size = images.device, len(images)
    forwards = _forward_passes(args, images, precision, compiled=not note)
    held = {name: held_bytes(forward, device) for name, forward in forwards.items()}
    moved = {name: None if "compiled" in name else moved_bytes(forward) for name, forward in forwards.items()}
    steps = {name: lambda f=forward: f().backward() for name, forward in forwards.items()}
    title = f"memory, {args.variant}, {args.size[0]} x {args.size[1]}, batch {batch_size}{note}"
    result = time_interleaved(title, steps, args.trials, batch_size, device)
    for name, numbers in result["candidates"].items():
        numbers["held_bytes"] = held[name] / batch_size
        numbers["moved_bytes"] = None if moved[name] is None else moved[name] / batch_size
    return result


def _forward_passes(
    args: argparse.Namespace, images: Tensor, precision: Callable, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """By candidate, a function that runs its forward pass and returns a loss. The first candidate is the reference."""
    device = images.device

    def plain(selective: bool | None = None) -> nn.Module:
        network = ways.build_network(args, device).train()
        if device.type == "cpu":
            use_fast_gradients(network)
        network.set_grad_checkpointing(selective is not None, selective=bool(selective))
        return network

    networks: dict[str, nn.Module] = {
        RELEASED: ReferenceNetwork(ways.build_network(args, device).train()),
        PLAIN: plain(),
        "selective checkpoints": plain(selective=True),
        "full checkpoints": plain(selective=False),
    }
    for name, model in RELATIVES.items():
        size = dict(img_size=args.size) if model.startswith("swin") else {}
        networks[name] = timm.create_model(model, **size).to(device).train()
    if compiled:  # train.py refuses to compile in CPU's bfloat16
        for budget in BUDGETS:
            networks[f"compiled, budget {budget:g}"] = plain()
            ways.compile_blocks(networks[f"compiled, budget {budget:g}"], backend=_inductor_with(budget))

    def forward(name: str) -> Tensor:
        with precision(device, name):
            return networks[name](images).float().logsumexp(dim=1).mean()

    return {name: lambda name=name: forward(name) for name in networks}


def _inductor_with(budget: float) -> Callable:
    """Inductor with a memory budget. Of one backend, networks of the same code would share the first compilation."""

    def backend(graph: Any, inputs: Any, options: dict[str, Any]) -> Callable:
        with functorch_config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs, config_patches=options)

    return backend


def held_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that are in use after a forward pass and were not before, its loss included.

    On a GPU the allocator tells; on a CPU torch's profiler adds up what is allocated and freed.
    """
    forward().backward()  # gradients, workspaces, compilation
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        loss = forward()
        held = torch.cuda.memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            loss = forward()
        held = sum(event.self_cpu_memory_usage for event in record.key_averages())
    loss.backward()
    return held


def moved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that the operators of a forward and a backward pass read and write, each tensor once an operator."""
    with _MovedBytes() as mode:
        forward().backward()
    return mode.total


class _MovedBytes(TorchDispatchMode):
    """Adds up the tensors that each operator takes and gives. Views and fresh memory cost nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in taken}
        given = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        made = [x for x in given if x.untyped_storage()._cdata not in storages]
        if (made or func._schema.is_mutable) and not func.name().startswith(("aten::empty", "aten::new_empty")):
            self.total += sum(x.nbytes for x in taken + (made or given))
        return out

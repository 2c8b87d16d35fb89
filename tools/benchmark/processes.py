"""A training step on one and two processes."""

import argparse
import os
import re
import statistics
import subprocess
import sys
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from configs import UserError
from models.cpu.depthwise import use_fast_gradients
from utils.processes import WITHOUT_BUFFERS

from . import ROOT
from .measuring import seconds_of
from .networks import batch_size_of, build_network, default_autocast, random_batch, training_step


def row_processes(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A training step of one process alone, of two side by side, and of two in one DistributedDataParallel run.

    Two side by side share the machine's memory and caches; what the third adds to the second is communication.
    """
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        raise UserError("processes: needs two GPUs, or a machine without one")
    batch_size = batch_size_of(args, device, training=True)
    commands = {"one process": (1, "alone"), "two, side by side": (2, "alone"), "two, gradients averaged": (2, "ddp")}
    measured: dict[str, list[float]] = {name: [] for name in commands}
    for _ in tqdm(range(max(3, args.trials // 2)), desc="processes", disable=not sys.stderr.isatty(), leave=False):
        for name, (processes, mode) in commands.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            worker = ["-m", "tools.benchmark", "--worker", mode, "--batch-size", str(batch_size)]
            worker += ["--variant", args.variant, "--size", str(args.size)]
            result = subprocess.run(
                [sys.executable, *launcher, *worker],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                timeout=900,
                check=False,
            )
            if result.returncode:
                raise RuntimeError(f"the processes failed: {cause_of(result.stderr)}")
            steps = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("STEP")]
            measured[name].append(max(steps))
    seconds = {name: statistics.median(values) for name, values in measured.items()}
    title = f"a training step on one and two processes of one thread, {args.variant}, batch {batch_size} each"
    return [{"title": title, "seconds": seconds}]


def cause_of(stderr: str) -> str:
    """The line that names a process's error, which torchrun's report follows."""
    lines = stderr.strip().splitlines()
    named = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|error): ", line)]
    return named[0] if named else "\n".join(lines[-20:])


def work(args: argparse.Namespace) -> None:
    """What a process of `row_processes` runs: prints the median seconds of a step."""
    use_gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if use_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    network = build_network(args, device).train()
    if not use_gpu:
        use_fast_gradients(network)
    elif args.worker == "ddp":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # as train.py has it
    model = nn.parallel.DistributedDataParallel(network, **WITHOUT_BUFFERS) if args.worker == "ddp" else network
    batch = random_batch(args, batch_size_of(args, device, training=True), device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    scaler, ema = torch.amp.GradScaler(device.type, enabled=False), ModelEmaV3(network)
    step = training_step("this network", model, network, optimizer, scaler, ema, device, default_autocast)
    seconds = []
    for _ in range(5):
        torch.distributed.barrier()
        seconds.append(seconds_of(lambda: step(*batch), device))
    print("STEP", statistics.median(seconds[1:]), flush=True)
    torch.distributed.destroy_process_group()

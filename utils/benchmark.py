"""Measure how fast this code is: python -m utils.benchmark [--rows NAME ...] [--data-path DIR] [--out DIR]

Every row compares ways to do the same thing. They take turns within one run, so that a machine whose speed drifts does
not favour one of them; a row gives the median of the ratios turn by turn, with their quartiles. The first way of a row
is the reference: the released order of operations (`models/reference.py`), the exact transforms, and so on.

    evaluate   forward pass: reference, this network, fused, fused and compiled
    train      training step (forward, backward, clipping, AdamW, EMA): reference, this network, compiled; on a GPU
               also with the largest batch of each that fits
    load       an image from JPEG to network input, of --data-path: exact, fast, packed; training and validation
    size       time and memory of the forward pass from 224 x 224 to --largest, beside a ViT of equal size
    processes  a training step of one process, of two side by side, and of two that average their gradients
    start      from command to first update, and where it goes
    roofline   what parts of the network reach of the machine's arithmetic and memory speed

Uses the GPU if there is one, in bfloat16 (the reference: float16 with loss scaling, as released), else the CPU in
float32, and training steps by autocast to bfloat16 too where the CPU has it. Batches of 128 images to train and 256 to
evaluate on a GPU, 8 on a CPU. Writes benchmark.json, benchmark.md and
the plots size.png and roofline.png into --out.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

import models
from configs import UserError, get_config, parse_args
from configs.commands import CommandParser, command
from data.datasets import decode_image
from data.fast_loading import FastEvalTransform, FastTrainTransform, decode_to_tensor
from data.pack import shrink
from data.randomness import seed_everything
from data.sources import FolderSource
from data.transforms import eval_transform, train_transform
from models.depthwise import use_fast_gradients
from models.fused import fuse
from models.reference import ReferenceNetwork

from .compilation import compile_blocks
from .logging import git_commit

ROOT = Path(__file__).resolve().parent.parent
VIT = "vit_small_patch16_224"  # 22.1 M parameters, as GroupMixFormer-S has 22.4 M
SIZES = (224, 320, 448, 640, 768, 1024)


# ------------------------------------------------------------------------------------------------------------ measuring
def time_in_turns(
    title: str,
    ways: dict[str, Callable[[], Any]],
    trials: int,
    items: int | dict[str, int],
    device: torch.device,
    share_memory: bool = True,
) -> dict[str, Any]:
    """Time the ways in turn; the first is the reference.

    Args:
        title: of the progress bar and of the row.
        ways: by name; each does the same work once.
        trials: turns that count, behind one that warms up.
        items: images of one call, for images/s; by name where ways differ.
        device: is synchronised around every way.
        share_memory: False for ways that fill a GPU: what the one before has left in PyTorch's cache is given back, and
            an untimed call goes before the timed one.

    Returns {"title", "items", "ways": {name: {"seconds", "images_per_second", "ratio", "quartiles", "first_seconds",
    "bytes"}}}: medians over the turns; ratio is how many times as fast as the reference, image by image; first_seconds
    is the first call, which pays for compilation; bytes, on GPUs, are what a call needs at its peak beyond what was
    there before it.
    """
    images = items if isinstance(items, dict) else dict.fromkeys(ways, items)
    times: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for trial in tqdm(range(trials + 1), desc=title, disable=not sys.stderr.isatty(), leave=False):
        for name, way in ways.items():
            if not share_memory:
                _free_cached_memory()
                if trial:
                    way()
            if trial == 0:
                first[name] = _time(way, device)
                way()  # caches that only a second call fills
                if device.type == "cuda":
                    peaks[name] = _peak_bytes(way, device)
            else:
                times[name].append(_time(way, device))
    reference = next(iter(ways))
    row: dict[str, Any] = {"title": title, "items": items, "ways": {}}
    for name, seconds in times.items():
        more = images[name] / images[reference]
        ratios = [more * a / b for a, b in zip(times[reference], seconds)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        row["ways"][name] = {
            "seconds": statistics.median(seconds),
            "images_per_second": images[name] / statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "first_seconds": first[name],
        }
        if name in peaks:
            row["ways"][name]["bytes"] = peaks[name]
    return row


def _time(function: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """What a call allocates on a GPU at its peak, beyond what was there before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def largest_batch(run: Callable[[int], Any], step: int = 64) -> int:
    """The largest multiple of `step` with which `run` does not run out of GPU memory; 0 where even `step` does."""

    def fits(batch_size: int) -> bool:
        _free_cached_memory()
        try:
            run(batch_size)
        except torch.OutOfMemoryError:
            return False
        return True

    low, high = 0, step  # `low` fits, and so does not `high` once the first loop is done
    while fits(high):
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    _free_cached_memory()
    return low


def _free_cached_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # nothing, where there is no GPU


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, GPU, versions, commit and date."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": git_commit(),
    }


# ----------------------------------------------------------------------------------------------------------------- rows
def row_evaluate(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The forward pass of the variant, on random images."""
    network = _network(args, device).eval()
    with torch.no_grad():
        for module in network.modules():  # not the identity, which folding might get right by accident
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    batch_size = _batch_size(args, device, training=False)
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
        with torch.inference_mode() if "compiled" not in name else torch.no_grad(), _autocast(device, name):
            return candidates[name](images)

    ways = {name: lambda name=name: run(name) for name in candidates}
    expected = run("released order").float()
    first = {name: _time(way, device) for name, way in ways.items()}  # compiles
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

    Two rows: on a GPU also with the largest batch of each way that fits; on a CPU that computes in bfloat16, float32
    and all ways by autocast.
    """
    batch_size = _batch_size(args, device, training=True)
    steps = _training_steps(args, device, _autocast)
    sizes = dict.fromkeys(steps, batch_size)
    rows = [_row_of_steps(f"batch {batch_size}", steps, sizes, args, device)]
    if device.type == "cuda":
        rows.append(_row_of_largest_batches(steps, args, device))
    elif torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        steps = _training_steps(args, device, lambda device, name: torch.autocast("cpu", torch.bfloat16))
        rows.append(_row_of_steps(f"batch {batch_size}, autocast to bfloat16", steps, sizes, args, device))
    return rows


def _row_of_largest_batches(
    steps: dict[str, Callable], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    sizes = {}
    for name in ("released order", "this network"):
        sizes[name] = largest_batch(lambda size, step=steps[name]: step(*_random_batch(args, size, device)))
    sizes["compiled"] = sizes["this network"]  # each size that is tried would be compiled anew
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
    batches = {size: _random_batch(args, size, device) for size in set(sizes.values())}
    ways = {name: lambda step=step, batch=batches[sizes[name]]: step(*batch) for name, step in steps.items()}
    title = f"training step, {args.variant}, {args.size} x {args.size}, {what}"
    return time_in_turns(title, ways, args.trials, sizes, device, share_memory)


def _random_batch(args: argparse.Namespace, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch_size, 3, args.size, args.size, device=device)
    return images, torch.randint(0, 1000, (batch_size,), device=device)


def _training_steps(
    args: argparse.Namespace, device: torch.device, autocast: Callable
) -> dict[str, Callable[[Tensor, Tensor], float]]:
    """The ways of `row_train`, each with a network, an optimizer and an average of its own."""
    steps = {}
    for name in ("released order", "this network", "compiled"):
        network = _network(args, device).train()
        released = name == "released order"
        if device.type == "cpu" and not released:
            use_fast_gradients(network)
        ema = ModelEmaV3(network, decay=0.9999)
        scaler = torch.amp.GradScaler(device.type, enabled=released and device.type == "cuda")
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=not released)
        if name == "compiled":
            compile_blocks(network)
        model = ReferenceNetwork(network) if released else network
        steps[name] = _training_step(name, model, network, optimizer, scaler, ema, device, autocast)
    return steps


def _training_step(name, model, network, optimizer, scaler, ema, device, autocast) -> Callable[[Tensor, Tensor], float]:
    def step(images: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)  # those of a step that ran out of memory, too
        with autocast(device, name):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        # An update's one wait for a GPU, where train.py has its own: the released code waits more often, and longer.
        values = torch.stack([loss.detach(), norm]).tolist()
        scaler.step(optimizer)
        scaler.update()
        ema.update(network)
        return values[0]

    return step


def row_load(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """From the bytes of an image to what the loader collates, on one core."""
    if not args.data_path:
        raise UserError("load: needs --data-path DIR, a folder of class folders with photographs")
    config = get_config(parse_args(["--cfg", str(ROOT / "configs" / f"{args.variant}.yaml")]), lambda line: None)
    source = FolderSource(args.data_path)
    chosen = np.linspace(0, len(source.samples) - 1, min(args.images, len(source.samples))).astype(int)
    encoded = [source.read(int(index)) for index in chosen]
    packed = [shrink(content, 256, 95) for content in encoded]
    exact_train, fast_train = train_transform(config), FastTrainTransform(config)
    exact_eval, fast_eval = eval_transform(config), FastEvalTransform(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu = torch.device("cpu")
        training = {
            "exact": lambda: _each(encoded, decode_image, exact_train),
            "fast": lambda: _each(encoded, decode_to_tensor, fast_train),
            "exact, packed (256, quality 95)": lambda: _each(packed, decode_image, exact_train),
            "fast, packed (256, quality 95)": lambda: _each(packed, decode_to_tensor, fast_train),
            "decoding alone": lambda: _each(encoded, decode_to_tensor, lambda image: image),
        }
        validation = {
            "exact": lambda: _each(encoded, decode_image, exact_eval),
            "fast": lambda: _each(encoded, decode_to_tensor, fast_eval),
        }
        return [
            time_in_turns(f"{what}, {len(encoded)} photographs, one core", ways, args.trials, len(encoded), cpu)
            for what, ways in (("loading to train", training), ("loading to validate", validation))
        ]
    finally:
        torch.set_num_threads(threads)


def _each(encoded: Sequence[bytes], decode: Callable, transform: Callable) -> None:
    for index, content in enumerate(encoded):
        seed_everything(0, index)
        transform(decode(content))


def row_size(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Forward pass of one image at growing sizes: time and memory a token, against those at the smallest size."""
    network = fuse(_network(args, device).eval())
    vit = timm.create_model(VIT, dynamic_img_size=True, num_classes=1000).to(device).eval()
    sizes = [size for size in SIZES if size <= args.largest]
    points: dict[str, list[dict[str, float]]] = {args.variant: [], VIT: []}
    for size in tqdm(sizes, desc="size", disable=not sys.stderr.isatty(), leave=False):
        images = torch.randn(1, 3, size, size, device=device)
        seconds: dict[str, list[float]] = {name: [] for name in points}
        for trial in range(args.trials + 1):
            for name, candidate in ((args.variant, network), (VIT, vit)):
                with torch.inference_mode(), _autocast(device, name):
                    elapsed = _time(lambda c=candidate, x=images: c(x), device)
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
    with torch.inference_mode(), _autocast(device, name):
        if device.type == "cuda":
            return _peak_bytes(lambda: network(images), device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            network(images)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def row_roofline(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Speed of the fused network's parts at its third stage, which holds most blocks, against the machine's limits."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    like = {"device": device, "dtype": dtype}
    network = fuse(_network(args, device).eval()).to(dtype)
    block = network.stages[2][0]
    segment, size = block.segments[3], (args.size // 16, args.size // 16)
    batch_size = _batch_size(args, device, training=False)
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
            times = [_time(lambda run=run: [run() for _ in range(calls)], device) for _ in range(20)][5:]
            rows[name] = {"flops": flops, "bytes": size_in_bytes, "seconds": statistics.median(times) / calls}
    what = str(dtype).removeprefix("torch.")
    return [{"title": f"parts of {args.variant}'s third stage, batch {batch_size}, {what}", "parts": rows}]


def _linear_part(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], float, float]:
    outputs = x.numel() // x.shape[-1] * layer.weight.shape[0]
    moved = x.numel() + outputs + layer.weight.numel()
    return lambda: layer(x), 2.0 * outputs * x.shape[-1], float(x.element_size() * moved)


def _conv_part(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], float, float]:
    return lambda: layer(x), 2.0 * x.numel() * layer.weight[0].numel(), 2.0 * x.nbytes


def row_processes(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A training step of one process alone, of two side by side, and of two in one DistributedDataParallel run.

    Two side by side share the machine's memory and caches; what the third adds to the second is communication.
    """
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        raise UserError("processes: needs two GPUs, or a machine without one")
    batch_size = _batch_size(args, device, training=True)
    commands = {"one process": (1, "alone"), "two, side by side": (2, "alone"), "two, gradients averaged": (2, "ddp")}
    measured: dict[str, list[float]] = {name: [] for name in commands}
    for _ in tqdm(range(max(3, args.trials // 2)), desc="processes", disable=not sys.stderr.isatty(), leave=False):
        for name, (processes, mode) in commands.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            worker = ["-m", "utils.benchmark", "--worker", mode, "--batch-size", str(batch_size)]
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
                raise RuntimeError(f"the processes failed: {result.stderr.strip().splitlines()[-1]}")
            steps = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("STEP")]
            measured[name].append(max(steps))
    seconds = {name: statistics.median(values) for name, values in measured.items()}
    title = f"a training step on one and two processes of one thread, {args.variant}, batch {batch_size} each"
    return [{"title": title, "seconds": seconds}]


def _work(args: argparse.Namespace) -> None:
    """What a process of `row_processes` runs: prints the median seconds of a step."""
    use_gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if use_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    network = _network(args, device).train()
    if not use_gpu:
        use_fast_gradients(network)
    elif args.worker == "ddp":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # as train.py has it
    model = nn.parallel.DistributedDataParallel(network, broadcast_buffers=False) if args.worker == "ddp" else network
    batch = _random_batch(args, _batch_size(args, device, training=True), device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    scaler, ema = torch.amp.GradScaler(device.type, enabled=False), ModelEmaV3(network)
    step = _training_step("this network", model, network, optimizer, scaler, ema, device, _autocast)
    seconds = []
    for _ in range(5):
        torch.distributed.barrier()
        seconds.append(_time(lambda: step(*batch), device))
    print("STEP", statistics.median(seconds[1:]), flush=True)
    torch.distributed.destroy_process_group()


def row_start(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Seconds from command to first update of train.py, on a data set of 64 small images; medians."""
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_noise(Path(folder) / "data")
        for trial in tqdm(range(max(3, args.trials // 2)), desc="start", disable=not sys.stderr.isatty(), leave=False):
            for name, seconds in _start_once(Path(folder), f"run{trial}").items():
                measured.setdefault(name, []).append(seconds)
    parts = {name: statistics.median(seconds) for name, seconds in measured.items()}
    return [{"title": "from command to first update, digits configuration", "seconds": parts}]


def _start_once(folder: Path, tag: str) -> dict[str, float]:
    """Run train.py for two epochs; seconds until its imports, first log line, first update, and an epoch's overhead."""
    code = (
        "import sys, time; now = time.time; start = now(); sys.argv = sys.argv[1:]; "
        "import train, utils.engine as engine; "
        "imported = now(); step = engine._accumulate_gradients; marks = []; "
        "engine._accumulate_gradients = lambda *a: (marks.append(now()), step(*a), marks.append(now()))[1]; "
        "epoch = train.train_one_epoch; ends = []; "
        "train.train_one_epoch = lambda *a: (ends.append(now()), epoch(*a), ends.append(now()))[1]; "
        "train.main(); "
        "print('MARKS', start, imported, ends[0], marks[0], marks[1], ends[1], ends[2])"
    )
    arguments = ["train.py", "--cfg", str(ROOT / "configs" / "groupmixformer_digits.yaml"), "--tag", tag]
    arguments += ["--data-path", str(folder / "data"), "--output", str(folder / "output")]
    arguments += ["--opts", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "DATA.BATCH_SIZE", "16"]
    begin = time.time()
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=600, check=False
    )
    if result.returncode:
        raise RuntimeError(f"train.py failed: {result.stderr.strip().splitlines()[-1]}")
    words = next(line for line in result.stdout.splitlines() if line.startswith("MARKS")).split()[1:]
    start, imported, epoch, first, updated, end, second_epoch = map(float, words)
    return {
        "interpreter": start - begin,
        "imports": imported - start,
        "configuration, data, network, optimizer": epoch - imported,
        "loader workers, first batch": first - epoch,
        "first forward and backward pass": updated - first,
        "all, command to first update": updated - begin,
        "between two epochs (validation of raw and EMA weights, checkpoints)": second_epoch - end,
    }


def _write_noise(root: Path, images: int = 32) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], list[dict[str, Any]]]] = {
    "evaluate": row_evaluate,
    "train": row_train,
    "load": row_load,
    "size": row_size,
    "processes": row_processes,
    "start": row_start,
    "roofline": row_roofline,
}


def _batch_size(args: argparse.Namespace, device: torch.device, training: bool) -> int:
    """Images of a step: those asked for, or what fills the device."""
    return args.batch_size or ((128 if training else 256) if device.type == "cuda" else 8)


def _network(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(args.variant).to(device)


def _autocast(device: torch.device, name: str):
    """float32 on a CPU; on a GPU bfloat16, and float16 for the released order, as released."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.float16 if name.startswith("released") else torch.bfloat16)


# --------------------------------------------------------------------------------------------------------------- output
def format_markdown(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown tables, below a line that describes the machine."""
    place = machine["gpu"] or f"{machine['threads']} threads of {machine['processor']}"
    lines = [f"{machine['date']}, {place}, torch {machine['torch']}, commit {machine['commit']}", ""]
    for row in rows:
        lines += [f"**{row['title']}**", ""]
        if "ways" in row:
            on_gpu = any("bytes" in way for way in row["ways"].values())
            lines += [
                "| way | images/s | times as fast (quartiles) | first call |" + " memory, MiB |" * on_gpu,
                "|---|---|---|---|" + "---|" * on_gpu,
            ]
            for name, way in row["ways"].items():
                low, high = way["quartiles"]
                line = (
                    f"| {name} | {way['images_per_second']:.1f} | {way['ratio']:.2f} ({low:.2f} to {high:.2f}) "
                    f"| {way['first_seconds']:.1f} s |"
                )
                lines.append(line + (f" {way['bytes'] / 2**20:.0f} |" if "bytes" in way else ""))
        elif "points" in row:
            lines += [
                "| network | input | time, ms | / linear | activations, MiB | / linear |",
                "|---|---|---|---|---|---|",
            ]
            for name, points in row["points"].items():
                for point in points:
                    lines.append(
                        f"| {name} | {point['size']} "
                        f"| {1e3 * point['seconds']:.0f} | {point['seconds_over_linear']:.2f} "
                        f"| {point['bytes'] / 2**20:.0f} | {point['bytes_over_linear']:.2f} |"
                    )
        elif "parts" in row:
            lines += ["| part | GFLOP/s | GB/s | FLOP a byte |", "|---|---|---|---|"]
            for name, part in row["parts"].items():
                speed, memory = part["flops"] / part["seconds"] / 1e9, part["bytes"] / part["seconds"] / 1e9
                lines.append(f"| {name} | {speed:.0f} | {memory:.1f} | {part['flops'] / part['bytes']:.1f} |")
        else:
            lines += ["| | seconds |", "|---|---|"]
            lines += [f"| {name} | {seconds:.2f} |" for name, seconds in row["seconds"].items()]
        lines.append("")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw size.png and roofline.png, where their rows were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for row in rows:
        if "points" in row:
            figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
            for axis, key, unit, scale in zip(
                axes, ("seconds", "bytes"), ("time, ms", "activations, MiB"), (1e3, 2**-20)
            ):
                for name, points in row["points"].items():
                    tokens = [(point["size"] / points[0]["size"]) ** 2 for point in points]
                    line = axis.loglog(tokens, [scale * point[key] for point in points], "o-", label=name)[0]
                    linear = [scale * points[0][key] * count for count in tokens]
                    axis.loglog(tokens, linear, ":", color=line.get_color(), label="linear in tokens")
                ticks = [(point["size"] / points[0]["size"]) ** 2 for point in points]
                axis.set_xticks(ticks, [f"{point['size']}²" for point in points])
                axis.minorticks_off()
                axis.set(xlabel="input, pixels", ylabel=unit)
                axis.legend()
            figure.suptitle(row["title"])
            figure.savefig(out / "size.png", dpi=120)
            pyplot.close(figure)
        elif "parts" in row:
            _plot_roofline(row, out, pyplot)


def _plot_roofline(row: dict[str, Any], out: Path, pyplot: Any) -> None:
    (_, product), (_, copied), *others = row["parts"].items()
    peak, bandwidth = product["flops"] / product["seconds"], copied["bytes"] / copied["seconds"]
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
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
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------------- command line
def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("utils.benchmark", __doc__)
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=None, help="what to measure (all)")
    parser.add_argument("--variant", default="groupmixformer_small", help="network (groupmixformer_small)")
    parser.add_argument("--batch-size", type=int, help="images a step (8; GPUs 128 to train, 256 to evaluate)")
    parser.add_argument("--size", type=int, default=224, help="input height and width, pixels (224)")
    parser.add_argument("--largest", type=int, default=1024, help="largest input of the row 'size', pixels (1024)")
    parser.add_argument("--trials", type=int, default=7, help="turns of each row (7)")
    parser.add_argument("--images", type=int, default=96, help="photographs of the row 'load' (96)")
    parser.add_argument("--data-path", metavar="DIR", help="folder of class folders with photographs, for 'load'")
    parser.add_argument("--compile-reference", action="store_true", help="also compile the reference (minutes)")
    parser.add_argument("--out", default="output/benchmark", metavar="DIR", help="for results (output/benchmark)")
    parser.add_argument("--worker", choices=("alone", "ddp"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant not in models.groupmixformer.VARIANTS:
        raise UserError(f"--variant {args.variant}: one of {', '.join(models.groupmixformer.VARIANTS)}")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1")
    for name, low in (("size", 32), ("largest", 224), ("trials", 1), ("images", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {low}")
    return args


@command("utils.benchmark")
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status. `argv` are the arguments without the program's name."""
    try:
        args = _parse(argv)
        if args.worker:
            _work(args)
            return 0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True  # as train.py and the released code have it
        chosen = args.rows or [name for name in ROWS if name != "load" or args.data_path]
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        machine, rows = describe_machine(device), []
        for name in chosen:
            rows += ROWS[name](args, device)
            gc.collect()
            # Written behind every row: a run that is stopped keeps what it has.
            content = {"machine": machine, "command": sys.argv[1:], "rows": rows}
            (out / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
            (out / "benchmark.md").write_text(format_markdown(machine, rows))
        plot(rows, out)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    print(format_markdown(machine, rows))
    print(f"also in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

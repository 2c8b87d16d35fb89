"""Ways to do the same thing, timed in turns."""

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from utils.run_log import git_commit


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
                free_cached_memory()
                if trial:
                    way()
            if trial == 0:
                first[name] = seconds_of(way, device)
                way()  # caches that only a second call fills
                if device.type == "cuda":
                    peaks[name] = peak_bytes(way, device)
            else:
                times[name].append(seconds_of(way, device))
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


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """What a call allocates on a GPU at its peak, beyond what was there before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def largest_batch(run: Callable[[int], Any]) -> int:
    """The largest multiple of 64 (below it, of 8) with which `run` does not run out of GPU memory; 0 where 8 do."""

    def fits(batch_size: int) -> bool:
        free_cached_memory()
        try:
            run(batch_size)
        except RuntimeError as error:
            if _is_lack_of_memory(error):
                return False
            raise
        return True

    low, high = 0, 64  # `low` fits, and so does not `high` once the first loop is done
    while fits(high):
        low, high = high, 2 * high
    step = 64 if low else 8
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    free_cached_memory()
    return low


def _is_lack_of_memory(error: RuntimeError) -> bool:
    """CUDA's libraries say it in words of their own: cuBLAS the first, cuDNN the second."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("ALLOC_FAILED", "unable to find an engine to execute")
    )


def without_memory(title: str) -> dict[str, Any]:
    """The row in place of one that a GPU is too small for."""
    return {"title": title, "missing": "it takes more memory than there is; a smaller --batch-size may do"}


def free_cached_memory() -> None:
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

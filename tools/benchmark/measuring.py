"""Time candidates in turns, describe the machine, and put the results into Markdown tables."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from utils.run_log import git_commit


def time_interleaved(
    title: str, candidates: dict[str, Callable[[], Any]], trials: int, images: int, device: torch.device
) -> dict[str, Any]:
    """Time candidates one after the other, turn by turn; the first is the reference.

    Args:
        title: of the table and of the progress bar.
        candidates: by name; each call does the same work on the same number of images.
        trials: turns that count, after one that warms up.
        images: of one call.
        device: is synchronised before and after each call.

    Returns {"title", "images", "candidates": {name: {"seconds", "images_per_second", "ratio", "quartiles",
    "first_seconds", "peak_bytes"}}}. Times are medians over the turns. "ratio" says how many times as fast as the
    reference a candidate is. "peak_bytes", on GPUs alone, is what a call allocates on top of what was there before.
    """
    first, peaks = {}, {}
    for name, call in candidates.items():
        first[name] = seconds_of(call, device)
        if device.type == "cuda":
            peaks[name] = _peak_bytes(call, device)
        else:
            call()  # some caches are filled by a second call only
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm(range(trials), desc=title, disable=not sys.stderr.isatty(), leave=False):
        for name, call in candidates.items():
            times[name].append(seconds_of(call, device))
    reference = next(iter(times.values()))
    results = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(reference, seconds)]
        quartiles = statistics.quantiles(ratios, n=4) if trials > 1 else ratios * 3
        results[name] = {
            "seconds": statistics.median(seconds),
            "images_per_second": images / statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "first_seconds": first[name],
        }
        if name in peaks:
            results[name]["peak_bytes"] = peaks[name]
    return {"title": title, "images": images, "candidates": results}


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, GPU, versions, commit and date."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        processor = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), processor)
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


def format_markdown(machine: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """One Markdown table for each benchmark, below a line that describes the machine."""
    place = machine["gpu"] or f"{machine['threads']} threads of {machine['processor']}"
    lines = [f"{machine['date']}, {place}, torch {machine['torch']}, commit {machine['commit']}", ""]
    for result in results:
        lines += [f"**{result['title']}**", ""]
        if "missing" in result:
            lines += [f"not measured: {result['missing']}", ""]
            continue
        columns = {"peak_bytes": "peak", "held_bytes": "held an image", "moved_bytes": "moved an image"}
        columns = {name: title for name, title in columns.items() if name in next(iter(result["candidates"].values()))}
        lines += [
            "| candidate | images/s | times as fast (quartiles) | first call |"
            + "".join(f" {title}, MiB |" for title in columns.values()),
            "|---|---|---|---|" + "---|" * len(columns),
        ]
        for name, numbers in result["candidates"].items():
            low, high = numbers["quartiles"]
            bytes_of = [numbers[column] for column in columns]
            lines.append(
                f"| {name} | {numbers['images_per_second']:.1f} | {numbers['ratio']:.2f} ({low:.2f} to {high:.2f}) "
                f"| {numbers['first_seconds']:.1f} s |"
                + "".join(" |" if value is None else f" {value / 2**20:.0f} |" for value in bytes_of)
            )
        lines.append("")
    return "\n".join(lines)

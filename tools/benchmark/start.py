"""From command to first update, and between two epochs."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import ROOT


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
        "print('MARKS', start, imported, ends[0], marks[0], marks[1], ends[1], ends[2]); "
        # As run_script does: Python would ask workers that are left with SIGTERM, which they ignore, and wait.
        "from utils.supervision import end_loader_workers; end_loader_workers()"
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

"""From the bytes of an image to network input: the exact way, the fast one, and the fast one from packed copies."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import read_config
from data.datasets import decode_image
from data.fast.decoding import decode_to_tensor
from data.randomness import seed_everything
from data.sources import FolderSource
from tasks import keys_of
from tasks.classification.transforms import eval_transform, fast_train_transform, fast_views_transform, train_transform
from tools.pack import shrink

from .measuring import time_interleaved

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def benchmark_load(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Decode and transform photographs of --data-path, on one core as a loader's worker does."""
    config = read_config(["--cfg", str(CONFIGS / f"{args.variant}.yaml")], keys_of, lambda line: None)
    source = FolderSource(args.data_path)
    chosen = np.linspace(0, len(source.samples) - 1, min(args.images, len(source.samples))).astype(int)
    encoded = [source.read(int(index)) for index in chosen]
    packed = [shrink(content, 256, 95) for content in encoded]
    exact_train, fast_train = train_transform(config), fast_train_transform(config)
    exact_eval, fast_eval = eval_transform(config), fast_views_transform(config)
    training = {
        "exact": lambda: _load(encoded, decode_image, exact_train),
        "fast": lambda: _load(encoded, fast_train.decode_crop, fast_train),
        "fast, packed (256, quality 95)": lambda: _load(packed, fast_train.decode_crop, fast_train),
    }
    validation = {
        "exact": lambda: _load(encoded, decode_image, exact_eval),
        "fast": lambda: _load(encoded, decode_to_tensor, fast_eval),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            time_interleaved(
                f"loading to {purpose}, {len(encoded)} photographs, one core",
                candidates,
                args.trials,
                len(encoded),
                torch.device("cpu"),
            )
            for purpose, candidates in (("train", training), ("validate", validation))
        ]
    finally:
        torch.set_num_threads(threads)


def _load(encoded: Sequence[bytes], decode: Callable[[bytes], Any], transform: Callable[[Any], Tensor]) -> None:
    for index, content in enumerate(encoded):
        seed_everything(0, index)
        transform(decode(content))

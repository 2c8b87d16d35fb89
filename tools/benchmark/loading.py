"""From the bytes of an image to network input: the exact way, the fast one, and packed copies."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import UserError, get_config, parse_args, with_values
from data.datasets import decode_image
from data.fast.decoding import EncodedImage, decode_to_tensor, decodes_regions
from data.fast.transforms import FastTrainTransform
from data.randomness import seed_everything
from data.sources import FolderSource
from tasks.classification.transforms import eval_transform, fast_train_transform, fast_views_transform, train_transform
from tools.pack import shrink

from . import ROOT
from .measuring import time_in_turns


def row_load(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """From the bytes of an image to what the loader collates, on one core."""
    if not args.data_path:
        raise UserError("load: needs --data-path DIR, a folder of class folders with photographs")
    config = get_config(parse_args(["--cfg", str(ROOT / "configs" / f"{args.variant}.yaml")]), lambda line: None)
    source = FolderSource(args.data_path)
    chosen = np.linspace(0, len(source.samples) - 1, min(args.images, len(source.samples))).astype(int)
    encoded = [source.read(int(index)) for index in chosen]
    packed = [shrink(content, 256, 95) for content in encoded]
    exact_train, fast_train = train_transform(config), fast_train_transform(config)
    no_policy = fast_train_transform(with_values(config, {"AUG.AUTO_AUGMENT": "none", "AUG.COLOR_JITTER": 0.0}))
    exact_eval, fast_eval = eval_transform(config), fast_views_transform(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu = torch.device("cpu")
        training = {
            "exact": lambda: _each(encoded, decode_image, exact_train),
            "fast": lambda: _each(encoded, fast_train.decode_crop, fast_train),
        }
        if decodes_regions():
            whole = _whole_then_crop(fast_train)
            training["fast, whole images decoded"] = lambda: _each(encoded, whole, fast_train)
        training |= {
            "exact, packed (256, quality 95)": lambda: _each(packed, decode_image, exact_train),
            "fast, packed (256, quality 95)": lambda: _each(packed, fast_train.decode_crop, fast_train),
            "fast, without the policy": lambda: _each(encoded, no_policy.decode_crop, no_policy),
            "decoding whole images alone": lambda: _each(encoded, decode_to_tensor, lambda image: image),
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


def _whole_then_crop(transform: FastTrainTransform) -> Callable[[bytes], Tensor]:
    """`transform.decode_crop` as it is where nvImageCodec is not installed."""

    def decode(encoded: bytes) -> Tensor:
        image = EncodedImage(encoded)
        top, left, height, width = transform.draw_box(image)
        return image.whole()[top : top + height, left : left + width]

    return decode

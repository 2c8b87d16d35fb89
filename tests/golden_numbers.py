"""What the released implementation computes, and the weights and images that it was computed from.

`golden/layouts.json.gz` holds, by variant, the names and shapes of the released state dict, in its order.
`golden/<variant>_2x224x224.npz` holds float64 results for two images of 224 x 224, batch norms in one process, drop
path 0: evaluation logits and stage maps (shape; mean and unbiased standard deviation over height and width); and, of
one training step from the same weights, logits, cross-entropy loss, the gradient norm of every parameter and, as
`bn:<name>`, the running statistics after the step.

Every weight and every image is drawn from a stream that its name seeds, so no weights need to be stored.
"""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def layout(variant: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released state dict, in its order."""
    with gzip.open(GOLDEN / "layouts.json.gz") as file:
        return {name: tuple(shape) for name, shape in json.load(file)[variant].items()}


def results(variant: str) -> dict[str, np.ndarray]:
    """The released implementation's results for `images(2, 224, 224)`."""
    with np.load(GOLDEN / f"{variant}_2x224x224.npz") as file:
        return dict(file)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a state-dict entry or of an image batch, float32 (counters: int64 zero)."""
    stream = np.random.default_rng(zlib.crc32(name.encode()))
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if kind == "running_var":
        values = 0.5 + stream.random(shape)
    elif kind in ("running_mean", "bias"):
        values = 0.1 * stream.standard_normal(shape)
    elif kind == "weight" and len(shape) == 1:  # of a norm
        values = 1 + 0.1 * stream.standard_normal(shape)
    elif kind == "weight":  # small enough that activations keep their size through 50 blocks
        fan_in = np.prod(shape[1:])
        values = 0.3 / np.sqrt(fan_in) * stream.standard_normal(shape)
    else:
        values = stream.standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A whole state dict of `weight`s."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def images(batch: int, height: int, width: int) -> Tensor:
    """An image batch, float32 (batch, 3, height, width)."""
    return weight(f"images-{batch}x3x{height}x{width}", (batch, 3, height, width))

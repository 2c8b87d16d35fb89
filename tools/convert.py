"""Convert weights into a file that is fit to publish.

python -m tools.convert FILE --to pth                   {'model': state dict}, as released files are
python -m tools.convert FILE --to safetensors           for timm and other libraries

FILE is a released file, a training checkpoint of this repository or of timm (--weights raw, ema or best), or a
safetensors file. The new file holds the weights alone. Its name ends with the first 8 hex digits of its SHA-256, as in
timm.
"""

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from configs import UserError
from configs.commands import CommandParser, command
from models import VARIANTS, GroupMixFormer
from utils.checkpoint import load_file, select_weights, some
from utils.files import STDOUT, check_json_target, write_file, write_json

SUFFIXES = {"pth": ".pth", "safetensors": ".safetensors"}


@dataclass(frozen=True)
class Conversion:
    """A finished conversion, for the log and for scripts."""

    source: str
    weights: str  # 'raw weights', 'ema weights'
    network: str  # name of the variant, or its sizes
    num_classes: int
    format: str
    path: str
    sha256: str
    tensors: int
    parameters: int
    bytes: int


def convert(source: str | Path, to: str, folder: str | Path, name: str = "", which: str = "best") -> Conversion:
    """Write the weights of a file in another format, and read them back; a file that differs is removed.

    Args:
        source: the file to read.
        to: 'pth' or 'safetensors'.
        folder: for the new file; is made if it does not exist.
        name: of the new file, before its hash; default: the variant's name, else the source's.
        which: weights of a training checkpoint, see `select_weights`.

    A file of the same name and content is left as it is. Raises UserError where the source does not hold the weights of
    one whole GroupMixFormer, or the new name is taken by other content.
    """
    state, kind = read_weights(source, which)
    label, network = describe_network(state, str(source))
    content = _encode(state, to)
    digest = hashlib.sha256(content).hexdigest()
    without_hash = re.sub(r"(-[0-9a-f]{8})+$", "", Path(source).stem)
    name = name or (label if label in VARIANTS else without_hash)
    path = Path(folder) / f"{name}-{digest[:8]}{SUFFIXES[to]}"
    if not path.exists():
        write_file(content, path)
    elif path.read_bytes() != content:
        raise UserError(f"{path}: already exists with other content, and is not overwritten; give another --name")
    try:
        again, _ = read_weights(path, "raw")
        equal = list(again) == list(state) and all(torch.equal(again[key], state[key]) for key in state)
    except UserError:
        equal = False
    if not equal:
        path.unlink()
        raise UserError(f"{path}: did not read back equal, and was removed")
    return Conversion(
        source=str(source),
        weights=kind,
        network=label,
        num_classes=network.num_classes,
        format=to,
        path=str(path),
        sha256=digest,
        tensors=len(state),
        parameters=sum(p.numel() for p in network.parameters()),
        bytes=len(content),
    )


def read_weights(path: str | Path, which: str = "best") -> tuple[dict[str, Tensor], str]:
    """The state dict in a file, in the network's own order, and which weights it is.

    Raises UserError where the file cannot be read or does not hold the weights of one whole GroupMixFormer.
    """
    state, kind = select_weights(load_file(path), which, str(path))
    own = describe_network(state, str(path))[1].state_dict()
    wrong = [name for name in (*own, *state) if name not in own or name not in state]
    wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"{path}: not the weights of one whole GroupMixFormer; look at {some(wrong)}")
    return {name: state[name] for name in own}, kind  # safetensors files sort by name


def describe_network(state: dict[str, Tensor], origin: str = "weights") -> tuple[str, GroupMixFormer]:
    """The variant or the sizes of a state dict, told by its shapes, and that network on the device `meta`.

    The number of heads changes no shape, so it is the default's. Raises UserError for shapes of another network.
    """
    pattern = re.compile(r"groupmixformer_backbone\.(\d+)\.gma_stage\.(\d+)\.mlp\.fc1\.weight")
    blocks = sorted((int(m[1]), int(m[2]), name) for name in state if (m := pattern.fullmatch(name)))
    first = {stage: state[name].shape for stage, block, name in blocks if block == 0}
    try:
        sizes: dict[str, Any] = dict(
            embed_dims=tuple(first[stage][1] for stage in range(len(first))),
            depths=tuple(sum(stage == s for s, _, _ in blocks) for stage in range(len(first))),
            mlp_ratios=tuple(_mlp_ratio(*first[stage]) for stage in range(len(first))),
        )
        num_classes = state["head.weight"].shape[0] if "head.weight" in state else 0
        with torch.device("meta"):
            network = GroupMixFormer(
                num_classes,
                in_chans=state["conv_stem.proj1.weight"].shape[1],
                qkv_bias="groupmixformer_backbone.0.gma_stage.0.att.qkv.bias" in state,
                **sizes,
            )
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{origin}: holds no weights of a GroupMixFormer; its first names are {some(state)}") from None
    name = next((name for name, numbers in VARIANTS.items() if sizes.items() <= numbers.items()), "")
    return name or "GroupMixFormer " + ", ".join(f"{key} {value}" for key, value in sizes.items()), network


def _mlp_ratio(hidden: int, dim: int) -> float:
    """The ratio for which int(dim * ratio) is `hidden`; the plain quotient may round to one row less."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _encode(state: dict[str, Tensor], to: str) -> bytes:
    """The bytes of a file: the same for equal weights, so that the hash in the name identifies them."""
    # Clones, because a view would bring its whole storage into the file.
    state = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    if to == "safetensors":
        return safetensors.torch.save(state, metadata={"format": "pt"})
    buffer = BytesIO()
    torch.save({"model": state}, buffer)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------- command line
@command("tools.convert")
def main(argv: Sequence[str] | None = None) -> None:
    """Convert by the command line."""
    args = _parse(argv)
    check_json_target(args.json)
    done = convert(args.file, args.to, args.output, args.name, args.weights)
    if args.json:
        write_json(args.json, asdict(done))
    if args.json != STDOUT:
        print(
            f"{done.source}: {done.weights}, {done.network}, {done.num_classes} classes, {done.parameters:,} parameters"
        )
        print(f"written and read back: {done.path} ({done.bytes / 2**20:.1f} MiB)")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.convert", __doc__)
    parser.add_argument("file", metavar="FILE", help="weights to read")
    parser.add_argument("--to", required=True, choices=tuple(SUFFIXES), help="format to write")
    parser.add_argument("--output", default=".", metavar="FOLDER", help="where to write; default: the current folder")
    parser.add_argument("--name", default="", help="name before the hash; default: the variant's, else FILE's")
    parser.add_argument(
        "--weights", default="best", choices=("best", "raw", "ema"), help="of a training checkpoint; default: best"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results for programs; - is standard output")
    args = parser.parse_args(argv)
    if {"/", "\\"} & set(args.name):
        parser.error(f"--name {args.name}: must be a name without folders; give the folder with --output")
    return args


if __name__ == "__main__":
    sys.exit(main())

"""Weights in and out: from any file of this network to one that is fit to publish.

python -m tools.convert FILE --to pth                   {'model': state dict}, as released files are
python -m tools.convert FILE --to safetensors           for timm and other libraries
python -m tools.convert FILE --to birder                for birder's re-implementation, with what its loader asks for

FILE is a released file, a training checkpoint (--weights raw, ema or best), a safetensors file, or a file of birder's.
What is written holds the weights alone (for birder also class names, input size and normalisation), and the first 8
hex digits of its SHA-256 end its name, as timm's do.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from configs import UserError
from configs.commands import CommandParser, command
from models.groupmixformer import GROUP_SIZES, GroupMixFormer
from models.weights import Architecture, architecture_of, network_of
from utils.checkpoint import load_file, select_weights, some
from utils.files import STDOUT, check_json_target, write_file, write_json

SUFFIXES = {"pth": ".pth", "safetensors": ".safetensors", "birder": ".pt"}

# Names here, and in birder 0.8's `birder/net/groupmixformer.py`. Stages count from 1 there; "{0}" is the number of a
# stage. Names that no rule changes below a prefix are the same in both.
_BIRDER_PREFIXES = (
    ("conv_stem.proj1.", "stem.0.0."),
    ("conv_stem.norm1.", "stem.0.1."),
    ("conv_stem.proj2.", "stem.1.0."),
    ("conv_stem.norm2.", "stem.1.1."),
    ("patch_embed_layers.{0}.", "body.stage{0}.patch_embed."),
    ("groupmixformer_backbone.{0}.gma_stage.", "body.stage{0}.gma_blocks."),
    ("norm4.", "features.0."),
    ("head.", "classifier."),
)
_BIRDER_INNER = ((".att.", ".attn."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.3."))


@dataclass(frozen=True)
class Conversion:
    """What was done, for the log and for scripts."""

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


# --------------------------------------------------------------------------------------------------------------- names
def to_birder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of this network under the names of birder's re-implementation."""
    return {_rename(name, here=0): value for name, value in state.items()}


def from_birder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of birder's re-implementation under the names of this network."""
    return {_rename(name, here=1): value for name, value in state.items()}


def _rename(name: str, here: int) -> str:
    """The name in the other library; `here` is 0 for our names and 1 for birder's. Unknown names stay."""
    for pair in _BIRDER_PREFIXES:
        match = re.match(re.escape(pair[here]).replace(r"\{0\}", r"(\d+)"), name)
        if match:
            stages = [int(number) + (1 if here == 0 else -1) for number in match.groups()]
            inner = name[match.end() :]
            for words in _BIRDER_INNER:
                inner = f".{inner}".replace(words[here], words[1 - here], 1)[1:]
            return pair[1 - here].format(*stages) + inner
    return name


# --------------------------------------------------------------------------------------------------------------- files
def read_weights(path: str | Path, which: str = "best") -> tuple[dict[str, Tensor], str]:
    """The state dict in a file of any kind, under our names, and which weights it is.

    Raises UserError where the file cannot be read or its weights are not those of a GroupMixFormer.
    """
    return _weights_in(load_file(path), which, str(path))


def _weights_in(content: dict[str, Any], which: str, origin: str) -> tuple[dict[str, Tensor], str]:
    if isinstance(content.get("state"), dict) and "model" not in content:  # birder's layout
        content = {"model": content["state"]}
    state, kind = select_weights(content, which, origin)
    if any(name.startswith("body.stage1.") for name in state):
        state = from_birder(state)
    return _in_order(state, origin), kind


def describe_network(state: dict[str, Tensor], origin: str = "weights") -> tuple[Architecture, GroupMixFormer]:
    """Sizes of the network that a state dict belongs to, by its shapes alone, and the network on `meta`.

    Raises UserError where the shapes are not those of a GroupMixFormer.
    """
    try:
        return architecture_of(state), network_of(state)
    except ValueError:
        raise UserError(f"{origin}: holds no weights of a GroupMixFormer (its first names: {some(state)})") from None


def convert(source: str | Path, to: str, folder: str | Path, name: str = "", which: str = "best") -> Conversion:
    """Write the weights of a file in another format; nothing is written that does not read back equal.

    Args:
        source: the file to read.
        to: 'pth', 'safetensors' or 'birder'.
        folder: where the new file goes; made where it is not there.
        name: of the new file, before its hash; '' takes the variant's, or else the source's.
        which: of a training checkpoint, 'raw', 'ema', or 'best': those that it was kept for, else raw.

    Where the very file is there already, it stays and is reported like a new one. Raises UserError where the source is
    not fit, or another file has the new one's name.
    """
    checkpoint = load_file(source)
    state, kind = _weights_in(checkpoint, which, str(source))
    sizes, network = describe_network(state, str(source))
    if to == "birder" and sizes.group_sizes != GROUP_SIZES:
        raise UserError(f"{source}: has group sizes {sizes.group_sizes}; birder's network has {GROUP_SIZES} only")
    content = _encode(_for_birder(state, network, checkpoint, sizes) if to == "birder" else state, to)
    digest = hashlib.sha256(content).hexdigest()
    unhashed = re.sub(r"(-[0-9a-f]{8})+$", "", Path(source).stem)  # of a file that this command wrote
    name = name or sizes.variant or unhashed
    path = Path(folder) / f"{name}-{digest[:8]}{SUFFIXES[to]}"
    if not path.exists():
        write_file(content, path)
    elif path.read_bytes() != content:
        raise UserError(f"{path}: already exists, with other content, and is not overwritten; give another --name")
    try:
        again, _ = read_weights(path, "raw")
        equal = list(again) == list(state) and all(torch.equal(again[key], state[key]) for key in state)
    except UserError:
        equal = False
    if not equal:
        path.unlink()
        raise UserError(f"{path}: does not read back as it was written, and was removed")
    return Conversion(
        source=str(source),
        weights=kind,
        network=str(sizes),
        num_classes=network.num_classes,
        format=to,
        path=str(path),
        sha256=digest,
        tensors=len(state),
        parameters=sum(p.numel() for p in network.parameters()),
        bytes=len(content),
    )


def _for_birder(
    state: dict[str, Tensor], network: GroupMixFormer, checkpoint: dict[str, Any], sizes: Architecture
) -> dict[str, Any]:
    """What birder's loader asks for beside the weights, as far as the file tells it; ImageNet's values otherwise."""
    names = checkpoint.get("classes")
    if not isinstance(names, list) or len(names) != network.num_classes:
        names = [str(number) for number in range(network.num_classes)]
    content = {
        "state": to_birder(state),
        "task": "image_classification",
        "signature": {
            "inputs": [{"data_shape": [0, network.in_chans, *[_image_size(checkpoint)] * 2]}],
            "outputs": [{"data_shape": [0, network.num_classes]}],
        },
        "class_to_idx": {name: number for number, name in enumerate(names)},
        "rgb_stats": {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    }
    if not sizes.variant:  # birder has the five under names of its own, and takes other sizes on top of any of them
        content["config"] = {
            "embed_dims": list(sizes.embed_dims),
            "depths": list(sizes.depths),
            "mlp_ratios": list(sizes.mlp_ratios),
        }
    return content


def _image_size(checkpoint: dict[str, Any]) -> int:
    """The edge of the images that a training checkpoint was trained on, in pixels; 224 where it does not say."""
    config = checkpoint.get("config")
    try:
        return int((yaml.safe_load(config) if isinstance(config, str) else config)["DATA"]["IMG_SIZE"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return 224


def _encode(content: dict[str, Any], to: str) -> bytes:
    """The bytes of a file; the same for the same content, so that the hash in the name identifies it.

    Args:
        content: a state dict, or for 'birder' what `_for_birder` returns.
        to: 'pth', 'safetensors' or 'birder'.
    """
    # Clones: a view would drag the whole storage that it was cut from into the file.
    state = content["state"] if to == "birder" else content
    state = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    if to == "safetensors":
        return safetensors.torch.save(state, metadata={"format": "pt"})
    buffer = BytesIO()
    torch.save({**content, "state": state} if to == "birder" else {"model": state}, buffer)
    return buffer.getvalue()


def _in_order(state: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The entries in the network's own order, after a check that they are its; safetensors files sort by name."""
    own = describe_network(state, origin)[1].state_dict()
    wrong = [name for name in (*own, *state) if name not in own or name not in state]
    wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"{origin}: not the weights of one whole GroupMixFormer: look at {some(wrong)}")
    return {name: state[name] for name in own}


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
    parser.add_argument("--output", default=".", metavar="FOLDER", help="where to write; default: the present folder")
    parser.add_argument("--name", default="", help="name before the hash; default: the variant's, else FILE's")
    parser.add_argument(
        "--weights", default="best", choices=("best", "raw", "ema"), help="of a training checkpoint; default: best"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was done as JSON; - prints it")
    args = parser.parse_args(argv)
    if {"/", "\\"} & set(args.name):
        parser.error(f"--name {args.name}: names a file; the folder goes to --output")
    return args


if __name__ == "__main__":
    sys.exit(main())

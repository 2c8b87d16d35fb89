"""Convert weights into a file that is fit to publish.

python -m tools.convert FILE --to pth                   {'model': state dict}, as released files are
python -m tools.convert FILE --to safetensors           for timm and other libraries
python -m tools.convert FILE --to hub --output FOLDER   for timm.create_model("local-dir:FOLDER") and model hubs

FILE is a released file, a training checkpoint of this repository or of timm (--weights raw, ema or best), or a
safetensors file. A new file holds the weights alone. Its name ends with the first 8 hex digits of its SHA-256, as in
timm. A folder for hubs holds the weights, config.json with network, classes and preparation of images, a model card
with the run's numbers and recipe, and the network's one module, which `pip install FOLDER` installs.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from configs import UserError
from configs.commands import CommandParser, command
from models.groupmixformer import GroupMixFormer
from models.weights import Architecture, architecture_of, network_of
from tasks.classification.weights import Weights
from tasks.classification.weights import read_weights as read_parts
from tools.hub import hub_files
from utils.checkpoint import some, stored_config
from utils.files import STDOUT, check_folder, check_json_target, write_file, write_json

SUFFIXES = {"pth": ".pth", "safetensors": ".safetensors"}


@dataclass(frozen=True)
class Conversion:
    """A finished conversion, for the log and for scripts."""

    source: str
    weights: str  # raw or EMA weights of which file, and what of it was left out
    network: str  # name of the variant, or its sizes
    num_classes: int
    format: str
    path: str
    sha256: str
    tensors: int
    parameters: int
    bytes: int


def convert(
    source: str | Path,
    to: str,
    folder: str | Path = "",
    name: str = "",
    which: str = "best",
    cfg: str = "",
    license: str = "unknown",
) -> Conversion:
    """Write the weights of a file in another format.

    Args:
        source: the file to read.
        to: 'pth', 'safetensors' or 'hub'.
        folder: for the new file, or for hubs the folder itself; is made if it does not exist. Default: the current one,
            for hubs one called by the name.
        name: of the new file, before its hash; default: MODEL.NAME of the run, else the variant's, else the source's.
        which: weights of a training checkpoint, see `select_weights`.
        cfg, license: for hubs, see `hub_files`.

    A file of the same name and content is left as it is. Raises UserError where the source does not hold the weights of
    one whole GroupMixFormer, or the new name is taken by other content.
    """
    if to != "hub" or folder:
        check_folder(Path(folder))
    weights = read_weights(source, which)
    checkpoint, state, about = weights
    sizes, network = describe_network(state, str(source))
    content = _encode(state, to)
    digest = hashlib.sha256(content).hexdigest()
    without_hash = re.sub(r"(-[0-9a-f]{8})+$", "", Path(source).stem)
    name = name or (stored_config(checkpoint) or {}).get("MODEL.NAME") or sizes.variant or without_hash
    if to == "hub":
        path = Path(folder or name)
        files = hub_files(str(source), weights, content, name, cfg, license)
    else:
        path = Path(folder) / f"{name}-{digest[:8]}{SUFFIXES[to]}"
        files = {"": content}
    _write_new(path, files, "--output" if to == "hub" else "--name")
    return Conversion(
        source=str(source),
        weights=about,
        network=str(sizes),
        num_classes=network.num_classes,
        format=to,
        path=str(path),
        sha256=digest,
        tensors=len(state),
        parameters=sum(p.numel() for p in network.parameters()),
        bytes=len(content),
    )


def _write_new(path: Path, files: Mapping[str, bytes], flag: str) -> None:
    """Write files below a path, '' for the path itself; UserError, before any is written, where one is there already.

    Files of the same content are left as they are.
    """
    there = {name: (path / name).read_bytes() for name in files if (path / name).is_file()}
    for name, content in there.items():
        if content != files[name]:
            where = path / name
            raise UserError(f"{where}: already exists with other content, and is not overwritten; give another {flag}")
    for name in files.keys() - there.keys():
        write_file(files[name], path / name)


def read_weights(path: str | Path, which: str = "best") -> Weights:
    """The weights in a file, in the network's own order.

    Raises UserError where the file cannot be read or does not hold the weights of one whole GroupMixFormer.
    """
    checkpoint, state, about = read_parts(path, which)
    own = describe_network(state, str(path))[1].state_dict()
    wrong = [name for name in (*own, *state) if name not in own or name not in state]
    wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        task = (stored_config(checkpoint) or {}).get("TASK", "classification")
        if task != "classification":
            raise UserError(f"{path}: is of TASK {task!r}; only classifiers are converted: docs/weights.md")
        raise UserError(f"{path}: not the weights of one whole GroupMixFormer; look at {some(wrong)}")
    return Weights(checkpoint, {name: state[name] for name in own}, about)  # safetensors files sort by name


def describe_network(state: dict[str, Tensor], origin: str = "weights") -> tuple[Architecture, GroupMixFormer]:
    """Sizes of the network that a state dict belongs to, by its shapes alone, and the network on `meta`.

    Raises UserError where the shapes are not those of a GroupMixFormer.
    """
    try:
        return architecture_of(state), network_of(state)
    except ValueError:
        raise UserError(f"{origin}: holds no weights of a GroupMixFormer (its first names: {some(state)})") from None


def _encode(state: dict[str, Tensor], to: str) -> bytes:
    """The bytes of a file: the same for equal weights, so that the hash in the name identifies them."""
    # Clones, because a view would bring its whole storage into the file.
    state = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    if to != "pth":
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
    done = convert(args.file, args.to, args.output, args.name, args.weights, args.cfg, args.license)
    if args.json:
        write_json(args.json, asdict(done))
    if args.json != STDOUT:
        print(f"{done.weights}: {done.network}, {done.num_classes} classes, {done.parameters:,} parameters")
        print(f"written: {done.path} ({done.bytes / 2**20:.1f} MiB)")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.convert", __doc__)
    parser.add_argument("file", metavar="FILE", help="weights to read")
    parser.add_argument("--to", required=True, choices=(*SUFFIXES, "hub"), help="format to write")
    parser.add_argument("--output", default="", metavar="FOLDER", help="where to write; default: here, hub: ./<name>")
    parser.add_argument("--name", default="", help="name before the hash; default: the variant's, else FILE's")
    parser.add_argument(
        "--weights", default="best", choices=("best", "raw", "ema"), help="of a training checkpoint; default: best"
    )
    parser.add_argument("--cfg", default="", metavar="YAML", help="hub: of the network; default: what FILE holds")
    parser.add_argument("--license", default="unknown", help="hub: of the weights, for the card; default: unknown")
    parser.add_argument("--json", metavar="FILE", help="write the results for programs; - is standard output")
    args = parser.parse_args(argv)
    if {"/", "\\"} & set(args.name):
        parser.error(f"--name {args.name}: must be a name without folders; give the folder with --output")
    return args


if __name__ == "__main__":
    sys.exit(main())

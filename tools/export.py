"""The network as a file that runs without this code: ONNX or torch.export, for any batch and any height and width.

python -m tools.export --cfg configs/groupmixformer_small.yaml --pretrained FILE --format onnx
python -m tools.export --cfg configs/groupmixformer_small.yaml --resume FILE --weights ema --format pt2 --features

The file takes images (B, channels, H, W), float32, normalised as in evaluation, and gives logits (B, classes), or with
--features the maps of all stages. It is read back, run at two sizes with two batch sizes each, and compared with the
network; a file that differs by more than 1e-4 is not kept.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError, get_config
from configs.commands import CommandParser, command
from configs.errors import first_line
from tasks.classification.weights import network_with
from utils.files import STDOUT, check_json_target, write_json

from .convert import read_weights

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}
TOLERANCE = 1e-4  # largest difference from the network, over the largest value where that is above 1
OLDEST_OPSET = 18  # what torch writes; others are converted from it
MIN_SIZE = 33  # the last map of a smaller image has one pixel, which the exporter would take for a constant
AXES = ("batch", "channels", "height", "width")
BATCHES = (1, 3)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """What was exported, and by how much it differs from the network; for scripts."""

    path: str
    format: str
    weights: str
    inputs: list[str]
    outputs: list[str]
    largest_differences: dict[str, float]  # by the shape of the input, such as '3x3x224x224'
    bytes: int


class StageMaps(nn.Module):
    """A network that returns the maps of all its stages: (B, C, H, W) -> ((B, C_i, H_i, W_i), ...)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.forward_stages(x))


def load_network(config: CfgNode, path: str, which: str) -> tuple[nn.Module, str]:
    """The configuration's network for evaluation, with the classes of the weights, and which weights it has."""
    state, kind = read_weights(path, which)
    return network_with(config, state, path), f"{kind} of {path}"


def export(
    network: nn.Module, path: Path, to: str, size: int, opset: int = OLDEST_OPSET, report: Report = lambda line: None
) -> dict[str, float]:
    """Write a network as a file, after comparing what it computes with the network itself.

    Args:
        network: takes images (B, C, H, W), and returns a tensor or a tuple of them.
        path: the new file.
        to: 'onnx' or 'pt2'.
        size: height and width to export and verify with, in pixels; the file takes any from MIN_SIZE on.
        opset: of ONNX.
        report: is called with one line for every step.

    Returns the largest difference for every shape tried. Raises UserError where the export fails, its values differ, or
    the file already exists; then nothing is written.
    """
    if path.exists():
        raise UserError(f"{path}: already exists and is not overwritten; give another --output")
    channels = next(p for p in network.parameters() if p.ndim == 4).shape[1]
    images = _images((2, channels, size, size))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    with folder:
        partial = Path(folder.name) / path.name
        report(f"exporting for any batch, height and width, by images of {size} x {size}")
        try:
            with warnings.catch_warnings(), _quiet_libraries():
                warnings.simplefilter("ignore")
                _write(network, images, partial, to, opset, report)
                compute = _open(partial, to)
        except UserError:
            raise
        except Exception as error:  # exporters raise whatever they like
            raise UserError(f"{path}: export to {to} failed ({type(error).__name__}: {first_line(error)})") from None
        differences = {}
        for height, width in ((size, size), (size + 19, max(size - 13, MIN_SIZE))):
            for batch in BATCHES:
                shape = (batch, channels, height, width)
                name = "x".join(map(str, shape))
                differences[name] = _largest_difference(network, compute, _images(shape), path)
                report(f"verified {name}: largest difference {differences[name]:.1e}")
        os.replace(partial, path)
    return differences


def _images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _write(network: nn.Module, images: Tensor, path: Path, to: str, opset: int, report: Report) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    if to == "pt2":
        torch.export.save(program, path)
        return
    report("traced; converting to ONNX")
    count = len(_tuple(network(images[:1])))
    outputs = _output_names(count)
    with redirect_stdout(sys.stderr):  # some versions of the exporter tell how many rules they applied
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
        _simplify(onnx_program.model)
    _name_axes(onnx_program.model)
    onnx_program.save(str(path))


def _simplify(model: Any) -> None:
    """Fold constants and merge what is the same in an ONNX model, in place.

    A selection of the passes of the exporter's own optimizer, which also looks for patterns to rewrite: that doubles
    the time of the conversion, and onnxruntime is as fast without.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    passes.InlinePass()(model)
    optimizer.fold_constants(model)
    for simplify in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.NameFixPass(),
    ):
        simplify(model)


def _name_axes(model: Any) -> None:
    """Call the axes of the images batch, height and width, everywhere in an ONNX model; the exporter calls them s77."""
    (images,) = model.graph.inputs
    names = {str(dim): name for dim, name in zip(images.shape, AXES) if not isinstance(dim, int)}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = [images, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                value.shape[axis] = pattern.sub(lambda found: names[found[0]], str(dim.value))


def _open(path: Path, to: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What the file computes, as a function of images."""
    if to == "pt2":
        module = torch.export.load(path).module()
        return lambda images: _tuple(module(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()}))


@torch.no_grad()
def _largest_difference(network: nn.Module, compute: Callable, images: Tensor, path: Path) -> float:
    """The largest difference between file and network, over the largest value where that is above 1."""
    expected = _tuple(network(images))
    try:
        got = compute(images)
    except Exception as error:
        shape = tuple(images.shape)
        raise UserError(f"{path}: not written: the export does not run on {shape}: {first_line(error)}") from None
    largest = 0.0
    for ours, theirs in zip(expected, got, strict=True):
        if ours.shape != theirs.shape:
            raise UserError(f"{path}: not written: gives {tuple(theirs.shape)} for {tuple(ours.shape)}")
        difference = ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1)).item()
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"{path}: not written: differs from the network by {difference:.1e} on images of "
                f"{tuple(images.shape)}; {TOLERANCE:g} is allowed"
            )
        largest = max(largest, difference)
    return largest


def _tuple(values: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _output_names(count: int) -> list[str]:
    return ["logits"] if count == 1 else [f"stage{i}" for i in range(1, count + 1)]


class _quiet_libraries:
    """Keep exporters from logging below errors: what they did is verified."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *exception: object) -> None:
        logging.disable(self.before)


# ------------------------------------------------------------------------------------------------------- command line
@command("tools.export")
def main(argv: Sequence[str] | None = None) -> None:
    """Export by the command line."""
    args = _parse(argv)
    check_json_target(args.json)
    report: Report = (lambda line: None) if args.json == STDOUT else lambda line: print(line, flush=True)
    if args.format == "onnx":
        _require_onnx()
    config = get_config(args, report)
    weights = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if not weights:
        raise UserError("no weights to export: give a file with --resume or --pretrained")
    if config.DATA.IMG_SIZE < MIN_SIZE:
        raise UserError(
            f"DATA.IMG_SIZE = {config.DATA.IMG_SIZE}: exports are verified at {MIN_SIZE} pixels and more; pass "
            "--img-size 64"
        )
    default = f"{config.MODEL.NAME}{'_features' if args.features else ''}{SUFFIXES[args.format]}"
    path = Path(args.output or default)
    network, kind = load_network(config, weights, config.TEST.WEIGHTS)
    report(f"{config.MODEL.NAME}: {kind}")
    if args.features:
        network = StageMaps(network)
    differences = export(network, path, args.format, config.DATA.IMG_SIZE, args.opset, report)
    outputs = _output_names(len(config.MODEL.GMA.SERIAL_DEPTHS) if args.features else 1)
    done = Export(str(path), args.format, kind, ["images"], outputs, differences, path.stat().st_size)
    report(f"written: {path} ({done.bytes / 2**20:.1f} MiB)")
    if args.json:
        write_json(args.json, asdict(done))


def _require_onnx() -> None:
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install -r requirements-extras.txt")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.export", __doc__)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file of the variant, configs/*.yaml")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="set any key")
    parser.add_argument("--pretrained", metavar="FILE", help="weights to export")
    parser.add_argument("--resume", metavar="FILE", help="training checkpoint to export")
    parser.add_argument("--weights", choices=("best", "raw", "ema"), help="of a training checkpoint; default: best")
    parser.add_argument("--format", required=True, choices=tuple(SUFFIXES), help="what to write")
    parser.add_argument("--features", action="store_true", help="give the maps of all stages instead of logits")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="to verify with; default: DATA.IMG_SIZE")
    parser.add_argument("--opset", type=int, default=OLDEST_OPSET, help=f"of ONNX; default: {OLDEST_OPSET}")
    parser.add_argument("--output", default="", metavar="FILE", help="default: <MODEL.NAME>[_features].<format>")
    parser.add_argument("--json", metavar="FILE", help="write what was done as JSON; - prints it")
    args = parser.parse_args(argv)
    if args.opset < OLDEST_OPSET:
        parser.error(f"--opset {args.opset}: must be at least {OLDEST_OPSET}")
    if args.img_size is not None:
        args.opts += ["DATA.IMG_SIZE", str(args.img_size)]
    return args


if __name__ == "__main__":
    sys.exit(main())

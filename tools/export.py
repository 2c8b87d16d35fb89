"""Export the network as a file that runs without this code: ONNX or torch.export, for any batch, height and width.

python -m tools.export --cfg configs/groupmixformer_small.yaml --pretrained FILE --format onnx
python -m tools.export --resume <checkpoint of a run> --weights ema --format pt2 --features

The file takes images (B, channels, H, W), float32, normalised as in evaluation. It gives logits (B, classes), or with
--features the maps of all stages. A segmenter gives logits (B, classes, H, W); UPerNet becomes pt2 only. A detector
becomes ONNX only, for one image of one size, and gives boxes, labels, scores, and masks where it has them.

The file is read back, run at two sizes with two batch sizes each, and compared with the network. A file that differs by
more than 1e-4 is not kept.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError, image_size, read_command
from configs.commands import CommandParser, command
from configs.errors import existing_file, first_line
from tasks import keys_of
from tasks.classification.weights import network_with, read_weights
from tasks.detection.weights import load_detector
from tasks.segmentation.weights import load_segmenter
from utils.files import STDOUT, check_json_target, write_json
from utils.origin import check_named_files, config_of, remarks

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4  # largest difference from the network, over the largest value where that is above 1
OPSET = 18  # of ONNX: what torch writes, and the oldest that it can
MIN_SIZE = 33  # pixels; a smaller image has a last map of one pixel, which the exporter takes for a constant
AXES = {0: "batch", 2: "height", 3: "width"}
BATCHES = (1, 3)

Report = Callable[[str], None]


class StageMaps(nn.Module):
    """A network that returns the maps of all its stages: (B, C, H, W) -> ((B, C_i, H_i, W_i), ...)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.outputs = [f"stage{i}" for i, _ in enumerate(network.feature_info, 1)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.forward_stages(x))


class OneImage(nn.Module):
    """A detector of one image of one size: (1, 3, H, W) -> boxes (N, 4), labels (N), scores (N), maybe masks.

    Boxes are left, top, right, bottom in pixels of the image. Labels are class indices. Masks (N, 1, 28, 28) are
    probabilities within the boxes.
    """

    one_image = True

    def __init__(self, network: nn.Module, masks: bool) -> None:
        super().__init__()
        self.network = network
        self.outputs = ["boxes", "labels", "scores", *(["masks"] if masks else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.network([images[0]])
        return tuple(found[name] - self.network.first_label * (name == "labels") for name in self.outputs)


def export(
    network: nn.Module, path: Path, to: str, size: tuple[int, int], report: Report = lambda line: None
) -> dict[str, float]:
    """Export a network to a file, after comparing what the file computes with the network.

    Args:
        network: takes images (B, C, H, W), and returns a tensor or a tuple of tensors.
        path: the new file.
        to: 'onnx' or 'pt2'.
        size: height and width to export and verify with, in pixels; the file takes any from MIN_SIZE on, but of an
            `OneImage` this one.
        report: is called with one line for each step.

    Returns the largest difference for each shape tried, such as {'3x3x224x224': 2e-6}. Raises UserError, and writes
    nothing, where the export fails, its values differ, or the file already exists.
    """
    if path.exists():
        raise UserError(f"{path}: already exists and is not overwritten; give another --output")
    channels = next(p for p in network.parameters() if p.ndim == 4).shape[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    with folder:
        partial = Path(folder.name) / path.name
        one_image = getattr(network, "one_image", False)
        batches, sizes = (1,), (size,)
        which = "one image"
        if not one_image:
            batches, sizes = BATCHES, (size, (size[0] + 19, max(size[1] - 13, MIN_SIZE)))
            which = "any batch, height and width, by images"
        report(f"exporting for {which} of {size[0]} x {size[1]}")
        try:
            with quiet_exporters():
                _write(network, _images((1 if one_image else 2, channels, *size)), partial, to)
                compute = _open(partial, to)
        except ImportError as error:
            requirements = existing_file("requirements-extras.txt")
            install = f"-r {requirements}" if requirements else "onnx onnxscript onnxruntime"
            raise UserError(f"--format {to}: {first_line(error)}; pip install {install}") from None
        except Exception as error:  # exporters raise whatever they like
            raise UserError(f"{path}: export to {to} failed ({type(error).__name__}: {first_line(error)})") from None
        differences = {}
        for height, width in sizes:
            for batch in batches:
                shape = (batch, channels, height, width)
                name = "x".join(map(str, shape))
                differences[name] = _largest_difference(network, compute, _images(shape), path)
                report(f"verified {name}: largest difference {differences[name]:.1e}")
        os.replace(partial, path)
    return differences


def _images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _write(network: nn.Module, images: Tensor, path: Path, to: str) -> None:
    if to == "pt2":
        dynamic = dict.fromkeys(AXES, torch.export.Dim.DYNAMIC)
        with torch.no_grad():
            torch.export.save(torch.export.export(network, (images,), dynamic_shapes=(dynamic,)), path)
        return
    import onnxruntime  # noqa: F401 - where it is missing, say so now and not after minutes

    torch.onnx.export(
        network,
        (images,),
        path,
        opset_version=OPSET,
        input_names=["images"],
        output_names=output_names(network),
        external_data=False,
        verbose=False,
        # How many boxes are found depends on the image, which torch.export does not take; the older exporter does.
        **({"dynamo": False} if getattr(network, "one_image", False) else {"dynamo": True, "dynamic_shapes": (AXES,)}),
    )


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
        # A detector may find nothing in noise.
        difference = ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1)).item() if ours.numel() else 0.0
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"{path}: not written: differs from the network by {difference:.1e} on images of "
                f"{tuple(images.shape)}; {TOLERANCE:g} is allowed"
            )
        largest = max(largest, difference)
    return largest


def _tuple(values: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def output_names(network: nn.Module) -> list[str]:
    return getattr(network, "outputs", ["logits"])


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Show nothing of the exporters but errors: the file is verified, whatever they say."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check_exportable(config: CfgNode, to: str, features: bool) -> None:
    """Raise UserError where torch or ONNX cannot express the network, with what can be done."""
    if features and config.TASK != "classification":
        raise UserError(f"--features: for the task {config.TASK!r} only its whole network is exported; leave it out")
    if config.TASK == "detection" and to == "pt2":
        raise UserError(
            "--format pt2: torch.export does not take torchvision's detectors, because the number of boxes depends on "
            "the image; use --format onnx"
        )
    if config.TASK == "segmentation" and config.MODEL.HEAD == "upernet" and to == "onnx":
        raise UserError(
            "--format onnx: ONNX has no pooling to 2, 3 and 6 cells of a map of any size, as UPerNet's; use --format "
            "pt2, or train MODEL.HEAD 'semantic_fpn'"
        )


def load_network(config: CfgNode, path: str, features: bool) -> tuple[nn.Module, str]:
    """The network to export, of any task, and what was loaded, for the log."""
    if config.TASK == "segmentation":
        network, _, about = load_segmenter(config, path)
        return network, about
    if config.TASK == "detection":
        network, _, about = load_detector(config, path, None)
        return OneImage(network.eval(), config.MODEL.DETECTOR == "mask_rcnn").eval(), about
    loaded = read_weights(path, config.TEST.WEIGHTS)
    network = network_with(config, loaded, path)
    return StageMaps(network) if features else network, loaded.about


# ------------------------------------------------------------------------------------------------------- command line
@command("tools.export")
def main(argv: Sequence[str] | None = None) -> None:
    """Export by the command line."""
    args = _parse(argv)
    check_json_target(args.json)
    report: Report = (lambda line: None) if args.json == STDOUT else lambda line: print(line, flush=True)
    flags = [f"--{name}={getattr(args, name)}" for name in ("pretrained", "resume", "weights") if getattr(args, name)]
    words = [*(["--cfg", args.cfg] if args.cfg else []), *flags, *(["--opts", *args.opts] if args.opts else [])]
    _, config, keys = read_command(words, keys_of, report, config_of=config_of)
    check_named_files(config, keys)
    weights = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if not weights:
        raise UserError("no weights to export: give a file with --resume or --pretrained")
    size = image_size(config)
    if config.TASK == "detection" and not args.img_size:
        size = (config.TEST.MIN_SIZE, config.TEST.MIN_SIZE)
    check_exportable(config, args.format, args.features)
    if min(size) < MIN_SIZE:
        raise UserError(f"DATA.IMG_SIZE = {config.DATA.IMG_SIZE}: must be at least {MIN_SIZE}; pass --img-size 64")
    for remark in remarks(config, keys, measures=False, cfg=args.cfg):
        report(remark)
    network, about = load_network(config, weights, args.features)
    report(f"{config.MODEL.NAME}: {about}")
    path = Path(args.output or f"{config.MODEL.NAME}{'_features' if args.features else ''}.{args.format}")
    differences = export(network, path, args.format, size, report)
    report(f"written: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    if args.json:
        done = {"path": str(path), "format": args.format, "weights": about, "inputs": ["images"]}
        done |= {"outputs": output_names(network), "largest_differences": differences, "bytes": path.stat().st_size}
        write_json(args.json, done)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.export", __doc__)
    parser.add_argument("--cfg", metavar="FILE", help="YAML file of the variant; default: what the weights came with")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="set any key")
    parser.add_argument("--pretrained", metavar="FILE", help="weights to export")
    parser.add_argument("--resume", metavar="FILE", help="training checkpoint to export")
    parser.add_argument("--weights", choices=("best", "raw", "ema"), help="of a training checkpoint; default: best")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--features", action="store_true", help="give the maps of all stages instead of logits")
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="one, or height and width, to verify with; default: DATA.IMG_SIZE",
    )
    parser.add_argument("--output", default="", metavar="FILE", help="default: <MODEL.NAME>[_features].<format>")
    parser.add_argument("--json", metavar="FILE", help="write the results for programs; - is standard output")
    args = parser.parse_args(argv)
    if args.img_size is not None:
        size = args.img_size if len(args.img_size) > 1 else args.img_size[0]  # a segmenter takes squares alone
        args.opts += ["DATA.IMG_SIZE", str(size)]
    return args


if __name__ == "__main__":
    sys.exit(main())

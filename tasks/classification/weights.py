"""From a file of weights to a classifier; UserError names the file and what is wrong with it."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from yacs.config import CfgNode

from configs import UserError, read_config, with_num_classes
from configs.errors import first_line
from models import VARIANTS, GroupMixFormer
from models.weights import IMAGENET_21K_CLASSES, Architecture, architecture_of, map_head, num_classes_of, take_head
from tasks import keys_of
from tasks.networks import build_model
from utils.checkpoint import load_exactly, load_file, select_weights

from .class_names import class_names

CONFIGS_FOLDER = Path(__file__).resolve().parents[2] / "configs"


def load_weights(
    network: GroupMixFormer,
    path: str | Path,
    which: str = "best",
    classes: Sequence[str] = (),
    notify: Callable[[str], None] = lambda line: None,
) -> str:
    """Load weights into a network of the same shape and number of classes; returns what was loaded, for the log.

    Args:
        network: takes the weights.
        path: a checkpoint of ours, a released one, or a bare state dict.
        which: 'raw', 'ema' or 'best', see `utils.checkpoint.select_weights`.
        classes: the names of the data's classes.
        notify: is called with one line where the checkpoint has other names for its classes. Folders may have been
            renamed, so that is no error; or it is another data set with as many classes.

    Raises UserError that names missing, unexpected and differently shaped entries.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, which, str(path))
    own, loaded = network.num_classes, num_classes_of(state)
    if own != loaded and own and loaded:
        raise UserError(
            f"{path}: its head has {loaded} classes, but the data has {own}: class indices would not agree. Give the "
            "data folder that the weights were trained on (all its classes), or fine-tune with train.py --pretrained"
        )
    load_exactly(network, state, str(path), fitting_config)
    if renamed := _renamed_classes(checkpoint, classes):
        notify(f"{path}: {renamed}: the accuracy means nothing unless they are the same classes in the same order")
    return f"{kind} of {path}"


def _renamed_classes(checkpoint: dict[str, Any], classes: Sequence[str]) -> str:
    """How the class names in a checkpoint differ from the data's; '' where they do not, or it has none."""
    trained_on = checkpoint.get("classes")
    renamed = [pair for pair in zip(trained_on if isinstance(trained_on, list) else (), classes) if pair[0] != pair[1]]
    if not renamed:
        return ""
    before, now = renamed[0]
    others = f"{len(renamed)} of its {len(classes)} classes have other names than the data's"
    return f"{others}, the first {before!r} against {now!r}"


def load_pretrained(network: GroupMixFormer, path: str | Path, class_map: str = "", classes: Sequence[str] = ()) -> str:
    """Load weights to fine-tune from; a head of another number of classes stays fresh, or is mapped.

    A head of ImageNet-21k's 21841 classes becomes one of 1000 by `class_map`, a text file whose line i holds the
    row of class i. Returns what was done, for the log; it says so where a head of as many classes is kept although
    they have other names than the data's `classes`.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, "best", str(path))
    own, loaded = network.num_classes, num_classes_of(state)
    note = ""
    if own != loaded:
        if class_map:
            _map_head(state, class_map, own, str(path))
            note = f"; head mapped from {loaded} to {own} classes by {class_map}"
        elif loaded == IMAGENET_21K_CLASSES and own == 1000:
            raise UserError(
                f"{path}: its head has the {loaded} classes of ImageNet-21k; give the file that maps them to the 1000 "
                "of ImageNet-1k (one row number per line) with --opts MODEL.CLASS_MAP FILE"
            )
        else:
            take_head(state, network)
            note = f"; head of {loaded} classes left out, a fresh one has {own}"
    elif renamed := _renamed_classes(checkpoint, classes):
        note = f"; its head too, although {renamed}"
    load_exactly(network, state, str(path), fitting_config)
    return f"{kind} of {path}{note}"


def _map_head(state: dict[str, Tensor], class_map: str, num_classes: int, origin: str) -> None:
    """Map the head by a text file with one row number a line."""
    try:
        rows = [int(word) for word in Path(class_map).read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL.CLASS_MAP = {class_map!r}: cannot be read: {first_line(error)}") from None
    try:
        map_head(state, rows, num_classes)
    except ValueError as error:
        raise UserError(f"MODEL.CLASS_MAP = {class_map!r}: does not fit {origin}: {error}") from None


def network_with(config: CfgNode, state: dict[str, Tensor], origin: str) -> GroupMixFormer:
    """The configuration's network for evaluation, with these weights and as many classes as they have."""
    network = build_model(with_num_classes(config, num_classes_of(state)))
    network.set_grad_checkpointing(False)
    load_exactly(network, state, origin, fitting_config)
    return network.eval()


def load_classifier(config: CfgNode, path: str) -> tuple[GroupMixFormer, list[str], str]:
    """The configuration's network for evaluation, with the weights of a file, whatever their number of classes.

    Returns the network, the names of its classes, and what was loaded, for the log. Raises UserError where the weights
    have no head.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, config.TEST.WEIGHTS, path)
    if not num_classes_of(state):
        raise UserError(f"{path}: has no head.weight, so its classes are not known")
    names = class_names(checkpoint, with_num_classes(config, num_classes_of(state)))
    return network_with(config, state, path), names, f"{kind} of {path}"


def fitting_config(state: dict[str, Tensor]) -> str:
    """The name of the file in configs/ whose network has these sizes, without its suffix; '' for none."""
    try:
        sizes = architecture_of(state)
    except ValueError:
        return ""
    # Published variants first: files of users may build on theirs.
    for file in sorted(CONFIGS_FOLDER.glob("*.yaml"), key=lambda file: (file.stem not in VARIANTS, file.stem)):
        with contextlib.suppress(UserError):  # a half-written file of the user's
            gma = read_config(["--cfg", str(file)], keys_of, lambda line: None).MODEL.GMA
            if sizes == Architecture.of(gma.EMBEDDING_DIMS, gma.SERIAL_DEPTHS, gma.MLP_RATIOS, gma.GROUP_SIZES):
                return file.stem
    return ""

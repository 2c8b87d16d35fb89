"""From a file of weights to a classifier; UserError names the file and what is wrong with it."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from yacs.config import CfgNode

from configs import UserError, read_config, with_num_classes
from configs.errors import first_line
from models import VARIANTS, GroupMixFormer
from models.weights import (
    FIRST_CONVOLUTION,
    Architecture,
    architecture_of,
    map_head,
    normalize,
    num_classes_of,
    sum_colours,
    take_head,
    take_last_norm,
)
from tasks import keys_of
from tasks.networks import build_model
from utils.checkpoint import load_exactly, load_file, select_weights, some, stored_config

from .class_names import class_names, known_names

CONFIGS_FOLDER = Path(__file__).resolve().parents[2] / "configs"
Notify = Callable[[str], None]


class Weights(NamedTuple):
    """One GroupMixFormer from a file."""

    checkpoint: dict[str, Any]  # all that the file holds
    state: dict[str, Tensor]  # under the network's own names
    about: str  # which weights of which file, and what of it was left out; for the log


def read_weights(path: str | Path, which: str = "best") -> Weights:
    """Read a file of weights, whatever has wrapped the network whose weights they are.

    Args:
        path: a checkpoint of ours, a released one, a bare state dict; of the network alone or as a part of another.
        which: 'raw', 'ema' or 'best', see `utils.checkpoint.select_weights`.

    Raises UserError where it holds no weights of a GroupMixFormer, or of several.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, which, str(path))
    try:
        state, others = normalize(state)
    except ValueError as error:
        raise UserError(f"{path}: {error}; its first names are {some(state)}") from None
    left_out = f"; {len(others)} entries of other parts are left out ({some(others)})" if others else ""
    return Weights(checkpoint, state, f"{kind} of {path}{left_out}")


def load_weights(
    network: GroupMixFormer,
    weights: Weights,
    path: str | Path,
    classes: Sequence[str] = (),
    notify: Notify = lambda line: None,
) -> None:
    """Load weights into a network of the same shape and number of classes.

    Args:
        network: takes the weights.
        weights: from `read_weights`.
        path: their file, for messages.
        classes: the names of the data's classes.
        notify: is called with one line where the checkpoint has other names for its classes. Folders may have been
            renamed, so that is no error; or it is another data set with as many classes.

    Raises UserError that names missing, unexpected and differently shaped entries.
    """
    own, loaded = network.num_classes, num_classes_of(weights.state)
    if own != loaded and own and loaded:
        raise UserError(
            f"{path}: its head has {loaded} classes, but the data has {own}: class indices would not agree. Give the "
            "data folder that the weights were trained on (all its classes), or fine-tune with train.py --pretrained"
        )
    _fill(network, weights, path)
    if renamed := renamed_classes(weights.checkpoint, classes):
        notify(f"{path}: {renamed}: the accuracy means nothing unless they are the same classes in the same order")


def renamed_classes(checkpoint: dict[str, Any], classes: Sequence[str]) -> str:
    """How the class names in a checkpoint differ from the data's; '' where they do not, or one of them has none."""
    trained_on, now = known_names(checkpoint.get("classes")), known_names(classes)
    renamed = [pair for pair in zip(trained_on, now) if pair[0] != pair[1]]
    if not renamed:
        return ""
    others = f"{len(renamed)} of its {len(classes)} classes have other names than the data's"
    return f"{others}, the first {renamed[0][0]!r} against {renamed[0][1]!r}"


def load_pretrained(network: GroupMixFormer, path: str | Path, class_map: str = "", classes: Sequence[str] = ()) -> str:
    """Load weights to fine-tune from; a head of another number of classes stays fresh, or is mapped.

    A network for grey images takes weights for colour: their stem is summed, as timm does.
    `class_map` is a text file whose line i holds the row of the head that is class i: ImageNet-21k's 21841 classes have
    those of ImageNet-1k among them. Returns what was done, for the log; it says so where a head of as many classes is
    kept although they have other names than the data's `classes`.
    """
    weights = read_weights(path)
    own, loaded = network.num_classes, num_classes_of(weights.state)
    note = ""
    if own != loaded and class_map:
        _map_head(weights.state, class_map, own, str(path))
        note = f"; head mapped from {loaded} to {own} classes by {class_map}"
    elif own != loaded:
        take_head(weights.state, network)
        what = f"head of {loaded} classes left out" if loaded else "no head in it"
        note = f"; {what}, a fresh one has {own}"
    else:
        if renamed := renamed_classes(weights.checkpoint, classes):
            note = f"; its head too, although {renamed}"
        note += f"; MODEL.CLASS_MAP {class_map} is not used: its head has {own} classes already" * bool(class_map)
    if sum_colours(weights.state, network):
        note += "; its stem is for colour, and is summed for grey images"
    if take_last_norm(weights.state, network):
        note += "; no last norm (norm4) in it, a fresh one is used"
    _fill(network, weights, path)
    return f"{weights.about}{note}"


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


def network_with(config: CfgNode, weights: Weights, origin: str | Path) -> GroupMixFormer:
    """The configuration's network for evaluation, with these weights and as many classes as they have."""
    network = build_model(with_num_classes(config, num_classes_of(weights.state)))
    network.set_grad_checkpointing(False)
    _fill(network, weights, origin)
    return network.eval()


def load_classifier(
    config: CfgNode, path: str, notify: Notify = lambda line: None
) -> tuple[GroupMixFormer, list[str], str]:
    """The configuration's network for evaluation, with the weights of a file, whatever their number of classes.

    Returns the network, the names of its classes, and what was loaded, for the log. `notify` is called with one line
    where the names are not known. Raises UserError where the weights have no head.
    """
    weights = read_weights(path, config.TEST.WEIGHTS)
    if not num_classes_of(weights.state):
        raise UserError(f"{path}: {_NO_HEAD}")
    names = class_names(weights.checkpoint, with_num_classes(config, num_classes_of(weights.state)), notify)
    return network_with(config, weights, path), names, weights.about


_NO_HEAD = "has no head.weight, so it tells no classes; fine-tune it with train.py --pretrained"


def _fill(network: GroupMixFormer, weights: Weights, origin: str | Path) -> None:
    """Load all weights of a network; UserError says which fit where, and what differs."""
    if network.num_classes and not num_classes_of(weights.state):
        raise UserError(f"{origin}: {_NO_HEAD}")
    load_exactly(network, weights.state, str(origin), partial(_whose, network, weights.checkpoint))


def _whose(network: GroupMixFormer, checkpoint: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Of which network weights are that do not fit this one, and what to do where that is not what was done."""
    other = "weights of another network than the configuration describes"
    stem, own = state.get(FIRST_CONVOLUTION), network.in_chans
    if stem is not None and stem.ndim == 4 and stem.shape[1] in {1, 3} - {own}:
        channels = stem.shape[1]
        return f"weights for images of {channels} channels, not {own}; set MODEL.GMA.IN_DIM {channels}"
    if architecture_of(state) == architecture_of(network.state_dict()):
        return "not all weights of this network, or more"
    if stored := stored_config(checkpoint):
        name = stored.get("MODEL.NAME")
        return f"{other}; train with the --cfg of {name}, or evaluate without --cfg: the file holds its own"
    known = fitting_config(state)
    return f"weights of {known}, use --cfg configs/{known}.yaml" if known else other


def fitting_config(state: dict[str, Tensor]) -> str:
    """The name of the file in configs/ whose network has these sizes, without its suffix; '' for none."""
    sizes = architecture_of(state)
    # Published variants first: files of users may build on theirs.
    for file in sorted(CONFIGS_FOLDER.glob("*.yaml"), key=lambda file: (file.stem not in VARIANTS, file.stem)):
        with contextlib.suppress(UserError):  # a half-written file of the user's
            gma = read_config(["--cfg", str(file)], keys_of, lambda line: None).MODEL.GMA
            shape = (gma.EMBEDDING_DIMS, gma.SERIAL_DEPTHS, gma.MLP_RATIOS, gma.GROUP_SIZES)
            if sizes == Architecture.of(*shape, gma.LOCAL_BRANCH, gma.RELATIVE_POSITION):
                return file.stem
    return ""

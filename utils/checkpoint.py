"""Checkpoints: what is in one, how it is written and found again, and weights from elsewhere.

A training checkpoint is a dict with

    model, model_ema   state dicts of the raw network and of its moving average (model_ema only where EMA is on)
    optimizer, scaler  their state dicts
    lr_scheduler       likewise, for readers of released files: here the learning rate is a function of the update
    epoch              the epoch it was taken in, counted from 0
    num_updates        updates since the start of the run
    max_accuracy       best number so far of those that decide (top-1, percent); best_weights: of 'raw' or 'ema' weights
    is_best            whether it is the run's best one so far
    progress           where training continues and what the epoch has seen so far (`utils.engine.LoopState`)
    global_batch, world_size, data_order, data_fingerprint   what decides which images an update sees
    val_fingerprint                                          of the validation images
    classes            their names, in the order of the head's rows
    config             the resolved configuration as YAML text

Files are loaded with torch's `weights_only=True`, which runs no code from the file. Released files hold {'model': ...},
or a training checkpoint whose `config` is a pickled yacs CfgNode: it is read as a plain mapping. Weights alone may also
come as a safetensors file, and as what timm's train.py writes (`state_dict`, `state_dict_ema`, and its `args`).
"""

import contextlib
import errno
import fcntl
import math
import os
import re
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import tasks
from configs import UserError, read_config, with_num_classes
from configs.errors import first_line
from models import PLAIN_TYPES, VARIANTS

from .failures import unwritable

BEST_NAME = "ckpt_best.pth"
SAVING = threading.Lock()  # held while a checkpoint is written: no thread ends the process then
PRETRAINED_FOLDER = Path(__file__).resolve().parents[1] / "pretrained"  # where users put released weights
CONFIGS_FOLDER = Path(__file__).resolve().parents[1] / "configs"
_RAW_KEYS = ("model", "state_dict")  # ours and the release's; timm's
_EMA_KEYS = ("model_ema", "state_dict_ema")
LOCK_NAME = "run.lock"
LOCK_SECONDS = 120  # an NFSv4 server takes 90 to drop the locks of a client that is gone
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # NFS without lockd, Lustre mounted with noflock
_NAME = re.compile(r"ckpt_epoch_(\d+)(?:_update_(\d+))?\.pth")
IMAGENET_21K_CLASSES = 21841
_ZIP_FOLDER = 0x10  # attribute of a zip record that is a folder
HEAD_KEYS = ("head.weight", "head.bias")


# ------------------------------------------------------------------------------------------------------ files and names
def checkpoint_path(folder: Path, epoch: int, update: int | None = None) -> Path:
    """ckpt_epoch_<n>.pth after a whole epoch, ckpt_epoch_<n>_update_<u>.pth after the first u updates of one."""
    return folder / (f"ckpt_epoch_{epoch}.pth" if update is None else f"ckpt_epoch_{epoch}_update_{update}.pth")


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints that a run can continue from, in the order of training."""

    def position(path: Path) -> tuple[int, float]:
        epoch, update = _NAME.fullmatch(path.name).groups()
        return int(epoch), math.inf if update is None else int(update)

    return sorted((path for path in folder.glob("ckpt_epoch_*.pth") if _NAME.fullmatch(path.name)), key=position)


def lock_run_folder(folder: Path, notify: Callable[[str], None], wait_seconds: float = LOCK_SECONDS) -> int:
    """Take the right to write a run folder, until this process ends, however it ends; returns the open descriptor.

    The kernel drops the lock with the process, so a killed run leaves nothing to clear away but half-written files,
    which go now. A file server that has lost the host of a run drops its lock later: what another host holds is waited
    for, `wait_seconds` at most. Where the file system has no locks, `notify` is told, and nothing guards the folder.
    Raises UserError where another run holds the folder, naming it.
    """
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder / LOCK_NAME}: cannot be locked: {first_line(error)}") from None
    deadline, waits = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                notify(f"{folder}: its file system has no locks ({error.strerror}): let no other run write there")
                break
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder / LOCK_NAME}: cannot be locked: {first_line(error)}") from None
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        elsewhere = " on " in holder and not holder.endswith(f" on {socket.gethostname()}")
        if not elsewhere or time.monotonic() >= deadline:
            os.close(descriptor)
            raise UserError(
                f"{folder}: is being written by {holder}; give this run another --tag or wait for that one to end"
            )
        if not waits:
            notify(f"{folder}: is locked by {holder}; waiting up to {wait_seconds:g} s, in case that host is gone")
            waits = True
        time.sleep(1)
    for partial in folder.glob(".*.partial"):
        partial.unlink()  # first of all: it may be what fills the disk
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise unwritable(folder / LOCK_NAME, error) from None
    return descriptor


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all: beside, synced, then renamed.

    Raises UserError, the older file untouched, where it cannot be written.
    """
    with SAVING:
        _save(state, path)


def _save(state: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # it may be a link to another checkpoint, which must not be written through it
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise unwritable(path, error, sum(tensor.nbytes for tensor in _tensors(state))) from None


def keep_as_best(path: Path) -> None:
    """Let the run's best checkpoint be this file, without writing it twice where the file system can link."""
    best = path.with_name(BEST_NAME)
    if best.exists() and best.samefile(path):
        return  # renaming one link of a file over another would leave both
    partial = path.with_name(f".{BEST_NAME}.partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
            _sync(partial)
        os.replace(partial, best)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise unwritable(best, error, path.stat().st_size if path.exists() else None) from None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete what newer checkpoints replace: all but the newest `keep` whole epochs (0 keeps all), and within an epoch
    all but the newest checkpoint of the run.
    """
    paths = checkpoints_of(folder)
    whole_epochs = [path for path in paths if "_update_" not in path.name]
    surplus = whole_epochs[:-keep] if keep else []
    for path in surplus + [path for path in paths[:-1] if "_update_" in path.name]:
        path.unlink(missing_ok=True)


def quarantine(path: Path) -> str:
    """Rename a checkpoint to <name>.aside, or .aside2 and so on; returns that name. Nothing reads or deletes those.

    Raises UserError where it cannot be renamed.
    """
    names = (f"{path.name}.aside{number}" for number in ("", *range(2, 10_000)))
    name = next(name for name in names if not path.with_name(name).exists())
    try:
        path.rename(path.with_name(name))
    except OSError as error:
        raise UserError(f"{path}: cannot be renamed to {name}: {first_line(error)}") from None
    return name


def load_file(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, after checking the CRC-32 that torch stored with every tensor.

    torch itself does not check it: a flipped bit in a weight would load silently. A file that ends in .safetensors,
    which has no such check, is read as a bare state dict.
    Raises UserError where the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors" and path.is_file():
            return safetensors.torch.load_file(path)
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    # A record that says of itself that it is a folder would be given to torch as uninitialised memory.
                    folders = (r.filename for r in archive.infolist() if r.external_attr & _ZIP_FOLDER and r.file_size)
                    damaged = next(folders, None) or archive.testzip()
                if damaged is not None:
                    raise UserError(f"{path}: damaged: {damaged} is not what was written")
        torch.serialization.add_safe_globals(PLAIN_TYPES)  # again: a library that allows one for a while takes it back
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file in it, such as {path / BEST_NAME}") from None
    except UserError:
        raise
    except UnpicklingError as error:
        # torch's own message advises to load the file unsafely; of it, only what the file asked for is of use.
        wanted = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        what = f": it asks for {wanted[1]}" if wanted else ""
        raise UserError(
            f"{path}: not a checkpoint of tensors and plain values, and nothing else is loaded{what}"
        ) from None
    except Exception as error:  # damaged pickles and zip files raise almost anything
        what = first_line(error).split(". ")[0]
        size = Path(path).stat().st_size
        raise UserError(
            f"{path}: damaged or not a checkpoint, {size:,} bytes ({type(error).__name__}: {what})"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


# -------------------------------------------------------------------------------------------------------------- weights
def find_weights(config: CfgNode) -> str:
    """The file to evaluate: --resume, else --pretrained (MODEL.PRETRAINED), else pretrained/<MODEL.NAME>.pth.

    Raises UserError where there is none: a score of random weights would look like a result.
    """
    released = PRETRAINED_FOLDER / f"{config.MODEL.NAME}.pth"
    for path in (config.MODEL.RESUME, config.MODEL.PRETRAINED):
        if path:
            return path
    if released.is_file():
        return str(released)
    raise UserError(
        f"no weights to evaluate: give a file with --resume or --pretrained, or put released weights at {released}"
    )


def select_weights(checkpoint: dict[str, Any], which: str, origin: str) -> tuple[dict[str, Tensor], str]:
    """The state dict to use from a loaded file, and what it is, for the log.

    Args:
        checkpoint: a training checkpoint of ours or timm's, {'model': ...}, {'state_dict': ...} or a bare state dict.
        which: 'raw'; 'ema'; or 'best', those that the checkpoint was kept for (where it does not say, raw, or the only
            ones that it holds).
        origin: the file's name, for messages.
    """
    ema_only = bool(set(_EMA_KEYS) & set(checkpoint)) and not set(_RAW_KEYS) & set(checkpoint)
    if which == "best":
        which = checkpoint.get("best_weights") or ("ema" if ema_only else "raw")
    if which == "ema":
        state = next((checkpoint[k] for k in _EMA_KEYS if isinstance(checkpoint.get(k), dict)), None)
        if state is None:
            raise UserError(f"{origin}: holds no EMA weights (model_ema); use --weights raw")
    elif ema_only:
        raise UserError(f"{origin}: holds no raw weights, only EMA ones (model_ema); use --weights ema")
    else:
        state = next((checkpoint[k] for k in _RAW_KEYS if isinstance(checkpoint.get(k), dict)), checkpoint)
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise UserError(f"{origin}: holds no state dict of a network (keys: {some(checkpoint)})")
    return {name.removeprefix("module."): value for name, value in state.items()}, f"{which} weights"


def load_weights(
    network: nn.Module,
    path: str | Path,
    which: str = "best",
    classes: Sequence[str] = (),
    notify: Callable[[str], None] = lambda line: None,
) -> str:
    """Load weights into a network of the same shape and number of classes; returns what was loaded, for the log.

    Args:
        network: takes the weights.
        path: a checkpoint of ours, a released one, or a bare state dict.
        which: 'raw', 'ema' or 'best', see `select_weights`.
        classes: the names of the data's classes.
        notify: is called with one line where the checkpoint names its classes otherwise. That is not refused: folders
            may have been renamed; but it may as well be another data set of as many classes.

    Raises UserError that names missing, unexpected and differently shaped entries.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, which, str(path))
    own, loaded = _num_classes(network.state_dict()), _num_classes(state)
    if own != loaded and own and loaded:
        raise UserError(
            f"{path}: its head has {loaded} classes, but the data has {own}: class indices would not agree. Give the "
            "data folder that the weights were trained on (all its classes), or fine-tune with train.py --pretrained"
        )
    load_exactly(network, state, str(path))
    if renamed := _renamed_classes(checkpoint, classes):
        notify(f"{path}: {renamed}: the accuracy means nothing unless they are the same classes in the same order")
    return f"{kind} of {path}"


def _renamed_classes(checkpoint: dict[str, Any], classes: Sequence[str]) -> str:
    """How the classes that a checkpoint names differ from the data's; '' where they do not, or it names none."""
    trained_on = checkpoint.get("classes")
    renamed = [pair for pair in zip(trained_on if isinstance(trained_on, list) else (), classes) if pair[0] != pair[1]]
    if not renamed:
        return ""
    before, now = renamed[0]
    others = f"{len(renamed)} of its {len(classes)} classes have other names than the data's"
    return f"{others}, the first {before!r} against {now!r}"


def load_pretrained(network: nn.Module, path: str | Path, class_map: str = "", classes: Sequence[str] = ()) -> str:
    """Load weights to fine-tune from; a head of another number of classes stays fresh, or is mapped.

    A head of ImageNet-21k's 21841 classes becomes one of 1000 by `class_map`, a text file whose line i holds the
    row of class i. Returns what was done, for the log: also that a head of as many classes is kept although they have
    other names than the data's `classes`.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, "best", str(path))
    own, loaded = _num_classes(network.state_dict()), _num_classes(state)
    note = ""
    if own != loaded:
        if class_map and not set(HEAD_KEYS) <= set(state):
            raise UserError(f"{path}: has no {' and '.join(HEAD_KEYS)} for MODEL.CLASS_MAP to map")
        if class_map:
            rows = read_class_map(class_map, num_classes=own, num_rows=loaded)
            state.update({key: state[key][rows] for key in HEAD_KEYS})
            note = f"; head mapped from {loaded} to {own} classes by {class_map}"
        elif loaded == IMAGENET_21K_CLASSES and own == 1000:
            raise UserError(
                f"{path}: its head has the {loaded} classes of ImageNet-21k; give the file that maps them to the 1000 "
                "of ImageNet-1k (one row number per line) with --opts MODEL.CLASS_MAP FILE"
            )
        else:
            state.update({key: network.state_dict()[key] for key in HEAD_KEYS})
            note = f"; head of {loaded} classes left out, a fresh one has {own}"
    elif renamed := _renamed_classes(checkpoint, classes):
        note = f"; its head too, although {renamed}"
    load_exactly(network, state, str(path))
    return f"{kind} of {path}{note}"


def read_class_map(path: str | Path, num_classes: int, num_rows: int) -> list[int]:
    """The row numbers of a class map, one per line; UserError where they do not fit."""
    try:
        rows = [int(word) for word in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL.CLASS_MAP = {path!r}: cannot be read: {first_line(error)}") from None
    if len(rows) != num_classes or not all(0 <= row < num_rows for row in rows):
        raise UserError(
            f"MODEL.CLASS_MAP = {path!r}: needs {num_classes} row numbers from 0 to {num_rows - 1}, has {len(rows)} "
            f"from {min(rows, default=0)} to {max(rows, default=0)}"
        )
    return rows


def load_exactly(network: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict strictly; UserError names missing, unexpected and differently shaped entries."""
    own = network.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or reshaped:
        parts = [
            f"{len(names)} {what} ({some(names)})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        known = _configured_network(state)
        of = f"{known}, use --cfg configs/{known}.yaml" if known else "another network than --cfg describes"
        raise UserError(f"{origin}: weights of {of}: {'; '.join(parts)}")
    network.load_state_dict(state)


def network_with(config: CfgNode, state: dict[str, Tensor], origin: str) -> nn.Module:
    """The configuration's network for evaluation, with these weights and as many classes as they have."""
    from tasks.networks import build_model

    network = build_model(with_num_classes(config, _num_classes(state)))
    network.set_grad_checkpointing(False)
    load_exactly(network, state, origin)
    return network.eval()


def load_classifier(config: CfgNode, path: str) -> tuple[nn.Module, list[str], str]:
    """The configuration's network for evaluation, with the weights of a file, whatever their number of classes.

    Returns the network, the names of its classes, and what was loaded, for the log. Raises UserError where the weights
    tell no classes.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, config.TEST.WEIGHTS, path)
    if "head.weight" not in state:
        raise UserError(f"{path}: has no head.weight, so it tells no classes")
    from tasks.classification.class_names import class_names

    names = class_names(checkpoint, with_num_classes(config, _num_classes(state)))
    return network_with(config, state, path), names, f"{kind} of {path}"


def _configured_network(state: dict[str, Tensor]) -> str:
    """The name of the file in configs/ whose network these weights, whatever their head, are of; '' for none."""
    from tasks.networks import build_model

    shapes = {name: value.shape for name, value in state.items() if name not in HEAD_KEYS}
    last_norm = state.get("norm4.weight")
    # Published variants first: files of users may build on theirs.
    for file in sorted(CONFIGS_FOLDER.glob("*.yaml"), key=lambda file: (file.stem not in VARIANTS, file.stem)):
        with contextlib.suppress(Exception):  # a file may be one of the user's, half written, and this is but a hint
            config = read_config(["--cfg", str(file)], tasks.keys_of, notify=lambda line: None)
            if last_norm is None or len(last_norm) != config.MODEL.GMA.EMBEDDING_DIMS[-1]:
                continue  # to build a network takes a second
            with torch.device("meta"):
                network = build_model(config)
            if shapes == {key: value.shape for key, value in network.state_dict().items() if key not in HEAD_KEYS}:
                return file.stem
    return ""


def _num_classes(state: dict[str, Tensor]) -> int:
    return state["head.weight"].shape[0] if "head.weight" in state else 0


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _sync(path: Path) -> None:
    """Make what a file holds, or a rename in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few of many names, for a message."""
    names = list(names)
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")

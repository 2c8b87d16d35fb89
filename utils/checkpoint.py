"""Checkpoints: what is in one, how it is written and found again, and state dicts from files of others.

A training checkpoint is a dict with

    model, model_ema   state dicts of the raw network and of its moving average (model_ema only where EMA is on)
    optimizer, scaler  their state dicts
    lr_scheduler       likewise, for readers of released files: here the learning rate is a function of the update
    epoch              the epoch it was taken in, counted from 0
    num_updates        updates since the start of the run
    max_accuracy       best number so far of those that decide (top-1, percent); best_weights: of 'raw' or 'ema' weights
    is_best            whether it is the run's best one so far
    progress           where training continues and what the epoch has seen so far (`utils.engine.LoopState`)
    global_batch, world_size, data_order, data_fingerprint   what decides which images an update sees; a batch by epoch
                                                             is a list (`data.stages`)
    val_fingerprint                                          of the validation images
    classes            their names, in the order of the head's rows
    config             the resolved configuration as YAML text

Files are loaded with torch's `weights_only=True`, which runs no code from the file. Released files hold {'model': ...},
or a training checkpoint whose `config` is a pickled yacs CfgNode: it is read as a plain mapping. Weights alone may also
come as a safetensors file, and as what timm's train.py writes (`state_dict`, `state_dict_ema`, and its `args`). What a
file is shows in its content, whatever its name.
"""

import contextlib
import json
import math
import os
import re
import shutil
import threading
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn
from torch.serialization import get_safe_globals, safe_globals
from yacs.config import CfgNode

from configs import UserError
from configs.errors import first_line
from configs.keys import KEYS
from configs.load import flatten

from .failures import unwritable

BEST_NAME = "ckpt_best.pth"
# In a folder as timm and model hubs have it; under the key its description holds our configuration.
HUB_WEIGHTS, HUB_CONFIG, HUB_KEY = "model.safetensors", "config.json", "groupmixformer"
SAVING = threading.Lock()  # held while a checkpoint is written: no thread ends the process then
PRETRAINED_FOLDER = Path(__file__).resolve().parents[1] / "pretrained"  # where users put released weights
_RAW_KEYS = ("model", "state_dict")  # ours and the release's; timm's
_EMA_KEYS = ("model_ema", "state_dict_ema")
_NAME = re.compile(r"ckpt_epoch_(\d+)(?:_update_(\d+))?\.pth")
_WRAPPERS = re.compile(r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ZIP_FOLDER = 0x10  # attribute of a zip record that is a folder
# Files may hold these beside tensors and plain values. Released checkpoints have a yacs CfgNode: read as the mapping
# that it is, it runs no code. The Namespace in timm's checkpoints is a bag of values.
PLAIN_TYPES = [(OrderedDict, "yacs.config.CfgNode"), Namespace]


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


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all: to another name, synced, then renamed.

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


def load_file(path: str | Path, tensors: bool = True) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, after checking the CRC-32 that torch stored with every tensor.

    torch itself does not check it: a flipped bit in a weight would load silently. A safetensors file, which has no such
    check, is read as a bare state dict. Without `tensors` only the plain values are of use: tensors are neither checked
    nor read from the disk.
    A folder of `tools.convert --to hub`, or of timm, is read as a checkpoint of its weights, classes and configuration.
    Raises UserError where the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if (path / HUB_WEIGHTS).is_file():
        return _load_hub_folder(path, tensors)
    try:
        with open(path, "rb") as file:
            if _is_safetensors(file.read(9), path):
                return safetensors.torch.load_file(path)
            is_zip = zipfile.is_zipfile(file)
            if is_zip and tensors:
                with zipfile.ZipFile(file) as archive:
                    # A record that says of itself that it is a folder would be given to torch as uninitialised memory.
                    folders = (r.filename for r in archive.infolist() if r.external_attr & _ZIP_FOLDER and r.file_size)
                    damaged = next(folders, None) or archive.testzip()
                if damaged is not None:
                    raise UserError(f"{path}: damaged: {damaged} is not what was written")
        # Leaving the context forbids its types again, so it must not hold those that others have allowed for good.
        with (
            safe_globals([kind for kind in PLAIN_TYPES if kind not in get_safe_globals()]),
            # From a name of this suffix torch reads safetensors, whatever is in it.
            open(path, "rb") if path.suffix == ".safetensors" else nullcontext(path) as source,
        ):
            mmap = is_zip and not tensors and source is path
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file in it, such as {path / BEST_NAME}") from None
    except UserError:
        raise
    except Exception as error:  # damaged pickles and zip files raise almost anything
        if known := _what_it_is(path):
            raise UserError(f"{path}: no file of weights: {known}") from None
        # torch's own message advises to load the file unsafely; of it, only what the file asked for is of use.
        wanted = isinstance(error, UnpicklingError) and re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if wanted:
            raise UserError(
                f"{path}: asks for {wanted[1]}: only tensors and plain values are loaded; save a state_dict() instead"
            ) from None
        what = "" if isinstance(error, UnpicklingError) else f": {first_line(error).split('. ')[0]}"
        size = Path(path).stat().st_size
        raise UserError(f"{path}: damaged or not a checkpoint, {size:,} bytes ({type(error).__name__}{what})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _load_hub_folder(folder: Path, tensors: bool) -> dict[str, Any]:
    about = folder / HUB_CONFIG
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
        names, config = content.get("label_names"), content.get(HUB_KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{about}: does not describe a folder of weights: {first_line(error)}") from None
    loaded: dict[str, Any] = {"model": load_file(folder / HUB_WEIGHTS) if tensors else {}}
    loaded |= {"classes": names} if isinstance(names, list) else {}
    return loaded | ({"config": yaml.safe_dump(config)} if isinstance(config, dict) else {})


def stored_config(content: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration that a checkpoint of this repository holds, {key: value}; None where there is none.

    Released checkpoints hold a mapping of other keys: theirs is another program.
    """
    text = content.get("config")
    try:
        values = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        return None
    config = dict(flatten(values)) if isinstance(values, dict) else {}
    return config if config.keys() & KEYS.keys() else None


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Whether a file begins as safetensors files do: the length of its header, 8 bytes, and the header's brace."""
    whole = len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    return whole or (path.suffix == ".safetensors" and not head.startswith(b"PK"))


_BEGINNINGS = {
    b"version https://git-lfs": "a pointer in the place of a file; run git lfs pull",
    b"<": "a web page or a server's message; download the file itself",
    b"\x1f\x8b": "a gzip file; unpack it",
    b"BZh": "a bzip2 file; unpack it",
    b"\xfd7zXZ": "an xz file; unpack it",
    b"(\xb5/\xfd": "a zstd file; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file",
}


def _what_it_is(path: Path) -> str:
    """What a file is that does not load, and what to do; '' where it may well be a damaged checkpoint."""
    members: list[str] = []
    with open(path, "rb") as file:
        head = file.read(1000)
        with contextlib.suppress(Exception):  # damaged ones raise almost anything
            members = zipfile.ZipFile(file).namelist()
    if not head:
        return "it is empty; copy or download it again"
    if not any(head):
        return "it begins with zeros, as a copy that was cut off does; copy or download it again"
    if any(name.endswith("constants.pkl") for name in members):
        return "a TorchScript program; save the state_dict() of its network"
    if members and not any(name.endswith("data.pkl") for name in members):
        return f"a zip file of other things ({some(members)})"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    shown = ascii(begin[:40].split(b"\n")[0].decode(errors="replace").strip())
    for beginning, meaning in _BEGINNINGS.items():
        if begin.startswith(beginning):
            return f"it begins with {shown}: {meaning}"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return f"it begins with {shown}: text"
    return ""


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
    return {_WRAPPERS.sub("", name): value for name, value in state.items()}, f"{which} weights"


def load_exactly(
    network: nn.Module,
    state: dict[str, Tensor],
    origin: str,
    whose: Callable[[dict[str, Tensor]], str] = lambda state: (
        "weights of another network than --cfg describes (without --cfg, a run's checkpoint says which)"
    ),
) -> None:
    """Load a state dict strictly; UserError names missing, unexpected and differently shaped entries.

    Args:
        network: takes the weights, all or none.
        state: names and weights.
        origin: the file's name, for messages.
        whose: says of which network the weights are, for messages.
    """
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
        raise UserError(f"{origin}: {whose(state)}: {'; '.join(parts)}")
    network.load_state_dict(state)


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

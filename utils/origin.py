"""What a file of weights says of the run that it comes from: its configuration and its folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from configs import UserError
from configs.keys import CHANGE_NO_RESULT, KEYS, Key
from configs.load import changed_values, flatten

from .checkpoint import find_weights, load_file, stored_config

CONFIG_NAME = "config.json"  # the resolved configuration, in every run folder


def config_of(path: str | Path) -> dict[str, Any] | None:
    """The configuration that a file of weights holds, as `stored_config`; UserError where it is no such file."""
    return stored_config(load_file(path, tensors=False))


def check_named_files(config: CfgNode, keys: Mapping[str, Key]) -> None:
    """Raise UserError where a file that a key names does not exist, whether or not it is used."""
    for name, value in flatten(config):
        if value and keys[name].kind == "file" and not os.path.exists(value):  # noqa: PTH110 - no error for any name
            hint = "; docs/evaluation.md says where released weights are" if name == "MODEL.PRETRAINED" else ""
            raise UserError(f"{keys[name].flag or name} {value}: no such file{hint}")


def run_folder_of(weights: str | Path) -> Path | None:
    """The run folder that a file of weights lies in; None where it is in none, or in one that may not be written to."""
    folder, name = Path(weights).parent, Path(weights).name
    of_a_run = name.startswith("ckpt_") and (folder / CONFIG_NAME).is_file()
    return folder if of_a_run and os.access(folder, os.W_OK) else None


def results_folder(config: CfgNode) -> Path:
    """Where an evaluation writes: beside the run that trained the weights, unless OUTPUT or TAG says where."""
    named = config.MODEL.RESUME or config.MODEL.PRETRAINED
    chosen = config.OUTPUT or KEYS["TAG"].default != config.TAG
    return (not chosen and named and run_folder_of(named)) or configured_folder(config)


def configured_folder(config: CfgNode) -> Path:
    """The run folder of a configuration, <OUTPUT>/<MODEL.NAME>/<TAG>."""
    return Path(config.OUTPUT or "output") / config.MODEL.NAME / config.TAG


def differences(config: CfgNode, keys: Mapping[str, Key], weights: str | Path) -> list[str]:
    """A line for each key that changes results and has another value than the weights were trained with."""
    names = {name for name, key in keys.items() if key.kept_with_weights} - set(CHANGE_NO_RESULT)
    return [
        f"{name} is {now!r} here, and was {before!r} when {weights} was trained: the results are not those of its run"
        for name, before, now in changed_values(config_of(weights) or {}, config, names)
    ]


def remarks(config: CfgNode, keys: Mapping[str, Key], measures: bool, cfg: Sequence[str] | None) -> list[str]:
    """What to log before weights are evaluated: files that are named and not used, and `differences`.

    Args:
        measures: no weights are used, only the network's shape.
        cfg: the YAML files that were named, if any.
    """
    resume, pretrained = config.MODEL.RESUME, config.MODEL.PRETRAINED
    unused = [("--pretrained", pretrained, f"{resume} is evaluated")] if resume and pretrained else []
    if measures and cfg:
        named = (("--resume", resume), ("--pretrained", pretrained))
        unused = [(flag, path, "weights are not needed") for flag, path in named]
    lines = [f"{flag} {path} is not used: {why}" for flag, path, why in unused if path]
    return lines if measures else lines + differences(config, keys, find_weights(config))

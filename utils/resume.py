"""The state of a whole run: into a checkpoint, and back."""

from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

from configs import UserError
from configs.defaults import to_dict

from .checkpoint import (
    BEST_NAME,
    epoch_checkpoints,
    epoch_path,
    keep_as_best,
    load_exactly,
    load_file,
    prune_checkpoints,
    save_checkpoint,
    select_weights,
)
from .distributed import Processes, agree_on_main
from .engine import Trainer
from .schedule import global_batch_size


@dataclass
class Progress:
    """Where a run stands: training goes on at `next_update` of `next_epoch`, both counted from 0."""

    next_epoch: int = 0
    next_update: int = 0
    max_accuracy: float = 0.0  # best top-1 so far, raw or EMA, percent
    best_weights: str = "raw"  # which of the two it was: 'raw' or 'ema'

    def record(self, accuracy: float, weights: str) -> bool:
        """Note an accuracy of 'raw' or 'ema' weights; True where it is the best so far."""
        if accuracy <= self.max_accuracy:
            return False
        self.max_accuracy, self.best_weights = accuracy, weights
        return True


def find_resume(config: CfgNode, folder: Path, processes: Processes) -> str:
    """The checkpoint to continue from: the run's own newest one (AUTO_RESUME), else MODEL.RESUME, else ''.

    The main process decides for all.
    """
    own = epoch_checkpoints(folder) if config.TRAIN.AUTO_RESUME else []
    return str(agree_on_main(str(own[-1]) if own else config.MODEL.RESUME, processes))


def training_state(
    config: CfgNode, trainer: Trainer, progress: Progress, epoch: int, world_size: int
) -> dict[str, Any]:
    """Everything that an exact continuation needs, as `utils.checkpoint` describes it."""
    state = {
        "model": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "lr_scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": epoch,
        "next_epoch": progress.next_epoch,
        "next_update": progress.next_update,
        "num_updates": trainer.num_updates,
        "max_accuracy": progress.max_accuracy,
        "best_weights": progress.best_weights,
        "global_batch": global_batch_size(config, world_size),
        "world_size": world_size,
        "config": yaml.safe_dump(to_dict(config)),
    }
    if trainer.ema is not None:
        state["model_ema"] = trainer.ema.module.state_dict()
    return state


def save_epoch(
    config: CfgNode, folder: Path, trainer: Trainer, progress: Progress, epoch: int, world_size: int, is_best: bool
) -> None:
    """Save behind an epoch's validation: every SAVE_FREQ epochs, at the end, and what is best so far."""
    is_due = (epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS
    if not (is_due or is_best):
        return
    state = training_state(config, trainer, progress, epoch, world_size)
    if is_due:
        path = epoch_path(folder, epoch)
        save_checkpoint(state, path)
        if is_best:
            keep_as_best(path)
        prune_checkpoints(folder, config.SAVE_KEEP)
    else:
        save_checkpoint(state, folder / BEST_NAME)


def restore(path: str, trainer: Trainer, updates_per_epoch: int, logger: Logger) -> Progress:
    """Load a training checkpoint, ours or a released one, into the trainer; returns where the run stands.

    A released one has no EMA, which then starts from its weights. Raises UserError where it does not fit.
    """
    state = load_file(path)
    if "optimizer" not in state or "epoch" not in state:
        raise UserError(f"{path}: holds weights only, nothing to continue from; start from them with --pretrained")
    _restore_network(trainer.network, state, path)
    if trainer.ema is not None:
        _restore_ema(trainer.ema, state, path, logger)
    try:
        trainer.optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: its optimizer state does not fit: {error}") from None
    if state.get("scaler") and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(state["scaler"])
    next_epoch = int(state.get("next_epoch", state["epoch"] + 1))
    next_update = int(state.get("next_update", 0))
    trainer.num_updates = int(state.get("num_updates", next_epoch * updates_per_epoch))
    if trainer.num_updates != next_epoch * updates_per_epoch + next_update:
        raise UserError(
            f"{path}: stands at update {trainer.num_updates}, but with this data and global batch epoch {next_epoch} "
            f"update {next_update} is update {next_epoch * updates_per_epoch + next_update}: continue with the "
            "batch size, processes, accumulation and data that the run began with, or start from its weights with "
            "--pretrained"
        )
    logger.info(f"resumed from {path}: epoch {next_epoch}, update {trainer.num_updates}")
    return Progress(
        next_epoch, next_update, float(state.get("max_accuracy", 0.0)), str(state.get("best_weights", "raw"))
    )


def _restore_network(network: nn.Module, state: dict[str, Any], path: str) -> None:
    weights, _ = select_weights(state, "raw", path)
    load_exactly(network, weights, path)


def _restore_ema(ema: ModelEmaV3, state: dict[str, Any], path: str, logger: Logger) -> None:
    which = "ema" if "model_ema" in state else "raw"
    if which == "raw":
        logger.info(f"{path} holds no EMA: it starts from the raw weights")
    load_exactly(ema.module, select_weights(state, which, path)[0], path)

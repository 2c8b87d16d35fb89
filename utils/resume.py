"""The state of a whole run: into a checkpoint at any update, and back from it."""

import dataclasses
import math
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from timm.utils import ModelEmaV3
from yacs.config import CfgNode

from configs import UserError, with_values
from configs.errors import StopRequested
from configs.load import changed_values, flatten, to_dict
from data import in_epoch

from .checkpoint import (
    BEST_NAME,
    checkpoint_path,
    checkpoints_of,
    keep_as_best,
    load_exactly,
    load_file,
    prune_checkpoints,
    quarantine,
    save_checkpoint,
    select_weights,
    stored_config,
)
from .engine import LoopState, TrainState
from .optimizer import load_optimizer
from .processes import run_on_main_and_broadcast
from .session import Session
from .task import Task


class Saver:
    """Takes the checkpoints of a run; the main process writes them.

    Args:
        session: the run, with the task's configuration.
        state, loop: what is saved.
        identity: what decides which samples an update sees (`identify_data`).
    """

    def __init__(self, session: Session, state: TrainState, loop: LoopState, identity: dict[str, Any]) -> None:
        self.session, self.config = session, session.config
        self.state, self.loop = state, loop
        self.identity = identity
        self.started_at = state.num_updates
        self.last_save = time.monotonic()

    def after_update(self) -> None:
        """Save within an epoch where SAVE_EVERY_UPDATES or SAVE_EVERY_MINUTES says so."""
        every, minutes = self.config.SAVE_EVERY_UPDATES, self.config.SAVE_EVERY_MINUTES
        due = every > 0 and self.state.num_updates % every == 0
        due |= minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes
        if due and self.session.processes.is_main:
            self._save_position()

    def after_epoch(self, epoch: int, is_best: bool) -> None:
        """Save after an epoch, validated or not: every SAVE_FREQ epochs, at the end, and what is best so far.

        All processes call this and wait for the main one, as at `stop`.
        """

        def save() -> None:
            if (epoch + 1) % self.config.SAVE_FREQ == 0 or self.state.length.is_last(epoch):
                path = self._save(checkpoint_path(self.session.folder, epoch), is_best)
                if is_best:
                    keep_as_best(path)
            elif is_best:
                self._save(self.session.folder / BEST_NAME, is_best)

        run_on_main_and_broadcast(save, self.session.processes)

    @contextmanager
    def save_epoch_on_error(self) -> Iterator[None]:
        """Around validation: where it fails, the epoch trained before it is saved first, and then continued from."""
        try:
            yield
        except (StopRequested, FloatingPointError):
            raise  # saved by `stop`; not to be saved
        except Exception:
            if self.session.processes.is_main:
                self.session.logger.info(f"validation failed; the epoch before it is saved as {self._save_position()}")
            raise

    def stop(self) -> str:
        """Save the run as it is now; returns what was done, for the log.

        On every process it returns once the checkpoint is on disk, because the first process to end ends them all.
        Without an update since the start there is nothing new to save.
        """
        if self.state.num_updates == self.started_at:
            return "nothing new to save"
        return f"saved {run_on_main_and_broadcast(self._save_position, self.session.processes)}"

    def _save_position(self) -> Path:
        """Save in the middle of an epoch or between training and validation."""
        return self._save(checkpoint_path(self.session.folder, self.loop.next_epoch, self.loop.next_update))

    def _save(self, path: Path, is_best: bool = False) -> Path:
        save_checkpoint(self._content(is_best), path)
        prune_checkpoints(self.session.folder, self.config.SAVE_KEEP)
        self.last_save = time.monotonic()
        return path

    def _content(self, is_best: bool) -> dict[str, Any]:
        """Everything that an exact continuation needs, as `utils.checkpoint` describes it."""
        state, loop = self.state, self.loop
        # `max_accuracy` is the released name of the number that decides, whatever it is.
        progress = {**vars(loop), "max_accuracy": loop.best}
        del progress["best"]
        content = {
            **self.identity,  # first: it must not replace what follows
            "model": state.network.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "lr_scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict(),
            "epoch": loop.next_epoch - (loop.next_update == 0),
            "num_updates": state.num_updates,
            "max_accuracy": loop.best,
            "best_weights": loop.best_weights,
            "is_best": is_best,
            "progress": progress,
            "config": yaml.safe_dump(to_dict(self.config)),
        }
        if state.ema is not None:
            content["model_ema"] = state.ema.module.state_dict()
        return content


def identify_data(session: Session, task: Task) -> dict[str, Any]:
    """What decides which samples an update sees, for a checkpoint: it must be the same to continue."""
    world_size, order = session.processes.world_size, task.data.order
    return {
        "global_batch": order.global_batch,
        "world_size": world_size,
        "data_order": f"within shares of {world_size} processes" if order.sharded else "over all images",
        **task.identity,
    }


def check_same_everywhere(session: Session, identity: dict[str, Any]) -> None:
    """Raise UserError, the same on every process, where one of them has other images or settings than process 0.

    Nodes need not share a disk, and each process reads its own command line and lists its own images. `identity` as
    from `identify_data`; an evaluation has the validation images only.
    """
    config, processes = session.config, session.processes
    if not processes.distributed:
        return
    of_main = run_on_main_and_broadcast(lambda: {**identity, "config": yaml.safe_dump(to_dict(config))}, processes)
    notes: list[Any] = [None] * processes.world_size
    same = {name for name, key in session.keys.items() if key.same_on_all_ranks}
    differences = recipe_changes(of_main, config, identity, same)
    dist.all_gather_object(notes, (socket.gethostname(), differences))
    for rank, (host, different) in enumerate(notes):
        if different:
            raise UserError(f"process {rank} on {host} differs from process 0: {'; '.join(different)}")


def load_resume(session: Session) -> tuple[str, dict[str, Any] | None]:
    """The checkpoint to continue from, loaded, and its path; ('', None) where the run is new.

    It is the run folder's newest one that is whole (AUTO_RESUME), else MODEL.RESUME. The main process finds and reads
    it for all, so that they agree, also on nodes that do not share a disk. Raises UserError where MODEL.RESUME is
    damaged, or the folder has checkpoints and all of them are.
    """
    return run_on_main_and_broadcast(lambda: _load_resume(session), session.processes)


def _load_resume(session: Session) -> tuple[str, dict[str, Any] | None]:
    config = session.config
    own = checkpoints_of(session.folder) if config.TRAIN.AUTO_RESUME else []
    for path in reversed(own):
        try:
            state = load_file(path)
        except UserError as error:
            session.logger.warning(f"{error.one_line()}; trying the one before")
            continue
        if state.get("is_best"):  # in case the run was killed between saving it and keeping it as such
            keep_as_best(path)
        if config.MODEL.RESUME:
            session.logger.warning(f"--resume {config.MODEL.RESUME} is not used: the run has checkpoints of its own")
        return str(path), state
    if own:
        raise UserError(
            f"{session.folder}: none of its {len(own)} checkpoints can be read; move them away to start again, or set "
            "TRAIN.AUTO_RESUME False"
        )
    if config.MODEL.RESUME:
        return config.MODEL.RESUME, load_file(config.MODEL.RESUME)
    return "", None


def keep_what_followed(session: Session, saved: dict[str, Any] | None) -> Session:
    """A run that continues keeps what followed from its length when it began, such as its warm-up. Logs all of that."""
    values, before = {}, stored_config(saved or {}) or {}
    for name, key in session.keys.items():
        if key.follows and name in before:
            values[name] = before[name]
            session.logger.info(f"{name} = {before[name]}: of the run that continues")
        elif key.follows:
            session.logger.info(f"{name} = {dict(flatten(session.config))[name]}: {key.follows}")
    return dataclasses.replace(session, config=with_values(session.config, values))


def quarantine_checkpoints(session: Session, resume_path: str, loop: LoopState) -> None:
    """Rename the checkpoints of the run folder that are newer than the one being resumed, and those of an earlier run.

    Auto resume and pruning go by name: they would take them for newer than what is saved from now on. That goes for the
    one being resumed, too, where the run continues within its epoch, which TRAIN.UPDATES had cut short. For the main
    process, once nothing can refuse the start any more.
    """
    own = checkpoints_of(session.folder)
    chosen = next((i for i, path in enumerate(own) if resume_path and path.samefile(resume_path)), None)
    if chosen is not None:
        rest = own[chosen + 1 :]
        if loop.next_update and own[chosen] == checkpoint_path(session.folder, loop.next_epoch):
            own[chosen].rename(checkpoint_path(session.folder, loop.next_epoch, loop.next_update))
    else:  # a new run: the best one is another's too
        best = session.folder / BEST_NAME
        rest = own + [best] * (best.exists() and not (resume_path and best.samefile(resume_path)))
    for path in rest:
        session.logger.warning(f"{path}: not the checkpoint being resumed; renamed to {quarantine(path)}")


def restore(
    session: Session,
    path: str,
    saved: dict[str, Any],
    state: TrainState,
    identity: dict[str, Any],
) -> LoopState:
    """Put a loaded training checkpoint, ours or a released one, into `state`; returns where the run is.

    A released one has no EMA, which then starts from its weights. Another optimizer starts without a state. Raises
    UserError where the checkpoint does not fit, and, without TRAIN.ALLOW_CHANGES, where recipe or data are not what
    they were.
    """
    config, logger, world_size = session.config, session.logger, session.processes.world_size
    if "optimizer" not in saved or "epoch" not in saved:
        raise UserError(f"{path}: holds weights only, nothing to continue from; start from them with --pretrained")
    fixed = {name for name, key in session.keys.items() if not key.may_change_on_resume}
    changes = recipe_changes(saved, config, identity, fixed) + _other_start(saved, config)
    if changes and not config.TRAIN.ALLOW_CHANGES:
        raise UserError(
            f"{path}: belongs to a run of another recipe: {'; '.join(changes)}; restore these values, begin a "
            "new run with another --tag, or continue with --allow-changes (to train longer, for example)"
        )
    for change in changes:
        logger.warning(f"continuing with a change: {change}")
    if config.MODEL.PRETRAINED:
        logger.warning(f"--pretrained {config.MODEL.PRETRAINED} is not used: the run continues from {path}")
    if saved.get("world_size", world_size) != world_size:
        logger.info(
            f"continuing on {world_size} processes instead of {saved['world_size']}: same images, augmentation and "
            "learning rate in every update; batch-norm statistics, mixup and stochastic depth are per process"
        )

    load_exactly(state.network, select_weights(saved, "raw", path)[0], path)
    if state.ema is not None:
        _restore_ema(session, state.ema, saved, path)
    name = config.TRAIN.OPTIMIZER.NAME
    before = (stored_config(saved) or {}).get("TRAIN.OPTIMIZER.NAME", name)
    try:
        if before == name:
            load_optimizer(state.optimizer, saved["optimizer"])
        else:  # which would read that state as its own, or fail at its first update
            logger.warning(f"{path}: holds the state of the optimizer {before}; that of {name} begins anew")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit: {error}") from None
    if saved.get("scaler") and state.scaler.is_enabled():
        state.scaler.load_state_dict(saved["scaler"])

    progress = {**saved.get("progress", {"next_epoch": int(saved["epoch"]) + 1})}
    progress.pop("max_accuracy", None)
    loop = LoopState(**progress, best=float(saved.get("max_accuracy", 0.0)))
    length, done = state.length, saved.get("num_updates", math.inf)
    same_epochs = all(saved.get(key) == identity[key] for key in ("global_batch", "data_fingerprint"))
    if same_epochs and done < min(length.updates, length.updates_before(loop.next_epoch)):
        # TRAIN.UPDATES had cut the last epoch short. A run that is longer now continues within it.
        loop.next_epoch, loop.next_update = length.position(done)
    images_before = in_epoch(saved.get("global_batch", identity["global_batch"]), loop.next_epoch)
    samples_seen, images = loop.next_update * images_before, in_epoch(identity["global_batch"], loop.next_epoch)
    loop.next_update = min(samples_seen // images, length.updates_of(loop.next_epoch))
    state.num_updates = min(length.updates_before(loop.next_epoch) + loop.next_update, length.updates)
    logger.info(f"resumed from {path}: epoch {loop.next_epoch}, update {loop.next_update}")
    if state.num_updates >= length.updates:
        longer = "TRAIN.UPDATES" if config.TRAIN.UPDATES else "TRAIN.EPOCHS"
        logger.warning(
            f"nothing to do: {path} is the end of a run of {length}; train longer with a larger {longer} and "
            "--allow-changes, or begin a new run with another --tag"
        )
    return loop


def recipe_changes(
    saved: dict[str, Any], config: CfgNode, identity: dict[str, Any], fixed_keys: Collection[str]
) -> list[str]:
    """What differs between the run that a checkpoint belongs to and this one, a phrase each.

    Of the configuration, `fixed_keys` are compared, except those that an older checkpoint does not have. Batch size and
    accumulation are judged by the global batch that they make together.
    """
    changes = [
        f"{name} {saved[key]} -> {identity[key]}"
        for key, name in (("global_batch", "global batch"), ("data_order", "order of images"))
        if key in identity and saved.get(key, identity[key]) != identity[key]
    ]
    changes += [
        f"the {what} images (names, classes or number) are not the same"
        for key, what in (("data_fingerprint", "training"), ("val_fingerprint", "validation"))
        if key in identity and saved.get(key, identity[key]) != identity[key]
    ]
    stored = stored_config(saved) or {}
    changes += [f"{key} {before!r} -> {now!r}" for key, before, now in changed_values(stored, config, fixed_keys)]
    return changes


def _other_start(saved: dict[str, Any], config: CfgNode) -> list[str]:
    """Whether MODEL.PRETRAINED names other weights than the run started from: it would be continued instead of them."""
    values = changed_values(stored_config(saved) or {}, config, {"MODEL.PRETRAINED"})
    return [
        f"{key} {before!r} -> {now!r}"
        for key, before, now in values
        if now and (not before or os.path.realpath(before) != os.path.realpath(now))
    ]


def _restore_ema(session: Session, ema: ModelEmaV3, saved: dict[str, Any], path: str) -> None:
    which = "ema" if "model_ema" in saved else "raw"
    if which == "raw":
        session.logger.info(f"{path} holds no EMA: it starts from the raw weights")
    load_exactly(ema.module, select_weights(saved, which, path)[0], path)

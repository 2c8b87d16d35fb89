"""What a run knows of its task: a handful of values. `tasks/` makes them; everything in `utils/` takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError
from data import TrainingData

from .precision import Precision

Batch = Any  # nested lists, tuples or dicts of tensors, as the task's data makes them


def _nothing_to_compile(precision: Precision) -> None:
    raise UserError("COMPILE: this task has nothing to compile; leave --compile out")


def _no_pretrained(path: str) -> str:
    raise UserError(f"MODEL.PRETRAINED = {path!r}: this task starts from no weights; leave --pretrained out")


@dataclass(frozen=True)
class Task:
    """What is trained. A task is a module of `tasks/` whose `build(session)` returns one of these.

    Where functions take a network, it is the one below, its moving average, or what DDP makes of it.
    """

    config: CfgNode  # the session's, with what the data decides, such as the number of classes
    # Bare, on its device, with fresh weights. On GPUs batch norms are synchronised; other buffers are per process.
    # TRAIN.LAYER_DECAY needs its `group_matcher(coarse)`, TRAIN.HEAD_LR_SCALE its `get_classifier()`, both as in timm.
    network: nn.Module
    data: TrainingData
    # (network in training mode, batch on the device) -> the batch's mean loss, and named parts of it for the log, with
    # the same names in every batch on every process. Runs under autocast where that is on. All that is random in it is
    # seeded by (seed, process, update, batch).
    loss: Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
    # Bare network -> named numbers over the whole validation set, the same on every process. A long validation asks
    # `session.supervisor.stop_agreed()` now and then, on all processes together, and raises StopRequested if so.
    validate: Callable[[nn.Module], dict[str, float]]
    decides: str  # which of these numbers decides the best checkpoint
    # The data, for a checkpoint: `data_fingerprint` and `val_fingerprint`, which a resumed run must share, and whatever
    # else is to be stored, such as class names.
    identity: dict[str, Any]
    about: str  # the data in a few words, for the log
    higher_is_better: bool = True  # of the number that decides
    by_chance: float | None = (
        None  # what that number may be of a network that has learnt nothing; higher is better then
    )
    # path -> what was loaded into the network, for the log; UserError where it does not fit
    load_pretrained: Callable[[str], str] = _no_pretrained
    compile: Callable[[Precision], None] = _nothing_to_compile  # the network in place, for COMPILE
    preview: Callable[[Batch], Tensor] | None = None  # normalised images (B, 3, H, W) of a batch, for TensorBoard

    def __post_init__(self) -> None:
        missing = {"data_fingerprint", "val_fingerprint"} - set(self.identity)
        if missing:
            raise UserError(f"Task.identity: lacks {', '.join(sorted(missing))}; a resumed run is checked by them")

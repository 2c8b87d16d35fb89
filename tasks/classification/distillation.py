"""Distillation: a teacher, another network that is trained already, whose logits a network learns from."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn
from yacs.config import CfgNode

import models  # noqa: F401 - teachers of this family: timm knows them from then on
from configs import UserError
from configs.errors import one_line
from data import as_stages
from data.normalization import pixel_statistics
from utils.checkpoint import load_file, select_weights

from .stages import training_stages
from .weights import renamed_classes


class Teacher:
    """DISTILL.TEACHER with its weights: images (B, C, H, W), normalised for the student -> its logits (B, K).

    It is no module, so that it is part of no network: in no checkpoint, moving average or optimizer. It stays in
    evaluation mode. `notify` is called with one line where its checkpoint has other names than `classes`, those of the
    data. Raises UserError where timm has no such network, or weights, classes or image size do not fit it.
    """

    def __init__(
        self,
        config: CfgNode,
        device: torch.device,
        classes: Sequence[str] = (),
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        checkpoint = load_file(config.DISTILL.WEIGHTS)
        if renamed := renamed_classes(checkpoint, classes):
            notify(f"DISTILL.WEIGHTS {config.DISTILL.WEIGHTS}: {renamed}: it teaches these only if they are the same")
        self.network = _create(config, checkpoint).to(device).eval().requires_grad_(False)
        usual = pixel_statistics(config.MODEL.GMA.IN_DIM)
        both = (*usual, *_statistics(self.network.pretrained_cfg, usual))
        mean, std, own_mean, own_std = (torch.tensor(values, device=device)[:, None, None] for values in both)
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.as_student = bool((self.scale == 1).all() and (self.shift == 0).all())
        for _, stage in as_stages(training_stages(config)):
            self._try_out(stage, device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images if self.as_student else images * self.scale + self.shift)

    def _try_out(self, config: CfgNode, device: torch.device) -> None:
        size, gma = to_2tuple(config.DATA.IMG_SIZE), config.MODEL.GMA
        try:
            shape = tuple(self(torch.zeros(1, gma.IN_DIM, *size, device=device)).shape)
        except (RuntimeError, AssertionError, ValueError) as error:
            what = f"does not take images of {size[0]} x {size[1]}: {one_line(error)[:200]}"
            raise UserError(f"DISTILL.TEACHER = {config.DISTILL.TEACHER!r}: {what}") from None
        if shape != (1, gma.NUM_CLASSES):
            raise UserError(f"DISTILL.TEACHER = {config.DISTILL.TEACHER!r}: gives {shape}, no logits of classes")


def _statistics(own: dict[str, Any], usual: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Mean and standard deviation of a teacher's images; of grey ones, the means over its three colours."""
    found = [own.get(key) or values for key, values in zip(("mean", "std"), usual)]
    return [values if len(values) == len(usual[0]) else [sum(values) / len(values)] for values in found]


def _create(config: CfgNode, checkpoint: dict[str, Any]) -> nn.Module:
    name, path, num_classes = config.DISTILL.TEACHER, config.DISTILL.WEIGHTS, config.MODEL.GMA.NUM_CLASSES
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see timm.list_models()"
        raise UserError(f"DISTILL.TEACHER = {name!r}: timm has no such network; {hint}")
    state, _ = select_weights(checkpoint, "best", path)
    try:
        fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
        return timm.create_model(
            name,
            pretrained=True,  # by way of timm, which knows the names that files of this network have
            pretrained_cfg_overlay=dict(state_dict=state, num_classes=num_classes),
            num_classes=num_classes,
            in_chans=config.MODEL.GMA.IN_DIM,
            img_size=config.DATA.IMG_SIZE if fixed else None,
        )
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        what = f"no weights of {name} for {num_classes} classes: {one_line(error)[:200]}"
        raise UserError(f"DISTILL.WEIGHTS {path}: {what}") from None


def distillation_loss(config: CfgNode, logits: Tensor, of_teacher: Tensor) -> Tensor:
    """How far logits (B, K) are from the teacher's, mean over the batch; gradients reach the first ones only.

    'soft': T^2 * KL(teacher || student) of the softmax of logits / T, T being DISTILL.TEMPERATURE ("Distilling the
    Knowledge in a Neural Network", arXiv 1503.02531). 'hard': cross-entropy with the teacher's most probable class
    (DeiT, arXiv 2012.12877).
    """
    logits, of_teacher = logits.float(), of_teacher.float()
    if config.DISTILL.KIND == "hard":
        return F.cross_entropy(logits, of_teacher.argmax(1))
    temperature = config.DISTILL.TEMPERATURE
    student, teacher = ((x / temperature).log_softmax(1) for x in (logits, of_teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

"""Distillation: a teacher, another network that is trained already, whose logits a network learns from."""

import difflib

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import Tensor, nn
from yacs.config import CfgNode

import models  # noqa: F401 - teachers of this family: timm knows them from then on
from configs import UserError
from configs.errors import one_line
from data import as_stages
from utils.checkpoint import load_file, select_weights

from .stages import training_stages


class Teacher:
    """DISTILL.TEACHER with its weights: images (B, C, H, W), normalised for the student -> its logits (B, K).

    It is no module, so that it is part of no network: in no checkpoint, moving average or optimizer. It stays in
    evaluation mode. Raises UserError where timm has no such network, or weights, classes or image size do not fit it.
    """

    def __init__(self, config: CfgNode, device: torch.device) -> None:
        self.network = _create(config).to(device).eval().requires_grad_(False)
        expected = {key: self.network.pretrained_cfg.get(key) for key in ("mean", "std")}
        mean, own_mean, std, own_std = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (
                IMAGENET_DEFAULT_MEAN,
                expected["mean"] or IMAGENET_DEFAULT_MEAN,
                IMAGENET_DEFAULT_STD,
                expected["std"] or IMAGENET_DEFAULT_STD,
            )
        )
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


def _create(config: CfgNode) -> nn.Module:
    name, path, num_classes = config.DISTILL.TEACHER, config.DISTILL.WEIGHTS, config.MODEL.GMA.NUM_CLASSES
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see timm.list_models()"
        raise UserError(f"DISTILL.TEACHER = {name!r}: timm has no such network; {hint}")
    state, _ = select_weights(load_file(path), "best", path)
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

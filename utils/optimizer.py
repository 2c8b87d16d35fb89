"""The optimizer: which parameters decay, and by which factor each one's learning rate differs from the schedule's."""

from typing import Any

from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from configs import UserError

_NO_LAYERS = "this network's group_matcher tells no layers apart, so that nothing would decay; set it to 1"


def build_optimizer(config: CfgNode, network: nn.Module, lr: float) -> Optimizer:
    """AdamW or SGD with Nesterov momentum; one-dimensional parameters and biases carry no weight decay.

    Groups come in the released order (with decay, without), so that released optimizer states load. With
    TRAIN.LAYER_DECAY there are two groups a block, by the network's `group_matcher`, from the stem on; their `lr_scale`
    is what timm's schedulers multiply the learning rate by. UserError where a network has nothing to be decayed by.
    """
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    without_decay = getattr(network, "no_weight_decay", set)()  # timm's contract, which other networks need not know
    common: dict[str, Any] = dict(weight_decay=train.WEIGHT_DECAY, no_weight_decay_list=without_decay)
    if train.LAYER_DECAY < 1:
        # Without a matcher, or with one for other names, timm puts all parameters into one layer, and nothing decays.
        matcher = network.group_matcher(coarse=False) if hasattr(network, "group_matcher") else {}
        if len(group_parameters(network, matcher)) < 2:
            raise UserError(f"TRAIN.LAYER_DECAY = {train.LAYER_DECAY}: {_NO_LAYERS}")
        groups = param_groups_layer_decay(network, layer_decay=train.LAYER_DECAY, **common)
    else:
        groups = param_groups_weight_decay(network, **common)
        groups.reverse()
    if train.HEAD_LR_SCALE != 1:
        groups = _scale_head(groups, network, train.HEAD_LR_SCALE)
    if options.NAME == "sgd":  # timm's name for SGD with Nesterov momentum
        name = "sgd" if options.MOMENTUM > 0 else "momentum"  # Nesterov's needs some
        return create_optimizer_v2(groups, opt=name, lr=lr, momentum=options.MOMENTUM)
    # fused: one pass over weights and state, on GPU and CPU
    return create_optimizer_v2(groups, opt="adamw", lr=lr, eps=options.EPS, betas=tuple(options.BETAS), fused=True)


def scheduled_lr(optimizer: Optimizer) -> float:
    """The schedule's learning rate, before any group's factor."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1.0)


def _scale_head(groups: list[dict[str, Any]], network: nn.Module, scale: float) -> list[dict[str, Any]]:
    """Put the classifier's parameters into groups of their own, after the others, with another lr_scale."""
    if not hasattr(network, "get_classifier"):
        raise UserError(f"TRAIN.HEAD_LR_SCALE = {scale}: this network has no classifier (get_classifier)")
    head = {id(parameter) for parameter in network.get_classifier().parameters()}
    others, heads = [], []
    for group in groups:
        parts: tuple[list, list] = ([], [])
        for parameter in group["params"]:
            parts[id(parameter) in head].append(parameter)
        if parts[0]:
            others.append(group | {"params": parts[0]})
        if parts[1]:
            heads.append(group | {"params": parts[1], "lr_scale": scale * group.get("lr_scale", 1.0)})
    return others + heads

"""The optimizer, and which parameters decay."""

from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode


def build_optimizer(config: CfgNode, network: nn.Module, lr: float) -> Optimizer:
    """AdamW or SGD with Nesterov momentum; one-dimensional parameters and biases carry no weight decay.

    Groups come in the released order (with decay, without), so that released optimizer states load.
    """
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    groups = param_groups_weight_decay(
        network, weight_decay=train.WEIGHT_DECAY, no_weight_decay_list=network.no_weight_decay()
    )
    groups.reverse()
    if options.NAME == "sgd":  # timm's name for SGD with Nesterov momentum
        return create_optimizer_v2(groups, opt="sgd", lr=lr, momentum=options.MOMENTUM)
    # fused: one pass over weights and state, on GPU and CPU
    return create_optimizer_v2(groups, opt="adamw", lr=lr, eps=options.EPS, betas=tuple(options.BETAS), fused=True)

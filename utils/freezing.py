"""Freezing: parts of a network that keep their weights and running statistics while the rest learns."""

from timm.models import group_parameters
from torch import nn
from yacs.config import CfgNode

from configs import UserError


def freeze(config: CfgNode, network: nn.Module) -> None:
    """Freeze what TRAIN.FREEZE names, in place: frozen parameters take no gradient, so that no optimizer gets them.

    'backbone' is all but the classifier (`get_classifier`), or where a network has none, all that its `group_matcher`
    knows. A number n is the stem and the first n stages. Raises UserError where the weights are fresh, where the
    network does not name its stages, and where nothing would be left to learn.
    """
    part = config.TRAIN.FREEZE
    if not part:
        return
    if not config.MODEL.PRETRAINED and not config.MODEL.RESUME:
        raise UserError(f"TRAIN.FREEZE = {part!r}: freezes fresh weights; give trained ones with --pretrained")
    if part == "backbone" and hasattr(network, "get_classifier"):
        learns = {id(parameter) for parameter in network.get_classifier().parameters()}
        frozen = [parameter for parameter in network.parameters() if id(parameter) not in learns]
    else:
        # Layer 0 is the stem, layer n is stage n; the last one is what no pattern matches.
        matcher = network.group_matcher(coarse=True) if hasattr(network, "group_matcher") else {}
        layers = group_parameters(network, matcher, return_values=True)
        last = len(layers) - 2 if part == "backbone" else int(part)
        frozen = [parameter for layer in range(last + 1) for parameter in layers.get(layer, ())]
    if len(frozen) in (0, len(list(network.parameters()))):
        what = "freezes all of it" if frozen else "finds no stages in it (group_matcher)"
        raise UserError(f"TRAIN.FREEZE = {part!r}: {what} in this network; set it to ''")
    for parameter in frozen:
        parameter.requires_grad_(False)


def set_training_mode(network: nn.Module) -> None:
    """Training mode, but for modules whose parameters are all frozen: they stay in evaluation mode.

    So frozen batch norms use their running statistics and count no batch, and no path is dropped in frozen blocks.
    """
    network.train()
    for module in network.modules():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if learns and not any(learns):
            module.eval()

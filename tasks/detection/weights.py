"""Weights of detectors: where training starts, and what is evaluated."""

from typing import Any

from torch import nn
from yacs.config import CfgNode

from configs import UserError
from utils.checkpoint import load_exactly, load_file, select_weights

from .detectors import CLASS_LAYERS, build_detector


def load_pretrained(network: nn.Module, path: str) -> str:
    """Load a classifier's weights into the backbone, or those of a detector; returns what was loaded, for the log.

    Of a detector, layers that depend on the classes, or that it does not have, such as masks, stay fresh.
    Raises UserError where anything else does not fit.
    """
    state, kind = select_weights(load_file(path), "best", path)
    if not any(name.startswith("backbone.maps.") for name in state):
        return network.backbone.maps.load(path)
    own = network.state_dict()
    may_be_fresh = (*CLASS_LAYERS, "roi_heads.mask_")
    fresh = [
        name
        for name, value in own.items()
        if name.startswith(may_be_fresh) and (name not in state or state[name].shape != value.shape)
    ]
    known = {name: value for name, value in state.items() if name in own or not name.startswith(may_be_fresh)}
    load_exactly(network, known | {name: own[name] for name in fresh}, path)
    return f"{kind} of {path}" + (f"; {len(fresh)} layers' weights are fresh ({fresh[0]}, ...)" if fresh else "")


def load_detector(config: CfgNode, path: str, classes: list[str] | None) -> tuple[nn.Module, dict[str, Any], str]:
    """The network of a checkpoint with its weights, {'classes', 'category_ids'} of it, and what it is, for the log.

    `classes` are used where the checkpoint names none. Raises UserError where there are none either, or weights do not
    fit.
    """
    checkpoint = load_file(path)
    weights, kind = select_weights(checkpoint, config.TEST.WEIGHTS, path)
    names = checkpoint.get("classes") or classes
    if not names:
        raise UserError(f"{path}: names no classes; give the data that it was trained on with --data-path")
    network = build_detector(config, len(names))
    load_exactly(network, weights, path)
    ids = checkpoint.get("category_ids") or list(range(1, len(names) + 1))
    return network, {"classes": list(names), "category_ids": list(ids)}, f"{kind} of {path}"

"""The optimizer: which parameters decay, and by which factor each one's learning rate differs from the schedule's."""

import ast
import difflib
import inspect
from typing import Any

from timm import optim
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from configs import UserError
from configs.errors import first_line

_OF_A_GROUP = ("params", "lr", "step", "lookahead_step")  # in a group of parameters, what is a run's and no setting
_HAVE_KEYS = {"lr": "TRAIN.BASE_LR", "weight_decay": "TRAIN.WEIGHT_DECAY"}
_NO_LAYERS = "this network's group_matcher tells no layers apart, so that nothing would decay; set it to 1"


def build_optimizer(config: CfgNode, network: nn.Module, lr: float) -> Optimizer:
    """The optimizer of TRAIN.OPTIMIZER, over all parameters that are not frozen.

    One-dimensional parameters and biases carry no weight decay. Groups come in the released order (with decay,
    without), so that released optimizer states load. With TRAIN.LAYER_DECAY there are two groups a block, by the
    network's `group_matcher`, from the stem on; their `lr_scale` is what timm's schedulers multiply the learning rate
    by. UserError where a network has nothing to be decayed by, and where timm cannot make the optimizer or would pass
    over an argument.
    """
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    without_decay = getattr(network, "no_weight_decay", set)()  # timm's contract, which other networks need not know
    common: dict[str, Any] = dict(weight_decay=train.WEIGHT_DECAY, no_weight_decay_list=without_decay)
    args = parse_arguments(options.ARGS)
    defaults = _own_defaults(options.NAME)
    _check_arguments(options.NAME, args)
    if "fallback_list" in args:  # patterns of names that Muon leaves to AdamW: it goes by groups
        patterns = args.pop("fallback_list")
        common["fallback_list"] = [patterns] if isinstance(patterns, str) else patterns
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
    if options.NAME == "adamw":  # fused: one pass over weights and state, on GPU and CPU
        name, args = "adamw", dict(eps=options.EPS, betas=tuple(options.BETAS), fused=True) | args
    elif options.NAME == "sgd":  # timm's name for SGD with Nesterov momentum, which needs some
        name, args = "sgd" if options.MOMENTUM > 0 else "momentum", dict(momentum=options.MOMENTUM) | args
    else:
        name, args = options.NAME, defaults | args
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, **args)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        where = f"TRAIN.OPTIMIZER.NAME = {options.NAME!r}, ARGS = {options.ARGS!r}"
        raise UserError(f"{where}: timm cannot make this optimizer: {first_line(error)}") from None


def parse_arguments(text: str) -> dict[str, Any]:
    """'momentum=0.95, betas=(0.9, 0.98)' -> {'momentum': 0.95, 'betas': (0.9, 0.98)}; UserError for anything else."""
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        args = {word.arg: ast.literal_eval(word.value) for word in call.keywords} if not call.args else {None: None}
        if None in args:
            raise ValueError
    except (SyntaxError, ValueError, AttributeError, RecursionError):
        raise UserError(
            f"TRAIN.OPTIMIZER.ARGS = {text!r}: must be names and values, such as 'momentum=0.95, betas=(0.9, 0.98)'"
        ) from None
    for name in args.keys() & _HAVE_KEYS.keys():
        raise UserError(f"TRAIN.OPTIMIZER.ARGS = {text!r}: {name} has a key of its own; set {_HAVE_KEYS[name]}")
    return args


def _own_defaults(name: str) -> dict[str, Any]:
    """Arguments of one of timm's optimizers whose defaults do not do here; UserError where none of that name works."""
    known = optim.list_optimizers()
    bare = name.removeprefix("lookahead_")
    if bare not in known:
        near = difflib.get_close_matches(bare.lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.optim.list_optimizers()"
        raise UserError(f"TRAIN.OPTIMIZER.NAME = {name!r}: timm has no such optimizer; {hint}")
    info = optim.get_optimizer_info(bare)
    if info.second_order:
        raise UserError(f"TRAIN.OPTIMIZER.NAME = {name!r}: needs second derivatives; no run computes them")
    if inspect.isclass(info.opt_class) and "deterministic" in inspect.signature(info.opt_class).parameters:
        return {"deterministic": True}  # else Kron would draw other numbers on each process, and networks drift apart
    return {}


def _check_arguments(name: str, args: dict[str, Any]) -> None:
    """UserError for arguments that timm would drop without a word, or that would end the first update."""
    optimizer = optim.get_optimizer_info(name.removeprefix("lookahead_")).opt_class
    if not inspect.isclass(optimizer):  # of a library that is not loaded yet; it checks them itself
        return
    defaults = {key: value.default for key, value in inspect.signature(optimizer).parameters.items()}
    known = defaults.keys() - {"self", "params", *_HAVE_KEYS}
    known |= {"fallback_list"} if "fallback_lr_scale" in known else set()  # Muon and its kin
    for key, value in args.items():
        if key not in known:
            what = f"{name} takes no {key}; it takes {', '.join(sorted(known))}"
        elif isinstance(defaults.get(key), tuple) and not (
            isinstance(value, tuple | list) and len(value) == len(defaults[key])
        ):
            what = f"{key} of {name} must be {len(defaults[key])} numbers, such as {key}={defaults[key]}"
        else:
            continue
        raise UserError(f"TRAIN.OPTIMIZER.ARGS: {what}")


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Take a stored state; the settings of its groups stay the configuration's. ValueError, KeyError or TypeError where
    it does not fit.
    """
    own = [{k: v for k, v in group.items() if k not in _OF_A_GROUP} for group in optimizer.param_groups]
    # Before loading, because `fused` decides on which device torch puts `step`.
    groups = [{**group, **settings} for group, settings in zip(saved["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})


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

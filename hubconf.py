"""The variants for torch.hub, with the options of timm's create_model (num_classes, features_only, group_sizes ...):

torch.hub.load("<this folder>", "groupmixformer_small", source="local", weights="<file>", num_classes=1000)
"""

import importlib.util as _util
import sys as _sys
from collections.abc import Callable as _Callable
from os import PathLike as _PathLike
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import Any as _Any

from timm.models import load_state_dict as _load_state_dict
from torch import Tensor as _Tensor
from torch import nn as _nn

dependencies = ["torch", "timm"]


def _import_network() -> _ModuleType:
    """models/groupmixformer.py by its path: the project that asks may have imported a package `models` of its own."""
    path = _Path(__file__).resolve().parent / "models" / "groupmixformer.py"
    name = "groupmixformer_of_hub"
    if name in _sys.modules and _Path(_sys.modules[name].__file__) == path:
        return _sys.modules[name]
    spec = _util.spec_from_file_location(name, path)
    _sys.modules[name] = module = _util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_network = _import_network()


def _entry_point(name: str) -> _Callable[..., _nn.Module]:
    create = getattr(_network, name)

    def entry_point(weights: str | _PathLike | dict[str, _Tensor] | None = None, **options: _Any) -> _nn.Module:
        model = create(**options)
        if weights is not None:
            # Of a training checkpoint timm takes the moving average, where it holds one.
            if not isinstance(weights, dict) and not _Path(weights).is_file():
                raise FileNotFoundError(f"weights={str(weights)!r}: no such file")
            state = weights if isinstance(weights, dict) else _load_state_dict(str(weights))
            try:
                model.load_state_dict(_network.checkpoint_filter_fn(state, model))
            except RuntimeError as error:  # hundreds of lines, one a parameter
                lines = str(error).splitlines()
                raise ValueError(
                    f"weights of another network than {name}{options or ''}: {lines[1].strip()[:200]}"
                ) from None
        return model

    entry_point.__name__ = name
    entry_point.__doc__ = f"{create.__doc__}\n\nweights: a file of weights, or a state dict; None for fresh ones."
    return entry_point


globals().update({name: _entry_point(name) for name in _network.VARIANTS})

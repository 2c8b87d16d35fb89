"""How a run's configuration is put together, checked and frozen.

A value comes from, later wins: the default on its card, the YAML files of --cfg, each after those that its BASE names,
--opts, flags. Where no YAML file is named, what the weights to evaluate are kept with takes its place. Where one of
these sets only the length of a run, the warm-up follows (`configs.length`).
"""

import ast
import copy
import difflib
import math
import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from .arguments import OneLineParser, flag_values, make_parser, parse_sources
from .errors import UserError, existing_file, one_line
from .keys import KEYS, RETIRED_KEYS, Key
from .length import follow_length

KeysOf = Callable[[str], Mapping[str, Key]]
ConfigOf = Callable[[str], Mapping[str, Any] | None]


class Setting(NamedTuple):
    """One value for one key, and the file or option that it comes from."""

    origin: str
    name: str
    value: Any


class Command(NamedTuple):
    """What a command line of train.py or test.py says."""

    args: Namespace
    config: CfgNode
    keys: Mapping[str, Key]  # the cards of all its keys


def read_command(
    argv: Sequence[str] | None,
    keys_of: KeysOf,
    notify: Callable[[str], None] = print,
    description: str = "",
    parser: OneLineParser | None = None,
    config_of: ConfigOf = lambda path: None,
) -> Command:
    """Read a command line with the files that it names, and check everything.

    Args:
        argv: the words after the program's name; None for those of this process.
        keys_of: gives the keys that a task has beside the shared ones (`tasks.keys_of`).
        notify: is called with one line for each key or flag that is accepted and ignored.
        description: for --help.
        parser: takes the flags that the program has beside these, and has a description of its own.
        config_of: gives what a file of weights holds of its configuration, {key: value}, or None. Used without --cfg;
            of the keys, those that are kept with weights are taken.

    Raises UserError, one line that names file or option, key and value, for a wrong value. A wrong command line ends
    the program with status 2 and one line.
    """
    cfg, opts, weights = parse_sources(argv)
    stored = config_of(weights) if weights and not cfg else None
    kept = [Setting(weights, name, value) for name, value in (stored or {}).items()]
    settings = [setting for file in cfg for setting in _read_file(Path(file))]
    settings += [Setting("--opts", name, value) for name, value in zip(opts[::2], opts[1::2])]
    task = KEYS["TASK"].default
    for setting in kept + settings:
        if setting.name == "TASK":
            task = _convert(setting, KEYS["TASK"])
    keys = {**KEYS, **keys_of(task)}
    args = make_parser(keys, parser or OneLineParser(description=description)).parse_args(argv)
    if not cfg and stored is None:
        what = f"{weights}: holds no configuration of its network; name" if weights else "--cfg is missing: name"
        raise UserError(f"{what} the YAML file of the variant, --cfg configs/<variant>.yaml")
    kept = [setting for setting in kept if setting.name in keys and keys[setting.name].kept_with_weights]
    if kept:
        notify(f"no --cfg: network, data set, image size and preprocessing are those that {weights} was trained with")
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY and VALUE, but {opts[-1]!r} has no value")
    flags = flag_values(args, keys)
    settings += [Setting(keys[name].flag, name, value) for name, value in flags.items()]

    config = CfgNode()
    for name, key in keys.items():
        _put(config, name, copy.deepcopy(key.default))
    converted = []
    for setting in kept + settings:
        if setting.name in RETIRED_KEYS:
            notify(f"{setting.origin}: {setting.name} is ignored: {RETIRED_KEYS[setting.name]}")
        else:
            converted.append(setting._replace(value=_convert(setting, _card(setting, keys, task))))
            _put(config, setting.name, converted[-1].value)
    for name, (value, why) in follow_length(converted, keys).items():
        _put(config, name, value)
        keys[name] = replace(keys[name], follows=why)
    for name, value in flatten(config):
        for rule in keys[name].rules:
            if not rule.accepts(value, config):
                raise UserError(f"{name} = {value!r}: {rule.demand.format(**config)}")
    if "DATA.CACHE_MODE" in flags and not config.DATA.ZIP_MODE:
        notify("--cache-mode has no effect without --zip: images are read from folders")
    config.freeze()
    return Command(args, config, keys)


def read_config(argv: Sequence[str], keys_of: KeysOf, notify: Callable[[str], None] = print) -> CfgNode:
    """The configuration of a command line, as `read_command`."""
    return read_command(argv, keys_of, notify).config


def changed_values(
    before: Mapping[str, Any], config: CfgNode, names: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value before, value now) for each of the named keys that differs; keys not in `before` do not."""
    for name, now in flatten(config):
        now = list(now) if isinstance(now, tuple) else now
        if name in names and name in before and before[name] != now:
            yield name, before[name], now


def image_size(config: CfgNode) -> tuple[int, int]:
    """Height and width of the input, pixels: DATA.IMG_SIZE is one number for both, or holds the two."""
    return edges(config.DATA.IMG_SIZE)


def edges(size: int | list[int]) -> tuple[int, int]:
    """Height and width of a size as keys hold it."""
    return (size[0], size[1]) if isinstance(size, list) else (size, size)


def with_num_classes(config: CfgNode, num_classes: int) -> CfgNode:
    """A copy of the frozen configuration whose network has `num_classes` outputs."""
    return with_values(config, {"MODEL.GMA.NUM_CLASSES": num_classes})


def with_values(config: CfgNode, values: dict[str, Any]) -> CfgNode:
    """A copy of the frozen configuration with other values of the right types, {'DATA.IMG_SIZE': 256}."""
    config = config.clone()
    config.defrost()
    for name, value in values.items():
        _put(config, name, value)
    config.freeze()
    return config


def flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested dictionaries hold, each key in full: ('TRAIN.LR_SCHEDULER.NAME', 'cosine')."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_dict(node: CfgNode) -> dict[str, Any]:
    """The configuration as plain dictionaries, for JSON and YAML."""
    return {
        name: to_dict(value) if isinstance(value, CfgNode) else list(value) if isinstance(value, tuple) else value
        for name, value in node.items()
    }


# --------------------------------------------------------------------------------------------------------------- files
class _Loader(yaml.SafeLoader):
    """Refuses a key that appears twice: PyYAML would silently drop the first one, with the whole group below it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_file(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[Setting]:
    """The settings of a YAML file, after those of the files that its BASE names."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: BASE leads back to the file itself")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file{_nearby_yaml(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold KEY: value pairs, holds a {type(content).__name__}")
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: BASE = {bases!r}: must be a YAML file or a list of them")
    for base in filter(None, bases):
        yield from _read_file(path.parent / base, (*seen, resolved))
    try:
        values = list(flatten(content))
    except RecursionError:
        raise UserError(f"{path}: not a configuration: a group of keys holds itself") from None
    for name, value in values:
        yield Setting(str(path), name, value)


def _nearby_yaml(path: Path) -> str:
    """The file with the nearest name in the folder that was given, or in configs/."""
    there = {p.name: existing_file(f"configs/{p.name}") for p in Path(__file__).parent.glob("*.yaml")}
    there |= {p.name: str(p) for p in path.parent.glob("*.yaml") if p.is_file()}
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.4)
    return f"; did you mean {there[near[0]]}?" if near else ""


# -------------------------------------------------------------------------------------------------------------- values
def _card(setting: Setting, keys: Mapping[str, Key], task: str) -> Key:
    """The card of a setting's key; UserError where the task has no such key."""
    origin, name, value = setting
    if name == "BASE":
        raise UserError(f"{origin}: BASE = {value!r}: is read from YAML files only; name that file with --cfg")
    if name in keys:
        return keys[name]
    if any(other.startswith(f"{name}.") for other in keys):
        raise UserError(f"{origin}: {name} = {value!r}: is a group of keys and takes no value itself")
    near = _nearest(name.upper(), keys)
    hint = f"did you mean {near}?" if near else f"TASK {task!r} has no such key"
    raise UserError(f"{origin}: unknown key {name}; {hint}")


def _nearest(name: str, keys: Mapping[str, Key]) -> str:
    """The key that may be meant: one that ends like the name (TRAIN.LR: TRAIN.BASE_LR) or begins like it, else one that
    looks like it.
    """
    name = name.replace("LEARNING_RATE", "LR")
    if misspelt := difflib.get_close_matches(name, keys, n=1, cutoff=0.9):
        return misspelt[0]
    group, _, last = name.rpartition(".")
    alike = [key for key in keys if re.search(rf"[._]{re.escape(last)}$", key) or key.startswith(f"{name}_")]
    alike.sort(key=lambda key: not key.startswith(f"{group}."))  # stable: of several the first card
    return next(iter(alike or difflib.get_close_matches(name, keys, n=1, cutoff=0.5)), "")


def _put(config: CfgNode, name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        config = config.setdefault(group, CfgNode())
    config[last] = value


def _convert(setting: Setting, key: Key) -> Any:
    """A setting's value in the type of its key; UserError where it has another type."""
    try:
        return _coerce(setting.value, key)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{setting.origin}: {setting.name} = {setting.value!r}: {error}") from None


def _coerce(value: Any, key: Key) -> Any:
    """Bring a value from YAML or the command line to the type of a key; ValueError says what it must be."""
    default = key.default
    may_be_list = key.kind == "name or numbers"
    if may_be_list and isinstance(value, str) and value.startswith("["):
        value = _parse_literal(value)
    if isinstance(default, str) and not (may_be_list and isinstance(value, list | tuple)):
        if isinstance(value, dict | list | tuple):
            raise ValueError("must be text")
        return "" if value is None else str(value)
    if isinstance(value, str):
        value = _parse_literal(value)
    if key.kind == "switch" and isinstance(value, str):
        return value
    if value is None and key.kind.endswith("or None"):
        return None
    if key.kind in ("number", "number or None"):
        return _number(value)
    if key.kind == "size":
        return _size(value)
    if key.kind == "sizes":
        if not isinstance(value, list | tuple) or any(
            not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[1]) is not int for pair in value
        ):
            raise ValueError("must be a list of sizes and the first epoch of each, such as [[128, 0], [192, 100]]")
        return [[_size(size), epoch] for size, epoch in value]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("must be True or False")
        return value
    if isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("must be a whole number")
        return value
    if isinstance(default, float):
        return float(_number(value))
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list such as [1, 2]")
    values = [_number(x) for x in value]
    if isinstance(default, tuple):
        return tuple(map(float, values))  # torch refuses betas such as (0, 0.999)
    if not key.kind and all(isinstance(x, int) for x in default) and not all(isinstance(x, int) for x in values):
        raise ValueError("must be a list of whole numbers")
    return values


def _size(value: Any) -> int | list[int]:
    both = value if isinstance(value, list | tuple) else [value]
    if len(both) not in (1, 2) or any(isinstance(edge, bool) or not isinstance(edge, int) for edge in both):
        raise ValueError("must be a whole number, or height and width such as [192, 256]")
    return both[0] if both[0] == both[-1] else list(both)


def _parse_literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("none", "null", ""):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a number")
    return value

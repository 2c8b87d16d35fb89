"""The command line of `train.py` and `test.py`. Most flags are short names of configuration keys."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .keys import Key


class OneLineParser(argparse.ArgumentParser):
    """Reports one line, on the first process only, and suggests the nearest flag for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse takes -0.1 for a value but -1e-3 for a flag: `--opts TRAIN.BASE_LR -1e-3` would not name the key.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=", 1)[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            self.error(f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return known

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_sources(argv: Sequence[str] | None) -> tuple[str | None, list[str], str]:
    """The values of --cfg and --opts, and the weights that are named to evaluate, '' for none.

    They decide the task, and the task decides which other flags there are.
    """
    parser = OneLineParser(allow_abbrev=False, add_help=False)
    _add_sources(parser)
    for flag in ("--resume", "--pretrained"):
        parser.add_argument(flag, default="")
    known, _ = parser.parse_known_args(argv)
    pairs = dict(zip(known.opts[::2], known.opts[1::2]))
    resume, pretrained = pairs.get("MODEL.RESUME", ""), pairs.get("MODEL.PRETRAINED", "")
    return known.cfg, known.opts, known.resume or resume or known.pretrained or pretrained


def make_parser(keys: Mapping[str, Key], description: str = "") -> OneLineParser:
    """The parser of the whole command line, which exits with status 2 and one line where the command line is wrong."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of the example commands
    parser = OneLineParser(description=description, allow_abbrev=False, formatter_class=raw)
    _add_sources(parser)
    for name, key in keys.items():
        if key.flag:
            parser.add_argument(key.flag, dest=name, default=None, help=key.meaning, **_options(key))
    parser.add_argument("--flops", action="store_true", help="count FLOPs and parameters only (test.py)")
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="label these pictures, and those in these folders (test.py)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where --images writes, and not beside the pictures (test.py)")
    parser.add_argument("--json", metavar="FILE", help="write the results for programs; - is standard output (test.py)")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="accepted from old launchers; the environment decides"
    )
    return parser


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg", metavar="FILE", help="YAML file of the variant, configs/*.yaml; default: what --resume holds (test.py)"
    )
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="set any configuration key"
    )


def _options(key: Key) -> dict[str, Any]:
    """What argparse needs to know of a flag; the type and rules of its key decide."""
    if isinstance(key.default, bool):
        return {"action": "store_true"}
    if isinstance(key.default, list):
        return {"nargs": "+", "type": int}
    names = [name for rule in key.rules for name in rule.choices if name]
    return {"type": type(key.default), "choices": names or None}


def flag_values(args: argparse.Namespace, keys: Mapping[str, Key]) -> dict[str, Any]:
    """The configuration keys that were set by flags, {key: value}."""
    return {name: value for name in keys if (value := getattr(args, name, None)) is not None}

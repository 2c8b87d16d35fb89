"""The command line of `train.py` and `test.py`. Most flags are short names of configuration keys."""

import argparse
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .keys import FILE_NAME, Key

# Headings of --help: the first part of a key, or a whole key -> the heading of its flag. Others are the run's.
HEADINGS = {"DATA": "data", "MODEL": "network and weights", "TRAIN": "training", "TEST": "evaluation"}
HEADINGS |= {"EVAL_MODE": "evaluation", "THROUGHPUT_MODE": "evaluation", "MODEL_FILE": "network and weights"}
FOLDER_KEYS = ("DATA.DATA_PATH", "OUTPUT")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, breaks no flag at its hyphens, and shows defaults."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.nargs != 0 and action.default not in (None, "", [], argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if has_default and "default" not in text else text


class OneLineParser(argparse.ArgumentParser):
    """Reports one line, on the first process only, and suggests the nearest flag for an unknown one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.keys: Mapping[str, Key] = {}  # that flags or --opts set; for suggestions
        # argparse takes -0.1 for a value but -1e-3 for a flag: `--opts TRAIN.BASE_LR -1e-3` would not name the key.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=", 1)[0]
            near = self._keys_named(word) or difflib.get_close_matches(word, self._option_string_actions, 1, 0.7)
            self.error(f"unknown argument {word}; " + (f"did you mean {' or '.join(near)}?" if near else "see --help"))
        return known

    def _keys_named(self, word: str) -> list[str]:
        """How to set the keys whose names end in this word or have it within: --lr -> --opts TRAIN.BASE_LR VALUE ..."""
        wanted = "_" + word.strip("-").replace("-", "_").upper() + "_"
        within = [name for name in self.keys if wanted in f"_{name.rpartition('.')[2]}_"]
        exact = [name for name in within if f"_{name.rpartition('.')[2]}_" == wanted]
        return [self.keys[name].flag or f"--opts {name} VALUE" for name in (exact or within)[:3]]

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_sources(argv: Sequence[str] | None) -> tuple[list[str], list[str], str]:
    """The values of --cfg and --opts, and the weights that are named to evaluate, '' for none.

    They decide the task, and the task decides which other flags there are.
    """
    parser = OneLineParser(add_help=False)
    _add_sources(parser)
    for flag in ("--resume", "--pretrained"):
        parser.add_argument(flag, default="")
    known, _ = parser.parse_known_args(argv)
    pairs = dict(zip(known.opts[::2], known.opts[1::2]))
    resume, pretrained = pairs.get("MODEL.RESUME", ""), pairs.get("MODEL.PRETRAINED", "")
    return known.cfg or [], known.opts, known.resume or resume or known.pretrained or pretrained


def make_parser(keys: Mapping[str, Key], parser: OneLineParser) -> OneLineParser:
    """Add the whole command line to a parser, which may have flags of its own."""
    _add_sources(parser)
    parser.keys = keys
    parser.epilog = "In brackets: the key that a flag sets, and its default, which a YAML file may replace."
    groups = {name: parser.add_argument_group(name) for name in ("data", "network and weights", "training")}
    groups |= {name: parser.add_argument_group(name) for name in ("evaluation", "run")}
    for name, key in keys.items():
        if key.flag:
            heading = HEADINGS.get(name) or HEADINGS.get(name.partition(".")[0], "run")
            groups[heading].add_argument(
                key.flag, dest=name, default=None, help=_help(name, key), **_options(name, key)
            )
    evaluation = groups["evaluation"]
    evaluation.add_argument("--flops", action="store_true", help="count FLOPs and parameters only")
    evaluation.add_argument(
        "--images", nargs="+", metavar="PATH", help="label these pictures, and those in these folders"
    )
    if "--out" not in parser._option_string_actions:  # tools.visualize has one of its own
        evaluation.add_argument("--out", metavar="FOLDER", help="where --images writes, and not beside the pictures")
    evaluation.add_argument("--json", metavar="FILE", help="write the results for programs; - is standard output")
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        metavar="N",
        help="for old launchers; not used",
    )
    return parser


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg",
        nargs="+",
        metavar="FILE",
        help="YAML file of the variant, configs/*.yaml, and of a recipe, configs/recipes/*.yaml, if any: later files "
        "win; default: what --resume holds (test.py)",
    )
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="set any configuration key"
    )


def _help(name: str, key: Key) -> str:
    """The help of a flag: the meaning of its key, its name, and its default where the meaning does not say that."""
    shown = "" if "default" in key.meaning or key.default in ("", [], False) else f", default: {key.default}"
    return f"{key.meaning} ({name}{shown})".replace("%", "%%")


def _options(name: str, key: Key) -> dict[str, Any]:
    """What argparse needs to know of a flag; the type and rules of its key decide."""
    names = [name for rule in key.rules for name in rule.choices if isinstance(name, str) and name]
    if key.kind == "switch":
        return {"nargs": "?", "const": True, "choices": names}
    if isinstance(key.default, bool):
        return {"action": "store_true"}
    if isinstance(key.default, list):
        return {"nargs": "+", "type": int, "metavar": "N"}
    if names:
        return {"choices": names}
    if not isinstance(key.default, str):
        return {"type": type(key.default), "metavar": "N"}
    return {"metavar": "DIR" if name in FOLDER_KEYS else "NAME" if FILE_NAME in key.rules else "FILE"}


def flag_values(args: argparse.Namespace, keys: Mapping[str, Key]) -> dict[str, Any]:
    """The configuration keys that were set by flags, {key: value}."""
    return {name: value for name in keys if (value := getattr(args, name, None)) is not None}

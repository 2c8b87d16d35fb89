"""The command line of `train.py` and `test.py`. Most flags are short names of configuration keys."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

# flag -> (configuration key, argparse options). A flag that is given wins over --opts, and --opts over the YAML file.
CONFIG_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--batch-size": ("DATA.BATCH_SIZE", dict(type=int, help="images per process (GPU) and step")),
    "--data-path": ("DATA.DATA_PATH", dict(help="folder with train/ and val/, or train.zip and val.zip")),
    "--zip": ("DATA.ZIP_MODE", dict(action="store_true", help="read train.zip and val.zip instead of folders")),
    "--cache-mode": (
        "DATA.CACHE_MODE",
        dict(choices=("no", "full", "part"), help="with --zip: keep nothing, all, or this process's share in memory"),
    ),
    "--pretrained": ("MODEL.PRETRAINED", dict(help="weights to start from (train.py) or to evaluate")),
    "--resume": ("MODEL.RESUME", dict(help="checkpoint to continue from (train.py) or to evaluate")),
    "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", dict(type=int, help="batches summed up to one update")),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        dict(action="store_true", help="gradient checkpointing: less memory, more time"),
    ),
    "--allow-changes": (
        "TRAIN.ALLOW_CHANGES",
        dict(action="store_true", help="continue a run although its recipe or data has changed"),
    ),
    "--compile": ("COMPILE", dict(action="store_true", help="torch.compile: slower start, faster steps")),
    "--fuse": ("TEST.FUSE", dict(action="store_true", help="fuse the network for inference first (test.py)")),
    "--amp-opt-level": (
        "AMP_OPT_LEVEL",
        dict(choices=("O0", "O1", "O2"), help="O0: float32; O1, O2: autocast (AMP_DTYPE); on GPUs O1 is the default"),
    ),
    "--output": ("OUTPUT", dict(help="root of run folders: <output>/<MODEL.NAME>/<tag>")),
    "--tag": ("TAG", dict(help="name of the run")),
    "--eval": ("EVAL_MODE", dict(action="store_true", help="evaluate only")),
    "--throughput": ("THROUGHPUT_MODE", dict(action="store_true", help="measure images/s only")),
    "--model-type": ("MODEL.TYPE", dict(help="the network family: groupmixformer")),
    "--model-file": ("MODEL_FILE", dict(help="file of models/ that is copied beside the run")),
    "--weights": (
        "TEST.WEIGHTS",
        dict(
            choices=("best", "raw", "ema"), help="which weights of a checkpoint to evaluate; best: those it is kept for"
        ),
    ),
    "--tta": (
        "TEST.TTA",
        dict(
            choices=("none", "flip", "five-crop", "ten-crop"), help="average the softmax of several views of an image"
        ),
    ),
    "--sizes": ("TEST.SIZES", dict(type=int, nargs="+", help="evaluate at each of these input sizes")),
    "--val-set": (
        "TEST.VAL_SET",
        dict(choices=("real", "v2", "a", "r"), help="--data-path is ImageNet with ReaL labels, ImageNet-V2, -A or -R"),
    ),
}


class OneLineParser(argparse.ArgumentParser):
    """Reports one line, on the first process only, and suggests the nearest flag for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse takes -0.1 for a value but -1e-3 for a flag; `--opts TRAIN.BASE_LR -1e-3` is to be told by its key.
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


def parse_args(argv: Sequence[str] | None = None, description: str = "") -> argparse.Namespace:
    """Parse the command line (without the program's name); exits with status 2 and one line where it is wrong."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file of the variant, configs/*.yaml")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="set any configuration key"
    )
    for flag, (_, options) in CONFIG_FLAGS.items():
        parser.add_argument(flag, default=None, **options)
    parser.add_argument("--flops", action="store_true", help="count FLOPs and parameters only (test.py)")
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="label these pictures, and those in these folders (test.py)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results for programs; - is standard output (test.py)")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="accepted from old launchers; the environment decides"
    )
    return parser.parse_args(argv)


def flag_values(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration keys that were set by flags, {key: value}."""
    values = {}
    for flag, (key, _) in CONFIG_FLAGS.items():
        value = getattr(args, flag.lstrip("-").replace("-", "_"), None)
        if value is not None:
            values[key] = value
    return values

"""Measure how fast this code is: python -m tools.benchmark [--only NAME ...] [--data-path DIR] [--out DIR]

Each benchmark compares candidates that do the same work. The first candidate is the reference.

    evaluate   forward pass: released order of operations (models/reference.py), this network, fused, fused and compiled
    train      training step (forward, backward, clipping, AdamW, EMA): released order, this network, compiled
    memory     what a forward pass keeps for the backward pass, what both read and write, and their time: released
               order, this network, with checkpoints, compiled with memory budgets, timm's Swin-T and ConvNeXt-T
    load       from the bytes of an image to network input, for the photographs in --data-path: Pillow and timm's
               transforms, fast loading, fast loading of packed copies; to train and to validate

The candidates take turns, so a machine whose speed drifts favours none of them. The tables hold medians over the turns;
"times as fast" is the median, with its quartiles, of the ratios within each turn. The first call pays for compilation.

A GPU is used if there is one, with bfloat16 (released order: float16 with loss scaling, as released). A CPU computes in
float32, and trains in bfloat16 too where it has instructions for that. Results go to benchmark.json and benchmark.md in
--out, after each benchmark.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from configs import UserError
from configs.commands import CommandParser, command
from models.groupmixformer import VARIANTS

from .loading import benchmark_load
from .measuring import describe_machine, format_markdown
from .memory import benchmark_memory
from .networks import benchmark_evaluate, benchmark_train

BENCHMARKS: dict[str, Callable[[argparse.Namespace, torch.device], list[dict[str, Any]]]] = {
    "evaluate": benchmark_evaluate,
    "train": benchmark_train,
    "memory": benchmark_memory,
    "load": benchmark_load,
}


@command("tools.benchmark")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write. `argv` are the arguments without the program's name."""
    args = _parse(argv)
    torch.backends.cudnn.benchmark = True  # as in train.py and in the released code
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine, results = describe_machine(device), []
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in args.only or [name for name in BENCHMARKS if name != "load" or args.data_path]:
            try:
                results += BENCHMARKS[name](args, device)
            except torch.OutOfMemoryError:
                results.append({"title": name, "missing": "out of memory; try a smaller --batch-size"})
            torch.cuda.empty_cache()
            content = {"machine": machine, "command": sys.argv[1:], "benchmarks": results}
            (out / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
            (out / "benchmark.md").write_text(format_markdown(machine, results))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    print(format_markdown(machine, results))
    print(f"also in {out}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.benchmark", __doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), help="default: all; load where --data-path is")
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="groupmixformer_small", help="network")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="default: 8 on CPUs, 128 to train on GPUs, else 256"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[224], metavar="N", help="input height and width, or one number, pixels"
    )
    parser.add_argument("--trials", type=int, default=7, metavar="N", help="turns that count, after one to warm up")
    parser.add_argument("--images", type=int, default=96, metavar="N", help="photographs that 'load' takes")
    parser.add_argument("--data-path", metavar="DIR", help="folder of class folders with photographs, for 'load'")
    parser.add_argument("--out", default="output/benchmark", metavar="DIR", help="for results")
    args = parser.parse_args(argv)
    if len(args.size) > 2 or min(args.size) < 32:
        raise UserError(f"--size {' '.join(map(str, args.size))}: must be one or two numbers of at least 32")
    args.size = (args.size[0], args.size[-1])
    for name, low in (("batch_size", 1), ("trials", 1), ("images", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
    if "load" in (args.only or ()) and not args.data_path:
        raise UserError("--only load: needs photographs; give their folder of class folders with --data-path")
    return args


if __name__ == "__main__":
    sys.exit(main())

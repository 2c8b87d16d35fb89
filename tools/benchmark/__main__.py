"""Measure how fast this code is: python -m tools.benchmark [--rows NAME ...] [--data-path DIR] [--out DIR]

Every row compares ways to do the same thing. They take turns within one run, so that a machine whose speed drifts does
not favour one of them; a row gives the median of the ratios turn by turn, with their quartiles. The first way of a row
is the reference: the released order of operations (`models/reference.py`), the exact transforms, and so on.

    evaluate   forward pass: reference, this network, fused, fused and compiled
    train      training step (forward, backward, clipping, AdamW, EMA): reference, this network, compiled; on a GPU
               also with the largest batches that fit
    load       an image from JPEG to network input, of --data-path: exact, fast, packed; training and validation
    size       time and memory of the forward pass from 224 x 224 to --largest, beside a ViT of equal size
    processes  a training step of one process, of two side by side, and of two that average their gradients
    start      from command to first update, and where it goes
    roofline   what parts of the network reach of the machine's arithmetic and memory speed

Uses the GPU if there is one, in bfloat16 (the reference: float16 with loss scaling, as released), else the CPU in
float32, and training steps by autocast to bfloat16 too where the CPU has it. Batches of 128 images to train and 256 to
evaluate on a GPU, 8 on a CPU. Writes benchmark.json, benchmark.md and the plots size.png and roofline.png into --out.
What does not fit into a GPU's memory is said to be missing, and the other rows are measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import models
from configs import UserError
from configs.commands import CommandParser, command

from .loading import row_load
from .measuring import describe_machine, free_cached_memory, without_memory
from .networks import row_evaluate, row_train
from .processes import row_processes, work
from .roofline import plot_roofline, row_roofline
from .size import plot_size, row_size
from .start import row_start
from .tables import format_markdown

ROWS: dict[str, Callable[[argparse.Namespace, torch.device], list[dict[str, Any]]]] = {
    "evaluate": row_evaluate,
    "train": row_train,
    "load": row_load,
    "size": row_size,
    "processes": row_processes,
    "start": row_start,
    "roofline": row_roofline,
}
PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {"size": plot_size, "roofline": plot_roofline}


def measurable_rows(device: torch.device, has_images: bool) -> list[str]:
    """The rows that this machine can measure."""
    impossible = set() if has_images else {"load"}
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        impossible.add("processes")
    return [name for name in ROWS if name not in impossible]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.benchmark", __doc__)
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=None, help="what to measure (all)")
    parser.add_argument("--variant", default="groupmixformer_small", help="network (groupmixformer_small)")
    parser.add_argument("--batch-size", type=int, help="images a step (8; GPUs 128 to train, 256 to evaluate)")
    parser.add_argument("--size", type=int, default=224, help="input height and width, pixels (224)")
    parser.add_argument("--largest", type=int, default=1024, help="largest input of the row 'size', pixels (1024)")
    parser.add_argument("--trials", type=int, default=7, help="turns of each row (7)")
    parser.add_argument("--images", type=int, default=96, help="photographs of the row 'load' (96)")
    parser.add_argument("--data-path", metavar="DIR", help="folder of class folders with photographs, for 'load'")
    parser.add_argument("--compile-reference", action="store_true", help="also compile the reference (minutes)")
    parser.add_argument("--out", default="output/benchmark", metavar="DIR", help="for results (output/benchmark)")
    parser.add_argument("--worker", choices=("alone", "ddp"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant not in models.groupmixformer.VARIANTS:
        raise UserError(f"--variant {args.variant}: one of {', '.join(models.groupmixformer.VARIANTS)}")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1")
    for name, low in (("size", 32), ("largest", 224), ("trials", 1), ("images", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {low}")
    return args


@command("tools.benchmark")
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status. `argv` are the arguments without the program's name."""
    try:
        args = _parse(argv)
        torch.backends.cudnn.benchmark = True  # as train.py and the released code have it
        if args.worker:
            work(args)
            return 0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = args.rows or measurable_rows(device, bool(args.data_path))
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        machine, rows = describe_machine(device), []
        for name in chosen:
            try:
                rows += ROWS[name](args, device)
                if name in PLOTS:
                    PLOTS[name](rows[-1], out)
            except torch.OutOfMemoryError:
                rows.append(without_memory(name))
            free_cached_memory()  # rows that start processes need it
            # Written behind every row: a run that is stopped keeps what it has.
            content = {"machine": machine, "command": sys.argv[1:], "rows": rows}
            (out / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
            (out / "benchmark.md").write_text(format_markdown(machine, rows))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    print(format_markdown(machine, rows))
    print(f"also in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the safeguards cost: one run of train.py, in which blocks of updates with and without them take turns.

    python -m tools.digits --output DIGITS
    OMP_NUM_THREADS=1 python tests/measure_overhead.py --data DIGITS
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 tests/measure_overhead.py --data DIGITS
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 tests/measure_overhead.py --data DIGITS \
      --cfg configs/groupmixformer_miny.yaml --batch 4 --block 2 --pairs 50

Left out in the blocks without: the all-reduce of what processes share in an update (the loss is then that of this
process, as in an ordinary loop), RunSupervisor.arrive, BufferSnapshot (copies of running statistics), the seeding of
every batch, the check of which images a batch really holds, Saver.after_update (the clock). Saves are timed by
themselves, checksummed, synced and renamed against a bare torch.save to the same file, and their difference is spread
over an epoch. Not left out: the seeding of each image, which the loader's workers do, and the lock, which costs
nothing after the start.
"""

# ruff: noqa: E402  (what it measures is imported, and changed, once the command line is read)
import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.add_argument("--cfg", default=str(ROOT / "configs" / "groupmixformer_digits.yaml"))
parser.add_argument("--pairs", type=int, default=60)
parser.add_argument("--block", type=int, default=5, help="updates per block")
parser.add_argument("--batch", type=int, default=64, help="images per process")
parser.add_argument("--saves", type=int, default=20, help="saves of each kind")
args = parser.parse_args()
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import train
from data import TrainingData
from utils import engine, resume
from utils.checkpoint import save_checkpoint
from utils.session import run_script
from utils.supervision import RunSupervisor, StepStatus

WARM_UP_PAIRS = 2
rng = random.Random(0)  # the same order of blocks on all processes
on_first = [rng.random() < 0.5 for _ in range(args.pairs + WARM_UP_PAIRS)]
plan = [on for first in on_first for on in (first, not first) for _ in range(args.block)]
TOTAL = len(plan)
ends: list[float] = []


class Guards:
    on = plan[0]


def switch(place, name, without):
    """Use `without` in the place of a function while the safeguards are off."""
    function = getattr(place, name)

    def switched(*a, **k):
        return function(*a, **k) if Guards.on else without(*a, **k)

    setattr(place, name, switched)


def bare_agreement(self, loss, parts, grad_norm):
    return StepStatus(loss.item(), {}, grad_norm.item(), (), False)


switch(RunSupervisor, "agree_on_update", bare_agreement)
switch(RunSupervisor, "arrive", lambda self: None)
switch(engine.BufferSnapshot, "take", lambda self: None)
switch(engine, "seed_everything", lambda *a: None)


def batches(self, epoch, update):
    """The first batches again and again: the loader is not what is measured. The bookkeeping is the real one."""
    self.order.set_position(0, 0)
    cached = [b for b, _ in zip(self.loader, range(8))]
    wanted = [index.index for index, _ in zip(iter(self.order), range(len(cached) * args.batch))]
    for number in range(TOTAL):
        batch, indices = cached[number % len(cached)]
        if Guards.on:
            start = (number % len(cached)) * args.batch
            for expected, index in zip(wanted[start : start + args.batch], indices):
                if expected != index:
                    self._report_unreadable(expected, index)
        yield batch


updates_of_an_epoch = TrainingData.updates_per_epoch
epoch_updates = 0


def total_updates(self):
    global epoch_updates
    epoch_updates = updates_of_an_epoch.fget(self)
    return TOTAL


TrainingData.batches = batches
TrainingData.updates_per_epoch = property(total_updates)
after_update = resume.Saver.after_update


def timed(self):
    if Guards.on:
        after_update(self)
    ends.append(time.perf_counter())
    Guards.on = plan[min(len(ends), TOTAL - 1)]
    if len(ends) == TOTAL:
        report(self)
        os._exit(0)


def report(saver):
    durations = np.diff(ends)  # of the updates from the second on
    on, off = [], []
    for pair in range(WARM_UP_PAIRS, args.pairs + WARM_UP_PAIRS):
        for half in range(2):
            first = (2 * pair + half) * args.block
            taken = durations[first - 1 : first - 1 + args.block].sum() / args.block
            (on if on_first[pair] == (half == 0) else off).append(taken)
    ratios = np.array(on) / np.array(off) - 1
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    if saver.session.processes.is_main:
        print(f"{len(ratios)} pairs of blocks of {args.block} updates, {saver.session.processes.world_size} processes")
        print(f"an update with: median {1e3 * np.median(on):.2f} ms, without: {1e3 * np.median(off):.2f} ms")
        print(f"overhead: median {100 * np.median(ratios):.2f} %, 95 % interval {100 * low:.2f} to {100 * high:.2f} %")
        guarded, bare = [], []
        with tempfile.TemporaryDirectory(dir=saver.session.folder) as folder:
            path = Path(folder, "c.pth")
            state = saver._content(False)
            for _ in range(args.saves):
                for times, save in (
                    (guarded, lambda: save_checkpoint(state, path)),
                    (bare, lambda: torch.save(state, path)),
                ):
                    begin = time.perf_counter()
                    save()
                    times.append(time.perf_counter() - begin)
            size = path.stat().st_size / 2**20
        extra = statistics.median(guarded) - statistics.median(bare)
        share = extra / epoch_updates / np.median(off)
        print(
            f"a save of {size:.1f} MiB: {1e3 * statistics.median(guarded):.1f} ms, bare torch.save "
            f"{1e3 * statistics.median(bare):.1f} ms; spread over the {epoch_updates} updates of an epoch: "
            f"{100 * share:.2f} %"
        )
        print(f"in all: {100 * (np.median(ratios) + share):.2f} %", flush=True)


resume.Saver.after_update = timed
# One folder for all processes, which have the same parent; it stays, as the run ends in the middle.
output = Path(tempfile.gettempdir(), f"overhead-{os.getppid()}")
sys.argv = ["train.py", "--cfg", args.cfg, "--data-path", args.data]
sys.argv += ["--batch-size", str(args.batch), "--output", str(output), "--tag", "run"]
sys.argv += ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.AUTO_RESUME", "False"]
sys.argv += ["PRINT_FREQ", "1000000", "DATA.NUM_WORKERS", "0"]
run_script(train.main)

"""train.py with one planned fault, for the tests: FAULT is one of

nan:<rank>:<update>      the loss of that process becomes NaN in that update
nan:<rank>:<update>+     and in every later one
nan-gradient:<rank>:<update>  its gradients do, while the loss stays finite
infinite:<rank>:<update> its loss becomes infinite, by a constant: no gradient shows it
other-norm:<rank>:<update>  it finds another gradient norm than the others
stop:<rank>:<update>     that process gets SIGUSR1 in that update
interrupt:<rank>:<update>  likewise SIGINT, twice, while its loader workers hang; torch would wait an hour for those
raise:<rank>:<update>:<what>  that process raises in that update: 'memory', 'disk', 'binary' or other words
compiler:<rank>:<update>:<signal>  its compiler fails there; with a signal, which it has got too
raise-alone:<rank>:<update>:<what>  likewise, and the others then wait without end, as they would in NCCL
hold:<rank>:<update>     that process waits in that update for the file "go on" in the output folder
sigterm-in:<place>:<rank>  that process gets SIGTERM when it begins to evaluate, or to save; it prints the time
slow-save                saving waits for the file "go on" in the output folder
differ:<rank>:<word>:<other>  that process has another word on its command line
none                     nothing
frozen-norms             batch norms use their running statistics in training too
"""

import errno
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runs
import torch

import train
from tasks.classification import task as classification
from utils import resume, supervision
from utils.session import run_script
from utils.supervision import RunSupervisor

kind, *where = os.environ["FAULT"].split(":")
rank = os.environ.get("RANK", "0")
here = bool(where) and rank == where[0]
output = Path(sys.argv[sys.argv.index("--output") + 1])


def wait_to_go_on():
    while not (output / "go on").exists():
        time.sleep(0.01)  # what the test holds, and lets go


def spoil_activations(network):
    """Once, so that the statistics of batch norms become NaN too."""

    def spoil(module, args, out):
        hook.remove()
        return out * math.nan

    hook = network.conv_stem.register_forward_hook(spoil)


def spoil_gradients(loss):
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


def act(number, network):
    """The faults of one update; returns what becomes of its loss, where it changes."""
    planned = int(where[1].rstrip("+"))
    if number != planned and not (where[1].endswith("+") and number > planned):
        return None
    if not here:
        while kind == "raise-alone":
            time.sleep(0.01)
    elif kind == "nan":
        spoil_activations(network)
    elif kind == "nan-gradient":
        return spoil_gradients
    elif kind == "infinite":
        return lambda loss: loss + math.inf
    elif kind == "stop":
        signal.raise_signal(signal.SIGUSR1)
    elif kind == "interrupt":
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    elif kind in ("raise", "raise-alone"):
        raise {
            "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines."),
            "binary": ImportError(f"{os.environ.get('TORCHINDUCTOR_CACHE_DIR')}/st/a.main.so: file too short"),
            "disk": OSError(errno.EROFS, "Read-only file system", "/a/disk"),
        }.get(where[2]) or KeyError(where[2])
    elif kind == "compiler":
        from torch._inductor.exc import InductorError

        if where[2]:
            signal.raise_signal(signal.Signals[where[2]])
        raise InductorError(RuntimeError("C++ compile error\nwith many lines"), None)
    elif kind == "hold":
        wait_to_go_on()
    return None


def signal_once():
    """SIGTERM, the first time that this is called."""
    if where and rank == where[1]:
        where.clear()
        print(f"signalled at {time.time()}", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)


def signal_before(module, name):
    function = getattr(module, name)

    def signalled(*args):
        signal_once()
        return function(*args)

    setattr(module, name, signalled)


if kind in ("raise", "raise-alone"):
    supervision.GRACE_SECONDS = 1
if kind == "interrupt":
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 3600
if kind == "other-norm":
    agree_on_update = RunSupervisor.agree_on_update
    updates = itertools.count()

    def other_norm(supervisor, loss, parts, grad_norm):
        other = next(updates) == int(where[1]) and here
        return agree_on_update(supervisor, loss, parts, 2 * grad_norm if other else grad_norm)

    RunSupervisor.agree_on_update = other_norm
elif kind == "sigterm-in" and where[0] == "train":
    runs.in_update(setattr, lambda number, network: signal_once())
elif kind == "sigterm-in":
    signal_before(*{"evaluate": (classification, "run_network"), "save": (resume, "save_checkpoint")}[where[0]])
elif kind == "slow-save":
    save = resume.save_checkpoint

    def slow_save(state, path):
        print("saving slowly", flush=True)
        wait_to_go_on()
        save(state, path)

    resume.save_checkpoint = slow_save
elif kind == "differ":
    if here:
        sys.argv = [where[2] if word == where[1] else word for word in sys.argv]
elif kind == "frozen-norms":
    torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
elif kind != "none":
    runs.in_update(setattr, act)

runs.without_curves(setattr)
run_script(train.main)

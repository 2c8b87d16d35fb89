"""train.py with one planned fault, for the tests: FAULT is one of

nan:<rank>:<update>      the loss of that process becomes NaN in that update
nan:<rank>:<update>+     and in every later one
nan-gradient:<rank>:<update>  its gradients do, while the loss stays finite
infinite:<rank>:<update> its loss becomes infinite, by a constant: no gradient shows it
other-norm:<rank>:<update>  it finds another gradient norm than the others
stop:<rank>:<update>     that process gets SIGUSR1 in that update
interrupt:<rank>:<update>  likewise SIGINT, twice
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
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from utils import engine, resume
from utils import supervision as faults
from utils.session import run_script

kind, *where = os.environ["FAULT"].split(":")


def nan_output(module, args, out):
    return out * float("nan")


def nan_gradient(module, args, out):
    out.register_hook(lambda gradient: gradient * float("nan"))


if kind in ("nan", "nan-gradient"):
    rank, first = int(where[0]), int(where[1].rstrip("+"))
    forward_backward = engine._accumulate_gradients

    def poisoned(session, trainer, *rest):
        update = trainer.num_updates
        if session.processes.rank == rank and (update == first or (where[1].endswith("+") and update > first)):
            spoil = nan_output if kind == "nan" else nan_gradient
            hook = trainer.network.conv_stem.register_forward_hook(spoil)
            forward_backward(session, trainer, *rest)
            hook.remove()
        else:
            forward_backward(session, trainer, *rest)

    engine._accumulate_gradients = poisoned
elif kind == "infinite":
    forward_backward = engine._accumulate_gradients

    def infinite(session, trainer, *rest):
        criterion = trainer.criterion
        if (session.processes.rank, trainer.num_updates) == tuple(map(int, where)):
            trainer.criterion = lambda *args: criterion(*args) + float("inf")
        forward_backward(session, trainer, *rest)
        trainer.criterion = criterion

    engine._accumulate_gradients = infinite
elif kind == "other-norm":
    conclude_update = faults.Watch.conclude_update
    updates = itertools.count()

    def other_norm(watch, grad_norm):
        other = (watch.processes.rank, next(updates)) == tuple(map(int, where))
        return conclude_update(watch, 2 * grad_norm if other else grad_norm)

    faults.Watch.conclude_update = other_norm
elif kind in ("stop", "interrupt"):
    forward_backward = engine._accumulate_gradients

    def signalled(session, trainer, *rest):
        if (session.processes.rank, trainer.num_updates) == tuple(map(int, where)):
            for number in [signal.SIGUSR1] if kind == "stop" else [signal.SIGINT] * 2:
                signal.raise_signal(number)
        return forward_backward(session, trainer, *rest)

    engine._accumulate_gradients = signalled
elif kind in ("raise", "raise-alone"):
    faults.GRACE_SECONDS = 1
    forward_backward = engine._accumulate_gradients

    def raising(session, trainer, *rest):
        if (session.processes.rank, trainer.num_updates) == (int(where[0]), int(where[1])):
            raise {
                "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines."),
                "binary": ImportError(f"{os.environ.get('TORCHINDUCTOR_CACHE_DIR')}/st/a.main.so: file too short"),
                "disk": OSError(errno.EROFS, "Read-only file system", "/a/disk"),
            }.get(where[2]) or KeyError(where[2])
        while kind == "raise-alone" and trainer.num_updates == int(where[1]):
            time.sleep(0.01)
        return forward_backward(session, trainer, *rest)

    engine._accumulate_gradients = raising
elif kind == "compiler":
    from torch._inductor.exc import InductorError

    forward_backward = engine._accumulate_gradients

    def uncompiled(session, trainer, *rest):
        if (session.processes.rank, trainer.num_updates) == (int(where[0]), int(where[1])):
            if where[2]:
                signal.raise_signal(signal.Signals[where[2]])
            raise InductorError(RuntimeError("C++ compile error\nwith many lines"), None)
        return forward_backward(session, trainer, *rest)

    engine._accumulate_gradients = uncompiled
elif kind == "hold":
    forward_backward = engine._accumulate_gradients

    def held(session, trainer, *rest):
        if (session.processes.rank, trainer.num_updates) == tuple(map(int, where)):
            while not (session.folder.parents[1] / "go on").exists():
                time.sleep(0.01)  # what the test holds, and lets go
        return forward_backward(session, trainer, *rest)

    engine._accumulate_gradients = held
elif kind == "sigterm-in":
    module, name = {"train": (engine, "_accumulate_gradients"), "evaluate": (train, "evaluate")}.get(
        where[0], (resume, "save_checkpoint")
    )
    function = getattr(module, name)
    rank = os.environ.get("RANK", "0")

    def signalled_there(*args):
        if rank == where[1]:
            setattr(module, name, function)
            print(f"signalled at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    setattr(module, name, signalled_there)
elif kind == "slow-save":
    save = resume.save_checkpoint

    def slow_save(state, path):
        print("saving slowly", flush=True)
        while not (path.parents[2] / "go on").exists():
            time.sleep(0.01)  # what the test holds, and lets go
        save(state, path)

    resume.save_checkpoint = slow_save
elif kind == "differ":
    if os.environ["RANK"] == where[0]:
        sys.argv = [where[2] if word == where[1] else word for word in sys.argv]
elif kind == "frozen-norms":
    torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)

run_script(train.main)

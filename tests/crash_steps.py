"""Kill a process at any step in which it changes a folder."""

import os
import shutil
import signal
from pathlib import Path

from utils import checkpoint


class Steps:
    """Counts the steps in which a process changes a folder, and kills it at one of them, half-way into a write.

    Call in a fork: what it wraps stays wrapped.
    """

    WRITES_PER_STEP = 25  # torch writes a checkpoint in many small pieces

    def __init__(self, kill_at=None, report=False):
        self.kill_at, self.report, self.count, self.writes = kill_at, report, 0, 0
        real_open = open

        def opened(path, mode="r"):
            if "w" not in mode:
                return real_open(path, mode)
            self.reach("before open")
            file = real_open(path, mode)
            self.reach("after open")
            return _Written(file, self)

        checkpoint.open = opened
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink"), (shutil, "copyfile")):
            self.wrap(module, name)
        self.wrap(Path, "unlink")

    def wrap(self, place, name):
        function = getattr(place, name)

        def wrapped(*args, **kwargs):
            self.reach(f"before {name}")
            result = function(*args, **kwargs)
            self.reach(f"after {name}")
            return result

        setattr(place, name, wrapped)

    def reach(self, name):
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.report:
            print(name)
        self.count += 1


class _Written:
    def __init__(self, file, steps):
        self.file, self.steps = file, steps

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, piece):
        self.steps.writes += 1
        if self.steps.writes % self.steps.WRITES_PER_STEP == 0:
            half = len(piece) // 2
            self.file.write(piece[:half])
            self.file.flush()
            self.steps.reach("in write")
            self.file.write(piece[half:])
            return len(piece)
        return self.file.write(piece)

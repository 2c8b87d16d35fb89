"""The lock of a run folder: one run at a time writes there."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from configs import UserError
from configs.errors import first_line

from .failures import unwritable

LOCK_NAME = "run.lock"
LOCK_SECONDS = 120  # an NFSv4 server takes 90 to drop the locks of a client that is gone
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # NFS without lockd, Lustre mounted with noflock


def lock_run_folder(folder: Path, notify: Callable[[str], None], wait_seconds: float = LOCK_SECONDS) -> int:
    """Take the right to write a run folder, until this process ends, however it ends; returns the open descriptor.

    The kernel drops the lock with the process, so a killed run leaves only half-written files, which are removed now.
    A stale lock of a dead host is waited for up to `wait_seconds`: its file server drops it later. Where the file
    system has no locks, `notify` gets a line that says so, and nothing guards the folder.
    Raises UserError where another run holds the folder, naming it.
    """
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder / LOCK_NAME}: cannot be locked: {first_line(error)}") from None
    deadline, waits = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                notify(f"{folder}: its file system has no locks ({error.strerror}): let no other run write there")
                break
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder / LOCK_NAME}: cannot be locked: {first_line(error)}") from None
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        elsewhere = " on " in holder and not holder.endswith(f" on {socket.gethostname()}")
        if not elsewhere or time.monotonic() >= deadline:
            os.close(descriptor)
            raise UserError(
                f"{folder}: is being written by {holder}; give this run another --tag or wait for that one to end"
            )
        if not waits:
            notify(f"{folder}: is locked by {holder}; waiting up to {wait_seconds:g} s, in case that host is gone")
            waits = True
        time.sleep(1)
    for partial in folder.glob(".*.partial"):
        partial.unlink()  # first of all: it may be what fills the disk
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise unwritable(folder / LOCK_NAME, error) from None
    return descriptor

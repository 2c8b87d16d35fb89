"""The lock of a run folder."""

import errno
import os
import socket
from types import SimpleNamespace

import pytest

from configs import UserError
from utils import run_lock


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def refusals(monkeypatch):
    """What the file system answers to a lock, one after the other, then yes; and a clock that runs while one waits."""
    answers, clock = [], SimpleNamespace(now=0.0)

    def lock(descriptor, how):
        if answers:
            number = answers.pop(0)
            raise OSError(number, os.strerror(number))

    def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(run_lock.fcntl, "lockf", lock)
    monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return answers


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_reported_and_used(tmp_path, refusals, number):
    refusals.append(number)
    lines = []
    os.close(run_lock.lock_run_folder(tmp_path, lines.append))
    assert len(lines) == 1 and f"{tmp_path}: its file system has no locks ({os.strerror(number)})" in lines[0]
    assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_of_a_host_that_may_be_gone_is_waited_for(tmp_path, refusals):
    """A file server keeps it until the host's lease is over."""
    (tmp_path / "run.lock").write_text("process 7 on a-dead-node")
    refusals += [errno.EAGAIN] * 90
    lines = []
    os.close(run_lock.lock_run_folder(tmp_path, lines.append))
    assert lines == [
        f"{tmp_path}: is locked by process 7 on a-dead-node; waiting up to 120 s, in case that host is gone"
    ]
    assert not refusals


@pytest.mark.parametrize(("host", "tries"), [("another-node", 121), (socket.gethostname(), 1)])
def test_a_lock_that_stays_is_refused_in_time(tmp_path, refusals, host, tries):
    (tmp_path / "run.lock").write_text(f"process 7 on {host}")
    refusals += [errno.EACCES] * 1000
    message = message_of(run_lock.lock_run_folder, tmp_path, lambda line: None)
    assert f"{tmp_path}: is being written by process 7 on {host}; give this run another --tag" in message
    assert len(refusals) == 1000 - tries
    assert (tmp_path / "run.lock").read_text() == f"process 7 on {host}"

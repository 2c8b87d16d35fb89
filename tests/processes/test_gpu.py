"""What only GPUs can show, in processes that see them: `python -m pytest -m gpu`. Skipped, saying so, without."""

import functools
import os
import re
import signal
import subprocess
import sys

import pytest
import runs
from conftest import SHOWN_GPUS
from ranks import FAULT_TRAIN, Launched, all_end, pid_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpus")]
DIST_TIMEOUT = 20


@functools.cache
def count_gpus():
    count = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", count], env=environment(), capture_output=True, check=True).stdout)


def environment():
    """runs.environment() with the GPUs that the tests were started with."""
    hidden = runs.environment()
    del hidden["CUDA_VISIBLE_DEVICES"]
    return hidden | SHOWN_GPUS


@pytest.fixture
def gpus(request, monkeypatch):
    """As many GPUs as the test's `processes`, for all that is launched."""
    processes = request.getfixturevalue("processes")
    if count_gpus() < processes:
        pytest.skip(f"needs {processes} GPUs, and this machine shows {count_gpus()}")
    shown = environment()
    monkeypatch.setattr(runs, "environment", lambda: shown)


@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_and_continued_with_the_same_bits(data, tmp_path, processes):
    opts = ("DETERMINISTIC", "True", "DATA.BATCH_SIZE", str(4 // processes))
    straight, stopped = (runs.arguments(data, tmp_path / name, *opts) for name in ("straight", "stopped"))
    result = runs.launch("train.py", straight, processes)
    assert result.returncode == 0, result.stderr
    assert "autocast" in result.stdout, "this ran on the CPU"
    result = runs.launch(FAULT_TRAIN, stopped, processes, env={"FAULT": f"stop:{processes - 1}:5"})
    assert "stopped by request at update 6" in result.stdout, result.stderr
    assert runs.launch("train.py", stopped, processes).returncode == 0
    ends = [runs.run_folder(tmp_path / name) / "ckpt_epoch_1.pth" for name in ("straight", "stopped")]
    assert runs.digest(ends[0]) == runs.digest(ends[1])


@pytest.mark.parametrize("processes", [2])
@pytest.mark.parametrize("fault", ["killed", "disk"])
def test_a_process_that_is_lost_ends_the_other_one_in_nccl(data, tmp_path, processes, fault):
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "500", "DIST_TIMEOUT_SECONDS", str(DIST_TIMEOUT))
    args = runs.arguments(data, tmp_path, *opts)
    with Launched(
        FAULT_TRAIN, args, processes, env={"FAULT": f"raise:1:{2000 if fault == 'killed' else 8}:disk"}
    ) as run:
        run.until(r"Train: \[1/500\]\[1/4\]")
        pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
        if fault == "killed":
            os.kill(pids[1], signal.SIGKILL)
        assert all_end(pids, seconds=DIST_TIMEOUT + 60)
        status, output = run.finish()
    assert status != 0
    if fault == "disk":
        assert re.search(r"error on process 1 of 2: /a/disk: Read-only file system$", output, re.M), output
    with Launched("train.py", args, processes) as run:
        run.until(r"resumed from .*ckpt_epoch_\d+\.pth")

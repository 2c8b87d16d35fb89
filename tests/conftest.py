"""Fixtures that several test files share."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a bare `pytest`, which does not put the folder that it runs in on the path
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # a launcher's, where the tests run under one
    os.environ.pop(name, None)

# What the tests compare is computed on the CPU, on machines with GPUs too; test_gpu.py shows them to what it starts.
SHOWN_GPUS = {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES",) if k in os.environ}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Shells start what runs in the background, and `nohup` all, with ignored signals. What the tests start must get them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(
        signal.SIGHUP, lambda *_: None
    )  # the tests go on, and programs that they start begin with the default

# The thread count changes bits, several tests run at a time, and forks of a process with more threads can hang.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from yacs.config import CfgNode  # noqa: E402

from configs import read_config  # noqa: E402
from tasks import keys_of  # noqa: E402

# Tests fork this process and train in the fork. autograd starts its threads with the first backward pass; once
# torch.compile or torch.export has been in use, these include ones that a fork cannot have, and it refuses to train.
torch.ones(1, requires_grad=True).backward()

CLASSES = ("ant", "bee", "cat")
TRAIN_IMAGES_PER_CLASS, VAL_IMAGES_PER_CLASS = 6, 2


@pytest.fixture(scope="session")
def make_config() -> Callable[..., CfgNode]:
    """Build the configuration of a command line; the digits one where no --cfg is given. Notices are swallowed."""

    def make(*arguments: str) -> CfgNode:
        cfg = () if "--cfg" in arguments else ("--cfg", str(ROOT / "configs" / "groupmixformer_digits.yaml"))
        return read_config([*cfg, *map(str, arguments)], keys_of, notify=lambda line: None)

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A data set that a test may change: three classes of 32 x 32 noise, 6 images each to train and 2 to validate."""
    root = tmp_path / "data"
    write_image_folder(root)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set for tests that leave it alone."""
    root = tmp_path_factory.mktemp("images") / "data"
    write_image_folder(root)
    return root


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    """A finished run of two processes that was never stopped."""
    import runs
    from ranks import run_ranks

    output = tmp_path_factory.mktemp("two")
    result = run_ranks("train.py", runs.arguments(data, output, "DATA.BATCH_SIZE", "2"), processes=2)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The last state of a run of one process that was never stopped."""
    import runs
    from ranks import train_in_fork

    output = tmp_path_factory.mktemp("straight")
    status, text = train_in_fork(runs.arguments(data, output))
    assert status == 0, text
    return runs.final_state(output, 2)


def write_image_folder(
    root: Path,
    classes: Sequence[str] = CLASSES,
    train: int = TRAIN_IMAGES_PER_CLASS,
    val: int = VAL_IMAGES_PER_CLASS,
) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")

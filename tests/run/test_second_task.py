"""A second task, another network: what train.py promises holds for it without a change to train.py or utils/."""

import json
import os
import signal
from pathlib import Path

import pytest
import runs
import torch
import torch.nn.functional as F
from ranks import run_ranks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import tasks
import train
from data import TrainingData, build_eval_loader
from utils.checkpoint import load_file
from utils.processes import sum_over_processes
from utils.session import Session, run_script
from utils.task import Task

# ---------------------------------------------------------------------------------------- the task, as a user writes it
KEYS: dict = {}  # no configuration keys of its own


class NoisyDigits(Dataset):
    """The handwritten digits with noise, and without."""

    def __init__(self, train: bool) -> None:
        images = torch.from_numpy(load_digits().images).float() / 16
        self.images = images[:256] if train else images[1700:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"noisy": self.images[index] + 0.1 * torch.randn(8, 8), "clean": self.images[index]}


class Autoencoder(nn.Module):
    """(B, 8, 8) -> (B, 8, 8), and the code (B, 16) between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.decoder = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(images)
        return self.decoder(code).view_as(images), code


def build(session: Session) -> Task:
    config, processes = session.config, session.processes
    share = (processes.rank, processes.world_size)
    network = Autoencoder().to(processes.device)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, code = model(batch["noisy"])
        parts = {"mse": F.mse_loss(images, batch["clean"]), "sparsity": 0.001 * code.mean()}
        return sum(parts.values()), parts

    @torch.no_grad()
    def validate(network: nn.Module) -> dict[str, float]:
        network.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in build_eval_loader(config, NoisyDigits(train=False), *share, pin_memory=False)[0]:
            error = (network(batch["clean"])[0] - batch["clean"]).square()
            sums += torch.tensor([error.sum(), error.numel()])
        total, count = sum_over_processes(sums, processes).tolist()
        return {"rmse": (total / count) ** 0.5}

    return Task(
        config=config,
        network=network,
        data=TrainingData(config, NoisyDigits(train=True), *share, False, session.logger.warning),
        loss=loss,
        validate=validate,
        decides="rmse",
        higher_is_better=False,
        identity={"data_fingerprint": "256 of scikit-learn's digits", "val_fingerprint": "97 others"},
        about="noisy digits",
    )


# ------------------------------------------------------------------------------------------------------------ its tests
CONFIGURATION = """
TASK: autoencoder
DATA: {BATCH_SIZE: 16, NUM_WORKERS: 0}
MODEL: {NAME: autoencoder}
TRAIN: {EPOCHS: 4, WARMUP_EPOCHS: 1, BASE_LR: 0.32, WEIGHT_DECAY: 0.0}
EMA: {DECAY: 0.9}
PRINT_FREQ: 1
SAVE_KEEP: 0
"""


def train_it(tmp_path: Path, tag: str, processes: int, stop_at: int = 0) -> Path:
    """The run folder of this very train.py, which is stopped where `stop_at` says so."""
    configuration = tmp_path / "autoencoder.yaml"
    configuration.write_text(CONFIGURATION)
    args = ["--cfg", str(configuration), "--output", str(tmp_path), "--tag", tag]
    if processes == 2:
        args += ["--batch-size", "8"]
    ended = run_ranks(__file__, args, processes, {"STOP_AT": str(stop_at)})  # this file is the script that is started
    assert ended.codes == [75 if stop_at else 0] * processes, ended.stderr
    return tmp_path / "autoencoder" / tag


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_task_trains_stops_and_continues_with_the_same_bits(tmp_path, processes):
    folder = train_it(tmp_path, "straight", processes)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["train_loss"] == pytest.approx(lines[-1]["train_mse"] + lines[-1]["train_sparsity"], rel=1e-6)
    numbers = [line[name] for line in lines for name in ("rmse_raw", "rmse_ema")]
    best = load_file(folder / "ckpt_best.pth")
    assert best["max_accuracy"] == min(numbers) < 0.8 * max(numbers)
    assert lines[best["epoch"]][f"rmse_{best['best_weights']}"] == min(numbers)
    assert "model_ema" in best

    stopped = train_it(tmp_path, "stopped", processes, stop_at=21)
    assert (stopped / "ckpt_epoch_1_update_5.pth").exists()
    train_it(tmp_path, "stopped", processes)
    assert runs.digest(stopped / "ckpt_epoch_3.pth") == runs.digest(folder / "ckpt_epoch_3.pth")
    assert (stopped / "metrics.jsonl").read_text().count("\n") == 4


def stopped_in_update(build_task, stop_at: int):
    """The same task; its last process signals itself in the forward pass of an update, counted from 1."""

    def build_and_count(session: Session) -> Task:
        task, calls = build_task(session), iter(range(1, 10**6))

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            if next(calls) == stop_at and session.processes.rank == session.processes.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return task.loss(model, batch)

        return Task(**{**vars(task), "loss": loss})

    return build_and_count


if __name__ == "__main__":
    tasks.TASKS["autoencoder"] = __name__
    build = stopped_in_update(build, int(os.environ["STOP_AT"]))
    run_script(train.main)

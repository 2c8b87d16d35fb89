"""Experiment trackers, Weights & Biases and MLflow: they get the numbers that TensorBoard gets."""

import threading
from collections.abc import Callable
from importlib import import_module
from logging import Logger
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, NamedTuple

from yacs.config import CfgNode

from configs.errors import one_line
from configs.load import flatten, to_dict

CLOSE_SECONDS = 60  # how long the end of a run waits for a tracker that has not sent all yet


class _Run(NamedTuple):
    """A run as the tracker knows it."""

    id: str
    log: Callable[[dict[str, float], int], Any]  # values by name, update
    finish: Callable[[], Any]


class Tracker:
    """One tracker, for the main process. Its failure is one warning: training goes on without it.

    A thread of its own makes all calls, so that a server that does not answer holds no update up. The tracker's name
    for the run is kept in the run folder, and a run that continues goes on under it.

    Args:
        key: 'LOG_WANDB' or 'LOG_MLFLOW', which names the project.
        config: the run's configuration; the tracker gets all of it.
        folder: the run folder.
        continued: the run has updates from before.
        logger: for the warning.
    """

    def __init__(self, key: str, config: CfgNode, folder: Path, continued: bool, logger: Logger) -> None:
        self.key, self.logger, self.failed = key, logger, False
        self._run: _Run | None = None
        self._id_file = folder / f"{key.lower()}_run.txt"
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        name, begin = _BEGIN[key]
        # Here, not in the thread: a loader worker that is forked within an import could wait for it without end.
        library = self._attempt(lambda: import_module(name))
        self._thread = threading.Thread(target=self._work, name=key, daemon=True)
        self._thread.start()
        self._calls.put(lambda: self._begin(begin, library, config, folder, continued))

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._calls.put(lambda: self._run.log(values, step))

    def close(self) -> None:
        self._calls.put(lambda: self._run.finish())
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"nothing is sent for {CLOSE_SECONDS} s")

    def _begin(self, begin: Callable[..., _Run], library: ModuleType, *args: Any) -> None:
        config, folder, continued = args
        known = self._id_file.read_text().strip() if continued and self._id_file.exists() else None
        self._run = begin(library, config, folder, known)
        self._id_file.write_text(f"{self._run.id}\n")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._attempt(call)

    def _attempt(self, call: Callable[[], Any]) -> Any:
        if self.failed:
            return None
        try:
            return call()
        except (Exception, SystemExit) as error:  # a library may want to end the program
            self._fail(one_line(error)[:200])

    def _fail(self, why: str) -> None:
        self.failed = True
        self.logger.warning(f"{self.key}: {why}; the run goes on without it")


def _begin_wandb(wandb: ModuleType, config: CfgNode, folder: Path, known: str | None) -> _Run:
    run = wandb.init(
        project=config.LOG_WANDB,
        name=f"{config.MODEL.NAME}/{config.TAG}",
        config=to_dict(config),
        dir=str(folder),
        id=known,
        resume="allow",
        allow_val_change=True,  # what may change when a run continues
        settings=wandb.Settings(console="off"),  # the log is in the run folder
    )
    return _Run(run.id, lambda values, step: run.log(values, step=step), run.finish)


def _begin_mlflow(mlflow: ModuleType, config: CfgNode, folder: Path, known: str | None) -> _Run:
    client = mlflow.MlflowClient()
    if known is None:
        experiment = client.get_experiment_by_name(config.LOG_MLFLOW)
        number = experiment.experiment_id if experiment else client.create_experiment(config.LOG_MLFLOW)
        known = client.create_run(number, run_name=f"{config.MODEL.NAME}/{config.TAG}").info.run_id
        for name, value in flatten(config):
            client.log_param(known, name, value)
    else:
        client.update_run(known, status="RUNNING")
    log = mlflow.log_metrics
    return _Run(known, lambda v, step: log(v, step=step, run_id=known), lambda: client.set_terminated(known))


_BEGIN = {"LOG_WANDB": ("wandb", _begin_wandb), "LOG_MLFLOW": ("mlflow", _begin_mlflow)}


def open_trackers(config: CfgNode, folder: Path, continued: bool, logger: Logger) -> list[Tracker]:
    """The trackers that the configuration names, for the main process."""
    names = {"LOG_WANDB": config.LOG_WANDB, "LOG_MLFLOW": config.LOG_MLFLOW}
    return [Tracker(key, config, folder, continued, logger) for key, project in names.items() if project]

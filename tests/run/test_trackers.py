"""LOG_WANDB and LOG_MLFLOW, with stand-ins for the libraries: what they are told, and that no failure ends a run."""

import logging
import sys
import threading
from types import SimpleNamespace

import pytest
import runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import trackers
from utils.run_log import open_board

TRACKERS = ("LOG_WANDB", "here", "LOG_MLFLOW", "there")


class Wandb:
    """The part of the library that is used."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self.begun.append(options)
        return SimpleNamespace(id=options["id"] or f"run{len(self.begun)}", log=self.log, finish=self.finish)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


class Mlflow:
    def __init__(self):
        self.names, self.params, self.logged, self.states = {}, {}, [], []

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=self.names[name]) if name in self.names else None

    def create_experiment(self, name):
        return self.names.setdefault(name, "7")

    def create_run(self, number, run_name):
        self.states.append((number, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def log_param(self, run, name, value):
        self.params[name] = value

    def update_run(self, run, status):
        self.states.append((run, status))

    def log_metrics(self, values, step, run_id):
        self.logged.append((step, values))

    def set_terminated(self, run):
        self.states.append((run, "end"))


@pytest.fixture
def libraries(monkeypatch):
    found = Wandb(), Mlflow()
    for name, library in zip(("wandb", "mlflow"), found):
        monkeypatch.setitem(sys.modules, name, library)
    return found


def warnings_of(output):
    lines = (runs.run_folder(output) / "log_rank0.txt").read_text().splitlines()
    return [line.split("WARNING ")[1] for line in lines if "WARNING LOG_" in line]


def test_they_get_what_tensorboard_gets_and_a_run_that_continues_goes_on(data, tmp_path, monkeypatch, libraries):
    wandb, mlflow = libraries
    args = runs.arguments(data, tmp_path, *TRACKERS)
    assert runs.train_here(monkeypatch, args, stop_at=3) == 75
    assert runs.train_here(monkeypatch, args) == 0
    first, second = wandb.begun
    assert (first["project"], first["name"], first["id"], second["id"]) == ("here", "tiny/run", None, "run1")
    assert first["config"]["TRAIN"]["EPOCHS"] == 2 and wandb.finished == 2
    assert mlflow.states == [("7", "tiny/run"), ("abc", "end"), ("abc", "RUNNING"), ("abc", "end")]
    assert mlflow.names == {"there": "7"} and mlflow.params["TRAIN.EPOCHS"] == 2
    assert wandb.logged == mlflow.logged
    told = {(name, step): value for step, values in wandb.logged for name, value in values.items()}
    events = EventAccumulator(str(runs.run_folder(tmp_path)))
    events.Reload()
    shown = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    assert told.keys() == shown.keys() and ("val/acc1_ema", 8) in told
    assert all(told[key] == pytest.approx(shown[key], rel=1e-6) for key in told)
    assert warnings_of(tmp_path) == []
    anew = runs.arguments(data, tmp_path, *TRACKERS, "TRAIN.AUTO_RESUME", "False")
    assert runs.train_here(monkeypatch, anew, stop_at=1) == 75
    assert wandb.begun[2]["id"] is None and len(mlflow.states) == 6, "a new run in the same folder is another one"


def test_a_failure_is_one_warning_and_changes_no_bit(data, tmp_path, monkeypatch, libraries):
    """A package that is not there, and a server that fails from the second number on."""
    wandb, _ = libraries
    monkeypatch.setitem(sys.modules, "mlflow", None)

    def fail(values, step):
        raise ConnectionError("no\nroute")

    wandb.log = fail
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path / "plain")) == 0
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path / "failing", *TRACKERS)) == 0
    ending = "; the run goes on without it"
    one, two = sorted(warnings_of(tmp_path / "failing"))
    assert one.startswith("LOG_MLFLOW: ") and "mlflow" in one and one.endswith(ending)
    assert two == f"LOG_WANDB: no route{ending}"
    assert runs.final_state(tmp_path / "plain", 2) == runs.final_state(tmp_path / "failing", 2)


def test_a_library_that_ends_the_program_ends_nothing(make_config, tmp_path, monkeypatch, libraries, caplog):
    """In the thread it would end the thread, and nothing would say that no number arrives."""
    libraries[0].init = lambda **options: sys.exit("no key")
    monkeypatch.setattr(trackers, "import_module", lambda name: libraries[0] if name == "wandb" else sys.exit(3))
    for tracker in trackers.open_trackers(make_config("--opts", *TRACKERS), tmp_path, False, logging.getLogger("t")):
        tracker.scalars({"loss": 1.0}, 0)
        tracker.close()
    ending = "; the run goes on without it"
    assert sorted(caplog.messages) == [f"LOG_MLFLOW: 3{ending}", f"LOG_WANDB: no key{ending}"]


def test_a_server_that_does_not_answer_holds_nothing_up(make_config, tmp_path, monkeypatch, libraries, caplog):
    answer = threading.Event()
    libraries[0].log = lambda values, step: answer.wait()
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    logger = logging.getLogger("test_trackers")
    (tracker,) = trackers.open_trackers(make_config("--opts", *TRACKERS[:2]), tmp_path, False, logger)
    for step in range(3):
        tracker.scalars({"loss": 1.0}, step)
    tracker.close()
    assert caplog.messages == ["LOG_WANDB: nothing is sent for 0.05 s; the run goes on without it"]
    answer.set()


def test_other_processes_and_runs_without_the_keys_import_nothing(make_config, tmp_path, libraries, monkeypatch):
    monkeypatch.setattr(trackers, "import_module", lambda name: pytest.fail(name))
    logger = logging.getLogger("test_trackers")
    for is_main, opts in ((False, TRACKERS), (True, ("TAG", "x"))):
        processes = SimpleNamespace(is_main=is_main)
        board = open_board(make_config("--opts", *opts), tmp_path, processes, 0, logger)
        assert not board.trackers
        board.close()

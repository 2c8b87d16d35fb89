"""docs/clusters.md: what it says is what the launchers do."""

import re
import socket
import sys

import pytest
import runs

import multi_machine_start as launcher
from tasks import evaluate, keys_of
from utils.session import start_session

PAGE = (runs.ROOT / "docs" / "clusters.md").read_text()
HELP = {name: (runs.ROOT / name).read_text() for name in ("multi_machine_start.py", "launch_scripts/slurm_train.sh")}


def words(text):
    return " ".join(re.sub(r"^#", "", text, flags=re.MULTILINE).split())


def test_training_and_evaluation_connect_to_nothing(data, tmp_path, monkeypatch):
    """Nodes need no internet. (Loader workers talk over sockets of this machine, which have no address.)"""

    def refuse(self, address, *rest):
        assert self.family == socket.AF_UNIX, f"connects to {address}"

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail(f"asks for {args}"))
    args = runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert runs.train_here(monkeypatch, args) == 0
    weights = str(runs.run_folder(tmp_path) / "ckpt_best.pth")
    monkeypatch.setattr(sys, "argv", ["test.py", *args, "MODEL.RESUME", weights])
    evaluate(start_session("", keys_of))


def test_only_these_scripts_install():
    scripts = (runs.ROOT / "launch_scripts").glob("*.sh")
    callers = {path.name for path in scripts if re.search(r"^\s*setup_env\b", path.read_text(), re.MULTILINE)}
    assert callers - {"setup_env.sh"} == {"quickstart.sh", "run_tests.sh"}
    assert all(f"`{name}`" in PAGE for name in ("quickstart.sh", "run_tests.sh"))


def test_one_statement_on_shared_disks():
    """The page and both programs say the same."""
    first = "writes the checkpoints, and reads them when the run continues."
    for text in (PAGE, *HELP.values()):
        assert first in words(text)
        assert "SLURM may give a requeued job another first node" in words(text)
        assert "that all nodes share" in words(text)
    same_machine = "Nodes need no shared disk as long as node 0 stays the same machine."
    assert same_machine in words(PAGE) and same_machine in words(HELP["multi_machine_start.py"])


@pytest.mark.parametrize("text", [PAGE, HELP["multi_machine_start.py"]], ids=["page", "help"])
def test_variables_are_those_that_are_read(text):
    for flag, names in (
        ("--node_rank", launcher.NODE_RANK_VARIABLES),
        ("--ip", launcher.ADDRESS_VARIABLES),
        ("--main_port", launcher.PORT_VARIABLES),
    ):
        assert any(f"{flag} {', '.join(names)}" in line for line in map(words, re.sub("[|`]", "", text).splitlines()))

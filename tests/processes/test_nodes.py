"""Two nodes without a shared disk, made of two network namespaces and a cable between them: faults and repairs."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import runs
from conftest import write_image_folder

from utils.checkpoint import checkpoints_of

pytestmark = pytest.mark.nodes
LAUNCHER = "multi_machine_start.py"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500
TIMEOUT_SECONDS = 180
# How long processes wait for each other. Nothing that ends by it may take more than a few times as long.
DIST_TIMEOUT = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("nodes") / "data"
    write_image_folder(root)
    return root


# ----------------------------------------------------------------------------------------------------- nodes and cables
def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


class Nodes:
    """Two network namespaces with a veth pair between them."""

    def __init__(self):
        self.names = [f"gmf{os.getpid()}-{rank}" for rank in (0, 1)]
        self.devices = [f"gmf{os.getpid()}{end}" for end in "ab"]

    def set_up(self):
        """Returns what is not permitted, or an empty string."""
        peers = [("peer", "name", self.devices[1], "netns", self.names[1])]
        steps = [("netns", "add", name) for name in self.names]
        steps += [("link", "add", self.devices[0], "netns", self.names[0], "type", "veth", *peers[0])]
        for name, device, address in zip(self.names, self.devices, ADDRESSES):
            steps += [("-n", name, "link", "set", "lo", "up"), ("-n", name, "link", "set", device, "up")]
            steps += [("-n", name, "addr", "add", f"{address}/24", "dev", device)]
        for step in steps:
            try:
                result = ip(*step)
            except FileNotFoundError:
                return "there is no ip command"
            if result.returncode != 0:
                return f"ip {' '.join(step)}: {result.stderr.strip()}"
        return ""

    def tear_down(self):
        for rank, name in enumerate(self.names):
            self.kill_all(rank)
            ip("netns", "del", name)

    def processes(self, rank):
        return [int(pid) for pid in ip("netns", "pids", self.names[rank]).stdout.split()]

    def kill_all(self, rank):
        """As when its power fails, but for the cable."""
        while pids := self.processes(rank):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)  # until the kernel has ended them

    def link(self, state):
        assert ip("-n", self.names[0], "link", "set", self.devices[0], state).returncode == 0


@pytest.fixture
def nodes():
    nodes = Nodes()
    try:
        if problem := nodes.set_up():
            pytest.skip(f"this machine does not let the tests make network namespaces: {problem}")
        yield nodes
    finally:
        nodes.tear_down()


class Started:
    """multi_machine_start.py on one of the nodes; its output goes to a file. At the end all of its node is killed."""

    def __init__(self, nodes, rank, data, output, *opts, flags=(), address=ADDRESSES[0], env=None):
        self.nodes, self.rank, self.output = nodes, rank, output
        output.mkdir(exist_ok=True)
        number = len(list(output.glob("console*")))
        self.console = output / f"console{number}.txt"
        command = ["ip", "netns", "exec", nodes.names[rank], sys.executable, LAUNCHER, "--machine_num", "2"]
        command += ["--node_rank", str(rank), "--ip", address, "--main_port", str(PORT), "--np", "1", *flags]
        command += ["--config", "configs/groupmixformer_digits.yaml", "--data_path", str(data)]
        command += ["--output", str(output), "--tag", "run", "--", "--opts", *runs.TINY, "DATA.BATCH_SIZE", "2"]
        command += ["DIST_TIMEOUT_SECONDS", str(DIST_TIMEOUT), *opts]
        env = runs.environment() | (env or {})
        self.started = time.monotonic()
        with self.console.open("w") as console:
            self.process = subprocess.Popen(
                command, cwd=runs.ROOT, env=env, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.nodes.kill_all(self.rank)
        self.process.wait()

    @property
    def text(self):
        return self.console.read_text()

    def until(self, pattern):
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (match := re.search(pattern, self.text)):
            assert self.process.poll() is None, f"node {self.rank}: no line matches {pattern!r} in:\n{self.text}"
            assert time.monotonic() < deadline, f"node {self.rank}: waiting for {pattern!r} in:\n{self.text}"
            time.sleep(0.02)
        return match

    def finish(self, seconds=TIMEOUT_SECONDS):
        """The exit status; fails where it takes longer, or a process of the node stays behind."""
        try:
            status = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {self.rank} has not ended after {seconds} s:\n{self.text}") from None
        deadline = time.monotonic() + 30
        while left := self.nodes.processes(self.rank):
            assert time.monotonic() < deadline, f"node {self.rank}: left behind: {left}"
            time.sleep(0.02)
        return status

    def causes(self):
        """The lines that say why the run ended."""
        return re.findall(r"^(?:train\.py: error|multi_machine_start\.py: node \d: ).*$", self.text, re.M)


# ---------------------------------------------------------------------------------------------------------------- tests
def final_digest(output, epochs):
    return runs.digest(runs.run_folder(output) / f"ckpt_epoch_{epochs - 1}.pth")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Digest of a run of two processes on one node that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed")
    result = runs.launch("train.py", runs.arguments(data, output, "DATA.BATCH_SIZE", "2", *EPOCHS), processes=2)
    assert result.returncode == 0, result.stderr
    return final_digest(output, 3)


EPOCHS = ("TRAIN.EPOCHS", "3", "SAVE_EVERY_UPDATES", "1")
RETRY = ("--retries", "3", "--retry_wait", "1")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_node_is_replaced_and_the_run_continues(nodes, data, tmp_path, undisturbed, killed):
    """The other node's launcher starts torchrun again; the replacement is started as the first one was.

    Node 0 keeps its disk, which has the checkpoints; node 1 comes back with an empty one. The run ends with the bits of
    two processes of one node: two nodes train alike, and the fault leaves no trace.
    """
    outputs = [tmp_path / "node0", tmp_path / "node1"]
    kept = 1 - killed
    with Started(nodes, kept, data, outputs[kept], *EPOCHS, flags=RETRY) as survivor:
        with Started(nodes, killed, data, outputs[killed], *EPOCHS, flags=RETRY) as first:
            (survivor if kept == 0 else first).until(r"Train: \[2/3\]\[1/4\]")
            nodes.kill_all(killed)
        survivor.until(r"torchrun ended with code \d+: train\.py: .*; starting it again in 1 s, retries left: 3")
        replacement_output = outputs[0] if killed == 0 else tmp_path / "replacement"
        with Started(nodes, killed, data, replacement_output, *EPOCHS, flags=RETRY) as replacement:
            assert (survivor.finish(), replacement.finish()) == (0, 0), survivor.text + replacement.text
    log = (runs.run_folder(outputs[0]) / "log_rank0.txt").read_text()
    assert re.search(r"resumed from \S+/ckpt_epoch_\d+(_update_\d+)?\.pth", log)
    assert final_digest(outputs[0], 3) == undisturbed
    assert not checkpoints_of(runs.run_folder(outputs[1])), "only the main process saves"
    assert (runs.run_folder(outputs[1]) / "log_rank1.txt").is_file()


def test_a_cut_link_ends_both_nodes(nodes, data, tmp_path):
    outputs = [tmp_path / "node0", tmp_path / "node1"]
    with (
        Started(nodes, 0, data, outputs[0], *EPOCHS) as first,
        Started(nodes, 1, data, outputs[1], *EPOCHS) as second,
    ):
        first.until(r"Train: \[2/3\]\[1/4\]")
        nodes.link("down")
        for node in (first, second):
            assert node.finish(seconds=6 * DIST_TIMEOUT) != 0
            causes = [line for line in node.causes() if line.startswith("train.py: error on process")]
            assert len(causes) == 1, node.text
            assert re.search(r"was lost or too slow|the node of process 0 cannot be reached", causes[0])


@pytest.mark.parametrize(("rank", "address"), [(0, ADDRESSES[0]), (1, "10.77.0.99")], ids=["alone", "wrong-address"])
def test_nodes_that_do_not_meet(nodes, data, tmp_path, rank, address):
    """Node 0 waits for a node that never comes; node 1 has an address that nobody has. The last line names it."""
    flags = ("--rendezvous_timeout", str(DIST_TIMEOUT))
    with Started(nodes, rank, data, tmp_path / "node", flags=flags, address=address) as node:
        assert node.finish(seconds=6 * DIST_TIMEOUT) != 0
        last = node.text.splitlines()[-1]
    assert f"the 2 nodes have not met within 10 s at {address}:29500" in last, node.text


def test_nodes_that_meet_but_do_not_reach_each_other(nodes, data, tmp_path):
    """gloo gives out an address that is of no use to the others, as it does by itself where host names are loopback."""
    env = {"GLOO_SOCKET_IFNAME": "lo"}
    with (
        Started(nodes, 0, data, tmp_path / "node0", env=env) as first,
        Started(nodes, 1, data, tmp_path / "node1", env=env) as second,
    ):
        for rank, node in enumerate((first, second)):
            assert node.finish(seconds=6 * DIST_TIMEOUT) != 0
            cause = rf"train\.py: error on process {rank} of 2: \S+ has not met the other processes \(MASTER_ADDR "
            cause += r"10\.77\.0\.1, network interface lo\); .* set GLOO_SOCKET_IFNAME"
            assert any(re.match(cause, line) for line in node.causes()), node.text
            assert re.search(cause, node.text.splitlines()[-1]) and 'train.py", line' not in node.text, node.text

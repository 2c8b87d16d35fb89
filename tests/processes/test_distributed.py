"""Several processes: equal training, the same images, agreement on every update."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import runs
import torch
from conftest import write_image_folder
from ranks import FAULT_TRAIN, Ranks, run_ranks
from runs import learning_rates, samples_by_update
from torch.testing import assert_close

from configs import read_config, with_num_classes
from data.datasets import ImageDataset
from tasks import keys_of
from tasks.classification.images import open_split
from tasks.classification.transforms import eval_transform
from tasks.networks import build_model
from utils import processes as distributed
from utils.checkpoint import load_file


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_exact_on_any_number_of_processes(tmp_path, processes):
    """22 images of 11 classes, in batches of 4: shares of 11, or of 8, 7 and 7."""
    data, weights = tmp_path / "data", tmp_path / "weights.pth"
    write_image_folder(data, classes="abcdefghijk", train=1, val=2)
    args = runs.arguments(data, tmp_path, flags=["--resume", str(weights)])
    config = with_num_classes(read_config(args, keys_of), 11)
    torch.manual_seed(0)
    network = build_model(config)
    torch.nn.init.normal_(network.head.weight)  # fresh heads rank all classes nearly alike
    torch.save({"model": network.state_dict()}, weights)

    images = ImageDataset(open_split(config, "val", 0, 1), eval_transform(config))
    labels = torch.tensor([images[i][1] for i in range(22)])
    with torch.no_grad():
        ranking = network.eval()(torch.stack([images[i][0] for i in range(22)])).topk(5).indices
    hits = [(ranking[:, :k] == labels[:, None]).sum().item() for k in (1, 5)]
    assert 0 < hits[0] < hits[1] < 22

    result = run_ranks("test.py", args, processes)
    assert result.returncode == 0, result.stderr
    expected = f" * Acc@1 {100 * hits[0] / 22:.3f} Acc@5 {100 * hits[1] / 22:.3f}"
    assert result.stdout.splitlines()[-1] == expected
    for rank in range(processes):
        assert (runs.run_folder(tmp_path) / f"log_eval_rank{rank}.txt").read_text().endswith(expected + "\n")


def test_two_processes_train_as_one_does(data, tmp_path):
    """Same global batch, batch norms frozen and nothing random: only the order of summation differs."""
    weights = {}
    for processes, batch in ((1, "4"), (2, "2")):
        output = tmp_path / str(processes)
        args = runs.arguments(data, output, "DATA.BATCH_SIZE", batch, *runs.PLAIN)
        result = run_ranks(FAULT_TRAIN, args, processes, env={"FAULT": "frozen-norms"})
        assert result.returncode == 0, result.stderr
        weights[processes] = load_file(runs.run_folder(output) / "ckpt_epoch_1.pth")
    for part in ("model", "model_ema"):
        for name, value in weights[1][part].items():
            assert_close(weights[2][part][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert samples_by_update(tmp_path / "1", 1) == samples_by_update(tmp_path / "2", 2)


@pytest.mark.compile
@pytest.mark.parametrize("opts", [(), ("TRAIN.USE_CHECKPOINT", "True")], ids=["", "checkpointing"])
def test_two_compiled_processes_train_as_two_plain_ones(data, tmp_path, two_processes, opts):
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", *opts, flags=["--compile"])
    result = runs.launch("train.py", args, processes=2, timeout=600)  # most of it is compiling
    assert result.returncode == 0, result.stderr
    losses = [
        [float(loss) for loss in re.findall(r"^.*Train: .*\sloss ([\d.]+)", log.read_text(), re.MULTILINE)]
        for log in (runs.run_folder(output) / "log_rank0.txt" for output in (tmp_path, two_processes))
    ]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize(
    ("flags", "graphs"),
    [
        ([], 0),
        (["--use-checkpoint"], 0),
        # One of each branch, which no batch norm cuts, and one more with frozen statistics.
        pytest.param(["--compile", "--use-checkpoint"], 3, marks=pytest.mark.compile),
    ],
)
def test_traceable_batch_norms_are_those_of_the_whole_batch(flags, graphs):
    check = str(runs.ROOT / "tests" / "sync_batchnorm_check.py")
    result = runs.launch(check, flags, 2, timeout=600) if graphs else run_ranks(check, flags, 2)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert max(found["errors"]) < 1e-13
    assert (found["breaks"], found["graphs"]) == (0, graphs)


@pytest.mark.long
def test_three_processes_continue_with_the_same_bits(data, tmp_path):
    """DDP reorders its buckets after the first update of each start, which two processes cannot show: a + b = b + a."""
    opts = ("DATA.BATCH_SIZE", "2", "TRAIN.EPOCHS", "2")
    straight, stopped = (runs.arguments(data, tmp_path / name, *opts) for name in ("straight", "stopped"))
    assert run_ranks("train.py", straight, processes=3).returncode == 0
    run_ranks(FAULT_TRAIN, stopped, processes=3, env={"FAULT": "stop:1:3"})
    assert run_ranks("train.py", stopped, processes=3).returncode == 0
    digests = [runs.digest(runs.run_folder(tmp_path / n) / "ckpt_epoch_1.pth") for n in ("straight", "stopped")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_sees_the_same_images(data, tmp_path, two_processes, before, after):
    def args(processes):
        return runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", str(4 // processes))

    stopped = run_ranks(FAULT_TRAIN, args(before), processes=before, env={"FAULT": "stop:0:2"})
    assert "stopped by request at update 3" in stopped.stdout
    result = run_ranks("train.py", args(after), processes=after)
    assert result.returncode == 0, result.stderr
    assert f"continuing on {after} processes instead of {before}" in result.stdout
    assert samples_by_update(tmp_path, 2) == samples_by_update(two_processes, 2)
    assert learning_rates(tmp_path) == learning_rates(two_processes)


def test_all_processes_fall_back_to_the_same_checkpoint(data, tmp_path, two_processes):
    shutil.copytree(runs.run_folder(two_processes), runs.run_folder(tmp_path))
    newest, older = (runs.run_folder(tmp_path) / f"ckpt_epoch_{epoch}.pth" for epoch in (1, 0))
    newest.unlink()  # it may be one file with the best
    newest.write_bytes(older.read_bytes()[:-100])
    result = run_ranks("train.py", runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2"), processes=2)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"{newest}: damaged .*; trying the one before", result.stdout)
    for rank in (0, 1):
        log = (runs.run_folder(tmp_path) / f"log_rank{rank}.txt").read_text()
        assert re.findall(r"resumed from (\S+): epoch 1, update 0", log) == [str(older)]
    assert runs.digest(newest) == runs.digest(runs.run_folder(two_processes) / newest.name)


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}, "ib0"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "loopback"}, "eth0"),  # node 0's name, on node 0
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "node0"}, "ib0"),  # a launcher that does not say how many are on a node
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, None),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}, None),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "GLOO_SOCKET_IFNAME": "own"}, "own"),
    ],
)
def test_network_interface_of_several_nodes(monkeypatch, variables, chosen):
    leads_to = {"node0": "ib0", "loopback": "lo", "127.0.0.1": "lo", "192.0.2.1": "eth0"}
    monkeypatch.setattr(distributed, "interface_towards", leads_to.__getitem__)
    monkeypatch.setattr(os, "environ", dict(variables))
    distributed.choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_the_interface_that_leads_to_a_host():
    assert distributed.interface_towards("127.0.0.1") == "lo"
    assert distributed.interface_towards("no-such-host.invalid") == ""


@pytest.mark.parametrize(("what", "named"), [("nan:0", "0"), ("infinite:1", "1"), ("nan-gradient:1", "0, 1")])
def test_one_process_with_a_nan_makes_all_skip_that_update(data, tmp_path, what, named):
    """Gradients are averaged before anybody looks at them: with a finite loss, all have the NaN and are named."""
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2", "SAVE_EVERY_UPDATES", "1", "SAVE_KEEP", "0")
    result = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"{what}:2"})
    assert result.returncode == 0, result.stderr
    logs = [(runs.run_folder(tmp_path) / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    for log in logs:
        assert len(re.findall(f"update 2 skipped: loss or gradients not finite on process {named}, learning", log)) == 1
    for rank, log in enumerate(logs):
        assert bool(re.search(rf"process {rank}, image indices: \[\d+, \d+\]", log)) == (str(rank) in named)
    state = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_1.pth")
    values = [*state["model"].values(), *state["model_ema"].values()]
    assert all(torch.isfinite(v).all() for v in values if v.is_floating_point())
    assert state["num_updates"] == 8 and state["optimizer"]["state"][0]["step"] == 7


@pytest.mark.parametrize(("update", "left"), [(2, []), pytest.param(7, ["ckpt_epoch_0.pth"], marks=pytest.mark.long)])
def test_processes_that_disagree_on_the_gradients_end(data, tmp_path, update, left):
    """Else one would skip or clip where the other does not, and their weights would drift apart unseen.

    Within an epoch, and in the last update of a run.
    """
    args = runs.arguments(data, tmp_path, "DATA.BATCH_SIZE", "2")
    result = run_ranks(FAULT_TRAIN, args, processes=2, env={"FAULT": f"other-norm:1:{update}"})
    assert result.returncode != 0
    found = re.search(r"different norms .* order of their ranks ([\d.]+), ([\d.]+): their weights", result.stderr)
    assert float(found[2]) == pytest.approx(2 * float(found[1]), rel=1e-4)
    folder = runs.run_folder(tmp_path)
    assert [path.name for path in sorted(folder.glob("ckpt_epoch_*.pth"))] == left


def test_too_many_nans_in_a_row_end_the_run_with_the_last_checkpoint_good(data, tmp_path):
    args = runs.arguments(data, tmp_path, "TRAIN.MAX_NONFINITE_UPDATES", "1")
    result = run_ranks(FAULT_TRAIN, args, env={"FAULT": "nan:0:5+"})
    assert result.returncode == 2
    assert re.fullmatch(r"fault_train.py: error: update 6 skipped: .* 2 in a row.*", result.stderr.splitlines()[-1])
    state = load_file(runs.run_folder(tmp_path) / "ckpt_epoch_0.pth")
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    args = runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "500")
    with Ranks("train.py", args) as run:
        run.until(r"Train: \[0/500\]\[1/4\]")
        second = run_ranks("train.py", args)
        assert second.returncode == 2
        who = f"process {run.pids[0]} on {socket.gethostname()}"  # the second has not written to the log
        assert f"is being written by {who}; give this run another --tag" in second.stderr
        run.kill()
        run.finish()
    with Ranks("train.py", args) as run:
        run.until(r"Train: \[\d+/500\]\[\d/4\]")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["torch.distributed.launch", "torch.distributed.run"])
def test_the_released_commands(data, tmp_path, launcher):
    """As the released README has them, but for paths, the number of processes and a smaller network."""
    use_env = ["--use_env"] if launcher.endswith("launch") else []
    head = [sys.executable, "-m", launcher, "--nproc_per_node", "2", "--nnodes", "1", *use_env]
    released = ["--data-path", str(data), "--batch-size", "2", "--output", str(tmp_path), "--cfg"]
    released += ["./configs/groupmixformer_small.yaml", "--model-type", "groupmixformer", "--model-file"]
    released += ["groupmixformer.py", "--tag", "groupmixformer_small"]
    smaller = [
        "--opts",
        *runs.TINY,
        "MODEL.NAME",
        "groupmixformer_small",
        "TRAIN.EPOCHS",
        "1",
        "TRAIN.WARMUP_EPOCHS",
        "0",
    ]
    env = runs.environment()
    train_command = [*head, "--master_port", free_port(), "train.py", *released, *smaller]
    trained = subprocess.run(train_command, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "groupmixformer_small" / "groupmixformer_small"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "curves.png", "log_rank0.txt", "log_rank1.txt", "ckpt_epoch_0.pth", "ckpt_best.pth"} <= names
    assert "groupmixformer.py" in names and any(name.startswith("events.out.tfevents") for name in names)
    weights = ["--resume", str(folder / "ckpt_best.pth")]
    test_command = [*head, "--master_port", free_port(), "test.py", *released, *weights, *smaller]
    tested = subprocess.run(test_command, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert tested.returncode == 0, tested.stderr
    assert re.fullmatch(r" \* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}", tested.stdout.splitlines()[-1])

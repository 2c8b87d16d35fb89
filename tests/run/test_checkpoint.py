"""Checkpoints: what is written is what is read, or nothing; released files load; no file runs code."""

import argparse
import errno
import os
import pickle
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError
from utils import checkpoint
from utils.checkpoint import (
    BEST_NAME,
    checkpoint_path,
    checkpoints_of,
    keep_as_best,
    load_exactly,
    load_file,
    prune_checkpoints,
    save_checkpoint,
    select_weights,
)


@pytest.fixture
def state() -> dict[str, Any]:
    """A small training checkpoint with everything in it that a real one has."""
    torch.manual_seed(1)
    weights = {"head.weight": torch.randn(7, 10), "head.bias": torch.randn(7), "batches": torch.tensor(12)}
    return {
        "model": weights,
        "model_ema": {name: value * 2 for name, value in weights.items()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(7, 10)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": None, "params": [0]}],
        },
        "scaler": {},
        "epoch": 9,
        "max_accuracy": 81.25,
        "best_weights": "ema",
        "config": "DATA:\n  BATCH_SIZE: 64\n",
    }


def equal(a: Any, b: Any) -> bool:
    """Same types, same structure, same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- whole or absent
def test_round_trip(tmp_path, state):
    save_checkpoint(state, tmp_path / "c.pth")
    assert equal(load_file(tmp_path / "c.pth"), state)
    assert names_in(tmp_path) == ["c.pth"]
    save_checkpoint({**state, "epoch": 10}, tmp_path / "c.pth")
    assert load_file(str(tmp_path / "c.pth"))["epoch"] == 10, "and over an older one"


def is_refused(path: Path, content: bytes, state: dict[str, Any]) -> bool:
    """Whether a file of this content is refused, in one line that names it; else it must load as what was saved."""
    path.write_bytes(content)
    try:
        loaded = load_file(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return True
    assert equal(loaded, state), "the damage went unnoticed"
    return False


def flipped(whole: bytes, bit: int) -> bytes:
    copy = bytearray(whole)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


TRUNCATIONS, FLIPS_A_REGION = 50, 20


def test_every_truncation_is_refused(tmp_path, state):
    """Anywhere, nowhere, and within the last bytes: the zip's own end, where its comment may be of any length."""
    save_checkpoint(state, tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    lengths = [0, *range(len(whole) - 9, len(whole))]
    lengths += random.Random(0).sample(range(1, len(whole) - 9), TRUNCATIONS - len(lengths))
    assert len(set(lengths)) == TRUNCATIONS
    for length in lengths:
        assert is_refused(tmp_path / "c.pth", whole[:length], state), f"cut at {length}"


REGIONS = ("headers", "values", "model", "model_ema", "optimizer", "directory")


def bytes_of_region(path: Path, state: dict[str, Any], region: str) -> list[int]:
    """The positions in a checkpoint that belong to the zip's headers and padding, its directory, the pickled values,
    or to the tensors of a part of the state."""
    whole = path.read_bytes()
    inside: dict[str, list[int]] = {name: [] for name in REGIONS}
    with zipfile.ZipFile(path) as archive:
        inside["directory"] = list(range(archive.start_dir, len(whole)))
        start = next(whole.index(archive.read(r)) for r in archive.infolist() if r.filename.endswith("/data.pkl"))
        size = next(r.file_size for r in archive.infolist() if r.filename.endswith("/data.pkl"))
        inside["values"] = list(range(start, start + size))
    for part in ("model", "model_ema", "optimizer"):
        for tensor in checkpoint._tensors(state[part]):
            content = tensor.numpy().tobytes()
            if len(content) > 8:  # shorter ones may occur elsewhere by chance
                assert whole.count(content) == 1
                start = whole.index(content)
                inside[part] += range(start, start + len(content))
    others = {byte for positions in inside.values() for byte in positions}
    inside["headers"] = [byte for byte in range(len(whole)) if byte not in others]
    return inside[region]


@pytest.mark.parametrize("region", REGIONS)
def test_flipped_bits_are_noticed_or_harmless(tmp_path, state, region):
    """A flipped bit may lie where nothing is stored, in padding or a date; then the same bits are loaded."""
    save_checkpoint(state, tmp_path / "whole.pth")
    whole, rng = (tmp_path / "whole.pth").read_bytes(), random.Random(region)
    positions = rng.sample(bytes_of_region(tmp_path / "whole.pth", state, region), FLIPS_A_REGION)
    refused = [is_refused(tmp_path / "c.pth", flipped(whole, 8 * b + rng.randrange(8)), state) for b in positions]
    if region not in ("headers", "directory"):
        assert all(refused)


def test_a_record_that_calls_itself_a_folder_is_refused(tmp_path, state):
    """An entry of the zip's directory is 46 bytes and a name; 38 bytes into it are the attributes of the record. Bit 4
    declares it a folder: Python's zip reader then skips it, and torch gives uninitialised memory for its content."""
    save_checkpoint(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.pth") as archive:
        entry, records = archive.start_dir, archive.infolist()
    for record in records:
        assert is_refused(tmp_path / "c.pth", flipped(whole, 8 * (entry + 38) + 4), state), record.filename
        entry += 46 + len(record.filename.encode()) + len(record.extra)


def test_every_bit_of_the_weights_is_guarded(tmp_path, state):
    save_checkpoint(state, tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    start = whole.index(state["model"]["head.weight"].numpy().tobytes())
    for byte in range(start, start + state["model"]["head.weight"].nbytes, 7):
        damaged = bytearray(whole)
        damaged[byte] ^= 1
        (tmp_path / "c.pth").write_bytes(damaged)
        assert "damaged" in message_of(load_file, tmp_path / "c.pth")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", pickle.dumps([1]), pickle.dumps({}), bytes(500)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    assert str(tmp_path / "c.pth") in message_of(load_file, tmp_path / "c.pth")


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in message_of(load_file, tmp_path / "c.pth")
    assert str(tmp_path) in message_of(load_file, tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    assert "holds a list" in message_of(load_file, tmp_path / "list.pth")


def fail_at(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Let the disk be full when this step of a save is reached."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        # The kernel's own "no space left", at the first flush.
        monkeypatch.setattr(checkpoint, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    elif step == "torch.save":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(os, step, full)


@pytest.mark.parametrize("size", [10, 1_000_000])
@pytest.mark.parametrize("step", ["write", "torch.save", "fsync", "replace"])
def test_full_disk_leaves_the_older_checkpoint_and_no_partial_file(tmp_path, state, monkeypatch, step, size):
    path = tmp_path / "ckpt_epoch_3.pth"
    save_checkpoint(state, path)
    before = path.read_bytes()
    large = {"model": {"w": torch.zeros(size)}}
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        message = message_of(save_checkpoint, large, path)
    assert str(path) in message and "No space left on device" in message
    assert f"about {4 * size / 2**20:.0f} MiB" in message and "MiB are free" in message
    assert names_in(tmp_path) == ["ckpt_epoch_3.pth"]
    assert path.read_bytes() == before
    save_checkpoint(large, path)
    assert equal(load_file(path), large), "and once there is space, it goes on"


def test_folder_that_vanished_is_named(tmp_path, state):
    path = tmp_path / "gone" / "c.pth"
    assert str(path) in message_of(save_checkpoint, state, path)


def test_save_does_not_follow_into_the_older_file(tmp_path, state):
    """ckpt_best.pth may be a link to the file that is replaced; it must keep what it holds."""
    path = tmp_path / "ckpt_epoch_3.pth"
    save_checkpoint(state, path)
    keep_as_best(path)
    save_checkpoint({**state, "epoch": 99}, path)
    assert load_file(tmp_path / BEST_NAME)["epoch"] == 9


# ------------------------------------------------------------------------------------------------------- names, pruning
def test_checkpoints_are_ordered_by_number(tmp_path):
    for epoch in (10, 9, 2, 100, 0):
        checkpoint_path(tmp_path, epoch).touch()
    for name in ("ckpt_epoch_x.pth", "ckpt_epoch_5.pth.bak", ".ckpt_epoch_7.pth.partial", BEST_NAME, "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"ckpt_epoch_{n}.pth" for n in (0, 2, 9, 10, 100)]


def test_a_whole_epoch_is_newer_than_a_part_of_it(tmp_path):
    for path in (
        checkpoint_path(tmp_path, 2, update=100),
        checkpoint_path(tmp_path, 2, update=20),
        checkpoint_path(tmp_path, 2),
        checkpoint_path(tmp_path, 1),
        checkpoint_path(tmp_path, 3, update=1),
    ):
        path.touch()
    names = ["1", "2_update_20", "2_update_100", "2", "3_update_1"]
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"ckpt_epoch_{name}.pth" for name in names]


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [7, 8, 9, 10, 11]), (1, [11]), (3, [9, 10, 11]), (9, [7, 8, 9, 10, 11])]
)
def test_pruning_keeps_the_newest_by_number(tmp_path, keep, left):
    for epoch in (7, 8, 9, 10, 11):
        checkpoint_path(tmp_path, epoch).touch()
    for name in (BEST_NAME, "log_rank0.txt"):
        (tmp_path / name).touch()
    prune_checkpoints(tmp_path, keep)
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"ckpt_epoch_{epoch}.pth" for epoch in left]
    assert (tmp_path / BEST_NAME).exists() and (tmp_path / "log_rank0.txt").exists()


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_pruning_before_the_first_periodic_checkpoint(tmp_path, keep):
    """With SAVE_FREQ above 1 the best checkpoint may be there before any other."""
    (tmp_path / BEST_NAME).touch()
    prune_checkpoints(tmp_path, keep)
    assert names_in(tmp_path) == [BEST_NAME]


def test_pruning_drops_replaced_parts_of_epochs(tmp_path):
    for epoch, update in ((0, None), (1, 5), (1, 10), (1, None), (2, 5), (2, 10)):
        checkpoint_path(tmp_path, epoch, update).touch()
    prune_checkpoints(tmp_path, keep=3)
    assert names_in(tmp_path) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "ckpt_epoch_2_update_10.pth"]


@pytest.mark.parametrize("links", [True, False])
def test_best_survives_pruning(tmp_path, state, monkeypatch, links):
    """Where the file system has no hard links, the best one is a copy."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    for epoch in range(4):
        path = checkpoint_path(tmp_path, epoch)
        save_checkpoint({**state, "epoch": epoch}, path)
        if epoch in (0, 1):
            keep_as_best(path)
        prune_checkpoints(tmp_path, keep=1)
    assert names_in(tmp_path) == [BEST_NAME, "ckpt_epoch_3.pth"]
    assert load_file(tmp_path / BEST_NAME)["epoch"] == 1


def test_a_copied_best_is_on_disk_before_it_replaces_the_older(tmp_path, state, monkeypatch):
    """A rename may reach the disk before what the file holds: after a power failure it would be empty."""
    save_checkpoint(state, checkpoint_path(tmp_path, 0))
    events, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "link", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    keep_as_best(checkpoint_path(tmp_path, 0))
    assert events == [f".{BEST_NAME}.partial", "replace", tmp_path.name]


def test_best_that_cannot_be_written_is_told_and_the_older_one_kept(tmp_path, state, monkeypatch):
    for epoch in (0, 1):
        save_checkpoint({**state, "epoch": epoch}, checkpoint_path(tmp_path, epoch))
    keep_as_best(checkpoint_path(tmp_path, 0))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(checkpoint.shutil, "copyfile", full)
    assert BEST_NAME in message_of(keep_as_best, checkpoint_path(tmp_path, 1))
    assert names_in(tmp_path) == [BEST_NAME, "ckpt_epoch_0.pth", "ckpt_epoch_1.pth"]
    assert load_file(tmp_path / BEST_NAME)["epoch"] == 0


# --------------------------------------------------------------------------------------------------- what a file holds
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_pickled_configuration_is_read_as_a_mapping(tmp_path, zipped, frozen):
    """As released training checkpoints hold it."""
    config = CfgNode({"DATA": {"BATCH_SIZE": 64, "PATHS": ["a", "b"]}, "BETAS": (0.9, 0.999), "NONE": None})
    if frozen:
        config.freeze()
    path = tmp_path / "w.pth"
    torch.save({"epoch": 299, "config": config}, path, _use_new_zipfile_serialization=zipped)
    loaded = load_file(path)
    assert not isinstance(loaded["config"], CfgNode), "a plain mapping: the class's own code is not run"
    assert dict(loaded["config"]["DATA"]) == {"BATCH_SIZE": 64, "PATHS": ["a", "b"]}
    assert loaded["config"]["BETAS"] == (0.9, 0.999) and loaded["epoch"] == 299


@pytest.mark.parametrize("allowed", [[], checkpoint.PLAIN_TYPES[:1]], ids=["none", "CfgNode"])
def test_reading_leaves_the_types_that_others_allow_as_they_were(tmp_path, allowed):
    """`import models` allows CfgNode for timm, which reads released checkpoints itself."""
    before = torch.serialization.get_safe_globals()
    torch.save({"config": CfgNode({"A": 1}), "args": argparse.Namespace(b=2)}, tmp_path / "w.pth")
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        load_file(tmp_path / "w.pth")
        assert torch.serialization.get_safe_globals() == allowed
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_which_weights_of_a_checkpoint():
    raw, ema = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    both = {"model": raw, "model_ema": ema}
    for which, content, expected in (
        ("raw", both, raw),
        ("ema", both, ema),
        ("best", both, raw),
        ("best", {**both, "best_weights": "ema"}, ema),
        ("best", {**both, "best_weights": "raw"}, raw),
        ("raw", {**both, "best_weights": "ema"}, raw),
        ("best", {"model": raw}, raw),
    ):
        state, said = select_weights(content, which, "f.pth")
        assert equal(state, expected)
        assert said == ("ema weights" if expected is ema else "raw weights")
    ema_only = {"model_ema": ema, "epoch": 3}
    for which in ("best", "ema"):
        state, said = select_weights(ema_only, which, "f.pth")
        assert equal(state, ema) and said == "ema weights"
    assert "holds no raw weights" in message_of(select_weights, ema_only, "raw", "f.pth")
    for which, content in (("ema", {"model": raw}), ("best", {"model": raw, "best_weights": "ema"})):
        message = message_of(select_weights, content, which, "f.pth")
        assert "f.pth" in message and "EMA" in message


@pytest.mark.parametrize(
    "content",
    [{}, {"model": {}}, {"epoch": 3}, {"model": {"w": 1}}, {"state": {0: {}}, "param_groups": []}, {1: torch.zeros(1)},
     {"model": {0: torch.zeros(1)}}],
)  # fmt: skip
def test_files_without_a_state_dict(content):
    message = message_of(select_weights, content, "best", "f.pth")
    assert message.startswith("f.pth: holds no state dict")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight": None}, "says which): 1 missing (weight)"),
        ({"extra": torch.zeros(1)}, "says which): 1 unexpected (extra)"),
        ({"weight": torch.zeros(2, 9)}, "says which): 1 of another shape (weight (2, 9) for (2, 3))"),
    ],
)
def test_each_difference_alone_is_refused(change, expected):
    network = nn.Linear(3, 2)
    weights = {name: value for name, value in {**network.state_dict(), **change}.items() if value is not None}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert message_of(load_exactly, network, weights, "f.pth").endswith(expected)
    assert equal(dict(network.state_dict()), before), "nothing is loaded by halves"


# -------------------------------------------------------------------------------------------------- timm's checkpoints
def test_what_timms_saver_wrote_is_read(tmp_path: Path) -> None:
    """`args`, an argparse.Namespace, and all; `--weights` chooses between its raw weights and its moving average."""
    raw, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    args = argparse.Namespace(model="groupmixformer_miny", lr=1e-3, data_dir=None, betas=[0.9, 0.999])
    averaged = SimpleNamespace(state_dict=ema.state_dict, module=ema)
    saver = CheckpointSaver(raw, torch.optim.AdamW(raw.parameters()), args, averaged, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=12.5)
    (path,) = tmp_path.glob("checkpoint-0.pth.tar")
    content = load_file(path)
    assert content["args"] == args and content["metric"] == 12.5
    for which, expected in (("best", raw), ("raw", raw), ("ema", ema)):
        state, kind = select_weights(content, which, str(path))
        assert (
            torch.equal(state["weight"], expected.weight) and kind == ("ema" if which == "ema" else "raw") + " weights"
        )


# ------------------------------------------------------------------------------------------------------- hostile files
class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_code_of_a_file_is_run(tmp_path, form):
    proof, path = tmp_path / "proof", tmp_path / "w.pth"
    content = {"model": {"w": torch.zeros(1)}, "config": Malicious(f"touch {proof}")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["config"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = message_of(load_file, path)
    assert str(path) in message
    assert not proof.exists()
    assert "weights_only" not in message, "torch's own message advises to load the file unsafely"
    os.system(f"touch {proof}")
    assert proof.exists(), "the command would have shown"


def test_name_of_the_configuration_class_gives_no_way_in(tmp_path):
    """yacs.config.CfgNode is read as a plain mapping; other names of that module are not read at all."""
    import yacs.config

    class Attack:
        def __reduce__(self):
            return yacs.config._valid_type, (1,)

    torch.save({"config": Attack()}, tmp_path / "w.pth")
    assert "yacs.config._valid_type" in message_of(load_file, tmp_path / "w.pth")


def test_keeping_the_best_twice_leaves_no_link_behind(tmp_path, state):
    path = checkpoint_path(tmp_path, 0)
    save_checkpoint(state, path)
    keep_as_best(path)
    keep_as_best(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEST_NAME, path.name]


def test_saving_never_writes_through_a_link_to_another_checkpoint(tmp_path, state):
    path = checkpoint_path(tmp_path, 0)
    save_checkpoint(state, path)
    os.link(path, tmp_path / f".{BEST_NAME}.partial")
    before = path.read_bytes()
    save_checkpoint({**state, "epoch": 7}, tmp_path / BEST_NAME)
    assert path.read_bytes() == before and load_file(tmp_path / BEST_NAME)["epoch"] == 7


def test_a_folder_instead_of_a_checkpoint_is_explained(tmp_path):
    assert "is a folder; name a file in it" in message_of(load_file, tmp_path)

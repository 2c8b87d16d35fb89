"""Files that are no weights are named for what they are; files of weights are read whatever their name."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from configs import UserError
from utils.checkpoint import load_file


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), buffer)
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(nn.Linear(2, 3), buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, r"begins with 'version https://git-lfs\.github\.com/spec/.*': a pointer .*; run git lfs pull"),
        (b"", "it is empty; copy or download it again"),
        (bytes(5000), "it begins with zeros"),
        (b"<!DOCTYPE html>\n<html>", "begins with '<!DOCTYPE html>': a web page or a server's message; download"),
        (b'\n<?xml version="1.0"?><Error>', "a web page or a server's message"),
        (b"404: Not Found", "begins with '404: Not Found': text"),
        (b'{"weights": []}', "text"),
        (b"\x1f\x8b\x08\x00\x00", "a gzip file; unpack it"),
        (zipped("a.txt", "b.txt"), r"a zip file of other things \(a.txt, b.txt\)"),
        (tarred(), "a tar archive; unpack it"),
        (scripted(), r"a TorchScript program; save the state_dict\(\)"),
        (pickled(), r"asks for torch\.nn\.modules\.linear\.Linear: only tensors and .*; save a state_dict\(\) instead"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, content: bytes, said: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    for tensors in (True, False):
        with pytest.raises(UserError, match=rf"^{path}: (no file of weights: )?.*{said}") as caught:
            load_file(path, tensors)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_the_content_decides_and_not_the_suffix(tmp_path: Path, name: str) -> None:
    state = {"weight": torch.arange(3.0)}
    safetensors.torch.save_file(state, tmp_path / name)
    assert torch.equal(load_file(tmp_path / name)["weight"], state["weight"])
    torch.save(state, tmp_path / name)
    assert torch.equal(load_file(tmp_path / name)["weight"], state["weight"])


def test_plain_values_are_read_without_the_tensors(tmp_path: Path) -> None:
    """A checkpoint may be GBs: what it says of its run must not cost that. Its weights are still guarded."""
    torch.save({"model": {"w": torch.full((1000,), 7.25)}, "config": "SEED: 3"}, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole.replace(torch.tensor(7.25).numpy().tobytes(), b"\0" * 4))
    assert load_file(tmp_path / "w.pth", tensors=False)["config"] == "SEED: 3"
    with pytest.raises(UserError, match="damaged"):
        load_file(tmp_path / "w.pth")

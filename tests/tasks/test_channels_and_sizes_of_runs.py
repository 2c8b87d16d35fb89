"""Runs of grey input and of input that is not square: trained, continued, evaluated, measured, exported, drawn."""

import json
import re
from pathlib import Path

import pytest
import runs
import torch
from PIL import Image
from torch import nn

from configs import UserError, read_config
from models import GroupMixFormer
from models.weights import FIRST_CONVOLUTION
from tasks import evaluate, keys_of
from tasks.classification.weights import load_pretrained, read_weights
from tools import export, visualize
from utils.session import start_session

OPTS = ("DATA.IMG_SIZE", "[32, 48]", "MODEL.GMA.IN_DIM", "1")


@pytest.fixture(scope="module", params=["no", "all"], ids=["exact", "fast"])
def opts(request) -> tuple[str, ...]:
    return (*OPTS, "DATA.FAST_LOADING", request.param)


@pytest.fixture(scope="module")
def trained(opts, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole run of grey images, 32 high and 48 wide."""
    output, shapes = tmp_path_factory.mktemp("trained"), set()

    def note(number: int, network: nn.Module) -> None:
        if number == 0:
            network.register_forward_pre_hook(lambda module, images: shapes.add(tuple(images[0].shape[1:])))

    with pytest.MonkeyPatch.context() as patch:
        runs.in_update(patch.setattr, note)
        assert runs.train_here(patch, runs.arguments(data, output, *opts)) == 0
    assert shapes == {(1, 32, 48)}, "in training and validation"
    return runs.run_folder(output)


def test_a_run_is_stopped_and_continued_with_the_same_bits(trained, opts, data, tmp_path, monkeypatch):
    args = runs.arguments(data, tmp_path, *opts)
    assert runs.train_here(monkeypatch, args, stop_at=3) == 75
    assert runs.train_here(monkeypatch, args) == 0
    name = "ckpt_epoch_1.pth"
    assert runs.digest(runs.run_folder(tmp_path) / name) == runs.digest(trained / name)


def test_another_size_is_a_change_of_the_recipe(trained, opts, data, monkeypatch):
    args = runs.arguments(data, trained.parents[1], *opts, "DATA.IMG_SIZE", "[48, 32]")
    with pytest.raises(UserError, match=re.escape("another recipe: DATA.IMG_SIZE [32, 48] -> [48, 32]; restore")):
        runs.train_here(monkeypatch, args)


@pytest.fixture
def test_py(tmp_path, monkeypatch, capsys):
    """Run test.py in an empty folder; returns what it wrote with --json."""

    def run(*words) -> dict:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["test.py", *map(str, words), "--json", "numbers.json"])
        evaluate(start_session("", keys_of))
        return json.loads((tmp_path / "numbers.json").read_text())

    return run


def test_the_checkpoint_says_size_and_channels(trained, data, test_py, monkeypatch):
    numbers = test_py("--resume", trained / "ckpt_best.pth", "--data-path", data)
    assert numbers["image_size"] == [32, 48]
    assert (trained / "evaluation" / "ckpt_best-val-data-32x48-uncropped").is_dir()
    picture = next((data / "val").rglob("*.png"))
    labelled = test_py("--resume", trained / "ckpt_best.pth", "--images", picture, "--out", ".")
    assert labelled["image_size"] == [32, 48] and len(labelled["pictures"][0]["top"]) == 3
    sizes = test_py("--resume", trained / "ckpt_best.pth", "--data-path", data, "--sizes", "32", "64")
    assert [row["image_size"] for row in sizes] == [32, 64]


def test_what_a_network_takes_is_measured_at_its_size(test_py, capsys):
    cfg = ("--cfg", runs.ROOT / "configs" / "groupmixformer_digits.yaml")
    tall = test_py(*cfg, "--flops", "--opts", *runs.TINY, *OPTS)
    square = test_py(*cfg, "--flops", "--opts", *runs.TINY, *OPTS, "DATA.IMG_SIZE", "32")
    assert tall["image_size"] == [32, 48] and square["image_size"] == 32
    assert "tiny at 32 x 48, " in capsys.readouterr().out
    # Nearly all grows with the area; heads and the like do not.
    assert tall["flops"] / square["flops"] == pytest.approx(1.5, rel=0.02)
    speed = test_py(*cfg, "--throughput", "--opts", *runs.TINY, *OPTS, "DATA.BATCH_SIZE", "2")
    assert speed["images_per_second"] > 0
    assert "batch size 2, 32 x 48, float32" in capsys.readouterr().out


def test_a_grey_picture_is_drawn(trained, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (50, 40), 99).save("grey.png")
    words = ["--resume", str(trained / "ckpt_best.pth"), "--image", "grey.png", "--stage", "2"]
    words += ["--out", "drawn.png", "--json", "n.json"]
    assert visualize.main(words) == 0
    cam = json.loads(Path("n.json").read_text())["grad_cam"]
    assert (len(cam), len(cam[0])) == (4, 6) and Path("drawn.png").exists()


@pytest.mark.parametrize(
    ("words", "size"), [((), (64, 40)), (("--img-size", "48"), (48, 48)), (("--img-size", "48", "80"), (48, 80))]
)
def test_an_export_is_verified_at_the_size(tmp_path, monkeypatch, words, size):
    """Exporting itself is another test's: this is what the command asks for."""
    config = read_config(
        ["--cfg", str(runs.ROOT / "configs" / "groupmixformer_digits.yaml"), "--opts", *runs.TINY], keys_of
    )
    gma = config.MODEL.GMA
    network = GroupMixFormer(3, 1, gma.EMBEDDING_DIMS, gma.SERIAL_DEPTHS, gma.MLP_RATIOS)
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth")
    asked = []
    monkeypatch.setattr(export, "export", lambda network, path, to, size, report: asked.append(size) or path.touch())
    cfg = ("--cfg", str(runs.ROOT / "configs" / "groupmixformer_digits.yaml"), "--output", str(tmp_path / "a.pt2"))
    opts = ("--opts", *runs.TINY, *OPTS, "DATA.IMG_SIZE", "[64, 40]")
    assert export.main(["--pretrained", str(tmp_path / "w.pth"), "--format", "pt2", *cfg, *words, *opts]) == 0
    assert asked == [size]


def test_a_grey_network_starts_from_the_summed_stem_of_a_colour_one(tmp_path):
    torch.manual_seed(0)
    sizes = dict(embed_dims=(10, 20), depths=(1, 1), mlp_ratios=(2, 2))
    colour, grey = GroupMixFormer(3, **sizes).eval(), GroupMixFormer(3, in_chans=1, **sizes).eval()
    torch.save({"model": colour.state_dict()}, tmp_path / "w.pth")
    assert "its stem is for colour, and is summed for grey images" in load_pretrained(grey, tmp_path / "w.pth")
    assert torch.equal(
        grey.state_dict()[FIRST_CONVOLUTION], colour.state_dict()[FIRST_CONVOLUTION].sum(1, keepdim=True)
    )
    images = torch.randn(2, 1, 40, 64)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)))
    assert "summed" not in load_pretrained(colour, tmp_path / "w.pth")
    torch.save({"model": grey.state_dict()}, tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"grey.pth: weights for images of 1 channels, not 3; set MODEL.GMA.IN_DIM 1"):
        load_pretrained(colour, tmp_path / "grey.pth")
    assert read_weights(tmp_path / "w.pth").state[FIRST_CONVOLUTION].shape[1] == 3


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_other_tasks_refuse_grey_networks_in_one_line(task):
    (cfg,) = sorted((runs.ROOT / "configs" / task).glob("*.yaml"))[:1]
    with pytest.raises(UserError, match=rf"^MODEL.GMA.IN_DIM = 1: must be 3: TASK {task} reads its images in colour$"):
        read_config(["--cfg", str(cfg), "--opts", "MODEL.GMA.IN_DIM", "1"], keys_of)


@pytest.mark.parametrize("channels", ["0", "2", "4"])
def test_other_channels_are_refused_with_what_to_do(make_config, channels):
    with pytest.raises(UserError, match=rf"^MODEL.GMA.IN_DIM = {channels}: must be 3 .* a task of your own: docs/dev"):
        make_config("--opts", "MODEL.GMA.IN_DIM", channels)

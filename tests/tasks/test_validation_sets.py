"""ImageNet-ReaL, -V2, -A and -R on stand-ins: images whose colour says which class a stub network gives them."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import nn

from configs import UserError, read_config, with_num_classes
from data.sources import FolderSource
from tasks import keys_of
from tasks.classification import evaluation as run
from tasks.classification.inference import predict
from tasks.classification.outputs import summarize
from tasks.classification.validation_sets import open_validation_set, real_accuracy, real_labels, table
from tasks.networks import build_model
from utils.precision import Precision
from utils.processes import Processes
from utils.session import start_session
from utils.supervision import RunSupervisor

WNIDS = ImageNetInfo().label_names()
LEVELS = 40  # of each colour, 6 apart so that they survive normalisation


def paint(path, code):
    """An image of one colour that stands for a number below 1600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    high, low = divmod(code, LEVELS)
    Image.new("RGB", (40, 40), (6 * high, 6 * low, 0)).save(path)


class ColourReader(nn.Module):
    """Gives the class that the colour stands for the highest of 1000 scores, and `also` the ones below it."""

    def __init__(self, also=()):
        super().__init__()
        self.also = also

    def forward(self, images):
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        levels = ((images * std + mean) * 255 / 6).round().long()[:, :2, 16, 16]
        logits = torch.zeros(len(images), 1000)
        for rank, index in enumerate(self.also):
            logits[:, index] = 5.0 - rank
        logits[torch.arange(len(images)), levels[:, 0] * LEVELS + levels[:, 1]] = 9.0
        return logits


def evaluate(config, network):
    val_set = open_validation_set(config)
    logger = logging.getLogger("nowhere")
    logger.propagate = False
    processes = Processes(0, 0, 1, torch.device("cpu"))
    supervisor = RunSupervisor(processes, timeout_seconds=60)
    session = SimpleNamespace(processes=processes, logger=logger, config=config, supervisor=supervisor)
    result = predict(session, config, network, val_set.source, Precision("cpu", torch.float32, False), val_set.outputs)
    return val_set, result, summarize(result, val_set.label_sets)


@pytest.fixture
def config_of(make_config, tmp_path):
    def make(val_set, *opts, data=tmp_path):
        return make_config("--data-path", data, "--val-set", val_set, "--opts", *runs.TINY, *opts)

    return make


# ------------------------------------------------------------------------------------------------------------------- V2
@pytest.mark.parametrize("folder", ["", "val"])
@pytest.mark.parametrize("name", ["{}", "{:04d}", "wnid"])
def test_v2_folders_are_numbers_not_text(tmp_path, config_of, folder, name):
    numbers = [0, 1, 2, 9, 10, 11, 100, 999]
    for number in numbers:
        wnid_or_number = WNIDS[number] if name == "wnid" else name.format(number)
        for i in range(2):
            paint(tmp_path / folder / wnid_or_number / f"{i}.png", number)
    val_set, result, summary = evaluate(config_of("v2"), ColourReader())
    assert sorted(set(result.labels)) == numbers and np.array_equal(result.labels, result.top[:, 0])
    assert (summary["acc1"], summary["counted"], summary["classes"]) == (100, 16, 1000)
    assert result.classes == WNIDS
    if name == "{}":
        as_text = FolderSource(tmp_path / folder)
        assert np.mean([label == top for (_, label), top in zip(as_text.samples, result.top[:, 0])]) < 0.5
    assert val_set.outputs is None


# -------------------------------------------------------------------------------------------------------------- A and R
@pytest.mark.parametrize("letter", ["a", "r"])
def test_a_and_r_are_counted_among_their_200_classes(tmp_path, config_of, letter):
    subset = table(f"imagenet_{letter}_synsets.txt")
    assert len(subset) == 200 and table(f"imagenet_{letter}_indices.txt") == [str(WNIDS.index(w)) for w in subset]
    (tmp_path / "README.txt").write_text("as the archives have it")
    chosen = (3, 77, 199)
    outside = next(i for i in range(1000) if WNIDS[i] not in subset)
    for position in chosen:
        paint(tmp_path / subset[position] / "right.png", WNIDS.index(subset[position]))
        paint(tmp_path / subset[position] / "elsewhere.png", outside)
    second_best = WNIDS.index(subset[77])
    val_set, result, summary = evaluate(config_of(letter), ColourReader(also=[second_best]))
    assert len(val_set.outputs) == 200 and result.logits.shape == (6, 200) and result.classes == subset
    for path, label, top in zip(result.paths, result.labels, result.top[:, 0]):
        assert subset[label] == path.split("/")[0]
        # What the network would rather call a class outside the 200 counts as its best class inside.
        assert top == (label if path.endswith("right.png") else 77)
    assert summary["acc1"] == pytest.approx(100 * 4 / 6)


# ----------------------------------------------------------------------------------------------------------------- ReaL
def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def test_real_labels_count_sets_of_classes(tmp_path, config_of):
    """timm's first four label sets are [], [970, 795], [230, 231], [809]; folders hold ImageNet's own labels."""
    data = tmp_path / "data"
    predicted = {1: 5, 2: 795, 3: 7, 4: 809, 5: 1}
    folders = {1: 65, 2: 970, 3: 230, 4: 809, 5: 516}
    sets = [[], [970, 795], [230, 231], [809]]
    assert real_labels([val_name(n) for n in (1, 2, 3, 4)]) == sets
    for number, label in folders.items():
        paint(data / "val" / WNIDS[label] / val_name(number), predicted[number])
    _, result, summary = evaluate(config_of("real", data=data), ColourReader(also=[231, 999]))
    fifth_is_right = 1 in real_labels([val_name(5)])[0]
    assert summary["images"] == 5 and summary["counted"] == 4, "the first image has no label and does not count"
    assert summary["acc1"] == pytest.approx(100 * (2 + fifth_is_right) / 4)
    assert summary["acc5"] == pytest.approx(100 * (3 + fifth_is_right) / 4), "231 is second for the third image"
    assert summary["folder_acc1"] == pytest.approx(100 * 1 / 5)
    assert dict(zip(result.paths, result.labels)) == {
        f"{WNIDS[label]}/{val_name(number)}": label for number, label in folders.items()
    }


def test_real_accuracy_is_timms():
    logits = torch.rand(50_000, 1000, generator=torch.Generator().manual_seed(0))
    names = [val_name(i + 1) for i in range(50_000)]
    labels = real_labels(names)
    for row, classes in enumerate(labels):
        if classes and row % 2:
            logits[row, classes[0]] += 6
    timms = RealLabelsImagenet(names)
    timms.add_result(logits)
    first, five = real_accuracy(logits.topk(5).indices.numpy(), labels)
    assert 100 * first.mean() == pytest.approx(timms.get_accuracy(1)) and 30 < 100 * first.mean() < 60
    assert 100 * five.mean() == pytest.approx(timms.get_accuracy(5)) and len(five) == len(timms.is_correct[1])


# ------------------------------------------------------------------------------------------------------ what goes wrong
@pytest.mark.parametrize(
    ("val_set", "images", "message"),
    [
        ("v2", ["0/a.png", "1000/a.png"], r"1000: not a class folder of ImageNet-V2 \(class numbers 0 to 999"),
        ("v2", ["1/a.png", "0001/a.png"], "1: another folder is class 1 as well"),
        ("v2", ["1/a.txt"], r": no images \(.jpg.* in class 1$"),
        ("v2", [], "holds no class folders"),
        ("a", [f"{WNIDS[0]}/a.png"], r"n01440764: not a class folder of ImageNet-A's 200 \(wnids\)"),
        ("r", ["cat/a.png"], "cat: not a class folder of ImageNet-R's 200"),
        ("real", ["0/a.png"], r"0: not a class folder of ImageNet-1k \(wnids\)"),
        ("real", [f"{WNIDS[0]}/a.JPEG"], "ReaL knows images by ImageNet's own names"),
        ("real", [f"{WNIDS[0]}/{val_name(50_001)}"], "ReaL knows images by ImageNet's own names"),
    ],
)
def test_another_layout_is_told(tmp_path, config_of, val_set, images, message):
    for name in images:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message) as caught:
        open_validation_set(config_of(val_set))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folders_and_zips_are_told(tmp_path, config_of):
    for config, message in (
        (config_of("v2", data=""), "DATA.DATA_PATH is empty"),
        (config_of("v2", data=tmp_path / "none"), "none: no such folder"),
        (config_of("v2", "DATA.ZIP_MODE", "True"), "TEST.VAL_SET = 'v2': is read from folders"),
    ):
        with pytest.raises(UserError, match=message):
            open_validation_set(config)


# -------------------------------------------------------------------------------------------------------------- test.py
def test_test_py_evaluates_another_validation_set(tmp_path, monkeypatch, capsys):
    data, weights = tmp_path / "v2", tmp_path / "weights.pth"
    for number in (2, 10):
        paint(data / str(number) / "0.png", number)
    args = runs.arguments(data, tmp_path, flags=["--resume", str(weights), "--val-set", "v2"])
    network = build_model(with_num_classes(read_config(args, keys_of), 1000))
    nn.init.zeros_(network.head.weight)
    with torch.no_grad():
        network.head.bias[[10, 3]] = torch.tensor([5.0, 4.0])
    torch.save({"model": network.state_dict()}, weights)
    monkeypatch.setattr("sys.argv", ["test.py", *args])
    run.evaluate(start_session("", keys_of))
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(" * Acc@1 50.000 Acc@5 ")
    assert f"only 2 of the 1000 classes of ImageNet's set 'v2' are in {data}" in out
    folder = runs.run_folder(tmp_path) / "evaluation" / "weights-v2-v2-32-uncropped"
    content = json.loads((folder / "metrics.json").read_text())
    assert (content["val_set"], content["acc1"], content["classes"]) == ("v2", 50, 1000)

    state = {"model": {**network.state_dict(), "head.weight": torch.zeros(3, 20), "head.bias": torch.zeros(3)}}
    torch.save(state, weights)
    with pytest.raises(UserError, match="its head has 3 classes, but the data has 1000"):
        run.evaluate(start_session("", keys_of))

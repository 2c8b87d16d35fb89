"""`test.py --images`: pictures without labels."""

import csv
import json
import os

import pytest
import runs
import torch
from image_data import zip_image_folder
from PIL import Image
from ranks import run_ranks
from timm.data import ImageNetInfo
from torch import nn

from configs import UserError, read_config, with_num_classes
from data.splits import open_source
from tasks import keys_of, networks
from tasks.classification import evaluation as run
from tasks.classification.class_names import class_names, in_words
from tasks.classification.transforms import eval_transform
from tasks.networks import build_model
from tasks.pictures import find_pictures
from utils import session
from utils.session import start_session


def save_network(path, tmp_path, num_classes, **more):
    """Random weights of a tiny network in a file; returns the network."""
    config = read_config(runs.arguments(tmp_path, tmp_path), keys_of)
    torch.manual_seed(0)
    network = build_model(with_num_classes(config, num_classes)).eval()
    nn.init.normal_(network.head.weight)
    torch.save({"model": network.state_dict(), **more}, path)
    return network


@pytest.fixture
def pictures(data, tmp_path):
    """A picture by name, a folder of one more with another below, all different; and a broken one there."""
    sources = sorted((data / "val").rglob("*.png"))
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for source, name in zip(sources, ("named.picture", "a.png", "deeper/a.png")):
        (folder / name).write_bytes(source.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def label(monkeypatch, tmp_path, weights, paths, *flags, opts=()):
    """Run test.py --images in this process; returns its exit status."""
    args = ["--cfg", str(runs.ROOT / "configs" / "groupmixformer_digits.yaml"), "--output", str(tmp_path)]
    args += ["--tag", "run", "--resume", str(weights), "--images", *map(str, paths), *flags]
    monkeypatch.setattr("sys.argv", ["test.py", *args, "--opts", *runs.TINY, *opts])
    try:
        run.evaluate(start_session("", keys_of))
    except SystemExit as ending:
        return ending.code
    return 0


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_get_their_five_most_probable_classes(pictures, tmp_path, monkeypatch, capsys, workers):
    names = [f"class {letter}" for letter in "abcdefghi"]
    network = save_network(tmp_path / "w.pth", tmp_path, 9, classes=names)
    before = {path: path.read_bytes() for path in pictures.rglob("*") if path.is_file()}
    target = tmp_path / "all.json"
    status = label(
        monkeypatch, tmp_path, tmp_path / "w.pth", [pictures / "named.picture", pictures], "--json", str(target),
        opts=("DATA.NUM_WORKERS", str(workers)),
    )  # fmt: skip
    text = capsys.readouterr().out
    assert status == 1, "one cannot be read"
    assert f"{pictures / 'broken.jpg'}: cannot be read as an image" in text
    assert text.splitlines()[-1] == "1 of 4 pictures: see above"

    good = [pictures / name for name in ("named.picture", "a.png", "deeper/a.png")]
    transform = eval_transform(read_config(runs.arguments(tmp_path, tmp_path), keys_of))
    summary = {row["picture"]: row for row in json.loads(target.read_text())["pictures"]}
    assert set(summary) == {str(path) for path in [*good, pictures / "broken.jpg"]}
    for path in good:
        content = json.loads(path.with_name(f"{path.name}.top5.json").read_text())
        with torch.no_grad():
            shares, classes = network(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0].topk(5)
        assert [entry["class"] for entry in content["top"]] == classes.tolist()
        assert [entry["name"] for entry in content["top"]] == [names[i] for i in classes]
        assert [entry["probability"] for entry in content["top"]] == pytest.approx(shares.tolist(), rel=1e-4)
        assert content["top"] == summary[str(path)]["top"]
        first = text.split(f"{path}\n")[1].splitlines()[0]
        assert first.split() == [f"{100 * shares[0]:.2f}", "%", *names[classes[0]].split()]
    assert {path: path.read_bytes() for path in before} == before, "pictures are never written to"
    written = {path for path in pictures.rglob("*") if path.is_file()} - set(before)
    assert written == {path.with_name(f"{path.name}.top5.json") for path in good}


def test_readable_pictures_alone_are_a_success(pictures, tmp_path, monkeypatch):
    save_network(tmp_path / "w.pth", tmp_path, 2)
    assert label(monkeypatch, tmp_path, tmp_path / "w.pth", [pictures / "a.png"], "--tta", "flip") == 0
    content = json.loads((pictures / "a.png.top5.json").read_text())
    assert [len(content["top"]), content["tta"]] == [2, "flip"]


def test_pictures_are_labelled_by_the_network_that_is_asked_for(pictures, tmp_path, monkeypatch, capsys):
    save_network(tmp_path / "w.pth", tmp_path, 3)
    used = []
    fuse = networks.fuse
    monkeypatch.setattr(networks, "fuse", lambda network: (used.append(network), fuse(network))[1])
    opts = ("DATA.FAST_LOADING", "all")
    assert label(monkeypatch, tmp_path, tmp_path / "w.pth", [pictures / "a.png"], "--fuse", opts=opts) == 0
    assert len(used) == 1 and "DATA.FAST_LOADING does not apply to --images" in capsys.readouterr().out


def read_table(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["picture"]: row for row in csv.DictReader(file)}


def test_what_cannot_be_written_beside_a_picture_is_in_the_table(pictures, tmp_path, monkeypatch, capsys):
    """A file of that name that is a folder, and a folder that is not to be written to."""
    save_network(tmp_path / "w.pth", tmp_path, 3)
    (pictures / "a.png.top5.json").mkdir()
    closed, access = pictures / "deeper", os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    paths = [pictures / "a.png", pictures / "named.picture", closed]
    assert label(monkeypatch, tmp_path, tmp_path / "w.pth", paths) == 0
    out, table = capsys.readouterr().out, runs.run_folder(tmp_path) / "evaluation" / "w-pictures.csv"
    assert f"a.png.top5.json: cannot be written: Is a directory; the result is in {table} alone" in out
    assert f"{closed}: may not be written to; results are in {table} alone" in out
    assert not (closed / "a.png.top5.json").exists() and not list(pictures.rglob(".*.partial"))
    rows = read_table(table)
    content = json.loads((pictures / "named.picture.top5.json").read_text())["top"]
    assert list(rows) == [str(pictures / "a.png"), str(pictures / "named.picture"), str(closed / "a.png")]
    row = rows[str(pictures / "named.picture")]
    assert [row[f"top{i}"] for i in (1, 2, 3)] == [str(entry["class"]) for entry in content]
    assert [float(row[f"p{i}"]) for i in (1, 2, 3)] == [entry["probability"] for entry in content]
    assert row["top1_name"] == content[0]["name"] and "top4" not in row and row["error"] == ""


def test_with_out_nothing_is_written_beside_the_pictures(pictures, tmp_path, monkeypatch, capsys):
    save_network(tmp_path / "w.pth", tmp_path, 3)
    before, out = sorted(pictures.rglob("*")), tmp_path / "new" / "folder"
    assert label(monkeypatch, tmp_path, tmp_path / "w.pth", [pictures], "--out", str(out)) == 1
    assert sorted(pictures.rglob("*")) == before and [path.name for path in out.iterdir()] == ["pictures.csv"]
    broken = read_table(out / "pictures.csv")[str(pictures / "broken.jpg")]
    assert "cannot be read as an image" in broken["error"] and broken["top1"] == broken["p3"] == ""
    with pytest.raises(UserError, match=r"w\.pth/out: cannot be written: Not a directory"):
        label(monkeypatch, tmp_path, tmp_path / "w.pth", [pictures], "--out", str(tmp_path / "w.pth" / "out"))


def test_names_that_are_no_text_are_printed_all_the_same(pictures, tmp_path, monkeypatch, capsys):
    save_network(tmp_path / "w.pth", tmp_path, 3)
    odd = pictures / "\udcff\n.png"
    odd.write_bytes((pictures / "a.png").read_bytes())
    assert label(monkeypatch, tmp_path, tmp_path / "w.pth", [odd]) == 0
    assert rf"{pictures}/\udcff\n.png" in capsys.readouterr().out.splitlines()
    assert json.loads(odd.with_name(f"{odd.name}.top5.json").read_text())["picture"] == str(odd)


def test_pictures_are_found_once_each_and_hidden_ones_are_not(pictures):
    for name in (".hidden.png", ".cache/a.png", "B.JPEG", "notes.txt", "a.png.top5.json"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes(b"")
    found = find_pictures([str(pictures / "named.picture"), str(pictures), str(pictures / "a.png")])
    names = ["named.picture", "B.JPEG", "a.png", "broken.jpg", "deeper/a.png"]
    assert found == [pictures / name for name in names]


@pytest.mark.parametrize(("name", "message"), [("none.jpg", "no such file or folder"), ("empty", "holds no pictures")])
def test_what_is_not_there_is_told_before_anything_is_loaded(tmp_path, monkeypatch, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_weights.pth").touch()
    monkeypatch.setattr(session, "remarks", lambda *args: [])
    with pytest.raises(UserError, match=rf"^--images .*{name}: {message}"):
        label(monkeypatch, tmp_path, tmp_path / "no_weights.pth", [tmp_path / name])


def test_weights_without_a_head_are_told(pictures, tmp_path, monkeypatch):
    state = save_network(tmp_path / "w.pth", tmp_path, 3).state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("head.")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth: has no head.weight"):
        label(monkeypatch, tmp_path, tmp_path / "w.pth", [pictures])


def test_several_processes_are_refused(pictures, tmp_path):
    save_network(tmp_path / "w.pth", tmp_path, 3)
    args = runs.arguments(tmp_path, tmp_path, flags=["--resume", str(tmp_path / "w.pth"), "--images", str(pictures)])
    result = run_ranks("test.py", args, processes=2)
    assert result.returncode != 0 and "--images works on one process: start test.py without torchrun" in result.stderr


# ---------------------------------------------------------------------------------------------------------- class names
def test_wordnet_ids_become_words_beside_numbers_of_classes_that_no_image_has():
    ids = ["n01440764", "1", "n02123045"]
    assert in_words(ids, short=True) == ["tench (n01440764)", "1", "tabby (n02123045)"]
    for names in (["1", "2"], ["n01440764", "ant"], []):
        assert in_words(names) == names


def test_class_names_come_from_an_option_the_checkpoint_or_the_data_and_are_not_guessed(make_config, data, tmp_path):
    said = []

    def names(checkpoint, num_classes, *arguments):
        return class_names(checkpoint, with_num_classes(make_config(*arguments), num_classes), said.append)

    here = ("--data-path", data)
    assert names({"classes": ["x", "y", "z"]}, 3, *here) == ["x", "y", "z"]
    assert names({"classes": ["0", "1", "2"]}, 3, *here) == ["ant", "bee", "cat"], "a zip file's names are no names"
    assert names({"classes": "xyz"}, 3, *here) == ["ant", "bee", "cat"]
    zip_image_folder(data, tmp_path)
    zipped = names({}, 3, "--zip", "--data-path", tmp_path)
    assert zipped == open_source(str(tmp_path), "imagenet", "val", True, "no", 0, 1).classes
    said.clear()
    assert names({}, 3) == ["0", "1", "2"]
    assert names({}, 1000) == [str(i) for i in range(1000)], "as many as ImageNet has, and of any data set"
    assert said == [
        "names of the 3 classes are not known, numbers are shown; give a file with --class-names",
        "names of the 1000 classes are not known, numbers are shown; give a file with --class-names; imagenet gives "
        "ImageNet's",
    ]
    (tmp_path / "names.txt").write_text("größe\nb\nc\n", encoding="utf-8")
    assert names({"classes": ["x", "y", "z"]}, 3, "--class-names", tmp_path / "names.txt") == ["größe", "b", "c"]
    thousand = names({}, 1000, "--class-names", "imagenet")
    assert thousand[0] == "tench, Tinca tinca (n01440764)" and len(set(thousand)) == 1000
    assert names({"classes": ["n01440764", "n00000000"]}, 2) == ["tench, Tinca tinca (n01440764)", "n00000000"]
    assert thousand == names({"classes": ImageNetInfo().label_names()}, 1000)
    for words, message in ((here, "--data-path .*: has 3 classes, the weights have 4: leave it out"),
                           (("--data-path", "none"), "--data-path none: no such folder"),
                           (("--class-names", tmp_path / "names.txt"), "has 3 names, the weights have 4 classes"),
                           (("--class-names", "none.txt"), "none.txt: cannot be read: No such file")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            names({}, 4, *words)


def test_training_stores_the_names_of_its_classes(data, tmp_path, monkeypatch):
    args = runs.arguments(data, tmp_path, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert runs.train_here(monkeypatch, args) == 0
    weights = runs.run_folder(tmp_path) / "ckpt_best.pth"
    picture = tmp_path / "picture.png"
    picture.write_bytes(next((data / "val").rglob("*.png")).read_bytes())
    assert label(monkeypatch, tmp_path, weights, [picture]) == 0
    content = json.loads((tmp_path / "picture.png.top5.json").read_text())
    assert {entry["name"] for entry in content["top"]} == {"ant", "bee", "cat"}

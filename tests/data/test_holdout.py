"""DATA.VAL_SHARE: training images that validate where there is no validation set."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
from conftest import write_image_folder
from image_data import message_of, png, zip_image_folder
from ranks import run_ranks

import test as test_script
from configs import UserError
from data.holdout import held_out, split_by_content
from data.sources import FolderSource
from tasks.classification.images import open_for_evaluation, open_split, open_train_and_val


def sides(root: Path, share: float = 0.3) -> dict[str, str]:
    """{path below the root: 'train' or 'val'}."""
    parts = split_by_content(FolderSource(root), share)
    return {str(Path(path).relative_to(root)): name for name, part in parts.items() for path, _ in part.samples}


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    """Three classes of ten images in train/, and no val/."""
    root = tmp_path / "unsplit"
    write_image_folder(root, train=10)
    shutil.rmtree(root / "val")
    return root


# --------------------------------------------------------------------------------------------------------- which images
@pytest.mark.parametrize(("share", "of_ten"), [(1e-300, 1), (0.1, 1), (0.25, 3), (0.5, 5), (0.99, 9), (0.999999, 9)])
def test_each_class_gives_its_share_at_least_one_and_not_all(share, of_ten):
    labels = np.repeat([0, 1, 2], [10, 10, 1])
    contents = np.stack([np.full(21, 7), np.arange(21)], axis=1)
    chosen = held_out(labels, contents, share)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [of_ten, of_ten, 0], "the single image trains"


def test_names_and_order_decide_nothing(unsplit, tmp_path):
    before = sides(unsplit / "train")
    assert sorted(before.values()) == ["train"] * 21 + ["val"] * 9
    for number, path in enumerate(sorted((unsplit / "train").rglob("*.png"))):
        path.rename(path.with_name(f"{(number * 7) % 31:02d}_{path.name}"))
    after = sides(unsplit / "train")
    assert {re.sub(r"\d+_", "", name): side for name, side in after.items()} == before


def test_the_choice_is_the_same_on_every_machine(tmp_path):
    """A change here lets runs that are continued validate on images that they were trained on."""
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(6):
            (tmp_path / label / f"{number}.png").write_bytes(f"{label}{number}".encode())
    assert sorted(name for name, side in sides(tmp_path).items() if side == "val") == [
        "a/0.png",
        "a/4.png",
        "b/1.png",
        "b/4.png",
    ]


def test_copies_of_an_image_are_on_one_side(tmp_path):
    """Within a class, and where another class has a copy too."""
    for label, numbers in (("a", range(10)), ("b", range(8, 20))):
        (tmp_path / label).mkdir()
        for number in numbers:
            for copy in ("first", "second", "third")[: 1 + number % 3]:
                (tmp_path / label / f"{copy}_{number}.png").write_bytes(png(number))
    found = sides(tmp_path)
    for number in range(20):
        assert len({side for name, side in found.items() if name.endswith(f"_{number}.png")}) == 1
    assert set(found.values()) == {"train", "val"}


def test_a_class_that_would_be_left_with_nothing_is_one_line(tmp_path):
    """Its one image is a copy of one that another class holds out."""
    for label in ("a", "b", "c"):
        (tmp_path / label).mkdir()
    for number in range(10):
        (tmp_path / "a" / f"{number}.png").write_bytes(png(number))
    held = next(name for name, side in sides_of_a(tmp_path).items() if side == "val")
    (tmp_path / "b" / "copy.png").write_bytes((tmp_path / held).read_bytes())
    (tmp_path / "c" / "own.png").write_bytes(png(99))
    message = message_of(sides, tmp_path, 0.1)
    assert message.startswith("DATA.VAL_SHARE = 0.1: leaves no training image of class b, whose images")


def sides_of_a(root: Path) -> dict[str, str]:
    source = FolderSource(root, gaps=True)
    return {f"a/{Path(path).name}": name for name, part in split_by_content_of(source) for path, _ in part.samples}


def split_by_content_of(source):
    chosen = held_out(source.samples.labels, source.contents(), 0.1)
    return (("train", source.part(~chosen)), ("val", source.part(chosen)))


def test_nothing_to_hold_out_is_one_line(tmp_path):
    for number, label in enumerate(("a", "b")):
        (tmp_path / label).mkdir()
        for copy in range(3):
            (tmp_path / label / f"{copy}.png").write_bytes(png(number))
    assert "no class has two images that differ" in message_of(sides, tmp_path, 0.5)


def test_a_file_that_cannot_be_read_does_not_end_it(unsplit):
    (unsplit / "train" / "ant" / "gone.png").symlink_to(unsplit / "nowhere")
    assert sides(unsplit / "train")["ant/gone.png"] in ("train", "val")


@pytest.mark.parametrize("value", ["1", "-0.1", "nan"])
def test_impossible_shares_are_one_line(make_config, value):
    with pytest.raises(UserError, match=r"^(--opts: )?DATA\.VAL_SHARE = '?"):
        make_config("--opts", "DATA.VAL_SHARE", value)


# -------------------------------------------------------------------------------------------------------------- sources
def test_zip_files_and_folders_are_split_alike_and_cached(make_config, unsplit, tmp_path):
    (unsplit / "val").mkdir()
    shutil.copytree(unsplit / "train", unsplit / "val", dirs_exist_ok=True)
    zip_image_folder(unsplit, tmp_path / "zipped")
    shutil.rmtree(unsplit / "val")
    for name in ("val.zip", "val_map.txt"):
        (tmp_path / "zipped" / name).unlink()
    opts = ("--opts", "DATA.VAL_SHARE", "0.2")
    folders = open_train_and_val(make_config("--data-path", unsplit, *opts), 0, 1, print)
    for cache, rank in (("no", 0), ("full", 0), ("part", 0), ("part", 1)):
        config = make_config(
            "--data-path", tmp_path / "zipped", "--zip", "--cache-mode", cache, "--batch-size", "2", *opts
        )
        for folder, zipped in zip(folders, open_train_and_val(config, rank, 2, print)):
            assert [Path(path).name for path, _ in folder.samples] == [Path(path).name for path, _ in zipped.samples]
            assert zipped.samples.labels.tolist() == folder.samples.labels.tolist()
            assert [zipped.read(i) for i in range(len(zipped.samples))] == [
                folder.read(i) for i in range(len(folder.samples))
            ]
            cached = int((zipped._spans[:, 0] >= 0).sum())
            whole = len(zipped.samples)
            assert cached == {"no": 0, "full": whole}.get(cache, cached) and (cache != "part" or 0 < cached < whole)


def test_class_folders_without_a_folder_train(make_config, unsplit):
    opts = ("--opts", "DATA.VAL_SHARE", "0.2")
    below, inside = (
        open_train_and_val(make_config("--data-path", root, *opts), 0, 1, print)
        for root in (unsplit, unsplit / "train")
    )
    assert [list(source.samples) for source in below] == [list(source.samples) for source in inside]
    assert len(below[0].samples) == 24 and len(below[1].samples) == 6


def test_a_validation_set_that_is_there_is_used(make_config, image_folder):
    notices = []
    config = make_config("--data-path", image_folder, "--opts", "DATA.VAL_SHARE", "0.5")
    train, val = open_train_and_val(config, 0, 1, notices.append)
    assert (len(train.samples), len(val.samples)) == (18, 6)
    assert notices == ["DATA.VAL_SHARE = 0.5: is not used, the data have a validation set"]


def test_without_the_key_the_line_names_it(make_config, unsplit):
    message = message_of(open_split, make_config("--data-path", unsplit), "val", 0, 1)
    assert message.endswith("; or set DATA.VAL_SHARE 0.1, a share of train/")


def test_an_evaluation_has_the_classes_of_the_training(make_config, unsplit):
    (unsplit / "train" / "dog").mkdir()
    (unsplit / "train" / "dog" / "single.png").write_bytes(png(5))
    config, notices = make_config("--data-path", unsplit, "--opts", "DATA.VAL_SHARE", "0.1"), []
    source = open_for_evaluation(config, [], notices.append)
    assert source.classes == ["ant", "bee", "cat", "dog"] and len(source.samples) == 3
    assert "1 of 4 classes have no validation images (dog)" in notices[0]


# ----------------------------------------------------------------------------------------------------------------- runs
RUN = ("DATA.VAL_SHARE", "0.2", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")


def evaluate(monkeypatch, capsys, *words) -> str:
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["test.py", *map(str, words)])
        test_script.main()
    return capsys.readouterr().out


@pytest.mark.launch
def test_the_held_out_images_are_those_of_the_checkpoint_in_test_py(unsplit, tmp_path, monkeypatch, capsys):
    assert runs.train_here(monkeypatch, runs.arguments(unsplit, tmp_path, *RUN)) == 0
    folder = runs.run_folder(tmp_path)
    best = folder / "ckpt_best.pth"
    told = re.findall(r"Best acc1: (\S+)", (folder / "log_rank0.txt").read_text())[-1]
    moved = tmp_path / "elsewhere"
    shutil.copytree(unsplit, moved)
    capsys.readouterr()
    out = evaluate(monkeypatch, capsys, "--resume", best, "--data-path", moved)
    assert out.splitlines()[-1].startswith(f" * Acc@1 {told} ") and "6 images of 3 classes" in out
    assert "may have been trained on" not in out
    assert json.loads(next(folder.glob("evaluation/*/metrics.json")).read_text())["images"] == 6
    in_ant = {side: path for path, side in sides(moved / "train", 0.2).items() if path.startswith("ant")}
    one, other = (moved / "train" / in_ant[side] for side in ("train", "val"))
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert "may have been trained on some of them" in evaluate(
        monkeypatch, capsys, "--resume", best, "--data-path", moved
    )
    message = message_of(runs.train_here, monkeypatch, runs.arguments(moved, tmp_path, *RUN))
    assert "training images" in message
    message = message_of(runs.train_here, monkeypatch, runs.arguments(unsplit, tmp_path, "DATA.VAL_SHARE", "0.3"))
    assert "DATA.VAL_SHARE 0.2 -> 0.3" in message


@pytest.mark.launch
def test_two_processes_have_the_same_split(unsplit, tmp_path):
    result = run_ranks("train.py", runs.arguments(unsplit, tmp_path, *RUN, "DATA.BATCH_SIZE", "2"), 2)
    assert result.returncode == 0, result.stderr
    assert "24 training and 6 validation images of 3 classes" in result.stdout

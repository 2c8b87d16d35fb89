"""Data sets as they come, made into class folders or zip files: whole, counted, and continued after a kill."""

import errno
import gc
import os
import shlex
import shutil
import tarfile
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import pytest
import raw_data
from image_data import message_of
from ranks import in_fork
from raw_data import content_of, labelled_val_images, train_images

from data.holdout import open_parts
from data.sources import FolderSource, ZipSource, fingerprint
from data.splits import open_source
from tools.prepare.__main__ import main
from tools.prepare.writing import FolderTarget, ZipTarget

WRITERS = {
    "imagenet": raw_data.write_tars,
    "kaggle": raw_data.write_kaggle,
    "parquet": raw_data.write_shards,
    "split": raw_data.write_class_folders,
}
every_form = pytest.mark.parametrize("form", list(WRITERS))


def prepare(form, root, out, *flags):
    return main([form, "--data-path", str(root), "--out", str(out), *map(str, flags)])


def message(capsys, *arguments):
    assert prepare(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def expected():
    images = {"train": train_images(), "val": labelled_val_images()}
    return {f"{split}/{name}": image for split, of_split in images.items() for name, image in of_split.items()}


@pytest.mark.parametrize("form", ["imagenet", "kaggle", "parquet"])
def test_imagenet_in_each_form_becomes_the_same_class_folders(form, tmp_path, capsys):
    root = WRITERS[form](tmp_path / "raw")
    before = content_of(root)
    assert prepare(form, root, tmp_path / "out") == 0
    assert content_of(tmp_path / "out") == expected() and content_of(root) == before
    train = open_source(str(tmp_path / "out"), "imagenet", "train", False, "no", 0, 1)
    assert train.classes == list(raw_data.WNIDS) and len(train.samples) == 12
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("val: 5 images of 3 classes") and lines[1].endswith("train: 12 images of 3 classes")
    assert lines[2] == f"ready: --data-path {tmp_path / 'out'}"


@every_form
def test_zip_files_hold_what_the_folders_hold(form, tmp_path):
    root = WRITERS[form](tmp_path / "raw")
    assert prepare(form, root, tmp_path / "folders") == prepare(form, root, tmp_path / "zips", "--zip") == 0
    for split in ("train", "val"):
        folder, packed = FolderSource(tmp_path / "folders" / split), ZipSource(tmp_path / "zips", split)
        assert fingerprint(folder) == fingerprint(packed)
        assert packed.classes == folder.classes
        contents = {(Path(path).name, label): folder.read(i) for i, (path, label) in enumerate(folder.samples)}
        assert {(Path(n).name, label): packed.read(i) for i, (n, label) in enumerate(packed.samples)} == contents
    assert sorted(path.name for path in (tmp_path / "zips").iterdir()) == [
        "train.zip",
        "train_map.txt",
        "val.zip",
        "val_map.txt",
    ]


# ---------------------------------------------------------------------------------------------------------------- kills
def kill_within(number):
    """What makes a process kill itself in the middle of writing its image of this number, to folders and to zips."""
    count = 0

    def dies(write):
        def run(target, name, content):
            nonlocal count
            count += 1
            if count < number:
                return write(target, name, content)
            if isinstance(target, ZipTarget):
                with target.archive.open(ZipInfo(name), "w") as member:
                    member.write(content[:-7])
                    target.file.flush()
                    os._exit(9)
            half = (target.partial / name).with_name(f".{Path(name).name}.partial")
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_bytes(content[:-7])
            os._exit(9)

        return run

    FolderTarget.write, ZipTarget.write = dies(FolderTarget.write), dies(ZipTarget.write)


@every_form
@pytest.mark.parametrize("flags", [(), ("--zip",)], ids=["folders", "zip"])
def test_a_killed_preparation_goes_on_where_it_was(form, flags, tmp_path, capsys):
    root = WRITERS[form](tmp_path / "raw")
    assert prepare(form, root, tmp_path / "straight", *flags) == 0
    out = tmp_path / "killed"
    source = ZipSource(tmp_path / "straight", "val") if flags else FolderSource(tmp_path / "straight" / "val")
    val = len(source.samples)
    for number in (2, val + 3, 3):  # within val; within train, twice

        def run(number=number):
            kill_within(number)
            prepare(form, root, out, *flags)

        assert in_fork(run)[0] == 9
        assert not (out / "train").exists() and not (out / "train.zip").exists(), "is not there until it is whole"
    capsys.readouterr()
    assert prepare(form, root, out, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    # Of train, the second start wrote 3 - 1 after val's rest, and the third 2.
    assert "is there already" in lines[0] and f"{val + 3 - 1 - (val - 1) + 2} of them from before" in lines[1]
    assert {n: c for n, c in content_of(out).items() if not n.endswith(".partial")} == content_of(tmp_path / "straight")


def test_a_changed_source_is_not_mixed_with_what_was_written_before(tmp_path, capsys):
    root = raw_data.write_class_folders(tmp_path / "raw")

    def run():
        kill_within(9)
        prepare("split", root, tmp_path / "out")

    assert in_fork(run)[0] == 9
    assert "are not of this source" in message(capsys, "split", root, tmp_path / "out", "--val-share", "0.5")


# --------------------------------------------------------------------------------------------------------------- damage
def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def with_labels_of_kaggle(root):
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    raw_data.write_kaggle(root / "kaggle")
    (root / "kaggle" / "LOC_val_solution.csv").rename(root / "LOC_val_solution.csv")


def test_a_damaged_archive_is_named_and_what_was_written_serves_later(tmp_path, capsys):
    root, out = raw_data.write_tars(tmp_path / "raw"), tmp_path / "out"
    whole = (root / "ILSVRC2012_img_train.tar").read_bytes()
    with tarfile.open(root / "ILSVRC2012_img_train.tar") as archive:
        second = archive.getmembers()[1]
    for size in (second.offset_data + second.size - 3000, second.offset):  # within the second class, and before it
        cut(root / "ILSVRC2012_img_train.tar", size)
        with_kit = message(capsys, "imagenet", root, out)
        assert "ILSVRC2012_img_train.tar" in with_kit and "cut off" in with_kit and not (out / "train").exists()
    (root / "ILSVRC2012_img_train.tar").write_bytes(whole)
    assert prepare("imagenet", root, out) == 0 and content_of(out) == expected()


def test_a_cut_archive_of_validation_images(tmp_path, capsys):
    root = raw_data.write_tars(tmp_path / "raw")
    cut(root / "ILSVRC2012_img_val.tar", 3000)
    assert "ILSVRC2012_img_val.tar" in message(capsys, "imagenet", root, tmp_path / "out")


@pytest.mark.parametrize("archive", [True, False])
def test_counts_are_those_of_the_kit(archive, tmp_path, capsys):
    root = raw_data.write_tars(tmp_path / "raw")
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    kit = raw_data.write_kit(root, (4, 6, 5), archive)
    text = message(capsys, "imagenet", root, tmp_path / "out")
    assert f"train: 12 images instead of 15, by {kit.name}: 4 of n01443537 instead of 6, and 1 other class" in text
    assert (tmp_path / "out" / "val").is_dir() and not (tmp_path / "out" / "train").exists()
    assert prepare("imagenet", root, tmp_path / "out", "--allow-missing") == 0
    assert "instead of 15" in capsys.readouterr().out and content_of(tmp_path / "out") == expected()


def test_validation_images_that_are_missing_or_unknown(tmp_path, capsys):
    root = raw_data.write_tars(tmp_path / "raw")
    images = raw_data.val_images()
    name, image = images.popitem()
    (root / "ILSVRC2012_img_val.tar").write_bytes(raw_data.tar(images))
    assert "val: 4 images instead of 5" in message(capsys, "imagenet", root, tmp_path / "out")
    images |= {name: image, "ILSVRC2012_val_00000006.JPEG": image}
    (root / "ILSVRC2012_img_val.tar").write_bytes(raw_data.tar(images))
    assert "ILSVRC2012_val_00000006.JPEG is not an image of" in message(capsys, "imagenet", root, tmp_path / "out")


def test_missing_ground_truth_is_named(tmp_path, capsys):
    root = raw_data.write_tars(tmp_path / "raw")
    kit = root / "ILSVRC2012_devkit_t12.tar.gz"
    kit.rename(tmp_path / kit.name)
    text = message(capsys, "imagenet", root, tmp_path / "o")
    assert "nothing tells the classes of ILSVRC2012_img_val.tar; put there" in text
    assert prepare("imagenet", root, tmp_path / "out", "--labels", tmp_path / kit.name) == 0
    raw_data.write_kit(root, archive=False)
    (root / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt").unlink()
    assert "has no ILSVRC2012_validation_ground_truth.txt" in message(capsys, "imagenet", root, tmp_path / "o")
    shutil.rmtree(root / "ILSVRC2012_devkit_t12")
    cut(tmp_path / kit.name, 200)
    assert "cannot be read" in message(capsys, "imagenet", root, tmp_path / "o", "--labels", tmp_path / kit.name)
    kaggle = raw_data.write_kaggle(tmp_path / "kaggle")
    assert prepare("imagenet", root, tmp_path / "o", "--labels", kaggle / "LOC_val_solution.csv") == 0
    assert content_of(tmp_path / "o") == expected()
    (kaggle / "LOC_val_solution.csv").write_text("a,b\n1,2\n")
    assert "needs the columns ImageId" in message(capsys, "kaggle", kaggle, tmp_path / "k")
    (kaggle / "LOC_val_solution.csv").unlink()
    assert "nothing tells the classes" in message(capsys, "kaggle", kaggle, tmp_path / "k")


def test_an_image_that_kaggle_lists_and_is_not_there(tmp_path, capsys):
    root = raw_data.write_kaggle(tmp_path / "raw")
    (root / "ILSVRC/Data/CLS-LOC/train/n01443537/n01443537_2.JPEG").unlink()
    text = message(capsys, "kaggle", root, tmp_path / "out")
    assert "train: 11 images instead of 12, by train_cls.txt: 3 of n01443537 instead of 4" in text


# -------------------------------------------------------------------------------------------------------------- targets
def test_what_is_there_already_and_is_something_else_is_no_success(tmp_path, capsys):
    root, out = raw_data.write_tars(tmp_path / "raw"), tmp_path / "out"
    (out / "train").mkdir(parents=True)
    assert "train: is there already, and holds no class" in message(capsys, "imagenet", root, out)
    (out / "train" / "cat").mkdir()
    assert "train: is there already, and holds cat; choose another" in message(capsys, "imagenet", root, out)
    (out / "train_map.txt").write_text("mine")
    assert "train_map.txt: is there already, without" in message(capsys, "imagenet", root, out, "--zip")
    assert (out / "train_map.txt").read_text() == "mine"
    (out / "train.zip").write_text("no zip")
    assert "train.zip: not a readable zip file" in message(capsys, "imagenet", root, out, "--zip")


@pytest.mark.parametrize("at", ["image", "end"])
def test_a_full_disk_is_one_line_with_zip_too(at, tmp_path, capsys, monkeypatch):
    root, out = raw_data.write_class_folders(tmp_path / "raw"), tmp_path / "out"

    class Full(ZipFile):
        def _full(self, *_):
            if self.fp:
                raise OSError(errno.ENOSPC, "No space left on device")

        writestr, close = (_full, _full) if at == "image" else (ZipFile.writestr, _full)

    unraisable = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    with monkeypatch.context() as patch:
        patch.setattr("tools.prepare.writing.ZipFile", Full)
        assert ".val.zip.partial: cannot be written: No space" in message(capsys, "split", root, out, "--zip")
    gc.collect()
    assert not unraisable and prepare("split", root, out, "--zip") == 0


def test_a_name_that_is_no_text_is_named(tmp_path, capsys):
    root = raw_data.write_class_folders(tmp_path / "raw")
    (root / "n01443537" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(raw_data.jpeg(50))
    assert "not a name in UTF-8" in message(capsys, "split", root, tmp_path / "out", "--zip")


# ---------------------------------------------------------------------------------------------------------------- links
@pytest.mark.parametrize("top", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggle_by_links_writes_no_image(top, tmp_path):
    root = raw_data.write_kaggle(tmp_path / "raw")
    before = content_of(root)
    assert prepare("kaggle", root / top, tmp_path / "out", "--links") == 0
    assert content_of(tmp_path / "out") == expected() and content_of(root) == before
    assert all(folder.is_symlink() for folder in (tmp_path / "out" / "train").iterdir()), "a link for each class"
    assert all(path.is_symlink() for path in (tmp_path / "out" / "val").rglob("*.JPEG"))


def test_links_leave_an_empty_image_and_a_broken_link_of_the_source_as_they_are(tmp_path):
    root = raw_data.write_kaggle(tmp_path / "raw")
    folder = root / "ILSVRC/Data/CLS-LOC/train/n01443537"
    (folder / "n01443537_2.JPEG").write_bytes(b"")
    (folder / "n01443537_3.JPEG").unlink()
    (folder / "n01443537_3.JPEG").symlink_to("elsewhere")
    assert prepare("kaggle", root, tmp_path / "out", "--links") == 0
    assert (folder / "n01443537_2.JPEG").read_bytes() == b"" and not (folder / "n01443537_2.JPEG").is_symlink()
    assert (folder / "n01443537_3.JPEG").readlink() == Path("elsewhere")


@pytest.mark.parametrize("first", ["links", "copies"])
def test_links_and_copies_are_not_mixed(first, tmp_path, capsys):
    """What a copy writes below a link to a class is in the source."""
    root, out = raw_data.write_kaggle(tmp_path / "raw"), tmp_path / "out"
    image = root / "ILSVRC/Data/CLS-LOC/train/n01443537/n01443537_2.JPEG"
    content = image.read_bytes()
    image.unlink()
    flags = ["--links"] if first == "links" else []
    assert "11 images instead of 12" in message(capsys, "kaggle", root, out, *flags)
    image.write_bytes(content)
    other = [] if flags else ["--links"]
    assert f"holds {first} of an earlier start; remove it" in message(capsys, "kaggle", root, out, *other)
    assert prepare("kaggle", root, out, *flags) == 0 and content_of(out) == expected()


def test_links_go_with_files_alone(tmp_path, capsys):
    root = raw_data.write_tars(tmp_path / "raw")
    text = message(capsys, "imagenet", root, tmp_path / "o", "--links")
    assert "--links: is for kaggle, split, not for imagenet" in text
    assert "--zip copies them" in message(capsys, "kaggle", root, tmp_path / "o", "--links", "--zip")


# ---------------------------------------------------------------------------------------------------------------- split
def test_a_split_is_by_content_alone(tmp_path):
    """Names, order and a copy under another name change nothing; every class is in both splits."""
    root = raw_data.write_class_folders(tmp_path / "raw")
    images = train_images()
    shutil.copy(root / "n01440764" / "n01440764_0.JPEG", root / "n01440764" / "a_copy.JPEG")
    assert prepare("split", root, tmp_path / "out", "--val-share", "0.25") == 0
    split = content_of(tmp_path / "out")
    assert [sum(name.startswith(f"{s}/") for name in split) for s in ("train", "val")] in ([10, 3], [9, 4])
    assert {name.split("/")[1] for name in split if name.startswith("val/")} == set(raw_data.WNIDS)
    train, val = ({c for n, c in split.items() if n.startswith(s)} for s in ("train", "val"))
    assert not train & val and train | val == set(images.values())

    renamed = tmp_path / "renamed"
    for number, (name, image) in enumerate(sorted(images.items(), key=lambda pair: pair[1])):
        (renamed / name.split("/")[0]).mkdir(parents=True, exist_ok=True)
        (renamed / name.split("/")[0] / f"{number}.jpg").write_bytes(image)
    assert prepare("split", renamed, tmp_path / "again", "--val-share", "0.25", "--links") == 0
    assert {c for n, c in content_of(tmp_path / "again").items() if n.startswith("val/")} == val


def test_the_only_image_of_a_class_is_for_training(tmp_path):
    root = raw_data.write_class_folders(tmp_path / "raw")
    for number in range(1, 4):
        (root / "n01443537" / f"n01443537_{number}.JPEG").unlink()
    assert prepare("split", root, tmp_path / "out") == 0
    assert [name for name in content_of(tmp_path / "out") if "n01443537" in name] == [
        "train/n01443537/n01443537_0.JPEG"
    ]


def test_a_split_is_that_of_val_share(tmp_path):
    root = raw_data.write_class_folders(tmp_path / "raw")
    assert prepare("split", root, tmp_path / "out", "--val-share", "0.3") == 0
    parts = open_parts(str(root), "imagenet", 0.3, zip_mode=False)
    for name, part in parts.items():
        expected = {f"{name}/{Path(path).relative_to(root).as_posix()}" for path, _ in part.samples}
        assert {path for path in content_of(tmp_path / "out") if path.startswith(f"{name}/")} == expected


def test_the_target_is_not_in_the_source(tmp_path, capsys):
    root = raw_data.write_class_folders(tmp_path / "top" / "train")
    for out in (root, root / "out", tmp_path / "top"):
        assert "would be mixed with what is read" in message(capsys, "split", root, out)
    assert content_of(root) == train_images()


def test_folders_of_splits_are_no_classes(tmp_path, capsys):
    root = raw_data.write_class_folders(tmp_path / "raw" / "train").parent
    text = message(capsys, "split", root, tmp_path / "out")
    assert "folders train hold class folders" in text and f"--data-path {root / 'train'}" in text
    assert prepare("split", root / "train", tmp_path / "out") == 0


# -------------------------------------------------------------------------------------------------------------- Parquet
def test_shards_without_names_and_paths_become_numbered_folders(tmp_path):
    rows = [(image, None, 9 + i % 2) for i, image in enumerate(train_images().values())]
    raw_data.write_shard(tmp_path / "raw" / "train" / "0000.parquet", rows[:8])
    raw_data.write_shard(tmp_path / "raw" / "test" / "0000.parquet", rows[8:])
    assert prepare("parquet", tmp_path / "raw", tmp_path / "out") == 0
    content = content_of(tmp_path / "out")
    assert content["train/09/00000002.jpeg"] == rows[2][0] and content["val/10/00000001.jpeg"] == rows[9][0]
    assert len(content) == 12


def test_shards_with_names_become_folders_of_these_names(tmp_path):
    rows = [(image, "same.jpg", i % 2) for i, image in enumerate(train_images().values())]
    for split in ("train", "validation"):
        raw_data.write_shard(tmp_path / "raw" / f"{split}.parquet", rows, ("cat/dog", "ant"))
    assert prepare("parquet", tmp_path / "raw", tmp_path / "out") == 0
    content = content_of(tmp_path / "out")
    assert content["train/cat_dog/00000000.jpeg"] == rows[0][0] and content["val/ant/00000001.jpeg"] == rows[1][0]


@pytest.mark.parametrize("name", ["..", ".", "a\0b", "a" * 300, ".hidden"])
def test_names_that_no_file_can_have_become_numbers(name, tmp_path):
    """'..' would lead out of the folder that is written."""
    rows = [(image, "same.jpg", i % 2) for i, image in enumerate(train_images().values())]
    rows[0] = (rows[0][0], name, 0)
    for split in ("train", "validation"):
        raw_data.write_shard(tmp_path / "raw" / f"{split}.parquet", rows, (name, "ant"))
    assert prepare("parquet", tmp_path / "raw", tmp_path / "out") == 0
    content = content_of(tmp_path / "out")
    assert content["train/0/00000000.jpeg"] == rows[0][0] and len(content) == 24
    assert {path.split("/")[0] for path in content} == {"train", "val"}


def test_columns_and_labels_of_each_shard_are_looked_at(tmp_path, capsys):
    rows = [(image, None, i % 2) for i, image in enumerate(train_images().values())]
    for number in (0, 1):
        raw_data.write_shard(tmp_path / "raw" / f"train-0000{number}-of-00002-4f2a.parquet", rows)
    raw_data.write_shard(tmp_path / "raw" / "test.parquet", rows)
    shard = tmp_path / "raw" / "train-00001-of-00002-4f2a.parquet"
    table = parquet().read_table(shard)
    parquet().write_table(table.rename_columns(["image", "class"]), shard)
    text = message(capsys, "parquet", tmp_path / "raw", tmp_path / "out")
    assert f"{shard}: has no column 'label', only image, class" in text
    parquet().write_table(table.set_column(1, "label", [[None] * 12]), shard)
    assert "without a label" in message(capsys, "parquet", tmp_path / "raw", tmp_path / "out")
    shard.unlink()
    assert "1 of 2 shards of train are missing" in message(capsys, "parquet", tmp_path / "raw", tmp_path / "out")


def parquet():
    import pyarrow.parquet

    return pyarrow.parquet


def test_damaged_and_missing_shards_are_named(tmp_path, capsys, monkeypatch):
    root, out = raw_data.write_shards(tmp_path / "raw"), tmp_path / "out"
    shard = root / "data" / "train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    cut(shard, 1000)
    assert "train-00001-of-00002.parquet: not a whole Parquet file" in message(capsys, "parquet", root, out)
    shard.unlink()
    assert "1 of 2 shards of train are missing, the first is number 1" in message(capsys, "parquet", root, out)
    raw_data.write_shard(shard, [(b"no image", None, 0)])
    assert "row 0 is no image" in message(capsys, "parquet", root, out)
    raw_data.write_shard(shard, [(raw_data.jpeg(1), "a.jpg", -1)])
    assert "without a label" in message(capsys, "parquet", root, out)
    shard.write_bytes(whole)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.delitem(__import__("sys").modules, "pyarrow.parquet")
    assert "pyarrow is needed" in message(capsys, "parquet", root, out)


# ---------------------------------------------------------------------------------------------------------------- hints
@pytest.mark.parametrize("split", ["train", "val"])
@every_form
def test_a_raw_data_set_as_data_path_gives_the_command_that_helps(form, split, tmp_path):
    root = WRITERS[form](tmp_path / "a data set")
    text = message_of(open_source, str(root), "imagenet", split, False, "no", 0, 1)
    command, _, then = text.removesuffix("; or set DATA.VAL_SHARE 0.1").partition("run ")[2].partition(", then give ")
    python, dash, module, *arguments = shlex.split(command)
    assert (python, dash, module) == ("python", "-m", "tools.prepare") and main(arguments) == 0
    flag, path = shlex.split(then)
    assert flag == "--data-path"
    assert len(open_source(path, "imagenet", split, False, "no", 0, 1).classes) == 3


def test_kaggles_own_folder_gives_the_command_too(tmp_path):
    root = raw_data.write_kaggle(tmp_path / "data")
    folder = root / "ILSVRC" / "Data" / "CLS-LOC"
    text = message_of(open_source, str(folder), "imagenet", "val", False, "no", 0, 1)
    assert "holds images and no class folders" in text and f"--out {root / 'imagenet'} --links" in text
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    (folder / "val" / "cat.1.jpg").write_bytes(raw_data.jpeg(1))
    text = message_of(open_source, str(folder), "imagenet", "val", False, "no", 0, 1)
    assert "tools.prepare" not in text and "a folder of its own in val/" in text


@pytest.mark.parametrize("form", ["imagenet", "kaggle", "parquet"])
def test_a_raw_data_set_gives_the_command_with_val_share_too(form, tmp_path):
    root = WRITERS[form](tmp_path / "raw")
    assert f"run python -m tools.prepare {form} " in message_of(open_parts, str(root), "imagenet", 0.1, False)


def test_shards_in_folders_of_splits_give_the_command_too(tmp_path):
    rows = [(image, None, i % 2) for i, image in enumerate(train_images().values())]
    for split in ("train", "val"):
        raw_data.write_shard(tmp_path / split / "0000.parquet", rows)
        text = message_of(open_source, str(tmp_path), "imagenet", split, False, "no", 0, 1)
        assert "holds Parquet shards: run python -m tools.prepare parquet" in text


def test_validation_by_another_name(image_folder):
    (image_folder / "val").rename(image_folder / "validation")
    text = message_of(open_source, str(image_folder), "imagenet", "val", False, "no", 0, 1)
    command = shlex.split(text.partition("run ")[2])
    assert "has validation/ for val/" in text and command[:2] == ["ln", "-s"]
    Path(command[3]).symlink_to(command[2])
    assert len(open_source(str(image_folder), "imagenet", "val", False, "no", 0, 1).samples) == 6

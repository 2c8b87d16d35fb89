"""Data sets as they come, before `python -m tools.prepare`: what a folder holds, and the command that prepares it."""

import re
import shlex
from pathlib import Path

from .files import class_folders, is_image_name, loose_files

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CLS_LOC = Path("ILSVRC/Data/CLS-LOC")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.\w+$", re.IGNORECASE)
# What others call the splits; `test`, which may have no labels, stands in for want of another.
OTHER_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev", "test")}


def find_cls_loc(root: Path) -> Path | None:
    """Kaggle's folder that holds train/ and val/: `root`, or below it; None where there is none."""
    parts = CLS_LOC.parts
    candidates = [root / "data" / CLS_LOC, *(root.joinpath(*parts[start:]) for start in range(len(parts) + 1))]
    return next((path for path in candidates if (path / "train").is_dir() or (path / "val").is_dir()), None)


def find_shards(root: Path) -> dict[str, list[Path]]:
    """Parquet files of each split, by their names (train-00000-of-00257.parquet) or folders (train/0000.parquet)."""
    known = {name for names in OTHER_NAMES.values() for name in names}
    found: dict[str, list[Path]] = {}
    for folder in (root, root / "data", *(root / name for name in sorted(known))):
        for path in sorted(folder.glob("*.parquet")):
            word = re.split(r"[^a-z]", path.name)[0]
            found.setdefault(word if word in known else folder.name, []).append(path)
    chosen = {split: next((name for name in names if name in found), None) for split, names in OTHER_NAMES.items()}
    return {split: found[name] for split, name in chosen.items() if name}


def is_flat(folder: Path) -> bool:
    """Whether a folder holds images and no class folders."""
    return folder.is_dir() and not class_folders(folder) and any(map(is_image_name, loose_files(folder)))


def raw_form(root: Path) -> str:
    """ImageNet's archives, Kaggle's tree or Parquet shards, and the command for what a folder holds; '' for others."""
    if any((root / tar).is_file() for tar in (TRAIN_TAR, VAL_TAR)):
        return _command("ImageNet's archives", "imagenet", root, root / "imagenet")
    kaggle = find_cls_loc(root)
    if kaggle and is_flat(kaggle / "val") and any(map(_VAL_IMAGE.search, loose_files(kaggle / "val"))):
        kaggle = kaggle.resolve()
        top = kaggle.parents[2] if kaggle.parts[-3:] == CLS_LOC.parts else kaggle.parent
        return _command("ImageNet with a flat val/", "kaggle", root, top / "imagenet", "--links")
    return _command("Parquet shards", "parquet", root, root / "prepared") if find_shards(root) else ""


def how_to_prepare(root: Path, name: str, split: str) -> str:
    """What a folder holds in place of `<name>/<class>/<image>`, and the command for it; '' where it is nothing known.

    `name` is what the folder of `split` ('train' or 'val') must be called.
    """
    if raw := raw_form(root):
        return raw
    renamed = next((other for other in OTHER_NAMES[split] if other != name and (root / other).is_dir()), None)
    if renamed:
        return f"has {renamed}/ for {name}/: run {shlex.join(['ln', '-s', renamed, str(root / name)])}"
    folders = class_folders(root)
    with_images = [folder for folder in folders[:2] if any(map(is_image_name, loose_files(root / folder)))]
    if len(with_images) > 1:
        out = root.resolve().with_name(f"{root.resolve().name}_split")
        return f"{_command('class folders', 'split', root, out, '--links')}; or set DATA.VAL_SHARE 0.1"
    return ""


def raw_annotations(root: Path) -> str:
    """Boxes as Pascal VOC or YOLO have them, and the command that makes COCO's JSON of them; '' for others."""
    yolo = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml", "classes.txt", "labels/classes.txt")
    if any((root / name).is_file() for name in yolo):
        form, what = "yolo", "YOLO's texts"
    elif any(root.rglob("*.xml")):
        form, what = "voc", "XML files, as Pascal VOC has them"
    else:
        return ""
    return f"holds {what}: run {shlex.join(['python', '-m', 'tools.prepare', form, '--data-path', str(root)])}"


def _command(what: str, form: str, root: Path, out: Path, *flags: str) -> str:
    command = shlex.join(["python", "-m", "tools.prepare", form, "--data-path", str(root), "--out", str(out), *flags])
    return f"holds {what}: run {command}, then give --data-path {shlex.quote(str(out))}"

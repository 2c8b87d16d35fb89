"""Bring a data set as it comes into what training reads: python -m tools.prepare FORM --data-path DIR --out DIR

    imagenet   ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (or its folder)
    kaggle     ILSVRC/Data/CLS-LOC with its flat val/, and LOC_val_solution.csv
    parquet    Parquet shards as Hugging Face's hub has them: train-00000-of-00257.parquet ... (needs pyarrow)
    split      one folder of class folders: a part of each class, chosen by content, is for validation

These write DIR/train/<class>/<image> and DIR/val/<class>/<image> into --out, or with --zip train.zip and val.zip with
their maps. The source is only read. Images keep their bytes. Counts are checked. After a kill, the same command goes
on. A split has its name only once all of it is there.

    voc    Pascal VOC: one XML a picture, anywhere below DIR; splits by ImageSets/Main/{train,val}.txt where it has them
    yolo   YOLO: one text a picture, in labels/ or beside the pictures; boxes, or polygons as masks. Names come from
           data.yaml or classes.txt; splits are those of data.yaml, else folders named train, val (valid) and test

These write COCO's JSON, DIR/annotations/instances_{train,val}.json, into --data-path; the pictures stay where they are.
Without splits of its own, every fifth picture is for validation. A split named test is for validation where there is no
val, and else left out. Train with --data-path DIR; MODEL.DETECTOR faster_rcnn where there are no masks.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from configs import UserError
from configs.commands import CommandParser, command
from data.raw import find_cls_loc

from .annotations import READERS, write_annotations
from .class_folders import read_class_folders
from .imagenet import read_kaggle, read_tars
from .parquet import read_shards
from .writing import FolderTarget, Split, ZipTarget, write_split

FORMS: dict[str, Callable[[argparse.Namespace], list[Split]]] = {
    "imagenet": lambda args: read_tars(args.data_path, args.labels),
    "kaggle": lambda args: read_kaggle(args.data_path, args.labels),
    "parquet": lambda args: read_shards(args.data_path),
    "split": lambda args: read_class_folders(args.data_path, args.val_share),
}
# Flags that not all forms take.
FLAGS = {
    "--out": tuple(FORMS),
    "--zip": tuple(FORMS),
    "--links": ("kaggle", "split"),
    "--labels": ("imagenet", "kaggle"),
    "--val-share": ("split",),
    "--allow-missing": ("imagenet", "kaggle"),
}


@command("tools.prepare")
def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the data set of a command line."""
    args = _parse(argv)
    if args.form in READERS:
        write_annotations(args.data_path, args.form)
        print(f"ready: --data-path {args.data_path}")
        return
    kind = ZipTarget if args.zip else FolderTarget
    splits = FORMS[args.form](args)
    for split in splits:
        print(write_split(split, kind(args.out, split.name), args.links, args.allow_missing), flush=True)
    if missing := {"train", "val"} - {split.name for split in splits}:
        print(f"{args.data_path}: has nothing for {missing.pop()}, so only the other split is there")
    print(f"ready: --data-path {args.out}{' --zip' * args.zip}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.prepare", __doc__)
    parser.add_argument("form", metavar="FORM", choices=(*FORMS, *READERS), help="what there is: see above")
    parser.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="the data set as it came")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to; not for voc and yolo")
    parser.add_argument("--zip", action="store_true", help="write zip files: one file a split instead of a million")
    parser.add_argument(
        "--links", action="store_true", help="kaggle, split: link to the images instead of copying them"
    )
    parser.add_argument("--labels", type=Path, metavar="PATH", help="the devkit or LOC_val_solution.csv, if elsewhere")
    parser.add_argument("--val-share", type=float, metavar="SHARE", help="split: of each class; default: 0.1")
    parser.add_argument("--allow-missing", action="store_true", help="take what is there where counts are wrong")
    args = parser.parse_args(argv)
    for flag, forms in FLAGS.items():
        if getattr(args, flag[2:].replace("-", "_")) not in (None, False) and args.form not in forms:
            raise UserError(f"{flag}: is for {', '.join(forms)}, not for {args.form}; leave it out")
    if not args.data_path.is_dir():
        raise UserError(f"--data-path {args.data_path}: no such folder")
    if args.form in FORMS and args.out is None:
        raise UserError(f"--out is missing: the folder to write to; {args.data_path} is only read")
    if args.zip and args.links:
        raise UserError("--links: links are to files, and --zip copies them; leave one out")
    args.val_share = 0.1 if args.val_share is None else args.val_share
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share {args.val_share}: must be between 0 and 1")
    if args.form in FORMS:
        _check_apart(args)
    return args


def _check_apart(args: argparse.Namespace) -> None:
    """Raise UserError where what is written would come between what is read."""
    read, out = args.data_path.resolve(), args.out.resolve()
    if args.form == "kaggle":
        read = (find_cls_loc(args.data_path) or read).resolve()
    within = out.is_relative_to(read) if args.form in ("kaggle", "split") else out == read and args.form == "parquet"
    if within or any(read.is_relative_to(out / name) for name in ("train", "val")):
        raise UserError(f"--out {args.out}: would be mixed with what is read from {read}; choose another folder")


if __name__ == "__main__":
    sys.exit(main())

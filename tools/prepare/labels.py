"""The classes of ImageNet's validation images: from its development kit, or from Kaggle's table."""

import csv
import io
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from configs import UserError
from configs.errors import one_line

GROUND_TRUTH, SYNSETS = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
KAGGLE_TABLE = "LOC_val_solution.csv"
MISSING = f"ILSVRC2012_devkit_t12.tar.gz, which comes with the images, or {KAGGLE_TABLE} of Kaggle"


@dataclass(frozen=True)
class Labels:
    """What is known of ImageNet's images, by their names without suffix and by class (WordNet id)."""

    class_of: Mapping[str, str]  # of validation images
    train_counts: Mapping[str, int] | None  # training images of each class
    origin: Path  # what says so

    @property
    def val_counts(self) -> Counter[str]:
        return Counter(self.class_of.values())


def find_labels(folders: Sequence[Path], named: Path | None) -> Labels | None:
    """Labels from what was named, else from the first of these folders that has some; None where none has.

    Raises UserError where they cannot be read.
    """
    if named is not None:
        if not named.exists():
            raise UserError(f"--labels {named}: no such file or folder")
        return _read(named)
    for folder in folders:
        kits = sorted(path for path in folder.glob("ILSVRC2012_devkit*") if _holds_labels(path))
        for path in (*kits, folder / KAGGLE_TABLE):
            if path.exists():
                return _read(path)
    return None


def _holds_labels(path: Path) -> bool:
    return path.is_dir() or path.name.endswith((".tar", ".tar.gz", ".tgz"))


def _read(path: Path) -> Labels:
    if path.suffix.lower() == ".csv":
        return _read_table(path)
    files = _files_of_kit(path)
    if lacking := [name for name in (GROUND_TRUTH, SYNSETS) if name not in files]:
        raise UserError(f"{path}: has no {lacking[0]}: not ImageNet's development kit")
    return _read_kit(path, files)


def _files_of_kit(path: Path) -> dict[str, bytes]:
    """The two files of a development kit, unpacked or as an archive."""
    try:
        if path.is_dir():
            return {file.name: file.read_bytes() for file in path.rglob("*") if file.name in (GROUND_TRUTH, SYNSETS)}
        with tarfile.open(path) as archive:
            members = {PurePosixPath(member.name).name: member for member in archive if member.isfile()}
            wanted = [name for name in (GROUND_TRUTH, SYNSETS) if name in members]
            return {name: archive.extractfile(members[name]).read() for name in wanted}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}; copy or download it again") from None


def _read_kit(path: Path, files: Mapping[str, bytes]) -> Labels:
    """Line i of the ground truth is the number of the class of validation image i + 1; meta.mat says whose it is."""
    from scipy.io import loadmat  # takes a second to import

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(files[SYNSETS]), squeeze_me=True)["synsets"])
        numbers = [int(word) for word in files[GROUND_TRUTH].split()]
        leaves = synsets[synsets["num_children"] == 0]  # the others are groups of classes
        wnids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in leaves}
        counted = "num_train_images" in synsets.dtype.names
        counts = {str(entry["WNID"]): int(entry["num_train_images"]) for entry in leaves} if counted else None
    except Exception as error:  # scipy raises nearly anything on damaged files
        raise UserError(f"{path}: its {SYNSETS} or {GROUND_TRUTH} cannot be read: {one_line(error)}") from None
    if unknown := next((number for number in numbers if number not in wnids), None):
        raise UserError(f"{path}: {GROUND_TRUTH} has the class {unknown}, which {SYNSETS} does not know")
    return Labels({val_name(i): wnids[number] for i, number in enumerate(numbers, 1)}, counts, path)


def val_name(number: int) -> str:
    """The name of a validation image, which are counted from 1, without its suffix."""
    return f"ILSVRC2012_val_{number:08d}"


def _read_table(path: Path) -> Labels:
    """Lines `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...`: the image, and its objects with their boxes."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        class_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (OSError, UnicodeDecodeError, KeyError, IndexError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path}: needs the columns ImageId and PredictionString, with a class in each line: {one_line(error)}"
        ) from None
    return Labels(class_of, None, path)

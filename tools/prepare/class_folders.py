"""One folder of class folders, split into training and validation by the images' content."""

import hashlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from configs import UserError
from data.sources import FolderSource

from .writing import LabelledImage, Split


def read_class_folders(root: Path, share: float) -> list[Split]:
    """Both splits of `<root>/<class>/<image>`; the same ones on every machine, whatever the order and names of files.

    Of each class those images are for validation whose SHA-256 is lowest: as many as `share` says, rounded, but at
    least one. So the validation images of a larger data set are nearly all still the same. Images of the same content
    come into the same split. Raises UserError for a class of one image, which cannot be in both.
    """
    source = FolderSource(root)
    by_class: dict[str, dict[bytes, list[Path]]] = {name: {} for name in source.classes}
    bar = tqdm(source.samples, desc="reading", unit="image", disable=not sys.stderr.isatty())
    for path, label in bar:
        digest = hashlib.sha256(Path(path).read_bytes()).digest()
        by_class[source.classes[label]].setdefault(digest, []).append(Path(path))
    paths: dict[str, dict[str, list[Path]]] = {"val": {}, "train": {}}
    for name, found in by_class.items():
        if len(found) < 2:
            raise UserError(f"{root / name}: has one image; a class needs two, to train and to validate")
        held_out = min(max(1, round(share * len(found))), len(found) - 1)
        for number, digest in enumerate(sorted(found)):
            paths["val" if number < held_out else "train"].setdefault(name, []).extend(found[digest])
    return [
        Split(
            split,
            source.classes,
            partial(_images, root, of_split),
            {name: len(files) for name, files in of_split.items()},
            f"the files in {root}",
        )
        for split, of_split in paths.items()
    ]


def _images(root: Path, paths: dict[str, list[Path]]) -> Iterator[LabelledImage]:
    for files in paths.values():
        for path in sorted(files):
            yield LabelledImage(path.relative_to(root).as_posix(), path.read_bytes, path)

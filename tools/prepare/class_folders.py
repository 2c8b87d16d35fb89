"""One folder of class folders, split into training and validation by the images' content."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data.holdout import split_by_content
from data.sources import FileSource, FolderSource, count_images

from .writing import LabelledImage, Split


def read_class_folders(root: Path, share: float) -> list[Split]:
    """Both splits of `<root>/<class>/<image>`, those that DATA.VAL_SHARE makes: the same ones on every machine."""
    parts = split_by_content(FolderSource(root), share, setting="--val-share")
    return [
        Split(
            name,
            part.classes,
            partial(_images, root, part),
            dict(zip(part.classes, count_images(part))),
            f"the files in {root}",
        )
        for name, part in reversed(parts.items())  # val first: it is small, and shows soon whether all is well
    ]


def _images(root: Path, source: FileSource) -> Iterator[LabelledImage]:
    for name, _ in source.samples:
        path = Path(name)
        yield LabelledImage(path.relative_to(root).as_posix(), path.read_bytes, path)

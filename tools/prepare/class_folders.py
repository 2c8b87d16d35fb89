"""One folder of class folders, split into training and validation by the images' content."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from configs import UserError
from data.files import class_folders, is_image_name, loose_files
from data.holdout import split_by_content
from data.raw import OTHER_NAMES
from data.sources import FileSource, FolderSource, count_images, list_names

from .writing import LabelledImage, Split


def read_class_folders(root: Path, share: float) -> list[Split]:
    """Both splits of `<root>/<class>/<image>`, those that DATA.VAL_SHARE makes: the same ones on every machine."""
    if splits := _splits(root):
        raise UserError(
            f"{root}: its folders {list_names(splits)} hold class folders, so they are splits and no classes; give the "
            f"one to split, such as --data-path {root / splits[0]}"
        )
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


def _splits(root: Path) -> list[str]:
    """Folders that are called like splits and hold folders instead of images."""
    known = {name for names in OTHER_NAMES.values() for name in names}
    found = [name for name in class_folders(root) if name.lower() in known and class_folders(root / name)]
    return [name for name in found if not any(map(is_image_name, loose_files(root / name)))]


def _images(root: Path, source: FileSource) -> Iterator[LabelledImage]:
    for name, _ in source.samples:
        path = Path(name)
        yield LabelledImage(path.relative_to(root).as_posix(), path.read_bytes, path)

"""Pack a data set for fast reading: python -m tools.pack --data-path DIR --out DIR

Writes train.zip with train_map.txt and val.zip with val_map.txt for DATA.ZIP_MODE: one file per split instead of a
million. Training images with a short side above --short-side are resized to it, and stored as JPEGs of --quality: they
decode faster. All other images keep their bytes, so that an evaluation sees the very same pixels. Exit status: 0 done;
2 wrong use, or an image that cannot be read. A split that fails leaves no files.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs import SPLIT_NAMES, UserError
from configs.commands import CommandParser, command
from data.datasets import ImageDataset, decode_image
from data.sources import FolderSource
from data.splits import open_source, with_classes, without_images
from data.workers import available_cores
from utils.shortages import named_shortages


def shrink(encoded: bytes, short_side: int | None, quality: int) -> bytes:
    """Encoded image -> a JPEG whose short side is `short_side` pixels, or the same bytes if it is not larger, or None.

    Raises what Pillow raises for damaged files, also where the bytes stay the same.
    """
    image = decode_image(encoded)
    if short_side is None or min(image.size) <= short_side:
        return encoded
    scale = short_side / min(image.size)
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pack_split(
    source: FolderSource, out: Path, name: str, short_side: int | None, quality: int, workers: int
) -> tuple[int, int, int]:
    """Write <out>/<name>.zip and <out>/<name>_map.txt, complete or not at all.

    Args:
        source: the images.
        out: an existing folder.
        name: of the split.
        short_side: largest short side, in pixels; None keeps every byte.
        quality: of the new JPEGs, 1 to 95.
        workers: processes that read and shrink; 0: this one.

    Returns the number of images, and their bytes before and after. Raises UserError with the path if an image cannot be
    read or a file cannot be written.
    """
    images = ImageDataset(source, _as_it_is, partial(shrink, short_side=short_side, quality=quality))
    loader = DataLoader(images, batch_size=None, num_workers=workers)
    archive_path, map_path = out / f"{name}.zip", out / f"{name}_map.txt"
    unfinished = [path.with_name(f".{path.name}.partial") for path in (archive_path, map_path)]
    before = after = 0
    try:
        with (
            ZipFile(unfinished[0], "w", ZIP_STORED) as archive,
            open(unfinished[1], "w", encoding="utf-8") as lines,
            named_shortages("lower --workers"),
        ):
            bar = tqdm(loader, desc=name, unit="image", disable=not sys.stderr.isatty())
            for (path, _), (content, label) in zip(source.samples, bar):
                member = Path(path).relative_to(source.root).as_posix()
                if "\n" in member or "\r" in member:
                    raise UserError(f"{member!r}: has a line break in its name, which map files cannot hold; rename it")
                archive.writestr(ZipInfo(member), content)
                lines.write(f"{member}\t{label}\n")
                before, after = before + Path(path).stat().st_size, after + len(content)
        for path, part in zip((archive_path, map_path), unfinished):
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"{error.filename or archive_path}: cannot be written: {error.strerror}") from None
    except UnicodeEncodeError:
        raise UserError(f"{member!r}: not a name in UTF-8, which map files need; rename it") from None
    finally:
        for part in unfinished:
            part.unlink(missing_ok=True)
    return len(source.samples), before, after


def _as_it_is(encoded: bytes) -> bytes:
    return encoded


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.pack", __doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="folder that holds train/ and val/")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the zip files")
    parser.add_argument("--dataset", choices=tuple(SPLIT_NAMES), default="imagenet", help="decides the splits' names")
    parser.add_argument("--short-side", type=int, default=320, metavar="N", help="of training images, at most")
    parser.add_argument("--quality", type=int, default=95, metavar="N", help="of the new JPEGs, 1 to 95")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="processes, one per core")
    args = parser.parse_args(argv)
    if args.short_side < 32:
        raise UserError(f"--short-side {args.short_side}: at least 32 pixels")
    if not 1 <= args.quality <= 95:
        raise UserError(f"--quality {args.quality}: 1 to 95")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: at least 0")
    return args


@command("tools.pack")
def main(argv: Sequence[str] | None = None) -> None:
    """Pack both splits. `argv` are the arguments without the program's name."""
    args = _parse(argv)
    out = Path(args.out)
    names = SPLIT_NAMES[args.dataset]
    existing = [path for name in names.values() for path in (out / f"{name}.zip", out / f"{name}_map.txt")]
    if found := next((path for path in existing if path.exists()), None):
        raise UserError(f"{found}: exists already; remove it, or choose another --out")
    sources = {split: open_source(args.data_path, args.dataset, split, False, "no", 0, 1) for split in names}
    sources["val"] = with_classes(sources["val"], sources["train"].classes, args.data_path)
    for split, source in sources.items():
        if source.left_out:
            print(f"{names[split]}: left out: {source.left_out}")
    if few := without_images(sources["val"]):
        print(few)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
    for split in ("val", "train"):  # the short one first, so that mistakes show early
        source = sources[split]
        short_side = args.short_side if split == "train" else None
        count, before, after = pack_split(source, out, names[split], short_side, args.quality, args.workers)
        print(f"{out / names[split]}.zip: {count} images, {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now")


if __name__ == "__main__":
    sys.exit(main())

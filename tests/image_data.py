"""Image folders and zip files to test with, and what is read from them."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import UserError
from data.datasets import decode_image
from data.sources import FolderSource


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def made_images() -> dict[str, tuple[Image.Image, str, dict]]:
    rng = np.random.default_rng(3)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (20, 31, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated; the reference does not turn it
    return {
        "rgb.png": (rgb, "PNG", {}),
        "rgb.jpeg": (rgb, "JPEG", {}),
        "grey.png": (rgb.convert("L"), "PNG", {}),
        "grey.jpeg": (rgb.convert("L"), "JPEG", {}),
        "bilevel.png": (rgb.convert("1"), "PNG", {}),
        "grey_alpha.png": (rgba.convert("LA"), "PNG", {}),
        "cmyk.jpeg": (rgb.convert("CMYK"), "JPEG", {}),
        "rgba.png": (rgba, "PNG", {}),
        "palette.png": (rgb.convert("P"), "PNG", {}),
        "palette_transparent.png": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "rotated.jpeg": (rgb, "JPEG", {"exif": exif}),
        "one_pixel.png": (rgb.crop((0, 0, 1, 1)), "PNG", {}),
        "lossy.webp": (rgb, "WEBP", {}),
        "lossless.webp": (rgba, "WEBP", {"lossless": True}),
        "rgb.bmp": (rgb, "BMP", {}),
        "rgb.tiff": (rgb, "TIFF", {}),
        "rgb.ppm": (rgb, "PPM", {}),
    }


UNREADABLE = {
    "truncated.png": png(5, (64, 64))[:90],
    "empty.png": b"",
    "text.png": b"this is no image",
    "header_only.png": png(5)[:16],
    "zeros.png": bytes(1000),
}


def write_zip(root: Path, split: str, members: dict[str, bytes], lines: list[str], **options) -> None:
    root.mkdir(exist_ok=True)
    with zipfile.ZipFile(root / f"{split}.zip", "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    (root / f"{split}_map.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def zip_image_folder(folder: Path, zipped: Path) -> None:
    """Zip an image folder as the released tools do: train.zip and train_map.txt, val.zip and val_map.txt."""
    for split in ("train", "val"):
        source = FolderSource(folder / split)
        names = [os.path.relpath(path, folder / split) for path, _ in source.samples]
        members = {name: source.read(index) for index, name in enumerate(names)}
        lines = [f"{name}\t{label}" for name, (_, label) in zip(names, source.samples)]
        write_zip(zipped, split, members, lines)


def pixels(source) -> list[bytes]:
    return [decode_image(source.read(index)).tobytes() for index in range(len(source.samples))]


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def released(make_config, *opts):
    config = make_config("--cfg", str(Path(__file__).resolve().parents[1] / "configs" / "groupmixformer_small.yaml"))
    config = config.clone()
    config.merge_from_list(list(opts))
    return config

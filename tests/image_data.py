"""Image folders and zip files to test with, and what is read from them."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import UserError
from data.datasets import decode_image
from data.files import IMAGE_SUFFIXES
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


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, bits: int, sample_format: int = 1) -> bytes:
    """A grey TIFF of (H, W) values, as cameras and microscopes write them and Pillow does not; 12 bits are packed."""
    if bits == 12:
        pairs = values.reshape(-1, 2).tolist()
        pixels = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    else:
        pixels = values.astype("<i2" if sample_format == 2 else "<u2").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: height}
    tags |= {279: len(pixels), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def deep_png(values: np.ndarray, bands: int = 3) -> bytes:
    """A PNG of 16 bits a colour, from (H, W) values of all bands: 2 are grey and transparency, 3 RGB, 4 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + np.repeat(row, bands).astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *reversed(values.shape), 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_images() -> dict[str, tuple[bytes, bool]]:
    """Images of unusual modes by name: the file, and whether it comes out nearly constant though it is not."""
    ramp = np.arange(1024).reshape(32, 32) / 1023  # from 0 to 1
    grey = Image.fromarray((255 * ramp).astype(np.uint8))
    shape = Image.merge("LA", (Image.new("L", (32, 32)), grey))  # black, drawn by its transparency
    indexed, black = grey.convert("P"), grey.convert("P")
    black.putpalette(bytes(768))

    def of(values: np.ndarray, kind: type) -> Image.Image:
        return Image.fromarray(values.astype(kind))

    images = {
        "16.png": (encoded(of(65535 * ramp, np.uint16), "PNG"), False),
        "16.tif": (encoded(of(65535 * ramp, np.uint16), "TIFF"), False),
        "16_big_endian.tif": (encoded(of(65535 * ramp, ">u2"), "TIFF"), False),
        "16.pgm": (encoded(of(65535 * ramp, np.uint16), "PPM"), False),
        "16_constant.png": (encoded(of(300 + 0 * ramp, np.uint16), "PNG"), False),
        "16_rgb.png": (deep_png(65535 * ramp), False),
        "16_rgb_constant.png": (deep_png(7 + 0 * ramp), False),
        "12_of_16_rgb.png": (deep_png(4095 * ramp), True),
        "8_of_16_rgb.png": (deep_png(255 * ramp), True),
        "8_of_16_rgba.png": (deep_png(255 * ramp, 4), True),
        "16_grey_alpha_constant.png": (deep_png(7 + 0 * ramp, 2), False),
        "12_of_16.png": (encoded(of(4095 * ramp, np.uint16), "PNG"), True),
        "12.tif": (tiff((4095 * ramp).astype(int), 12), False),
        "mask_of_16.png": (encoded(of(ramp > 0.5, np.uint16), "PNG"), True),
        "signed.tif": (tiff((255 * ramp).astype(int), 16, 2), False),
        "32.tif": (encoded(of(255 * ramp, np.int32), "TIFF"), False),
        "32_clipped.tif": (encoded(of(65535 * ramp, np.int32), "TIFF"), True),
        "32_part_clipped.tif": (encoded(of(np.where(ramp < 0.4, 255 * ramp, 9000 * ramp), np.int32), "TIFF"), True),
        "float_255.tif": (encoded(of(255 * ramp, np.float32), "TIFF"), False),
        "float_1.tif": (encoded(of(ramp, np.float32), "TIFF"), True),
        "float_nan.tif": (encoded(of(np.where(ramp < 0.1, np.nan, 255 * ramp), np.float32), "TIFF"), False),
        "rgba.png": (encoded(Image.merge("RGBA", (grey, grey, grey, grey)), "PNG"), False),
        "shape.png": (encoded(shape, "PNG"), True),
        "shape.tif": (encoded(shape, "TIFF"), True),
        "palette.png": (encoded(indexed, "PNG", transparency=3), False),
        "palette_shape.png": (encoded(black, "PNG", transparency=bytes(range(256))), True),
        "lab.tif": (encoded(Image.merge("LAB", (grey, grey, grey)), "TIFF"), False),
        "ycbcr.tif": (encoded(Image.merge("YCbCr", (grey, grey, grey)), "TIFF"), False),
        "cmyk.tif": (encoded(Image.merge("CMYK", (grey, grey, grey, grey)), "TIFF"), False),
        "palette_alpha.tif": (encoded(grey.convert("P").convert("PA"), "TIFF"), False),
        "animated.gif": (encoded(grey, "GIF", save_all=True, append_images=[shape.convert("L")]), False),
        "begins_blank.gif": (encoded(shape.convert("L"), "GIF", save_all=True, append_images=[grey]), True),
        "blank_page.tif": (encoded(shape.convert("L"), "TIFF", save_all=True, append_images=[grey]), True),
        "photo.jfif": (encoded(grey, "JPEG"), False),
    }
    if ".avif" in IMAGE_SUFFIXES:
        images["photo.avif"] = (encoded(grey, "AVIF"), False)
    return images


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

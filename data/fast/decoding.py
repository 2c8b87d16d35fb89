"""Decode images to uint8 tensors: whole, or only the region that a crop shows.

Whole JPEGs are decoded by torchvision, regions by nvImageCodec where it is installed (requirements-extras.txt; CPU
only): libjpeg-turbo then skips what lies outside, and stops below. Pixels of intact files are Pillow's in all of these
ways, which is tested, and what none of them can do is left to Pillow, whose errors are those of `decode_image`.
"""

import contextlib
import importlib.util
import io
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.datasets import IMAGE_FORMATS, decode_image

try:  # torchvision 0.29 announces that its decoders will go; Pillow's way costs 0.2 ms more an image
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

_EXTENSIONS = "NVIMGCODEC_EXTENSIONS_PATH"
_VERBOSITY = "PYNVIMGCODEC_VERBOSITY"
_END_OF_JPEG = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in a scan: no stuffed zero, no restart, no padding
_one_at_a_time = threading.Lock()  # threads that share a decoder break it


class EncodedImage:
    """An image file's bytes, of which only the header is read yet; pixels are decoded when they are asked for.

    `header` is Pillow's image, closed: it tells the size. The same errors as `decode_image` for damaged files.
    """

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded
        file = io.BytesIO(encoded)
        with Image.open(file, formats=IMAGE_FORMATS) as self.header:
            # CMYK is converted differently.
            self.plain_jpeg = self.header.format == "JPEG" and self.header.mode in ("RGB", "L")
            self.scan_start = file.tell()  # where Pillow stops to read a JPEG's header

    def whole(self) -> Tensor:
        """uint8 (H, W, 3), with the pixels of `decode_image`."""
        if self.plain_jpeg and decode_jpeg is not None:
            # What torchvision refuses, Pillow may accept. A bytearray, because torch warns of read-only buffers.
            with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
                warnings.simplefilter("ignore", DeprecationWarning)
                image = decode_jpeg(torch.frombuffer(bytearray(self.encoded), dtype=torch.uint8), ImageReadMode.RGB)
                return image.permute(1, 2, 0)
        return torch.from_numpy(np.array(decode_image(self.encoded)))

    def region(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 (height, width, 3): this part of `whole`."""
        pixels = None
        # timm draws regions without pixels from images of a pixel or two.
        if height and width and self.plain_jpeg and self._is_one_scan():
            with _one_at_a_time:
                decode = _region_decoder(os.getpid())
                if decode is not None:
                    pixels = decode(self.encoded, (top, left), (top + height, left + width))
        if pixels is None:
            return self.whole()[top : top + height, left : left + width]
        return torch.from_numpy(pixels)

    def _is_one_scan(self) -> bool:
        """Whether nothing but the end follows a JPEG's first scan.

        Regions of others are not decoded alone: a marker that decoders refuse could lie behind one, and where a
        progressive JPEG lacks scans, its blocks are smoothed by those beside them.
        """
        marker = _MARKER.search(self.encoded, self.scan_start)
        return marker is not None and marker[0] == _END_OF_JPEG and marker.end() == len(self.encoded)


def decode_to_tensor(encoded: bytes) -> Tensor:
    """Decode to a uint8 tensor (H, W, 3), with the pixels of `decode_image`, and the same errors for damaged files."""
    return EncodedImage(encoded).whole()


def decodes_regions() -> bool:
    """Whether nvImageCodec is there, without which `region` decodes whole images."""
    with _one_at_a_time:
        return _region_decoder(os.getpid()) is not None


@cache
def _region_decoder(process: int) -> Callable[[bytes, tuple[int, int], tuple[int, int]], np.ndarray | None] | None:
    """From a JPEG, and the first and last + 1 row and column, to pixels (None: it cannot); None without nvImageCodec.

    One for each process, made when that first needs it: what a process made before it forked is not for its child.
    """
    no_gpu = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY of its C interface
    try:
        nvimgcodec = _import_nvimgcodec()
        backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
        decoder = nvimgcodec.Decoder(device_id=no_gpu, max_num_cpu_threads=1, backends=backends)
    except (ImportError, OSError, RuntimeError):  # not there, not for this machine, no room for temporary files
        return None
    # Pillow does not turn images as their EXIF asks, either.
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def decode(encoded: bytes, start: tuple[int, int], end: tuple[int, int]) -> np.ndarray | None:
        region = nvimgcodec.Region(start=start, end=end)
        image = decoder.decode(nvimgcodec.CodeStream(encoded).get_sub_code_stream(region=region), params=params)
        return None if image is None else np.asarray(image.cpu())

    return decode


def _import_nvimgcodec() -> Any:
    """nvImageCodec with its decoder for JPEGs alone: the others, for GPUs, print which libraries they miss.

    ImportError where there is none, or one before 0.9: those ask the CUDA driver, which forked workers must not.
    """
    found = importlib.util.find_spec("nvidia.nvimgcodec")
    if found is None or found.origin is None:
        raise ImportError("no nvImageCodec")
    before = {name: os.environ.get(name) for name in (_EXTENSIONS, _VERBOSITY)}
    with tempfile.TemporaryDirectory() as folder:
        for library in (Path(found.origin).parent / "extensions").glob("libjpeg_turbo_ext*"):
            (Path(folder) / library.name).symlink_to(library)
        os.environ.update({_EXTENSIONS: folder, _VERBOSITY: "0"})  # read when it is imported
        try:
            from nvidia import nvimgcodec
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    version = re.match(r"(\d+)\.(\d+)", nvimgcodec.__version__)
    if version is None or tuple(map(int, version.groups())) < (0, 9):
        raise ImportError(f"nvImageCodec {nvimgcodec.__version__} is too old")
    return nvimgcodec

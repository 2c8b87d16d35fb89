"""Decode images to uint8 tensors: whole, or only the region that a crop shows.

torchvision decodes whole JPEGs. nvImageCodec, if installed (requirements-extras.txt; on CPUs), decodes regions:
libjpeg-turbo then skips what lies outside, and stops below. Intact files have Pillow's pixels in each of these ways;
tests hold that. Pillow decodes everything else, and its errors are those of `decode_image`.
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

from data.decoding import decode_image
from data.files import IMAGE_FORMATS

try:  # torchvision 0.29 announces that it drops its decoders; Pillow takes 0.2 ms more an image
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

_EXTENSIONS = "NVIMGCODEC_EXTENSIONS_PATH"
_VERBOSITY = "PYNVIMGCODEC_VERBOSITY"
_END_OF_JPEG = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in a scan: no stuffed zero, no restart, no padding
_one_at_a_time = threading.Lock()  # a decoder breaks if threads share it


class EncodedImage:
    """An image file of which only the header has been read. `header` is Pillow's image, closed; it knows the size.

    Raises what `decode_image` raises for damaged files.
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
            # Pillow may accept what torchvision refuses. A bytearray, because torch warns of read-only buffers.
            with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
                warnings.simplefilter("ignore", DeprecationWarning)
                image = decode_jpeg(torch.frombuffer(bytearray(self.encoded), dtype=torch.uint8), ImageReadMode.RGB)
                return image.permute(1, 2, 0)
        return torch.from_numpy(np.array(decode_image(self.encoded)))

    def region(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 (height, width, 3): this part of `whole`."""
        pixels = None
        # timm draws empty regions from images of a pixel or two.
        if height and width and self.plain_jpeg and self._is_one_scan():
            with _one_at_a_time:
                decode = _region_decoder(os.getpid())
                if decode is not None:
                    pixels = decode(self.encoded, (top, left), (top + height, left + width))
        if pixels is None:
            return self.whole()[top : top + height, left : left + width]
        return torch.from_numpy(pixels)

    def _is_one_scan(self) -> bool:
        """Whether a JPEG has one scan, with nothing after it.

        A marker that decoders refuse could follow a region. A progressive JPEG may lack scans, and then decoders smooth
        each block by its neighbours. Both are decoded whole.
        """
        marker = _MARKER.search(self.encoded, self.scan_start)
        return marker is not None and marker[0] == _END_OF_JPEG and marker.end() == len(self.encoded)


def decode_to_tensor(encoded: bytes) -> Tensor:
    """Decode to a uint8 tensor (H, W, 3), with the pixels and the errors of `decode_image`."""
    return EncodedImage(encoded).whole()


@cache
def _region_decoder(process: int) -> Callable[[bytes, tuple[int, int], tuple[int, int]], np.ndarray | None] | None:
    """A function from a JPEG, its first row and column, and its last ones + 1, to pixels; None without nvImageCodec.

    Pixels are None where it cannot decode. Each process makes its own decoder, because none survives a fork.
    """
    no_gpu = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY of its C interface
    try:
        nvimgcodec = _import_nvimgcodec()
        backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
        decoder = nvimgcodec.Decoder(device_id=no_gpu, max_num_cpu_threads=1, backends=backends)
    except (ImportError, OSError, RuntimeError):  # not installed, not for this machine, no room for temporary files
        return None
    # Pillow, too, ignores the orientation that EXIF asks for.
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def decode(encoded: bytes, start: tuple[int, int], end: tuple[int, int]) -> np.ndarray | None:
        region = nvimgcodec.Region(start=start, end=end)
        image = decoder.decode(nvimgcodec.CodeStream(encoded).get_sub_code_stream(region=region), params=params)
        return None if image is None else np.asarray(image.cpu())

    return decode


def _import_nvimgcodec() -> Any:
    """nvImageCodec with its JPEG decoder alone: the others are for GPUs, and print which libraries they miss.

    ImportError without it, and before version 0.9, which calls the CUDA driver: forked workers must not.
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

"""From the bytes of a file to an image, exactly; `data/fast/decoding.py` gives the same pixels faster."""

import io

import numpy as np
from PIL import Image, ImageOps

from .files import IMAGE_FORMATS

FEW_LEVELS = 32  # of 256; an image within so few is nearly constant to look at
_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp")  # where Pillow looks for it
_JPEG = b"\xff\xd8"  # begins every JPEG: 8 bits, no transparency
_MOSTLY = 0.5  # of the pixels
_PIXELS_COMPARED = 2**16
_FRAMES_COMPARED = 16


def decode_image(encoded: bytes) -> Image.Image:
    """Decode to RGB as torchvision's default loader does; 16 bits a pixel become their upper 8 instead of white."""
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
        return to_rgb(image)


def upright(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """The image as its EXIF turns it, which is how programs show it; a damaged EXIF turns nothing.

    With `size`, (width, height), only where it then has that size: some data sets describe what the file stores.
    """
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises nearly anything on damaged EXIF
        return image
    return turned if size in (None, turned.size) else image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, decided by the mode, as Pillow opens IMAGE_FORMATS.

    - 1, L, LA, P, PA, RGB, RGBA, CMYK, YCbCr, LAB: 8 bits or fewer; Pillow's conversion. Transparency is left out.
    - I;16 in either byte order, and I but for TIFF (PNG, PPM): a range of 16 bits, of 12 in a TIFF that says so.
    - I of a TIFF (32 bits, or with a sign) and F have no range: values from 0 to 255 count, others are clipped.
    """
    if bits := _defined_bits(image):
        values = np.asarray(image).astype(np.int64)
        levels = Image.fromarray(np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)).convert("RGB")
        levels.info |= {key: value for key, value in image.info.items() if key in _ORIENTATION}  # for `upright`
        return levels
    if image.mode == "La":  # Pillow converts it to LA alone
        image = image.convert("LA")
    return image.convert("RGB")


def _defined_bits(image: Image.Image) -> int:
    """Bits of the range of a pixel that has more than 8 and a range; 0 for others."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        bits_per_sample = 258
        return 12 if image.format == "TIFF" and image.tag_v2.get(bits_per_sample) == (12,) else 16
    return 0


def lost_content(encoded: bytes) -> str:
    """Why an image comes out nearly constant although its file is not, in words; '' where that is not so.

    Depth, transparency, or an animation's first frame may be the reason. It costs nothing for JPEGs, and a look at the
    header for other images of 8 bits without transparency. Raises what `decode_image` raises.
    """
    if encoded.startswith(_JPEG):
        return ""
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
        if image.mode[0] in "IF":
            return _lost_values(np.asarray(image), np.asarray(to_rgb(image))[..., 0], not _defined_bits(image))
        deep = ";16" in str(image.tile[:1])  # 16 bits a colour, of which Pillow keeps the upper 8
        frames = image.n_frames if getattr(image, "is_animated", False) else 1
        if not (deep or frames > 1 or image.has_transparency_data):
            return ""
        colours = _contrast(to_rgb(image))
        if colours >= FEW_LEVELS:
            return ""
        if image.has_transparency_data and _contrast(_transparency(image)) >= FEW_LEVELS:
            return "its picture is in the transparency, which is left out; save it without transparency"
        if deep and (colours or _contrast(_lower_bytes(encoded))):
            return f"its values of 16 bits become {colours + 1} of 256 levels; save it with 8 bits"
        for frame in range(1, min(frames, _FRAMES_COMPARED)):
            image.seek(frame)
            if _contrast(to_rgb(image)) >= FEW_LEVELS:
                return f"it is one colour in the first of its {frames} frames, which is read; save another one"
    return ""


def _contrast(image: Image.Image) -> int:
    """The difference between the highest and the lowest level, of the colour where it is largest."""
    return max(int(np.ptp(np.asarray(band.getextrema()))) for band in image.split())


def _transparency(image: Image.Image) -> Image.Image:
    return image.convert("LA" if image.mode == "La" else "RGBA").getchannel("A")


def _lower_bytes(encoded: bytes) -> Image.Image:
    """What of a colour PNG's 16 bits is not read: the other byte order. The image as it is read, for other formats."""
    image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    if image.format == "PNG" and image.tile[0].args in ("RGB;16B", "RGBA;16B"):  # LA;16B has no such reader
        image.tile = [tile._replace(args=tile.args.replace("16B", "16L")) for tile in image.tile]
    return image


def _lost_values(before: np.ndarray, after: np.ndarray, clipped: bool) -> str:
    """For grey values (H, W), and the levels that they become; `clipped` where all but 0 to 255 is."""
    step = max(1, before.size // _PIXELS_COMPARED)
    before, after = before.ravel()[::step], after.ravel()[::step]
    if len(np.unique(before)) < 2 * len(np.unique(after)):
        return ""
    low, high = np.percentile(after, (1, 99))
    outside = 1 - np.mean((before >= 0) & (before < 256)) if clipped else 0
    if high - low >= FEW_LEVELS and outside <= _MOSTLY:
        return ""
    values = f"{np.nanmin(before):.4g} to {np.nanmax(before):.4g}"
    return f"its values {values} become levels {after.min()} to {after.max()} of 0 to 255; save it with 8 bits"

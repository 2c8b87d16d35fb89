"""Pages of HTML that contain all that they show: they open offline and fetch nothing."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# Browsers refuse what a class name or a file's name might try to fetch.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, style: str, body: str) -> str:
    """A whole page, with its title as heading. `style` is CSS, `body` HTML whose text is escaped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style></head>\n<body><h1>{text(title)}</h1>\n{body}\n"
        "</body></html>\n"
    )


def text(value: Any) -> str:
    """Escaped for HTML. Bytes of a file name that are no text are shown as \\x.."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def data_uri(encoded: bytes, kind: str) -> str:
    """The bytes of a picture file, of kind 'png' or 'jpeg', as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def jpeg(picture: Image.Image, quality: int) -> str:
    """A picture as the address of a JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return data_uri(buffer.getvalue(), "jpeg")


def with_titles(sheet: Image.Image, titles: Sequence[str]) -> Image.Image:
    """A sheet of columns of equal width, with a title above each."""
    font, height = ImageFont.load_default(size=14), 20
    titled = Image.new("RGB", (sheet.width, sheet.height + height), "white")
    titled.paste(sheet, (0, height))
    canvas = ImageDraw.Draw(titled)
    for number, title in enumerate(titles):
        canvas.text((number * sheet.width / len(titles) + 3, 1), title, fill="black", font=font)
    return titled

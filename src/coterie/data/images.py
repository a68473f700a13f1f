"""From the bytes of a picture file to an 8-bit grey ("L") or colour ("RGB") picture, the same way for every reader.

What is done, in this order:
- the first frame is taken of an animation;
- the EXIF orientation is applied (a photo taken upright stands upright);
- 16-bit grey is scaled to 8 bits (Pillow's own conversion would clip it to white);
- transparency is laid over white;
- the rest (palette, CMYK, YCbCr, LAB, 1 bit) is Pillow's conversion; grey from colour is the ITU-R 601 luma, colour
  from grey repeats the channel. Colour profiles are ignored.
A picture that cannot be decoded raises `BadSample`, with a reason short enough for a line of a log.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

# fmt: off
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".tga", ".avif",
})
# fmt: on
"""Names of files that are taken for pictures, in lower case."""

MODES = {1: "L", 3: "RGB"}

_GREY_MODES = frozenset({"1", "L", "LA", "I", "F"})
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadSample(Exception):
    """A picture that cannot be read: its `name` (a path, where it has one) and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Header(NamedTuple):
    """What the first bytes of a picture tell: its upright size in pixels and whether it is grey."""

    height: int
    width: int
    grey: bool


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that can always be printed, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decode_image(data: bytes, channels: int, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a picture.

    Args:
        data: the bytes of the file.
        channels: 1 for grey ("L"), 3 for colour ("RGB").
        name: what to call the picture in an error.
        size: (height, width) that annotations of the picture refer to. Some were made on the picture as it lies in the
            file, some on the upright one: the EXIF orientation is then applied only where it leads to this size.

    Raises:
        BadSample: the bytes are empty, damaged, cut off, in a form without an agreed 8-bit meaning, or not of `size`.
    """
    image = _open(data, name)
    try:
        image.load()
        stands = upright(image)
        if size is not None and (stands.height, stands.width) != size:
            if (image.height, image.width) != size:
                found = f"{stands.width}x{stands.height}"
                raise BadSample(name, f"the picture is {found}, its annotation says {size[1]}x{size[0]}")
            stands = image
        return to_mode(stands, channels)
    except BadSample:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything, from OSError to IndexError
        raise BadSample(name, _reason(error)) from error


def read_image(path: str | os.PathLike[str], channels: int) -> Image.Image:
    """Read one picture file as `decode_image` does. A missing or unreadable file is a BadSample too."""
    name = printable(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadSample(name, _reason(error)) from error
    return decode_image(data, channels, name)


def read_header(data: bytes, name: str) -> Header:
    """Read size and colour of a picture without decoding it. Raises BadSample where that is impossible."""
    image = _open(data, name)
    width, height = image.size
    if _orientation(image) >= 5:
        width, height = height, width
    return Header(height, width, image.mode in _GREY_MODES or image.mode.startswith("I;16"))


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    method = _TRANSPOSITIONS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert a decoded picture of any Pillow mode to "L" or "RGB" by the rules at the top of this file.

    Raises:
        ValueError: `channels` is neither 1 nor 3, or the mode has no agreed 8-bit meaning (floating point, 32-bit
            integers).
    """
    if channels not in MODES:
        raise ValueError(f"channels: got {channels}, takes 1 (grey) or 3 (RGB)")
    mode = MODES[channels]
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_from_16_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: convert to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert(mode)


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise BadSample(name, "the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # as in decode_image
        raise BadSample(name, _reason(error)) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # unreadable metadata (nearly any exception) is no reason to lose a readable picture
        return 1


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise ValueError("pixels beyond 16 bits have no agreed range: convert to 8 or 16 bits")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in any format Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

"""Decoding and encoding pictures. Pillow is the truth of what decodes and to what; simplejpeg does the same
faster where it can."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from builder import formats
from builder.errors import RowError

Pixels = npt.NDArray[np.uint8]

#: Pictures with more pixels are refused before they are decoded: a decompression bomb of a few KB fills the memory.
MAX_PIXELS = 100_000_000

#: Pixels that are converted to RGB at a time.
_CONVERTED = 4_000_000

#: simplejpeg comes with the extra `faces`; without it Pillow decodes everything.
_HAS_SIMPLEJPEG = importlib.util.find_spec("simplejpeg") is not None

# Pillow warns below the limit of this module, which refuses by itself. Set once: `warnings.catch_warnings` is not safe
# in threads, and pictures are decoded in several.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")  # its words on a picture's faults: a million of them fill a log


#: Formats that are decoded, by Pillow's names. Some of its others are no decoders: EPS runs Ghostscript on the data.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


#: zlib's level of a PNG: half the time of Pillow's own, 6, for 0.2 % more bytes of a photo of 384 px.
_PNG_LEVEL = 4
#: Formats that are encoded, by Pillow's names.
_PILLOW = {formats.JPG: "JPEG", formats.PNG: "PNG", formats.WEBP: "WEBP"}


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decode(data: bytes) -> Pixels:
    """Decodes a picture to uint8 (height, width, 3) RGB, its first frame, as stored (no EXIF rotation).

    Raises:
        RowError: no picture that Pillow knows, damaged, cut short, or more than `MAX_PIXELS`.
    """
    with _opened(data) as image:
        fast = _jpeg(data, image)
        return _rgb(image) if fast is None else fast


def pixels_of(data: bytes) -> int:
    """How many pixels a picture has, by its header.

    Raises:
        RowError: as `decode`, as far as the header tells.
    """
    with _opened(data) as image:
        return image.width * image.height


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet; whatever its decoder raises is a RowError."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                what = f"the picture has {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}"
                raise RowError("too_large", what)
            yield image
    except (RowError, MemoryError):
        raise
    except UnidentifiedImageError:  # its own text holds an address in memory, which differs in every run
        raise RowError("undecodable", "the picture does not decode: no image format begins so") from None
    except Exception as error:  # each of Pillow's decoders has its own: RuntimeError, SyntaxError, struct.error ...
        raise RowError("undecodable", f"the picture does not decode: {error}") from error


def _rgb(image: Image.Image) -> Pixels:
    """The pixels of a picture, converted some rows at a time: at once the largest ones take twice the memory."""
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(_CONVERTED // image.width, 1)
    for top in range(0, image.height, rows):
        part = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(part.convert("RGB"))
    return pixels


def _jpeg(data: bytes, image: Image.Image) -> Pixels | None:
    """The pixels of a plain JPEG, bit for bit those of Pillow; None where only Pillow will do.

    Both stand on libjpeg-turbo with the same transform and upsampling. simplejpeg's strict mode fails on whatever the
    library warns of; Pillow, which forgives some of that, then says whether the picture decodes.
    """
    if not _HAS_SIMPLEJPEG or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if image.info.get("adobe_transform", 1) != 1:  # not YCbCr
        return None
    import simplejpeg

    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def encode(pixels: Pixels, kind: str, quality: int) -> bytes:
    """A picture of uint8 (height, width, 3) RGB: a baseline JPEG, 4:2:0, a lossless PNG, or a lossy WebP.

    JPEG by simplejpeg, without the interpreter's lock. Pillow's bytes differ, though both stand on libjpeg-turbo: there
    is no falling back on it.

    Args:
        kind: one of `formats.FORMATS`.
        quality: 1..100; PNG has none.
    """
    if kind != formats.JPG:
        return encoded(Image.fromarray(pixels), kind, quality)
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False)
    return data


def encoded(image: Image.Image, kind: str, quality: int, *, remark: str = "") -> bytes:
    """A picture by Pillow.

    Args:
        kind: one of `formats.FORMATS`.
        quality: 1..100; PNG has none.
        remark: text that the file carries beside the picture: as comment, as text chunk, as EXIF's ImageDescription.
    """
    options: dict[str, Any] = {"compress_level": _PNG_LEVEL} if kind == formats.PNG else {"quality": quality}
    if remark and kind == formats.JPG:
        options["comment"] = remark.encode()
    elif remark and kind == formats.PNG:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Comment", remark)
    elif remark:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.ImageDescription] = remark
    buffer = io.BytesIO()
    image.save(buffer, _PILLOW[kind], **options)
    return buffer.getvalue()

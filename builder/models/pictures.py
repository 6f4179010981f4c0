"""Decoding pictures as viewers show them, and encoding them.

Pillow decides what decodes, and to which pixels; simplejpeg does the same faster where it can.
"""

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
from PIL.TiffImagePlugin import TiffImageFile

from builder import formats, machine
from builder.errors import RowError

Pixels = npt.NDArray[np.uint8]

#: Pictures with more pixels are refused before they are decoded: a decompression bomb of a few KB can fill the memory.
MAX_PIXELS = 100_000_000

#: Pixels that are converted to RGB at a time.
_CONVERTED = 4_000_000

#: Largest factor by which libjpeg shrinks each side of a picture in its transform.
_MOST_IN_TRANSFORM = 8

#: TIFF's tags: what the numbers stand for, and how many bits a value has. Source: TIFF 6.0, section 8.
_PHOTOMETRIC, _WHITE_IS_ZERO, _BITS = 262, 0, 258

#: How pixels become upright, by EXIF's orientation: rows and columns change places, then rows are turned round, then
#: columns. Source: CIPA DC-008, 4.6.5.1.6.
_TURNS = {
    2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1), 5: (True, 1, 1), 6: (True, 1, -1), 7: (True, -1, -1),
    8: (True, -1, 1),
}  # fmt: skip

#: simplejpeg comes with the extra `faces`; without it Pillow decodes everything.
_HAS_SIMPLEJPEG = importlib.util.find_spec("simplejpeg") is not None

# Pillow warns below the limit of this module, which refuses by itself. Set once: `warnings.catch_warnings` is not safe
# in threads, and pictures are decoded in several.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")  # its warnings about pictures would fill a log


#: Formats that are decoded, by Pillow's names. Some of its others do not decode by themselves: EPS runs Ghostscript.
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


def decode(data: bytes, most_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes a picture, its first frame, to uint8 (height, width, 3) RGB as viewers show it.

    It is upright by its EXIF orientation; transparent parts are on white; of 16-bit values the high 8 bits count.

    Args:
        most_pixels: a picture with more is halved until it has at most these, a JPEG within its transform; a smaller
            picture keeps its own pixels.

    Raises:
        RowError: not a picture that Pillow knows, damaged, cut short, more than `MAX_PIXELS`, or of numbers with no
            known value for white.
    """
    with _opened(data) as image:
        factor = 1
        while image.width * image.height > most_pixels * factor * factor:
            factor *= 2
        is_jpeg = image.format in ("JPEG", "MPO") and min(image.size) >= factor
        in_transform = min(factor, _MOST_IN_TRANSFORM) if is_jpeg else 1
        pixels = _jpeg(data, image, in_transform)
        if pixels is None:
            if in_transform > 1:
                image.draft(None, (image.width // in_transform, image.height // in_transform))
            pixels = _rgb(image, factor // in_transform)
        elif factor > in_transform:
            pixels = np.asarray(Image.fromarray(pixels).reduce(factor // in_transform))
        return _upright(pixels, _orientation(image))


def pixels_of(data: bytes) -> int:
    """How many pixels a picture has, by its header.

    Raises:
        RowError: as `decode`, as far as the header shows it.
    """
    with _opened(data) as image:
        return image.width * image.height


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet; what its decoder raises is a RowError, if it is the picture's."""
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
        if machine.is_of_the_machine(error):
            raise
        raise RowError("undecodable", f"the picture does not decode: {error}") from error


def _rgb(image: Image.Image, factor: int) -> Pixels:
    """The pixels of a picture, each side divided by a factor, converted some rows at a time.

    Converted at once, the largest pictures would take twice the memory.
    """
    bits, is_negative = _numbers(image)
    image.load()
    pixels = np.empty((-(-image.height // factor), -(-image.width // factor), 3), np.uint8)
    rows = max(_CONVERTED // image.width // factor, 1) * factor
    for top in range(0, image.height, rows):
        part = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        if bits:
            part = _of_eight_bits(part, bits, is_negative)
        part = _on_white(part) if part.has_transparency_data else part.convert("RGB")
        if factor > 1:
            part = part.reduce(factor)
        pixels[top // factor : top // factor + part.height] = np.asarray(part)
    return pixels


def _numbers(image: Image.Image) -> tuple[int, bool]:
    """Bits of a value if it has more than 8, else 0; and whether 0 is white.

    Raises:
        RowError: it is unknown which value is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        return tags.get(_BITS, (16,))[0], tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits or with a sign" if image.mode == "I" else "floating-point numbers"
        what = f"the picture is of {kind}, of which nothing says which is white; store it with 8 or 16 bits"
        raise RowError("undecodable", what)
    return 0, False


def _of_eight_bits(part: Image.Image, bits: int, is_negative: bool) -> Image.Image:
    """Grey values of more bits as those of 8."""
    values = np.asarray(part)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if is_negative:
        grey = 255 - grey
    clear = part.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _on_white(part: Image.Image) -> Image.Image:
    colours = part.convert("LA") if part.mode == "La" else part
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), colours.convert("RGBA")).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """EXIF's orientation of what was decoded; upright if its format's decoder has turned it already."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # with a damaged EXIF block, viewers show a picture as it is stored
        return None


def _upright(pixels: Pixels, orientation: Any) -> Pixels:
    if orientation not in _TURNS:
        return pixels
    is_turned, rows, columns = _TURNS[orientation]
    return np.ascontiguousarray((pixels.swapaxes(0, 1) if is_turned else pixels)[::rows, ::columns])


def _jpeg(data: bytes, image: Image.Image, factor: int) -> Pixels | None:
    """The pixels of a plain JPEG, each side divided by 1, 2, 4 or 8 in the transform, bit for bit those of Pillow; None
    if Pillow has to decode it.

    Both use libjpeg-turbo with the same transform and upsampling. simplejpeg's strict mode fails on every warning of
    the library; Pillow, which ignores some of them, then decides whether the picture decodes.
    """
    if not _HAS_SIMPLEJPEG or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    if image.info.get("adobe_transform", 1) != 1:  # not YCbCr
        return None
    import simplejpeg

    width, height = (-(-side // factor) for side in image.size)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, min_factor=factor, min_width=width, min_height=height,
            strict=True,
        )  # fmt: skip
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def pixel_difference(one: Pixels, other: Pixels) -> tuple[float, int] | None:
    """The mean and the largest absolute difference of two pictures' values, 0..255; None if they differ in size."""
    if one.shape != other.shape:
        return None
    apart = np.abs(one.astype(np.int16) - other.astype(np.int16))
    return float(apart.mean()), int(apart.max())


def encode(pixels: Pixels, kind: str, quality: int) -> bytes:
    """A picture of uint8 (height, width, 3) RGB: a baseline JPEG, 4:2:0, a lossless PNG, or a lossy WebP.

    JPEG is encoded by simplejpeg, without the interpreter's lock. Pillow is never used instead: its bytes differ,
    though both use libjpeg-turbo.

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
        remark: text that the file carries in addition to the picture: as comment, as text chunk, as EXIF's
            ImageDescription.
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

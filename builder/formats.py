"""Formats of pictures: what their members are called, and how their bytes begin. Decodes nothing.

Owns which member of a sample is its picture, and which others are pictures too.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Formats in which a stage may be asked for a picture.
JPG, PNG, WEBP = "jpg", "png", "webp"
FORMATS = (JPG, PNG, WEBP)
#: Extensions of a sample's picture, lower case, in order of preference.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
#: Of each extension of a sample's picture, lower case, its format.
OF_EXTENSION = {extension: JPG if extension == "jpeg" else extension for extension in IMAGE_EXTENSIONS}
#: Extensions of pictures that are never a sample's own one.
OTHER_EXTENSIONS = frozenset({"avif", "bmp", "gif", "heic", "heif", "jp2", "jxl", "pbm", "pgm", "ppm", "tif", "tiff"})


def of_bytes(data: bytes) -> str | None:
    """The format that bytes begin as; None for any but `FORMATS`.

    Source: ITU-T T.81 (SOI and the next marker), the PNG specification, RFC 9649 (RIFF, size, WEBP).
    """
    if data.startswith(b"\xff\xd8\xff"):
        return JPG
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    return WEBP if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def named(text: str | None) -> str:
    """The format that a column says; jpg where it says nothing: all were, when there was no such column."""
    lower = (text or JPG).lower()
    return OF_EXTENSION.get(lower, lower)


def picture_of(extensions: Sequence[str]) -> int | None:
    """The position of a sample's picture among its extensions: the first of jpg, jpeg, png, webp that there is."""
    lower = [extension.lower() for extension in extensions]
    return next((lower.index(extension) for extension in IMAGE_EXTENSIONS if extension in lower), None)


def pictures_of(extensions: Sequence[str]) -> list[int]:
    """The positions of all that is a picture, `mask.png` and `gif` too: the last part of the extension says so."""
    last = [extension.lower().rpartition(".")[2] for extension in extensions]
    return [i for i, extension in enumerate(last) if extension in OF_EXTENSION or extension in OTHER_EXTENSIONS]

"""Formats of pictures: the extensions of their members and their first bytes. Decodes nothing.

Owns which member of a sample is its picture, and which others are pictures too.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Formats in which a stage can be asked to make a picture.
JPG, PNG, WEBP = "jpg", "png", "webp"
FORMATS = (JPG, PNG, WEBP)
#: Extensions of a sample's picture, lower case, in order of preference.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
#: The format of each extension of a sample's picture, lower case.
OF_EXTENSION = {extension: JPG if extension == "jpeg" else extension for extension in IMAGE_EXTENSIONS}
#: Extensions of pictures that are never the picture of a sample.
OTHER_EXTENSIONS = frozenset({"avif", "bmp", "gif", "heic", "heif", "jp2", "jxl", "pbm", "pgm", "ppm", "tif", "tiff"})


def of_bytes(data: bytes) -> str | None:
    """The format of a picture by its first bytes; None for any but `FORMATS`.

    Source: ITU-T T.81 (SOI and the next marker), the PNG specification, RFC 9649 (RIFF, size, WEBP).
    """
    if data.startswith(b"\xff\xd8\xff"):
        return JPG
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    return WEBP if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def named(text: str | None) -> str:
    """The format named in a column; jpg if the column is null, since older tables have only jpg and no such column."""
    lower = (text or JPG).lower()
    return OF_EXTENSION.get(lower, lower)


def picture_of(extensions: Sequence[str]) -> int | None:
    """The index of a sample's picture among its extensions: the first of jpg, jpeg, png, webp that it has."""
    lower = [extension.lower() for extension in extensions]
    return next((lower.index(extension) for extension in IMAGE_EXTENSIONS if extension in lower), None)


def pictures_of(extensions: Sequence[str]) -> list[int]:
    """The indices of all pictures among the extensions, by the last part of each: `mask.png` and `gif` count too."""
    last = [extension.lower().rpartition(".")[2] for extension in extensions]
    return [i for i, extension in enumerate(last) if extension in OF_EXTENSION or extension in OTHER_EXTENSIONS]

"""The fields of tar headers: blocks, file types, numbers, names, checksums."""

from __future__ import annotations

import mmap
import re
from functools import lru_cache

import numpy as np

from builder.progress import plain

BLOCK = 512
#: GNU tar and tarfile fill an archive up to a multiple of 20 blocks.
RECORD = 20 * BLOCK
#: File types by their header byte: POSIX.1-1988, GNU tar manual "Basic Tar Format".
REGULAR = frozenset(b"0\x007")
KINDS = {
    ord("1"): "a hard link", ord("2"): "a symbolic link", ord("3"): "a character device", ord("4"): "a block device",
    ord("5"): "a directory", ord("6"): "a FIFO", ord("S"): "a sparse file",
}  # fmt: skip
#: pax records that change neither name nor size nor content of a member. Source: POSIX.1-2001 pax, "Extended Header".
TRANSPARENT = re.compile(rb"([1-9]\d{0,6}) (?:mtime|atime|ctime|uid|gid|uname|gname)=[^\n]*\n")
#: A pax or GNU header body longer than this is refused instead of read into memory.
MAX_PREFIX = 1 << 20
#: Characters of a name shown in a message; a name in a pax header may have a megabyte.
_NAME_SHOWN = 200
#: The largest size that fits the octal field of a header, 8 GiB less one byte; larger ones need a pax record.
MAX_OCTAL = 0o77777777777
#: The bytes from 345 on of a header without a prefix and extensions.
NO_PREFIX = bytes(BLOCK - 345)
#: Kinds without content, whatever size their header declares. Source: Python's tarfile and libarchive.
NO_CONTENT = frozenset(b"123456")
OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)


def padded(size: np.ndarray) -> np.ndarray:
    """Sizes rounded up to whole blocks."""
    blocks: np.ndarray = (size + (BLOCK - 1)) // BLOCK
    return blocks * BLOCK


def padding(size: int) -> int:
    """How many zero bytes follow `size` bytes of content."""
    return -size % BLOCK


@lru_cache(maxsize=1024)
def is_transparent(body: bytes) -> bool:
    """Whether a pax header holds only `TRANSPARENT` records, each as long as it says."""
    at = 0
    while (one := TRANSPARENT.match(body, at)) is not None and int(one[1]) == one.end() - at:
        at = one.end()
    return 0 < at == len(body)


def octal_numbers(text: np.ndarray) -> np.ndarray | None:
    """Octal numbers from uint8 (n, w): spaces, digits, then spaces or NULs; None if one has another form."""
    digits = text - np.uint8(ord("0"))
    by_column = np.ascontiguousarray(digits.T)
    width = text.shape[1]
    while width and (by_column[width - 1] >= 8).all():  # columns that hold a digit of no number
        width -= 1
    ending = text[:, width:]
    if width == 0 or (by_column[:width] >= 8).any() or not ((ending == 0) | (ending == ord(" "))).all():
        return _padded_octal(text, digits)
    value = np.zeros(len(text), np.int64)
    for column in by_column[:width]:
        value = value * 8 + column
    return value


def _padded_octal(text: np.ndarray, digits: np.ndarray) -> np.ndarray | None:
    """`octal_numbers` for numbers of different widths."""
    is_digit = digits < 8
    fill = (text == 32) | (text == 0)
    if not (is_digit | fill).all() or not is_digit.any(axis=1).all():
        return None
    value = np.zeros(len(text), np.int64)
    ended = np.zeros(len(text), bool)
    started = np.zeros(len(text), bool)
    for column in range(text.shape[1]):
        now = is_digit[:, column]
        if (now & ended).any():
            return None
        started |= now
        ended |= (started & ~now) | (text[:, column] == 0)
        value = np.where(now, value * 8 + digits[:, column], value)
    return value


def checksums(heads: np.ndarray) -> np.ndarray:
    """Unsigned checksums of headers whose bytes from 345 on are zero; the checksum field counts as spaces.

    Source: POSIX.1-1988. At most 257 bytes are added at a time, so that the sum fits 16 bits.
    """
    parts = (heads[:, :148], heads[:, 156:345])
    total = sum(part.sum(axis=1, dtype=np.uint16).astype(np.int64) for part in parts)
    return np.asarray(total + 8 * ord(" "))


def is_header(block: bytes) -> bool:
    """Whether a block's checksum is right: over unsigned bytes (POSIX.1-1988), or over signed ones (old tars)."""
    try:
        written = number_of(block[148:156])
    except ValueError:
        return False
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if written == unsigned:
        return len(block) == BLOCK
    return written == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def number_of(raw: bytes) -> int:
    """Parses an octal number, or a base-256 one if the high bit of the first byte is set. Source: GNU tar manual.

    Raises:
        ValueError: the number is neither, or negative.
    """
    if raw[:1] >= b"\x80":
        if raw[0] == 0xFF:
            raise ValueError("a negative number")
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    octal = OCTAL.fullmatch(raw)
    if octal is None:
        raise ValueError("not octal")
    return int(octal[1] or b"0", 8)


def ustar_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def is_utf8(name: bytes) -> bool:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def text_of(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def shown_name(name: bytes) -> str:
    """A name for a message: on one line, and cut if it is long."""
    text = plain(text_of(name))
    return text if len(text) <= _NAME_SHOWN else text[:_NAME_SHOWN] + "..."


def end_of_archive(length: int) -> bytes:
    """The zeros that close an archive of `length` bytes: two blocks, and more up to a multiple of 20 blocks."""
    return bytes(2 * BLOCK + -(length + 2 * BLOCK) % RECORD)


def first_data(view: mmap.mmap, start: int) -> int | None:
    """The first byte at or after `start` that is not zero."""
    step = 1 << 20
    for at in range(start, len(view), step):
        chunk = view[at : at + step]
        if chunk.count(0) != len(chunk):
            return at + len(chunk) - len(chunk.lstrip(b"\0"))
    return None

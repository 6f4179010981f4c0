"""The proof of a record's header: mode, owner and times are those of the replaced record, name and size are new.

The format is ustar, with one pax header before it if the old record had one, or if the name or the size needs it.
"""

from __future__ import annotations

import re
from functools import lru_cache

from builder.hybrid.verify.pax import records_of
from builder.tar.blocks import BLOCK, MAX_OCTAL, number_of, padding

#: Fields that are the old header's, with their first byte and the byte after the last. Source: POSIX.1-1988.
_KEPT = (
    ("mode", 100, 108), ("uid", 108, 116), ("gid", 116, 124), ("mtime", 136, 148), ("uname", 265, 297),
    ("gname", 297, 329), ("devmajor", 329, 337), ("devminor", 337, 345),
)  # fmt: skip
_USTAR = b"ustar\x0000"
_NO_LINK = bytes(100)
_NO_END = bytes(BLOCK - 345)
_CHECKSUM = re.compile(rb"[0-7]{6}\0 ")


def fault_of_head(head: bytes, old: bytes, name: str, size: int) -> str | None:
    """What is wrong in the header of an edited member; None if nothing is.

    Args:
        head: from the record's first byte to its content.
        old: the same of the record that it replaces.
        size: bytes of the content.
    """
    own, was = head[-BLOCK:], old[-BLOCK:]
    encoded = name.encode()
    if own[:100] != encoded[:100].ljust(100, b"\0"):
        return "name"
    if (fault := _field_that_differs(own, was)) is not None:
        return fault
    if own[124:136] != b"%011o\0" % (size if size <= MAX_OCTAL else 0):
        return "size"
    if own[156:157] != b"0":
        return "type"
    if own[157:257] not in (_NO_LINK, was[157:257]):
        return "linkname"
    if (fault := _form_fault(own)) is not None:
        return fault
    try:
        records = _records(old[:-BLOCK])
    except ValueError:
        return "the pax records of the source cannot be read"
    wanted = [(key, value) for key, value in records if key not in (b"path", b"size") and not key.startswith(b"GNU.")]
    if len(encoded) > 100 or b"\0" in encoded:
        wanted.append((b"path", encoded))
    if size > MAX_OCTAL:
        wanted.append((b"size", b"%d" % size))
    try:
        return _prefix_fault(head[:-BLOCK], old[:-BLOCK], own, wanted)
    except ValueError:
        return "the pax records"


def _field_that_differs(own: bytes, was: bytes) -> str | None:
    if own[100:124] == was[100:124] and own[136:148] == was[136:148] and own[265:345] == was[265:345]:
        return None
    return next(name for name, start, stop in _KEPT if own[start:stop] != was[start:stop])


def _form_fault(block: bytes) -> str | None:
    if block[257:265] != _USTAR:
        return "the format"
    if block[345:] != _NO_END:
        return "the end of the block"
    if not _CHECKSUM.fullmatch(block[148:156]):
        return "the checksum's form"
    return None


def _prefix_fault(prefix: bytes, old: bytes, own: bytes, wanted: list[tuple[bytes, bytes]]) -> str | None:
    """What is wrong with the headers before the record's own: at most one, of pax, with the `wanted` records."""
    if not wanted:
        return "a header in front" if prefix else None
    if prefix[156:157] != b"x":
        return "the pax records"
    size = number_of(prefix[124:136])
    if len(prefix) != BLOCK + size + padding(size):
        return "the headers in front"
    if list(_records(prefix)) != wanted:
        return "the pax records"
    if prefix == old:
        return None
    if any(prefix[BLOCK + size :]):
        return "the pax header's end"
    block = prefix[:BLOCK]
    if block == old[:BLOCK]:
        return None
    fault = _field_that_differs(block, own) or _form_fault(block)
    if fault is not None:
        return f"{fault} of the pax header"
    return None


@lru_cache(maxsize=256)
def _records(prefix: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The records of the pax headers before a header, without global ones; of the same name, the last one.

    Raises:
        ValueError: one of the headers cannot be read.
    """
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(prefix):
        size = number_of(prefix[at + 124 : at + 136])
        if prefix[at + 156] in b"xX":
            found.update(records_of(prefix[at + BLOCK : at + BLOCK + size]))
        at += BLOCK + size + padding(size)
    return tuple(found.items())

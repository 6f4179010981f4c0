"""Makes the headers of records: of new ones, and of those that replace another record."""

from __future__ import annotations

from builder.tar.blocks import BLOCK, MAX_OCTAL, NO_PREFIX, is_transparent, number_of, padding
from builder.tar.walk import pax_records

# --- making records ---


def make_record_head(name: str, size: int) -> bytes:
    """Prefix and header of a regular member: ustar, with pax records only if the name or the size needs them."""
    head = bytearray(BLOCK)
    head[100:108] = b"%07o\0" % 0o444
    head[108:116] = head[116:124] = b"%07o\0" % 0
    head[136:148] = b"%011o\0" % 0
    return _finished(head, name.encode(), size, {})


def remake_record_head(old: bytes, name: str, size: int) -> bytes:
    """Prefix and header of a record that replaces another: the old mode, owner and times, a new name and size.

    Args:
        old: the bytes from the old record's first prefix to its data.
    """
    patched = _resized(old, name.encode(), size)
    if patched is not None:
        return patched
    pax: dict[bytes, bytes] = {}
    at = 0
    while old[at + 156] in b"xXgLK":
        size_of = number_of(old[at + 124 : at + 136])
        if old[at + 156] in b"xX":
            pax.update(pax_records(old[at + BLOCK : at + BLOCK + size_of], at))
        at += BLOCK + size_of + padding(size_of)
    kept = {key: value for key, value in pax.items() if key not in (b"path", b"size") and not key.startswith(b"GNU.")}
    return _finished(bytearray(old[at : at + BLOCK]), name.encode(), size, kept)


def _resized(old: bytes, name: bytes, size: int) -> bytes | None:
    """The old bytes with a new size, if nothing else changes: a ustar header with a transparent pax prefix at most."""
    head = old[-BLOCK:]
    if head[:100].rstrip(b"\0") != name or head[156:157] != b"0" or head[257:265] != b"ustar\x0000":
        return None
    if head[345:] != NO_PREFIX or not head.isascii() or size > MAX_OCTAL:
        return None
    if len(old) > BLOCK:
        length = number_of(old[124:136])
        if len(old) != 3 * BLOCK or old[156:157] != b"x" or not is_transparent(old[BLOCK : BLOCK + length]):
            return None
    field_ = b"%011o\0" % size
    checksum = number_of(head[148:156]) - sum(head[124:136]) + sum(field_)
    return b"".join((old[:-BLOCK], head[:124], field_, head[136:148], b"%06o\0 " % checksum, head[156:]))


def _finished(head: bytearray, name: bytes, size: int, pax: dict[bytes, bytes]) -> bytes:
    """The header as ustar, whatever its format was; mode, owner and time are kept."""
    if len(name) > 100 or b"\0" in name:
        pax = {**pax, b"path": name}
    if size > MAX_OCTAL:
        pax = {**pax, b"size": b"%d" % size}
    head[157:257] = bytes(100)
    head[257:265] = b"ustar\x0000"
    head[345:512] = bytes(167)
    body = b"".join(_pax_record(key, value) for key, value in pax.items())
    prefix = b""
    if body:
        _set(head, b"PaxHeaders/" + name[-80:].replace(b"/", b"_"), len(body), b"x")
        prefix = bytes(head) + body + bytes(padding(len(body)))
    _set(head, name[:100], size if size <= MAX_OCTAL else 0, b"0")
    return prefix + bytes(head)


def _set(head: bytearray, name: bytes, size: int, kind: bytes) -> None:
    head[0:100] = name.ljust(100, b"\0")
    head[124:136] = b"%011o\0" % size
    head[148:156] = b" " * 8
    head[156:157] = kind
    head[148:156] = b"%06o\0 " % sum(head)


def _pax_record(key: bytes, value: bytes) -> bytes:
    """`<length> <key>=<value>\\n`; the length includes its own digits."""
    body = len(key) + len(value) + 3
    length = body + len(str(body))
    if len(str(length)) != len(str(body)):
        length = body + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)

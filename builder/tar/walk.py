"""Indexes any tar header by header: reads pax, GNU and sparse prefixes one after another."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import numpy as np

from builder.errors import ShardError
from builder.tar.blocks import (
    BLOCK,
    MAX_PREFIX,
    NO_CONTENT,
    first_data,
    is_header,
    is_utf8,
    number_of,
    padding,
    shown_name,
    text_of,
    ustar_name,
)
from builder.tar.index import Index

#: The pax records that change a member's size or name. A record of GNU's about sparse files is kept as `_SPARSE`.
_NEEDED = (b"path", b"size", b"GNU.sparse.name")
_SPARSE = b"GNU.sparse."


# --- the general path: any header that POSIX or GNU tar writes ---


@dataclass
class _Prefixes:
    """What the prefixes in front of a header say about it."""

    start: int | None = None
    name: bytes | None = None
    pax: dict[bytes, bytes] = field(default_factory=dict)

    def add(self, pax: dict[bytes, bytes], name: bytes | None = None) -> None:
        """Adds the records of one header.

        Raises:
            ShardError: two headers give a name, a size or a sparse file: some readers use the first, some the last.
        """
        names = [self.name, name, self.pax.get(b"path"), pax.get(b"path")]
        if self.pax.keys() & pax.keys() or sum(one is not None for one in names) > 1:
            raise ShardError(
                "two headers describe one member: readers disagree on which counts",
                where={"offset": self.start},
                fix="make the shard again",
            )
        self.pax.update(pax)
        self.name = self.name if name is None else name


def walk(view: mmap.mmap, at: int = 0) -> Index:
    """Indexes the records from byte `at` on, where one begins, header by header."""
    names: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    bad: set[int] = set()
    common: dict[bytes, bytes] = {}
    prefixes = _Prefixes()
    while at + BLOCK <= len(view):
        block = view[at : at + BLOCK]
        if block.count(0) == BLOCK:
            break
        size, kind = _checked(block, at)
        start = at if prefixes.start is None else prefixes.start
        at += BLOCK
        if kind in b"xXgLK":
            body = _prefix_body(view, at, size)
            if kind == ord("g"):
                common.update(_needed(body, at - BLOCK))
                _refuse_common(common, at - BLOCK)
                at += size + padding(size)
                continue
            prefixes.start = start
            if kind == ord("L"):
                prefixes.add({}, body.split(b"\0")[0])
            elif kind != ord("K"):
                prefixes.add(_needed(body, at - BLOCK))
            at += size + padding(size)
            continue
        pax = {**common, **prefixes.pax}
        name = _name(pax, prefixes.name, block)
        if b"size" in pax:
            size = _pax_size(pax[b"size"], start)
        if kind in NO_CONTENT:
            size = 0
        if kind == ord("S"):
            at = _skip_sparse_maps(view, block, at)
        if _SPARSE in pax:
            kind = ord("S")
        if kind in b"0\x00" and name.endswith(b"/"):
            kind = ord("5")
        if at + size > len(view):
            raise ShardError(
                f"the shard is truncated: member '{shown_name(name)}' ends at byte {at + size}, "
                f"the file at {len(view)}",
                where={"offset": start},
                fix="download or make it again",
            )
        if not is_utf8(name):
            bad.add(len(names))
        names.append(text_of(name))
        rows.append((start, at, size, kind))
        at += size + padding(size)
        prefixes = _Prefixes()
    _check_end(view, at, prefixes)
    table = np.array(rows, np.int64).reshape(-1, 4)
    return Index(
        names=names,
        header=table[:, 0].copy(),
        data=table[:, 1].copy(),
        size=table[:, 2].copy(),
        kind=table[:, 3].astype(np.uint8),
        end=min(at, len(view)),
        file_size=len(view),
        bad_names=frozenset(bad),
    )


def _check_end(view: mmap.mmap, at: int, prefixes: _Prefixes) -> None:
    if prefixes.start is not None:
        raise ShardError(
            "the shard is truncated: it ends after a header that only describes the next one",
            where={"offset": prefixes.start},
            fix="download or make it again",
        )
    inside = at < len(view) < at + BLOCK and (at == 0 or first_data(view, at) is not None)
    if at > len(view) or inside:
        raise ShardError(
            f"the shard is truncated: it ends at byte {len(view)}, inside a block",
            where={"offset": min(at, len(view)) // BLOCK * BLOCK},
            fix="download or make it again",
        )
    data = first_data(view, at)
    if data is not None:
        raise ShardError(
            f"zeros end the archive at byte {at}, but more data begins at byte {data}: most readers skip it",
            where={"offset": at},
            fix="if the file contains two tars, split it; if not, make the shard again",
        )


def _checked(block: bytes, at: int) -> tuple[int, int]:
    """Size and type byte of a header, after its checksum is verified."""
    if not is_header(block):
        raise ShardError(
            f"no tar header at byte {at}: its checksum is wrong",
            where={"offset": at},
            fix="the shard is damaged or not a tar: download or make it again",
        )
    try:
        return number_of(block[124:136]), block[156]
    except ValueError:
        raise ShardError(
            f"the tar header at byte {at} declares a size that is not a number",
            where={"offset": at},
            fix="make the shard again",
        ) from None


def _prefix_body(view: mmap.mmap, at: int, size: int) -> bytes:
    if size > MAX_PREFIX:
        raise ShardError(
            f"a header that describes the next one declares {size} bytes, the limit is {MAX_PREFIX}",
            where={"offset": at - BLOCK},
            fix="the shard is damaged: download or make it again",
        )
    if at + size > len(view):
        raise ShardError(
            f"the shard is truncated: a header that describes the next one ends at byte {at + size}, "
            f"the file at {len(view)}",
            where={"offset": at - BLOCK},
            fix="download or make it again",
        )
    return view[at : at + size]


def pax_records(body: bytes, at: int) -> dict[bytes, bytes]:
    """The records `<length> <key>=<value>\\n` of a pax header that begins at byte `at`."""
    records: dict[bytes, bytes] = {}
    body = body.rstrip(b"\0")
    start = 0
    while start < len(body):
        space = body.find(b" ", start, start + 8)
        digits = body[start:space] if space > 0 else b""
        stop = start + int(digits) if digits.isdigit() else start
        equals = body.find(b"=", space, stop)
        if equals < 0 or stop > len(body) or body[stop - 1 : stop] != b"\n":
            raise ShardError("a pax header is damaged", where={"offset": at}, fix="download or make the shard again")
        records[body[space + 1 : equals]] = body[equals + 1 : stop - 1]
        start = stop
    return records


def _needed(body: bytes, at: int) -> dict[bytes, bytes]:
    """The records of a pax header that the index needs.

    The others are dropped: a header may hold 200,000 of them, and those of a global header are kept to the end.
    """
    records = pax_records(body, at)
    needed = {key: records[key] for key in _NEEDED if key in records}
    if any(key.startswith(_SPARSE) for key in records):
        needed[_SPARSE] = b""
    return needed


def _name(pax: dict[bytes, bytes], long_name: bytes | None, block: bytes) -> bytes:
    """A member's name. As in Python's tarfile, an empty pax name counts, and its last slash does not mean a folder."""
    if name := pax.get(b"GNU.sparse.name"):
        return name
    if (path := pax.get(b"path")) is not None:
        return path.rstrip(b"/")
    return long_name or ustar_name(block)


def _refuse_common(common: dict[bytes, bytes], at: int) -> None:
    for key, what in ((b"size", "size"), (b"path", "name")):
        if key in common:
            raise ShardError(
                f"a global pax header declares one {what} for all members",
                where={"offset": at},
                fix="make the shard again",
            )


def _pax_size(value: bytes, at: int) -> int:
    if not value.isdigit() or len(value) > 18:
        raise ShardError(
            f"a pax header declares the size '{shown_name(value)}'", where={"offset": at}, fix="make the shard again"
        )
    return int(value)


def _skip_sparse_maps(view: mmap.mmap, block: bytes, at: int) -> int:
    """Skips the extension blocks of an old GNU sparse header; the flag is at 482 in the header, at 504 in a block."""
    more = block[482]
    while more and at + BLOCK <= len(view):
        more = view[at + 504]
        at += BLOCK
    return at

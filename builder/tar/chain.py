"""The fast index of a tar: sizes and names of all headers at once, for tars whose headers form a simple chain."""

from __future__ import annotations

import mmap

import numpy as np

from builder.tar.blocks import BLOCK, TRANSPARENT, checksums, first_data, is_transparent, octal_numbers
from builder.tar.index import Index

#: Headers parsed together: their 2 MB fit the cache of a core.
_HEADS_A_STEP = 4096
#: How often the pax headers of one length are compared with one of them; the rest is read one by one.
_KINDS_OF_BODIES = 8


# --- the fast path: uniform ustar headers, pax prefixes that change nothing ---


def chain_of(view: mmap.mmap) -> Index | None:
    """Indexes a tar without reading it header by header; returns None if that is needed.

    Blocks with 'ustar' at offset 257 are candidates. They are accepted only if the size in each leads exactly to the
    next one, and the last one leads to zeros. A tar inside an image breaks the chain.
    """
    count = len(view) // BLOCK
    if count == 0:
        return None
    blocks = np.frombuffer(view, dtype=np.uint8, count=count * BLOCK).reshape(count, BLOCK)
    magic = np.ndarray((count,), np.uint32, buffer=view, offset=257, strides=(BLOCK,))  # 'usta': one compare per block
    try:
        return _linked(view, blocks, np.flatnonzero(magic == np.frombuffer(b"usta", np.uint32)[0]))
    finally:
        del blocks, magic


def _linked(view: mmap.mmap, blocks: np.ndarray, found: np.ndarray) -> Index | None:
    if len(found) == 0 or found[0] != 0:
        return None
    steps = [_fields(blocks[found[start : start + _HEADS_A_STEP]]) for start in range(0, len(found), _HEADS_A_STEP)]
    fields = [step for step in steps if step is not None]
    if len(fields) < len(steps):
        return None
    sizes, kinds = (np.concatenate([step[i] for step in fields]) for i in (0, 1))
    following = found + 1 + (sizes + BLOCK - 1) // BLOCK
    end = int(following[-1])
    if (following[:-1] != found[1:]).any() or end > len(blocks) or first_data(view, end * BLOCK) is not None:
        return None
    prefix = kinds == ord("x")
    if prefix[-1] or (prefix[1:] & prefix[:-1]).any() or not all_transparent(blocks, found[prefix], sizes[prefix]):
        return None
    names = b"".join([step[2] for step in fields])
    return _members(names, found * BLOCK, sizes, kinds, prefix, end * BLOCK, len(view))


def _fields(heads: np.ndarray) -> tuple[np.ndarray, np.ndarray, bytes] | None:
    """Sizes and kinds of ustar headers, and the names of the members, each with a line end; None if only the walk can
    read one of the headers."""
    sizes, sums = octal_numbers(heads[:, 124:136]), octal_numbers(heads[:, 148:156])
    kinds = heads[:, 156].copy()
    if sizes is None or sums is None or not np.isin(kinds, (ord("0"), 0, ord("x"))).all() or heads[:, 345:].any():
        return None
    if (checksums(heads) != sums).any():
        return None
    names = heads[:, :100][kinds != ord("x")].view("S100").ravel().tolist()
    return sizes, kinds, b"\n".join([*names, b""])


def _members(
    lines: bytes,
    offsets: np.ndarray,
    sizes: np.ndarray,
    kinds: np.ndarray,
    prefix: np.ndarray,
    end: int,
    file_size: int,
) -> Index | None:
    member = ~prefix
    if lines[:1] == b"\n" or b"\n\n" in lines or b"/\n" in lines or b"\0" in lines:
        return None
    if lines.count(b"\n") != np.count_nonzero(member):
        return None
    try:
        names = lines.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError:
        return None
    header = offsets[member].astype(np.int64)
    behind_prefix = np.concatenate(([False], prefix[:-1]))[member]
    header[behind_prefix] = offsets[prefix]
    return Index(
        names=names,
        header=header,
        data=offsets[member].astype(np.int64) + BLOCK,
        size=sizes[member].astype(np.int64),
        kind=kinds[member].copy(),
        end=end,
        file_size=file_size,
    )


def all_transparent(blocks: np.ndarray, found: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether the pax headers at these blocks hold only records that change nothing.

    A body that differs from a transparent one only in digits of values is transparent too, and is not parsed.
    """
    for length in np.unique(lengths).tolist():
        if not 0 < length <= BLOCK:
            return False
        bodies = blocks[found[lengths == length] + 1, :length]
        for _ in range(_KINDS_OF_BODIES):
            if len(bodies) == 0:
                break
            first = bodies[0]
            if not is_transparent(first.tobytes()):
                return False
            may_differ = _is_digit(first) & ~_record_lengths(first)
            bodies = bodies[~((bodies == first) | (_is_digit(bodies) & may_differ)).all(axis=1)]
        if not all(is_transparent(body.tobytes()) for body in bodies):
            return False
    return True


def _is_digit(text: np.ndarray) -> np.ndarray:
    return np.asarray((text - np.uint8(ord("0"))) < 10)


def _record_lengths(body: np.ndarray) -> np.ndarray:
    """Which bytes of a transparent pax header are the lengths of its records."""
    counted = np.zeros(len(body), bool)
    for record in TRANSPARENT.finditer(body.tobytes()):
        counted[record.start(1) : record.end(1)] = True
    return counted

"""Checks that the headers of a file are where an index says, without reading the contents in between."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import cast

import numpy as np

from builder.errors import ShardError
from builder.tar.blocks import BLOCK, checksums, octal_numbers, padding
from builder.tar.chain import all_transparent
from builder.tar.walk import walk

# --- heads alone ---


def first_other_head(heads: Sequence[bytes], names: Sequence[str], sizes: Sequence[int]) -> int | None:
    """The first record with another name or size, or with a wrong checksum; None if there is no such record.

    Args:
        heads: for each record the bytes from its first prefix to its data.
        names: as in `Index.names`.
        sizes: bytes of content.
    """
    agrees = np.zeros(len(heads), bool)
    lengths = np.array([len(head) for head in heads], np.int64)
    for length in (BLOCK, 3 * BLOCK):  # a header alone, or after one pax prefix: nearly all records
        at = np.flatnonzero(lengths == length).tolist()
        if not at:
            continue
        blocks = np.frombuffer(b"".join(heads[i] for i in at), np.uint8).reshape(len(at), length // BLOCK, BLOCK)
        agrees[at] = _plain_heads(blocks, [names[i].encode() for i in at], np.array(sizes, np.int64)[at])
    rest = np.flatnonzero(~agrees).tolist()
    return next((i for i in rest if not _declares(heads[i], names[i], sizes[i])), None)


def _plain_heads(blocks: np.ndarray, names: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """Which heads are certainly right; rarer forms are left to `_declares`.

    Args:
        blocks: uint8 (n, 1 or 3, 512): headers, with or without a pax prefix of one block.
    """
    heads, sure = blocks[:, -1], np.ones(len(blocks), bool)
    found = octal_numbers(heads[:, 124:136])
    raw = np.ascontiguousarray(heads[:, :100]).view("S100").ravel().tolist()
    if found is None or (blocks.shape[1] > 1 and not _behind_transparent(blocks)):
        return ~sure
    sure &= np.array([one == other for one, other in zip(raw, names, strict=True)], bool)
    sure &= (found == sizes) & np.isin(heads[:, 156], (0, ord("0")))
    for one in range(0, blocks.shape[1], 2):
        sums = octal_numbers(blocks[:, one, 148:156])
        if sums is None:
            return np.zeros(len(blocks), bool)
        sure &= ~blocks[:, one, 345:].any(axis=1) & (checksums(blocks[:, one]) == sums)
    return sure


def _behind_transparent(blocks: np.ndarray) -> bool:
    """Whether all of these heads begin with a pax prefix that changes nothing."""
    first = blocks[:, 0]
    lengths = octal_numbers(first[:, 124:136])
    if lengths is None or (first[:, 156] != ord("x")).any():
        return False
    return all_transparent(blocks.reshape(-1, BLOCK), np.arange(len(blocks)) * blocks.shape[1], lengths)


class _ZeroContent:
    """A head followed by content of zeros, which are made when they are read."""

    def __init__(self, head: bytes, size: int) -> None:
        self._head, self._length = head, len(head) + size + padding(size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(self._length)
        return self._head[start:stop].ljust(max(stop - start, 0), b"\0")


def _declares(head: bytes, name: str, size: int) -> bool:
    try:
        found = walk(cast(mmap.mmap, _ZeroContent(head, size)))
    except ShardError:
        return False
    places = found.data.tolist(), found.size.tolist()
    return (found.names, *places, found.end) == ([name], [len(head)], [size], len(head) + size + padding(size))

"""Reads the bytes of samples at the offsets in the table: members of the source, and generated images.

Owns how `(shard, row, member)` becomes bytes. Knows nothing about stages and runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from builder.errors import where
from builder.sources.kinds import kind_of
from builder.sources.members import EDIT, place_of
from builder.store.layout import Layout
from builder.table import partitions
from builder.table.edits import EditsReader
from builder.table.origin import Origin


class MemberReader:
    """Reads members of one shard's rows.

    Args:
        members: the names that will be read: `image`, an extension, or `edit`; only the files for these are opened.

    Attributes:
        is_open: whether the files were opened without an error.
    """

    def __init__(self, layout: Layout, shard: str, members: Sequence[str]) -> None:
        self._layout, self._shard = layout, shard
        self._stack = contextlib.ExitStack()
        self._columns: dict[str, list[Any]] = {}
        self._state: Origin | None = None
        from_source = any(member != EDIT for member in members)
        columns = ["source_members"] if from_source else []
        if EDIT in members:
            columns += ["image_path", "image_offset", "image_size"]
        if columns:
            places, state = partitions.read_partition(layout, shard, columns)
            self._columns = {name: places[name].to_pylist() for name in places.column_names}
            self._state = state.source if from_source else None
        self.is_open = False
        self.reopen()

    def reopen(self) -> None:
        """Opens the shard's files again; this helps if a file server has lost an open file.

        Raises:
            ShardError, OSError: as `opened`; the next read tries to open them again.
        """
        self._stack.close()
        self.is_open = False
        self._edits = self._stack.enter_context(EditsReader(self._layout))
        if self._state is not None:
            opened = kind_of(self._state).opened(self._layout, self._shard, self._state)
            self._source = self._stack.enter_context(opened)
        self.is_open = True

    def rows(self) -> int:
        """How many rows the shard has; 0 if no members are read."""
        return len(next(iter(self._columns.values()), []))

    def read(self, row: int, member: str) -> bytes | None:
        """The bytes of one member of one row; None if the sample has no such member.

        Raises:
            ShardError: the bytes do not exist.
            ConflictError: the source was cut since it was opened.
            OSError: a disk or a file server does not return the bytes.
        """
        if not self.is_open:
            self.reopen()
        with where(shard=self._shard, row=row):
            if member == EDIT:
                path, offset, size = (self._columns[f"image_{name}"][row] for name in ("path", "offset", "size"))
                return None if path is None else self._edits.read(path, offset, size)
            place = place_of(self._columns["source_members"][row], member)
            if place is None or self._source is None:
                return None
            return self._source.read(place)

    def __enter__(self) -> MemberReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

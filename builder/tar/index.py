"""The index of a tar: the names of its members and where they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from builder.tar.blocks import BLOCK, padded


@dataclass(frozen=True)
class Index:
    """Every member of one tar, in order; all arrays have one entry per member.

    Attributes:
        names: as in the archive, with `./` and folders.
        header: int64, first byte of the record, prefixes included.
        data: int64, first byte of the content.
        size: int64, bytes of content in the archive.
        kind: uint8, the header's type byte.
        end: first byte after the last record; from here on the archive holds only zeros.
        bad_names: members whose name is not UTF-8; `names` has them with backslash escapes.
    """

    names: list[str]
    header: np.ndarray
    data: np.ndarray
    size: np.ndarray
    kind: np.ndarray
    end: int
    file_size: int
    bad_names: frozenset[int] = field(default_factory=frozenset)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def stop(self) -> np.ndarray:
        """int64, first byte after each record, padding included."""
        return np.asarray(self.data + padded(self.size))

    @property
    def has_end_mark(self) -> bool:
        """Whether zeros close the archive; they are missing if a tar was cut between two records."""
        return self.file_size - self.end >= BLOCK

"""What is known of a tar: where its members lie and what they are called."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from builder.tar.blocks import BLOCK, padded


@dataclass(frozen=True)
class Index:
    """Every member of one tar, in order; all arrays have one entry a member.

    Attributes:
        names: as the archive gives them, `./` and folders kept.
        header: int64, first byte of the record, prefixes included.
        data: int64, first byte of the content.
        size: int64, bytes of content in the archive.
        kind: uint8, the header's type byte.
        end: first byte after the last record; from here on the archive holds zeros only.
        bad_names: members whose name is not UTF-8, in `names` with backslash escapes.
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
        """Whether zeros close the archive, as they should: a tar cut between two records has none."""
        return self.file_size - self.end >= BLOCK

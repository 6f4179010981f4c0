"""The result of verifying a root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Proof:
    """The result of verifying hybrid shards.

    Attributes:
        proven: shards without a problem.
        same: bytes of hybrid shards that equal the source's.
        no_end_mark: shards whose source has no end mark, because it was cut.
        problems: one sentence each; it begins with the shard or the file and ends with the fix.
        unread: shards that could not be checked because their bytes could not be read, with the reason.
    """

    shards: int = 0
    proven: int = 0
    rows: int = 0
    edited: int = 0
    dropped: int = 0
    same: int = 0
    size: int = 0
    no_end_mark: int = 0
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, other: Proof) -> None:
        """Adds the result of one shard."""
        for name in ("proven", "rows", "edited", "dropped", "same", "size", "no_end_mark"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def summary(proof: Proof) -> Sequence[tuple[str, str]]:
    """The result as names and values, for people."""
    return (
        ("shards proven", f"{proof.proven} of {proof.shards}"),
        ("samples", f"{proof.rows}"),
        ("samples swapped", f"{proof.edited}"),
        ("samples dropped", f"{proof.dropped}"),
        ("bytes proven the source's", f"{proof.same:,} of {proof.size:,}"),
        *([("sources without end mark", f"{proof.no_end_mark}")] if proof.no_end_mark else []),
    )

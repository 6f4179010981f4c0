"""What the proof of a root's hybrid shards comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Proof:
    """What was found.

    Attributes:
        proven: shards in which nothing is wrong.
        same: bytes of hybrid shards that equal the source's.
        no_end_mark: shards whose source was cut: it has no end mark.
        problems: what is wrong, one sentence each, beginning with the shard or the file and ending with the fix.
        unread: shards that could not be checked because the machine did not give their bytes, with the reason.
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
        """Adds what was found in one shard."""
        for name in ("proven", "rows", "edited", "dropped", "same", "size", "no_end_mark"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def summary(proof: Proof) -> Sequence[tuple[str, str]]:
    """The proof as names and values, for people."""
    return (
        ("shards proven", f"{proof.proven} of {proof.shards}"),
        ("samples", f"{proof.rows}"),
        ("samples swapped", f"{proof.edited}"),
        ("samples dropped", f"{proof.dropped}"),
        ("bytes proven the source's", f"{proof.same:,} of {proof.size:,}"),
        *([("sources without end mark", f"{proof.no_end_mark}")] if proof.no_end_mark else []),
    )

"""Records the batch being processed, so that a restarted worker can tell which rows crashed the last one.

Owns `runs/<run>/tasks/*.batch.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from builder.executors.base import DIED_OF, KILLED
from builder.executors.by_name import liveness_of, own_executor
from builder.store import files
from builder.store.owners import Liveness


class Verdict(Enum):
    """What to do with rows in which the process may have died."""

    #: They are processed again.
    AGAIN = "again"
    #: It is one row, and it kills the process.
    FAILED = "failed"
    #: The system killed the process in them, and no other row was answered since: the machine may be the cause.
    LEFT = "left"


class InHand:
    """The batch that a task is processing, on disk.

    A batch in which the process died twice is halved. A single row in which it died twice has failed. If the system
    killed the process, for example for lack of memory, the row has failed only if other rows were answered between two
    deaths; otherwise the machine may be the cause.

    If the process that noted the batch is still alive, it is another copy of the task: not a death. If other batches
    were being prepared at the same time, any of them may be the cause: each is processed alone from now on, and no
    death is counted yet.

    Args:
        path: the file; it need not exist.
        signal: the signal that the last process died of, as its parent reports it; empty if that is not known.
    """

    def __init__(self, path: Path, signal: str | None = None) -> None:
        signal = os.environ.get(DIED_OF, "") if signal is None else signal
        self._path = path
        #: Rows that are processed separately: shard, rows, how often the process died in them, and, for the last death,
        #: how many rows had been answered until then and whether it is proven that the rows are the cause.
        self._groups: list[dict[str, Any]] = []
        #: Rows that the processes before this one have answered.
        self._before = 0
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return
        self._groups = data["groups"]
        self._before = data["in_hand"].get("answered", 0)
        if liveness_of(data) is not Liveness.LIVES:
            self._count_death(data["in_hand"], signal in ("", KILLED))

    def _count_death(self, last: dict[str, Any], is_killed: bool) -> None:
        """Puts the rows that a dead process was working on into groups."""
        shard, rows, deaths = last["shard"], last["rows"], last["deaths"]
        ahead = [(group["shard"], group["rows"]) for group in last["ahead"]]
        group = self._group_of(shard, rows)
        has_answered_since = self._before > group.get("since", self._before)
        is_proven = not is_killed or group.get("proven", False) or has_answered_since
        self._take_out([(shard, rows), *ahead])
        if ahead:
            new = [(shard, rows, deaths), *((name, others, 0) for name, others in ahead)]
        elif deaths + 1 < 2 or len(rows) == 1:
            new = [(shard, rows, deaths + 1)]
        else:
            middle = len(rows) // 2
            new = [(shard, rows[:middle], 0), (shard, rows[middle:], 0)]
        self._groups += [
            {"shard": name, "rows": part, "deaths": count, "since": self._before, "proven": is_proven and count > 0}
            for name, part, count in new
        ]
        self._groups = [group for group in self._groups if group["rows"]]

    def _take_out(self, batches: Sequence[tuple[str, list[int]]]) -> None:
        """Removes the rows of batches from their groups."""
        known = {(shard, row) for shard, rows in batches for row in rows}
        self._groups = [
            {**group, "rows": [row for row in group["rows"] if (group["shard"], row) not in known]}
            for group in self._groups
        ]

    def groups(self, shard: str) -> list[list[int]]:
        """Rows of a shard that are processed separately: each list is one batch."""
        return [group["rows"] for group in self._groups if group["shard"] == shard]

    def is_last(self, shard: str) -> bool:
        """Whether a shard is to be done after the others: its row is the cause only if those are answered."""
        return any(self._verdict(group, 0) is Verdict.LEFT for group in self._groups if group["shard"] == shard)

    def _group_of(self, shard: str, rows: list[int]) -> dict[str, Any]:
        """The group that rows belong to; empty if they belong to none."""
        if not rows:
            return {}
        members = set(rows)
        groups = (group for group in self._groups if group["shard"] == shard and members <= set(group["rows"]))
        return next(groups, {})

    def verdict(self, shard: str, rows: list[int], answered: int = 0) -> Verdict:
        """What to do with rows.

        Args:
            answered: how many rows this process has answered.
        """
        return self._verdict(self._group_of(shard, rows), answered)

    def _verdict(self, group: dict[str, Any], answered: int) -> Verdict:
        if group.get("deaths", 0) < 2:
            return Verdict.AGAIN
        if group.get("proven", True):  # missing in files of older versions
            return Verdict.FAILED
        return Verdict.AGAIN if self._before + answered > group["since"] else Verdict.LEFT

    def begin(
        self, shard: str, rows: list[int], ahead: Sequence[tuple[str, list[int]]] = (), answered: int = 0
    ) -> None:
        """Records the batch that is processed now.

        Args:
            ahead: batches, as shard and rows, that are prepared at the same time.
            answered: how many rows this process has answered.
        """
        in_hand = {
            "shard": shard,
            "rows": rows,
            "ahead": [{"shard": name, "rows": found} for name, found in ahead],
            "deaths": self._group_of(shard, rows).get("deaths", 0),
            "answered": self._before + answered,
        }
        text = json.dumps({"groups": self._groups, "in_hand": in_hand, **own_executor().owner()})
        files.write_atomic(self._path, text.encode(), durable=False)

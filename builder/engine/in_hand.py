"""The batch in hand, on disk: what the next process knows of one that died.

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
    """What is to become of a group of rows in which the process died."""

    #: It is asked about again.
    AGAIN = "again"
    #: It is one row that kills the process.
    FAILED = "failed"
    #: The system killed the process in it, and nothing else was answered since: the row may not be what is at fault.
    LEFT = "left"


class Deaths:
    """The batch in hand, on disk, so that the next process knows in which rows the last one died.

    A batch in which the process died twice is halved; a single row in which it died twice has failed. Where the system
    killed the process, as for want of memory, it has failed only if others were answered between two deaths: else it
    may be the machine. A batch in the hand of a process that lives is a copy's of the task, and no death. Where others
    were being prepared ahead, it is not known which of them killed: each stands alone from then on, and no death is
    counted yet.

    Args:
        signal: of which the last process died, as its parent says; empty where that is not known.
    """

    def __init__(self, path: Path, signal: str | None = None) -> None:
        signal = os.environ.get(DIED_OF, "") if signal is None else signal
        self._path = path
        self._groups: list[dict[str, Any]] = []
        self._before = 0  # rows that the processes before this one have answered
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return
        self._groups = data["groups"]
        self._before = data["in_hand"].get("answered", 0)
        if liveness_of(data) is not Liveness.LIVES:
            self._died(data["in_hand"], signal in ("", KILLED))

    def _died(self, last: dict[str, Any], is_killed: bool) -> None:
        shard, rows, deaths = last["shard"], last["rows"], last["deaths"]
        ahead = [(group["shard"], group["rows"]) for group in last["ahead"]]
        known = {(name, row) for name, found in [(shard, rows), *ahead] for row in found}
        own = self._of(shard, rows)
        is_proven = not is_killed or own.get("proven", False) or self._before > own.get("since", self._before)
        self._groups = [
            {**group, "rows": [row for row in group["rows"] if (group["shard"], row) not in known]}
            for group in self._groups
        ]
        if ahead:
            found = [(shard, rows, deaths), *((name, others, 0) for name, others in ahead)]
        elif deaths + 1 < 2 or len(rows) == 1:
            found = [(shard, rows, deaths + 1)]
        else:
            middle = len(rows) // 2
            found = [(shard, rows[:middle], 0), (shard, rows[middle:], 0)]
        self._groups += [
            {"shard": name, "rows": part, "deaths": count, "since": self._before, "proven": is_proven and count > 0}
            for name, part, count in found
        ]
        self._groups = [group for group in self._groups if group["rows"]]

    def groups(self, shard: str) -> list[list[int]]:
        """Rows of a shard that go into batches of their own."""
        return [group["rows"] for group in self._groups if group["shard"] == shard]

    def is_last(self, shard: str) -> bool:
        """Whether a shard is to be done behind the others: what they answer says whether it is the machine."""
        return any(self._verdict(group, 0) is Verdict.LEFT for group in self._groups if group["shard"] == shard)

    def _of(self, shard: str, rows: list[int]) -> dict[str, Any]:
        """The group that rows belong to; empty if they belong to none."""
        wanted = set(rows)
        groups = (group for group in self._groups if group["shard"] == shard and wanted <= set(group["rows"]))
        return next(groups, {}) if rows else {}

    def verdict(self, shard: str, rows: list[int], answered: int = 0) -> Verdict:
        """What is to become of rows.

        Args:
            answered: rows that this process has answered.
        """
        return self._verdict(self._of(shard, rows), answered)

    def _verdict(self, group: dict[str, Any], answered: int) -> Verdict:
        if group.get("deaths", 0) < 2:
            return Verdict.AGAIN
        if group.get("proven", True):  # as an older version has noted it, too
            return Verdict.FAILED
        return Verdict.AGAIN if self._before + answered > group["since"] else Verdict.LEFT

    def begin(
        self, shard: str, rows: list[int], ahead: Sequence[tuple[str, list[int]]] = (), answered: int = 0
    ) -> None:
        """Notes the batch that is processed now, and those that are prepared meanwhile, by shard."""
        others = [{"shard": name, "rows": found} for name, found in ahead]
        in_hand = {
            "shard": shard, "rows": rows, "ahead": others, "deaths": self._of(shard, rows).get("deaths", 0),
            "answered": self._before + answered,
        }  # fmt: skip
        text = json.dumps({"groups": self._groups, "in_hand": in_hand, **own_executor().owner()})
        files.write_atomic(self._path, text.encode(), durable=False)

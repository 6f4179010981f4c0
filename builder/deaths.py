"""The batch in hand, on disk: what the next process knows of one that died.

Owns `runs/<run>/tasks/*.batch.json`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder import files


class Deaths:
    """The batch in hand, on disk, so that the next process knows in which rows the last one died.

    A batch in which the process died twice is halved; a single row in which it died twice has failed. A batch in the
    hand of a process that lives is a copy's of the task, and no death. Where others were being prepared ahead, it is
    not known which of them killed: each stands alone from then on, and no death is counted yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._groups: list[dict[str, Any]] = []
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return
        self._groups = data["groups"]
        if not files.process_lives(data["host"], data["pid"]):
            self._died(data["in_hand"])

    def _died(self, last: dict[str, Any]) -> None:
        shard, rows, deaths = last["shard"], last["rows"], last["deaths"]
        ahead = [(group["shard"], group["rows"]) for group in last["ahead"]]
        known = {(name, row) for name, found in [(shard, rows), *ahead] for row in found}
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
        self._groups += [{"shard": name, "rows": part, "deaths": count} for name, part, count in found]
        self._groups = [group for group in self._groups if group["rows"]]

    def groups(self, shard: str) -> list[list[int]]:
        """Rows of a shard that go into batches of their own."""
        return [group["rows"] for group in self._groups if group["shard"] == shard]

    def _deaths_of(self, shard: str, rows: list[int]) -> int:
        """Deaths in a batch: those of the group that it belongs to."""
        wanted = set(rows)
        groups = (group for group in self._groups if group["shard"] == shard and wanted <= set(group["rows"]))
        return next((group["deaths"] for group in groups), 0) if rows else 0

    def kills(self, shard: str, rows: list[int]) -> bool:
        """Whether this is one row that kills the process."""
        return self._deaths_of(shard, rows) >= 2

    def begin(self, shard: str, rows: list[int], ahead: Sequence[tuple[str, list[int]]] = ()) -> None:
        """Notes the batch that is processed now, and those that are prepared meanwhile, by shard."""
        others = [{"shard": name, "rows": found} for name, found in ahead]
        in_hand = {"shard": shard, "rows": rows, "ahead": others, "deaths": self._deaths_of(shard, rows)}
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        text = json.dumps({"groups": self._groups, "in_hand": in_hand, **owner})
        files.write_atomic(self._path, text.encode(), durable=False)

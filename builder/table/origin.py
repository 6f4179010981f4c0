"""Where a shard's rows come from, and what that was when they were read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

#: The kind of source of origins that name none: tar shards.
TARS = "shards"


@dataclass(frozen=True)
class Origin:
    """Where a shard's rows come from, and what that was when they were read.

    Attributes:
        path: absolute path of the file; of a tar shard the tar.
        size: its bytes; 0 where the rows come from no file.
        mtime_ns: its time of modification; 0 where the rows come from no file.
        reading: hash of what ingest was asked to carry into the table.
        version: ingest's version; a shard that an older one has read is still read.
        end_mark: whether zeros close the tar; true where version 1 has read it.
        kind: the kind of source, see `builder.sources.kinds`.
    """

    path: str
    size: int
    mtime_ns: int
    reading: str
    version: str = field(default="1", compare=False)
    end_mark: bool = field(default=True, compare=False)
    kind: str = TARS

    def to_json(self) -> bytes:
        """As column files and partitions have it in their metadata; tar shards are written as they always were."""
        values: dict[str, Any] = dict(vars(self))
        if self.kind == TARS:
            del values["kind"]
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Origin:
        """Raises ValueError or TypeError where it is damaged."""
        return cls(**json.loads(data))

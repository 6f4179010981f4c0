"""Where a shard's rows come from, and the state of that file when they were read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

#: The kind of an origin that does not name one: tar shards.
TARS = "shards"


@dataclass(frozen=True)
class Origin:
    """Where a shard's rows come from, and the state of that file when they were read.

    Attributes:
        path: absolute path of the file, for example of the tar.
        size: its bytes; 0 if the rows do not come from a file.
        mtime_ns: its time of modification; 0 if the rows do not come from a file.
        reading: hash of what ingest was asked to put into the table.
        version: the version of ingest that read the shard; an older one does not make ingest read it again.
        end_mark: whether zeros close the tar; always true if version 1 has read it.
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
        """The origin as stored in the metadata of column files and partitions; tar shards are stored without `kind`."""
        values: dict[str, Any] = dict(vars(self))
        if self.kind == TARS:
            del values["kind"]
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Origin:
        """Raises ValueError or TypeError if the data is damaged."""
        return cls(**json.loads(data))

"""What a kind of source is: how shards are found, read into the table, and opened for their bytes.

A new kind is one module with a class like this, and one line in `builder.sources.kinds`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import pyarrow as pa

from builder.config.problems import Problems
from builder.config.sections import DatasetSection
from builder.store.layout import Layout
from builder.table.origin import Origin
from builder.table.schema import Column


@dataclass(frozen=True)
class Found:
    """The shards that a pipeline names.

    Attributes:
        paths: the file that each is read from, by the shard's name, in the order of the table's shards.
        missing: paths that the pipeline names and that no shard can be read from; a wildcard that matches nothing
            stands for itself.
    """

    paths: dict[str, Path]
    missing: list[Path]

    def gone(self, shards: Iterable[str]) -> list[str]:
        """The shards of a table that the pipeline does not name any more: their rows stay, they are not written."""
        return [shard for shard in shards if shard not in self.paths]


@dataclass
class Seen:
    """Names of json fields.

    Attributes:
        wanted: those that ingest was asked to carry and that some sample has.
        others: some of those that it was not asked for.
    """

    wanted: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


@dataclass
class Read:
    """What one shard holds.

    Attributes:
        table: its rows in order, as if the shard had never been read before; the columns are `Source.columns`.
            `source_members` of a sample without bytes is an empty list.
        end_mark: whether its end is there: zeros that close a tar.
        counts: what else is counted, by name, to be added up over shards.
        remarks: what is strange about the shard as a whole, one sentence each.
        seen: which json fields there are.
    """

    table: pa.Table
    end_mark: bool = True
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)


class OpenShard(Protocol):
    """A shard that is open for reading."""

    def read(self, place: dict[str, Any]) -> bytes:
        """The bytes of one member.

        Args:
            place: its entry in `source_members`.

        Raises:
            ShardError: they are not there.
            ConflictError: the shard was changed since it was opened.
            OSError: the machine does not give them.
        """
        ...


class Source(Protocol):
    """One kind of source, with what a pipeline asks of it.

    Attributes:
        kind: the value of `[dataset] kind`, which origins carry too.
        version: raised when a column that ingest makes changes its meaning.
        changes: what each raised version changed, the oldest first.
        boxes: the json field of face boxes, in samples whose picture is replaced.
        has_hybrid_shards: true for tars: hybrid shards are written of such sources only.
        Options: the section `[dataset]` of a pipeline of this kind.
    """

    kind: ClassVar[str]
    version: ClassVar[str]
    changes: ClassVar[dict[str, str]]
    has_hybrid_shards: ClassVar[bool]
    Options: ClassVar[type[DatasetSection]]

    @property
    def boxes(self) -> str: ...

    @classmethod
    def from_options(cls, options: Any, problems: Problems) -> Self:
        """The source that a pipeline names; what is wrong with the options is added to the problems."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What the tasks of an ingest need to know of it."""
        ...

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self: ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that ingest makes: `schema.IDENTITY`, the source's own, and the status columns of `source`."""
        ...

    def with_columns_of(self, columns: Iterable[Column]) -> Self:
        """This source with the columns that a root already has: a pipeline that does not name them removes none.

        Raises:
            SchemaError: they do not fit together.
        """
        ...

    def find(self) -> Found:
        """The shards that the pipeline names.

        Raises:
            ConfigError: it names none, or two of one name.
        """
        ...

    def why_missing(self, path: Path) -> str:
        """Why a path of `Found.missing` is not a shard."""
        ...

    def identify(self, path: Path) -> Origin:
        """What a shard is now. Another origin than the table's means that the shard is read again."""
        ...

    def read(self, path: Path, shard: str, run: str) -> Read:
        """The rows of one shard.

        Raises:
            ShardError: it cannot be used; the table keeps what it had of it.
        """
        ...

    def digests(self, path: Path, rows: pa.Table) -> list[dict[str, int]] | None:
        """Digests of each sample's members, for shards that changed: see `changes.digests`. None without bytes."""
        ...

    def notices(self, seen: Seen) -> list[str]:
        """What to say after an ingest, for example of json fields that the pipeline names and no sample has."""
        ...

    @classmethod
    def opened(cls, layout: Layout, shard: str, origin: Origin) -> AbstractContextManager[OpenShard | None]:
        """A shard, open for reading members; None for a kind whose samples have no bytes.

        Raises:
            ShardError: it is gone, or is not what was ingested.
        """
        ...

"""The protocol of a kind of source: how shards are found, read into the table, and opened for their bytes.

A new kind is one module with a subclass of `Source`, and one line in `builder.sources.kinds`.
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

#: Most names of json fields that an ingest keeps, to suggest one for a misspelt name.
MAX_NAMES = 200
#: The beginning of a note about the shard as a whole, at its last sample.
OF_SHARD = "the shard: "


@dataclass(frozen=True)
class Found:
    """The shards that a pipeline names.

    Attributes:
        paths: the file of each shard by the shard's name, in the order of the table's shards.
        missing: paths that the pipeline names but from which no shard can be read; a wildcard that matches nothing is
            listed as it is.
    """

    paths: dict[str, Path]
    missing: list[Path]

    def gone(self, shards: Iterable[str]) -> list[str]:
        """The shards of a table that the pipeline no longer names: their rows stay, but they are not written."""
        return [shard for shard in shards if shard not in self.paths]


@dataclass
class Seen:
    """Names of json fields that samples have.

    Attributes:
        wanted: fields that ingest was asked to put into the table.
        others: some of the other fields: `MAX_NAMES` are enough.
    """

    wanted: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


@dataclass
class Read:
    """The content of one shard.

    Attributes:
        table: its rows in order, as if the shard had never been read before; the columns are `Source.columns`.
            `source_members` of a sample without bytes is an empty list.
        end_mark: whether the shard is complete: zeros close a tar.
        counts: other counts by name, to be added up over shards; `Source.summary` puts them into words.
        remarks: problems of the shard as a whole, one sentence each.
        seen: which json fields the samples have.
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
            ShardError: the bytes do not exist.
            ConflictError: the shard was changed since it was opened.
            OSError: a disk or a file server does not return the bytes.
        """
        ...


class Source(Protocol):
    """One kind of source, with the settings of a pipeline. Subclass it: what has a body here is the default.

    Attributes:
        kind: the value of `[dataset] kind`, also stored in origins.
        setting: the setting that names the shards, as messages call it: `dataset.shards`.
        version: raised when a column made by ingest changes its meaning.
        changes: what each raised version changed, the oldest first.
        has_hybrid_shards: true for tars: hybrid shards are written only from such sources.
        Options: the section `[dataset]` of a pipeline of this kind.
    """

    kind: ClassVar[str]
    setting: ClassVar[str]
    version: ClassVar[str]
    changes: ClassVar[dict[str, str]]
    has_hybrid_shards: ClassVar[bool]
    Options: ClassVar[type[DatasetSection]]

    @property
    def boxes(self) -> str | None:
        """The json field of face boxes in samples whose picture is replaced; None if the pipeline names none."""
        return None

    @classmethod
    def from_options(cls, options: Any, problems: Problems) -> Self:
        """The source that a pipeline names; errors in the options are added to the problems."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The settings that the tasks of an ingest need."""
        ...

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self: ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns made by ingest: `schema.IDENTITY`, the source's own, and the status columns of `source`."""
        ...

    def with_columns_of(self, columns: Iterable[Column]) -> Self:
        """This source with the columns that a root already has: a pipeline that does not name them removes none.

        Raises:
            SchemaError: the columns do not fit together.
        """
        ...

    def find(self) -> Found:
        """The shards that the pipeline names.

        Raises:
            ConfigError: there is none, or two have the same name.
        """
        ...

    def why_missing(self, path: Path) -> str:
        """Why a path of `Found.missing` is not a shard."""
        ...

    def identify(self, path: Path) -> Origin:
        """The current state of a shard. If it differs from the origin in the table, the shard is read again."""
        ...

    def read(self, path: Path, shard: str, run: str) -> Read:
        """The rows of one shard.

        Raises:
            ShardError: the shard cannot be used; the table keeps the rows that it has.
        """
        ...

    def digests(self, path: Path, rows: pa.Table) -> list[dict[str, int]] | None:
        """Digests of each sample's members, for shards that changed, as from `changes.digests`; None without bytes."""
        ...

    def notices(self, seen: Seen) -> list[str]:
        """Messages after an ingest, for example about json fields that the pipeline names but no sample has."""
        return []

    def summary(self, counts: dict[str, int]) -> list[str]:
        """Sentences about the counts of an ingest, those of `Read.counts` added up."""
        return []

    @classmethod
    def opened(cls, layout: Layout, shard: str, origin: Origin) -> AbstractContextManager[OpenShard | None]:
        """A shard, open for reading members; None for a kind whose samples have no bytes.

        Raises:
            ShardError: the shard is gone, or is not the one that was ingested.
        """
        ...

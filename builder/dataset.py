"""The Python API: a dataset root as an object, with the terms of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder import machine
from builder.errors import ConfigError
from builder.sources.reader import MemberReader
from builder.stages.finding import with_built_in
from builder.store.layout import Layout
from builder.table import root_schema
from builder.table.query import Samples
from builder.table.schema import arrow_schema
from builder.table.sql_text import DuckError, Sql, guarded

if TYPE_CHECKING:
    import polars


class Dataset:
    """A dataset root, for reading. Open it with `builder.open_dataset`."""

    def __init__(self, root: Path) -> None:
        self._layout = Layout(root)

    def __repr__(self) -> str:
        return f"builder.open_dataset({str(self.root)!r})"

    @property
    def root(self) -> Path:
        return self._layout.root

    @property
    def columns(self) -> dict[str, str]:
        """Every column's name and meaning."""
        return {column.name: column.meaning for column in root_schema.load_schema(self._layout)[1]}

    def sql(self, query: str, /, **params: Any) -> polars.DataFrame:
        """Answers one SELECT over the table `samples`, as `builder sql` does.

        Args:
            query: the SQL; `$name` is a parameter.
            params: the values of the parameters.

        Raises:
            ConfigError: not one SELECT, a parameter missing or unused, or an error of DuckDB.
        """
        columns = with_built_in(root_schema.load_schema(self._layout)[1])
        text = Sql(query, "sql()")
        with Samples(self._layout, columns, self._layout.partitions()) as samples:
            relation = samples.select(text, params)
            try:
                answer: polars.DataFrame = relation.pl()
            except DuckError as error:
                raise guarded(text, error) from error
            return answer

    def samples(self) -> polars.LazyFrame:
        """The whole table as a lazy frame, shard by shard in tar order; a column that a partition lacks is null there.

        Raises:
            ConfigError: the table has no samples yet.
        """
        import polars

        _, columns = root_schema.load_schema(self._layout)
        paths = [self._layout.partition(shard) for shard in self._layout.partitions()]
        if not paths:
            raise ConfigError("the table has no samples yet", where={"root": self.root}, fix="builder ingest")
        empty = polars.from_arrow(arrow_schema(columns).empty_table())
        assert isinstance(empty, polars.DataFrame)
        return polars.scan_parquet(
            paths, schema=empty.schema, missing_columns="insert", extra_columns="ignore", glob=False
        )

    def read_member(
        self, member: str, *, uid: str | None = None, shard: str | None = None, row: int | None = None
    ) -> bytes | None:
        """The bytes of one member of one sample: `image`, `json`, `txt`, any other extension, or `edit`.

        Args:
            member: `image` is the source's jpg, png or webp, `edit` the generated image (`image_format`).
            uid: the sample, if its uid is unique; otherwise give shard and row.

        Returns:
            The bytes, or None if the sample has no such member.

        Raises:
            ConfigError: no such sample, or more than one.
            ShardError: the source shard or the edits tar is gone or has changed.
            MachineError: a disk or a file server does not return the bytes.
        """
        if uid is not None:
            found = self.sql("select shard, row from samples where uid = $uid order by all", uid=uid).rows()
            name = f"uid '{uid}'"
        elif shard is not None and row is not None:
            query = "select shard, row from samples where shard = $shard and row = $row"
            found = self.sql(query, shard=shard, row=row).rows()
            name = f"shard '{shard}' row {row}"
        else:
            raise ConfigError("read_member needs uid=, or shard= and row=", fix="for example: uid='0a1b...'")
        if len(found) != 1:
            places = ", ".join(f"{shard} row {row}" for shard, row in found[:5]) or "none"
            raise ConfigError(
                f"{name} names {len(found)} samples",
                where={"root": self.root, "found": places},
                fix="give shard= and row=" if found else "name one of sql('select uid, shard, row from samples')",
            )
        [(shard, row)] = found
        try:
            with MemberReader(self._layout, shard, [member]) as reader:
                return reader.read(row, member)
        except OSError as error:
            raise machine.explained(error) from error


def open_dataset(root: str | Path) -> Dataset:
    """Opens a dataset root for reading.

    Raises:
        ConfigError: there is no table in that folder.
    """
    path = Path(root)
    if not Layout(path).is_root:
        raise ConfigError(f"there is no table in '{path}'", fix="name the folder of dataset.root, after builder ingest")
    return Dataset(path)

"""DuckDB over the table: a view `samples`, and restricted SQL that can only read it.

Owns every DuckDB connection of the package. Knows nothing about stages and runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa

from builder.errors import ConfigError
from builder.store.layout import Layout
from builder.table import schema, sessions
from builder.table.lookups import Lookup, literal_path
from builder.table.schema import Column
from builder.table.sessions import Session
from builder.table.sql_text import Sql, batches, check_repeatable, checked, guarded, refused, unread_table


class Samples:
    """A connection on which `samples` is the table and no other file can be read.

    Args:
        columns: the columns of the view; those that a partition lacks read as typed nulls.
        shards: the partitions, in order; files are named one by one, so that a query lists no folder.
        lookups: files to join, by the name of their view, which has a row for each uid that is both in these shards and
            in the files. They are read once, here; what is kept of them can spill to disk.
        deciding: SQL that decides which rows are processed: it must return the same rows on every machine at any time.

    Raises:
        ConfigError: the result of SQL in `deciding` depends on the machine; or the files of a lookup do not exist, lack
            a column, have no uid of these shards, or have different values for one.
    """

    def __init__(
        self,
        layout: Layout,
        columns: Sequence[Column],
        shards: Iterable[str],
        lookups: Mapping[str, Lookup] | None = None,
        *,
        deciding: Iterable[Sql] = (),
    ) -> None:
        names = frozenset(column.name for column in columns)
        by_order = [check_repeatable(sql, names).by_order for sql in deciding]
        paths = layout.partition_files(shards)
        self._session = Session(_view(columns, paths), tuple(paths), any(by_order))
        self._is_kept = not lookups
        try:
            self._instance = sessions.taken(self._session, lookups or {})
        except duckdb.Error as error:
            if (unread := unread_table(error)) is not None:
                raise unread from error
            raise
        self._connection = self._instance.connection.cursor()

    def __enter__(self) -> Samples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if self._is_kept and error is None:
            sessions.given_back(self._session, self._instance)
        else:
            self._instance.close()

    def select(
        self, sql: Sql, params: dict[str, Any] | None = None, *, around: str = "select * from {}"
    ) -> duckdb.DuckDBPyRelation:
        """Evaluates a SELECT as a subquery, so that it cannot write anything.

        Args:
            params: values of its $names; a missing or unused one is an error.
            around: the statement that reads it, with `{}` for the subquery.

        Raises:
            ConfigError: not one SELECT, wrong parameters, or an error of DuckDB.
        """
        text = checked(sql, params or {})
        before, _, after = around.partition("{}")
        try:
            return self._connection.sql(f"{before}(\n{text}\n){after}", params=params or None)
        except duckdb.Error as error:
            raise refused(sql, error, before.count("\n") + 1) from error

    def columns(self, sql: Sql, params: dict[str, Any] | None = None) -> dict[str, str]:
        """The names of an answer's columns, in the case of the SQL, with their types in DuckDB's words.

        Raises:
            ConfigError: as `select`, and if two names differ only in case.
        """
        self.select(sql, params)  # raises unless it is exactly one SELECT
        try:
            answer = self._connection.sql(checked(sql, params or {}), params=params or None)
        except duckdb.Error as error:
            raise refused(sql, error) from error
        found, first = list(answer.columns), dict[str, str]()
        for name in found:
            if first.setdefault(schema.folded(name), name) != name or found.count(name) > 1:
                raise ConfigError(
                    f"SQL returns two columns with the same name in SQL: '{first[schema.folded(name)]}' and '{name}'",
                    where={"file": sql.origin, "returned": ", ".join(found)},
                    fix="give one of them another name, or leave it out",
                )
        return dict(zip(found, map(str, answer.types), strict=True))

    def rows(
        self, sql: Sql, params: dict[str, Any] | None = None, *, around: str = "select * from {}"
    ) -> list[tuple[Any, ...]]:
        """All rows of a small answer."""
        relation = self.select(sql, params, around=around)
        try:
            return relation.fetchall()
        except duckdb.Error as error:
            raise guarded(sql, error) from error

    def table(self, sql: Sql, params: dict[str, Any] | None = None) -> pa.Table:
        """All rows of a small answer, with their types."""
        try:
            return self.select(sql, params).to_arrow_table()
        except duckdb.Error as error:
            raise guarded(sql, error) from error

    def stream(
        self, sql: Sql, params: dict[str, Any] | None = None, *, around: str = "select * from {}", rows: int
    ) -> Iterator[pa.RecordBatch]:
        """An answer of any size, in batches of about `rows` rows; several can be read at the same time."""
        text = checked(sql, params or {})
        before, _, after = around.partition("{}")
        try:
            relation = self._instance.connection.cursor().sql(f"{before}(\n{text}\n){after}", params=params or None)
            yield from batches(relation.to_arrow_reader(rows))
        except duckdb.Error as error:
            raise refused(sql, error, before.count("\n") + 1) from error

    def fixed(self, statement: str) -> list[tuple[Any, ...]]:
        """All rows of a statement of this package; the user's SQL goes through `select`.

        Raises:
            ShardError: a partition cannot be read.
        """
        try:
            return self._connection.sql(statement).fetchall()
        except duckdb.Error as error:
            if (unread := unread_table(error)) is not None:
                raise unread from error
            raise


def _view(columns: Sequence[Column], paths: Sequence[str]) -> str:
    if not paths:
        nulls = ", ".join(
            f"null::{schema.duckdb_type(column.type)} as {schema.quoted(column.name)}" for column in columns
        )
        return f"create view samples as select {nulls} where false"
    types = ", ".join(
        f"{name}: {{name: {name}, type: {schema.literal(schema.duckdb_type(column.type))}, default_value: NULL}}"
        for name, column in ((schema.literal(column.name), column) for column in columns)
    )
    names = ", ".join(schema.literal(literal_path(path)) for path in paths)
    return f"create view samples as select * from read_parquet([{names}], schema = map {{{types}}})"

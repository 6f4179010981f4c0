"""DuckDB over the table: a view `samples`, and SQL on a leash that can only read it.

Owns every DuckDB connection of the package. Knows nothing of stages and runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from builder import layout as places
from builder import schema
from builder.errors import BuilderError, ConfigError
from builder.layout import Layout
from builder.schema import Column

#: What DuckDB raises, also while an answer is being read.
DuckError = duckdb.Error
#: Runs any statement given as json, and so would slip through the check of the statement's type.
_FORBIDDEN = "json_execute_serialized_sql"


@dataclass(frozen=True)
class Sql:
    """SQL text with where it comes from.

    Attributes:
        text: exactly one SELECT.
        origin: the file, or what else to call it in a message.
    """

    text: str
    origin: str


def read_sql(name: str) -> Sql:
    """SQL out of a file: `./sql/` first, then as installed.

    Raises:
        ConfigError: no such file; the places looked at are listed.
    """
    relative = name.removeprefix("sql/")
    path, looked = (Path(name), [Path(name)]) if Path(name).is_file() else places.find("sql", relative)
    if path is None:
        raise ConfigError(
            f"no SQL file '{name}'",
            where={"looked at": ", ".join(str(place) for place in looked)},
            fix=f"write it, or copy the ones that come with builder: builder init DIR (then DIR/sql/{relative})",
        )
    return Sql(path.read_text("utf-8"), str(path))


class Samples:
    """A connection on which `samples` is the table and nothing else can be reached.

    Args:
        columns: the columns of the view; those that a partition lacks read as typed nulls.
        shards: the partitions, in order; files are named one by one, so no listing happens in a query.
    """

    def __init__(self, layout: Layout, columns: Sequence[Column], shards: Iterable[str]) -> None:
        paths = [str(layout.partition(shard)) for shard in shards]
        self._connection = duckdb.connect()
        run = self._connection.execute
        run("set autoinstall_known_extensions = false")
        run("set autoload_known_extensions = false")
        run("set preserve_insertion_order = false")
        run(f"set temp_directory = {_quoted(tempfile.gettempdir() + '/builder-spill')}")
        run(_view(columns, paths))
        run(f"set allowed_paths = [{', '.join(_quoted(path) for path in paths)}]")
        run("set enable_external_access = false")
        run("set lock_configuration = true")

    def __enter__(self) -> Samples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def select(
        self, sql: Sql, params: dict[str, Any] | None = None, *, around: str = "select * from {}"
    ) -> duckdb.DuckDBPyRelation:
        """Evaluates a SELECT as a subquery, in which nothing can be written.

        Args:
            params: values of its $names: one missing or unused is refused.
            around: the statement that reads it, `{}` standing for the subquery.

        Raises:
            ConfigError: not one SELECT, wrong parameters, or what DuckDB says of it.
        """
        text = checked(sql, params or {})
        try:
            return self._connection.sql(around.format(f"(\n{text}\n)"), params=params or None)
        except duckdb.Error as error:
            raise _refused(sql, error) from error

    def rows(
        self, sql: Sql, params: dict[str, Any] | None = None, *, around: str = "select * from {}"
    ) -> list[tuple[Any, ...]]:
        """All rows of a small answer."""
        relation = self.select(sql, params, around=around)
        try:
            return relation.fetchall()
        except duckdb.Error as error:
            raise _refused(sql, error) from error

    def fixed(self, statement: str) -> list[tuple[Any, ...]]:
        """All rows of a statement of the package's own."""
        return self._connection.sql(statement).fetchall()


def guarded(sql: Sql, error: duckdb.Error) -> BuilderError:
    """What DuckDB says while an answer is being read, with the file."""
    return _refused(sql, error)


def checked(sql: Sql, params: dict[str, Any]) -> str:
    """The text without its final semicolon, if it is exactly one SELECT with exactly these parameters."""
    text = sql.text.strip().rstrip(";").rstrip()
    try:
        statements = duckdb.extract_statements(text)
    except duckdb.Error as error:
        raise _refused(sql, error) from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT or _FORBIDDEN in text.lower():
        kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
        raise ConfigError(
            f"SQL must be exactly one SELECT, and this is: {kinds}",
            where={"file": sql.origin},
            fix="write one query that begins with select or with",
        )
    wanted = set(statements[0].named_parameters)
    if missing := sorted(wanted - set(params)):
        raise ConfigError(
            f"SQL uses ${missing[0]}, which has no value",
            where={"file": sql.origin, "values given": ", ".join(sorted(params)) or "none"},
            fix=f"add it to the params of the pipeline: {missing[0]} = ...",
        )
    if unused := sorted(set(params) - wanted):
        raise ConfigError(
            f"parameter '{unused[0]}' is given, but the SQL does not use ${unused[0]}",
            where={"file": sql.origin, "names in the SQL": ", ".join(f"${name}" for name in sorted(wanted)) or "none"},
            fix="remove it from the params of the pipeline, or use it",
        )
    return text


def _refused(sql: Sql, error: duckdb.Error) -> ConfigError:
    return ConfigError(f"DuckDB refuses the SQL: {str(error).strip()}", where={"file": sql.origin}, fix="edit that SQL")


def _view(columns: Sequence[Column], paths: list[str]) -> str:
    if not paths:
        nulls = ", ".join(f'null::{schema.duckdb_type(column.type)} as "{column.name}"' for column in columns)
        return f"create view samples as select {nulls} where false"
    types = ", ".join(
        f"{_quoted(column.name)}: {{name: {_quoted(column.name)}, type: {_quoted(schema.duckdb_type(column.type))}, "
        "default_value: NULL}"
        for column in columns
    )
    names = ", ".join(_quoted(path) for path in paths)
    return f"create view samples as select * from read_parquet([{names}], schema = map {{{types}}})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

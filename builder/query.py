"""DuckDB over the table: a view `samples`, and SQL on a leash that can only read it.

Owns every DuckDB connection of the package. Knows nothing of stages and runs.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa

from builder import layout as places
from builder import schema
from builder.errors import BuilderError, ConfigError, TransientError
from builder.layout import Layout
from builder.schema import Column

#: What DuckDB raises, also while an answer is being read.
DuckError = duckdb.Error
#: Runs any statement given as json, and so would slip through the check of the statement's type.
_FORBIDDEN = "json_execute_serialized_sql"
#: What DuckDB takes for a pattern in a file name.
_MAGIC = re.compile(r"([*?\[])")


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
        ConfigError: no such file, with the places looked at, or no text.
    """
    relative = name.removeprefix("sql/")
    path, looked = (Path(name), [Path(name)]) if Path(name).is_file() else places.find("sql", relative)
    if path is None:
        raise ConfigError(
            f"no SQL file '{name}'",
            where={"looked at": ", ".join(str(place) for place in looked)},
            fix=f"write it, or copy the ones that come with builder: builder init DIR (then DIR/sql/{relative})",
        )
    try:
        return Sql(path.read_text("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the SQL is not UTF-8 text", where={"file": path, "byte": error.start}, fix="save it as UTF-8"
        ) from None


class Samples:
    """A connection on which `samples` is the table and nothing else can be reached.

    Args:
        columns: the columns of the view; those that a partition lacks read as typed nulls.
        shards: the partitions, in order; files are named one by one, so no listing happens in a query.
    """

    def __init__(self, layout: Layout, columns: Sequence[Column], shards: Iterable[str]) -> None:
        paths = [str(layout.partition(shard)) for shard in shards]
        self._connection = duckdb.connect()
        try:
            self._open(columns, paths)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, columns: Sequence[Column], paths: Sequence[str]) -> None:
        run = self._connection.execute
        run("set autoinstall_known_extensions = false")
        run("set autoload_known_extensions = false")
        run("set preserve_insertion_order = true")  # so that LIMIT alone takes the same rows every time
        run(f"set temp_directory = {_quoted(_spill_folder())}")
        run(_view(columns, paths))
        allowed = dict.fromkeys([*paths, *map(_literal, paths)])  # DuckDB asks for the name that it was given, too
        run(f"set allowed_paths = [{', '.join(_quoted(path) for path in allowed)}]")
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
        before, _, after = around.partition("{}")
        try:
            return self._connection.sql(f"{before}(\n{text}\n){after}", params=params or None)
        except duckdb.Error as error:
            raise _refused(sql, error, before.count("\n") + 1) from error

    def rows(
        self, sql: Sql, params: dict[str, Any] | None = None, *, around: str = "select * from {}"
    ) -> list[tuple[Any, ...]]:
        """All rows of a small answer."""
        relation = self.select(sql, params, around=around)
        try:
            return relation.fetchall()
        except duckdb.Error as error:
            raise guarded(sql, error) from error

    def stream(
        self, sql: Sql, params: dict[str, Any] | None = None, *, around: str = "select * from {}", rows: int
    ) -> Iterator[pa.RecordBatch]:
        """An answer of any size, in batches of about so many rows; several may be read side by side."""
        text = checked(sql, params or {})
        before, _, after = around.partition("{}")
        try:
            relation = self._connection.cursor().sql(f"{before}(\n{text}\n){after}", params=params or None)
            yield from relation.to_arrow_reader(rows)
        except duckdb.Error as error:
            raise _refused(sql, error, before.count("\n") + 1) from error

    def fixed(self, statement: str) -> list[tuple[Any, ...]]:
        """All rows of a statement of the package's own."""
        return self._connection.sql(statement).fetchall()


def guarded(sql: Sql, error: duckdb.Error) -> BuilderError:
    """What DuckDB says while an answer is being read, with the file."""
    return _refused(sql, error, 1)


def parameters(sql: Sql) -> list[str]:
    """The $names of a text; none of one that is no SQL, which `checked` refuses."""
    try:
        statements = duckdb.extract_statements(sql.text)
    except duckdb.Error:
        return []
    return sorted({name for statement in statements for name in statement.named_parameters})


def checked(sql: Sql, params: dict[str, Any]) -> str:
    """The text with blanks for its semicolons, if it is exactly one SELECT with exactly these parameters."""
    try:
        statements = duckdb.extract_statements(sql.text)
    except duckdb.Error as error:
        raise _refused(sql, error) from error
    kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
    if kinds != "SELECT" or _FORBIDDEN in sql.text.lower():
        raise ConfigError(
            f"SQL must be exactly one SELECT, and this is: {_FORBIDDEN if kinds == 'SELECT' else kinds}",
            where={"file": sql.origin},
            fix="write one query that begins with select or with",
        )
    wanted = set(statements[0].named_parameters)
    if missing := sorted(wanted - set(params)):
        raise ConfigError(
            f"SQL uses ${missing[0]}, which has no value",
            where={"file": sql.origin, "values given": ", ".join(sorted(params)) or "none"},
            fix=f"add {missing[0]} = ... to the params of the pipeline; with builder sql: --param {missing[0]}=...",
        )
    if unused := sorted(set(params) - wanted):
        raise ConfigError(
            f"parameter '{unused[0]}' is given, but the SQL does not use ${unused[0]}",
            where={"file": sql.origin, "names in the SQL": ", ".join(f"${name}" for name in sorted(wanted)) or "none"},
            fix="leave it out, or use it in the SQL",
        )
    return _without_semicolons(sql.text)


def _without_semicolons(text: str) -> str:
    """One statement as a subquery can hold it: only what the tokenizer takes for a semicolon is one."""
    raw = bytearray(text, "utf-8")
    for offset, _ in duckdb.tokenize(text):
        if raw[offset] == ord(";"):
            raw[offset] = ord(" ")
    return raw.decode("utf-8")


def _refused(sql: Sql, error: duckdb.Error, shift: int = 0) -> BuilderError:
    """DuckDB's own words, its line numbers counted from the first line of the user's text."""
    if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException):  # nothing that the text could mend
        return TransientError(
            f"DuckDB cannot go on: {' '.join(str(error).split())}",
            where={"file": sql.origin},
            fix="mend that (free some disk or memory, or raise ulimit -n), then run the same command again",
        )
    text = re.sub(r"LINE (\d+):", lambda match: f"LINE {int(match[1]) - shift}:", str(error).strip())
    first, *more = [line for line in text.splitlines() if line.strip()]
    what = "\n".join([f"DuckDB refuses the SQL: {first}", *(f"  {line}" for line in more)])
    return ConfigError(what, where={"file": sql.origin}, fix="edit that SQL")


def _spill_folder() -> str:
    """A name that no other connection and no other user has; DuckDB makes the folder when it spills, and removes it."""
    return f"{tempfile.gettempdir()}/builder-spill-{os.getpid()}-{secrets.token_hex(4)}"


def _view(columns: Sequence[Column], paths: Sequence[str]) -> str:
    if not paths:
        nulls = ", ".join(f'null::{schema.duckdb_type(column.type)} as "{column.name}"' for column in columns)
        return f"create view samples as select {nulls} where false"
    types = ", ".join(
        f"{_quoted(column.name)}: {{name: {_quoted(column.name)}, type: {_quoted(schema.duckdb_type(column.type))}, "
        "default_value: NULL}"
        for column in columns
    )
    names = ", ".join(_quoted(_literal(path)) for path in paths)
    return f"create view samples as select * from read_parquet([{names}], schema = map {{{types}}})"


def _literal(path: str) -> str:
    """A path as read_parquet takes it for that one file: 'a*.parquet' would be every shard that begins with a."""
    return _MAGIC.sub(r"[\1]", path)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

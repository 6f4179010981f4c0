"""SQL as users write it: exactly one SELECT with its parameters, and DuckDB's errors about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from builder.errors import BuilderError, ConfigError, ShardError, TransientError
from builder.store import layout as places
from builder.table import repeatable, schema

#: The base class of DuckDB's errors, which can also be raised while an answer is being read.
DuckError = duckdb.Error
#: Runs any statement given as json, so the check of the statement's type would not see it.
_FORBIDDEN = "json_execute_serialized_sql"
#: In DuckDB's message about a file that is not a parquet file.
_NO_PARQUET = "magic bytes"


@dataclass(frozen=True)
class Sql:
    """SQL text with where it comes from.

    Attributes:
        text: exactly one SELECT.
        origin: the file, or another name for it in messages.
    """

    text: str
    origin: str


def read_sql(name: str) -> Sql:
    """Reads SQL from a file: from `./sql/` if it is there, else from the installed folder.

    Raises:
        ConfigError: the file does not exist, with the paths tried, or is not UTF-8 text.
    """
    name = places.local(name)
    relative = name.removeprefix("sql/")
    path, looked = (Path(name), [Path(name)]) if Path(name).is_file() else places.find("sql", relative)
    if path is None:
        stems = sorted(file.stem for file in places.installed("sql").glob("*.sql"))
        near = difflib.get_close_matches(Path(relative).stem, stems, 1)
        names = ", ".join(f"{stem}.sql" for stem in stems)
        raise ConfigError(
            f"no SQL file '{name}'",
            where={"looked at": ", ".join(str(place) for place in looked)},
            fix=f"did you mean '{near[0]}.sql'?" if near else f"write it, or name one that comes with builder: {names}",
        )
    try:
        return Sql(path.read_text("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the SQL is not UTF-8 text", where={"file": path, "byte": error.start}, fix="save it as UTF-8"
        ) from None


def check_repeatable(sql: Sql, columns: frozenset[str]) -> repeatable.Finding:
    """Refuses SQL whose result depends on the machine."""
    found = repeatable.examine(sql.text, columns)
    if found.refused:
        place = f"{sql.origin}:{found.line}" if found.line else sql.origin
        raise ConfigError(
            f"SQL uses {found.refused}, which depends on the machine, not the table: another run may find other rows",
            where={"file": place},
            fix=f"{found.fix}; builder sql and --where may use it",
        )
    return found


def batches(reader: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches of an answer.

    Raises:
        DuckError: DuckDB failed after the first batch. Arrow reports that as an OSError with DuckDB's message.
    """
    try:
        yield from reader
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kinds = {"IO Error": duckdb.IOException, "Out of Memory Error": duckdb.OutOfMemoryException}
        raise kinds.get(str(error).partition(":")[0], duckdb.Error)(str(error)) from error


def guarded(sql: Sql, error: duckdb.Error) -> BuilderError:
    """An error of DuckDB while an answer is being read, with the file of the SQL."""
    return refused(sql, error, 1)


def parameters(sql: Sql) -> list[str]:
    """The $names of a text; an empty list if it is not SQL, which `checked` refuses."""
    try:
        statements = duckdb.extract_statements(sql.text)
    except duckdb.Error:
        return []
    return sorted({name for statement in statements for name in statement.named_parameters})


def checked(sql: Sql, params: dict[str, Any]) -> str:
    """The text with spaces instead of semicolons, if it is exactly one SELECT with exactly these parameters.

    Raises:
        ConfigError: it is not.
    """
    try:
        statements = duckdb.extract_statements(sql.text)
    except duckdb.Error as error:
        raise refused(sql, error) from error
    kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
    if kinds != "SELECT" or _FORBIDDEN in sql.text.lower():
        raise ConfigError(
            f"SQL must be exactly one SELECT, and this is: {_FORBIDDEN if kinds == 'SELECT' else kinds}",
            where={"file": sql.origin},
            fix="write one query that begins with select or with",
        )
    wanted = set(statements[0].named_parameters)
    given = {schema.folded(name) for name in params}
    if len(given) < len(params):
        raise ConfigError(
            "two parameters have the same name: SQL ignores the case of letters",
            where={"file": sql.origin, "values given": ", ".join(sorted(params))},
            fix="leave one of them out",
        )
    if missing := sorted(name for name in wanted if schema.folded(name) not in given):
        raise ConfigError(
            f"SQL uses ${missing[0]}, which has no value",
            where={"file": sql.origin, "values given": ", ".join(sorted(params)) or "none"},
            fix=f"add {missing[0]} = ... to the params of the pipeline; with builder sql: --param {missing[0]}=...",
        )
    used = {schema.folded(name) for name in wanted}
    if unused := sorted(name for name in params if schema.folded(name) not in used):
        raise ConfigError(
            f"parameter '{unused[0]}' is given, but the SQL does not use ${unused[0]}",
            where={"file": sql.origin, "names in the SQL": ", ".join(f"${name}" for name in sorted(wanted)) or "none"},
            fix="leave it out, or use it in the SQL",
        )
    return _without_semicolons(sql.text)


def _without_semicolons(text: str) -> str:
    """One statement in a form that can be a subquery. The tokenizer finds the semicolons: those in texts are kept."""
    raw = bytearray(text, "utf-8")
    for offset, _ in duckdb.tokenize(text):
        if raw[offset] == ord(";"):
            raw[offset] = ord(" ")
    return raw.decode("utf-8")


def refused(sql: Sql, error: duckdb.Error, shift: int = 0) -> BuilderError:
    """DuckDB's message, with line numbers counted from the first line of the user's text."""
    if (unread := unread_table(error)) is not None:  # the SQL is not the cause
        unread.where = {"file": sql.origin, **unread.where}
        return unread
    text = re.sub(r"LINE (\d+):", lambda match: f"LINE {int(match[1]) - shift}:", str(error).strip())
    first, *more = [line for line in text.splitlines() if line.strip()]
    what = "\n".join([f"DuckDB refuses the SQL: {first}", *(f"  {line}" for line in more)])
    return ConfigError(what, where={"file": sql.origin}, fix="edit that SQL")


def repeats_a_row(what: str, sql: Sql, shard: str, row: int) -> ConfigError:
    """The error for SQL that returns a sample more than once.

    Args:
        what: which SQL it is: `work SQL`.
    """
    return ConfigError(
        f"{what} returns row {row} of shard '{shard}' more than once",
        where={"file": sql.origin},
        fix="return each sample once: select distinct on (shard, row), or aggregate the join that repeats it",
    )


def unread_table(error: duckdb.Error) -> BuilderError | None:
    """The error for a table that DuckDB cannot read; None for any other error of DuckDB."""
    if _NO_PARQUET in str(error):
        return ShardError(
            f"the table cannot be read: {' '.join(str(error).split())}",
            fix="rm the partition that it names, then: builder fold",
        )
    if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException):
        return TransientError(
            f"DuckDB cannot go on: {' '.join(str(error).split())}",
            fix="free some disk or memory, or raise ulimit -n, then run the same command again",
        )
    return None

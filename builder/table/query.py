"""DuckDB over the table: a view `samples`, and SQL on a leash that can only read it.

Owns every DuckDB connection of the package. Knows nothing of stages and runs.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from builder import machine
from builder.errors import BuilderError, ConfigError, ShardError, TransientError
from builder.store import globs
from builder.store import layout as places
from builder.store.layout import Layout
from builder.table import repeatable, schema
from builder.table.schema import Column

#: What DuckDB raises, also while an answer is being read.
DuckError = duckdb.Error
#: Runs any statement given as json, and so would slip through the check of the statement's type.
_FORBIDDEN = "json_execute_serialized_sql"
#: What DuckDB takes for a pattern in a file name.
_MAGIC = re.compile(r"([*?\[])")
#: DuckDB's words on a file that is no parquet file.
_NO_PARQUET = "magic bytes"
#: Uids that the message about ambiguous ones names.
_EXAMPLES = 3


@dataclass(frozen=True)
class Lookup:
    """Parquet files beside the samples, which SQL may join by uid.

    Attributes:
        files: a path, or a glob of paths.
        columns: of each column of the view its type, and the names under which the files may have it. `uid` is one.
    """

    files: str
    columns: Mapping[str, tuple[pa.DataType, tuple[str, ...]]]


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


class Samples:
    """A connection on which `samples` is the table and nothing else can be reached.

    Args:
        columns: the columns of the view; those that a partition lacks read as typed nulls.
        shards: the partitions, in order; files are named one by one, so no listing happens in a query.
        lookups: files to join, by the name of their view: a row for each uid that these shards have and the files too.
            They are read here, once, and what is kept of them spills to disk.
        deciding: SQL that decides what becomes of rows: it gives the same rows on every machine and at any time.

    Raises:
        ConfigError: something in `deciding` is decided by the machine and not by the table; files of a lookup that do
            not exist, lack a column, have no uid of these shards, or say different things of one.
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
        by_order = [_check_repeatable(sql, names).by_order for sql in deciding]
        paths = layout.partition_files(shards)
        self._connection = duckdb.connect()
        try:
            if any(by_order):
                self._connection.execute("set threads = 1")
            self._open(columns, paths, lookups or {})
        except BaseException as error:
            self._connection.close()
            if isinstance(error, duckdb.Error) and (unread := _unread(error)) is not None:
                raise unread from error
            raise

    def _open(self, columns: Sequence[Column], paths: Sequence[str], lookups: Mapping[str, Lookup]) -> None:
        run = self._connection.execute
        run("set autoinstall_known_extensions = false")
        run("set autoload_known_extensions = false")
        run("set timezone = 'UTC'")
        run("set calendar = 'gregorian'")
        run("set preserve_insertion_order = true")  # so that LIMIT alone takes the same rows every time
        run(f"set temp_directory = {_quoted(_spill_folder())}")
        run(_view(columns, paths))
        for name, lookup in lookups.items():
            _look_up(self._connection, name, lookup)
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

    def names(self, sql: Sql, params: dict[str, Any] | None = None) -> list[str]:
        """The names that an answer has, in the case of the SQL.

        Raises:
            ConfigError: as `select` does, and where two names differ in case alone.
        """
        self.select(sql, params)  # a SELECT and nothing else
        try:
            found = list(self._connection.sql(checked(sql, params or {}), params=params or None).columns)
        except duckdb.Error as error:
            raise _refused(sql, error) from error
        first: dict[str, str] = {}
        for name in found:
            if first.setdefault(schema.folded(name), name) != name or found.count(name) > 1:
                raise ConfigError(
                    f"SQL returns two columns that are one name to it: '{first[schema.folded(name)]}' and '{name}'",
                    where={"file": sql.origin, "returned": ", ".join(found)},
                    fix="give one of them another name, or leave it out",
                )
        return found

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
        """An answer of any size, in batches of about so many rows; several may be read side by side."""
        text = checked(sql, params or {})
        before, _, after = around.partition("{}")
        try:
            relation = self._connection.cursor().sql(f"{before}(\n{text}\n){after}", params=params or None)
            yield from batches(relation.to_arrow_reader(rows))
        except duckdb.Error as error:
            raise _refused(sql, error, before.count("\n") + 1) from error

    def fixed(self, statement: str) -> list[tuple[Any, ...]]:
        """All rows of a statement of the package's own.

        Raises:
            ShardError: a partition cannot be read.
        """
        try:
            return self._connection.sql(statement).fetchall()
        except duckdb.Error as error:
            if (unread := _unread(error)) is not None:
                raise unread from error
            raise


def _check_repeatable(sql: Sql, columns: frozenset[str]) -> repeatable.Finding:
    """Refuses SQL in which the machine decides something."""
    found = repeatable.examine(sql.text, columns)
    if found.refused:
        place = f"{sql.origin}:{found.line}" if found.line else sql.origin
        raise ConfigError(
            f"SQL uses {found.refused}, which the machine decides and not the table: another run would find other rows",
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
    given = {schema.folded(name) for name in params}
    if len(given) < len(params):
        raise ConfigError(
            "two parameters have one name: SQL does not tell capitals from small letters",
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
    """One statement as a subquery can hold it: only what the tokenizer takes for a semicolon is one."""
    raw = bytearray(text, "utf-8")
    for offset, _ in duckdb.tokenize(text):
        if raw[offset] == ord(";"):
            raw[offset] = ord(" ")
    return raw.decode("utf-8")


def _refused(sql: Sql, error: duckdb.Error, shift: int = 0) -> BuilderError:
    """DuckDB's own words, its line numbers counted from the first line of the user's text."""
    if (unread := _unread(error)) is not None:  # nothing that the text could mend
        unread.where = {"file": sql.origin, **unread.where}
        return unread
    text = re.sub(r"LINE (\d+):", lambda match: f"LINE {int(match[1]) - shift}:", str(error).strip())
    first, *more = [line for line in text.splitlines() if line.strip()]
    what = "\n".join([f"DuckDB refuses the SQL: {first}", *(f"  {line}" for line in more)])
    return ConfigError(what, where={"file": sql.origin}, fix="edit that SQL")


def _unread(error: duckdb.Error) -> BuilderError | None:
    """DuckDB's words on a table that it cannot read; None of any other error."""
    if _NO_PARQUET in str(error):
        return ShardError(
            f"the table cannot be read: {' '.join(str(error).split())}",
            fix="rm the partition that it names: it is folded again if it is the table's (builder fold)",
        )
    if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException):
        return TransientError(
            f"DuckDB cannot go on: {' '.join(str(error).split())}",
            fix="mend that (free some disk or memory, or raise ulimit -n), then run the same command again",
        )
    return None


def _spill_folder() -> str:
    """A name that no other connection and no other user has; DuckDB makes the folder when it spills, and removes it."""
    return f"{tempfile.gettempdir()}/builder-spill-{os.getpid()}-{secrets.token_hex(4)}"


def _view(columns: Sequence[Column], paths: Sequence[str]) -> str:
    if not paths:
        nulls = ", ".join(
            f"null::{schema.duckdb_type(column.type)} as {schema.quoted(column.name)}" for column in columns
        )
        return f"create view samples as select {nulls} where false"
    types = ", ".join(
        f"{_quoted(column.name)}: {{name: {_quoted(column.name)}, type: {_quoted(schema.duckdb_type(column.type))}, "
        "default_value: NULL}"
        for column in columns
    )
    names = ", ".join(_quoted(_literal(path)) for path in paths)
    return f"create view samples as select * from read_parquet([{names}], schema = map {{{types}}})"


# --- lookups ---


def _look_up(connection: duckdb.DuckDBPyConnection, name: str, lookup: Lookup) -> None:
    """Makes the table of a lookup: one row a uid of `samples`, a null giving way to what another row knows."""
    rows = _rows_of(name, lookup)
    others = [column for column in lookup.columns if column != "uid"]
    values = ", ".join(f'any_value("{column}") as "{column}"' for column in others)
    differ = " or ".join(f'min("{column}") <> max("{column}")' for column in others)
    try:
        connection.execute(
            f'create table "{name}" as select uid, {values}, coalesce({differ}, false) as is_ambiguous '
            f"from ({rows}) where uid in (select uid from samples) group by uid"
        )
        count, uids = connection.execute(
            f'select count(*), min(uid, {_EXAMPLES}) from "{name}" where is_ambiguous'
        ).fetchall()[0]
        if count:
            listed = ", ".join(map(_quoted, uids))
            found = connection.execute(
                f"select distinct * from ({rows}) where uid in ({listed}) order by all limit {3 * _EXAMPLES}"
            ).fetchall()
            raise ConfigError(
                f"{count} uids of the samples are ambiguous in '{name}': the files say different things of them",
                where={f"row {i}": ", ".join([*map(str, row[:-1]), f"in {row[-1]}"]) for i, row in enumerate(found, 1)},
                fix=f"name files in '{lookup.files}' that agree, or take the wrong rows out of them",
            )
        connection.execute(f'alter table "{name}" drop column is_ambiguous')
        examples = [connection.execute(f"select uid from {of} limit 1").fetchone() for of in ("samples", f"({rows})")]
        if examples[0] and not connection.execute(f'select 1 from "{name}" limit 1').fetchone():
            one, other = ("none" if found is None else str(found[0]) for found in examples)
            raise ConfigError(
                f"no uid of the samples is in the files of '{name}'",
                where={"files": lookup.files, "a uid of the samples": one, "a uid of the files": other},
                fix="name the files of this dataset",
            )
    except duckdb.Error as error:
        if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException):
            raise _refused(Sql("", lookup.files), error) from error
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the files of '{name}' do not fit: {first}",
            where={"files": lookup.files, **{c: schema.type_text(kind) for c, (kind, _) in lookup.columns.items()}},
            fix="name files whose columns have these types",
        ) from error


def _rows_of(name: str, lookup: Lookup) -> str:
    """A SELECT of all rows of a lookup's files: its columns with their types, and the file.

    Raises:
        ConfigError: there is no file, one is no parquet file, or lacks a column.
        OSError: the machine does not list them.
    """
    paths = []
    for path in globs.matching(places.local(lookup.files)):
        if _is_file(path):
            paths.append(path)
        elif path.endswith(".parquet") or not os.path.isdir(path):  # noqa: PTH112 - as given
            raise ConfigError(
                "the parquet file cannot be read: it is a folder, a link to nothing or no regular file",
                where={"file": path},
                fix="mend it, or name other files",
            )
    if not paths:
        raise ConfigError(
            f"no file matches '{lookup.files}', which '{name}' is to be read from",
            fix="name parquet files, relative to the working directory: a path, or a glob such as 'metadata/*.parquet'",
        )
    alike: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        alike.setdefault(_names_in(path, lookup), []).append(path)
    return " union all ".join(_selected(lookup, names, files) for names, files in alike.items())


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - as given
    except OSError as error:
        if machine.is_of_the_machine(error):
            raise
        return False


def _names_in(path: str, lookup: Lookup) -> tuple[str, ...]:
    """The names that a file has for the columns of a lookup; reads its footer."""
    try:
        found = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        if machine.is_of_the_machine(error):
            raise
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the parquet file cannot be read: {first}", where={"file": path}, fix="mend it, or name other files"
        ) from error
    names = []
    for column, (_, known) in lookup.columns.items():
        alike = [one for name in known for one in found if schema.folded(one) == schema.folded(name)]
        name = next((name for name in known if name in found), alike[0] if alike else None)
        if name is None:
            raise ConfigError(
                f"the file has no column '{column}'",
                where={"file": path, "names looked for": ", ".join(known), "columns found": ", ".join(found) or "none"},
                fix="write the column into the file, or name other files"
                + (" (dataset2metadata: add uid to additional_fields)" if column == "uid" else ""),
            )
        names.append(name)
    return tuple(names)


def _selected(lookup: Lookup, names: Sequence[str], paths: Sequence[str]) -> str:
    """A SELECT over files that name their columns alike."""
    kinds = [schema.duckdb_type(kind) for kind, _ in lookup.columns.values()]
    columns = ", ".join(
        f'cast({schema.quoted(name)} as {kind}) as "{column}"'
        for name, kind, column in zip(names, kinds, lookup.columns, strict=True)
    )
    types = ", ".join(
        f"{_quoted(name)}: {{name: {_quoted(name)}, type: {_quoted(kind)}, default_value: NULL}}"
        for name, kind in zip(names, kinds, strict=True)
    )
    files = ", ".join(_quoted(_literal(path)) for path in paths)
    return f"select {columns}, filename from read_parquet([{files}], schema = map {{{types}}})"


# --- names ---


def _literal(path: str) -> str:
    """A path as read_parquet takes it for that one file: 'a*.parquet' would be every shard that begins with a."""
    return _MAGIC.sub(r"[\1]", path)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

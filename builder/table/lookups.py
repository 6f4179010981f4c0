"""Lookups: parquet files outside the table that SQL may join by uid."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from builder import machine
from builder.errors import ConfigError
from builder.store import globs
from builder.store import layout as places
from builder.table import schema
from builder.table.sql_text import Sql, refused

#: Characters that make a file name a pattern for DuckDB.
_MAGIC = re.compile(r"([*?\[])")
#: Ambiguous uids named in the message about them.
_EXAMPLES = 3


@dataclass(frozen=True)
class Lookup:
    """Parquet files outside the table that SQL may join by uid.

    Attributes:
        files: a path, or a glob of paths.
        columns: the columns of the view, with their types and the names that they may have in the files; one is `uid`.
    """

    files: str
    columns: Mapping[str, tuple[pa.DataType, tuple[str, ...]]]


# --- lookups ---


def look_up(connection: duckdb.DuckDBPyConnection, name: str, lookup: Lookup) -> None:
    """Creates the table of a lookup: one row per uid of `samples`; values from other rows of the uid replace nulls."""
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
            listed = ", ".join(map(schema.literal, uids))
            found = connection.execute(
                f"select distinct * from ({rows}) where uid in ({listed}) order by all limit {3 * _EXAMPLES}"
            ).fetchall()
            raise ConfigError(
                f"{count} uids of the samples are ambiguous in '{name}': the files have different values for them",
                where={f"row {i}": ", ".join([*map(str, row[:-1]), f"in {row[-1]}"]) for i, row in enumerate(found, 1)},
                fix=f"name files that agree instead of '{lookup.files}', or delete the wrong rows from them",
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
            raise refused(Sql("", lookup.files), error) from error
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the files of '{name}' do not fit: {first}",
            where={"files": lookup.files, **{c: schema.type_text(kind) for c, (kind, _) in lookup.columns.items()}},
            fix="name files whose columns have these types",
        ) from error


def _rows_of(name: str, lookup: Lookup) -> str:
    """A SELECT of all rows of a lookup's files: its columns with their types, and the file.

    Raises:
        ConfigError: no file matches, or one is not a parquet file or lacks a column.
        OSError: a disk or a file server does not list the files.
    """
    paths = []
    for path in globs.matching(places.local(lookup.files)):
        if _is_file(path):
            paths.append(path)
        elif path.endswith(".parquet") or not os.path.isdir(path):  # noqa: PTH112 - as given
            raise ConfigError(
                "the parquet file cannot be read: it is a folder, a broken link or not a regular file",
                where={"file": path},
                fix="replace it by a parquet file, or name other files",
            )
    if not paths:
        raise ConfigError(
            f"no file matches '{lookup.files}', from which '{name}' is read",
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
    """The names of a lookup's columns in one file, from its footer."""
    try:
        found = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        if machine.is_of_the_machine(error):
            raise
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the parquet file cannot be read: {first}",
            where={"file": path},
            fix="download or write it again, or name other files",
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
    """A SELECT over files whose columns have the same names."""
    kinds = [schema.duckdb_type(kind) for kind, _ in lookup.columns.values()]
    columns = ", ".join(
        f'cast({schema.quoted(name)} as {kind}) as "{column}"'
        for name, kind, column in zip(names, kinds, lookup.columns, strict=True)
    )
    types = ", ".join(
        f"{schema.literal(name)}: {{name: {schema.literal(name)}, type: {schema.literal(kind)}, default_value: NULL}}"
        for name, kind in zip(names, kinds, strict=True)
    )
    files = ", ".join(schema.literal(literal_path(path)) for path in paths)
    return f"select {columns}, filename from read_parquet([{files}], schema = map {{{types}}})"


# --- names ---


def literal_path(path: str) -> str:
    """A path escaped for read_parquet, so that 'a*.parquet' names one file, and not all files that begin with a."""
    return _MAGIC.sub(r"[\1]", path)

"""The table on disk: commit column files, fold them into partitions, heal, realign, sweep.

Owns the rules by which rows reach `columns/`, `samples/` and `schema/`. No lock, no lease, no clock: a generation is
created once or not at all, and the partition is a pure function of the newest generations.

A sample is known by its key: of several with one key the n-th stays the n-th. `rows` is the identity of a shard's rows,
recorded by every column file and work set: files of one `rows` are aligned row by row. An ingest that finds the same
keys in the same order keeps it, whatever else changed. Of files with different `rows` the answers move to where their
key is now; those of keys that are gone stay in the column file, behind the shard's rows, and come back with the key. So
an ingest drops no answer: whether it is still that of its sample, `builder.engine.outdated` tells. A task of other rows
than the shard has now leaves the shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builder.errors import ConflictError, SchemaError, ShardError, where
from builder.store import files
from builder.store.layout import Layout, generation_of, names
from builder.table import schema
from builder.table.schema import SOURCE, Column

#: Generations of a column file that a sweep keeps: readers may still hold the listing before the newest.
KEPT_GENERATIONS = 2
_ROWS, _SOURCE, _SWEPT, _GONE, _FOLDED, _SCHEMA = (
    b"builder." + name for name in (b"rows", b"source", b"swept", b"gone", b"folded", b"schema")
)
#: Which sample of a shard it is: its key, and how many before it have that key.
Identity: TypeAlias = tuple[str, int]


@dataclass(frozen=True)
class SourceShard:
    """Where a shard's bytes lie and what they were when it was read.

    Attributes:
        path: absolute path of the tar.
        size: its bytes.
        mtime_ns: its time of modification.
        reading: hash of the json fields that ingest carried.
        version: ingest's version; a shard that an older one has read is still read.
        end_mark: whether zeros close the tar; true where version 1 has read it.
    """

    path: str
    size: int
    mtime_ns: int
    reading: str
    version: str = field(default="1", compare=False)
    end_mark: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Content:
    """One column file, read.

    Attributes:
        table: its rows; behind those of the shard the answers of samples that are gone.
        rows: identity of the shard's rows.
        gone: which samples the last rows are of.
    """

    table: pa.Table
    rows: str
    swept: tuple[str, ...] = ()
    source: SourceShard | None = None
    gone: tuple[Identity, ...] = ()

    @property
    def of_shard(self) -> pa.Table:
        """The rows that the shard has."""
        return self.table.slice(0, self.table.num_rows - len(self.gone))


@dataclass(frozen=True)
class State:
    """What a partition says it was folded from."""

    generations: dict[str, int]
    schema_generation: int
    rows: str
    source: SourceShard


@dataclass
class Committed:
    """What became of the rows of one commit.

    Attributes:
        rows: rows that the table took.
        dropped: rows that another run or another copy of the task had answered since the freeze.
        kept: failures that did not replace an `ok` answer.
    """

    rows: int = 0
    dropped: int = 0
    kept: list[int] = field(default_factory=list)


class Swept(ConflictError):
    """A sweep has named this attempt: it commits nothing and starts again under a new name."""


# --- schema ---


def load_schema(layout: Layout, *, fresh: bool = False) -> tuple[int, tuple[Column, ...]]:
    """The newest generation of the root's columns; (0, ()) for a new root.

    Args:
        fresh: renews a cached listing first.
    """

    def read() -> tuple[int, tuple[Column, ...]]:
        if fresh:
            _renew(layout.schema)
        generation = max((found[1] for name in names(layout.schema) if (found := generation_of(name))), default=0)
        if generation == 0:
            return 0, ()
        return generation, _read_schema(layout.schema_file(generation))

    return files.retry_listing(read)


def _read_schema(path: Path) -> tuple[Column, ...]:
    text = path.read_text("utf-8")
    try:
        return tuple(Column.from_json(item) for item in json.loads(text)["columns"])
    except (ValueError, KeyError, TypeError, SchemaError) as error:
        raise ShardError(
            "the root's schema is not one that builder has written",
            where={"file": path, "reason": error.what if isinstance(error, SchemaError) else error},
            fix=f"rm {shlex.quote(str(path))}: the generation before it counts",
        ) from error


def change_schema(layout: Layout, change: Callable[[tuple[Column, ...]], tuple[Column, ...]]) -> tuple[Column, ...]:
    """Commits a new generation of the root's columns, unless `change` leaves them as they are."""
    while True:
        generation, have = load_schema(layout, fresh=True)
        changed = change(have)
        if changed == have:
            return have
        text = json.dumps({"columns": schema.describe(changed)}, indent=1)
        if files.create_only(layout.schema_file(generation + 1), text.encode()):
            return changed


def extend_schema(layout: Layout, columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """Adds a stage's columns to the root before the stage runs. Raises SchemaError as `schema.merge` does."""
    return change_schema(layout, partial(_merged, new=columns))


def _merged(have: tuple[Column, ...], new: tuple[Column, ...]) -> tuple[Column, ...]:
    return schema.merge(have, new)


# --- column files ---


def listing(layout: Layout, shard: str, *, fresh: bool = False) -> dict[str, list[int]]:
    """Generations of every stage of a shard, ascending: the whole state of the shard.

    Args:
        fresh: renews a cached listing first.
    """
    folder = layout.column_folder(shard)
    if fresh:
        _renew(folder)
    found: dict[str, list[int]] = {}
    for name in names(folder):
        if parsed := generation_of(name):
            found.setdefault(parsed[0], []).append(parsed[1])
    return {stage: sorted(generations) for stage, generations in found.items()}


def _renew(folder: Path) -> None:
    """Makes and removes a file in a folder, which renews a listing of it that NFS has cached."""
    if folder.is_dir():
        probe = files.check_no_link(files.temp_path(folder / "listing"))
        probe.touch()
        probe.unlink(missing_ok=True)


def newest(layout: Layout, shard: str, *, fresh: bool = False) -> dict[str, int]:
    """The newest generation of every stage of a shard."""
    return {stage: generations[-1] for stage, generations in listing(layout, shard, fresh=fresh).items()}


def read_column_file(path: Path, columns: Sequence[str] | None = None) -> Content:
    """One column file, or some of its columns.

    Raises:
        ShardError: it is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=list(columns) if columns is not None else None)
            return _content(table.replace_schema_metadata(None), file.schema_arrow.metadata or {})
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; pages that do not decompress are an OSError without a number
        raise ShardError(
            "a column file is damaged",
            where={"file": path, "reason": str(error)},
            fix=f"rm '{path}', then the same command again: the generation before it counts, or its work is done anew",
        ) from error


def _content(table: pa.Table, metadata: dict[bytes, bytes]) -> Content:
    source = metadata.get(_SOURCE)
    return Content(
        table=table,
        rows=metadata[_ROWS].decode(),
        swept=tuple(json.loads(metadata.get(_SWEPT, b"[]"))),
        source=SourceShard(**json.loads(source)) if source else None,
        gone=tuple((key, number) for key, number in json.loads(metadata.get(_GONE, b"[]"))),
    )


def _read_rows(path: Path) -> str:
    return str((pq.read_schema(path).metadata or {})[_ROWS], "ascii")


def write_parquet(table: pa.Table, metadata: dict[bytes, bytes], path: Path | pa.NativeFile) -> None:
    """One row group, zstd 1, a dictionary only where values repeat: smallest and fastest of those measured."""
    pq.write_table(
        table.replace_schema_metadata(metadata),
        path,
        compression="zstd",
        compression_level=1,
        use_dictionary=schema.dictionary_columns(table.column_names) or False,
        row_group_size=max(table.num_rows, 1),
    )


def _commit_file(layout: Layout, shard: str, stage: str, generation: int, content: Content) -> bool:
    metadata = {_ROWS: content.rows.encode()}
    if content.swept:
        metadata[_SWEPT] = json.dumps(content.swept).encode()
    if content.source:
        metadata[_SOURCE] = json.dumps(vars(content.source)).encode()
    if content.gone:
        metadata[_GONE] = json.dumps(content.gone).encode()
    path = layout.column_file(shard, stage, generation)
    return files.create_only(path, partial(write_parquet, content.table, metadata))


def rows_hash(keys: Sequence[str]) -> str:
    """Identity of a shard's rows: 128-bit hash over their keys in order."""
    return hashlib.blake2b(orjson.dumps(keys), digest_size=16).hexdigest()


def earlier_sources(layout: Layout, shard: str) -> list[Path]:
    """What ingest has committed of a shard, the newest first."""
    generations = listing(layout, shard, fresh=True).get(SOURCE, [])
    return [layout.column_file(shard, SOURCE, generation) for generation in reversed(generations)]


def commit_source(
    layout: Layout, shard: str, source: SourceShard, follow: Callable[[Sequence[Path]], pa.Table]
) -> None:
    """Commits what ingest read of a shard, and folds it.

    Args:
        follow: makes the rows as they follow those that ingest has committed before, given as files, the newest first;
            called again where another ingest commits meanwhile.
    """
    while True:
        earlier = earlier_sources(layout, shard)
        table = files.retry_listing(partial(follow, earlier))
        keys = table["key"].to_pylist()
        rows = _rows_that_stay(earlier, keys) or rows_hash(keys)
        generation = _number_of(earlier[0]) + 1 if earlier else 1
        content = Content(table, rows, source=source)
        if _commit_file(layout, shard, SOURCE, generation, content):
            return fold(layout, shard, known=(SOURCE, generation, content))


def _rows_that_stay(earlier: Sequence[Path], keys: list[str]) -> str | None:
    """The identity of the rows that are there, if they have these keys."""
    if not earlier:
        return None
    newest_file = read_column_file(earlier[0], ["key"])
    return newest_file.rows if newest_file.table["key"].to_pylist() == keys else None


def _number_of(column_file: Path) -> int:
    parsed = generation_of(column_file.name)
    assert parsed is not None
    return parsed[1]


def commit(
    layout: Layout,
    shard: str,
    stage: str,
    columns: tuple[Column, ...],
    done: pa.Table,
    previous: Sequence[str | None],
    *,
    rows: str,
    attempt: str,
) -> Committed:
    """Sets the rows that a task has done, where nobody has answered them since the freeze, and creates a generation.

    Args:
        columns: the stage's columns, status columns included.
        done: the rows: `row` and every column of `columns`.
        previous: `<stage>_run` of each row as it was at the freeze.
        rows: identity of the shard's rows that the work set follows.
        attempt: name of this attempt, compared with those that a sweep has named.

    Raises:
        ConflictError: the shard was ingested again with other rows.
        Swept: a sweep has named this attempt.
    """
    made: Committed | None = None
    with where(stage=stage, shard=shard):
        while True:
            generation, base = files.retry_listing(partial(_base, layout, shard, stage, columns, rows))
            if attempt in base.swept:
                raise Swept(f"attempt '{attempt}' was swept: it starts again", fix="nothing to do")
            result, table = _applied(stage, base.table, done, previous)
            if result.rows == 0:
                return made or result
            if not _commit_file(layout, shard, stage, generation + 1, replace(base, table=table)):
                continue
            made = result
            if newest(layout, shard, fresh=True).get(stage, 0) == generation + 1:
                return result


def _base(layout: Layout, shard: str, stage: str, columns: tuple[Column, ...], rows: str) -> tuple[int, Content]:
    """The newest answers of a stage, aligned with the shard's rows, and their generation (0: none yet)."""
    found = listing(layout, shard, fresh=True)
    source = read_column_file(layout.column_file(shard, SOURCE, found[SOURCE][-1]), ["key"])
    if source.rows != rows:
        raise ConflictError(
            "the shard was ingested again with other rows since this work was planned",
            where={"rows": f"expected {rows}, found {source.rows}"},
            fix="run the same command again: it plans the work anew",
        )
    generation = found.get(stage, [0])[-1]
    content = Content(pa.table({}), rows)
    if generation:
        newest_file = read_column_file(layout.column_file(shard, stage, generation))
        content = _aligned(layout, shard, stage, newest_file, found, source)
    merged = {name: content.table[name] for name in content.table.column_names}
    count = source.table.num_rows + len(content.gone)
    merged |= {column.name: _values(content.table, column, count) for column in columns}
    return generation, replace(content, table=pa.table(merged))


def _values(stage: pa.Table, column: Column, count: int) -> Any:
    """A column out of a stage's column file; null where the file is older than the column or than its type."""
    if column.name in stage.column_names and stage[column.name].type == column.type:
        return stage[column.name]
    return pa.nulls(count, column.type)


def _applied(stage: str, base: pa.Table, done: pa.Table, previous: Sequence[str | None]) -> tuple[Committed, pa.Table]:
    """Puts `done` into `base` where the run is still the previous one and no failure replaces an answer."""
    at = done["row"].to_numpy()
    runs = base[f"{stage}_run"].take(pa.array(at)).to_pylist()
    status = base[f"{stage}_status"].take(pa.array(at)).to_pylist()
    failed = pc.equal(done[f"{stage}_status"], "failed").to_pylist()
    take: list[int] = []
    result = Committed()
    for i, (run, expected, old, fails) in enumerate(zip(runs, previous, status, failed, strict=True)):
        if run != expected:
            result.dropped += 1
        elif fails and old == "ok":
            result.kept.append(int(at[i]))
        else:
            take.append(i)
    result.rows = len(take)
    if not take:
        return result, base
    chosen = done.take(pa.array(take))
    indices = np.arange(base.num_rows)
    indices[at[take]] = base.num_rows + np.arange(len(take))
    merged = {}
    for name in base.column_names:
        new = chosen[name] if name in chosen.column_names else pa.nulls(len(take), base[name].type)
        both = pa.chunked_array([*_chunks(base[name]), *_chunks(new)], base[name].type)
        merged[name] = both.take(pa.array(indices))
    return result, pa.table(merged)


def _chunks(column: pa.ChunkedArray | pa.Array) -> list[pa.Array]:
    return list(column.chunks) if isinstance(column, pa.ChunkedArray) else [column]


def _aligned(
    layout: Layout, shard: str, stage: str, content: Content, found: dict[str, list[int]], source: Content
) -> Content:
    """A stage's answers, their rows those of `source`: moved to where their key is now if those are others."""
    if content.rows == source.rows:
        return content
    for generation in reversed(found[SOURCE]):
        path = layout.column_file(shard, SOURCE, generation)
        if _read_rows(path) == content.rows:
            old = [*identities(read_column_file(path, ["key"]).table["key"].to_pylist()), *content.gone]
            return _moved(stage, content, old, source)
    count = source.table.num_rows
    empty = pa.table({field.name: pa.nulls(count, field.type) for field in content.table.schema})
    return Content(empty, source.rows, content.swept)


def _moved(stage: str, content: Content, old: list[Identity], source: Content) -> Content:
    """Answers that stand in the order of `old`, in that of `source`; those of samples that it lacks behind them."""
    new = identities(source.table["key"].to_pylist())
    place = {identity: row for row, identity in enumerate(old)}
    has_answer = content.table[f"{stage}_run"].is_valid().to_pylist()
    lacking = set(old) - set(new)
    gone = [row for row, identity in enumerate(old) if identity in lacking and has_answer[row]]
    take = pa.array([*(place.get(identity) for identity in new), *gone], pa.int64())
    return Content(content.table.take(take), source.rows, content.swept, gone=tuple(old[row] for row in gone))


def identities(keys: Sequence[str]) -> list[Identity]:
    """Which sample each row of a shard is."""
    count: Counter[str] = Counter()
    found = []
    for key in keys:
        found.append((key, count[key]))
        count[key] += 1
    return found


# --- fold and heal ---


def fold(layout: Layout, shard: str, *, known: tuple[str, int, Content] | None = None) -> None:
    """Rebuilds a shard's partition from its newest column files and the root's columns.

    Args:
        known: stage, generation and content of a column file that the caller has just committed.
    """
    while True:
        folded = files.retry_listing(partial(_fold_once, layout, shard, known))
        if (newest(layout, shard, fresh=True), load_schema(layout, fresh=True)[0]) == folded:
            return


def _fold_once(layout: Layout, shard: str, known: tuple[str, int, Content] | None = None) -> tuple[dict[str, int], int]:
    table, state = folded(layout, shard, known, fresh=True)
    metadata = folded_metadata(state.generations, state.schema_generation, state.rows, state.source)
    files.write_atomic(layout.partition(shard), partial(write_parquet, table, metadata))
    return state.generations, state.schema_generation


def folded(
    layout: Layout, shard: str, known: tuple[str, int, Content] | None = None, *, fresh: bool = False
) -> tuple[pa.Table, State]:
    """What a shard's newest column files hold side by side, and which they are; makes no partition of it.

    Args:
        known: stage, generation and content of a column file that need not be read.
        fresh: renews a cached listing first.

    Raises:
        ShardError: a column file is damaged.
    """
    generation, columns = load_schema(layout)
    found = listing(layout, shard, fresh=fresh)
    newest_of = {stage: generations[-1] for stage, generations in found.items()}
    source = _content_of(layout, shard, SOURCE, newest_of[SOURCE], known)
    assert source.source is not None
    stages = {SOURCE: source.table}
    for stage in newest_of:
        if stage != SOURCE:
            content = _content_of(layout, shard, stage, newest_of[stage], known)
            stages[stage] = _aligned(layout, shard, stage, content, found, source).of_shard
    count, none = source.table.num_rows, pa.table({})
    table = pa.table({column.name: _values(stages.get(column.stage, none), column, count) for column in columns})
    return table, State(newest_of, generation, source.rows, source.source)


def folded_metadata(
    generations: dict[str, int], schema_generation: int, rows: str, source: SourceShard
) -> dict[bytes, bytes]:
    """What a partition says it was folded from."""
    return {
        _FOLDED: json.dumps(generations).encode(),
        _SCHEMA: str(schema_generation).encode(),
        _ROWS: rows.encode(),
        _SOURCE: json.dumps(vars(source)).encode(),
    }


def _content_of(
    layout: Layout, shard: str, stage: str, generation: int, known: tuple[str, int, Content] | None
) -> Content:
    if known is not None and known[:2] == (stage, generation):
        return known[2]
    return read_column_file(layout.column_file(shard, stage, generation))


def partition_state(layout: Layout, shard: str) -> State | None:
    """What a partition was folded from, or None if there is none or it cannot be read: then it is folded anew."""

    def read() -> State | None:
        try:
            with layout.partition(shard).open("rb") as file:
                found = footer_values(file, (_FOLDED, _SCHEMA, _ROWS, _SOURCE))
        except FileNotFoundError:
            return None
        return None if found is None else _state(found)

    return files.retry_listing(read)


def footer_values(file: BinaryIO, keys: Sequence[bytes]) -> dict[bytes, bytes] | None:
    """Metadata of a parquet file of ours, out of its end, with at least these keys where it has them; None if it is no
    whole parquet file.

    All of a footer that pyarrow reads is 20 to 40 times as much work, and there are tens of thousands of partitions.
    Where the values do not stand as they are looked for, pyarrow reads it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    if magic != b"PAR1" or length + 8 > size:
        return None
    file.seek(size - 8 - length)
    footer = file.read(length)
    found = {key: _footer_value(footer, key) for key in keys}
    values = {key: value for key, value in found.items() if value is not None}
    if len(values) == len(found):
        return values
    try:
        return dict(pq.read_metadata(file).metadata or {})
    except OSError as error:
        if error.errno is not None:
            raise
        return None  # pyarrow's word on a footer that it cannot parse
    except pa.ArrowInvalid:
        return None


def _footer_value(footer: bytes, key: bytes) -> bytes | None:
    """The value of a key in a parquet footer: two Thrift binaries, each a length as varint and bytes.

    Source: parquet.thrift's KeyValue and Thrift's compact protocol, in which fields 1 and 2 of type binary begin with
    0x18. The footer's own key-value pairs are the last ones in it.
    """
    start = footer.rfind(b"\x18" + bytes([len(key)]) + key + b"\x18")
    if start < 0:
        return None
    at = start + len(key) + 3
    length = shift = 0
    while at < len(footer):
        byte = footer[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return footer[at : at + length] if at + length <= len(footer) else None
    return None


def _state(metadata: dict[bytes, bytes]) -> State | None:
    try:
        return State(
            generations=dict(json.loads(metadata[_FOLDED])),
            schema_generation=int(metadata[_SCHEMA]),
            rows=metadata[_ROWS].decode(),
            source=SourceShard(**json.loads(metadata[_SOURCE])),
        )
    except (KeyError, ValueError, TypeError):  # damaged, or no partition
        return None


def is_behind(layout: Layout, shard: str) -> bool:
    """Whether a partition lacks answers that its shard's column files have."""
    return _is_behind(layout, shard, newest(layout, shard), load_schema(layout))


def _is_behind(layout: Layout, shard: str, found: dict[str, int], root: tuple[int, tuple[Column, ...]]) -> bool:
    """Whether a partition differs from the newest generations, or was folded before the root knew a column of theirs.

    Columns that the column files lack do not count, such as those that a stage has gained since: they read as nulls.
    """
    state = partition_state(layout, shard)
    if state is None or state.generations != found:
        return True
    generation, columns = root
    if state.schema_generation == generation:
        return False
    path = layout.schema_file(state.schema_generation)
    try:
        have = _types_of(path, path.stat().st_ino)
    except FileNotFoundError:
        return True
    others = [column for column in columns if column.stage in found and have.get(column.name) != column.type]
    try:
        return any(
            column.name in have
            or column.name in pq.read_schema(layout.column_file(shard, column.stage, found[column.stage])).names
            for column in others
        )
    except (pa.ArrowInvalid, OSError):  # gone or damaged: whoever folds finds a newer one, or says what is wrong
        return True


@lru_cache(maxsize=64)
def _types_of(path: Path, inode: int) -> dict[str, pa.DataType]:
    """The columns of one generation of a root's schema, which a partition folded from it has."""
    return {column.name: column.type for column in _read_schema(path)}


def heal(layout: Layout, shards: Iterable[str]) -> int:
    """Folds the partitions that are behind; returns how many were."""
    root = load_schema(layout)
    healed = 0
    for shard in shards:
        found = newest(layout, shard)
        if SOURCE in found and _is_behind(layout, shard, found, root):
            with where(shard=shard):
                fold(layout, shard)
            healed += 1
    return healed


def read_partition(layout: Layout, shard: str, columns: Sequence[str]) -> tuple[pa.Table, State]:
    """Columns of one partition in tar order, and what it was folded from; both out of one open file.

    A column that the partition lacks reads as nulls. A part of a nested one has its path in the parquet file as its
    name: `source_members.list.element.ext`.
    """

    def read() -> tuple[pa.Table, State]:
        with pq.ParquetFile(layout.partition(shard), pre_buffer=True) as file:
            found = file.read(columns=list(columns), use_threads=False)  # a name that the file lacks is left out
            have = set(found.column_names)
            tops = {name: name if name in have else name.partition(".")[0] for name in columns}
            nothing = pa.nulls(file.metadata.num_rows)
            table = pa.table({name: found[top] if top in have else nothing for name, top in tops.items()})
            state = _state(dict(file.metadata.metadata or {}))
            if state is None:
                raise ShardError("a partition is not of this table", where={"shard": shard}, fix="builder fold")
            return table, state

    return files.retry_listing(read)


# --- sweep ---


@dataclass
class Sweep:
    """What a sweep deletes, and its bytes."""

    paths: list[Path] = field(default_factory=list)
    size: int = 0

    def add(self, path: Path) -> None:
        """Adds a file, or a folder with all that is in it."""
        with contextlib.suppress(FileNotFoundError):
            inside = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
            self.size += sum(entry.stat().st_size for entry in inside)
            self.paths.append(path)


def sweep_shard(layout: Layout, shard: str, stages: Iterable[str], sweep: Sweep, *, dry_run: bool) -> set[str]:
    """Deletes what nothing needs of one shard: old generations, edits tars that nothing points to.

    An unreferenced edits tar may belong to an attempt that is only paused: a generation that names the attempt as
    swept is committed first, and only what is still unreferenced after it is deleted.

    Args:
        stages: those that write edits tars.

    Returns:
        The runs that rows of this shard point to.
    """
    doomed, pointing = files.retry_listing(partial(_unreferenced, layout, shard, KEPT_GENERATIONS))
    if doomed:  # the fence is a generation too: what only the one before the newest points to goes with the others
        doomed, pointing = files.retry_listing(partial(_unreferenced, layout, shard, KEPT_GENERATIONS - 1))
    if doomed and not dry_run:
        attempts = sorted({attempt_of(path) for path in doomed})
        for stage in sorted({*stages, *pointing}):
            _fence(layout, shard, stage, attempts)
        still, _ = files.retry_listing(partial(_unreferenced, layout, shard, KEPT_GENERATIONS))
        doomed = [path for path in still if path in doomed]
    old, runs = files.retry_listing(partial(_superseded, layout, shard))
    for path in [*doomed, *old]:
        sweep.add(path)
        if not dry_run:
            files.remove(path)
    return runs


def sweep_temps(layout: Layout, sweep: Sweep, *, dry_run: bool) -> None:
    """Deletes the temp files of dead processes, wherever they lie in the root, and their temp folders; and those
    beside hybrid shards that go elsewhere."""
    _sweep_temps_in(os.walk(layout.root), sweep, dry_run=dry_run)
    if layout.output is not None:
        for folder in (layout.shards, layout.manifests):
            _sweep_temps_in(itertools.islice(os.walk(folder), 1), sweep, dry_run=dry_run)


def _sweep_temps_in(walk: Iterable[tuple[str, list[str], list[str]]], sweep: Sweep, *, dry_run: bool) -> None:
    for folder, inner, inside in walk:
        dead = {name for name in (*inner, *inside) if files.is_dead_temp(Path(folder, name))}
        inner[:] = sorted(set(inner) - dead)
        for name in sorted(dead):
            sweep.add(Path(folder, name))
            if not dry_run:
                delete(Path(folder, name))


def delete(path: Path) -> None:
    """Deletes a file, or a folder whole or not at all: it loses its name first. Gone already is as good."""
    if not path.is_dir() or path.is_symlink():
        files.remove(path)
        return
    files.check_no_link(path)
    temp = files.temp_path(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(temp)
    shutil.rmtree(temp, ignore_errors=True)


def attempt_of(edits_tar: Path) -> str:
    """The attempt that wrote an edits tar: its name less the number of the checkpoint."""
    return edits_tar.name[: -len(".tar")].rpartition("-")[0]


def _unreferenced(layout: Layout, shard: str, kept: int) -> tuple[list[Path], set[str]]:
    """Edits tars of a shard that none of the newest so many generations points to, and the stages that point to any.

    The column files say themselves which of their columns are pointers: a column that was dropped from the root may
    come back.
    """
    named: set[str] = set()
    stages: set[str] = set()
    for stage, generations in listing(layout, shard, fresh=True).items():
        for generation in generations[-kept:]:
            path = layout.column_file(shard, stage, generation)
            for column in read_column_file(path, _pointers(pq.read_schema(path))).table.columns:
                stages.add(stage)
                named.update(column.unique().to_pylist())
    folder = layout.edits / shard
    tars = [folder / name for name in names(folder) if name.endswith(".tar")]
    return [path for path in tars if str(path.relative_to(layout.root)) not in named], stages


def _pointers(columns: pa.Schema) -> list[str]:
    """The columns that name edits tars: text, with offset and size beside them."""
    found = []
    for column in columns:
        base = column.name.removesuffix("_path")
        if (
            base != column.name
            and column.type == pa.string()
            and {f"{base}_offset", f"{base}_size"} <= {*columns.names}
        ):
            found.append(column.name)
    return found


def _fence(layout: Layout, shard: str, stage: str, attempts: list[str]) -> None:
    """Commits a generation that names attempts as swept; returns when the newest one does."""
    while True:
        generation, content = files.retry_listing(partial(_newest_content, layout, shard, stage))
        swept = tuple(dict.fromkeys([*content.swept, *attempts]))
        if swept == content.swept:
            return
        _commit_file(layout, shard, stage, generation + 1, replace(content, swept=swept))


def _newest_content(layout: Layout, shard: str, stage: str) -> tuple[int, Content]:
    """The newest column file of a stage and its generation; before the first one, no answer for any row and 0."""
    found = newest(layout, shard, fresh=True)
    if stage in found:
        return found[stage], read_column_file(layout.column_file(shard, stage, found[stage]))
    source = read_column_file(layout.column_file(shard, SOURCE, found[SOURCE]), ["row"])
    count = source.table.num_rows
    empty = {column.name: pa.nulls(count, column.type) for column in schema.status_columns(stage)}
    return 0, Content(pa.table(empty), source.rows)


def _superseded(layout: Layout, shard: str) -> tuple[list[Path], set[str]]:
    """Column files that nothing needs, and the runs that the newest ones point to."""
    found = listing(layout, shard)
    old = [
        layout.column_file(shard, stage, generation)
        for stage, generations in found.items()
        for generation in generations[:-KEPT_GENERATIONS]
        if stage != SOURCE
    ]
    old += _superseded_sources(layout, shard, found)
    runs: set[str] = set()
    for stage, generations in found.items():
        column = f"{stage}_run"
        content = read_column_file(layout.column_file(shard, stage, generations[-1]), [column])
        runs.update(run for run in content.table[column].unique().to_pylist() if run)
    return old, runs


def _superseded_sources(layout: Layout, shard: str, found: dict[str, list[int]]) -> list[Path]:
    """What ingest has committed and no kept column file follows: one file of each `rows` is enough to realign by."""
    paths = [layout.column_file(shard, SOURCE, generation) for generation in reversed(found.get(SOURCE, []))]
    kept, superseded = paths[:KEPT_GENERATIONS], paths[KEPT_GENERATIONS:]
    if not superseded:
        return []
    needed = _needed_rows(layout, shard, found) - {_read_rows(path) for path in kept}
    old = []
    for path in superseded:
        rows = _read_rows(path)
        if rows in needed:
            needed.remove(rows)
        else:
            old.append(path)
    return sorted(old)


def _needed_rows(layout: Layout, shard: str, found: dict[str, list[int]]) -> set[str]:
    """Identities of rows that a kept column file still follows: their source generation realigns it."""
    kept = [
        layout.column_file(shard, stage, generation)
        for stage, generations in found.items()
        if stage != SOURCE
        for generation in generations[-KEPT_GENERATIONS:]
    ]
    return {_read_rows(path) for path in kept}

"""DuckDB instances are kept for the next question over the same files, and answer as new ones do."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from builder.errors import ConfigError, ShardError
from builder.store.layout import Layout
from builder.table import repeatable, root_schema, sessions
from builder.table.query import Samples
from builder.table.schema import Column
from builder.table.sql_text import Sql
from conftest import Workspace

COUNT = Sql("select count(*), count(caption) from samples", "test")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of instances opened so far."""
    sessions.close_idle()
    repeatable.parsed("select 1")  # has an instance of its own
    count, connect = [0], duckdb.connect

    def counted() -> duckdb.DuckDBPyConnection:
        count[0] += 1
        return connect()

    monkeypatch.setattr(duckdb, "connect", counted)
    yield count
    sessions.close_idle()


def asked(layout: Layout, sql: Sql = COUNT, shards: tuple[str, ...] = ("00000000",)) -> list[tuple[object, ...]]:
    with Samples(layout, columns_of(layout), shards) as samples:
        return samples.rows(sql)


def columns_of(layout: Layout) -> tuple[Column, ...]:
    return root_schema.load_schema(layout)[1]


def test_the_next_question_over_the_same_files_takes_the_same_instance(dataset: Workspace, opened: list[int]) -> None:
    layout = dataset.load().layout
    assert [asked(layout) for _ in range(3)] == [[(8, 8)]] * 3
    assert opened == [1]
    assert asked(layout, shards=("00000000", "00000001")) == [(16, 16)]
    assert opened == [2]
    with Samples(layout, columns_of(layout)[:-1], ["00000000"]) as samples:
        assert samples.rows(COUNT) == [(8, 8)]
    assert opened == [3]
    with Samples(layout, columns_of(layout), ["00000000"], deciding=[Sql(f"{COUNT.text} limit 1", "test")]) as samples:
        assert samples.fixed("select current_setting('threads')") == [(1,)]
    assert opened == [4]
    assert asked(layout) == [(8, 8)]
    assert opened == [4]


def test_a_partition_that_was_replaced_is_read_anew(dataset: Workspace, opened: list[int]) -> None:
    layout = dataset.load().layout
    assert asked(layout) == [(8, 8)]
    partition = layout.partition("00000000")
    pq.write_table(pq.read_table(partition).slice(0, 3), partition)
    assert asked(layout) == [(3, 3)]
    partition.unlink()
    with pytest.raises((ConfigError, ShardError)):
        asked(layout)
    assert opened == [1]


def test_an_instance_is_closed_after_an_error(dataset: Workspace, opened: list[int]) -> None:
    layout = dataset.load().layout
    with pytest.raises(ConfigError, match="no_column"):
        asked(layout, Sql("select no_column from samples", "test"))
    assert asked(layout) == [(8, 8)]
    assert opened == [2]


def test_answers_that_are_not_read_to_their_end_disturb_no_later_ones(dataset: Workspace, opened: list[int]) -> None:
    layout = dataset.load().layout
    many = Sql("select s.uid from samples s, range(100000)", "test")
    with Samples(layout, columns_of(layout), ["00000000"]) as samples:
        first = samples.stream(many, rows=10)
        assert next(first).num_rows > 0
        samples.select(COUNT)
    assert asked(layout) == [(8, 8)]
    assert opened == [1]
    assert next(first).num_rows > 0


def test_only_the_last_few_are_kept(dataset: Workspace, opened: list[int]) -> None:
    layout = dataset.load().layout
    columns = columns_of(layout)
    for number in range(sessions.KEPT + 2):
        with Samples(layout, columns[: len(columns) - number], ["00000000"]) as samples:
            samples.rows(COUNT)
    assert len(sessions._idle) == sessions.KEPT
    assert asked(layout) == [(8, 8)]
    assert opened == [sessions.KEPT + 3]


def test_an_instance_in_use_is_not_taken_twice(dataset: Workspace, opened: list[int]) -> None:
    layout = dataset.load().layout
    with Samples(layout, columns_of(layout), ["00000000"]) as samples:
        assert asked(layout) == [(8, 8)]
        assert samples.rows(COUNT) == [(8, 8)]
    assert opened == [2]
    assert len(sessions._idle) == 1


def test_a_fork_opens_its_own(dataset: Workspace, opened: list[int]) -> None:
    layout = dataset.load().layout
    assert asked(layout) == [(8, 8)]
    process = multiprocessing.get_context("fork").Process(target=asked, args=(layout,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert asked(layout) == [(8, 8)]
    assert opened == [2]


def test_threads_may_ask_at_the_same_time(dataset: Workspace, opened: list[int]) -> None:
    """Of the bookkeeping, with instances that open at once: every other line may be another thread's."""

    class Counted(sessions.Instance):
        def close(self) -> None:
            closed.append(self)

    closed: list[sessions.Instance] = []
    made: list[sessions.Instance] = []
    switch = sys.getswitchinterval()

    def ask(thread: int) -> None:
        for number in range(3000):
            session = sessions.Session(str((number * 7 + thread) % 9), (), False)
            instance = kept.pop(session)
            if instance is None:
                made.append(instance := Counted(None, Path()))  # type: ignore[arg-type]
            for one in kept.push(session, instance):
                one.close()

    kept = sessions._Idle()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(4)))
    finally:
        sys.setswitchinterval(switch)
    assert len(kept) == sessions.KEPT
    assert len(made) - len(closed) == sessions.KEPT
    assert len({id(one) for one in closed}) == len(closed)


def test_an_instance_that_has_spilled_is_closed(
    dataset: Workspace, opened: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = dataset.load().layout
    monkeypatch.setattr(sessions, "_spill_folder", lambda: tmp_path / "spill")
    (tmp_path / "spill").mkdir()  # as DuckDB does
    assert asked(layout) == asked(layout) == [(8, 8)]
    assert opened == [2]
    assert len(sessions._idle) == 0

"""What a command found of the source and of the root is looked at once and handed down."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from builder.engine.work import Choice
from builder.progress import Talk
from builder.sources.tars import finding
from builder.store.layout import Layout
from builder.table import column_files, partitions, root_schema
from builder.verbs.plan import make_plan
from builder.verbs.run import run_all
from builder.verbs.snapshot import Snapshot
from builder.verbs.status import read_status
from builder.verbs.write import plan_write
from conftest import STANDARD_STAGES, Workspace, make_workspace, replace_everywhere, samples

QUIET = Talk(quiet=True)


@pytest.fixture
def done(tmp_path: Any) -> Workspace:
    """Two shards, through four stages and written."""
    made = make_workspace(tmp_path, {name: samples(4) for name in ("00000000", "00000001")}, stages=STANDARD_STAGES)
    made.run("run")
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing on disk is asked for, from now on."""
    counts: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **options)

        return call

    for name, real in {
        "sources": finding.find_shards,
        "schema": root_schema.load_schema,
        "newest": column_files.newest,
        "state": partitions.partition_state,
    }.items():
        replace_everywhere(monkeypatch, real, counted(name, real))
    monkeypatch.setattr(Layout, "shard_names", counted("shards of the table", Layout.shard_names))
    return counts


#: Of two shards, once each; the columns of the root once for the snapshot and once for healing.
ONCE = {"sources": 1, "schema": 2, "newest": 2, "state": 2, "shards of the table": 1}


def test_a_run_with_nothing_to_do_asks_once(done: Workspace, asked: Counter[str]) -> None:
    pipeline = done.load()
    asked.clear()
    assert [outcome.counts for _, outcome in run_all(pipeline, QUIET)] == [{}] * 6
    assert dict(asked) == ONCE


def test_a_plan_asks_once(done: Workspace, asked: Counter[str]) -> None:
    pipeline = done.load()
    asked.clear()
    plan = make_plan(pipeline, Choice())
    assert (plan.ingest.todo, plan.write.todo) == ([], [])
    assert dict(asked) == ONCE


def test_a_status_asks_once(done: Workspace, asked: Counter[str]) -> None:
    pipeline = done.load()
    asked.clear()
    assert read_status(pipeline)["rows"] == 8
    assert dict(asked) == {"schema": 2, "newest": 2, "state": 2, "shards of the table": 1}


def test_a_run_that_works_asks_again_only_after_a_commit(
    done: Workspace, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source once; of the root what the parent asks for, once for each run of tasks and once before the first."""
    pipeline = done.load("stages.lang.threshold=0.75")
    monkeypatch.setattr("builder.verbs.run.Choice", lambda: Choice(stale=True))
    asked.clear()
    outcomes = dict(run_all(pipeline, QUIET))
    assert outcomes["lang"]["ok"] == 8
    assert (asked["sources"], asked["shards of the table"]) == (1, 2)


def test_what_was_committed_is_seen(done: Workspace) -> None:
    snapshot = Snapshot(done.load())
    assert (snapshot.shards, plan_write(snapshot).todo) == (["00000000", "00000001"], [])
    before = snapshot.state("00000000")
    done.run("stage", "lang", "--redo")
    done.run("ingest", "--set", f'dataset.shards="{done.folder}/source/00000000.tar"')
    assert snapshot.state("00000000") is before
    snapshot.renew()
    assert snapshot.state("00000000") != before
    assert json.loads(done.run("plan", "--json").stdout)["stages"]["lang"]["todo"] == 0


def test_partitions_that_could_not_be_folded_are_healed_the_next_time(
    done: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = done.load().layout
    before = layout.partition("00000001").read_bytes()
    done.run("stage", "lang", "--redo")
    layout.partition("00000001").write_bytes(before)
    snapshot = Snapshot(done.load())
    assert snapshot.state("00000001") == partitions.partition_state(layout, "00000001")
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(layout.partition("00000001")))
        patched.setattr(partitions, "fold", Mock(side_effect=full))
        with pytest.raises(OSError, match="No space left on device"):
            snapshot.heal()
    snapshot.heal()
    assert not partitions.is_behind(layout, "00000001")
    assert snapshot.state("00000001") == partitions.partition_state(layout, "00000001")

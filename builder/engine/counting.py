"""Counts the rows that a stage's SQL covers, by state. Starts no run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builder.engine import outdated
from builder.engine.coverage import check_columns, in_order, lookups_of, side_by_side
from builder.engine.states import (
    FAILED,
    OK,
    covered_rows,
    is_open,
    is_open_in_sql,
    is_tried,
    places_in_both,
    run_in_sql,
    state_in_sql,
    unused_name,
    where_clause,
)
from builder.engine.work import Counts, Work
from builder.errors import ConfigError
from builder.store.layout import Layout
from builder.table.query import Samples
from builder.table.rowwise import Rowwise, rowwise
from builder.table.schema import Column
from builder.table.sql_text import Sql


def count_rows(layout: Layout, works: Sequence[Work], by_run: dict[str, Counter[str]] | None = None) -> list[Counts]:
    """Counts the rows of several stages' works, over the same shards and with the same choice. Starts no run.

    One pass reads no inputs; a second one reads the inputs of shards with samples that changed.

    Args:
        by_run: is filled for each stage: how many of its answers each run gave (`''`: no run), among the rows with a
            good source to which the choice's condition applies.
    """
    if not works:
        return []
    first = works[0]
    columns = list(dict.fromkeys(column for work in works for column in work.columns))
    deciding = [work.sql for work in works]
    with Samples(layout, columns, sorted(first.shards), lookups_of(works), deciding=deciding) as samples:
        for work in works:
            check_columns(samples, work)
        counts, put_off = _counted_by_shard(layout, samples, works, columns, by_run)
        for place, work in enumerate(works):
            if put_off[place]:
                count_rest = partial(_counted_with_inputs, layout, samples, work, put_off[place], counts[place])
                counts[place] = in_order(count_rest)
        return counts


def _counted_by_shard(
    layout: Layout,
    samples: Samples,
    works: Sequence[Work],
    columns: Sequence[Column],
    by_run: dict[str, Counter[str]] | None,
) -> tuple[list[Counts], list[list[str]]]:
    """The result of `_counted`. Works whose SQL looks at every row on its own are counted in one common pass."""
    names = {column.name for column in columns}
    pieces: dict[int, Rowwise] = {}
    for place, work in enumerate(works):
        taken = rowwise(work.sql.text, names, work.params, f"of_{place}")
        if taken is not None and not work.choice.stale:
            pieces[place] = taken
    try:
        found = _counted_at_once(samples, works, pieces, by_run) if pieces else {}
    except ConfigError:
        found = {}  # counting each work on its own reports which SQL is wrong
    others = [place for place in range(len(works)) if place not in found]
    if others:
        counts, put_off = in_order(partial(_counted, layout, samples, [works[place] for place in others], by_run))
        found |= dict(zip(others, zip(counts, put_off, strict=True), strict=True))
    ordered = [found[place] for place in range(len(works))]
    return [counts for counts, _ in ordered], [put_off for _, put_off in ordered]


def _counted_at_once(
    samples: Samples,
    works: Sequence[Work],
    pieces: Mapping[int, Rowwise],
    by_run: dict[str, Counter[str]] | None,
) -> dict[int, tuple[Counts, list[str]]]:
    """The counts of these works by position, and for each the shards to count later.

    Args:
        pieces: by position in `works`, the SQL of those that look at each row on its own.
    """
    asked, params, around = _one_pass(works, pieces, with_runs=by_run is not None)
    answer = samples.rows(asked, params, around=around)
    found = {place: (Counts(), list[str]()) for place in pieces}
    tallies = {place: Counter[str]() for place in pieces}
    for shard, *values in answer:
        for place in pieces:
            (rows_covered, todo, ok, failed, outside, late, suspects), values = values[:7], values[7:]
            counts, put_off = found[place]
            if by_run is not None:
                tallies[place].update(values.pop(0) or {})
            if suspects:
                put_off.append(shard)
            else:
                new = Counts(rows_covered, todo, ok, failed, outside, 1 if todo else 0, late)
                found[place] = _sum(counts, new), put_off
    if by_run is not None:
        by_run.update((works[place].stage.name, tally) for place, tally in tallies.items())
    return found


def _one_pass(
    works: Sequence[Work], pieces: Mapping[int, Rowwise], *, with_runs: bool
) -> tuple[Sql, dict[str, Any], str]:
    """One query that counts the rows of all these works per shard: its SQL, its parameters, the statement around it.

    A row of its result is a shard, followed for each work by seven counts (rows covered, to do, ok, failed, ok and not
    covered, late, suspect) and, with `with_runs`, a histogram of the runs that gave the answers.
    """
    covers = unused_name("is_covered", (column.name for work in works for column in work.columns))
    rows, sums = ["s.shard"], ["shard"]
    for place in pieces:
        work, covered = works[place], f"{covers}_{place}"
        state, suspect = f"state_{place}", f"suspect_{place}"
        late = f"{suspect} = {outdated.OTHER_BYTES}"
        rows += [
            f"coalesce(s.{covered}, false) as {covered}",
            f"{state_in_sql(work)} as {state}",
            f"{outdated.suspicion(work.stage)} as {suspect}",
        ]
        sums += [
            f"count(*) filter ({covered})",
            f"count(*) filter ({covered} and {is_open_in_sql(state, late, work.choice)})",
            f"count(*) filter ({covered} and {state} = {OK})",
            f"count(*) filter ({covered} and {state} >= {FAILED})",
            f"count(*) filter (not {covered} and {state} = {OK})",
            f"count(*) filter ({covered} and {late})",
            f"count(*) filter ({covered} and {suspect} = {outdated.SUSPECT})",
        ]
        if with_runs:
            rows.append(f"{run_in_sql(work.stage.name)} as given_by_{place}")
            sums.append(f"histogram(given_by_{place}) filter (given_by_{place} is not null)")
    around = (
        f"select {', '.join(sums)} from (select {', '.join(rows)} from {{}} s where s.source_status = 'ok') "
        "group by shard order by shard"
    )
    params: dict[str, Any] = {}
    for taken in pieces.values():
        params |= taken.params_in(taken.condition)
    conditions = ", ".join(f"({taken.condition}) as {covers}_{place}" for place, taken in pieces.items())
    narrowed = where_clause(works[0].choice.where or "true")
    return Sql(f"select *, {conditions} from ({narrowed.text})", narrowed.origin), params, around


def _sum(one: Counts, other: Counts) -> Counts:
    return Counts(*(getattr(one, field.name) + getattr(other, field.name) for field in fields(Counts)))


def _counted(
    layout: Layout,
    samples: Samples,
    works: Sequence[Work],
    by_run: dict[str, Counter[str]] | None,
    sort: set[str],
) -> tuple[list[Counts], list[list[str]]]:
    """The counts of every work, and for each the shards to count later, because their answers must be compared."""
    found = [Counts() for _ in works]
    put_off: list[list[str]] = [[] for _ in works]
    with_inputs, with_runs = works[0].choice.stale, by_run is not None
    if by_run is not None:
        by_run.update((work.stage.name, Counter()) for work in works)  # from 0: the rows may be read again
    for shard, state, wanted in side_by_side(samples, works, sort, with_inputs=with_inputs, with_runs=with_runs):
        if by_run is not None:
            for name in {work.stage.name for work in works}:  # others are counted in one pass
                _tally(by_run[name], state[f"{name}_given_by"])
        for place, (work, rows) in enumerate(zip(works, wanted, strict=True)):
            if rows is None:
                answered = int(np.count_nonzero(state[f"{work.stage.name}_state"].to_numpy() == OK))
                found[place] = replace(found[place], outside=found[place].outside + answered)
            elif not with_inputs and _has_suspects(work, state, rows):
                put_off[place].append(shard)
            else:
                found[place] = _added(layout, found[place], work, state, rows, with_inputs=with_inputs)
    return found, put_off


def _counted_with_inputs(
    layout: Layout, samples: Samples, work: Work, shards: Sequence[str], counts: Counts, sort: set[str]
) -> Counts:
    """`counts` plus the rows of these shards."""
    for _, state, (rows,) in side_by_side(samples, [work], sort, with_inputs=True, only=shards):
        if rows is not None:
            counts = _added(layout, counts, work, state, rows, with_inputs=True)
    return counts


def _tally(runs: Counter[str], given_by: pa.ChunkedArray) -> None:
    for found in pc.value_counts(given_by).to_pylist():
        if found["values"] is not None:
            runs[found["values"]] += found["counts"]


def _has_suspects(work: Work, state: pa.Table, wanted: pa.Table) -> bool:
    is_suspect = state[f"{work.stage.name}_suspect"].to_numpy() == outdated.SUSPECT
    if not is_suspect.any():
        return False
    at, _ = places_in_both(state, wanted)
    return bool(is_suspect[at].any())


def _added(
    layout: Layout, counts: Counts, work: Work, state: pa.Table, wanted: pa.Table, *, with_inputs: bool
) -> Counts:
    """`counts` plus the rows of one shard."""
    name = work.stage.name
    states = state[f"{name}_state"].to_numpy()
    at, _ = places_in_both(state, wanted)
    covered_states = states[at]
    ok = int(np.count_nonzero(covered_states == OK))
    if with_inputs:
        covered = covered_rows(state, wanted)
        late = outdated.are_out_of_date(covered, work.stage, work.signature, layout)
        todo = int(np.count_nonzero(is_tried(work, covered, late)))
    else:
        late = state[f"{name}_suspect"].to_numpy()[at] == outdated.OTHER_BYTES
        is_todo = is_open(covered_states, late, work.choice)
        todo = len(covered_states) if work.choice.redo else int(np.count_nonzero(is_todo))
    return Counts(
        covered=counts.covered + len(covered_states),
        todo=counts.todo + todo,
        ok=counts.ok + ok,
        failed=counts.failed + int(np.count_nonzero(covered_states >= FAILED)),
        outside=counts.outside + int(np.count_nonzero(states == OK)) - ok,
        shards=counts.shards + (1 if todo else 0),
        out_of_date=counts.out_of_date + int(np.count_nonzero(late)),
    )

"""The verb `run`: ingest, every stage in the pipeline's order, write."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from builder import machine
from builder.engine.counting import count_rows
from builder.engine.runs import Outcome
from builder.engine.work import Choice, Counts
from builder.errors import BuilderError, ConfigError, SchemaError, StageError, TransientError
from builder.hybrid import output_folder
from builder.progress import Talk
from builder.sources.base import Found
from builder.stages.contract import columns_of
from builder.stages.finding import own_code
from builder.store import files
from builder.store.layout import Layout
from builder.verbs.ingest import run_ingest
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot
from builder.verbs.stage import nothing_to_do, run_stage
from builder.verbs.works import work_of
from builder.verbs.write import run_write, write_plans


def _done_stages(snapshot: Snapshot) -> dict[str, Counts]:
    """The first stages of the pipeline that have nothing to do, counted in one pass over the table.

    Empty if the SQL of one of them is refused: that stage reports it when its turn comes.
    """
    pipeline, shards = snapshot.pipeline, snapshot.some_shards()
    works = [work_of(snapshot, name, Choice(), shards) for name in pipeline.stages]
    snapshot.heal()
    try:
        counts = count_rows(snapshot.layout, works)
    except ConfigError:
        return {}
    pairs = zip(pipeline.stages, counts, strict=True)
    return dict(itertools.takewhile(lambda pair: pair[1].todo == 0, pairs))


def check_first(snapshot: Snapshot) -> None:
    """Finds what would end a run later, before any work is done, as far as this needs no samples.

    It checks the folders of the root, the SQL of every stage and of the writer with its parameters, the packages and
    models that stages need, and the room on the disk for the hybrid shards that do not exist yet.

    Raises:
        ConfigError: every problem of the pipeline at once.
        StageError: a stage would not start.
        TransientError: too little free disk.
    """
    pipeline, layout, found = snapshot.pipeline, snapshot.layout, snapshot.found
    layout.check_folders()
    output_folder.check_apart(layout, list(found.paths.values()))
    problems: list[BuilderError] = []
    is_sql_fine = _is_sql_fine(snapshot)
    for name, use in pipeline.stages.items():
        if not is_sql_fine:
            with _collecting(problems):
                count_rows(layout, [work_of(snapshot, name, Choice(), [])])
        with _collecting(problems), own_code(type(use.stage), name):
            use.stage.check_setup()
    with _collecting(problems):
        for _ in write_plans(snapshot, []):
            pass
    if len(problems) > 1:
        text = "".join(f"\n  {line}" for problem in problems for line in str(problem).split("\n"))
        raise ConfigError(
            f"{len(problems)} problems in the pipeline{text}", fix="correct these and run the same command again"
        )
    for problem in problems:
        raise problem
    if pipeline.asked.has_hybrid_shards:
        _check_room(layout, found)


def _is_sql_fine(snapshot: Snapshot) -> bool:
    """Whether the SQL of every stage can be evaluated. One session does it for all: a session takes some 30 ms."""
    try:
        count_rows(snapshot.layout, [work_of(snapshot, name, Choice(), []) for name in snapshot.pipeline.stages])
    except (ConfigError, SchemaError, StageError):
        return False
    return True


@contextlib.contextmanager
def _collecting(problems: list[BuilderError]) -> Iterator[None]:
    try:
        yield
    except (ConfigError, SchemaError, StageError) as error:
        if str(error) not in map(str, problems):  # several stages may have the same problem, of the root or of a file
            problems.append(error)


def _check_room(layout: Layout, found: Found) -> None:
    """Raises TransientError if hybrid shards that do not exist yet would not fit, each taken as large as its source."""
    there = set(layout.hybrid_names())
    new = [path for shard, path in found.paths.items() if shard not in there]
    needed = sum(_size(path) for path in new)
    free = output_folder.free_bytes(layout)
    if needed > free:
        raise TransientError(
            f"too little free disk: {len(new)} hybrid shards take about {needed:,} bytes, {free:,} are free",
            where={"folder": layout.shards, "file system": files.file_system(layout.shards)},
            fix="free some space, or name a folder on another disk: [write] folder in the pipeline",
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # ingest reports why it cannot be read


def run_all(pipeline: Pipeline, talk: Talk) -> Iterator[tuple[str, Outcome]]:
    """Ingest, every stage in the pipeline's order, write; yields each with what it did.

    If the machine kept one of them from finishing, those after it still run.

    Raises:
        ConfigError: something that `check_first` finds; nothing was done then.
        StageError: every shard was refused.
    """
    snapshot = Snapshot(pipeline)
    check_first(snapshot)
    outcome = _as_far_as_it_goes(partial(run_ingest, pipeline, talk, snapshot=snapshot))
    yield "ingest", outcome
    if not snapshot.shards:
        if outcome.unfinished is not None:
            raise outcome.unfinished
        undone = {"refused": len(outcome.refused), **({"left": len(outcome.left)} if outcome.left else {})}
        raise StageError(
            "no shard could be read",
            where=undone,
            fix=f"for each shard that is refused above: take it out of {pipeline.asked.setting}, or download or make "
            "it again",
        )
    done = _done_stages(snapshot)
    for name, use in pipeline.stages.items():
        if name in done:
            snapshot.add_columns(columns_of(use.stage))
            yield name, nothing_to_do(name, done[name], talk)
        else:
            yield name, _as_far_as_it_goes(partial(run_stage, pipeline, name, Choice(), talk, snapshot=snapshot))
    yield "write", _as_far_as_it_goes(partial(run_write, pipeline, talk, snapshot=snapshot))


def _as_far_as_it_goes(verb: Callable[[], Outcome]) -> Outcome:
    """What a verb did; or, as an outcome, the fault of the machine that kept it from finishing."""
    try:
        return verb()
    except Exception as error:
        if not isinstance(error, OSError | TransientError) and not machine.is_of_the_machine(error):
            raise
        return Outcome(unfinished=machine.explained(error))

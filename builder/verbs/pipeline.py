"""A pipeline: its stages in order, what is done, what comes next.

Owns the verbs ingest, stage, write, run, plan, status, verify, gc. What a verb did is returned; printing is the
command line's.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from builder import config as configs
from builder import formats, machine
from builder.config import Config
from builder.engine import outdated, rules, runs, workset
from builder.engine.runs import Outcome
from builder.engine.workset import Choice, Counts, Slice, Work
from builder.errors import LASTING, BuilderError, ConfigError, SchemaError, StageError, TransientError
from builder.hybrid import verify, writer
from builder.hybrid.edited_sample import NO_TEXT, REASONS, SEVERAL_PICTURES, Rules, members_of
from builder.progress import Talk
from builder.sources.members import MemberReader, place_of
from builder.sources.tars import shards as tar_shards
from builder.stages.contract import (
    Stage,
    columns_of,
    find,
    options_hash,
    own_code,
    pointers_of,
    with_built_in,
    with_unread,
)
from builder.store import files
from builder.store.layout import Layout, RunFiles, names
from builder.table import partitions, root_schema, schema, sweeps
from builder.table.query import Samples, Sql, parameters, read_sql
from builder.table.schema import Column

#: SHARD:ROW, and digits of a row from which no shard has so many.
_PLACE = re.compile(r"(?P<shard>.+):(?P<row>[0-9]+)")
_MOST_DIGITS = 19
#: A run of another host is taken for alive so long, in seconds: its process cannot be asked.
_ALIVE_ELSEWHERE_S = 48 * 3600
#: Names that a line lists before it only counts the others.
_EXAMPLES = 3


@dataclass(frozen=True)
class StageUse:
    """A stage as a pipeline uses it; nothing of it is loaded."""

    stage: Stage
    options: BaseModel
    run: configs.Run
    table: configs.StageTable

    @property
    def sql(self) -> Sql:
        default = getattr(self.stage, "sql", f"{self.stage.name}.sql")
        return read_sql(self.table.sql or f"sql/{default}")

    @property
    def params(self) -> dict[str, Any]:
        """Values of the $names in the work SQL: the pipeline's; of the stage's own those that the SQL uses."""
        own = getattr(self.stage, "params", {})
        given = {schema.folded(name) for name in self.table.params}
        used = {schema.folded(name) for name in parameters(self.sql)} - given
        return {**{name: own[name] for name in own if name in used}, **self.table.params}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file, checked whole.

    Attributes:
        named: the options that name it on a command line.
    """

    config: Config
    stages: dict[str, StageUse]
    asked: tar_shards.Reading
    named: tuple[str, ...] = ()

    def command(self, words: str) -> str:
        """A command line of builder for this pipeline."""
        return shlex.join(["builder", *shlex.split(words), *self.named])

    @property
    def reading(self) -> tar_shards.Reading:
        """What ingest carries: the json fields that the pipeline asks for, and those that the root has."""
        return self.asked.beside(root_schema.load_schema(self.layout)[1])

    @property
    def layout(self) -> Layout:
        return Layout(self.config.root, self.config.output)

    @property
    def editing(self) -> Rules:
        """How samples are edited."""
        write = self.config.write
        return Rules(write.image, write.other_pictures, write.gives_json, self.config.dataset.boxes)

    @property
    def own_columns(self) -> tuple[Column, ...]:
        """Columns of ingest and of every stage of the pipeline."""
        return reduce(schema.merge, (columns_of(use.stage) for use in self.stages.values()), self.asked.columns)

    def columns(self) -> tuple[Column, ...]:
        """The root's columns with those that the pipeline will add: these read as typed nulls until then."""
        return schema.merge(root_schema.load_schema(self.layout)[1], self.own_columns)

    def known_columns(self) -> tuple[Column, ...]:
        """`columns`, and those of the stages that come with builder: questions and write SQL may name them all."""
        return with_built_in(self.columns())


def load(path: Path, sets: Sequence[str] = (), named: Sequence[str] = ()) -> Pipeline:
    """Reads a pipeline and checks all of it.

    Args:
        named: the options that name it on a command line.

    Raises:
        ConfigError: every problem at once.
        SchemaError: two stages have one column.
    """
    config = configs.load(path, tuple(sets))
    stages: dict[str, StageUse] = {}
    for name, section in config.stages.items():
        try:
            kind = find(name, section.python)
        except StageError as error:
            config.problems.add(("stages", name), "\n".join([error.what, error.fix]))
            continue
        options = configs.check(kind.Options, section.options, ("stages", name), config.problems)
        run = configs.run_of(config, name)
        if options is not None:
            try:
                with own_code(kind, name):
                    stage = kind(options)  # type: ignore[call-arg]
                stages[name] = StageUse(stage, options, _on_gpus(stage, run, section), section)
            except BuilderError as error:
                config.problems.add(("stages", name), "\n".join([error.what, error.fix]))
    fields, renamed = configs.fields_of(config.dataset, config.problems)
    config.problems.raise_any()
    pipeline = Pipeline(config, stages, tar_shards.Reading(fields, config.dataset.boxes, renamed), tuple(named))
    with _in_file(config.path):
        _ = pipeline.own_columns
    return pipeline


def _on_gpus(stage: Stage, run: configs.Run, section: configs.StageTable) -> configs.Run:
    """One worker a GPU where each holds a model of its own, unless the stage's own section says how many."""
    if not stage.resources.gpus or "workers" in section.run or all(device == "cpu" for device in run.devices):
        return run
    return run.model_copy(update={"workers": len(run.devices)})


@contextlib.contextmanager
def _in_file(path: str) -> Iterator[None]:
    try:
        yield
    except SchemaError as error:
        raise ConfigError(error.what, where={"file": path, **error.where}, fix=error.fix) from error


# --- ingest ---


@dataclass
class IngestPlan:
    """What ingest would do.

    Attributes:
        todo: shards that are new, changed on disk, or read with other fields.
        missing: files that the pattern names and that do not exist.
        vanished: shards of the table that the pipeline names no more.
        changed: of todo, shards that are not as they were on disk: their members are read, too.
        versions: how many shards of the table each version of ingest has read.
    """

    found: tar_shards.Found
    todo: list[Path]
    missing: list[Path]
    vanished: list[str]
    changed: list[str]
    versions: Counter[str]


def plan_ingest(pipeline: Pipeline, *, redo: bool = False) -> IngestPlan:
    """Compares the shards on disk with the table."""
    found = tar_shards.find(pipeline.config.patterns)
    layout, reading = pipeline.layout, pipeline.reading
    writer.check_apart(layout, list(found.paths.values()))
    todo: list[Path] = []
    changed: list[str] = []
    versions: Counter[str] = Counter()
    for shard, path in found.paths.items():
        before = tar_shards.ingested(layout, path)
        if before is None:
            todo.append(path)
            continue
        versions[before.version] += 1
        now = tar_shards.identify(path, reading)
        if redo or before != now:
            todo.append(path)
            if not tar_shards.is_same_on_disk(before, now):
                changed.append(shard)
    return IngestPlan(found, todo, found.missing, tar_shards.vanished(layout, found), changed, versions)


def ingest(pipeline: Pipeline, talk: Talk, *, redo: bool = False) -> Outcome:
    """Reads new and changed shards into the table."""
    pipeline.layout.check_folders()
    plan = plan_ingest(pipeline, redo=redo)
    _tell_missing(plan, talk)
    layout = pipeline.layout
    if not plan.todo:
        talk.say(f"ingest: nothing to do ({len(plan.found.paths)} shards)")
        return Outcome()
    files.check_links(layout.root)
    root_schema.extend_schema(layout, pipeline.reading.columns)
    settings = pipeline.config.run
    run = runs.new_run(layout, "ingest")
    runs.describe(
        run, "ingest", reading=pipeline.reading.to_json(), pipeline=pipeline.config.path, set=pipeline.config.sets
    )
    dealt = tar_shards.deal(plan.todo, settings.workers)
    runs.tasks_of(run, dealt)
    outcome = runs.execute(run, len(dealt), settings, talk, "ingest", len(plan.todo), "shards")
    if outcome["rows"]:
        _tell_unseen(pipeline.asked, outcome, talk)
    _tell_sizes_only(pipeline, plan.changed, talk)
    return outcome


def _tell_unseen(asked: tar_shards.Reading, outcome: Outcome, talk: Talk) -> None:
    """Says which json fields the pipeline names and no sample that was read has: a name may be misspelt."""
    names = [*asked.fields, *([asked.boxes] if asked.boxes != tar_shards.BOXES else [])]
    unseen = [name for name in names if name not in outcome.wanted]
    if unseen and not outcome.others:
        talk.say(f"ingest: no sample that was read has a json field, so these are null: {_few(unseen)}")
        return
    others = sorted(outcome.others - set(names))
    for name in unseen:
        alike = [other for other in others if schema.folded(other) == schema.folded(name)]
        near = alike or difflib.get_close_matches(name, others, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"fields that there are: {_few(others)}"
        talk.say(f"ingest: no sample that was read has the json field '{name}', which the pipeline names: {hint}")


def _tell_sizes_only(pipeline: Pipeline, changed: Sequence[str], talk: Talk) -> None:
    """Says of which answers nobody can tell whether their pictures are still the same bytes."""
    uses = [use for use in pipeline.stages.values() if outdated.source_members(use.stage)]
    if not changed or not uses:
        return
    with Samples(pipeline.layout, pipeline.columns(), changed) as samples:
        for name in (use.stage.name for use in uses):
            condition = f"{name}_digest is null and source_digests is not null"
            [(count,)] = samples.fixed(f"select count(*) from samples where {name}_status is not null and {condition}")
            if count:
                again = pipeline.command(f"stage {name} --redo --where {shlex.quote(condition)}")
                talk.say(
                    f"{name}: {count} answers of samples in changed shards are from a version that recorded no digest "
                    f"of what it read: only sizes were compared. To be sure: {again}"
                )


def _tell_missing(plan: IngestPlan, talk: Talk) -> None:
    if plan.missing:
        first = [f"{path} ({tar_shards.why_missing(path)})" for path in plan.missing[:_EXAMPLES]]
        told = _few([*first, *plan.missing[_EXAMPLES:]])
        talk.say(f"{len(plan.missing)} of the shards that dataset.shards names are no files: {told}")
    if plan.vanished:
        talk.say(
            f"{len(plan.vanished)} shards of the table are gone from dataset.shards, their rows stay and are not "
            f"written: {_few(plan.vanished)}"
        )


def _few(things: Sequence[object]) -> str:
    more = f" and {len(things) - _EXAMPLES} more" if len(things) > _EXAMPLES else ""
    return ", ".join(str(thing) for thing in things[:_EXAMPLES]) + more


# --- stages ---


def use_of(pipeline: Pipeline, name: str) -> StageUse:
    """A stage of the pipeline by its name."""
    if name not in pipeline.stages:
        raise ConfigError(
            f"the pipeline has no stage '{name}'",
            where={"file": pipeline.config.path, "stages": ", ".join(pipeline.stages) or "none"},
            fix=f"name one of these, or add [stages.{name}]",
        )
    return pipeline.stages[name]


def work_of(pipeline: Pipeline, name: str, choice: Choice, shards: Sequence[str]) -> Work:
    """The work of one stage over certain shards."""
    use = use_of(pipeline, name)
    signature = options_hash(use.stage, use.options)
    params = _next_draw(use) if choice.next_draw else use.params
    columns = with_unread(pipeline.columns(), use.stage, params)
    image = pipeline.config.write.image
    return Work(use.stage, use.sql, params, choice, shards, columns, signature, image)


def _next_draw(use: StageUse) -> dict[str, Any]:
    """The parameters of the work SQL with one more for $draw, which it adds to the draw of a row's answer."""
    if not isinstance(use.params.get("draw"), int):
        raise ConfigError(
            f"stage '{use.stage.name}' has no draws: its work SQL uses no $draw",
            where={"file": use.sql.origin},
            fix="select coalesce(image_draw + $draw, 0) as draw, as the generate stage's own SQL does",
        )
    return {**use.params, "draw": use.params["draw"] + 1}


def shards_of(pipeline: Pipeline) -> list[str]:
    """The shards that the pipeline names and the table has."""
    found = tar_shards.find(pipeline.config.patterns)
    return workset.narrow_to(list(found.paths), pipeline.layout.shard_names())


def table_shards(pipeline: Pipeline) -> list[str]:
    """`shards_of`, of which there must be one at least."""
    shards = shards_of(pipeline)
    if not shards:
        root = pipeline.layout.root
        raise ConfigError("the table has no samples yet", where={"root": root}, fix="builder ingest, then this")
    return shards


def run_stage(pipeline: Pipeline, name: str, choice: Choice, talk: Talk) -> Outcome:
    """Runs one stage over its work set.

    Raises:
        BuilderError: bad SQL, a stage that cannot start, a task that did not finish.
    """
    layout, use = pipeline.layout, use_of(pipeline, name)
    layout.check_folders()
    shards = table_shards(pipeline)
    work = work_of(pipeline, name, choice, shards)
    root_schema.extend_schema(layout, columns_of(use.stage))
    partitions.heal(layout, shards)
    unnamed = layout.runs / "workset.parquet"
    frozen = files.temp_path(unnamed)
    try:
        with files.naming(unnamed):
            slices = workset.freeze(layout, frozen, work)
        if not slices:
            [counts] = workset.count(layout, [work])
            if choice.retry and counts.failed:
                _tell_classes(layout, work, talk)
            return _nothing_to_do(name, counts, talk)
        if notice := getattr(use.stage, "notice", ""):
            talk.say(f"{name}: {notice}")
        if again := sum(part.again for part in slices):
            talk.say(f"{name}: {again} rows are answered again: their inputs have changed since")
        run = runs.new_run(layout, name)
        _describe_stage(pipeline, run, use, work)
        files.write_atomic(run.workset, frozen.replace)
    finally:
        frozen.unlink(missing_ok=True)
    dealt = workset.cut(slices, use.run.workers)
    workset.write_tasks(run, dealt)
    outcome = runs.execute(run, len(dealt), use.run, talk, name, sum(part.count for part in slices), "rows")
    for line in getattr(use.stage, "summary", lambda totals: [])(outcome.totals):
        talk.say(f"{name}: {line}")
    if column := getattr(use.stage, "noting", ""):
        _tell_notes(pipeline, work, column, run.folder.name, talk)
    return outcome


def _tell_notes(pipeline: Pipeline, work: Work, column: str, run: str, talk: Talk) -> None:
    """Says of how many rows a run has noted that something was not taken as it came."""
    with Samples(pipeline.layout, work.columns, work.shards) as samples:
        of_run = f"{column} is not null and {work.stage.name}_run = '{run}'"
        [(rows, example)] = samples.fixed(f"select count(*), min({column}) from samples where {of_run}")
    if rows:
        question = f"select shard, row, {column} from samples where {column} is not null"
        listed = pipeline.command(f"sql {shlex.quote(question)}")
        talk.say(f'{work.stage.name}: {rows} rows have {column}, for example "{example}": {listed}')


def _nothing_to_do(name: str, counts: Counts, talk: Talk) -> Outcome:
    talk.say(f"{name}: nothing to do ({counts.ok} ok, {counts.failed} failed of {counts.covered} covered)")
    return Outcome()


def _tell_classes(layout: Layout, work: Work, talk: Talk) -> None:
    """Says of what classes a stage's failures in the table are: no row asked for is of the one to try again."""
    with Samples(layout, work.columns, work.shards) as samples:
        classes = ", ".join(f"{kind} ({rows})" for kind, rows, _ in _classes(samples, work.stage.name))
    talk.say(f"{work.stage.name}: no row asked for has failed with '{work.choice.retry_class}'; there are: {classes}")


def _classes(samples: Samples, name: str) -> list[tuple[Any, ...]]:
    """The classes of a stage's failures, each with its rows and an example, the most frequent first."""
    return samples.fixed(
        f"select split_part({name}_error, ':', 1), count(*), any_value({name}_error) from samples "
        f"where {name}_status = 'failed' group by 1 order by 2 desc, 1"
    )


def is_lasting(pipeline: Pipeline, name: str, outcome: Outcome) -> bool:
    """Whether every row that failed in a stage's run would fail again: see `errors.LASTING`."""
    if outcome.folder is None:
        return False
    with Samples(pipeline.layout, pipeline.columns(), pipeline.layout.partitions()) as samples:
        failed = samples.fixed(
            f"select distinct split_part({name}_error, ':', 1) from samples "
            f"where {name}_status = 'failed' and {name}_run = '{outcome.folder.name}'"
        )
    return bool(failed) and all(kind in LASTING for (kind,) in failed)


def _done_stages(pipeline: Pipeline) -> dict[str, Counts]:
    """The first stages of the pipeline that have nothing to do, counted in one pass over the table.

    SQL that is refused ends them: its stage says so when it is its turn.
    """
    layout, shards = pipeline.layout, table_shards(pipeline)
    works = [work_of(pipeline, name, Choice(), shards) for name in pipeline.stages]
    partitions.heal(layout, shards)
    try:
        counts = workset.count(layout, works)
    except ConfigError:
        return {}
    pairs = zip(pipeline.stages, counts, strict=True)
    return dict(itertools.takewhile(lambda pair: pair[1].todo == 0, pairs))


def _describe_stage(pipeline: Pipeline, run: RunFiles, use: StageUse, work: Work) -> None:
    settings = {
        "checkpoint_rows": use.run.checkpoint_rows,
        "checkpoint_seconds": use.run.checkpoint_seconds,
        "max_failed": use.run.max_failed,
        "batch_rows": use.run.batch_rows or use.stage.resources.batch_rows,
    }
    runs.describe(
        run,
        "stage",
        stage=use.stage.name,
        version=use.stage.version,
        options=use.options.model_dump(mode="json"),
        options_hash=work.signature,
        python_file=python_of(use),
        sql={"origin": work.sql.origin, "text": work.sql.text},
        params=work.params,
        choice=asdict(work.choice),
        image=work.image,
        settings=settings,
        pipeline=pipeline.config.path,
        set=pipeline.config.sets,
    )


def python_of(use: StageUse) -> str | None:
    """Where the code of a stage of one's own lies: `FILE:CLASS`, the file absolute; None for an installed one."""
    if not use.table.python:
        return None
    path, _, name = use.table.python.rpartition(":")
    return f"{Path(path).absolute()}:{name}"


# --- write ---


@dataclass
class WritePlan:
    """What write would do.

    Attributes:
        todo: shards that are not up to date, with their rows of the write SQL.
        edited: samples that will differ, over all shards; dropped ones apart.
        stale: edited samples whose image is older than their prompt: they keep the caption it was made from.
        refused: samples that the SQL returns and that are never edited, since their source is bad.
        kept: samples that the SQL returns and that stay the source's, by reason (`edited_sample.REASONS`).
        needed: bytes that writing takes.
    """

    shards: int = 0
    todo: list[Slice] = field(default_factory=list)
    edited: int = 0
    dropped: int = 0
    stale: int = 0
    refused: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    needed: int = 0
    free: int = 0
    bytes: int = 0


def plan_write(pipeline: Pipeline, *, freeze: Path | None = None, is_healed: bool = False) -> WritePlan:
    """Evaluates the write SQL once and compares every shard with its manifest.

    Args:
        freeze: where the write rows of shards that are not up to date are kept.
        is_healed: whether the caller has healed the partitions.
    """
    layout = pipeline.layout
    shards = shards_of(pipeline)
    if not is_healed:
        partitions.heal(layout, shards)
    plan = WritePlan(free=writer.free_bytes(layout))
    largest = position = 0
    sink: pq.ParquetWriter | None = None
    try:
        for shard in write_plans(pipeline, shards):
            plan.shards += 1
            plan.stale += shard.stale
            plan.refused += shard.refused
            plan.kept += shard.kept
            plan.dropped += sum(edit.dropped for edit in shard.edits.values())
            plan.edited += sum(not edit.dropped for edit in shard.edits.values())
            if writer.is_written(layout, shard):
                continue
            size, more = writer.sizes_of(layout, shard)
            plan.needed, largest, plan.bytes = plan.needed + more, max(largest, size), plan.bytes + size
            plan.todo.append(Slice(shard.shard, position, len(shard.frozen), shard.rows))
            position += len(shard.frozen)
            if freeze is not None and shard.frozen:
                rows = pa.Table.from_pylist(shard.frozen, schema=shard.frozen_schema)
                sink = sink or pq.ParquetWriter(freeze, rows.schema, compression="zstd", compression_level=1)
                sink.write_table(rows)
    finally:
        if sink is not None:
            sink.close()
    plan.needed = max(plan.needed, 0) + largest
    return plan


def write_plans(pipeline: Pipeline, shards: Sequence[str]) -> Iterator[writer.ShardPlan]:
    """The plan of every hybrid shard, in order."""
    return _write_plans(pipeline, shards, None)


def _write_plans(
    pipeline: Pipeline, shards: Sequence[str], refused: dict[str, BuilderError] | None
) -> Iterator[writer.ShardPlan]:
    write = pipeline.config.write
    columns, sql = pipeline.known_columns(), read_sql(write.select)
    return writer.plans(pipeline.layout, columns, shards, sql, write.params, pipeline.editing, refused)


def write(pipeline: Pipeline, talk: Talk, *, is_healed: bool = False) -> Outcome:
    """Writes the hybrid shards that are not up to date.

    Raises:
        TransientError: too little free disk.
    """
    layout = pipeline.layout
    layout.check_folders()
    found = tar_shards.find(pipeline.config.patterns)
    writer.check_apart(layout, list(found.paths.values()))
    table_shards(pipeline)
    files.make_folder(layout.runs)
    frozen = files.temp_path(layout.runs / "write.parquet")
    try:
        with files.naming(frozen):
            plan = plan_write(pipeline, freeze=frozen, is_healed=is_healed)
        if plan.stale:
            talk.say(
                f"write: {plan.stale} images are older than their prompts: those samples keep the caption they were "
                f"made from (draw them again: {_draw_again(pipeline)})"
            )
        for reason, count in plan.kept.items():
            talk.say(f"write: {count} {REASONS[reason]} stay the source's ({help_for(pipeline, reason)})")
        if not plan.todo:
            talk.say(f"write: nothing to do ({plan.shards} hybrid shards up to date)")
            writer.write_sizes(layout)
            return Outcome()
        check_disk(plan, layout)
        run = runs.new_run(layout, "write")
        runs.describe(
            run,
            "write",
            sql=read_sql(pipeline.config.write.select).origin,
            image_stage=writer.image_stage(pipeline.known_columns()),
            editing=asdict(pipeline.editing),
            folder=None if layout.output is None else str(layout.output.absolute()),
            pipeline=pipeline.config.path,
            set=pipeline.config.sets,
        )
        if frozen.exists():
            frozen.replace(run.workset)
    finally:
        frozen.unlink(missing_ok=True)
    dealt = _deal(plan.todo, pipeline.config.run.workers)
    workset.write_tasks(run, dealt)
    outcome = runs.execute(run, len(dealt), pipeline.config.run, talk, "write", len(plan.todo), "shards")
    writer.write_sizes(layout)
    if cut := outcome["no_end_mark"]:
        talk.say(
            f"write: the sources of {cut} shards have no end mark, so they were cut; the hybrid shards are closed, and "
            "their _stats.json says source_end_mark: false"
        )
    return outcome


def help_for(pipeline: Pipeline, reason: str) -> str:
    """What helps where samples stay the source's for a reason out of `edited_sample.REASONS`."""
    if reason == SEVERAL_PICTURES:
        return 'say what becomes of the others: [write] other_pictures = "keep" or "drop"'
    if reason == NO_TEXT:
        return "give them a json: [write] json = true"
    return f'make them in that format: {_draw_again(pipeline)}, or take jpg: [write] image = "jpg"'


def _draw_again(pipeline: Pipeline) -> str:
    """The command that makes new images where the inputs of the old ones have changed."""
    return pipeline.command(f"stage {writer.image_stage(pipeline.known_columns())} --stale")


def check_disk(plan: WritePlan, layout: Layout) -> None:
    """Raises TransientError if the output does not fit on the disk."""
    if plan.needed > plan.free:
        raise TransientError(
            f"too little free disk for write: {plan.needed:,} bytes needed, {plan.free:,} free",
            where={"folder": layout.shards, "shards to write": len(plan.todo)},
            fix="free some space, or name a folder on another disk: [write] folder in the pipeline",
        )


def _deal(todo: Sequence[Slice], tasks: int) -> list[list[Slice]]:
    count = min(tasks, len(todo))
    return [list(todo[start::count]) for start in range(count)]


# --- plan, status ---


@dataclass
class Plan:
    """What `builder run` would do now.

    Attributes:
        older: answers that older versions gave; a run leaves them as they are.
    """

    ingest: IngestPlan
    stages: dict[str, Counts]
    write: WritePlan
    older: list[rules.OlderRule]


def plan(pipeline: Pipeline, choice: Choice) -> Plan:
    """Counts what there is to do; starts nothing."""
    ingest_plan = plan_ingest(pipeline)
    layout = pipeline.layout
    shards = shards_of(pipeline)
    partitions.heal(layout, shards)
    by_run: dict[str, Counter[str]] = {}
    works = [work_of(pipeline, name, choice, shards) for name in pipeline.stages]
    counts = workset.count(layout, works, by_run)
    older = rules.of_ingest(ingest_plan.versions, tar_shards.CHANGES)
    for use in pipeline.stages.values():
        older += rules.of_stage(layout, use.stage, by_run[use.stage.name])
    write_plan = plan_write(pipeline, is_healed=True)
    return Plan(ingest_plan, dict(zip(pipeline.stages, counts, strict=True)), write_plan, older)


def status(pipeline: Pipeline) -> dict[str, Any]:
    """What the table holds: shards, rows, for each stage its answers and failures by class, and new images that `write`
    leaves out, by reason.

    `out_of_date` is None for a stage that the pipeline has not, or whose SQL is refused.
    """
    layout = pipeline.layout
    shards = layout.shard_names()
    healed = partitions.heal(layout, shards)
    columns = pipeline.columns()
    stages = list(dict.fromkeys(column.stage for column in columns))
    result: dict[str, Any] = {"root": str(layout.root), "shards": len(shards), "healed": healed, "stages": {}}
    known = pipeline.known_columns()
    with Samples(layout, known, layout.partitions()) as samples:
        counts = ", ".join(
            f"count(*) filter ({name}_status = 'ok'), count(*) filter ({name}_status = 'failed')" for name in stages
        )
        of_a_shard = f"max(source_notes) filter (starts_with(source_notes, '{tar_shards.OF_SHARD}'))"
        others = (
            f"count(source_notes), coalesce({of_a_shard}, max(source_notes)), count(distinct shard), count(image_path)"
        )
        suspects = "".join(
            f", count(*) filter ({outdated.suspicion(use.stage)} <> {outdated.SAME})"
            for use in pipeline.stages.values()
        )
        all_of_it = f"select count(*), {counts}, {others}{suspects} from samples s"  # one pass: partitions are many
        answer = samples.fixed(all_of_it)[0]
        row, rest = answer[: 1 + 2 * len(stages)], answer[1 + 2 * len(stages) :]
        noted, note, with_rows, images, *doubtful = rest
        late = _out_of_date(pipeline, doubtful, shards)
        result["rows"] = row[0]
        result["notes"] = {"rows": noted, "example": note}
        result["no_sample"] = []
        if with_rows < len(shards):
            have = {shard for (shard,) in samples.fixed("select distinct shard from samples")}
            result["no_sample"] = [shard for shard in shards if shard not in have]
        for i, name in enumerate(stages):
            ok, failed = row[1 + 2 * i], row[2 + 2 * i]
            classes = _classes(samples, name) if failed else []
            result["stages"][name] = {
                "ok": ok,
                "failed": failed,
                "not_tried": row[0] - ok - failed,
                "out_of_date": late.get(name),
                "errors": [{"class": kind, "rows": count, "example": example} for kind, count, example in classes],
            }
        result["left_out"] = dict(_left_out(samples, known, pipeline.editing)) if images else {}
    result["hybrid_shards"] = sum(name.endswith(".tar") for name in names(layout.shards))
    result["runs"] = len(names(layout.runs))
    return result


def _left_out(samples: Samples, columns: Sequence[Column], editing: Rules) -> Counter[str]:
    """New images that the writer leaves out, since their samples stay the source's, by reason."""
    found: Counter[str] = Counter()
    kind = "image_format" if writer.says_format(columns) else "null"
    alike = samples.fixed(
        f"select list_transform(source_members, lambda m: m.ext), {kind}, count(*) from samples "
        "where image_path is not null and source_status = 'ok' group by all order by all"
    )
    for extensions, said, count in alike:
        members = members_of(tuple(extensions), formats.named(said), True, False, editing)
        if isinstance(members, str):
            found[members] += count
    return found


def _out_of_date(pipeline: Pipeline, suspects: Sequence[int], shards: Sequence[str]) -> dict[str, int]:
    """How many answers of each stage of the pipeline are out of date; inputs are read only where samples changed.

    Args:
        suspects: of each stage in order, answers whose sample changed.
    """
    found = {}
    for name, count in zip(pipeline.stages, suspects, strict=True):
        if not count:
            found[name] = 0
            continue
        with contextlib.suppress(ConfigError):  # its own command says what is wrong with the SQL
            work = work_of(pipeline, name, Choice(), shards)
            found[name] = workset.count(pipeline.layout, [work])[0].out_of_date
    return found


# --- verify, gc, fold, drop ---


def prove(pipeline: Pipeline, talk: Talk) -> verify.Proof:
    """Proves every hybrid shard of the pipeline; changes nothing on disk."""
    layout = pipeline.layout
    on_disk = tar_shards.find(pipeline.config.patterns)
    shards = workset.narrow_to(list(on_disk.paths), layout.shard_names())
    prover = verify.Prover(layout, shards, pipeline.editing)
    prover.check_gone(tar_shards.vanished(layout, on_disk))
    refused: dict[str, BuilderError] = {}
    with talk.bar("verify", len(shards), "shards") as bar:
        readable = prover.readable()
        for plan in _write_plans(pipeline, readable, refused):
            prover.prove(plan)
            bar.update(prover.looked_at, len(prover.wrong))
    for shard, error in refused.items():
        prover.refuse(shard, error)
    return prover.finish(layout.shard_names())


def gc(pipeline: Pipeline, talk: Talk, *, dry_run: bool) -> sweeps.Sweep:
    """Deletes what nothing needs: old generations, dead temp files, edits tars and runs that nothing points to."""
    layout = pipeline.layout
    layout.check_folders()
    sweep = sweeps.Sweep()
    pointers = pointers_of(root_schema.load_schema(layout)[1])
    alive: set[str] = set()
    idle = [name for name in names(layout.runs) if _is_idle(layout.run(name))]  # these commit no more rows
    shards = layout.shard_names()
    with talk.bar("gc", len(shards), "shards") as bar:
        for done, shard in enumerate(shards, 1):
            alive |= sweeps.sweep_shard(layout, shard, pointers, sweep, dry_run=dry_run)
            if not dry_run:
                partitions.heal(layout, [shard])
            bar.update(done)
    sweeps.sweep_temps(layout, sweep, dry_run=dry_run)
    for name in idle:
        if name not in alive:
            sweep.add(layout.run(name))
            if not dry_run:
                sweeps.delete(layout.run(name))
    return sweep


def _is_idle(folder: Path) -> bool:
    """Whether a folder is a run whose process is gone; one of another host is believed to live for two days."""
    try:
        data = runs.read(folder)
    except ConfigError:
        return False  # nobody's to sweep: a run has had its description, whole, as long as its name
    host, pid = data.get("host"), data.get("pid")
    if not isinstance(host, str) or not isinstance(pid, int):
        return False
    lives = files.process_lives(host, pid)
    return time.time() - folder.stat().st_mtime > _ALIVE_ELSEWHERE_S if lives is None else not lives


def fold_all(pipeline: Pipeline, talk: Talk) -> int:
    """Folds every partition that is behind its column files or the root's columns; returns how many were."""
    layout = pipeline.layout
    layout.check_folders()
    generation, _ = root_schema.load_schema(layout)
    shards = layout.shard_names()
    folded = 0
    with talk.bar("fold", len(shards), "shards") as bar:
        for done, shard in enumerate(shards, 1):
            state = partitions.partition_state(layout, shard)
            if state is None or state.schema_generation != generation or partitions.is_behind(layout, shard):
                partitions.fold(layout, shard)
                folded += 1
            bar.update(done)
    return folded


def drop(pipeline: Pipeline, name: str) -> None:
    """Takes one column out of the table.

    Raises:
        ConfigError: there is no such column, or the table cannot do without it.
    """
    layout = pipeline.layout
    layout.check_folders()
    _, columns = root_schema.load_schema(layout)
    alike = [column for column in columns if schema.folded(column.name) == schema.folded(name)]
    column = next((column for column in alike if column.name == name), alike[0] if len(alike) == 1 else None)
    if column is None:
        raise ConfigError(
            f"the table has no column '{name}'", where={"root": layout.root}, fix="builder sql 'describe samples'"
        )
    needed = {c.name for stage in {c.stage for c in columns} for c in schema.status_columns(stage)}
    if column in schema.IDENTITY or column.name in needed:
        raise ConfigError(
            f"column '{name}' cannot be dropped",
            where={"stage": column.stage},
            fix="drop an output of a stage or a json field",
        )
    root_schema.change_schema(layout, lambda have: tuple(c for c in have if c.name != column.name))


def behind(layout: Layout) -> int:
    """How many partitions are behind their column files."""
    return sum(partitions.is_behind(layout, shard) for shard in layout.shard_names())


def all_samples(pipeline: Pipeline) -> Samples:
    """The whole table of the root, for questions."""
    return Samples(pipeline.layout, pipeline.known_columns(), pipeline.layout.partitions())


def answer(pipeline: Pipeline, sql: Sql, params: dict[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Answers a question over the whole table: names and rows."""
    with all_samples(pipeline) as samples:
        relation = samples.select(sql, params)
        return list(relation.columns), samples.rows(sql, params)


def show(pipeline: Pipeline, uid: str) -> list[dict[str, Any]]:
    """Every column of the samples of one uid, or of the one at `SHARD:ROW`.

    Raises:
        ConfigError: there is no such sample.
    """
    by_place = Sql("select * from samples where shard = $shard and row = $row", "show")
    by_uid = Sql("select * from samples where uid = $uid order by shard, row", "show")
    place = _PLACE.fullmatch(uid)
    with all_samples(pipeline) as samples:
        rows: list[dict[str, Any]] = []
        if place and len(place["row"]) < _MOST_DIGITS:
            rows = samples.table(by_place, {"shard": place["shard"], "row": int(place["row"])}).to_pylist()
        rows = rows or samples.table(by_uid, {"uid": uid}).to_pylist()
    if not rows:
        raise _no_sample(pipeline, uid, place)
    return rows


def _no_sample(pipeline: Pipeline, uid: str, place: re.Match[str] | None) -> ConfigError:
    """Why nothing is shown: no such uid, no such shard, or no such row of it."""
    root, shards = {"root": pipeline.layout.root}, pipeline.layout.partitions()
    if place is None:
        return ConfigError(
            f"no sample has the uid '{uid}'",
            where=root,
            fix="give a uid of the table (builder sql 'select uid from samples limit 5'), or SHARD:ROW",
        )
    shard = place["shard"]
    if shard not in shards:
        near = difflib.get_close_matches(shard, shards, 1)
        return ConfigError(
            f"the table has no shard '{shard}', and no sample has the uid '{uid}'",
            where={**root, "shards": _few(shards) or "none"},
            fix=f"did you mean '{near[0]}'?" if near else "give a shard of the table, or a uid",
        )
    count = partitions.read_partition(pipeline.layout, shard, ["row"])[0].num_rows
    return ConfigError(
        f"shard '{shard}' has no row {place['row']}",
        where={**root, "its rows": f"0 to {count - 1}" if count else "none"},
        fix=f"give one of these: builder show {shlex.quote(f'{shard}:{count - 1}')}" if count else "give another shard",
    )


def save_images(pipeline: Pipeline, rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the source image and the generated one of samples; returns the files."""
    saved = []
    for row in rows:
        wanted = ["image"] + ["edit"] * (row.get("image_path") is not None)
        with MemberReader(pipeline.layout, row["shard"], wanted) as reader:
            for member in wanted:
                data = reader.read(row["row"], member)
                if data is None:
                    continue
                place = place_of(row["source_members"], "image")
                extension = formats.of_bytes(data) if member == "edit" else place and place["ext"].lower()
                name = "new" if member == "edit" else "source"
                path = folder / f"{row['shard']}-{row['row']:06d}-{name}.{extension or formats.JPG}"
                files.write_atomic(path, data, durable=False)
                saved.append(path)
    return saved


def check_first(pipeline: Pipeline) -> None:
    """Finds what would end a run later, before any work is done for it: all that can be told without the samples.

    These are the folders of the root, the SQL of every stage and of the writer with its parameters, packages and models
    that a stage would miss, and room on the disk for the hybrid shards that do not exist yet.

    Raises:
        ConfigError: every problem of the pipeline at once.
        StageError: a stage would not start.
        TransientError: too little free disk.
    """
    layout = pipeline.layout
    layout.check_folders()
    found = tar_shards.find(pipeline.config.patterns)
    writer.check_apart(layout, list(found.paths.values()))
    problems: list[BuilderError] = []
    is_sql_fine = _is_sql_fine(pipeline)
    for name, use in pipeline.stages.items():
        if not is_sql_fine:
            with _collecting(problems):
                workset.count(layout, [work_of(pipeline, name, Choice(), [])])
        with _collecting(problems), own_code(type(use.stage), name):
            getattr(use.stage, "check_setup", lambda: None)()
    with _collecting(problems):
        for _ in write_plans(pipeline, []):
            pass
    if len(problems) > 1:
        text = "".join(f"\n  {line}" for problem in problems for line in str(problem).split("\n"))
        raise ConfigError(
            f"{len(problems)} problems in the pipeline{text}", fix="mend these and run the same command again"
        )
    for problem in problems:
        raise problem
    _check_room(layout, found)


def _is_sql_fine(pipeline: Pipeline) -> bool:
    """Whether the SQL of every stage can be evaluated: in one session, and a session takes some 30 ms."""
    try:
        workset.count(pipeline.layout, [work_of(pipeline, name, Choice(), []) for name in pipeline.stages])
    except (ConfigError, SchemaError, StageError):
        return False
    return True


@contextlib.contextmanager
def _collecting(problems: list[BuilderError]) -> Iterator[None]:
    try:
        yield
    except (ConfigError, SchemaError, StageError) as error:
        if str(error) not in map(str, problems):  # one of the root or of a file stands in the way of several stages
            problems.append(error)


def _check_room(layout: Layout, found: tar_shards.Found) -> None:
    """Raises TransientError where hybrid shards that do not exist yet, each about its source's size, would not fit."""
    there = set(names(layout.shards))
    new = [path for shard, path in found.paths.items() if f"{shard}.tar" not in there]
    needed = sum(_size(path) for path in new)
    free = writer.free_bytes(layout)
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
        return 0  # whoever reads it says why


def run(pipeline: Pipeline, talk: Talk) -> Iterator[tuple[str, Outcome]]:
    """Ingest, every stage in the pipeline's order, write; yields each with what it did.

    What the machine kept from being finished keeps nothing behind it from being done.

    Raises:
        ConfigError: something that `check_first` finds; nothing was done then.
        StageError: every shard was refused.
    """
    check_first(pipeline)
    outcome = _as_far_as_it_goes(partial(ingest, pipeline, talk))
    yield "ingest", outcome
    if not shards_of(pipeline):
        if outcome.unfinished is not None:
            raise outcome.unfinished
        undone = {"refused": len(outcome.refused), **({"left": len(outcome.left)} if outcome.left else {})}
        raise StageError("no shard could be read", where=undone, fix="see the reasons above")
    done = _done_stages(pipeline)
    for name, use in pipeline.stages.items():
        if name in done:
            root_schema.extend_schema(pipeline.layout, columns_of(use.stage))
            yield name, _nothing_to_do(name, done[name], talk)
        else:
            yield name, _as_far_as_it_goes(partial(run_stage, pipeline, name, Choice(), talk))
    is_healed = len(done) == len(pipeline.stages)
    yield "write", _as_far_as_it_goes(partial(write, pipeline, talk, is_healed=is_healed))


def _as_far_as_it_goes(verb: Callable[[], Outcome]) -> Outcome:
    """What a verb did, or what of the machine's kept it from being finished."""
    try:
        return verb()
    except Exception as error:
        if not isinstance(error, OSError | TransientError) and not machine.is_of_the_machine(error):
            raise
        return Outcome(unfinished=machine.told(error))

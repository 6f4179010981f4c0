"""A pipeline file as the verbs see it: its stages with their options, SQL and parameters, and where its root lies."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from builder.config.loading import Config, load_config, run_of
from builder.config.problems import check
from builder.config.sections import Run, StageTable
from builder.engine import workset
from builder.engine.work import Choice, Work
from builder.errors import BuilderError, ConfigError, SchemaError, StageError
from builder.hybrid.edit import Rules
from builder.sources import kinds
from builder.sources.base import Source
from builder.stages.contract import Stage, columns_of
from builder.stages.finding import find, own_code, with_built_in, with_unread
from builder.stages.signature import options_hash
from builder.store.layout import Layout
from builder.table import root_schema, schema
from builder.table.schema import Column
from builder.table.sql_text import Sql, parameters, read_sql


@dataclass(frozen=True)
class StageUse:
    """A stage as a pipeline uses it; nothing of it is loaded."""

    stage: Stage
    options: BaseModel
    run: Run
    table: StageTable

    @property
    def sql(self) -> Sql:
        default = self.stage.sql or f"{self.stage.name}.sql"
        return read_sql(self.table.sql or f"sql/{default}")

    @property
    def params(self) -> dict[str, Any]:
        """Values of the $names in the work SQL: the pipeline's; of the stage's own those that the SQL uses."""
        own = self.stage.params
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
    asked: Source
    named: tuple[str, ...] = ()

    def command(self, words: str) -> str:
        """A command line of builder for this pipeline."""
        return shlex.join(["builder", *shlex.split(words), *self.named])

    @property
    def source(self) -> Source:
        """The source with what the pipeline asks for, and with what the root carries already."""
        return self.asked.with_columns_of(root_schema.load_schema(self.layout)[1])

    @property
    def layout(self) -> Layout:
        return Layout(self.config.root, self.config.output)

    @property
    def editing(self) -> Rules:
        """How samples are edited."""
        write = self.config.write
        return Rules(write.image, write.other_pictures, write.gives_json, self.asked.boxes)

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


def load_pipeline(path: Path, sets: Sequence[str] = (), named: Sequence[str] = ()) -> Pipeline:
    """Reads a pipeline and checks all of it.

    Args:
        named: the options that name it on a command line.

    Raises:
        ConfigError: every problem at once.
        SchemaError: two stages have one column.
    """
    config = load_config(path, tuple(sets), kinds.sections())
    stages: dict[str, StageUse] = {}
    for name, section in config.stages.items():
        try:
            kind = find(name, section.python)
        except StageError as error:
            config.problems.add(("stages", name), "\n".join([error.what, error.fix]))
            continue
        options = check(kind.Options, section.options, ("stages", name), config.problems)
        run = run_of(config, name)
        if options is not None:
            try:
                with own_code(kind, name):
                    stage = kind(options)
                stages[name] = StageUse(stage, options, _on_gpus(stage, run, section), section)
            except BuilderError as error:
                config.problems.add(("stages", name), "\n".join([error.what, error.fix]))
    source = kinds.KINDS.get(config.dataset.kind)
    asked = None if source is None else source.from_options(config.dataset, config.problems)
    config.problems.raise_any()
    assert asked is not None, "an unknown kind is a problem of the pipeline"
    pipeline = Pipeline(config, stages, asked, tuple(named))
    with _in_file(config.path):
        _ = pipeline.own_columns
    return pipeline


def _on_gpus(stage: Stage, run: Run, section: StageTable) -> Run:
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
    return workset.narrow_to(list(pipeline.asked.find().paths), pipeline.layout.shard_names())


def hybrid_shards_of(pipeline: Pipeline) -> list[str]:
    """Of `shards_of` those of which hybrid shards are written: none where the source has no bytes."""
    return shards_of(pipeline) if pipeline.asked.has_bytes else []


def table_shards(pipeline: Pipeline) -> list[str]:
    """`shards_of`, of which there must be one at least."""
    shards = shards_of(pipeline)
    if not shards:
        root = pipeline.layout.root
        raise ConfigError("the table has no samples yet", where={"root": root}, fix="builder ingest, then this")
    return shards

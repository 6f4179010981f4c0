"""A pipeline file as the verbs see it: its stages with their options, SQL and parameters, and the place of its root."""

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
from builder.errors import BuilderError, ConfigError, SchemaError, StageError, TransientError
from builder.hybrid.edit import BOXES, Rules
from builder.sources import kinds
from builder.sources.base import Source
from builder.stages.contract import Stage, columns_of
from builder.stages.finding import find, own_code
from builder.store.layout import Layout
from builder.table import schema
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
    def layout(self) -> Layout:
        return Layout(self.config.root, self.config.output)

    @property
    def editing(self) -> Rules:
        """How samples are edited."""
        write, boxes = self.config.write, self.asked.boxes
        if boxes is None:
            boxes = BOXES
        return Rules(write.image, write.other_pictures, write.gives_json, boxes)

    @property
    def own_columns(self) -> tuple[Column, ...]:
        """Columns of ingest and of every stage of the pipeline."""
        return reduce(schema.merge, (columns_of(use.stage) for use in self.stages.values()), self.asked.columns)


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
            except TransientError:
                raise
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
    """One worker per GPU for a stage that uses GPUs, unless the stage's own section sets `workers`."""
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

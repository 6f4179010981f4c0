"""What a command found in a pipeline's source and root: each is read once and passed on."""

from __future__ import annotations

from functools import cached_property

from builder.engine import runs, workset
from builder.engine.runs import Outcome, PlannedRun
from builder.errors import ConfigError
from builder.progress import Talk
from builder.sources.base import Found, Source
from builder.stages.finding import with_built_in
from builder.table import partitions, root_schema, schema
from builder.table.partitions import State
from builder.table.schema import Column
from builder.verbs.pipeline import Pipeline


class Snapshot:
    """What a command found of a pipeline's source and root.

    The source is looked at once. Call `renew` after every commit: then the root is looked at again. Commits themselves
    read the disk, not this.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.layout = pipeline.layout
        self._states: dict[str, State | None] = {}
        self._healed: set[str] = set()

    def renew(self) -> None:
        """Forgets what was found in the root."""
        self._states.clear()
        self._healed.clear()
        for name in ("root_columns", "table_shards", "columns", "known_columns", "source"):
            self.__dict__.pop(name, None)

    def execute(self, planned: PlannedRun, talk: Talk) -> Outcome:
        """Executes a planned run, as `runs.execute`; what was found of the root before it is forgotten."""
        try:
            return runs.execute(planned, talk)
        finally:
            self.renew()

    # --- the source ---

    @cached_property
    def found(self) -> Found:
        """The shards that the pipeline names."""
        return self.pipeline.asked.find()

    @cached_property
    def source(self) -> Source:
        """The source with what the pipeline asks for, and with what the root carries already."""
        return self.pipeline.asked.with_columns_of(self.root_columns)

    # --- columns ---

    @cached_property
    def root_columns(self) -> tuple[Column, ...]:
        """The root's columns."""
        return root_schema.load_schema(self.layout)[1]

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The root's columns and those that the pipeline will add: until a stage runs, they are null."""
        return schema.merge(self.root_columns, self.pipeline.own_columns)

    @cached_property
    def known_columns(self) -> tuple[Column, ...]:
        """`columns`, and those of the stages that come with builder: questions and write SQL may name them all."""
        return with_built_in(self.columns)

    def add_columns(self, columns: tuple[Column, ...]) -> None:
        """Makes columns known to the root, if it lacks any of them.

        Raises:
            SchemaError: they do not fit the root's.
        """
        if schema.merge(self.root_columns, columns) != self.root_columns:
            root_schema.extend_schema(self.layout, columns)
            self.renew()

    # --- shards ---

    @cached_property
    def table_shards(self) -> list[str]:
        """The shards of the table."""
        return self.layout.shard_names()

    @property
    def shards(self) -> list[str]:
        """The shards that the pipeline names and the table has, in the pipeline's order."""
        return workset.narrow_to(list(self.found.paths), self.table_shards)

    @property
    def hybrid_shards(self) -> list[str]:
        """The shards that get hybrid shards: none if the source has no bytes."""
        return self.shards if self.pipeline.asked.has_hybrid_shards else []

    def some_shards(self) -> list[str]:
        """`shards`, at least one.

        Raises:
            ConfigError: the table is empty.
        """
        if not self.shards:
            root = self.layout.root
            raise ConfigError("the table has no samples yet", where={"root": root}, fix="builder ingest, then this")
        return self.shards

    def state(self, shard: str) -> State | None:
        """What a shard's partition was folded from; None if it has no partition."""
        if shard not in self._states:
            self._states[shard] = partitions.partition_state(self.layout, shard)
        return self._states[shard]

    def heal(self) -> None:
        """Folds the pipeline's partitions that are behind their column files."""
        late = [shard for shard in self.shards if shard not in self._healed]
        if not late:
            return
        is_same = False
        try:
            is_same = partitions.heal(self.layout, late, state=self.state) == 0
        finally:
            if not is_same:  # also after an error: some of them may have been folded before it
                self._states.clear()
        self._healed.update(late)

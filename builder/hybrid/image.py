"""The generated image in the table: the stage that owns it, its columns, its format, and how its run made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from builder.errors import ConfigError, ShardError
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table.pointers import pointers_of
from builder.table.schema import Column

POINTER = ("image_path", "image_offset", "image_size")
MADE = ("image_width", "image_height", "image_sha256", "image_seed", "image_model", "image_prompt", "prompt")


def image_stage(columns: Sequence[Column]) -> str | None:
    """The stage that owns the image pointer."""
    return next((stage for stage, names in pointers_of(columns).items() if "image_path" in names), None)


def says_format(columns: Sequence[Column]) -> bool:
    """Whether the table says in which format images are; a stage's own output of that name may be something else."""
    return any(column.name == "image_format" and column.type == pa.string() for column in columns)


class Provenance:
    """Stage, version and options hash of images, out of their runs; each run is read once."""

    def __init__(self, layout: Layout, stage: str | None) -> None:
        self._layout, self._stage = layout, stage
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, run: str | None) -> dict[str, Any]:
        if self._stage is None or run is None:
            return {}
        if run not in self._known:
            self._known[run] = self._read(run)
        return self._known[run]

    def _read(self, run: str) -> dict[str, Any]:
        path = RunFiles(self._layout, run).description
        try:
            data = files.read_object(path)
            return {"stage": data["stage"], "version": data["version"], "options": data["options_hash"]}
        except (FileNotFoundError, ShardError, KeyError) as error:
            state = "gone" if isinstance(error, FileNotFoundError) else "damaged"
            raise ConfigError(
                f"run '{run}' is {state}, which says how images were made",
                where={"file": path},
                fix=f"make them again: builder stage {self._stage} --redo",
            ) from None

"""The work of a stage: which rows a run tries, in which shards, with which SQL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builder.errors import ConfigError
from builder.stages.contract import Stage
from builder.table.lookups import Lookup
from builder.table.schema import Column
from builder.table.sql_text import Sql

ROW_KEYS = ("shard", "row", "uid")
#: Columns that a work set adds; an input of a stage cannot have one of these names.
WORK_COLUMNS = ("previous_run", "inputs", "source_changed")
#: Values of `Choice.retry`: all failed rows, or those with one class of error, which is a word.
_RETRY = re.compile(r"failed(:[A-Za-z]\w*)?")


@dataclass(frozen=True)
class Choice:
    """Which of the rows that the SQL covers a run tries: by default those without an answer or out of date.

    Attributes:
        retry: `failed` adds all failed rows; `failed:CLASS` tries only those with that class of error.
        redo: also rows with an answer.
        stale: rows whose inputs, stage version or options differ from those of their answer.
        where: a condition over `samples` that narrows any of these.
        next_draw: use another draw than that of the answer, for stages whose SQL uses $draw.
    """

    retry: str | None = None
    redo: bool = False
    stale: bool = False
    where: str | None = None
    next_draw: bool = False

    @property
    def retry_class(self) -> str | None:
        """The class of errors to retry; `failed` for all."""
        return None if self.retry is None else self.retry.removeprefix("failed:")

    def __post_init__(self) -> None:
        if self.retry is not None and not _RETRY.fullmatch(self.retry):
            kind = self.retry.rpartition(":")[2]
            is_class = re.fullmatch(r"[A-Za-z]\w+", kind) is not None and kind.lower().rstrip("ed") != "fail"
            raise ConfigError(
                f"--retry takes 'failed' or 'failed:CLASS', not '{self.retry}'",
                fix=f"for one class of error: --retry failed:{kind}"
                if is_class
                else "for all failed rows: --retry failed",
            )
        given = [f"--{name}" for name in ("retry", "redo", "stale") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} cannot be used together",
                fix="use one: --retry failed rows, --redo all rows, --stale rows whose inputs or options changed",
            )
        if self.next_draw and not self.redo:
            raise ConfigError(
                "--draw next is for rows with an answer", fix="--redo --draw next --where 'check_faces = 0'"
            )


@dataclass(frozen=True)
class Counts:
    """The rows that a stage's SQL covers, counted by state.

    Attributes:
        covered: rows that the SQL returns and whose source is ok.
        todo: covered rows that a run with this choice tries.
        ok: covered rows with an answer.
        failed: covered rows that failed.
        outside: rows with an answer that the SQL no longer covers.
        shards: shards with rows to try.
        out_of_date: rows among ok and failed whose own inputs changed since: see `builder.engine.outdated`.
    """

    covered: int = 0
    todo: int = 0
    ok: int = 0
    failed: int = 0
    outside: int = 0
    shards: int = 0
    out_of_date: int = 0


@dataclass(frozen=True)
class Work:
    """The work of one stage: its SQL, parameters and choice, in certain shards.

    Attributes:
        columns: the root's columns and the stage's own.
        signature: `stages.signature.options_hash`, a part of every row's inputs hash.
        image: the format of pictures asked for: that of the sample's own picture, or always `jpg`.
    """

    stage: Stage
    sql: Sql
    params: dict[str, Any]
    choice: Choice
    shards: Sequence[str]
    columns: Sequence[Column]
    signature: str
    image: Literal["source", "jpg"] = "source"

    @property
    def lookups(self) -> Mapping[str, Lookup]:
        """The files that the SQL may join."""
        return self.stage.lookups

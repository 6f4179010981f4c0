"""The executors there are, by the name that `[run] executor` gives them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from builder.executors.base import EXECUTOR, Executor
from builder.store.owners import Liveness


def _local() -> Executor:
    from builder.executors.local import LocalExecutor

    return LocalExecutor()


#: What makes each executor. A module is imported when its executor is used.
EXECUTORS: dict[str, Callable[[], Executor]] = {"local": _local}
#: Names that mean an executor of a later version.
LATER = ("slurm", "ray")


def executor_named(name: str) -> Executor:
    """The executor of that name.

    Raises:
        KeyError: this version has none.
    """
    return EXECUTORS[name]()


def own_executor() -> Executor:
    """The executor that started this process; `local` for a process that somebody started by hand."""
    return executor_named(os.environ.get(EXECUTOR, "local"))


def liveness_of(owner: dict[str, Any]) -> Liveness:
    """Whether the owner of a run, an attempt or a temp file lives; its own executor is asked.

    Raises:
        ValueError: the record names nobody.
    """
    name = owner.get("executor", "local")
    if name not in EXECUTORS:
        return Liveness.CANNOT_BE_ASKED
    return executor_named(name).liveness(owner)

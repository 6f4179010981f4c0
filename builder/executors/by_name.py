"""The executors, by their name in `[run] executor`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from builder.executors.base import EXECUTOR, Executor
from builder.store.owners import Liveness


def _local() -> Executor:
    from builder.executors.local import LocalExecutor

    return LocalExecutor()


#: Functions that make the executors. A module is imported when its executor is used.
EXECUTORS: dict[str, Callable[[], Executor]] = {"local": _local}
#: Names of executors that this version does not have yet.
LATER = ("slurm", "ray")


def executor_named(name: str) -> Executor:
    """The executor of that name.

    Raises:
        KeyError: this version has no such executor.
    """
    return EXECUTORS[name]()


def own_executor() -> Executor:
    """The executor that started this process; `local` if it was started by hand."""
    return executor_named(os.environ.get(EXECUTOR, "local"))


def liveness_of(owner: dict[str, Any]) -> Liveness:
    """Whether the owner of a run, an attempt or a temp file is alive; its own executor is asked.

    Raises:
        ValueError: the record does not name an owner.
    """
    name = owner.get("executor", "local")
    if name not in EXECUTORS:
        return Liveness.CANNOT_BE_ASKED
    return executor_named(name).liveness(owner)

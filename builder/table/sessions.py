"""DuckDB instances that can read the files of one view and nothing else.

Opening one takes about 20 ms of processor time, so the last few are kept: the next question over the same files and
columns, in the same command or notebook, takes one of them.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from builder.table import schema
from builder.table.lookups import Lookup, literal_path, look_up

#: Instances that are kept. A command asks over all shards or some, with the columns of its stages or of the root.
KEPT = 4


@dataclass(frozen=True)
class Session:
    """What an instance was opened for.

    Attributes:
        view: the statement that creates the view `samples`.
        paths: the files that may be read.
        one_thread: whether queries run on one thread, for answers that depend on the order of rows.
    """

    view: str
    paths: tuple[str, ...]
    one_thread: bool


@dataclass(frozen=True)
class Instance:
    """A DuckDB instance; questions are asked on cursors of its connection.

    Attributes:
        spill: the folder that DuckDB creates when it spills, and removes when the instance is closed.
    """

    connection: duckdb.DuckDBPyConnection
    spill: Path

    def close(self) -> None:
        self.connection.close()


class _Idle:
    """The instances that are kept, the one used longest ago first. Threads may ask at the same time."""

    def __init__(self) -> None:
        self._kept: dict[Session, Instance] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def pop(self, session: Session) -> Instance | None:
        with self._lock:
            return self._kept.pop(session, None)

    def push(self, session: Session, instance: Instance) -> list[Instance]:
        """Keeps an instance; returns those that are to be closed."""
        with self._lock:
            replaced = self._kept.pop(session, None)
            self._kept[session] = instance
            oldest = self._kept.pop(next(iter(self._kept))) if len(self._kept) > KEPT else None
        return [one for one in (replaced, oldest) if one is not None]

    def clear(self) -> list[Instance]:
        """Keeps none; returns those that are to be closed."""
        with self._lock:
            kept, self._kept = list(self._kept.values()), {}
        return kept


_idle = _Idle()


def taken(session: Session, lookups: Mapping[str, Lookup]) -> Instance:
    """An instance on which `samples` can be read.

    Args:
        lookups: files that are read into views of their own; an instance with lookups is always a new one.
    """
    kept = None if lookups else _idle.pop(session)
    return kept or _opened(session, lookups)


def given_back(session: Session, instance: Instance) -> None:
    """Keeps an instance without lookups for the next question.

    One that has spilled is closed: its folder may be deleted under it, by whatever cleans temporary files.
    """
    if instance.spill.exists():
        instance.close()
        return
    for one in _idle.push(session, instance):
        one.close()


def close_idle() -> None:
    """Closes the instances that are kept."""
    for one in _idle.clear():
        one.close()


def _after_fork() -> None:
    """Starts without instances: those that another thread gave back after `close_idle` lack their threads in the fork,
    and the lock may be held by a thread that the fork does not have.
    """
    global _idle
    _forgotten.append(_idle)  # closing them would wait for those threads
    _idle = _Idle()


_forgotten: list[_Idle] = []
os.register_at_fork(before=close_idle, after_in_child=_after_fork)


def _opened(session: Session, lookups: Mapping[str, Lookup]) -> Instance:
    instance = Instance(duckdb.connect(), _spill_folder())
    run = instance.connection.execute
    try:
        if session.one_thread:
            run("set threads = 1")
        run("set autoinstall_known_extensions = false")
        run("set autoload_known_extensions = false")
        run("set global timezone = 'UTC'")  # global: cursors have the machine's otherwise
        run("set global calendar = 'gregorian'")
        run("set preserve_insertion_order = true")  # so that LIMIT alone takes the same rows every time
        run(f"set temp_directory = {schema.literal(str(instance.spill))}")
        run(session.view)
        for name, lookup in lookups.items():
            look_up(instance.connection, name, lookup)
        allowed = dict.fromkeys([*session.paths, *map(literal_path, session.paths)])  # DuckDB checks both forms
        run(f"set allowed_paths = [{', '.join(schema.literal(path) for path in allowed)}]")
        run("set enable_external_access = false")
        run("set lock_configuration = true")
    except BaseException:
        instance.close()
        raise
    return instance


def _spill_folder() -> Path:
    """A path that no other instance or user has."""
    return Path(tempfile.gettempdir(), f"builder-spill-{os.getpid()}-{secrets.token_hex(4)}")

"""DuckDB instances that can read the files of one view and nothing else.

Opening one takes about 20 ms of processor time, so the last few are kept: the next question over the same files and
columns, in the same command or notebook, takes one of them.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

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


_idle: dict[Session, duckdb.DuckDBPyConnection] = {}


def taken(session: Session, lookups: Mapping[str, Lookup]) -> duckdb.DuckDBPyConnection:
    """An instance on which `samples` can be read; its questions are asked on cursors.

    Args:
        lookups: files that are read into views of their own; an instance with lookups is always a new one.
    """
    kept = None if lookups else _idle.pop(session, None)
    return kept or _opened(session, lookups)


def given_back(session: Session, instance: duckdb.DuckDBPyConnection) -> None:
    """Keeps an instance without lookups whose questions all ended well, and closes the one used longest ago."""
    if (other := _idle.pop(session, None)) is not None:
        other.close()
    _idle[session] = instance
    if len(_idle) > KEPT:
        _idle.pop(next(iter(_idle))).close()


def close_idle() -> None:
    """Closes the instances that are kept."""
    while _idle:
        _idle.popitem()[1].close()


os.register_at_fork(before=close_idle)  # a fork does not have their threads


def _opened(session: Session, lookups: Mapping[str, Lookup]) -> duckdb.DuckDBPyConnection:
    instance = duckdb.connect()
    run = instance.execute
    try:
        if session.one_thread:
            run("set threads = 1")
        run("set autoinstall_known_extensions = false")
        run("set autoload_known_extensions = false")
        run("set global timezone = 'UTC'")  # global: cursors have the machine's otherwise
        run("set global calendar = 'gregorian'")
        run("set preserve_insertion_order = true")  # so that LIMIT alone takes the same rows every time
        run(f"set temp_directory = {schema.literal(_spill_folder())}")
        run(session.view)
        for name, lookup in lookups.items():
            look_up(instance, name, lookup)
        allowed = dict.fromkeys([*session.paths, *map(literal_path, session.paths)])  # DuckDB checks both forms
        run(f"set allowed_paths = [{', '.join(schema.literal(path) for path in allowed)}]")
        run("set enable_external_access = false")
        run("set lock_configuration = true")
    except BaseException:
        instance.close()
        raise
    return instance


def _spill_folder() -> str:
    """A name that no other connection or user has; DuckDB creates the folder when it spills, and removes it."""
    return f"{tempfile.gettempdir()}/builder-spill-{os.getpid()}-{secrets.token_hex(4)}"

"""Globs: which paths of this machine a pattern matches.

Owns how a pattern becomes paths. Matches the same paths as Python's glob. That one, however, takes a folder that cannot
be listed for an empty one, so that one error of a disk or a file server would make its shards count as gone.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator

from builder import machine


def matching(pattern: str, *, recursive: bool = False) -> list[str]:
    """The paths that a pattern matches, sorted; broken links are included.

    Args:
        recursive: whether `**` matches folders at any depth.

    Raises:
        OSError: a disk or a file server does not list a folder.
    """
    return sorted(path for path in _matching(pattern, recursive) if path)


def _matching(pattern: str, recursive: bool) -> Iterator[str]:
    folder, name = os.path.split(pattern)
    if not glob.has_magic(pattern):
        if os.path.lexists(pattern) if name else os.path.isdir(folder):  # noqa: PTH112
            yield pattern
        return
    folders = _matching(folder, recursive) if glob.has_magic(folder) else iter([folder])
    for parent in folders:
        for match in _inside(parent, name, recursive):
            yield os.path.join(parent, match)  # noqa: PTH118 - as given


def _inside(folder: str, name: str, recursive: bool) -> Iterator[str]:
    """What the last part of a pattern matches in a folder."""
    if recursive and name == "**":
        if not folder or os.path.isdir(folder):  # noqa: PTH112
            yield ""
        yield from _below(folder)
    elif glob.has_magic(name):
        names = _names(folder)
        yield from fnmatch.filter(names if name[0] == "." else _not_hidden(names), name)
    elif os.path.lexists(os.path.join(folder, name)) if name else os.path.isdir(folder):  # noqa: PTH112, PTH118
        yield name


def _below(folder: str) -> Iterator[str]:
    for name in _not_hidden(_names(folder)):
        yield name
        inside = os.path.join(folder, name)  # noqa: PTH118
        if os.path.isdir(inside):  # noqa: PTH112
            yield from (os.path.join(name, path) for path in _below(inside))  # noqa: PTH118


def _not_hidden(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _names(folder: str) -> list[str]:
    """The names in a folder; none if it does not exist, is not a folder or may not be listed.

    Raises:
        OSError: a disk or a file server does not list it.
    """

    def listed() -> list[str]:
        with os.scandir(folder or os.curdir) as entries:
            return [entry.name for entry in entries]

    try:
        return machine.asked_again(listed)
    except OSError as error:
        if machine.is_of_the_machine(error):
            raise
    return []

"""Finds the tar shards of a pipeline: braces and globs, and messages about paths that are not shards."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from builder import machine
from builder.errors import ConfigError
from builder.sources.base import Found
from builder.store import globs
from builder.store.layout import local, shard_name

# --- which shards ---


def find_shards(patterns: Sequence[str]) -> Found:
    """Expands `~`, braces and globs, relative to the working directory.

    Raises:
        ConfigError: nothing matches, a pattern names files that are not on this machine, or two files would be one
            shard.
    """
    paths: dict[str, Path] = {}
    missing: dict[str, None] = {}
    folders = _Folders()
    for pattern in patterns:
        for name in expand_braces(_here(pattern)):
            matches, others = folders.matches(name)
            missing |= dict.fromkeys(others if matches or others else [name])
            for match in matches:
                _add(paths, Path(match))
    if not paths:
        raise ConfigError("no shard matches dataset.shards", where=_looked_at(patterns, missing), fix=_near(patterns))
    return Found(paths, [Path(name) for name in missing])


def _here(pattern: str) -> str:
    """A pattern with `~` expanded; raises ConfigError if it names files that are not on this machine."""
    if "::" in pattern and not os.path.lexists(pattern):
        parts = [part for part in pattern.split("::") if part]
        raise ConfigError(
            f"dataset.shards '{pattern}' contains '::', which does not join patterns here",
            fix=f"write a list: shards = {json.dumps(parts)}",
        )
    try:
        return local(pattern)
    except ConfigError as error:
        if os.path.lexists(pattern):
            return pattern
        raise ConfigError(f"dataset.shards: {error.what}", where=error.where, fix=error.fix) from None


class _Folders:
    """Which files exist. Each folder is listed once: checking 43,000 names one by one takes seconds."""

    def __init__(self) -> None:
        self._files: dict[str, set[str]] = {}

    def matches(self, name: str) -> tuple[list[str], list[str]]:
        """The file with exactly this name, or the files that match it as a glob, sorted; and matches that look like
        shards but are not files: broken links, folders whose names end in `.tar`."""
        if self._is_file(name):
            return [name], []
        if not glob.has_magic(name):
            return [], []
        matches = globs.matching(name, recursive=True)
        files = [match for match in matches if self._is_file(match)]
        others = [] if len(files) == len(matches) else [match for match in matches if not self._is_file(match)]
        return files, [match for match in others if match.endswith(".tar") or not os.path.isdir(match)]  # noqa: PTH112

    def _is_file(self, name: str) -> bool:
        folder, slash, base = name.rpartition("/")
        if folder + slash not in self._files:
            self._files[folder + slash] = _files_in(folder + slash or ".")
        return base in self._files[folder + slash]


def _files_in(folder: str) -> set[str]:
    """Names of files in a folder, including links to files; none if it may not be listed.

    Raises:
        OSError: a disk or a file server does not list it: a shard that is not seen would count as gone.
    """

    def listed() -> set[str]:
        names = set()
        with os.scandir(folder) as entries:
            for entry in entries:
                with _unless_of_the_machine():
                    if entry.is_file():
                        names.add(entry.name)
        return names

    with _unless_of_the_machine():
        return machine.asked_again(listed)
    return set()


@contextlib.contextmanager
def _unless_of_the_machine() -> Iterator[None]:
    """Ignores an OSError about the file or folder itself; raises those of the machine."""
    try:
        yield
    except OSError as error:
        if machine.is_of_the_machine(error):
            raise


def why_missing(path: Path) -> str:
    """Why a path of `Found.missing` is not a shard."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return "a broken link"
        return "matches nothing" if glob.has_magic(str(path)) else "does not exist"
    except OSError as error:
        return str(error.strerror)
    return f"a folder; did you mean {path}/*.tar?" if stat.S_ISDIR(mode) else "not a regular file"


def _add(paths: dict[str, Path], path: Path) -> None:
    shard = shard_name(path)
    other = paths.setdefault(shard, path)
    if other != path and other.resolve() != path.resolve():
        raise ConfigError(
            f"two shards are named '{shard}', and the table identifies shards by name",
            where={"one": other, "other": path},
            fix="rename one of them, or use another dataset.root for each folder",
        )


def _looked_at(patterns: Sequence[str], missing: Iterable[str]) -> dict[str, Any]:
    names = {name.rpartition("/")[0] or "." for pattern in patterns for name in expand_braces(_here(pattern))}
    folders = sorted(str(Path(name)) for name in names)
    return {
        "pattern": ", ".join(patterns),
        "folder": ", ".join(
            f"{name} ({'exists' if Path(name).is_dir() else 'does not exist'})" for name in folders[:3]
        ),
        "working directory": Path.cwd(),
        **{name: why_missing(Path(name)) for name in filter(os.path.lexists, itertools.islice(missing, 3))},
    }


def _near(patterns: Sequence[str]) -> str:
    first = Path(next(iter(expand_braces(_here(patterns[0])))) if patterns else ".")
    if patterns and first.is_dir():
        return f"'{patterns[0]}' is a folder; did you mean '{patterns[0].rstrip('/')}/*.tar'?"
    folder = first.parent
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if tars:
        return f"that folder has {len(tars)} tars, {tars[0].name} to {tars[-1].name}: set dataset.shards to fit them"
    return 'set dataset.shards to your tars, for example: --set dataset.shards="data/*.tar"'


def expand_braces(pattern: str) -> Iterator[str]:
    """Expands `{000..335}`, `{0..8..2}`, `{a..c}` and `{a,b}` like a shell and webdataset; numbers keep their zeros."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        choices = _choices(match[1])
        if choices is not None:
            for choice in choices:
                yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
            return
    yield pattern


def _choices(inner: str) -> Iterable[str] | None:
    """The text between two braces, expanded; None if a shell would not expand it."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.([1-9]\d*))?", inner)
    if numbers:
        texts = numbers[1], numbers[2]
        is_padded = any(len(text) > 1 and text[0] == "0" for text in texts)
        width = max(map(len, texts)) if is_padded else 0
        return (f"{i:0{width}d}" for i in _between(int(numbers[1]), int(numbers[2]), int(numbers[3] or 1)))
    letters = re.fullmatch(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])", inner)
    if letters:
        first, last = (text for text in letters.groups() if text)
        return map(chr, _between(ord(first), ord(last), 1))
    return inner.split(",") if "," in inner else None


def _between(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)

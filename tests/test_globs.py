"""Globs: as Python's, but that a folder which the machine does not list is an error and not an empty folder."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder import machine
from builder.sources.tars.finding import find_shards
from builder.store import globs
from conftest import Done, Sample, Workspace, ingest_here, metadata, picture

PATTERNS = (
    "*", "*.tar", "./*.tar", "*/*.tar", "a/*", "a/[ab]*", "a/?.tar", "[!a]/*.tar", ".*", ".h/*.tar", "*/none.tar",
    "*/a.tar", "**", "**/*.tar", "a/**/*.tar", "a/**/a.tar", "**/b/*", "none/*", "a.tar/*", "*/", "a/b/../*.tar",
    "link/*.tar", "x**/*.tar", "a/**",
)  # fmt: skip


def made(folder: Path) -> None:
    for name in ("a.tar", "b.txt", "a/a.tar", "a/b.tar", "a/b/a.tar", "a/b/c/d.tar", ".h/a.tar", "a/.h.tar", "x/y.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "link").symlink_to("a")
    (folder / "x/gone.tar").symlink_to("nothing")
    (folder / "x/folder.tar").mkdir()


@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_pattern_matches_what_it_matches_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, recursive: bool, is_absolute: bool
) -> None:
    made(tmp_path)
    monkeypatch.chdir(tmp_path)
    whole = f"{tmp_path}/{pattern}" if is_absolute else pattern
    assert globs.matching(whole, recursive=recursive) == sorted(glob.glob(whole, recursive=recursive))  # noqa: PTH207


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("pattern", ["a/*.tar", "[a]/*.tar", "**/[bd].tar"])
def test_a_folder_that_the_machine_does_not_list_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, pattern: str
) -> None:
    made(tmp_path)
    monkeypatch.setattr(machine, "PAUSE_S", 0.001)
    monkeypatch.chdir(tmp_path)
    expected = find_shards([pattern])
    real, asked = os.scandir, list[str]()

    def scandir(folder: Any = ".") -> Any:
        if os.path.abspath(folder) == str(tmp_path / "a"):  # noqa: PTH100
            asked.append(str(folder))
            if len(asked) in failing:
                raise OSError(number, os.strerror(number), str(folder))
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        if number != errno.EMFILE:
            for nth in (1, 2, 3):
                asked.clear()
                failing = {nth}
                assert find_shards([pattern]) == expected
        for first in (1, 2):
            asked.clear()
            failing = set(range(first, 100))
            if first == 1 or len(asked) > 1:
                with pytest.raises(OSError, match=os.strerror(number)):
                    find_shards([pattern])


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "EIO"])
def test_a_lookup_leaves_out_no_file_that_its_pattern_matches(
    workspace: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Its rows would be answered as if nobody had published their boxes."""
    keys = [f"{i:032x}" for i in range(2)]
    made = workspace({"00000000": [Sample(key, image=picture(i)) for i, key in enumerate(keys)]}, stages="""
[stages.faces]
source = "metadata"
metadata = "boxes/*.parquet"
""")  # fmt: skip
    os.chdir(made.folder)
    (made.folder / "boxes").mkdir()
    metadata(made.folder / "boxes/a.parquet", {keys[0]: [[0.1, 0.1, 0.5, 0.9]]})
    other = metadata(made.folder / "boxes/b.parquet", {keys[1]: [[0.1, 0.1, 0.5, 0.9]]})
    ingest_here(made.load())
    if what == "EIO":
        real = os.scandir

        def scandir(folder: Any = ".") -> Any:
            if str(folder).endswith("boxes"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
            return real(folder)

        monkeypatch.setattr(os, "scandir", scandir)
    else:
        other.rename(made.folder / "away")
        make: dict[str, Callable[[], None]] = {
            "link": lambda: other.symlink_to("nothing"), "folder": other.mkdir, "pipe": lambda: os.mkfifo(other),
        }  # fmt: skip
        make[what]()
    done = ask(made, "stage", "faces")
    assert done.code == (1 if what == "EIO" else 2), done.talk
    assert ("the disk has an input/output error" if what == "EIO" else "boxes/b.parquet") in "\n".join(done.talk)

"""Roots that other versions of builder made, unpacked for a test. `tests/make_root.py` makes them."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from conftest import Workspace
from make_root import folder_of_length

ROOTS = Path(__file__).parent / "roots"


def unpacked(version: str, parent: Path) -> Workspace:
    """The root of a version with its source and its pipeline, as if it had been made there.

    Absolute paths that the root records are replaced by others of the same length, so that footers stay whole.
    """
    folder = folder_of_length(parent)
    with tarfile.open(ROOTS / f"{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    before = (folder / "made_in").read_bytes()
    for path in folder.rglob("*"):
        if path.is_file() and before in (content := path.read_bytes()):
            times = path.stat()
            path.write_bytes(content.replace(before, str(folder).encode()))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return Workspace(folder, folder / "pipeline.toml")

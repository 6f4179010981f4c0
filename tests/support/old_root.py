"""Roots that other versions of builder made, unpacked for a test. `tests/support/make_root.py` makes them."""

from __future__ import annotations

import base64
import os
import tarfile
from pathlib import Path

import pyarrow.parquet as pq

from conftest import Workspace
from support.make_root import folder_of_length

ROOTS = Path(__file__).parents[1] / "roots"


def unpacked(version: str, parent: Path) -> Workspace:
    """The root of a version with its source and its pipeline, as if it had been made there.

    Absolute paths that the root records are replaced by others of the same length, so that footers stay whole.
    """
    folder = folder_of_length(parent)
    with tarfile.open(ROOTS / f"{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    before, after = (folder / "made_in").read_bytes(), str(folder).encode()
    for path in folder.rglob("*"):
        if path.is_file():
            times = path.stat()
            content = path.read_bytes().replace(before, after)
            if path.suffix == ".parquet":
                content = _arrow_schema_replaced(path, content, before, after)
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return Workspace(folder, folder / "pipeline.toml")


def _arrow_schema_replaced(path: Path, content: bytes, before: bytes, after: bytes) -> bytes:
    """A parquet file's bytes with the path replaced in its Arrow schema, too, which pyarrow keeps as base64."""
    encoded = pq.read_metadata(path).metadata[b"ARROW:schema"]
    return content.replace(encoded, base64.b64encode(base64.b64decode(encoded).replace(before, after)))

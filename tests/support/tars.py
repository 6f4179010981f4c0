"""Tars made header by header, and what others read in them."""

from __future__ import annotations

import mmap
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import webdataset

from builder.sources.tars.shards import TarShards, read_shard
from builder.tar import chain, walk
from builder.tar.index import Index

BLOCK = 512
END = bytes(2 * BLOCK)


# --- records ---


def header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", *, magic: bytes = b"ustar\x0000") -> bytes:
    """A header block written field by field."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    head = bytearray(
        name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind
        + bytes(100) + magic.ljust(8, b"\0")
    )  # fmt: skip
    head += bytes(BLOCK - len(head))
    return checksummed(head)


def checksummed(head: bytes | bytearray) -> bytes:
    """A header block with the right checksum."""
    block = bytearray(head)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def record(name: bytes, data: bytes = b"", kind: bytes = b"0", **options: Any) -> bytes:
    return header(name, len(data), kind, **options) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return record(b"PaxHeader", b"".join(records), kind)


def pax_record(key: bytes, value: bytes) -> bytes:
    """`<length> <key>=<value>\\n`, the length counting its own digits."""
    length = len(key) + len(value) + 3
    while len(b"%d %s=%s\n" % (length, key, value)) != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def written(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


# --- what is read in them ---

Listed = list[tuple[str, int, int, int, str]]
Samples = list[tuple[str, dict[str, bytes]]]


def listed(index: Index) -> Listed:
    """Name, header, data, size and type of every member."""
    columns = (index.header, index.data, index.size, index.kind)
    rows = zip(index.names, *(column.tolist() for column in columns), strict=True)
    return [(name, head, data, size, chr(kind)) for name, head, data, size, kind in rows]


def listed_by_tarfile(path: Path) -> Listed:
    """The same by Python's tarfile, whose offsets of a record begin at its prefixes too."""
    with tarfile.open(path) as archive:
        return [(i.name, i.offset, i.offset_data, i.size, i.type.decode()) for i in archive]


def both_ways(path: Path) -> tuple[Index | None, Index]:
    """The index by the fast path (None where it gives up) and by the general walk."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return chain.chain_of(view), walk.walk(view)


def gnu_tar(*arguments: str | Path, folder: Path) -> list[str]:
    """Lines that GNU tar prints; it must have nothing to say on stderr."""
    done = subprocess.run(["tar", *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def by_webdataset(path: Path) -> Samples:
    """Key and members of every sample as webdataset yields them; what its reader raises is raised."""
    found = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    return [
        (one["__key__"], {name: data for name, data in one.items() if not name.startswith("__")}) for one in found
    ]  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The table's rows of one shard."""
    rows: list[dict[str, Any]] = read_shard(path, "s", TarShards({}), "run").table.to_pylist()
    return rows


def by_builder(path: Path) -> Samples:
    """Key and members of every row of the table: bytes at the offsets that it has."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [
            (row["key"], {m["ext"].lower(): content[m["data"] : m["data"] + m["size"]] for m in row["source_members"]})
            for row in rows_of(path)
        ]

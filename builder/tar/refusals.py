"""Error messages for files that are not tars: compressed, json, a git-lfs pointer, a web page."""

from __future__ import annotations

import json
import mmap
import shlex
from pathlib import Path

from builder.errors import ShardError
from builder.tar.blocks import BLOCK, MAX_PREFIX, OCTAL, is_header

#: First bytes of compressed files: what wrote them, what reads them, their suffix.
_MAGIC = {
    b"\x1f\x8b": ("gzip", "gunzip", ".gz"),
    b"BZh": ("bzip2", "bunzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", "unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd", ".zst"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4", ".lz4"),
}


_NO_SHARD = "take it out of dataset.shards: name only the tars, for example FOLDER/*.tar"
_NO_DOWNLOAD = "a server sent it instead of the shard: download the shard again, logged in if the server needs it"
#: First bytes of other files found among shards, ignoring case: what they are, and the fix.
_OTHERS = (
    (b"version https://git-lfs.github.com/spec/", ("it is a git-lfs pointer, not the file", "git lfs pull")),
    (b"version https://hawser.github.com/spec/", ("it is a git-lfs pointer, not the file", "git lfs pull")),
    (b"<!doctype html", ("it is an HTML page", _NO_DOWNLOAD)),
    (b"<html", ("it is an HTML page", _NO_DOWNLOAD)),
    (b"<?xml", ("it is XML", _NO_DOWNLOAD)),
    (b"<error", ("it is XML", _NO_DOWNLOAD)),
    (b"PAR1", ("it is a parquet file", _NO_SHARD)),
    (b"PK\3\4", ("it is a zip archive", _NO_SHARD)),
    (b"\xff\xd8\xff", ("it is a JPEG picture", _NO_SHARD)),
    (b"\x89PNG", ("it is a PNG picture", _NO_SHARD)),
    (b"\x93NUMPY", ("it is a NumPy array", _NO_SHARD)),
)  # fmt: skip


def refuse_compressed(view: mmap.mmap, path: Path) -> None:
    """Raises ShardError for a compressed file, but not for a tar whose first name begins with the same bytes."""
    head = view[:BLOCK]
    for magic, (name, tool, suffix) in _MAGIC.items():
        if head.startswith(magic) and not is_header(head):
            plain = path.with_suffix("") if path.name.endswith(f".tar{suffix}") else path.with_suffix(".tar")
            packed = path if path != plain else path.with_name(path.name + suffix)
            rename = f"mv {shlex.quote(str(path))} {shlex.quote(str(packed))} && " if packed != path else ""
            raise ShardError(
                f"the shard is compressed with {name}: byte offsets into it would mean nothing",
                where={"file": path},
                fix=f"{rename}{tool} < {shlex.quote(str(packed))} > {shlex.quote(str(plain))}, "
                "and name that file in dataset.shards",
            )


def refuse_other(view: mmap.mmap, path: Path) -> None:
    """Raises ShardError for a file that does not begin with a tar header; the message says what it is, if known.

    A file shorter than a header is not refused here: it may be a tar that was cut.
    """
    head = view[:BLOCK]
    if is_header(head) or not head.strip(b"\0"):
        return
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    known = next((words for magic, words in _OTHERS if text.startswith(magic.lower())), None)
    if known is None and text[:1] in (b"{", b"[") and _is_json(view):
        known = ("it is json", _NO_SHARD)
    if known is None and (len(head) < BLOCK or _looks_like_a_header(head)):
        return  # cut or damaged: the walk says where
    what, fix = known or (
        "it does not begin with a tar header",
        "the file is damaged or not a tar: take it out of dataset.shards, or download or make it again",
    )
    raise ShardError(f"the shard is not a tar: {what}", where={"file": path, "bytes": len(view)}, fix=fix)


def _is_json(view: mmap.mmap) -> bool:
    """Whether a file is json; only the beginning of a large file is looked at."""
    if len(view) > MAX_PREFIX:
        return b"\0" not in view[:MAX_PREFIX]
    try:
        json.loads(view[:])
    except (ValueError, RecursionError):
        return False
    return True


def _looks_like_a_header(head: bytes) -> bool:
    """Whether a block has the fields of a header in the right places; the checksum may be wrong."""
    fields = [OCTAL.fullmatch(head[at : at + 8]) for at in (100, 108, 116, 148)]
    return head[257:262] == b"ustar" or all(field and field[1] for field in fields)

"""Tar files as 512-byte blocks: index every member, split names, make records.

Owns what POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU tar say about headers. Knows nothing of samples' meaning.
A record is a member's prefixes (pax and GNU headers), its header and its padded data: it is copied or dropped whole.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np

from builder.errors import ShardError
from builder.progress import plain
from builder.store import files

BLOCK = 512
#: GNU tar and tarfile fill an archive up to a multiple of 20 blocks.
RECORD = 20 * BLOCK
#: File types by their header byte: POSIX.1-1988, GNU tar manual "Basic Tar Format".
REGULAR = frozenset(b"0\x007")
KINDS = {
    ord("1"): "a hard link", ord("2"): "a symbolic link", ord("3"): "a character device", ord("4"): "a block device",
    ord("5"): "a directory", ord("6"): "a FIFO", ord("S"): "a sparse file",
}  # fmt: skip
#: pax records that change neither name nor size nor content of a member. Source: POSIX.1-2001 pax, "Extended Header".
_TRANSPARENT = re.compile(rb"([1-9]\d{0,6}) (?:mtime|atime|ctime|uid|gid|uname|gname)=[^\n]*\n")
#: A pax or GNU header body longer than this is refused instead of read into memory.
MAX_PREFIX = 1 << 20
#: pax records that say something about a member's place or name; GNU's about sparse files beside them.
_TELLING = (b"path", b"size", b"GNU.sparse.name")
_SPARSE = b"GNU.sparse."
#: Characters of a name that a message shows: a pax header may hold a megabyte of them.
_NAME_SHOWN = 200
#: The largest size that an octal field of a header holds, 8 GiB less one byte; beyond it stands in a pax record.
_MAX_OCTAL = 0o77777777777
#: The bytes from 345 on of a header that has neither a prefix nor extensions.
_NO_PREFIX = bytes(BLOCK - 345)
#: Kinds without content, whatever size their header declares. Source: Python's tarfile and libarchive.
_NO_CONTENT = frozenset(b"123456")
#: Headers that are looked at together: their 2 MB stay in a core's cache.
_HEADS_A_STEP = 4096
#: So many times pax headers of one length are compared with one of them; what is left then is read one by one.
_KINDS_OF_BODIES = 8
_OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)
#: A name of a sample's member. Source: webdataset.tariterators.base_plus_ext.
_WEBDATASET = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
#: First bytes of compressed files: what wrote them, what reads them, their suffix.
_MAGIC = {
    b"\x1f\x8b": ("gzip", "gunzip", ".gz"),
    b"BZh": ("bzip2", "bunzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", "unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd", ".zst"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4", ".lz4"),
}


_NO_SHARD = "take it out of dataset.shards: name the tars alone, for example FOLDER/*.tar"
_NO_DOWNLOAD = "a server sent it in place of the shard: download the shard again, with the rights that it takes"
#: First bytes of other files that lie among shards, without case: what they are, and what helps.
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


@dataclass(frozen=True)
class Index:
    """Every member of one tar, in order; all arrays have one entry a member.

    Attributes:
        names: as the archive gives them, `./` and folders kept.
        header: int64, first byte of the record, prefixes included.
        data: int64, first byte of the content.
        size: int64, bytes of content in the archive.
        kind: uint8, the header's type byte.
        end: first byte after the last record; from here on the archive holds zeros only.
        bad_names: members whose name is not UTF-8, in `names` with backslash escapes.
    """

    names: list[str]
    header: np.ndarray
    data: np.ndarray
    size: np.ndarray
    kind: np.ndarray
    end: int
    file_size: int
    bad_names: frozenset[int] = field(default_factory=frozenset)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def stop(self) -> np.ndarray:
        """int64, first byte after each record, padding included."""
        return np.asarray(self.data + padded(self.size))

    @property
    def has_end_mark(self) -> bool:
        """Whether zeros close the archive, as they should: a tar cut between two records has none."""
        return self.file_size - self.end >= BLOCK


def padded(size: np.ndarray) -> np.ndarray:
    """Sizes rounded up to whole blocks."""
    blocks: np.ndarray = (size + (BLOCK - 1)) // BLOCK
    return blocks * BLOCK


def padding(size: int) -> int:
    """Zero bytes that follow `size` bytes of content."""
    return -size % BLOCK


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and extension: up to the first dot of its base name, folder and `./` kept.

    Exactly webdataset's rule, which gives `a/.b` the key `a/` unless that folder's own name has a dot, and sees no
    folder in front of a newline.

    Returns None for a name that belongs to no sample: no dot, nothing before it, or webdataset's `__meta__` names.
    """
    if "\n" in name and not _WEBDATASET.match(name):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or (name.startswith("__") and re.match(r"__[^/]*__($|/)", name)):
        return None
    if not stem and (not slash or "." in folder.rpartition("/")[2]):
        return None
    return folder + slash + stem, extension


def belongs(name: str) -> tuple[str, str] | None:
    """A member's key and extension, as `split_name` has them; None also for what macOS puts beside files.

    Readers that take such members for samples find no picture in them; they would part the samples that they lie in.
    """
    return None if is_of_macos(name) else split_name(name)


def is_of_macos(name: str) -> bool:
    """Whether a member is what macOS puts beside files: `._NAME` (AppleDouble), `.DS_Store`, all of `__MACOSX/`."""
    *folders, base = name.split("/")
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folders


def index(path: Path) -> Index:
    """Reads every header of a tar, checksums verified; reads the whole file once.

    Raises:
        ShardError: empty, compressed, truncated, a damaged header, data after the end; with the byte offset.
    """
    with mapped(path) as view:
        return index_of(view, path)


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """A tar's bytes in memory as the system pages them in.

    Raises:
        ShardError: it is empty.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ShardError("the shard is empty (0 bytes)", where={"file": path}, fix="download or make it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            _page_in(view, file.fileno())
            yield view


#: Source: Linux's mman.h, from 5.14 on.
_MADV_POPULATE_READ = getattr(mmap, "MADV_POPULATE_READ", 22)
#: Bytes that are paged in, or read, at a time.
_PAGED_IN = 16 << 20


def _page_in(view: mmap.mmap, descriptor: int) -> None:
    """Has every page of a mapping read: the process would be killed with one that the disk does not give.

    Raises:
        ReadError: the disk does not give one.
        ShardError: the file was cut meanwhile.
    """
    size = len(view)
    for start in range(0, size, _PAGED_IN):
        step = min(_PAGED_IN, size - start)
        try:
            view.madvise(_MADV_POPULATE_READ, start, step)
        except OSError as error:
            if error.errno not in (errno.EFAULT, errno.EIO):
                return  # a system that does not know it, or has no memory for it: pages come as they are touched
            files.read_at(descriptor, start, step)  # says which byte it is


def index_of(view: mmap.mmap, path: Path) -> Index:
    """`index` of a tar that is mapped already."""
    _refuse_compressed(view, path)
    _refuse_other(view, path)
    try:
        quick = _chain(view)
        return _walk(view) if quick is None else quick
    except ShardError as error:
        error.where = {"file": path, **error.where}
        raise


def _refuse_compressed(view: mmap.mmap, path: Path) -> None:
    """Raises ShardError for a compressed file; a tar whose first member is named like one is none."""
    head = view[:BLOCK]
    for magic, (name, tool, suffix) in _MAGIC.items():
        if head.startswith(magic) and not _is_header(head):
            plain = path.with_suffix("") if path.name.endswith(f".tar{suffix}") else path.with_suffix(".tar")
            packed = path if path != plain else path.with_name(path.name + suffix)
            rename = f"mv {shlex.quote(str(path))} {shlex.quote(str(packed))} && " if packed != path else ""
            raise ShardError(
                f"the shard is compressed with {name}: byte offsets into it would mean nothing",
                where={"file": path},
                fix=f"{rename}{tool} < {shlex.quote(str(packed))} > {shlex.quote(str(plain))}, "
                "and name that file in dataset.shards",
            )


def _refuse_other(view: mmap.mmap, path: Path) -> None:
    """Raises ShardError for a file that does not begin as a tar does, and says what it is where that can be seen.

    A file of fewer bytes than a header may be a tar that was cut there.
    """
    head = view[:BLOCK]
    if _is_header(head) or not head.strip(b"\0"):
        return
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found = next((told for magic, told in _OTHERS if text.startswith(magic.lower())), None)
    if found is None and text[:1] in (b"{", b"[") and _is_json(view):
        found = ("it is json", _NO_SHARD)
    if found is None and (len(head) < BLOCK or _looks_like_a_header(head)):
        return  # cut or damaged: the walk says where
    what, fix = found or (
        "it begins with no tar header",
        "the file is damaged or no tar: take it out of dataset.shards, or download or make it again",
    )
    raise ShardError(f"the shard is no tar: {what}", where={"file": path, "bytes": len(view)}, fix=fix)


def _is_json(view: mmap.mmap) -> bool:
    """Whether a file is json; of a large one only its beginning is looked at."""
    if len(view) > MAX_PREFIX:
        return b"\0" not in view[:MAX_PREFIX]
    try:
        json.loads(view[:])
    except (ValueError, RecursionError):
        return False
    return True


def _looks_like_a_header(head: bytes) -> bool:
    """Whether a block has a header's fields where they belong, whatever its checksum."""
    fields = [_OCTAL.fullmatch(head[at : at + 8]) for at in (100, 108, 116, 148)]
    return head[257:262] == b"ustar" or all(field and field[1] for field in fields)


# --- the fast path: uniform ustar headers, pax prefixes that change nothing ---


def _chain(view: mmap.mmap) -> Index | None:
    """Indexes a tar whose headers link up without a walk, or returns None where only the walk can tell.

    Blocks that say 'ustar' at offset 257 are candidates; they are accepted only if the size in each leads exactly to
    the next one and the last leads to zeros: a tar inside an image breaks the chain.
    """
    count = len(view) // BLOCK
    if count == 0:
        return None
    blocks = np.frombuffer(view, dtype=np.uint8, count=count * BLOCK).reshape(count, BLOCK)
    magic = np.ndarray((count,), np.uint32, buffer=view, offset=257, strides=(BLOCK,))  # 'usta': one compare a block
    try:
        return _linked(view, blocks, np.flatnonzero(magic == np.frombuffer(b"usta", np.uint32)[0]))
    finally:
        del blocks, magic


def _linked(view: mmap.mmap, blocks: np.ndarray, found: np.ndarray) -> Index | None:
    if len(found) == 0 or found[0] != 0:
        return None
    steps = [_fields(blocks[found[start : start + _HEADS_A_STEP]]) for start in range(0, len(found), _HEADS_A_STEP)]
    fields = [step for step in steps if step is not None]
    if len(fields) < len(steps):
        return None
    sizes, kinds = (np.concatenate([step[i] for step in fields]) for i in (0, 1))
    following = found + 1 + (sizes + BLOCK - 1) // BLOCK
    end = int(following[-1])
    if (following[:-1] != found[1:]).any() or end > len(blocks) or _first_data(view, end * BLOCK) is not None:
        return None
    prefix = kinds == ord("x")
    if prefix[-1] or (prefix[1:] & prefix[:-1]).any() or not _all_transparent(blocks, found[prefix], sizes[prefix]):
        return None
    names = b"".join([step[2] for step in fields])
    return _members(names, found * BLOCK, sizes, kinds, prefix, end * BLOCK, len(view))


def _fields(heads: np.ndarray) -> tuple[np.ndarray, np.ndarray, bytes] | None:
    """Sizes and kinds of ustar headers, and the names of those of members, each with a line end; None where only the
    walk can read one."""
    sizes, sums = _octal(heads[:, 124:136]), _octal(heads[:, 148:156])
    kinds = heads[:, 156].copy()
    if sizes is None or sums is None or not np.isin(kinds, (ord("0"), 0, ord("x"))).all() or heads[:, 345:].any():
        return None
    if (_checksums(heads) != sums).any():
        return None
    names = heads[:, :100][kinds != ord("x")].view("S100").ravel().tolist()
    return sizes, kinds, b"\n".join([*names, b""])


def _members(
    lines: bytes,
    offsets: np.ndarray,
    sizes: np.ndarray,
    kinds: np.ndarray,
    prefix: np.ndarray,
    end: int,
    file_size: int,
) -> Index | None:
    member = ~prefix
    if lines[:1] == b"\n" or b"\n\n" in lines or b"/\n" in lines or b"\0" in lines:
        return None
    if lines.count(b"\n") != np.count_nonzero(member):
        return None
    try:
        names = lines.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError:
        return None
    header = offsets[member].astype(np.int64)
    behind_prefix = np.concatenate(([False], prefix[:-1]))[member]
    header[behind_prefix] = offsets[prefix]
    return Index(
        names=names,
        header=header,
        data=offsets[member].astype(np.int64) + BLOCK,
        size=sizes[member].astype(np.int64),
        kind=kinds[member].copy(),
        end=end,
        file_size=file_size,
    )


def _all_transparent(blocks: np.ndarray, found: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether the pax headers at these blocks hold only records that change nothing.

    Bodies that differ from one that was read in their digits alone are as transparent as that one.
    """
    for length in np.unique(lengths).tolist():
        if not 0 < length <= BLOCK:
            return False
        bodies = blocks[found[lengths == length] + 1, :length]
        for _ in range(_KINDS_OF_BODIES):
            if len(bodies) == 0:
                break
            first = bodies[0]
            if not _is_transparent(first.tobytes()):
                return False
            may_differ = _is_digit(first) & ~_record_lengths(first)
            bodies = bodies[~((bodies == first) | (_is_digit(bodies) & may_differ)).all(axis=1)]
        if not all(_is_transparent(body.tobytes()) for body in bodies):
            return False
    return True


def _is_digit(text: np.ndarray) -> np.ndarray:
    return np.asarray((text - np.uint8(ord("0"))) < 10)


def _record_lengths(body: np.ndarray) -> np.ndarray:
    """Which bytes of a transparent pax header say how long its records are."""
    counted = np.zeros(len(body), bool)
    for record in _TRANSPARENT.finditer(body.tobytes()):
        counted[record.start(1) : record.end(1)] = True
    return counted


@lru_cache(maxsize=1024)
def _is_transparent(body: bytes) -> bool:
    """Whether a pax header holds only records that change nothing, each as long as it says."""
    at = 0
    while (one := _TRANSPARENT.match(body, at)) is not None and int(one[1]) == one.end() - at:
        at = one.end()
    return 0 < at == len(body)


def _octal(text: np.ndarray) -> np.ndarray | None:
    """Octal numbers out of uint8 (n, w): spaces, digits, then spaces or NULs; None if one is written otherwise."""
    digits = text - np.uint8(ord("0"))
    by_column = np.ascontiguousarray(digits.T)
    width = text.shape[1]
    while width and (by_column[width - 1] >= 8).all():  # the columns that end every number
        width -= 1
    ending = text[:, width:]
    if width == 0 or (by_column[:width] >= 8).any() or not ((ending == 0) | (ending == ord(" "))).all():
        return _padded_octal(text, digits)
    value = np.zeros(len(text), np.int64)
    for column in by_column[:width]:
        value = value * 8 + column
    return value


def _padded_octal(text: np.ndarray, digits: np.ndarray) -> np.ndarray | None:
    """The same where numbers have different widths."""
    is_digit = digits < 8
    fill = (text == 32) | (text == 0)
    if not (is_digit | fill).all() or not is_digit.any(axis=1).all():
        return None
    value = np.zeros(len(text), np.int64)
    ended = np.zeros(len(text), bool)
    started = np.zeros(len(text), bool)
    for column in range(text.shape[1]):
        now = is_digit[:, column]
        if (now & ended).any():
            return None
        started |= now
        ended |= (started & ~now) | (text[:, column] == 0)
        value = np.where(now, value * 8 + digits[:, column], value)
    return value


def _checksums(heads: np.ndarray) -> np.ndarray:
    """Unsigned checksums of headers whose bytes from 345 on are zero, the checksum field counted as spaces.

    Source: POSIX.1-1988. At most 257 bytes are added at a time, which 16 bits hold.
    """
    parts = (heads[:, :148], heads[:, 156:345])
    total = sum(part.sum(axis=1, dtype=np.uint16).astype(np.int64) for part in parts)
    return np.asarray(total + 8 * ord(" "))


def _first_data(view: mmap.mmap, start: int) -> int | None:
    """The first byte at or after `start` that is not zero."""
    step = 1 << 20
    for at in range(start, len(view), step):
        chunk = view[at : at + step]
        if chunk.count(0) != len(chunk):
            return at + len(chunk) - len(chunk.lstrip(b"\0"))
    return None


# --- the general path: any header that POSIX or GNU tar writes ---


@dataclass
class _Pending:
    """What the prefixes in front of a header say about it."""

    start: int | None = None
    name: bytes | None = None
    pax: dict[bytes, bytes] = field(default_factory=dict)

    def add(self, pax: dict[bytes, bytes], name: bytes | None = None) -> None:
        """Adds what one header says; where two say the same, some readers believe the first and some the last.

        Raises:
            ShardError: two headers tell a name, a size or a sparse file.
        """
        names = [self.name, name, self.pax.get(b"path"), pax.get(b"path")]
        if self.pax.keys() & pax.keys() or sum(one is not None for one in names) > 1:
            raise ShardError(
                "two headers describe one member: readers disagree on which counts",
                where={"offset": self.start},
                fix="make the shard again",
            )
        self.pax.update(pax)
        self.name = self.name if name is None else name


def _walk(view: mmap.mmap, at: int = 0) -> Index:
    """Indexes the records from byte `at`, which begins one, header by header."""
    names: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    bad: set[int] = set()
    common: dict[bytes, bytes] = {}
    pending = _Pending()
    while at + BLOCK <= len(view):
        block = view[at : at + BLOCK]
        if block.count(0) == BLOCK:
            break
        size, kind = _checked(block, at)
        start = at if pending.start is None else pending.start
        at += BLOCK
        if kind in b"xXgLK":
            body = _prefix_body(view, at, size)
            if kind == ord("g"):
                common.update(_telling(body, at - BLOCK))
                _refuse_common(common, at - BLOCK)
                at += size + padding(size)
                continue
            pending.start = start
            if kind == ord("L"):
                pending.add({}, body.split(b"\0")[0])
            elif kind != ord("K"):
                pending.add(_telling(body, at - BLOCK))
            at += size + padding(size)
            continue
        pax = {**common, **pending.pax}
        name = _name(pax, pending.name, block)
        if b"size" in pax:
            size = _pax_size(pax[b"size"], start)
        if kind in _NO_CONTENT:
            size = 0
        if kind == ord("S"):
            at = _skip_sparse_maps(view, block, at)
        if _SPARSE in pax:
            kind = ord("S")
        if kind in b"0\x00" and name.endswith(b"/"):
            kind = ord("5")
        if at + size > len(view):
            raise ShardError(
                f"the shard is truncated: member '{_shown(name)}' ends at byte {at + size}, the file at {len(view)}",
                where={"offset": start},
                fix="download or make it again",
            )
        if not _is_utf8(name):
            bad.add(len(names))
        names.append(_text(name))
        rows.append((start, at, size, kind))
        at += size + padding(size)
        pending = _Pending()
    _check_end(view, at, pending)
    table = np.array(rows, np.int64).reshape(-1, 4)
    return Index(
        names=names,
        header=table[:, 0].copy(),
        data=table[:, 1].copy(),
        size=table[:, 2].copy(),
        kind=table[:, 3].astype(np.uint8),
        end=min(at, len(view)),
        file_size=len(view),
        bad_names=frozenset(bad),
    )


def _check_end(view: mmap.mmap, at: int, pending: _Pending) -> None:
    if pending.start is not None:
        raise ShardError(
            "the shard is truncated: it ends after a header that only describes the next one",
            where={"offset": pending.start},
            fix="download or make it again",
        )
    inside = at < len(view) < at + BLOCK and (at == 0 or _first_data(view, at) is not None)
    if at > len(view) or inside:
        raise ShardError(
            f"the shard is truncated: it ends at byte {len(view)}, inside a block",
            where={"offset": min(at, len(view)) // BLOCK * BLOCK},
            fix="download or make it again",
        )
    data = _first_data(view, at)
    if data is not None:
        raise ShardError(
            f"zeros end the archive at byte {at}, but more data begins at byte {data}: most readers lose it",
            where={"offset": at},
            fix="if these are two tars in one file, split them; if not, make the shard again",
        )


def _checked(block: bytes, at: int) -> tuple[int, int]:
    """Size and type byte of a header whose checksum is right."""
    if not _is_header(block):
        raise ShardError(
            f"no tar header at byte {at}: its checksum is wrong",
            where={"offset": at},
            fix="the shard is damaged or no tar: download or make it again",
        )
    try:
        return _number(block[124:136]), block[156]
    except ValueError:
        raise ShardError(
            f"the tar header at byte {at} declares a size that is no number",
            where={"offset": at},
            fix="make the shard again",
        ) from None


def _is_header(block: bytes) -> bool:
    """Whether a block's checksum is right: of unsigned bytes as POSIX.1-1988 says, or of signed ones as old tars."""
    try:
        written = _number(block[148:156])
    except ValueError:
        return False
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if written == unsigned:
        return len(block) == BLOCK
    return written == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _number(raw: bytes) -> int:
    """An octal number, or base-256 where the first byte's high bit is set. Source: GNU tar manual.

    Raises:
        ValueError: it is neither, or negative.
    """
    if raw[:1] >= b"\x80":
        if raw[0] == 0xFF:
            raise ValueError("a negative number")
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    octal = _OCTAL.fullmatch(raw)
    if octal is None:
        raise ValueError("not octal")
    return int(octal[1] or b"0", 8)


def _prefix_body(view: mmap.mmap, at: int, size: int) -> bytes:
    if size > MAX_PREFIX:
        raise ShardError(
            f"a header that describes the next one declares {size} bytes, the limit is {MAX_PREFIX}",
            where={"offset": at - BLOCK},
            fix="the shard is damaged: download or make it again",
        )
    if at + size > len(view):
        raise ShardError(
            f"the shard is truncated: a header that describes the next one ends at byte {at + size}, "
            f"the file at {len(view)}",
            where={"offset": at - BLOCK},
            fix="download or make it again",
        )
    return view[at : at + size]


def _pax(body: bytes, at: int) -> dict[bytes, bytes]:
    """The records `<length> <key>=<value>\\n` of a pax header that begins at byte `at`."""
    records: dict[bytes, bytes] = {}
    body = body.rstrip(b"\0")
    start = 0
    while start < len(body):
        space = body.find(b" ", start, start + 8)
        digits = body[start:space] if space > 0 else b""
        stop = start + int(digits) if digits.isdigit() else start
        equals = body.find(b"=", space, stop)
        if equals < 0 or stop > len(body) or body[stop - 1 : stop] != b"\n":
            raise ShardError("a pax header is damaged", where={"offset": at}, fix="download or make the shard again")
        records[body[space + 1 : equals]] = body[equals + 1 : stop - 1]
        start = stop
    return records


def _telling(body: bytes, at: int) -> dict[bytes, bytes]:
    """The records of a pax header that the index needs: a header may hold 200,000 others, and a global one stays."""
    records = _pax(body, at)
    told = {key: records[key] for key in _TELLING if key in records}
    if any(key.startswith(_SPARSE) for key in records):
        told[_SPARSE] = b""
    return told


def _name(pax: dict[bytes, bytes], long_name: bytes | None, block: bytes) -> bytes:
    """A member's name; an empty one of pax counts, and its last slash makes no folder, as Python's tarfile reads it."""
    if name := pax.get(b"GNU.sparse.name"):
        return name
    if (path := pax.get(b"path")) is not None:
        return path.rstrip(b"/")
    return long_name or _ustar_name(block)


def _refuse_common(common: dict[bytes, bytes], at: int) -> None:
    for key, what in ((b"size", "size"), (b"path", "name")):
        if key in common:
            raise ShardError(
                f"a global pax header declares one {what} for all members",
                where={"offset": at},
                fix="make the shard again",
            )


def _pax_size(value: bytes, at: int) -> int:
    if not value.isdigit() or len(value) > 18:
        raise ShardError(
            f"a pax header declares the size '{_shown(value)}'", where={"offset": at}, fix="make the shard again"
        )
    return int(value)


def _skip_sparse_maps(view: mmap.mmap, block: bytes, at: int) -> int:
    """Skips the extension blocks of an old GNU sparse header: flag at 482 of the header, at 504 of each block."""
    more = block[482]
    while more and at + BLOCK <= len(view):
        more = view[at + 504]
        at += BLOCK
    return at


def _ustar_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _shown(name: bytes) -> str:
    """A name for a message: on one line, and not all of a long one."""
    text = plain(_text(name))
    return text if len(text) <= _NAME_SHOWN else text[:_NAME_SHOWN] + "..."


# --- heads alone ---


def first_other_head(heads: Sequence[bytes], names: Sequence[str], sizes: Sequence[int]) -> int | None:
    """The first record that does not declare its name and size, or whose checksums are wrong; None if all do.

    Args:
        heads: for each record the bytes from its first prefix to its data.
        names: as `Index.names` has them.
        sizes: bytes of content.
    """
    agrees = np.zeros(len(heads), bool)
    lengths = np.array([len(head) for head in heads], np.int64)
    for length in (BLOCK, 3 * BLOCK):  # a header alone, or behind one pax prefix: nearly all that there are
        at = np.flatnonzero(lengths == length).tolist()
        if not at:
            continue
        blocks = np.frombuffer(b"".join(heads[i] for i in at), np.uint8).reshape(len(at), length // BLOCK, BLOCK)
        agrees[at] = _plain_heads(blocks, [names[i].encode() for i in at], np.array(sizes, np.int64)[at])
    rest = np.flatnonzero(~agrees).tolist()
    return next((i for i in rest if not _declares(heads[i], names[i], sizes[i])), None)


def _plain_heads(blocks: np.ndarray, names: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """Which heads are surely right; what is written in a rarer way is left to `_declares`.

    Args:
        blocks: uint8 (n, 1 or 3, 512), headers, behind a pax prefix of one block or not.
    """
    heads, sure = blocks[:, -1], np.ones(len(blocks), bool)
    found = _octal(heads[:, 124:136])
    raw = np.ascontiguousarray(heads[:, :100]).view("S100").ravel().tolist()
    if found is None or (blocks.shape[1] > 1 and not _behind_transparent(blocks)):
        return ~sure
    sure &= np.array([one == other for one, other in zip(raw, names, strict=True)], bool)
    sure &= (found == sizes) & np.isin(heads[:, 156], (0, ord("0")))
    for one in range(0, blocks.shape[1], 2):
        sums = _octal(blocks[:, one, 148:156])
        if sums is None:
            return np.zeros(len(blocks), bool)
        sure &= ~blocks[:, one, 345:].any(axis=1) & (_checksums(blocks[:, one]) == sums)
    return sure


def _behind_transparent(blocks: np.ndarray) -> bool:
    """Whether all of these heads begin with a pax prefix that changes nothing."""
    first = blocks[:, 0]
    lengths = _octal(first[:, 124:136])
    if lengths is None or (first[:, 156] != ord("x")).any():
        return False
    return _all_transparent(blocks.reshape(-1, BLOCK), np.arange(len(blocks)) * blocks.shape[1], lengths)


class _ZeroContent:
    """A head with content of zeros behind it, which are made when they are looked at."""

    def __init__(self, head: bytes, size: int) -> None:
        self._head, self._length = head, len(head) + size + padding(size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(self._length)
        return self._head[start:stop].ljust(max(stop - start, 0), b"\0")


def _declares(head: bytes, name: str, size: int) -> bool:
    try:
        found = _walk(cast(mmap.mmap, _ZeroContent(head, size)))
    except ShardError:
        return False
    places = found.data.tolist(), found.size.tolist()
    return (found.names, *places, found.end) == ([name], [len(head)], [size], len(head) + size + padding(size))


# --- making records ---


def make_record_head(name: str, size: int) -> bytes:
    """Prefix and header of a regular member: ustar, with pax records only where the name or the size needs them."""
    head = bytearray(BLOCK)
    head[100:108] = b"%07o\0" % 0o444
    head[108:116] = head[116:124] = b"%07o\0" % 0
    head[136:148] = b"%011o\0" % 0
    return _finished(head, name.encode(), size, {})


def remake_record_head(old: bytes, name: str, size: int) -> bytes:
    """Prefix and header of a record that takes another's place: its mode, owner and times, a new name and size.

    Args:
        old: the bytes from the old record's first prefix to its data.
    """
    patched = _resized(old, name.encode(), size)
    if patched is not None:
        return patched
    pax: dict[bytes, bytes] = {}
    at = 0
    while old[at + 156] in b"xXgLK":
        size_of = _number(old[at + 124 : at + 136])
        if old[at + 156] in b"xX":
            pax.update(_pax(old[at + BLOCK : at + BLOCK + size_of], at))
        at += BLOCK + size_of + padding(size_of)
    kept = {key: value for key, value in pax.items() if key not in (b"path", b"size") and not key.startswith(b"GNU.")}
    return _finished(bytearray(old[at : at + BLOCK]), name.encode(), size, kept)


def _resized(old: bytes, name: bytes, size: int) -> bytes | None:
    """The old bytes with another size, if nothing else changes: a ustar header, before it at most times and owners."""
    head = old[-BLOCK:]
    if head[:100].rstrip(b"\0") != name or head[156:157] != b"0" or head[257:265] != b"ustar\x0000":
        return None
    if head[345:] != _NO_PREFIX or not head.isascii() or size > _MAX_OCTAL:
        return None
    if len(old) > BLOCK:
        length = _number(old[124:136])
        if len(old) != 3 * BLOCK or old[156:157] != b"x" or not _is_transparent(old[BLOCK : BLOCK + length]):
            return None
    field_ = b"%011o\0" % size
    checksum = _number(head[148:156]) - sum(head[124:136]) + sum(field_)
    return b"".join((old[:-BLOCK], head[:124], field_, head[136:148], b"%06o\0 " % checksum, head[156:]))


def _finished(head: bytearray, name: bytes, size: int, pax: dict[bytes, bytes]) -> bytes:
    """The header as ustar, whatever it was: the fields up to the time and the owner's names stay."""
    if len(name) > 100 or b"\0" in name:
        pax = {**pax, b"path": name}
    if size > _MAX_OCTAL:
        pax = {**pax, b"size": b"%d" % size}
    head[157:257] = bytes(100)
    head[257:265] = b"ustar\x0000"
    head[345:512] = bytes(167)
    body = b"".join(_pax_record(key, value) for key, value in pax.items())
    prefix = b""
    if body:
        _set(head, b"PaxHeaders/" + name[-80:].replace(b"/", b"_"), len(body), b"x")
        prefix = bytes(head) + body + bytes(padding(len(body)))
    _set(head, name[:100], size if size <= _MAX_OCTAL else 0, b"0")
    return prefix + bytes(head)


def _set(head: bytearray, name: bytes, size: int, kind: bytes) -> None:
    head[0:100] = name.ljust(100, b"\0")
    head[124:136] = b"%011o\0" % size
    head[148:156] = b" " * 8
    head[156:157] = kind
    head[148:156] = b"%06o\0 " % sum(head)


def _pax_record(key: bytes, value: bytes) -> bytes:
    """`<length> <key>=<value>\\n`, the length counting its own digits."""
    body = len(key) + len(value) + 3
    length = body + len(str(body))
    if len(str(length)) != len(str(body)):
        length = body + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def end_of_archive(length: int) -> bytes:
    """The zeros that close an archive of `length` bytes: two blocks, then up to a multiple of 20 blocks."""
    return bytes(2 * BLOCK + -(length + 2 * BLOCK) % RECORD)


def index_from(descriptor: int, start: int, size: int) -> Index:
    """Index of the members of a file of `size` bytes from byte `start` on, which is the end of a record or 0.

    Raises:
        ShardError: no records follow, or the file ends before `size`.
    """
    return _walk(cast(mmap.mmap, _File(descriptor, size)), start)


class _File:
    """An open file as its mapping, of which a file that is cut meanwhile would make a crash."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice | int) -> bytes | int:
        if isinstance(place, int):
            return files.read_at(self._descriptor, place, 1)[0]
        start, stop, _ = place.indices(self._size)
        return files.read_at(self._descriptor, start, max(stop - start, 0))

"""Tar files as 512-byte blocks: index every member, split names, make records.

Owns what POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU tar say about headers. Knows nothing of samples' meaning.
A record is a member's prefixes (pax and GNU headers), its header and its padded data: it is copied or dropped whole.
"""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from builder.errors import ShardError

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
_TRANSPARENT = re.compile(rb"(?:\d+ (?:mtime|atime|ctime|uid|gid|uname|gname)=[^\n]*\n)+")
#: A pax or GNU header body longer than this is refused instead of read into memory.
MAX_PREFIX = 1 << 20
_MAGIC = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}


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


def padded(size: np.ndarray) -> np.ndarray:
    """Sizes rounded up to whole blocks."""
    blocks: np.ndarray = (size + (BLOCK - 1)) // BLOCK
    return blocks * BLOCK


def padding(size: int) -> int:
    """Zero bytes that follow `size` bytes of content."""
    return -size % BLOCK


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and extension: up to the first dot of its base name, folder and `./` kept, as in webdataset.

    Returns None for a name that belongs to no sample: no dot, nothing before it, or its `__meta__` names.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or re.match(r"__[^/]*__($|/)", name):
        return None
    return folder + slash + stem, extension


def index(path: Path) -> Index:
    """Reads every header of a tar, checksums verified; reads the whole file once.

    Raises:
        ShardError: empty, compressed, truncated, a damaged header, data after the end; with the byte offset.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ShardError("the shard is empty (0 bytes)", where={"file": path}, fix="download or make it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            _refuse_compressed(view, path)
            try:
                return _chain(view) or _walk(view)
            except ShardError as error:
                error.where = {"file": path, **error.where}
                raise


def _refuse_compressed(view: mmap.mmap, path: Path) -> None:
    head = view[:6]
    for magic, (name, tool) in _MAGIC.items():
        if head.startswith(magic):
            raise ShardError(
                f"the shard is compressed with {name}: byte offsets into it would mean nothing",
                where={"file": path},
                fix=f"{tool} < {path.name} > {path.name.split('.')[0]}.tar, and name that file in dataset.shards",
            )


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
    try:
        return _linked(view, blocks)
    finally:
        del blocks


def _linked(view: mmap.mmap, blocks: np.ndarray) -> Index | None:
    magic = blocks[:, 257:261].copy().view(np.uint32).ravel()  # 'usta': one 32-bit compare a block
    found = np.flatnonzero(magic == np.frombuffer(b"usta", np.uint32)[0])
    if len(found) == 0 or found[0] != 0:
        return None
    heads = blocks[found]
    sizes = _octal(heads[:, 124:136])
    kinds = heads[:, 156]
    if sizes is None or not np.isin(kinds, (ord("0"), 0, ord("x"))).all() or (heads[:, 345] != 0).any():
        return None
    following = found + 1 + (sizes + BLOCK - 1) // BLOCK
    end = int(following[-1])
    if (following[:-1] != found[1:]).any() or end > len(blocks) or _first_data(view, end * BLOCK) is not None:
        return None
    sums = _octal(heads[:, 148:156])
    if sums is None or (_checksums(heads) != sums).any():
        return None
    return _members(view, found * BLOCK, sizes, kinds, heads, end * BLOCK)


def _members(
    view: mmap.mmap, offsets: np.ndarray, sizes: np.ndarray, kinds: np.ndarray, heads: np.ndarray, end: int
) -> Index | None:
    prefix = kinds == ord("x")
    if prefix[-1] or (prefix[1:] & prefix[:-1]).any():
        return None
    for start, size in zip((offsets[prefix] + BLOCK).tolist(), sizes[prefix].tolist(), strict=True):
        if not _TRANSPARENT.fullmatch(view[start : start + size]):
            return None
    member = ~prefix
    raw = np.ascontiguousarray(heads[member][:, :100]).view("S100").ravel().tolist()
    try:
        text = b"\n".join(raw).decode("utf-8")
    except UnicodeDecodeError:
        return None
    names = text.split("\n") if raw else []
    if "\0" in text or len(names) != len(raw) or any(name.endswith("/") or not name for name in names):
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
        file_size=len(view),
    )


def _octal(text: np.ndarray) -> np.ndarray | None:
    """Octal numbers out of uint8 (n, w): spaces, digits, then spaces or NULs; None if any is written otherwise."""
    digits = text - ord("0")
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
        ended |= started & ~now
        value = np.where(now, value * 8 + digits[:, column], value)
    return value


def _checksums(heads: np.ndarray) -> np.ndarray:
    """Unsigned header checksums, the checksum field counted as spaces. Source: POSIX.1-1988."""
    total: np.ndarray = heads.sum(axis=1, dtype=np.int64)
    return np.asarray(total - heads[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * 32)


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


def _walk(view: mmap.mmap) -> Index:
    names: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    bad: set[int] = set()
    common: dict[bytes, bytes] = {}
    pending = _Pending()
    at = 0
    while at + BLOCK <= len(view):
        block = view[at : at + BLOCK]
        if block.count(0) == BLOCK:
            break
        size, kind = _checked(block, at)
        start = at if pending.start is None else pending.start
        at += BLOCK
        if kind in b"xXgLK":
            body = _prefix_body(view, at, size)
            at += size + padding(size)
            if kind == ord("g"):
                common.update(_pax(body, start))
                continue
            pending.start = start
            if kind == ord("L"):
                pending.name = body.split(b"\0")[0]
            elif kind != ord("K"):
                pending.pax.update(_pax(body, start))
            continue
        pax = {**common, **pending.pax}
        name = pax.get(b"path") or pending.name or _ustar_name(block)
        if b"size" in pax:
            size = _pax_size(pax[b"size"], start)
        if kind in b"123456":
            size = 0  # links and devices have no content whatever their header says; as GNU tar
        if kind == ord("S"):
            at = _skip_sparse_maps(view, block, at)
        if any(key.startswith(b"GNU.sparse.") for key in pax):
            kind = ord("S")
        if kind in b"0\x00" and name.endswith(b"/"):
            kind = ord("5")
        if at + size > len(view):
            raise ShardError(
                f"the shard is truncated: member '{_text(name)}' ends at byte {at + size}, the file at {len(view)}",
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
    if at > len(view) or (at < len(view) < at + BLOCK and _first_data(view, at) is not None):
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
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    signed = unsigned - 256 * sum(1 for byte in block[:148] + block[156:] if byte > 127)
    try:
        written = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        written, size = -1, -1
    if written not in (unsigned, signed) or size < 0:
        raise ShardError(
            f"no tar header at byte {at}: its checksum is wrong",
            where={"offset": at},
            fix="the shard is damaged or no tar: download or make it again",
        )
    return size, block[156]


def _number(raw: bytes) -> int:
    """An octal number, or base-256 where the first byte's high bit is set. Source: GNU tar manual."""
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    return int(raw.split(b"\0")[0].strip() or b"0", 8)


def _prefix_body(view: mmap.mmap, at: int, size: int) -> bytes:
    if size > MAX_PREFIX or at + size > len(view):
        raise ShardError(
            f"a header prefix declares {size} bytes; {max(len(view) - at, 0)} are left, the limit is {MAX_PREFIX}",
            where={"offset": at - BLOCK},
            fix="the shard is damaged: download or make it again",
        )
    return view[at : at + size]


def _pax(body: bytes, at: int) -> dict[bytes, bytes]:
    """The records `<length> <key>=<value>\\n` of a pax header."""
    records: dict[bytes, bytes] = {}
    while body.strip(b"\0"):
        digits, _, rest = body.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = rest[: max(length - len(digits) - 1, 0)].partition(b"=")
        if not equals or length > len(body) or not value.endswith(b"\n"):
            raise ShardError("a pax header is damaged", where={"offset": at}, fix="download or make the shard again")
        records[key] = value[:-1]
        body = body[length:]
    return records


def _pax_size(value: bytes, at: int) -> int:
    if not value.isdigit() or len(value) > 18:
        raise ShardError(
            f"a pax header declares the size '{_text(value)}'", where={"offset": at}, fix="make the shard again"
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


# --- making records ---


def make_record_head(
    name: str,
    size: int,
    *,
    mode: int = 0o444,
    mtime: int = 0,
    uname: str = "",
    gname: str = "",
    uid: int = 0,
    gid: int = 0,
) -> bytes:
    """Prefix and header of a regular member: ustar, with a pax `path` only where the name exceeds 100 bytes."""
    head = bytearray(BLOCK)
    head[100:108] = b"%07o\0" % mode
    head[108:116] = b"%07o\0" % uid
    head[116:124] = b"%07o\0" % gid
    head[136:148] = b"%011o\0" % mtime
    head[257:265] = b"ustar\x0000"
    head[265 : 265 + len(uname)] = uname.encode()
    head[297 : 297 + len(gname)] = gname.encode()
    return _finished(head, name.encode(), size, {})


def remake_record_head(old: bytes, name: str, size: int) -> bytes:
    """Prefix and header of a record that takes another's place: its mode, owner and times, a new name and size.

    Args:
        old: the bytes from the old record's first prefix to its data.
    """
    pax: dict[bytes, bytes] = {}
    at = 0
    while old[at + 156] in b"xXLK":
        size_of = _number(old[at + 124 : at + 136])
        if old[at + 156] in b"xX":
            pax.update(_pax(old[at + BLOCK : at + BLOCK + size_of], at))
        at += BLOCK + size_of + padding(size_of)
    kept = {key: value for key, value in pax.items() if key not in (b"path", b"size") and not key.startswith(b"GNU.")}
    return _finished(bytearray(old[at : at + BLOCK]), name.encode(), size, kept)


def _finished(head: bytearray, name: bytes, size: int, pax: dict[bytes, bytes]) -> bytes:
    if len(name) > 100:
        pax = {**pax, b"path": name}
    body = b"".join(_pax_record(key, value) for key, value in pax.items())
    if head[257:263] == b"ustar\0":
        head[345:500] = bytes(155)
    prefix = b""
    if body:
        extended = bytearray(head)
        extended[156] = ord("x")
        _set_name_and_size(extended, b"PaxHeaders/" + name[-80:].replace(b"/", b"_"), len(body))
        prefix = bytes(extended) + body + bytes(padding(len(body)))
    head[156] = ord("0")
    head[157:257] = bytes(100)
    _set_name_and_size(head, name[:100], size)
    return prefix + bytes(head)


def _set_name_and_size(head: bytearray, name: bytes, size: int) -> None:
    head[0:100] = name.ljust(100, b"\0")
    head[124:136] = b"%011o\0" % size
    head[148:156] = b" " * 8
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


def end_of_records(descriptor: int, start: int, size: int) -> int:
    """First byte after the last record, walking from the end of any record; `start` if only zeros follow it."""
    at = start
    while at + BLOCK <= size:
        block = os.pread(descriptor, BLOCK, at)
        if block.count(0) == BLOCK:
            break
        length, kind = _checked(block, at)
        at += BLOCK + (0 if kind in b"123456" else length + padding(length))
    return at

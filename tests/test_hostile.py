"""Hostile and broken input: one of each kind, tars at random, and webdataset beside us.

What a tar's index says of single faults is in test_tar.py, what the table says of bad samples in test_bad_shards.py and
test_shards.py; here are whole rows of odd tars, what no byte of any input may do, and the harness of hostile.py itself.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hostile
from builder.cli import main
from builder.errors import ConfigError, ShardError
from builder.hybrid import output_folder, splice
from builder.models.pictures import decode
from builder.progress import Talk, plain
from builder.sources.tars.columns import MAX_TEXT
from builder.sources.tars.samples import MAX_ERROR
from builder.store.layout import MAX_SHARD_NAME, Layout, shard_name_fault
from builder.table.edits import EditsReader, EditsTar
from builder.table.sql_text import Sql
from builder.tar import blocks, indexing, member_names
from builder.verbs import status
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot
from builder.verbs.sql import answer
from builder.verbs.verify import prove
from builder.verbs.write import run_write, write_plans
from conftest import STANDARD_STAGES, Sample, Workspace, ingest_here, make_shard, picture, samples
from support.tars import (
    BLOCK,
    END,
    both_ways,
    by_builder,
    by_webdataset,
    checksummed,
    gnu_tar,
    header,
    listed,
    listed_by_tarfile,
    padded,
    pax,
    pax_record,
    record,
    rows_of,
    written,
)

JPG = picture()
Make = Callable[..., Workspace]


def fixed(max_examples: int) -> settings:
    """The same examples in every run; HOSTILE_EXAMPLES=N asks for N times as many new ones."""
    times = int(os.environ.get("HOSTILE_EXAMPLES", "0"))
    return settings(max_examples=max_examples * max(times, 1), derandomize=not times, deadline=None, database=None)


def sample(key: str, **options: Any) -> bytes:
    """Records of a sample of two members."""
    return record(f"{key}.jpg".encode(), JPG, **options) + record(f"{key}.txt".encode(), key.encode(), **options)


def path_of(name: str, *more: bytes) -> bytes:
    """A pax header with a name."""
    return pax(pax_record(b"path", name.encode()), *more)


def star(name: bytes, data: bytes) -> bytes:
    """A record as star writes it: its own mark at the end, times where ustar has the prefix's last bytes."""
    head = bytearray(header(name, len(data)))
    head[476:488] = head[488:500] = b"14523701251 "
    head[508:512] = b"tar\0"
    return checksummed(head) + padded(data)


# --- kinds of tars ---


@dataclass
class Kind:
    """A tar and what becomes of it.

    Attributes:
        rows: key, extensions and the error's class of every row; or what the shard's refusal begins with.
        compared: samples that webdataset delivers just so; None where its reader raises or loses samples.
    """

    parts: Sequence[bytes]
    rows: list[tuple[str, str, str]] | str
    compared: int | None = 0


def ok(*keys: str) -> list[tuple[str, str, str]]:
    return [(key, "jpg txt", "") for key in keys]


BIG = 60 * 10**9
LONG = "a-folder-with-a-name/" * 9
CUT = "the shard is truncated: "
LATE = "zeros end the archive at byte "
TWICE = "two headers describe one member: readers disagree on which counts"
ONE = sample("0")
TWO = sample("0") + sample("1")
#: A tar that ends up inside an image, its records at whole blocks of the outer one.
INNER = sample("inner") + END
KINDS = {
    "ustar": Kind([TWO, END], ok("0", "1"), 2),
    "v7": Kind([sample("0", magic=b""), sample("1", magic=b""), END], ok("0", "1"), 2),
    "gnu": Kind([sample("0", magic=b"ustar  "), sample("1", magic=b"ustar  "), END], ok("0", "1"), 2),
    "star": Kind([star(b"0.jpg", JPG), star(b"0.txt", b"0"), END], ok("0"), 1),
    "a dialect for every member": Kind(
        [star(b"0.jpg", JPG), record(b"0.txt", magic=b""), record(b"././@LongLink", LONG.encode() + b"1.jpg\0", b"L"),
         record(LONG.encode()[:99], JPG, magic=b"ustar  "), path_of(f"{LONG}1.txt"), record(b"x"), END],
        ok("0", f"{LONG}1"), 2,
    ),
    "global header": Kind([pax(pax_record(b"comment", b"0123"), kind=b"g"), TWO, END], ok("0", "1"), 2),
    "global header in a sample": Kind(
        [ONE[: -2 * BLOCK], pax(pax_record(b"comment", b"0123"), kind=b"g"), ONE[-2 * BLOCK :], END], ok("0"), 1),
    "global name": Kind(
        [pax(pax_record(b"path", b"0.jpg"), kind=b"g"), TWO, END],
        "a global pax header declares one name for all members", None,
    ),
    "headers of Solaris": Kind([pax(pax_record(b"path", b"0.jpg"), kind=b"X"), record(b"x", JPG), END],
                               [("0", "jpg", "")], 1),
    "two pax headers for one member": Kind([path_of("1.jpg"), path_of("0.jpg"), record(b"x", JPG), END], TWICE, None),
    "a name in a pax header and in a long one": Kind(
        [record(b"././@LongLink", b"1.jpg\0", b"L"), path_of("0.jpg"), record(b"x", JPG), END], TWICE, None),
    "a pax header of a time behind a long name": Kind(
        [record(b"././@LongLink", b"0.jpg\0", b"L"), pax(pax_record(b"mtime", b"1.5")), record(b"x", JPG), END],
        [("0", "jpg", "")], 1,
    ),
    "a long link beside a long name": Kind(
        [record(b"././@LongLink", b"t\0", b"K"), record(b"././@LongLink", b"0.jpg\0", b"L"), record(b"x", JPG), END],
        [("0", "jpg", "")], 1,
    ),
    "size as base-256": Kind(
        [header(b"0.jpg", b"\x80" + len(JPG).to_bytes(11, "big")) + padded(JPG), END], [("0", "jpg", "")], 1),
    "size as pax": Kind([pax(pax_record(b"size", b"%d" % len(JPG))), header(b"0.jpg") + padded(JPG), END],
                        [("0", "jpg", "")], 1),
    "links": Kind(
        [ONE, header(b"1.jpg", kind=b"1"), record(b"1.txt"), record(b"2.txt"), header(b"2.jpg", kind=b"2"), END],
        [*ok("0"), ("1", "jpg txt", "LinkMember"), ("2", "txt jpg", "LinkMember")], 1,
    ),
    "devices, FIFOs and folders with names of samples": Kind(
        [header(b"1.jpg", kind=kind) for kind in (b"3", b"4", b"5", b"6")] + [ONE, END], ok("0"), 1),
    "types that nobody knows": Kind(
        [record(b"1.jpg", JPG, kind) for kind in (b"A", b"M", b"N", b"V", b"D", b"\xff")] + [ONE, END], ok("0"), 1),
    "folders that declare content": Kind([header(b"1.jpg", 700, b"5"), ONE, END], ok("0"), 1),
    "no names": Kind([record(b"", JPG), ONE, path_of(""), record(b"1.jpg", JPG), END], ok("0"), 1),
    "a slash behind a name": Kind(
        [record(b"1.jpg/"), path_of("0.jpg/"), record(b"x", JPG), END], [("0", "jpg", "")], 1),
    "names that lead out": Kind(
        [sample("../../0"), sample("/etc/1"), sample("a/../../../2"), END], ok("../../0", "/etc/1", "a/../../../2"), 3),
    "names that a terminal obeys": Kind(
        [sample("\x1b[31mred\x07"), sample("two\nlines"), sample("\u202egnp"), END],
        ok("\x1b[31mred\x07", "two\nlines", "\u202egnp"), 3,
    ),
    "a newline behind a folder with a dot": Kind([sample("a.b\nc/0"), ONE, END], ok("0"), 1),
    "NUL in a name": Kind([path_of("a\0b.jpg"), record(b"a.jpg", JPG), END], [("a\0b", "jpg", "")], None),
    "names that are not UTF-8": Kind(
        [record(b"caf\xe9.jpg", JPG), path_of("x").replace(b"path=x", b"path=\xff"), record(b"y.jpg"), ONE, END],
        [("caf\\xe9", "jpg", "BadName"), *ok("0")], None,
    ),
    "a name of 1 MB": Kind(
        [path_of("n" * 1_000_000 + ".jpg"), record(b"x", JPG), END], [("n" * 1_000_000, "jpg", "")], 1),
    "the same twice": Kind(
        [ONE, record(b"0.TXT", b"other"), sample("1"), END], [("0", "jpg txt txt", "DuplicateMember"), *ok("1")], None),
    "scattered": Kind(
        [ONE[: -2 * BLOCK], sample("1"), ONE[-2 * BLOCK :], END],
        [("0", "jpg", "ScatteredSample"), *ok("1"), ("0", "txt", "ScatteredSample")], None,
    ),
    "a tar inside an image": Kind([record(b"0.jpg", INNER), record(b"0.txt", b"0"), END], ok("0"), 1),
    "a header inside an image, cut there": Kind(
        [record(b"0.jpg", bytes(BLOCK) + header(b"1.jpg", BIG % 8**11)), record(b"0.txt", b"0"), END], ok("0"), 1),
    "nothing but zeros": Kind([bytes(20 * BLOCK)], [], 0),
    "60 GB as pax": Kind([pax(pax_record(b"size", b"%d" % BIG)), header(b"0.jpg"), bytes(4096)], CUT, None),
    "60 GB as base-256": Kind([header(b"0.jpg", b"\x80" + BIG.to_bytes(11, "big")), bytes(4096)], CUT, None),
    "8 GB as octal": Kind([header(b"0.jpg", b"77777777777\0"), bytes(4096)], CUT, None),
    "60 GB as 12 octal digits": Kind([header(b"0.jpg", b"%012o" % BIG), bytes(4096)], CUT, None),
    "a size beyond 64 bits": Kind([header(b"0.jpg", b"\x80" + b"\xff" * 11), bytes(4096)], CUT, None),
    "60 GB as a pax header": Kind(
        [header(b"x", b"%012o" % BIG, b"x"), bytes(4096)], "a header that describes the next one declares", None),
    "60 GB as a sparse file": Kind(
        [pax(pax_record(b"GNU.sparse.major", b"1"), pax_record(b"GNU.sparse.realsize", b"%d" % BIG),
             pax_record(b"GNU.sparse.name", b"0.jpg")), record(b"x", b"0\n"), END],
        [("0", "jpg", "LinkMember")], None,
    ),
    "a size below zero": Kind([header(b"0.jpg", b"\xff" * 12), END], "the tar header at byte 0 declares a size", None),
    "a long number in a pax header": Kind(
        [pax(b"9" * 5000 + b" mtime=1\n"), ONE, END], "a pax header is damaged", None),
    "a pax record as long as the limit": Kind(
        [pax(pax_record(b"uname", b"u" * (blocks.MAX_PREFIX + 1))), ONE, END], "a header that describes the next one",
        None),
    "gzip": Kind([gzip.compress(TWO + END)], "the shard is compressed with gzip", None),
    "two tars in one file": Kind([TWO, END, sample("2"), END], LATE, None),
    "zeros in the middle": Kind([ONE, bytes(BLOCK), sample("1"), END], LATE, None),
    "a header that is cut": Kind([TWO[: len(ONE) + 300]], CUT, None),
    "a header that is damaged": Kind(
        [ONE, b"\1", sample("1")[1:], END], f"no tar header at byte {len(ONE)}: its checksum is wrong", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_kind_of_tar(tmp_path: Path, kind: str) -> None:
    told = KINDS[kind]
    path = written(tmp_path / "a.tar", *told.parts)
    beside = hostile.compared(path)
    assert beside.differs == []
    if isinstance(told.rows, str):
        with pytest.raises(ShardError) as caught:
            rows_of(path)
        assert caught.value.what.startswith(told.rows)
        assert caught.value.where["file"] == path
        assert caught.value.fix
        return
    rows = rows_of(path)
    got = [
        (row["key"], " ".join(m["ext"].lower() for m in row["source_members"]), row["source_error"] or "")
        for row in rows
    ]
    assert [(key, extensions, error.partition(":")[0]) for key, extensions, error in got] == told.rows
    assert all(len(error) <= MAX_ERROR for *_, error in got)
    if told.compared is not None:
        assert (beside.unread, beside.samples) == ("", told.compared)
    chain, walk = both_ways(path)
    assert chain is None or listed(chain) == listed(walk)


@pytest.mark.parametrize("form", ["gnu", "posix-0.0", "posix-0.1", "posix-1.0"])
def test_sparse_files_are_told_and_what_lies_behind_them_is_read(tmp_path: Path, form: str) -> None:
    with (tmp_path / "0.jpg").open("wb") as file:
        for place in range(6):  # more pieces than an old header has room for
            file.seek(place * 100_000)
            file.write(b"piece")
    (tmp_path / "1.jpg").write_bytes(JPG)
    name, _, version = form.partition("-")
    options = [f"--sparse-version={version}"] * bool(version)
    gnu_tar("--sparse", f"--format={name}", *options, "-cf", "a.tar", "0.jpg", "1.jpg", folder=tmp_path)
    one, other = rows_of(tmp_path / "a.tar")
    assert (one["key"], one["source_error"]) == ("0", "LinkMember: member '0.jpg' is a sparse file, not a plain file")
    assert by_builder(tmp_path / "a.tar")[1] == ("1", {"jpg": JPG})
    beside = hostile.compared(tmp_path / "a.tar")
    assert (beside.differs, beside.samples, other["source_error"]) == ([], 1, None)


SLOW = {
    "a global header of 80,000 records, 3,000 members": [
        pax(b"".join(b"12 k%05d=1\n" % i for i in range(80_000)), kind=b"g"),
        *(record(b"%d.jpg" % i) for i in range(3_000)),
    ],
    "a sample of 60,000 members": [record(b"k.%d" % i) for i in range(60_000)],
    "sparse maps without end": [
        checksummed(header(b"0.jpg", 0, b"S")[:482] + b"\1" + header(b"0.jpg")[483:]),
        (bytes(504) + b"\1" + bytes(7)) * 40_000,
    ],
    "1,000 long headers for one member": [pax(pax_record(b"comment", b"c" * 9_000))] * 1_000 + [record(b"0.jpg")],
}


@pytest.mark.parametrize("kind", SLOW)
def test_no_tar_takes_more_than_its_size_in_time(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "a.tar", *SLOW[kind], END)
    started = time.process_time()
    try:
        rows_of(path)
    except ShardError as error:
        assert kind.startswith("sparse")
        assert error.what.startswith(CUT) or "no tar header" in error.what
    assert time.process_time() - started < 4  # each took half a minute or more where a step was squared


def test_messages_show_names_on_one_line_and_not_all_of_a_long_one(tmp_path: Path) -> None:
    name = "0\n  fix: run this\x1b[2J" + "x" * 5000 + ".jpg"
    path = written(tmp_path / "a.tar", path_of(name, pax_record(b"size", b"99999")), record(b"x"), END)
    with pytest.raises(ShardError) as caught:
        indexing.index(path)
    assert caught.value.what.startswith("the shard is truncated: member '0\\n  fix: run this\\x1b[2Jxxx")
    assert len(caught.value.what) < 400


def in_bounds(code: str, *arguments: str | Path, megabytes: int) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process whose data may not grow by more."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({megabytes} << 20, {megabytes} << 20))\n"
    command = [sys.executable, "-c", f"import sys\n{limit}{code}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_tars_that_declare_60_gb_take_no_memory(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if " GB " in kind]
    paths = [written(tmp_path / f"{i}.tar", *KINDS[kind].parts) for i, kind in enumerate(kinds)]
    code = """
from pathlib import Path
from builder.tar import indexing
from builder.errors import ShardError
import resource
for path in sys.argv[1:]:
    try:
        print(len(indexing.index(Path(path))))
    except ShardError as error:
        print(error.what[:30])
"""
    done = in_bounds(code, *paths, megabytes=200)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(kinds)


# --- what Python's tarfile loses in silence ---


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("two tars in one file", ["0", "1"]),
        ("zeros in the middle", ["0"]),
        ("a header that is cut", ["0"]),
        ("a header that is damaged", ["0"]),
    ],
)
def test_samples_that_others_lose_without_a_word_are_told(tmp_path: Path, kind: str, keys: list[str]) -> None:
    path = written(tmp_path / "a.tar", *KINDS[kind].parts)
    assert [key for key, _ in by_webdataset(path)] == keys  # and no error
    with tarfile.open(path) as archive:
        assert [info.name for info in archive] == [f"{key}.{end}" for key in keys for end in ("jpg", "txt")]
    [said] = hostile.compared(path).said
    told = KINDS[kind].rows
    assert isinstance(told, str)
    assert said.startswith(f"{len(keys)} samples of webdataset: the shard is refused: {told}")


# --- tars at random ---


NAMES = st.sampled_from(
    ["0", "1", "2", "a b/3", "./4", "../5", "/6", "日本/ü", "x" * 96, LONG + "7", "\x1b[31m8", "nl\n9", "é" * 60]
)
EXTENSIONS = st.sampled_from(["jpg", "json", "txt", "png", "seg.png", "JPG", ""])
SIZES = st.sampled_from([0, 1, 2, 511, 512, 513, 1023, 1024, 1025, 3000])
DIALECTS = ["ustar", "nul", "v7", "gnu", "star", "prefix", "pax", "pax mtime", "pax size", "base-256", "continuous"]


@dataclass
class Member:
    """One member of a random tar: its name, its bytes, and how its record is written."""

    name: str
    data: bytes
    dialect: str

    def record(self) -> bytes:
        name, size = self.name.encode(), len(self.data)
        prefix = b""
        if self.dialect == "prefix" and b"/" in name and len(name.rpartition(b"/")[0]) <= 155:
            folder, _, base = name.rpartition(b"/")
            head = bytearray(header(base, size))
            head[345 : 345 + len(folder)] = folder
            if folder and len(base) <= 100:
                return checksummed(head) + padded(self.data)
        if len(name) > 100 and self.dialect == "gnu":
            prefix = record(b"././@LongLink", name + b"\0", b"L")
        elif len(name) > 100 or self.dialect == "pax":
            prefix = path_of(self.name, pax_record(b"mtime", b"1.5"))
        elif self.dialect == "pax mtime":
            prefix = pax(pax_record(b"mtime", b"1700000000.5"))
        elif self.dialect == "pax size":
            prefix = pax(pax_record(b"size", b"%d" % size))
        name = name[:100]
        if self.dialect == "star":
            return prefix + star(name, self.data)
        field: bytes | int = b"\x80" + size.to_bytes(11, "big") if self.dialect == "base-256" else size
        if self.dialect == "pax size" and prefix.find(b"size=") > 0:
            field = 7  # what pax says counts
        kind = {"nul": b"\0", "v7": b"\0", "continuous": b"7"}.get(self.dialect, b"0")
        magic = {"v7": b"", "gnu": b"ustar  "}.get(self.dialect, b"ustar\x0000")
        return prefix + header(name, field, kind, magic=magic) + padded(self.data)


def of_size(name: str, size: int, number: int) -> bytes:
    """Content that no other member has, from the first byte to the last."""
    text = f"{number}:{name}:".encode()
    return (text * (size // len(text) + 1))[:size]


@st.composite
def members(draw: st.DrawFn, *, contiguous: bool = True) -> list[Member]:
    """Members in random dialects, the same extension of a key once; those of a key side by side if contiguous."""
    chosen = draw(
        st.lists(st.tuples(NAMES, EXTENSIONS), max_size=10, unique_by=lambda pair: (pair[0], pair[1].lower()))
    )
    if contiguous:
        keys = list(dict.fromkeys(key for key, _ in chosen))
        chosen.sort(key=lambda pair: keys.index(pair[0]))
    dialects = st.sampled_from(draw(st.sampled_from([DIALECTS, ["ustar", "nul"], ["pax mtime"]])))
    return [
        Member(f"{key}.{ext}", of_size(key, draw(SIZES), number), draw(dialects))
        for number, (key, ext) in enumerate(chosen)
    ]


def tar_of(made: Iterable[Member]) -> bytes:
    return b"".join(member.record() for member in made) + END


def places(made: Sequence[Member]) -> dict[str, tuple[int, int, int]]:
    """Header, data and size of each member in the tar of them all."""
    found, at = {}, 0
    for member in made:
        whole = member.record()
        found[member.name] = (at, at + len(whole) - len(padded(member.data)), len(member.data))
        at += len(whole)
    return found


def groups(made: Sequence[Member]) -> list[tuple[str, dict[str, bytes]]]:
    """The samples that a reader should find."""
    found: list[tuple[str, dict[str, bytes]]] = []
    for member in made:
        key, ext = member_names.split_name(member.name) or ("", "")
        if not found or found[-1][0] != key:
            found.append((key, {}))
        found[-1][1][ext.lower()] = member.data
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example writes anew."""
    return tmp_path_factory.mktemp("random") / "a.tar"


@fixed(max_examples=150)
@given(made=members())
def test_any_order_dialect_size_and_name_is_read_as_written(scratch: Path, made: list[Member]) -> None:
    path = written(scratch, tar_of(made))
    index = indexing.index(path)
    assert {name: (head, data, size) for name, head, data, size, _ in listed(index)} == places(made)
    assert index.names == [member.name for member in made]
    chain, walk = both_ways(path)
    assert listed(index) == listed(walk) == listed_by_tarfile(path)
    assert chain is None or (listed(chain), chain.end) == (listed(walk), walk.end)
    if all(member.dialect in ("ustar", "nul", "pax mtime") and len(member.name.encode()) <= 100 for member in made):
        assert chain is not None or not made or "\n" in "".join(index.names)
    assert by_builder(path) == groups(made) == by_webdataset(path)
    assert hostile.compared(path) == hostile.Comparison(samples=len(groups(made)))


@fixed(max_examples=25)
@given(made=members())
def test_gnu_tar_finds_the_same_members(scratch: Path, made: list[Member]) -> None:
    path = written(scratch, tar_of(made))
    told = gnu_tar("--quoting-style=escape", "--absolute-names", "-tf", path, folder=path.parent)
    assert len(told) == len(made)
    command = ["tar", "--to-stdout", "--absolute-names", "-xf", path]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    assert content == b"".join(member.data for member in made)


@fixed(max_examples=100)
@given(made=members(contiguous=False))
def test_no_bytes_are_put_under_another_key(scratch: Path, made: list[Member]) -> None:
    path = written(scratch, tar_of(made))
    at = places(made)
    told = [
        (f"{row['key']}.{place['ext']}", (place["header"], place["data"], place["size"]))
        for row in rows_of(path)
        for place in row["source_members"]
    ]
    assert told == list(at.items())
    assert hostile.compared(path).differs == []


@fixed(max_examples=200)
@given(made=members(), data=st.data())
def test_cut_at_any_byte_no_sample_is_wrong(scratch: Path, made: list[Member], data: st.DataObject) -> None:
    whole = tar_of(made)
    edges = sorted({edge for head, start, size in places(made).values() for edge in (head, start, start + size)} - {0})
    cut = data.draw(st.one_of(st.integers(1, len(whole) - 1), st.sampled_from(edges or [1])))
    path = written(scratch, whole[:cut])
    try:
        rows, delivered = rows_of(path), by_builder(path)
    except ShardError as error:
        assert "truncated" in error.what
        return
    expected = [member for member in made if places(made)[member.name][1] + len(padded(member.data)) <= cut]
    assert delivered == groups(expected)
    if cut < len(whole) - len(END) + BLOCK and rows:  # between two records, or in the zeros: the last row says so
        assert "no end mark" in rows[-1]["source_error"]


@fixed(max_examples=200)
@given(made=members().filter(bool), data=st.data())
def test_a_byte_that_flips_is_noticed_in_a_header_and_harmless_elsewhere(
    scratch: Path, made: list[Member], data: st.DataObject
) -> None:
    whole = bytearray(tar_of(made))
    before = places(made)
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path = written(scratch, whole)
    _, start, size = next(
        ((h, s, n) for h, s, n in before.values() if h <= place < s + -(-n // BLOCK) * BLOCK), (0, 0, 0)
    )
    in_header = start > 0 and start - BLOCK <= place < start
    is_checksum = in_header and 148 <= (place - start) % BLOCK < 156
    try:
        index = indexing.index(path)
    except ShardError as error:
        assert error.where["file"] == path
        assert not (start and start <= place < start + size)  # a flip in content is content
        return
    assert (index.data + index.size <= index.file_size).all()
    assert (index.header[1:] >= index.stop[:-1]).all()
    assert not in_header or is_checksum  # of a checksum's eight bytes some are blanks
    if in_header or not start or place >= start:
        assert {name: (head, at, n) for name, head, at, n, _ in listed(index)} == before


@fixed(max_examples=200)
@given(
    made=members().filter(bool),
    damage=st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4),
)
def test_headers_that_lie_are_refused_or_read_alike_on_both_ways(
    scratch: Path, made: list[Member], damage: list[tuple[int, bytes]]
) -> None:
    whole = bytearray(tar_of(made))
    heads = {start - BLOCK for _, start, _ in places(made).values()} | {head for head, _, _ in places(made).values()}
    for at, junk in damage:
        at %= len(whole) - len(junk)
        whole[at : at + len(junk)] = junk
    for head in heads:
        whole[head : head + BLOCK] = checksummed(whole[head : head + BLOCK])
    path = written(scratch, whole)
    try:
        chain, walk = both_ways(path)
    except ShardError:
        with pytest.raises(ShardError):  # what the walk refuses the fast path does not read
            indexing.index(path)
        return
    assert chain is None or (listed(chain), chain.end) == (listed(walk), walk.end)
    assert (walk.data + walk.size <= walk.file_size).all()
    rows = rows_of(path)
    content = path.read_bytes()
    at = {int(head): (walk.names[i], int(walk.data[i]), int(walk.size[i])) for i, head in enumerate(walk.header)}
    for row, (key, members_) in zip(rows, by_builder(path), strict=True):
        for place in row["source_members"]:
            name, start, size = at[place["header"]]
            assert name == f"{key}.{place['ext']}"
            assert place["data"] == start
            assert row["source_error"] or members_[place["ext"].lower()] == content[start : start + size]
    differs = hostile.compared(path).differs
    assert differs == [], differs


@fixed(max_examples=120)
@given(junk=st.binary(max_size=3000), start=st.sampled_from([b"", header(b"0.jpg"), pax(b"12 size=900\n"), ONE]))
def test_any_bytes_are_refused_or_read(scratch: Path, junk: bytes, start: bytes) -> None:
    path = written(scratch, start, junk)
    try:
        rows_of(path)
    except ShardError as error:
        assert error.where["file"] == path
        assert error.fix


# --- kinds of json ---


def in_json(**fields: Any) -> bytes:
    return json.dumps({"caption": "c", **fields}).encode()


#: The json, and error or None, notes, caption of its row; its txt is `t`.
JSONS: dict[str, tuple[bytes, str | None, str | None, str]] = {
    "a key twice": (b'{"caption": "first", "caption": "last", "width": 1, "width": 2}', None, None, "last"),
    "100,000 deep": (b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "BadJson: the json is nested too deep",
                     None, "t"),
    "100,000 objects deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "BadJson: the json is nested too deep",
                             None, "t"),
    "17 MB": (b'{"caption": "c", "x": "%b"}' % (b"x" * (17 << 20)),
              f"BadJson: the json has {(17 << 20) + 25} bytes, the limit is {MAX_TEXT}", None, "t"),
    "a key that is half a character": (b'{"caption": "c", "\\ud800": 1}', None, None, "c"),
    "numbers of thousands of digits": (
        b'{"caption": "c", "width": %b}' % (b"9" * 5000),
        "BadJson: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use "
        "sys.set_int_max_str_digits() to increase the limit", None, "t"),
    "numbers of 4,000 digits": (b'{"caption": "c", "height": %b}' % (b"9" * 4000), None,
                                "height: expected int32, found " + "9" * 37 + "...", "c"),
    "a number beyond floats": (b'{"caption": "c", "width": 1e400}', None, "width: expected int32, found 1e400", "c"),
    "minus infinity in boxes": (b'{"caption": "c", "face_bboxes": [[-Infinity, 0, 1, 1]]}', None,
                                "face_bboxes: box 0 holds a value that is not finite", "c"),
    "UTF-16": ('{"caption": "c"}'.encode("utf-16"), "BadJson: the json is not UTF-8 at byte 0", None, "t"),
    "NUL behind it": (b'{"caption": "c"}\0\0', "BadJson: Extra data at line 1 column 17", None, "t"),
    "two objects": (b'{"caption": "c"}\n{"caption": "d"}', "BadJson: Extra data at line 2 column 1", None, "t"),
    "a number": (b"1", "BadJson: the json is a number, not an object", None, "t"),
    "true": (b"true", "BadJson: the json is a truth value, not an object", None, "t"),
    "every field of a wrong type": (
        in_json(caption={"a": 1}, uid=True, width=[], height={}, face_bboxes="x"), None,
        "uid: expected text, found a truth value; caption: expected text, found an object; "
        "face_bboxes: expected a list, found text; width: expected int32, found []; height: expected int32, found {}",
        "t"),
}  # fmt: skip


def test_kinds_of_json(tmp_path: Path) -> None:
    made = [Sample(f"{i}", json=body, txt=b"t") for i, (body, *_) in enumerate(JSONS.values())]
    rows = rows_of(make_shard(tmp_path / "s.tar", made))
    got = [(row["source_error"], row["source_notes"], row["caption"]) for row in rows]
    assert dict(zip(JSONS, got, strict=True)) == {kind: tuple(expected) for kind, (_, *expected) in JSONS.items()}


# --- kinds of captions, through all stages ---


ENGLISH = "a man with a hat is standing in the street"
NASTY = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp.exe \u2066 " + ENGLISH
CAPTIONS: dict[str, str] = {
    "empty": "", "blank": " \n\t\u3000 ", "nothing but marks": "\u202e\u200b\u0301" * 50, "escapes": NASTY,
    "10 MB": (ENGLISH + " ") * 240_000, "NUL": f"a\0b {ENGLISH}", "one word of 200,000 letters": "x" * 200_000,
    "tags": "<" * 200_000 + ENGLISH, "SQL": f"'; drop table samples; -- {ENGLISH}",
    "a template": f"{{caption}} %s {ENGLISH}", "lines": f"{ENGLISH}\n\r\n{ENGLISH}", "emoji": "\U0001f600" * 5000,
}  # fmt: skip


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """A pipeline of all stages over samples with these captions and a face each, and what it printed."""
    made = hostile.workspace(tmp_path_factory.mktemp("captions"), stages=STANDARD_STAGES)
    face = b'{"face_bboxes": [[0.1, 0.1, 0.5, 0.9]]}'
    made_of = [Sample(f"{i}-{key}", json=face, txt=text.encode()) for i, (key, text) in enumerate(CAPTIONS.items())]
    half = b'{"caption": "half \\ud83d of a pair", "face_bboxes": [[0, 0, 1, 1]]}'
    make_shard(made.folder / "source/a.tar", [*made_of, Sample(f"{NASTY}/half", json=half, txt=NASTY.encode())])
    done = made.run("run", check=False)
    return made, done.stdout + done.stderr


def test_every_caption_goes_through_all_stages(captioned: tuple[Workspace, str]) -> None:
    made, said = captioned
    rows = made.rows(
        "select caption, lang_status, coalesce(prompts_status, ''), coalesce(prompts_error, ''), generate_status, "
        "length(prompt) from samples order by row"
    )
    assert [row[0] for row in rows] == [*CAPTIONS.values(), NASTY]
    assert {row[1] for row in rows} == {"ok"}
    assert {row[2:4] for row in rows} <= {("", ""), ("ok", ""), ("failed", "no_text: caption has no words")}
    assert [row[4] for row in rows] == ["ok" if row[2] == "ok" else None for row in rows]
    assert max(row[5] or 0 for row in rows) < 1000
    told = {key: row[2] for key, row in zip([*CAPTIONS, "half"], rows, strict=True)}
    wanted = ("escapes", "10 MB", "NUL", "SQL", "a template", "lines", "half")
    assert {key: told[key] for key in wanted} == dict.fromkeys(wanted, "ok")
    assert harmless(said)
    proof = prove(made.load(), Talk(quiet=True))
    assert (proof.problems, proof.edited) == ([], sum(row[4] == "ok" for row in rows))


# --- kinds of images ---


def png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 0) -> bytes:
    """A PNG out of its header, its compressed rows and other chunks in front of them."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def zeros(size: int) -> bytes:
    """A zlib stream of so many zeros, made without them."""
    pack = zlib.compressobj(1)
    step = bytes(1 << 20)
    return b"".join(
        [*(pack.compress(step[: min(len(step), size - at)]) for at in range(0, size, len(step))), pack.flush()]
    )


def saved(kind: str, image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


GRADIENT = Image.fromarray(np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50)
RGB = Image.open(io.BytesIO(JPG)).convert("RGB")
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
ROW = zlib.compress(bytes(2))
#: The image, and its shape (height, width) or what the refusal holds.
PICTURES: dict[str, tuple[bytes, tuple[int, int] | str]] = {
    "no bytes": (b"", "no image format begins so"),
    "one byte": (b"\xff", "no image format begins so"),
    "text": (b"<html>404</html>", "no image format begins so"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no image format begins so"),
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n", "no image format begins so"),
    "a tar": (ONE + END, "no image format begins so"),
    "zeros": (bytes(1000), "no image format begins so"),
    "JPEG cut in its header": (JPG[:20], "does not decode"),
    "JPEG cut in its data": (JPG[: len(JPG) // 2], "does not decode"),
    "PNG cut in its data": (picture(extension="png")[:300], "truncated"),
    "WebP cut in its data": (picture(extension="webp")[:-50], "does not decode"),
    "1 pixel": (saved("PNG", Image.new("L", (1, 1))), (1, 1)),
    "1 pixel high": (saved("PNG", Image.new("RGB", (5000, 1))), (1, 5000)),
    "no pixel": (png(0, 0, ROW), "does not decode"),
    "CMYK": (saved("JPEG", RGB.convert("CMYK")), (32, 48)),
    "grey": (saved("JPEG", RGB.convert("L")), (32, 48)),
    "16 bits": (saved("PNG", GRADIENT), (30, 40)),
    "1 bit": (saved("PNG", RGB.convert("1")), (32, 48)),
    "palette with transparency": (saved("PNG", RGB.quantize(8), transparency=0), (32, 48)),
    "alpha": (saved("PNG", RGB.convert("RGBA")), (32, 48)),
    "animated GIF": (saved("GIF", RGB, save_all=True, append_images=[RGB.rotate(90)] * 3), (32, 48)),
    "animated WebP": (saved("WEBP", RGB, save_all=True, append_images=[RGB.rotate(90)] * 3), (32, 48)),
    "EXIF orientation": (saved("JPEG", RGB, exif=ROTATED), (48, 32)),
    "broken EXIF": (saved("JPEG", RGB, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 60), (32, 48)),
    "broken ICC profile": (saved("JPEG", RGB, icc_profile=b"no profile" * 30), (32, 48)),
    "ICC profile that grows to 20 MB": (png(1, 1, ROW, (b"iCCP", b"x\0\0" + zeros(20 << 20))), "too large"),
    "text that grows to 20 MB": (png(1, 1, ROW, (b"zTXt", b"x\0\0" + zeros(20 << 20))), "too large"),
    "pixels beyond the limit": (png(10_001, 10_000, ROW), "10001 x 10000 pixels, the limit is 100000000"),
    "pixels beyond Pillow's limit": (png(65_535, 65_535, ROW), "decompression bomb"),
    "sides beyond 31 bits": (png(2**31 - 1, 2**31 - 1, ROW), "does not decode"),
    "more data than pixels": (png(1, 1, zeros(20 << 20)), (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_kinds_of_images(kind: str) -> None:
    data, expected = PICTURES[kind]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            decode(data)
        return
    decoded = decode(data)
    assert (decoded.shape, decoded.dtype) == ((*expected, 3), np.uint8)


def test_bombs_take_bounded_memory(tmp_path: Path) -> None:
    below = written(tmp_path / "below.png", png(9_999, 10_000, zeros(10_000 * 10_000)))
    webp = written(tmp_path / "canvas.webp", webp_of(16_383, 16_383))
    code = """
from pathlib import Path
from builder.models.pictures import decode
for path in sys.argv[1:]:
    try:
        print(decode(Path(path).read_bytes()).shape)
    except ValueError as error:
        print(error)
"""
    assert max(below.stat().st_size, webp.stat().st_size) < 500_000
    done = in_bounds(code, below, webp, megabytes=1500)
    assert done.stderr == ""
    shape, refused = done.stdout.splitlines()
    assert shape == "(10000, 9999, 3)"
    assert "16383 x 16383 pixels, the limit is" in refused or "does not decode" in refused


def webp_of(width: int, height: int) -> bytes:
    """An animated WebP whose canvas is so large and whose one frame is small."""
    frame = saved("WEBP", RGB)[12:]

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    canvas = chunk(b"VP8X", b"\x02\0\0\0" + three(width - 1) + three(height - 1))
    place = three(0) * 2 + three(RGB.width - 1) + three(RGB.height - 1) + three(100) + b"\0"
    body = b"WEBP" + canvas + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", place + frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body


# --- paths that lead out ---


def outside(made: Workspace) -> set[str]:
    """Every file of the workspace's folder, its root and sources apart."""
    left = {made.root, made.folder / "source"}
    return {str(p) for p in made.folder.rglob("*") if p.is_file() and not left & set(p.parents)}


def write_here(pipeline: Pipeline) -> list[str]:
    """Writes every hybrid shard in this process; returns what is wrong with them."""
    for plan in write_plans(Snapshot(pipeline), Snapshot(pipeline).shards):
        splice.write_shard(pipeline.layout, plan)
    output_folder.write_sizes(pipeline.layout)
    return prove(pipeline, Talk(quiet=True)).problems


def test_names_that_lead_out_write_nothing_outside(workspace: Make) -> None:
    made = workspace({}, stages="")
    names = ["../../x", "/tmp/absolute", "a/../../../y", "..", "-rf", "~", "$(touch z)"]
    (made.folder / "source").mkdir()
    written(made.folder / "source/a.tar", *(sample(name) for name in names), END)
    before = outside(made)
    pipeline = made.load()
    ingest_here(pipeline)
    assert [key for (key,) in made.rows("select key from samples order by row")] == [n for n in names if n != ".."]
    assert write_here(pipeline) == []
    assert ask("show", "a:0", "--save", str(made.root / "saved"), "--pipeline", str(made.file)).exit_code == 0
    assert outside(made) == before
    assert [p.name for p in (made.root / "saved").iterdir()] == ["a-000000-source.jpg"]
    assert (made.root / "shards/a.tar").read_bytes() == (made.folder / "source/a.tar").read_bytes()


UNUSABLE = {
    ".tar": "it has no name in front of '.tar'",
    "..tar": "it has no name in front of '.tar'",
    "...tar": "it has no name in front of '.tar'",
    "a.tmp.tar": "names that end in '.tmp' are those of temp files, which no listing shows",
    "a\nb.tar": "it contains a control character, a backslash or bytes that are not UTF-8",
    "a\x1b[2J.tar": "it contains a control character, a backslash or bytes that are not UTF-8",
    "a\udcff.tar": "it contains a control character, a backslash or bytes that are not UTF-8",
    "a\\b.tar": "it contains a control character, a backslash or bytes that are not UTF-8",
    "x" * 245 + ".tar": "it has 245 bytes, the limit is 244",
}


def test_shards_whose_names_cannot_be_used_are_refused_and_the_others_go_on(workspace: Make) -> None:
    made = workspace({"good": samples(2), "x" * MAX_SHARD_NAME: samples(1, start=2)}, stages="")
    whole = (made.folder / "source/good.tar").read_bytes()
    for name in UNUSABLE:
        written(made.folder / "source" / name, whole)
    before = outside(made)
    patterns = [
        f"{made.folder}/source/*.tar",
        *(f"{made.folder}/source/{name}" for name in (".tar", "..tar", "...tar")),
    ]
    sets = f"dataset.shards={json.dumps(patterns)}"
    done = ask("ingest", "--pipeline", str(made.file), "--set", sets)
    assert done.exit_code == 3
    assert harmless(done.stdout + done.stderr)
    assert write_here(made.load(sets)) == []
    for name, fault in UNUSABLE.items():
        shown = plain(name)
        told = f"the shard's name cannot be used: {fault}\n  file: {made.folder}/source/{shown}\n"
        assert told in done.stderr, name
    assert sorted(p.name for p in (made.root / "shards").glob("*.tar")) == ["good.tar", "x" * MAX_SHARD_NAME + ".tar"]
    assert made.rows("select count(*) from samples") == [(3,)]
    assert outside(made) == before
    assert [p.name for p in made.root.iterdir() if p.is_file()] == []


def test_a_folder_that_is_not_utf8_is_told() -> None:
    assert shard_name_fault("0", Path("/data/caf\udce9/0.tar")) == "the name of a folder above it is not UTF-8"
    assert shard_name_fault("0*", Path("/data/café [1]/0*.tar")) == ""


@pytest.mark.parametrize("folder", ["out", "run [1]/k=v/out*"])
def test_shards_named_like_patterns_are_those_shards_alone(workspace: Make, folder: str) -> None:
    names = ["a", "b", "a*", "[ab]", "?", "[!a]", "{a,b}", "'", '"', "a=b"]
    made = workspace({name: samples(2, start=2 * i) for i, name in enumerate(names)}, stages="")
    root = made.folder / folder
    pipeline = made.load(f"dataset.root={root}")
    ingest_here(pipeline)
    question = Sql("select shard, count(*) from samples group by 1", "test")
    assert dict(answer(pipeline, question, {})[1]) == dict.fromkeys(names, 2)
    assert write_here(pipeline) == []
    for name in names:
        assert (root / f"shards/{name}.tar").read_bytes() == (made.folder / f"source/{name}.tar").read_bytes()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret.tar", "../../etc/passwd", "edits/../../secret.tar", "edits/a/../../../secret.tar",
     "edits/a/../secret.tar", "edits//secret.tar", "secret.tar", "columns/a/x.tar", "edits/a/b/c.tar", "edits/a/x.jpg",
     "", "edits/..", "./edits/a/x.tar", "edits/a/x\0.tar", "edits/a\0b/x.tar", "edits/a/\ud800.tar"],
)  # fmt: skip
def test_pointers_that_leave_the_edits_folder_are_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "edits/a").mkdir(parents=True)
    for place in (tmp_path / "secret.tar", root / "secret.tar", root / "edits/secret.tar", root / "edits/a/x.jpg"):
        place.write_bytes(b"secret")
    with EditsReader(Layout(root)) as reader, pytest.raises(ShardError) as caught:
        reader.read(path, 0, 6)
    assert str(caught.value) == (
        "an image pointer leads out of the edits folder of the root\n"
        f"  edits tar: {path}\n"
        "  fix: leave that row out of the write SQL: it names a file that no stage has made"
    )


@pytest.mark.parametrize(("offset", "size"), [(0, 60 * 10**9), (-1, 4), (0, -1), (2**62, 2**62), (7, 100_000)])
def test_pointers_beyond_their_tar_are_refused_without_memory(tmp_path: Path, offset: int, size: int) -> None:
    with EditsTar(Layout(tmp_path), "a", "20260101T000000-generate-0a1b-2c3d4e", 0) as made:
        pointer = made.add("0.jpg", JPG)
        made.close()
    with EditsReader(Layout(tmp_path)) as reader:
        assert reader.read(pointer.path, pointer.offset, pointer.size) == JPG
        with pytest.raises(ShardError) as caught:
            reader.read(pointer.path, offset, size)
    length = (tmp_path / pointer.path).stat().st_size
    assert caught.value.what == f"the file ends at byte {length}, inside a range that goes to {offset + size}"
    assert caught.value.fix == "generate its rows again: builder stage generate --redo"


def test_a_fifo_as_an_edits_tar_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "edits/a").mkdir(parents=True)
    os.mkfifo(tmp_path / "edits/a/0.tar")
    with EditsReader(Layout(tmp_path)) as reader:
        for look in (lambda: reader.read("edits/a/0.tar", 0, 5), lambda: reader.located("edits/a/0.tar")):
            with pytest.raises(ShardError, match="is not a plain file"):
                look()


IMAGE_COLUMNS = (
    "select shard, row, uid, {path} as image_path, 0 as image_offset, {size} as image_size, 1 as image_width, "
    "1 as image_height, 'x' as image_sha256, 'p' as image_prompt, 'p' as prompt from samples where row = 0"
)


def test_a_write_sql_that_points_outside_writes_nothing(workspace: Make) -> None:
    made = workspace({"a": samples(2), "b": samples(2, start=2)}, stages="")
    ingest_here(made.load())
    sql = made.folder / "write.sql"
    sql.write_text(IMAGE_COLUMNS.format(path="'../../../../../etc/passwd'", size=10) + " and shard = 'a'")
    outcome = run_write(made.load(f"write.select={sql}"), Talk(quiet=True))
    assert list(outcome.refused) == ["a"]
    assert outcome.refused["a"].startswith("an image pointer leads out of the edits folder of the root\n")
    assert [p.name for p in (made.root / "shards").glob("*.tar")] == ["b.tar"]
    sql.write_text(IMAGE_COLUMNS.format(path="'edits/a/0.tar'", size="null"))
    with pytest.raises(ConfigError, match="an image has no image_offset or no image_size"):
        run_write(made.load(f"write.select={sql}"), Talk(quiet=True))


# --- names that an edit must keep ---


@pytest.mark.parametrize(
    "key", ["a\0b", "a\nb", "\x1b[31m", "é" * 60, "x" * 97, "../up", "/abs", "a" * 300, "-", "'; select 1"]
)
def test_edited_samples_of_odd_names_are_read_by_others_under_that_name(workspace: Make, key: str) -> None:
    made = workspace({}, stages="")
    (made.folder / "source").mkdir()
    path = written(made.folder / "source/a.tar", path_of(f"{key}.png"), record(b"x", JPG), sample("1"), END)
    ingest_here(made.load())
    sql = made.folder / "write.sql"
    sql.write_text("select shard, row, uid, 'new' as caption from samples")
    pipeline = made.load(f"write.select={sql}", "write.json=true")
    assert write_here(pipeline) == []
    hybrid = by_builder(made.root / "shards/a.tar")
    assert [(k, list(members)) for k, members in hybrid] == [
        (key, ["png", "json"]),
        ("1", ["jpg", "txt", "json"]),
    ]
    assert hybrid == by_webdataset(made.root / "shards/a.tar")
    assert by_builder(path)[0] == (key, {"png": JPG})


# --- terminals ---


def harmless(shown: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in shown)


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_no_command_prints_what_a_terminal_would_obey(workspace: Make) -> None:
    key = "\x1b[31mkey\x07\x9b2J\u202e"
    stages = '[stages.faces]\nsource = "json"'
    made = workspace({"a": [Sample(key, NASTY, fields={"url": NASTY, "uid": NASTY}), Sample("1")]}, stages=stages)
    written(made.folder / "source/bad.tar", path_of(f"{NASTY}\n  fix: x", pax_record(b"size", b"9" * 9)), record(b"x"))
    written(made.folder / f"source/{key}.tar", b"no tar")
    written(made.folder / "source/scattered.tar", sample(key), sample("1"), record(key.encode() + b".json", b"{}"), END)
    link = header(f"{key}.jpg".encode(), kind=b"2")
    written(made.folder / "source/link.tar", link, record(f"{key}.png".encode(), b"\x1b[31m"), END)
    pipeline = ("--pipeline", str(made.file))
    commands = [
        ("ingest",), ("status",), ("plan",), ("stage", "faces"), ("status",), ("write",), ("verify",),
        ("sql", "select * from samples"), ("sql", f"select key as \"{key}\" from samples"),
        ("sql", "select cast(caption as int) from samples"), ("sql", f"select '{NASTY}' from {key}"),
        ("sql", "select 1", "--param", f"{key}=1"), ("sql", f"{key}.sql"), ("show", NASTY), ("show", "a:0"),
        ("show", f"{key}"), ("plan", "--where", f"key = '{key}'"), ("stage", key), ("drop", key), ("fold",),
        ("gc", "--dry-run"), ("show", "a:0", "--save", str(made.folder / key)), (f"--{key}",), (key,), ("show",),
        ("sql", "select 1", f"--{key}"), ("stage", "faces", "--retry", key), ("stage", "faces", "--where", key),
        ("ingest", "--set", f"{key}=1"), ("ingest", "--set", f'dataset.name="{key}"'),
        ("plan", "--set", f"dataset.shards={made.folder}/{key}/*.tar"), ("init", str(made.folder / f"new{key}")),
    ]  # fmt: skip
    said = {}
    for command in commands:
        more = () if command[0] == "init" else pipeline
        done = ask(*command, *more)
        said[command] = done.stdout + done.stderr
        assert harmless(said[command]), (command, said[command])
        assert "Traceback" not in done.stderr, (command, done.stderr)
        if command in (("status",), ("sql", "select * from samples"), ("show", "a:0"), ("show", key)):
            done = ask(*command, "--json", *more)
            assert harmless(done.stdout + done.stderr), command
            assert json.loads(done.stdout) is not None
    assert "\\x1b[31mred" in said["ingest",]  # the message has the name, as escapes
    assert "\n  fix: x" not in said["ingest",]
    logs = "".join(path.read_text() for path in made.root.glob("runs/*/logs/*.log"))
    assert harmless(logs)


def test_an_error_that_nobody_foresaw_is_printed_as_text(workspace: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = workspace({"a": samples(1)}, stages="")

    def fail(*_: object) -> None:
        raise RuntimeError(f"caption {NASTY}")

    monkeypatch.setattr(status, "read_status", fail)
    done = ask("status", "--pipeline", str(made.file))
    assert done.exit_code == 1
    assert harmless(done.stderr)
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert "RuntimeError: caption \\x1b[31mred" in done.stderr


def test_csv_is_data_in_a_pipe_and_text_on_a_terminal(workspace: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = workspace({"a": [Sample("0", NASTY)]}, stages="")
    ingest_here(made.load())
    question = ("sql", "select caption from samples", "--csv", "--pipeline", str(made.file))
    assert NASTY in ask(*question).stdout
    at_terminal, own = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "builder", *question], stdout=own, stderr=own, stdin=subprocess.DEVNULL, timeout=100
        )
        shown = os.read(at_terminal, 65536).decode()
    finally:
        os.close(own)
        os.close(at_terminal)
    assert done.returncode == 0
    assert harmless(shown.replace("\r\n", "\n"))
    assert "\\x1b[31mred" in shown


# --- the harness ---


def test_the_harness_tells_what_is_good_refused_and_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shard(tmp_path / "good.tar", samples(2))
    (tmp_path / "in").mkdir()
    written(tmp_path / "in/cut.tar", TWO[:700])
    written(tmp_path / "in/note.txt", b"neither")
    good = hostile.outcome_of("tar", tmp_path / "good.tar")
    assert (good.kind, good.reason, good.counts) == ("proven", "", {"ok": 5, "failed": 0, "compared": 2})
    assert hostile.outcome_of("image", written(tmp_path / "a.jpg", JPG)).kind == "decoded"
    refused = hostile.outcome_of("image", written(tmp_path / "b.jpg", JPG[:20]))
    assert (refused.kind, refused.reason[:28]) == ("refused", "the picture does not decode:")
    assert hostile.main([str(tmp_path / "in")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:4] == [
        "refused  cut.tar: the shard is truncated: member '0.jpg' ends at byte 1623, the file at 700",
        "tars: 1 shards, 0 proven, 1 refused",
        "samples: 0 ok, swapped; 0 failed; 0 as webdataset has them",
        "images: 0, 0 decoded, 0 refused",
    ]
    assert shown[4].startswith("0 crashed, 0 hung, 0 grew, 0 wrong, 0 differs; peak memory ")
    assert hostile.main([str(tmp_path / "good.tar"), "--seconds", "0.01"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "hung     good.tar: not done after 0.01 s"


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("x"), "crashed"), (MemoryError(), "grew"), (OSError(12, "Cannot allocate memory"), "grew"),
        (hostile.Wrong("verify: problems"), "wrong"),
    ],
)  # fmt: skip
def test_the_harness_names_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: str
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(hostile, "try_tar", fail)
    assert hostile.outcome_of("tar", tmp_path / "x.tar").kind == kind


def test_the_comparison_finds_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.tar", TWO, END)
    assert hostile.compared(path) == hostile.Comparison(samples=2)
    truth = by_builder(path)
    for wrong in (truth[:1], truth[::-1], [truth[0], ("1", {**truth[1][1], "txt": b"?"})], [*truth, ("2", {})]):
        monkeypatch.setattr(hostile, "by_webdataset", lambda _, wrong=wrong: wrong)
        assert len(hostile.compared(path).differs) == 1

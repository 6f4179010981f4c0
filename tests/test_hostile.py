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
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hostile
from builder import files, tar, table, verify
from builder import pipeline as pipelines
from builder.cli import main
from builder.edits import EditsReader, EditsTar
from builder.errors import BuilderError, ConfigError, ShardError
from builder.layout import MAX_SHARD_NAME, Layout, shard_name_fault
from builder.models import pictures
from builder.models.pictures import decode
from builder.progress import Talk
from builder.query import Sql
from builder.schema import IMAGE_EXTENSIONS
from builder.sources import shards as tar_shards
from builder.sources.shards import MAX_TEXT
from builder.stages.faces import Faces, FacesOptions
from conftest import STANDARD_STAGES, Sample, Workspace, ingest_here, make_shard, picture, samples, write_tar
from tars import (
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
#: The same examples in every run.
fixed = partial(settings, derandomize=True, deadline=None, database=None)


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
    "a slash behind a name": Kind([record(b"1.jpg/"), path_of("0.jpg/"), record(b"x", JPG), END], [("0", "jpg", "")], 1),
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
    "a name of 1 MB": Kind([path_of("n" * 1_000_000 + ".jpg"), record(b"x", JPG), END], [("n" * 1_000_000, "jpg", "")], 1),
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
        [pax(pax_record(b"uname", b"u" * (tar.MAX_PREFIX + 1))), ONE, END], "a header that describes the next one", None),
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
    assert all(len(error) <= tar_shards.MAX_ERROR for *_, error in got)
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
    "a sample of 30,000 members": [record(b"k.%d" % i) for i in range(30_000)],
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
        tar.index(path)
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
from builder import tar
from builder.errors import ShardError
import resource
for path in sys.argv[1:]:
    try:
        print(len(tar.index(Path(path))))
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
        key, ext = tar.split_name(member.name) or ("", "")
        if not found or found[-1][0] != key:
            found.append((key, {}))
        found[-1][1][ext.lower()] = member.data
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example writes anew."""
    return tmp_path_factory.mktemp("random") / "a.tar"


@fixed(max_examples=250)
@given(made=members())
def test_any_order_dialect_size_and_name_is_read_as_written(scratch: Path, made: list[Member]) -> None:
    path = written(scratch, tar_of(made))
    index = tar.index(path)
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


@fixed(max_examples=300)
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
        assert "no end mark" in rows[-1]["source_notes"]


@fixed(max_examples=300)
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
        index = tar.index(path)
    except ShardError as error:
        assert error.where["file"] == path
        assert not (start and start <= place < start + size)  # a flip in content is content
        return
    assert (index.data + index.size <= index.file_size).all()
    assert (index.header[1:] >= index.stop[:-1]).all()
    assert not in_header or is_checksum  # of a checksum's eight bytes some are blanks
    if in_header or not start or place >= start:
        assert {name: (head, at, n) for name, head, at, n, _ in listed(index)} == before


@fixed(max_examples=400)
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
    chain = None
    try:
        chain, walk = both_ways(path)
    except ShardError:
        with path.open("rb") as file, pytest.raises(ShardError):
            assert file.read(1)  # what the walk refuses the fast path does not read
            tar.index(path)
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

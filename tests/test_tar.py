"""Tars as blocks: what the index says of every dialect and every kind of damage, and the records that are made."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from builder.errors import ShardError
from builder.tar import blocks, head_check, indexing, member_names, record_heads
from conftest import PAX_MTIME, USTAR_MTIME, write_tar
from support.tars import (
    BLOCK,
    END,
    Listed,
    both_ways,
    checksummed,
    gnu_tar,
    header,
    listed,
    listed_by_tarfile,
    pax,
    record,
    written,
)

LONG = "folder/" * 20 + "picture.jpg"  # 151 bytes


# --- what the tests make and compare ---


def refusal(path: Path) -> str:
    """What the index of a bad tar says, the path as FILE."""
    with pytest.raises(ShardError) as caught:
        indexing.index(path)
    return str(caught.value).replace(str(path), "FILE")


# --- the dialects ---


DIALECTS: dict[str, tuple[int, float, str, Listed]] = {
    "ustar": (tarfile.USTAR_FORMAT, USTAR_MTIME, "a/0.jpg", [("a/0.jpg", 0, 512, 700, "0")]),
    "gnu": (tarfile.GNU_FORMAT, USTAR_MTIME, "0.jpg", [("0.jpg", 0, 512, 700, "0")]),
    "pax with a time": (tarfile.PAX_FORMAT, PAX_MTIME, "0.jpg", [("0.jpg", 0, 1536, 700, "0")]),
    "./": (tarfile.USTAR_FORMAT, USTAR_MTIME, "./a/0.jpg", [("./a/0.jpg", 0, 512, 700, "0")]),
    "ustar prefix": (tarfile.USTAR_FORMAT, USTAR_MTIME, LONG, [(LONG, 0, 512, 700, "0")]),
    "gnu long name": (tarfile.GNU_FORMAT, USTAR_MTIME, LONG, [(LONG, 0, 1536, 700, "0")]),
    "pax path": (tarfile.PAX_FORMAT, USTAR_MTIME, "ü" + LONG, [("ü" + LONG, 0, 1536, 700, "0")]),
    "utf-8 in ustar": (tarfile.USTAR_FORMAT, USTAR_MTIME, "日本/ü.jpg", [("日本/ü.jpg", 0, 512, 700, "0")]),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_index_of_each_dialect(tmp_path: Path, dialect: str) -> None:
    form, mtime, name, expected = DIALECTS[dialect]
    path = write_tar(tmp_path / "a.tar", [(name, b"x" * 700), ("1.txt", b"")], form=form, mtime=mtime)
    last = expected[0][2] + 1024  # 700 bytes are two blocks
    prefix = 1024 if dialect == "pax with a time" else 0
    index = indexing.index(path)
    assert listed(index) == [*expected, ("1.txt", last, last + prefix + 512, 0, "0")]
    assert listed(index) == listed_by_tarfile(path)
    assert (index.end, index.file_size) == (last + prefix + 512, 10240)
    assert (index.bad_names, index.has_end_mark) == (frozenset(), True)
    assert index.stop.tolist() == [last, last + prefix + 512]


@pytest.mark.parametrize("dialect", ["ustar", "gnu", "pax with a time", "./", "utf-8 in ustar"])
def test_common_dialects_take_the_fast_path(tmp_path: Path, dialect: str) -> None:
    form, mtime, name, _ = DIALECTS[dialect]
    path = write_tar(tmp_path / "a.tar", [(name, b"x" * 700), ("1.txt", b"")], form=form, mtime=mtime)
    chain, walk = both_ways(path)
    assert chain is not None
    assert listed(chain) == listed(walk)


@pytest.mark.parametrize("dialect", ["ustar prefix", "gnu long name", "pax path"])
def test_other_dialects_take_the_walk(tmp_path: Path, dialect: str) -> None:
    form, mtime, name, _ = DIALECTS[dialect]
    path = write_tar(tmp_path / "a.tar", [(name, b"x" * 700), ("1.txt", b"")], form=form, mtime=mtime)
    assert both_ways(path)[0] is None


# --- heads alone ---


def heads_of(path: Path) -> tuple[list[bytes], list[str], list[int]]:
    data, index = path.read_bytes(), indexing.index(path)
    return [data[a:b] for a, b in zip(index.header, index.data, strict=True)], index.names, index.size.tolist()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_heads_are_compared_in_each_dialect(tmp_path: Path, dialect: str) -> None:
    """A byte of any header block but the last of its checksum, which no reader looks at; name, size and length."""
    form, mtime, name, _ = DIALECTS[dialect]
    path = write_tar(tmp_path / "a.tar", [(name, b"x" * 700), ("1.txt", b"")], form=form, mtime=mtime)
    heads, names, sizes = heads_of(path)
    assert head_check.first_other_head(heads, names, sizes) is None
    blocks = [0, len(heads[0]) - BLOCK]
    for at in (block + byte for block in blocks for byte in range(0, BLOCK, 5) if byte != 155):
        other = bytearray(heads[0])
        other[at] ^= 0xFF
        assert head_check.first_other_head([bytes(other), heads[1]], names, sizes) == 0, at
    assert head_check.first_other_head(heads, [names[0], "1.tx"], sizes) == 1
    assert head_check.first_other_head(heads, names, [699, 0]) == 0
    assert head_check.first_other_head([heads[0][:-BLOCK], heads[1]], names, sizes) == 0
    assert head_check.first_other_head([heads[0], bytes(len(heads[1]))], names, sizes) == 1
    assert head_check.first_other_head([heads[0] + heads[1], heads[1]], names, sizes) == 0


def test_a_pax_prefix_that_says_another_name_or_size_is_another_head() -> None:
    head = header(b"0.jpg", 5)
    time_only = pax(b"22 mtime=1700000000.5\n")
    assert head_check.first_other_head([time_only + head] * 2, ["0.jpg"] * 2, [5] * 2) is None
    for prefix in (pax(b"14 path=1.jpg\n"), pax(b"11 size=700\n"), pax(b"99 mtime=1\n")):
        assert head_check.first_other_head([time_only + head, prefix + head], ["0.jpg"] * 2, [5] * 2) == 1


def test_no_heads_agree() -> None:
    assert head_check.first_other_head([], [], []) is None


def test_old_headers_without_magic(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.tar", record(b"0.jpg", b"abc", magic=b""), record(b"0.txt", b"", b"\0", magic=b""), END
    )
    assert listed(indexing.index(path)) == [("0.jpg", 0, 512, 3, "0"), ("0.txt", 1024, 1536, 0, "\0")]


def test_prefix_field_of_gnu_headers_is_no_name(tmp_path: Path) -> None:
    head = bytearray(header(b"0.jpg", magic=b"ustar  \0"))
    head[345:357] = b"14523701251\0"  # GNU tar keeps the access time there
    path = written(tmp_path / "a.tar", checksummed(head), END)
    assert indexing.index(path).names == ["0.jpg"]


@pytest.mark.parametrize("first", [b"0000000001\x007", b"\x00000000017\0", b"   17\0     ", b"17          "])
def test_numbers_end_at_the_first_nul_on_both_ways(tmp_path: Path, first: bytes) -> None:
    size = {b"0000000001\x007": 1, b"\x00000000017\0": 0}.get(first, 0o17)
    data = b"x" * size + bytes(-size % BLOCK)
    path = written(tmp_path / "a.tar", header(b"0.jpg", first), data, header(b"0.txt"), END)
    chain, walk = both_ways(path)
    assert chain is None or listed(chain) == listed(walk)
    assert walk.size.tolist() == [size, 0]
    assert listed(walk) == listed_by_tarfile(path)


def test_signed_checksums_of_old_tars(tmp_path: Path) -> None:
    head = bytearray(header("é.jpg".encode()))
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 256 - 256 * 2)
    path = written(tmp_path / "a.tar", bytes(head), END)
    assert both_ways(path)[0] is None
    assert indexing.index(path).names == ["é.jpg"]


def test_base_256_size(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", header(b"0.jpg", b"\x80" + (700).to_bytes(11, "big")), bytes(1024), END)
    assert listed(indexing.index(path)) == [("0.jpg", 0, 512, 700, "0")] == listed_by_tarfile(path)


def test_pax_size_wins_over_the_header(tmp_path: Path) -> None:
    parts = (pax(b"12 size=700\n"), header(b"0.jpg", 0), bytes(1024), record(b"0.txt", b"ab"), END)
    path = written(tmp_path / "a.tar", *parts)
    assert (
        listed(indexing.index(path))
        == [("0.jpg", 0, 1536, 700, "0"), ("0.txt", 2560, 3072, 2, "0")]
        == listed_by_tarfile(path)
    )


def test_pax_values_may_hold_newlines(tmp_path: Path) -> None:
    hidden = b"28 uname=a\n14 path=b.txt\nxx\n"
    path = written(tmp_path / "a.tar", pax(hidden), record(b"0.jpg"), END)
    assert both_ways(path)[0] is None
    assert indexing.index(path).names == ["0.jpg"]


def test_owner_and_times_in_pax_take_the_fast_path(tmp_path: Path) -> None:
    body = b"22 mtime=1700000000.5\n", b"9 gid=22\n", b"13 uname=abc\n"
    path = written(tmp_path / "a.tar", pax(*body), record(b"0.jpg"), END)
    chain, walk = both_ways(path)
    assert chain is not None
    assert listed(chain) == listed(walk) == [("0.jpg", 0, 1536, 0, "0")]


def test_global_pax_header_belongs_to_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by hand"}) as archive:
        archive.addfile(tarfile.TarInfo("0.jpg"))
        archive.addfile(tarfile.TarInfo("1.jpg"))
    assert listed(indexing.index(path)) == [("0.jpg", 1024, 1536, 0, "0"), ("1.jpg", 1536, 2048, 0, "0")]


def test_global_pax_size_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", record(b"0.jpg"), pax(b"12 size=700\n", kind=b"g"), record(b"1.jpg"), END)
    assert refusal(path) == (
        "a global pax header declares one size for all members\n"
        "  file: FILE\n  offset: 512\n  fix: make the shard again"
    )


def test_every_kind_of_member(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    kinds = [
        ("d", tarfile.DIRTYPE), ("0.jpg", tarfile.REGTYPE), ("hard.jpg", tarfile.LNKTYPE),
        ("soft.jpg", tarfile.SYMTYPE), ("tty", tarfile.CHRTYPE), ("disk", tarfile.BLKTYPE), ("pipe", tarfile.FIFOTYPE),
        ("1.jpg", tarfile.CONTTYPE),
    ]  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, kind in kinds:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            info.size = 600 if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    assert listed(indexing.index(path)) == [
        ("d/", 0, 512, 0, "5"), ("0.jpg", 512, 1024, 600, "0"), ("hard.jpg", 2048, 2560, 0, "1"),
        ("soft.jpg", 2560, 3072, 0, "2"), ("tty", 3072, 3584, 0, "3"), ("disk", 3584, 4096, 0, "4"),
        ("pipe", 4096, 4608, 0, "6"), ("1.jpg", 4608, 5120, 600, "7"),
    ]  # fmt: skip
    assert [(name.rstrip("/"), *rest) for name, *rest in listed(indexing.index(path))] == [
        tuple(row) for row in listed_by_tarfile(path)
    ]


def test_links_and_folders_have_no_content_whatever_they_declare(tmp_path: Path) -> None:
    parts = [header(name, 700, kind) for name, kind in ((b"a/", b"5"), (b"b.jpg", b"1"), (b"c.jpg", b"2"))]
    path = written(tmp_path / "a.tar", *parts, record(b"d.jpg", b"abc"), END)
    assert listed(indexing.index(path)) == [
        ("a/", 0, 512, 0, "5"),
        ("b.jpg", 512, 1024, 0, "1"),
        ("c.jpg", 1024, 1536, 0, "2"),
        ("d.jpg", 1536, 2048, 3, "0"),
    ]


def test_name_that_ends_in_a_slash_is_a_folder(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", record(b"a.jpg/"), record(b"b.jpg/", kind=b"\0"), record(b"c.jpg"), END)
    assert [(row[0], row[4]) for row in listed(indexing.index(path))] == [
        ("a.jpg/", "5"),
        ("b.jpg/", "5"),
        ("c.jpg", "0"),
    ]


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files(tmp_path: Path, form: str) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        for place in range(8):  # more pieces than a header has room for
            file.seek(place * 400_000)
            file.write(b"piece")
        file.truncate(4_000_000)
    (tmp_path / "after.jpg").write_bytes(b"after")
    gnu_tar("--sparse", f"--format={form}", "-cf", "a.tar", "holes.jpg", "after.jpg", folder=tmp_path)
    assert (tmp_path / "a.tar").stat().st_size < 200_000
    index = indexing.index(tmp_path / "a.tar")
    assert [(name, kind) for name, _, _, _, kind in listed(index)] == [("holes.jpg", "S"), ("after.jpg", "0")]
    content = (tmp_path / "a.tar").read_bytes()
    assert content[int(index.data[1]) : int(index.data[1] + index.size[1])] == b"after"


def test_names_that_are_not_utf8_are_marked(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", record(b"caf\xe9.jpg"), record("café.jpg".encode()), END)
    index = indexing.index(path)
    assert (index.names, index.bad_names) == (["caf\\xe9.jpg", "café.jpg"], frozenset({0}))


def test_tar_inside_an_image_is_not_looked_into(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", [("x.jpg", b"inner"), ("y.jpg", b"inner")], mtime=USTAR_MTIME)
    members = [("0.jpg", inner.read_bytes()), ("0.txt", b"text")]
    path = write_tar(tmp_path / "a.tar", members, mtime=USTAR_MTIME)
    assert both_ways(path)[0] is None
    assert listed(indexing.index(path)) == [("0.jpg", 0, 512, 10240, "0"), ("0.txt", 10752, 11264, 4, "0")]


def test_name_like_a_compressed_file_is_no_compression(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("BZh91AY.jpg", b"picture")], form=tarfile.USTAR_FORMAT, mtime=USTAR_MTIME)
    assert path.read_bytes()[:3] == b"BZh"
    assert indexing.index(path).names == ["BZh91AY.jpg"]


def test_archive_of_nothing(tmp_path: Path) -> None:
    index = indexing.index(write_tar(tmp_path / "a.tar", []))
    assert (listed(index), index.end, index.file_size, index.has_end_mark) == ([], 0, 10240, True)


def test_missing_end_marks(tmp_path: Path) -> None:
    whole = record(b"0.jpg", b"abc") + record(b"0.txt", b"text")
    index = indexing.index(written(tmp_path / "a.tar", whole))
    assert listed(index) == [("0.jpg", 0, 512, 3, "0"), ("0.txt", 1024, 1536, 4, "0")]
    assert (index.end, index.file_size, index.has_end_mark) == (2048, 2048, False)
    assert indexing.index(written(tmp_path / "b.tar", whole, END[:512])).has_end_mark
    ragged = indexing.index(written(tmp_path / "c.tar", whole, bytes(100)))
    assert (ragged.names, ragged.end, ragged.file_size, ragged.has_end_mark) == (["0.jpg", "0.txt"], 2048, 2148, False)


# --- properties ---


COMPONENT = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
PATH = st.lists(COMPONENT, min_size=1, max_size=30).map("/".join)
NAME = st.one_of(
    st.builds("{:08d}.{}".format, st.integers(0, 99_999_999), st.sampled_from(["jpg", "json", "txt"])),
    st.builds("{}{}".format, st.sampled_from(["", "./", "../"]), PATH),
    st.text("abcdef", min_size=90, max_size=115),
)
MEMBERS = st.lists(st.tuples(NAME, st.integers(0, 2000)), max_size=8)
FORMS = st.sampled_from(
    [
        (tarfile.USTAR_FORMAT, USTAR_MTIME),
        (tarfile.GNU_FORMAT, USTAR_MTIME),
        (tarfile.PAX_FORMAT, USTAR_MTIME),
        (tarfile.PAX_FORMAT, PAX_MTIME),
    ]
)


def made(path: Path, members: Sequence[tuple[str, int]], form: tuple[int, float]) -> Path | None:
    """Writes a tar of members of these sizes; None where the format has no room for a name."""
    try:
        content = [(name, bytes([i + 1]) * size) for i, (name, size) in enumerate(members)]
        return write_tar(path, content, form=form[0], mtime=form[1])
    except ValueError:
        return None


@settings(max_examples=150, deadline=None)
@given(members=MEMBERS, form=FORMS)
def test_both_ways_and_tarfile_agree(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int]], form: tuple[int, float]
) -> None:
    path = made(tmp_path_factory.getbasetemp() / "agree.tar", members, form)
    if path is None:
        return
    chain, walk = both_ways(path)
    assert listed(walk) == listed_by_tarfile(path)
    assert [row[0] for row in listed(walk)] == [name for name, _ in members]
    if chain is not None:
        assert (listed(chain), chain.end, chain.file_size) == (listed(walk), walk.end, walk.file_size)
        assert chain.bad_names == walk.bad_names == frozenset()
    is_plain = all(len(name.encode()) <= 100 and "\n" not in name for name, _ in members)
    if members and is_plain and (form[0] != tarfile.PAX_FORMAT or all(name.isascii() for name, _ in members)):
        assert chain is not None


@settings(max_examples=200, deadline=None)
@given(members=MEMBERS, form=FORMS, data=st.data())
def test_cut_anywhere_it_is_refused_or_whole_up_to_the_cut(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, int]],
    form: tuple[int, float],
    data: st.DataObject,
) -> None:
    path = made(tmp_path_factory.getbasetemp() / "cut.tar", members, form)
    if path is None:
        return
    whole, content = indexing.index(path), path.read_bytes()
    at_edges = st.sampled_from([*whole.header.tolist(), *whole.data.tolist(), *whole.stop.tolist(), whole.end, 1])
    cut = data.draw(st.one_of(st.integers(1, len(content)), at_edges).filter(bool))
    path.write_bytes(content[:cut])
    try:
        part = indexing.index(path)
    except ShardError as error:
        assert cut < whole.end + (BLOCK if whole.end == 0 else 0)
        assert error.where["file"] == path
        assert error.fix
        return
    assert listed(part) == listed(whole)[: len(part)]
    assert part.end == (int(part.stop[-1]) if len(part) else 0)
    assert part.end <= cut
    if cut < whole.end:
        assert cut == part.end  # between two records: nothing tells it but the end mark that is not there
        assert not part.has_end_mark


@settings(max_examples=300, deadline=None)
@given(
    members=st.lists(st.tuples(NAME, st.integers(0, 600)), min_size=1, max_size=3),
    form=FORMS,
    damage=st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=3),
    repair=st.booleans(),
)
def test_damaged_bytes_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, int]],
    form: tuple[int, float],
    damage: list[tuple[int, bytes]],
    repair: bool,
) -> None:
    path = made(tmp_path_factory.getbasetemp() / "damaged.tar", members, form)
    if path is None:
        return
    content = bytearray(path.read_bytes())
    for at, junk in damage:
        content[at : at + len(junk)] = junk
        if repair:  # the damage is in what the header says, not in its bytes
            block = at // BLOCK * BLOCK
            content[block : block + BLOCK] = checksummed(content[block : block + BLOCK])
    path.write_bytes(content)
    try:
        index = indexing.index(path)
    except ShardError as error:
        assert error.where["file"] == path
        return
    chain, walk = both_ways(path)
    assert listed(index) == listed(walk)
    assert chain is None or listed(chain) == listed(walk)
    assert (index.header[1:] >= index.stop[:-1]).all()
    assert (index.data + index.size <= index.file_size).all()


WORDS = st.text(st.sampled_from("ab.__/-é日"), max_size=14)


@settings(max_examples=1000, deadline=None)
@given(WORDS)
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    skipped = name.startswith("__") and "__" in name[2:].split("/")[0]
    expected = None if base_plus_ext(name) == (None, None) else base_plus_ext(name)
    if not skipped:
        assert member_names.split_name(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.jpg", ("0", "jpg")),
        ("a.b/0.seg.png", ("a.b/0", "seg.png")),
        ("./0.jpg", ("./0", "jpg")),
        ("a/.hidden", ("a/", "hidden")),
        ("a/0.", ("a/0", "")),
        ("./.hidden", None),
        (".hidden", None),
        ("a.b/.hidden", None),
        ("a.jpg/0", None),
        ("README", None),
        ("", None),
        ("__meta__.json", ("__meta__", "json")),
        ("__meta.x__", None),
        ("__meta__/0.jpg", None),
        ("a/__meta.x__", ("a/__meta", "x__")),
    ],
)
def test_split_name(name: str, expected: tuple[str, str] | None) -> None:
    assert member_names.split_name(name) == expected


# --- what is refused, and how it reads ---


def test_empty_file(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.tar")) == (
        "the shard is empty (0 bytes)\n  file: FILE\n  fix: download or make it again"
    )


@pytest.mark.parametrize("name", ["my shard.tar", "my shard.tar.gz"])
def test_compressed_tar_and_that_its_fix_works(tmp_path: Path, name: str) -> None:
    plain = write_tar(tmp_path / "plain", [("0.jpg", b"x" * 3000)])
    path = written(tmp_path / name, gzip.compress(plain.read_bytes(), mtime=0))
    said = refusal(path)
    packed, out = f"'{tmp_path}/my shard.tar.gz'", f"'{tmp_path}/my shard.tar'"
    rename = f"mv {out} {packed} && " if name.endswith(".tar") else ""
    assert said.replace("FILE", str(path)) == (
        "the shard is compressed with gzip: byte offsets into it would mean nothing\n"
        f"  file: {path}\n"
        f"  fix: {rename}gunzip < {packed} > {out}, and name that file in dataset.shards"
    )
    command = said.replace("FILE", str(path)).partition("fix: ")[2].partition(", and")[0]
    subprocess.run(command, shell=True, check=True)
    assert indexing.index(tmp_path / "my shard.tar").names == ["0.jpg"]


@pytest.mark.parametrize(
    ("name", "tool", "content"),
    [
        ("gzip", "gunzip", gzip.compress(END, mtime=0)),
        ("bzip2", "bunzip2", bz2.compress(END)),
        ("xz", "unxz", lzma.compress(END)),
        ("zstd", "unzstd", b"\x28\xb5\x2f\xfd" + bytes(600)),
        ("lz4", "unlz4", b"\x04\x22\x4d\x18" + bytes(20)),
    ],
)
def test_every_compression_is_named(tmp_path: Path, name: str, tool: str, content: bytes) -> None:
    path = written(tmp_path / "a.tgz", content)
    with pytest.raises(ShardError) as caught:
        indexing.index(path)
    given, made = (shlex.quote(str(tmp_path / name)) for name in ("a.tgz", "a.tar"))
    assert str(caught.value) == (
        f"the shard is compressed with {name}: byte offsets into it would mean nothing\n"
        f"  file: {path}\n"
        f"  fix: {tool} < {given} > {made}, and name that file in dataset.shards"
    )


def test_no_tar_at_all(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.tar", b"no such file\n" * 80)) == (
        "the shard is not a tar: it does not begin with a tar header\n"
        "  file: FILE\n"
        "  bytes: 1040\n"
        "  fix: the file is damaged or not a tar: take it out of dataset.shards, or download or make it again"
    )
    for content in (b"x", bytes(100), b"{a}.jpg", b"[0].jpg" + bytes(100)):
        assert refusal(written(tmp_path / "a.tar", content)) == (
            f"the shard is truncated: it ends at byte {len(content)}, inside a block\n"
            f"  file: FILE\n  offset: 0\n  fix: download or make it again"
        )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("size", [0, 2000])
@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (POINTER, "a git-lfs pointer", "git lfs pull"),
        (b'{"count": 1}', "json", "take it out of dataset.shards"),
        (b'\xef\xbb\xbf [{"count": 1}]', "json", "take it out of dataset.shards"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page", "a server sent it"),
        (b'<?xml version="1.0"?><Error>', "XML", "a server sent it"),
        (b"PAR1\x15\4", "a parquet file", "take it out of dataset.shards"),
        (b"PK\3\4\x14", "a zip archive", "take it out of dataset.shards"),
        (b"\xff\xd8\xff\xe0", "a JPEG picture", "take it out of dataset.shards"),
        (b"\x93NUMPY\1\0v\0" + b" " * 118, "a NumPy array", "take it out of dataset.shards"),
    ],
)
def test_what_lies_among_shards_is_told_as_what_it_is(
    tmp_path: Path, content: bytes, what: str, fix: str, size: int
) -> None:
    said = refusal(written(tmp_path / "a.tar", content.ljust(size, b" ")))
    assert said.startswith(f"the shard is not a tar: it is {what}")
    assert f"  fix: {fix}" in said


def test_a_damaged_first_header_is_no_other_file(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", [("{a}.jpg", b"x")], form=tarfile.USTAR_FORMAT).read_bytes()
    damaged = written(tmp_path / "a.tar", whole[:130] + b"7" + whole[131:])
    assert refusal(damaged).startswith("no tar header at byte 0: its checksum is wrong")


def test_damaged_header(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.txt", b"y")], mtime=USTAR_MTIME)
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 1
    assert refusal(written(path, content)) == (
        "no tar header at byte 1024: its checksum is wrong\n"
        "  file: FILE\n"
        "  offset: 1024\n"
        "  fix: the shard is damaged or not a tar: download or make it again"
    )


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000001\0", b"0x000000001\0", b"00000000008\0"])
def test_size_that_is_no_number(tmp_path: Path, size: bytes) -> None:
    assert refusal(written(tmp_path / "a.tar", header(b"0.jpg", size), END)) == (
        "the tar header at byte 0 declares a size that is not a number\n"
        "  file: FILE\n  offset: 0\n  fix: make the shard again"
    )


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (100, "it ends at byte 100, inside a block\n  file: FILE\n  offset: 0"),
        (520, "a header that describes the next one ends at byte 534, the file at 520\n  file: FILE\n  offset: 0"),
        (700, "it ends after a header that only describes the next one\n  file: FILE\n  offset: 0"),
        (1024, "it ends after a header that only describes the next one\n  file: FILE\n  offset: 0"),
        (1300, "it ends after a header that only describes the next one\n  file: FILE\n  offset: 0"),
        (1536, "member '0.jpg' ends at byte 1836, the file at 1536\n  file: FILE\n  offset: 0"),
        (1835, "member '0.jpg' ends at byte 1836, the file at 1835\n  file: FILE\n  offset: 0"),
        (1836, "it ends at byte 1836, inside a block\n  file: FILE\n  offset: 1536"),
        (2100, "it ends at byte 2100, inside a block\n  file: FILE\n  offset: 2048"),
        (3584, "member '0.txt' ends at byte 3588, the file at 3584\n  file: FILE\n  offset: 2048"),
    ],
)
def test_truncated(tmp_path: Path, cut: int, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x" * 300), ("0.txt", b"text")])
    written(path, path.read_bytes()[:cut])
    assert refusal(path) == f"the shard is truncated: {message}\n  fix: download or make it again"


def test_huge_pax_header(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "a.tar", header(b"PaxHeader", 2 << 20, b"x"), bytes(3 << 20))) == (
        "a header that describes the next one declares 2097152 bytes, the limit is 1048576\n"
        "  file: FILE\n"
        "  offset: 0\n"
        "  fix: the shard is damaged: download or make it again"
    )


@pytest.mark.parametrize("way", ["base-256", "pax"])
def test_60_gb_declared_in_5_kb(tmp_path: Path, way: str) -> None:
    size = 60 * 10**9
    if way == "pax":
        head = pax(b"20 size=60000000000\n") + header(b"0.jpg")
    else:
        head = header(b"0.jpg", b"\x80" + size.to_bytes(11, "big"))
    started = time.process_time()
    said = refusal(written(tmp_path / "a.tar", head, bytes(5120 - len(head))))
    assert said == (
        f"the shard is truncated: member '0.jpg' ends at byte {size + len(head)}, the file at 5120\n"
        f"  file: FILE\n  offset: 0\n  fix: download or make it again"
    )
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "body",
    [
        b"13 path=abc\n",  # longer than it is
        b"10 path=abc\n",  # shorter: the next record begins with a newline
        b"0 path=abc\n",
        b"x path=abc\n",
        b" path=abc\n",
        b"9 pathabc\n",
        b"path",
        b"11 path=abc!",
        b"9" * 5000 + b" path=abc\n",
        b"99 mtime=1\n",
    ],
)
def test_damaged_pax_header(tmp_path: Path, body: bytes) -> None:
    path = written(tmp_path / "a.tar", record(b"0.txt"), pax(body), record(b"0.jpg"), END)
    assert refusal(path) == (
        "a pax header is damaged\n  file: FILE\n  offset: 512\n  fix: download or make the shard again"
    )


def test_pax_header_of_200000_records_is_read_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", pax(b"5 a=\n" * 200_000), record(b"0.jpg"), END)
    started = time.process_time()
    assert indexing.index(path).names == ["0.jpg"]
    assert time.process_time() - started < 5


def test_pax_size_that_is_no_number(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", pax(b"11 size=-1\n"), record(b"0.jpg"), END)
    assert refusal(path) == (
        "a pax header declares the size '-1'\n  file: FILE\n  offset: 0\n  fix: make the shard again"
    )


def test_two_tars_in_one_file(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", [("0.jpg", b"x")], mtime=USTAR_MTIME).read_bytes()
    assert refusal(written(tmp_path / "a.tar", one, one)) == (
        "zeros end the archive at byte 1024, but more data begins at byte 10240: most readers skip it\n"
        "  file: FILE\n"
        "  offset: 1024\n"
        "  fix: if the file contains two tars, split it; if not, make the shard again"
    )


def test_zeros_in_the_middle(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", record(b"0.jpg", b"x"), bytes(512), record(b"1.jpg", b"x"), END)
    assert refusal(path) == (
        "zeros end the archive at byte 1024, but more data begins at byte 1536: most readers skip it\n"
        "  file: FILE\n"
        "  offset: 1024\n"
        "  fix: if the file contains two tars, split it; if not, make the shard again"
    )
    assert indexing.index(written(tmp_path / "b.tar", record(b"0.jpg", b"x"), bytes(1536))).names == ["0.jpg"]


# --- records that are made ---


def archive_of(*records: bytes) -> bytes:
    content = b"".join(records)
    return content + blocks.end_of_archive(len(content))


@pytest.mark.parametrize(
    "name", ["0.jpg", "./ü/日本.jpg", "a" * 100, "a" * 101, "folder-é/" * 30 + "0.jpg", "x/" * 700]
)
def test_made_records_are_read_by_others(tmp_path: Path, name: str) -> None:
    name = name.rstrip("/")
    head = record_heads.make_record_head(name, 5)
    assert len(head) == (512 if len(name.encode()) <= 100 else 1024 + -(-(len(name.encode()) + 11) // 512) * 512)
    path = written(
        tmp_path / "a.tar", archive_of(head + b"bytes" + bytes(507), record_heads.make_record_head("z.txt", 0))
    )
    assert path.stat().st_size % 10240 == 0
    with tarfile.open(path) as archive:
        first, last = archive.getmembers()
        assert (first.name, first.mode, first.mtime, first.size) == (name, 0o444, 0, 5)
        assert archive.extractfile(first).read() == b"bytes"  # type: ignore[union-attr]
        assert last.name == "z.txt"
    assert gnu_tar("--quoting-style=literal", "-tf", "a.tar", folder=tmp_path) == [name, "z.txt"]
    assert indexing.index(path).names == [name, "z.txt"]


def test_made_record_of_more_than_8_gib() -> None:
    head = record_heads.make_record_head("0.mp4", 9 * 2**30)
    assert (len(head), head[512:531]) == (1536, b"19 size=9663676416\n")
    with tarfile.open(fileobj=io.BytesIO(head), mode="r|") as archive:
        info = archive.next()
        assert info is not None
        assert (info.name, info.size) == ("0.mp4", 9 * 2**30)


@pytest.mark.parametrize("length", [0, 512, 8704, 9216, 9728, 10240])
def test_end_of_archive(length: int) -> None:
    zeros = blocks.end_of_archive(length)
    assert zeros.strip(b"\0") == b""
    assert len(zeros) == {0: 10240, 512: 9728, 8704: 1536, 9216: 1024, 9728: 10752, 10240: 10240}[length]


OLD: dict[str, tuple[int, float, str]] = {
    "ustar": (tarfile.USTAR_FORMAT, USTAR_MTIME, "0.png"),
    "ustar prefix": (tarfile.USTAR_FORMAT, USTAR_MTIME, "folder/" * 20 + "0.png"),
    "gnu": (tarfile.GNU_FORMAT, USTAR_MTIME, "0.png"),
    "gnu long name": (tarfile.GNU_FORMAT, USTAR_MTIME, "folder/" * 30 + "0.png"),
    "pax": (tarfile.PAX_FORMAT, PAX_MTIME, "0.png"),
    "pax path": (tarfile.PAX_FORMAT, PAX_MTIME, "folder-é/" * 30 + "0.png"),
}


@pytest.mark.parametrize("old", OLD)
def test_remade_record_keeps_mode_owner_and_time(tmp_path: Path, old: str) -> None:
    form, mtime, name = OLD[old]
    source = write_tar(tmp_path / "source.tar", [(name, b"p" * 600)], form=form, mtime=mtime)
    index, content = indexing.index(source), source.read_bytes()
    new = name.removesuffix("png") + "jpg"
    head = record_heads.remake_record_head(content[int(index.header[0]) : int(index.data[0])], new, 5)
    written(tmp_path / "new.tar", archive_of(head + b"bytes" + bytes(507)))

    def facts(path: Path) -> tuple[Any, ...]:
        with tarfile.open(path) as archive:
            (info,) = archive.getmembers()
            return info.name, info.size, info.mode, info.uname, info.gname, info.uid, info.gid, info.mtime, info.type

    before, after = facts(source), facts(tmp_path / "new.tar")
    assert after[:2] == (new, 5)
    assert after[2:] == before[2:] == (0o444, "bigdata", "bigdata", 0, 0, mtime, b"0")
    lines = [gnu_tar("--utc", "--quoting-style=literal", "-tvf", f, folder=tmp_path) for f in ("source.tar", "new.tar")]
    assert lines[0][0].split()[:2] == lines[1][0].split()[:2] == ["-r--r--r--", "bigdata/bigdata"]
    assert lines[0][0].split()[3:5] == lines[1][0].split()[3:5] == ["2023-11-14", "22:13"]
    assert (lines[1][0].split()[2], lines[1][0].split()[5]) == ("5", new)


def test_remade_record_of_the_same_name_and_size_is_the_same(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"12345")], form=tarfile.USTAR_FORMAT, mtime=USTAR_MTIME)
    old = path.read_bytes()[:512]
    assert record_heads.remake_record_head(old, "0.jpg", 5)[:345] == old[:345]


def test_remade_record_drops_the_old_path_and_size_and_keeps_other_records(tmp_path: Path) -> None:
    old = pax(b"22 mtime=1700000000.5\n", b"14 path=a.png\n", b"12 size=700\n", b"17 comment=hello\n") + header(b"x")
    head = record_heads.remake_record_head(old, "a.jpg", 3)
    assert head[512:1024] == b"22 mtime=1700000000.5\n17 comment=hello\n" + bytes(473)
    assert (head[1024:1029], head[1024 + 124 : 1024 + 135]) == (b"a.jpg", b"00000000003")


def test_remade_link_becomes_a_file() -> None:
    old = bytearray(header(b"0.png", kind=b"7"))
    old[157:162] = b"other"
    head = record_heads.remake_record_head(bytes(old), "0.jpg", 3)
    assert (head[156:157], head[157:257]) == (b"0", bytes(100))


AFTER: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a member": lambda: record(b"README", b"x" * 600),
    "a long name": lambda: record(b"././@LongLink", b"y" * 200, b"L") + record(b"y", b"x" * 600),
    "a size in pax": lambda: pax(b"12 size=600\n") + header(b"README") + bytes(1024),
    "links and folders": lambda: header(b"folder/", 700, b"5") + header(b"link", 700, b"2"),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("end", [b"", bytes(9000)])
def test_index_from_the_end_of_a_record(tmp_path: Path, after: str, end: bytes) -> None:
    first, rest = record(b"0.jpg", b"x" * 700), AFTER[after]()
    path = written(tmp_path / "a.tar", first, rest, end)
    with path.open("rb") as file:
        found = indexing.index_from(file.fileno(), len(first), path.stat().st_size)
    assert (found.end, found.has_end_mark) == (len(first) + len(rest), end != b"")
    assert listed(found) == listed(indexing.index(path))[1:]


def test_index_from_a_record_of_a_file_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file, pytest.raises(ShardError, match="the file ends at byte 4096, inside a range"):
        indexing.index_from(file.fileno(), 2048, 20_000)

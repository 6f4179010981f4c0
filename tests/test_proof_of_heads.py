"""The proof's own reader of pax records, and what it says of headers that the writer makes."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builder.errors import ShardError
from builder.hybrid.verify import heads, pax
from builder.tar import record_heads, walk
from conftest import replace_everywhere
from support.tars import header
from support.tars import pax as pax_header

ODD: dict[str, tuple[bytes, list[tuple[bytes, bytes]]]] = {
    "nothing": (b"", []),
    "zeros": (bytes(512), []),
    "a time": (b"22 mtime=1700000000.5\n", [(b"mtime", b"1700000000.5")]),
    "zeros behind": (b"7 a=bc\n" + bytes(9), [(b"a", b"bc")]),
    "no value": (b"5 a=\n", [(b"a", b"")]),
    "no key": (b"5 =a\n", [(b"", b"a")]),
    "= in a value": (b"9 a=b=c=\n", [(b"a", b"b=c=")]),
    "a space in a key": (b"8 a b=c\n", [(b"a b", b"c")]),
    "a record in a value": (b"15 a=7 b=cd\n\n\n\n", [(b"a", b"7 b=cd\n\n\n")]),
    "a zero in a value": (b"8 a=b\0c\n", [(b"a", b"b\0c")]),
    "bytes that are not UTF-8": (b"6 \xff=\xfe\n" + bytes(3), [(b"\xff", b"\xfe")]),
    "zeros before a length": (b"0008 a=\n", [(b"a", b"")]),
    "lengths of two and three digits": (
        b"10 a=bcde\n" + b"103 a=" + b"b" * 96 + b"\n",
        [(b"a", b"bcde"), (b"a", b"b" * 96)],
    ),
    "GNU sparse 1.0": (
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=0.jpg\n",
        [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"0.jpg")],
    ),
    "the same key twice": (b"6 a=b\n6 a=c\n", [(b"a", b"b"), (b"a", b"c")]),
}
DAMAGED = [
    b"a=b\n", b"6 a=b", b"7 a=b\n", b"5 a=b\n", b"6 a:b\n", b" a=b\n", b"-6 a=b\n", b"6\ta=b\n", b"0 a=b\n", b"1 a=b\n",
    b"6 a=b\n\0\0x", b"6 a=b\n7 a", b"00000006 a=b\n", b"3 \n", b"2 ", b"99999999 a=b\n",
]  # fmt: skip


def read(body: bytes) -> list[tuple[bytes, bytes]] | None:
    try:
        return pax.records_of(body)
    except ValueError:
        return None


@pytest.mark.parametrize("name", ODD)
def test_odd_records_are_read(name: str) -> None:
    body, records = ODD[name]
    assert read(body) == records


@pytest.mark.parametrize("body", DAMAGED)
def test_damaged_records_are_refused(body: bytes) -> None:
    assert read(body) is None


RECORDS = st.lists(st.tuples(st.sampled_from([b"a", b"", b"GNU.x", b"path"]), st.binary(max_size=12)), max_size=4)


@given(RECORDS, st.integers(0, 60), st.sampled_from([b"", b"=", b"\n", b"7", b" ", b"\0"]))
@example([(b"a", b"b")], 0, b"0000000")
def test_it_accepts_what_the_index_accepts(records: list[tuple[bytes, bytes]], at: int, put: bytes) -> None:
    """The index has read every header before the proof does, and refuses the shard if it is damaged."""
    body = b"".join(record_heads._pax_record(key, value) for key, value in records)
    assert read(body) == records
    body = body[:at] + put + body[at + 1 :]
    try:
        expected = walk.pax_records(body, 0)
    except ShardError:
        assert read(body) is None
    else:
        assert dict(read(body) or []) == expected


def test_200000_records_are_read_at_once() -> None:
    started = time.process_time()
    assert len(pax.records_of(b"5 a=\n" * 200_000)) == 200_000
    assert time.process_time() - started < 5


# --- headers ---


OLD = (
    pax_header(b"22 mtime=1700000000.5\n", b"17 comment=hello\n", b"22 LIBARCHIVE.x=a=\nb\n\n", b"14 path=x.jpg\n")
    + header(b"0.jpg", 10)
)  # fmt: skip


@pytest.mark.parametrize("name", ["a.jpg", "folder/" * 30 + "a.jpg"])
@pytest.mark.parametrize("size", [10, 9 * 2**30])
def test_a_header_that_the_writer_makes_is_right(name: str, size: int) -> None:
    assert heads.fault_of_head(record_heads.remake_record_head(OLD, name, size), OLD, name, size) is None


def test_a_reader_that_loses_records_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = walk.pax_records

    def faulty(body: bytes, at: int) -> dict[bytes, bytes]:
        return {key: value for key, value in real(body, at).items() if not key.startswith(b"LIBARCHIVE.")}

    replace_everywhere(monkeypatch, real, faulty)
    head = record_heads.remake_record_head(OLD, "a.jpg", 10)
    assert b"LIBARCHIVE" not in head
    assert heads.fault_of_head(head, OLD, "a.jpg", 10) == "the pax records"


def test_damaged_records_are_a_difference() -> None:
    head = record_heads.remake_record_head(OLD, "a.jpg", 10)
    damaged = head.replace(b"comment=", b"comment:")
    assert heads.fault_of_head(damaged, OLD, "a.jpg", 10) == "the pax records"
    assert heads.fault_of_head(head, OLD.replace(b"comment=", b"comment:"), "a.jpg", 10) == (
        "the pax records of the source cannot be read"
    )

"""Which shards a pipeline means, and what one shard's samples become: uid, caption, boxes, fields, places."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.engine.runs import deal
from builder.errors import ConfigError
from builder.sources.base import Found
from builder.sources.tars import columns, json_values, shards
from builder.sources.tars.finding import expand_braces, find_shards
from builder.sources.tars.shards import TarShards
from builder.table import schema
from conftest import Sample, Workspace, builder, make_shard, picture, samples, write_tar

JPG = picture()


# --- which shards ---


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..3}", ["0", "1", "2", "3"]),
        ("x{008..011}.tar", ["x008.tar", "x009.tar", "x010.tar", "x011.tar"]),
        ("{98..101}", ["98", "99", "100", "101"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{8..010}", ["008", "009", "010"]),
        ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{a,}.tar", ["a.tar", ".tar"]),
        ("{x}.tar", ["{x}.tar"]),
        ("{x}{1..2}", ["{x}1", "{x}2"]),
        ("{x.tar", ["{x.tar"]),
        ("{a,b{1..2}}", ["a", "b1", "a", "b2"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert list(expand_braces(pattern)) == expected


NUMBER = st.tuples(st.integers(0, 30), st.integers(1, 4)).map(lambda pair: f"{pair[0]:0{pair[1]}d}")
BRACE = st.one_of(
    st.builds("{{{}..{}}}".format, NUMBER, NUMBER),
    st.builds("{{{}..{}..{}}}".format, NUMBER, NUMBER, st.integers(1, 9)),
    st.lists(st.text("abc.", max_size=3), min_size=2, max_size=4).map(lambda words: "{" + ",".join(words) + "}"),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text("xyz/.-", max_size=4), BRACE), max_size=3).map("".join))
def test_braces_are_expanded_as_webdataset_does(pattern: str) -> None:
    assert list(expand_braces(pattern)) == list(braceexpand(pattern))


def test_find_braces_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(
        *(tmp_path / name for name in ("a/00.tar", "a/01.tar", "a/03.tar", "b/x.tar", "b/y.tar", "b/y.json", "c/z.tar"))
    )
    (tmp_path / "b/folder.tar").mkdir()
    found = find_shards(["b/*.tar", "a/{00..03}.tar", "**/z.tar"])
    assert found.paths == {
        "x": Path("b/x.tar"), "y": Path("b/y.tar"), "00": Path("a/00.tar"), "01": Path("a/01.tar"),
        "03": Path("a/03.tar"), "z": Path("c/z.tar"),
    }  # fmt: skip
    assert list(found.paths) == ["x", "y", "00", "01", "03", "z"]
    assert found.missing == [Path("b/folder.tar"), Path("a/02.tar")]


def test_find_tells_of_a_wildcard_that_matches_nothing(tmp_path: Path) -> None:
    touch(tmp_path / "a/0.tar")
    found = find_shards([f"{tmp_path}/{{a,b}}/*.tar"])
    assert (found.paths, found.missing) == ({"0": tmp_path / "a/0.tar"}, [tmp_path / "b/*.tar"])


def test_find_takes_a_path_as_it_is_written(tmp_path: Path) -> None:
    touch(tmp_path / "run [1]/0.tar", tmp_path / "{x}/1.tar")
    found = find_shards([f"{tmp_path}/run [1]/0.tar", f"{tmp_path}/{{x}}/1.tar"])
    assert found.paths == {"0": tmp_path / "run [1]/0.tar", "1": tmp_path / "{x}/1.tar"}


def test_one_shard_named_twice_is_one_shard(tmp_path: Path) -> None:
    touch(tmp_path / "a/0.tar")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = find_shards([f"{tmp_path}/a/*.tar", f"{tmp_path}/a/0.tar", f"{tmp_path}/link/0.tar"])
    assert found.paths == {"0": tmp_path / "a/0.tar"}


def test_two_shards_of_one_name(tmp_path: Path) -> None:
    touch(tmp_path / "a/0.tar", tmp_path / "b/0.tar")
    with pytest.raises(ConfigError) as caught:
        find_shards([f"{tmp_path}/*/*.tar"])
    assert str(caught.value) == (
        "two shards are named '0', and the table identifies shards by name\n"
        f"  one: {tmp_path}/a/0.tar\n"
        f"  other: {tmp_path}/b/0.tar\n"
        "  fix: rename one of them, or use another dataset.root for each folder"
    )


def test_nothing_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        find_shards(["empty/*.tar", "none/{0..1}.tar"])
    assert str(caught.value) == (
        "no shard matches dataset.shards\n"
        "  pattern: empty/*.tar, none/{0..1}.tar\n"
        "  folder: empty (exists), none (does not exist)\n"
        f"  working directory: {tmp_path}\n"
        '  fix: set dataset.shards to your tars, for example: --set dataset.shards="data/*.tar"'
    )


def test_nothing_matches_beside_other_tars(tmp_path: Path) -> None:
    touch(tmp_path / "00000.tar", tmp_path / "00001.tar")
    with pytest.raises(ConfigError) as caught:
        find_shards([f"{tmp_path}/{{00000000..00000335}}.tar"])
    assert str(caught.value) == (
        "no shard matches dataset.shards\n"
        f"  pattern: {tmp_path}/{{00000000..00000335}}.tar\n"
        f"  folder: {tmp_path} (exists)\n"
        f"  working directory: {Path.cwd()}\n"
        "  fix: that folder has 2 tars, 00000.tar to 00001.tar: set dataset.shards to fit them"
    )


def test_nothing_matches_43000_names_within_a_second(tmp_path: Path) -> None:
    """Of the processor: the clock hangs on what else runs."""
    started = time.process_time()
    with pytest.raises(ConfigError):
        find_shards([f"{tmp_path}/{{00000000..00043027}}.tar"])
    assert time.process_time() - started < 1


def test_nothing_matches_on_the_command_line(workspace: Callable[..., Workspace]) -> None:
    made = workspace({}, stages="")
    done = builder("run", "--pipeline", str(made.file), cwd=made.folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: no shard matches dataset.shards\n"
        f"  pattern: {made.folder}/source/*.tar\n"
        f"  folder: {made.folder}/source (does not exist)\n"
        f"  working directory: {made.folder}\n"
        '  fix: set dataset.shards to your tars, for example: --set dataset.shards="data/*.tar"\n'
    )
    assert not made.root.exists()


# --- one shard ---


def read(path: Path, fields: dict[str, pa.DataType] | None = None, **options: Any) -> list[dict[str, Any]]:
    """The rows of one shard; everything that ingest writes must fit its columns."""
    table = shards.read_shard(path, "s", TarShards(fields or {}, **options), "a-run").table
    assert table.schema.names == [column.name for column in TarShards(fields or {}, **options).columns]
    return list(table.to_pylist())


def read_one(folder: Path, body: dict[str, Any], fields: dict[str, pa.DataType] | None = None) -> dict[str, Any]:
    """The row of one sample whose json holds just this, its txt `txt caption`."""
    sample = Sample("k", None, JPG, json=json.dumps(body).encode(), txt=b"txt caption")
    (row,) = read(make_shard(folder / "s.tar", [sample]), fields)
    assert row["source_status"] == "ok"
    return row


def test_a_whole_row(tmp_path: Path) -> None:
    (sample,) = samples(1, start=1)
    (row,) = read(make_shard(tmp_path / "s.tar", [sample]), {"url": pa.string(), "original_width": pa.int32()})
    assert row.pop("source_inputs") is not None
    assert row.pop("source_members")[0]["ext"] == "jpg"
    assert row == {
        "uid": "00000000000000000000000000000001", "shard": "s", "row": 0, "key": "00000000000000000000000000000001-0",
        "caption": "a man with a hat is standing in the street number 1", "caption_differs": False,
        "source_face_bboxes": [[0.1, 0.1, 0.5, 0.9]], "source_width": 48, "source_height": 32, "source_notes": None,
        "url": "https://example.org/a.jpg", "original_width": 480, "source_status": "ok", "source_error": None,
        "source_run": "a-run", "source_changed": None, "source_was": None, "source_digests": None,
    }  # fmt: skip


@pytest.mark.parametrize("mtime", [1_700_000_000, 1_700_000_000.5])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_places_of_members_point_at_exactly_their_bytes(tmp_path: Path, form: int, mtime: float) -> None:
    made = [
        Sample("a/" * 60 + "1"),
        Sample("2", extension="png", image=picture(2, extension="png")),
        Sample("3", image=b""),
    ]
    if form == tarfile.USTAR_FORMAT:
        mtime = int(mtime)
    path = make_shard(tmp_path / "s.tar", made, form=form, mtime=mtime)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        expected = {
            info.name: (info.offset, info.offset_data, archive.extractfile(info).read())  # type: ignore[union-attr]
            for info in archive
        }
    got = {
        f"{row['key']}.{place['ext']}": (
            place["header"], place["data"], content[place["data"] : place["data"] + place["size"]]
        )
        for row in read(path)
        for place in row["source_members"]
    }  # fmt: skip
    assert got == expected
    assert list(got) == list(expected)


def test_members_in_any_order_and_images_of_any_kind(tmp_path: Path) -> None:
    body = json.dumps({"caption": "c", "width": 5}).encode()
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("a.txt", b"c"), ("a.json", body), ("a.jpg", JPG),
            ("b.json", body), ("b.JPEG", JPG), ("b.Txt", b"other"),
            ("./c.png", JPG), ("./c.seg.png", b"mask"), ("./c.txt", b"c"), ("./c.json", body),
            ("d/e.webp", JPG), ("README", b"of no sample"), ("d/e.JSON", body),
        ],
    )  # fmt: skip
    rows = read(path)
    got = [(r["key"], [m["ext"] for m in r["source_members"]], r["caption"], r["caption_differs"]) for r in rows]
    assert got == [
        ("a", ["txt", "json", "jpg"], "c", False),
        ("b", ["json", "JPEG", "Txt"], "c", True),
        ("./c", ["png", "seg.png", "txt", "json"], "c", False),
        ("d/e", ["webp", "JSON"], "c", None),
    ]
    assert [row["source_status"] for row in rows] == ["ok"] * 4
    assert [row["source_notes"] for row in rows] == [None, None, None, "no txt"]
    assert [row["source_width"] for row in rows] == [5] * 4


def test_archive_of_nothing_has_no_rows(tmp_path: Path) -> None:
    assert read(write_tar(tmp_path / "s.tar", [])) == []
    assert read(write_tar(tmp_path / "t.tar", [("README", b"text")])) == []


HEX = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("key", "uid", "expected", "notes"),
    [
        ("k", "any text", "any text", None),
        ("k", "日本", "日本", None),
        (f"{HEX}-0", "other", "other", None),
        (f"{HEX}-0", None, HEX, None),
        (f"{HEX}-0", "", HEX, None),
        (f"./x/{HEX.upper()}", None, HEX.upper(), None),
        (f"{HEX}{HEX}", None, HEX, None),
        (f"{HEX}-1", 7, HEX, "uid: expected text, found a number"),
        (f"{HEX}-1", ["a"], HEX, "uid: expected text, found a list"),
        (f"{HEX}-1", "\ud800", HEX, "uid: text that is not Unicode"),
        (HEX[:31], None, hashlib.sha256(f"s/{HEX[:31]}".encode()).hexdigest()[:32], None),
        ("./a/é", None, hashlib.sha256("s/./a/é".encode()).hexdigest()[:32], None),
    ],
)
def test_uid(tmp_path: Path, key: str, uid: Any, expected: str, notes: str | None) -> None:
    sample = Sample(key, "c", JPG, json=json.dumps({"uid": uid} if uid is not None else {}).encode(), txt=b"c")
    (row,) = read(make_shard(tmp_path / "s.tar", [sample]))
    assert (row["uid"], row["source_notes"]) == (expected, notes)


def test_uid_of_a_key_without_one_is_written_out(tmp_path: Path) -> None:
    (row,) = read(write_tar(tmp_path / "s.tar", [("000000123.jpg", JPG)]))
    # printf s/000000123 | sha256sum | cut -c-32
    assert row["uid"] == "6a154681a20a80ea8b87881af85f0d08"


@pytest.mark.parametrize(
    ("in_json", "in_txt", "expected"),
    [
        ("a cat", b"a cat", ("a cat", False)),
        ("a cat", b" a cat \n", ("a cat", False)),
        ("a cat", b"a dog", ("a cat", True)),
        ("", b"a dog", ("", True)),
        ("", b"", ("", False)),
        (None, b"a dog", ("a dog", None)),
        (None, b"a dog\n", ("a dog", None)),
        (None, b"a dog\r\n", ("a dog", None)),
        (None, b" a\ndog\n\n", (" a\ndog\n", None)),
        (None, b"\xef\xbb\xbfa dog", ("a dog", None)),
        (None, "日本".encode(), ("日本", None)),
        ("a cat", None, ("a cat", None)),
        ("nul \0 and \x1b[31m", b"", ("nul \0 and \x1b[31m", True)),
        (None, None, (None, None)),
    ],
)
def test_caption(
    tmp_path: Path, in_json: str | None, in_txt: bytes | None, expected: tuple[str | None, bool | None]
) -> None:
    members = [("k.jpg", JPG), ("k.json", json.dumps({"caption": in_json}).encode())]
    (row,) = read(write_tar(tmp_path / "s.tar", members + [("k.txt", in_txt)] * (in_txt is not None)))  # type: ignore[list-item]
    assert (row["caption"], row["caption_differs"]) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"face_bboxes": [[0, 0.25, 1, 0.5], [0.1, 0.1, 0.1, 0.1]]}, [[0.0, 0.25, 1.0, 0.5], [0.1, 0.1, 0.1, 0.1]]),
        ({"face_bboxes": []}, []),
        ({"face_bboxes": None}, None),
        ({}, None),
    ],
)
def test_boxes_have_three_states(tmp_path: Path, fields: dict[str, Any], expected: list[list[float]] | None) -> None:
    row = read_one(tmp_path, fields)
    assert (row["source_face_bboxes"], row["source_notes"]) == (expected, None)


def test_box_with_a_number_beyond_all_floats(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"face_bboxes": [[0, 0, 10**400, 1]], "width": math.nan})
    assert row["source_face_bboxes"] is None
    assert row["source_notes"] == "face_bboxes: box 0 lies outside 0..1; width: expected int32, found NaN"


def test_boxes_a_hair_outside_are_cut_and_noted(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"face_bboxes": [[0.5, 0.5, 0.9, 1.0000001], [-0.01, 0, 0.5, 1.01], [0, 0, 1, 1]]})
    assert row["source_face_bboxes"] == [[0.5, 0.5, 0.9, 1.0], [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0]]
    assert row["source_notes"] == "face_bboxes: 2 of 3 boxes cut at the edge"


def test_boxes_of_another_name(tmp_path: Path) -> None:
    sample = Sample("k", json=b'{"faces": [[0, 0, 1, 1]], "face_bboxes": []}')
    (row,) = read(make_shard(tmp_path / "s.tar", [sample]), boxes="faces")
    assert row["source_face_bboxes"] == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("value", "expected", "note"),
    [
        (48, 48, None),
        (48.0, 48, None),
        (None, None, None),
        ("48", None, 'expected int32, found "48"'),
        (48.5, None, "expected int32, found 48.5"),
        (True, None, "expected int32, found true"),
        (math.nan, None, "expected int32, found NaN"),
        (math.inf, None, "expected int32, found Infinity"),
        (2**31, None, "expected int32, found 2147483648"),
        (10**400, None, "expected int32, found 1000000000000000000000000000000000000..."),
        ([48], None, "expected int32, found [48]"),
        ({"px": 48}, None, 'expected int32, found {"px": 48}'),
    ],
)
def test_width_and_height(tmp_path: Path, value: Any, expected: int | None, note: str | None) -> None:
    row = read_one(tmp_path, {"width": 5, "height": value}, fields={"height": pa.int32()})
    assert (row["source_width"], row["source_height"], row["height"]) == (5, expected, expected)
    assert row["source_notes"] == (note and f"height: {note}")


FIELDS: list[tuple[str, str, Any, Any, str | None]] = [
    # name, type, in the json, in the table, note
    ("url", "string", "http://x", "http://x", None),
    ("url", "string", "", "", None),
    ("url", "string", 5, None, "url: expected text, found a number"),
    ("url", "string", ["a"], None, "url: expected text, found a list"),
    ("exif", "string", {"a": 1}, None, "exif: expected text, found an object"),
    ("exif", "string", '{"a": 1}', '{"a": 1}', None),
    ("original_width", "int32", 480, 480, None),
    ("original_width", "int32", "480", None, 'original_width: expected int32, found "480"'),
    ("clip_b32_similarity_score", "float64", 1, 1.0, None),
    ("clip_b32_similarity_score", "float64", 0.25, 0.25, None),
    ("clip_b32_similarity_score", "float64", "0.25", None, 'clip_b32_similarity_score: expected float64, found "0.25"'),
    ("clip_b32_similarity_score", "float64", False, None, "clip_b32_similarity_score: expected float64, found false"),
    ("mine", "string", "text", "text", None),
    ("mine", "string", 5, "5", None),
    ("mine", "string", True, "true", None),
    ("mine", "string", ["a", {"b": None}], '["a", {"b": null}]', None),
    ("mine", "string", "\udc00", None, "mine: text that is not Unicode"),
    ("mine", "string", ["\udc00"], '["\\udc00"]', None),
    ("mine", "bool", True, True, None),
    ("mine", "bool", 1, None, "mine: expected bool, found 1"),
    ("mine", "int64", 2**62, 2**62, None),
    ("mine", "int64", 2**63, None, "mine: expected int64, found 9223372036854775808"),
    ("mine", "uint64", -1, None, "mine: expected uint64, found -1"),
    ("mine", "float64", 10**400, None, "mine: expected float64, found 1000000000000000000000000000000000000..."),
    ("mine", "list<int64>", [1, 2], [1, 2], None),
    ("mine", "list<int64>", [], [], None),
    ("mine", "list<int64>", [1, "x"], None, 'mine: expected list<int64>, found [1, "x"]'),
    ("mine", "list<int64>", 5, None, "mine: expected list<int64>, found 5"),
    ("mine", "list<string>", ["\ud800"], None, 'mine: expected list<string>, found ["\\ud800"]'),
    ("mine", "struct<a: int64, b: string>", {"a": 1, "c": 2}, {"a": 1, "b": None}, None),
    ("mine", "struct<a: int64>", [1], None, "mine: expected struct<a: int64>, found [1]"),
    ("width", "string", 48, None, "width: expected text, found a number"),
    ("width", "float64", 48, 48.0, None),
]


@pytest.mark.parametrize(("name", "kind", "value", "expected", "note"), FIELDS)
def test_fields(tmp_path: Path, name: str, kind: str, value: Any, expected: Any, note: str | None) -> None:
    row = read_one(tmp_path, {name: value}, fields={name: schema.parse_type(kind)})
    assert (row[name], row["source_notes"]) == (expected, note)


def test_fields_that_the_table_has_already_get_a_prefix(tmp_path: Path) -> None:
    fields = {name: pa.string() for name in ("caption", "uid", "key", "source_status")}
    row = read_one(tmp_path, {"caption": 5, "uid": "u", "key": "000", "source_status": "x"}, fields=fields)
    assert [row[f"json_{name}"] for name in fields] == [None, "u", "000", "x"]
    assert (row["caption"], row["uid"], row["key"], row["source_status"]) == ("txt caption", "u", "k", "ok")
    assert row["source_notes"] == "caption: expected text, found a number"


def test_reading_goes_through_json_unchanged() -> None:
    reading = TarShards({"a": pa.string(), "b": pa.list_(pa.float64())}, "faces")
    assert TarShards.from_json(json.loads(json.dumps(reading.to_json()))) == reading
    others = [TarShards({"a": pa.string()}, "faces"), TarShards(reading.fields, "face_bboxes"), TarShards({}, "faces")]
    assert len({one.signature for one in [reading, *others]}) == 4


def test_json_nested_deep(tmp_path: Path) -> None:
    def deep(times: int) -> bytes:
        return b"[" * times + b"]" * times

    limit = json_values.MAX_DEPTH
    values = [deep(limit - 1), deep(limit), deep(900)]
    bodies = [b'{"mine": %b, "url": %b, "caption": "c"}' % (value, value) for value in values]
    bodies += [b"[" * 300_000, b'{"caption": "%b"}' % (b"[" * 200), b"[%b]" % b",".join([b"[]"] * 200)]
    made = [Sample(f"{i}", json=body, txt=b"t") for i, body in enumerate(bodies)]
    rows = read(make_shard(tmp_path / "s.tar", made), {"mine": pa.string(), "url": pa.string()})
    too_deep = "BadJson: the json is nested too deep"
    assert [(row["source_error"], row["caption"]) for row in rows] == [
        (None, "c"), (too_deep, "t"), (too_deep, "t"), (too_deep, "t"), (None, "[" * 200),
        ("BadJson: the json is a list, not an object", "t"),
    ]  # fmt: skip
    assert (rows[0]["mine"], rows[0]["url"]) == (values[0].decode(), None)
    assert rows[0]["source_notes"] == "url: expected text, found a list"


def test_json_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_TEXT", 20)
    made = [Sample("a", json=b'{"caption": "12345"}', txt=b"x" * 20), Sample("b", json=b" " * 21, txt=b"x" * 21)]
    one, other = read(make_shard(tmp_path / "s.tar", made))
    assert (one["caption"], one["source_notes"], one["source_error"]) == ("12345", None, None)
    assert other["caption"] is None
    assert other["source_notes"] == "txt: 21 bytes, the limit is 20"
    assert other["source_error"] == "BadJson: the json has 21 bytes, the limit is 20"


# --- properties ---


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.integers(10**300, 10**320),
        st.text(st.characters(), max_size=8), st.sampled_from(["\ud800", "[[0,0,1,1]]", "0"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)  # fmt: skip
BOX = st.lists(st.one_of(st.floats(0, 1), st.integers(0, 1), st.floats()), min_size=3, max_size=5)
KINDS = ["string", "int32", "float64", "bool", "uint64", "list<float64>", "struct<a: string>", "binary"]


@settings(max_examples=300, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {"uid": JSON, "caption": JSON, "width": JSON, "face_bboxes": st.one_of(JSON, st.lists(BOX, max_size=3))},
        optional={"mine": JSON, "exif": JSON},
    ),
    kind=st.sampled_from(KINDS),
    txt=st.binary(max_size=12),
)
def test_any_json_is_a_row(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], kind: str, txt: bytes
) -> None:
    body = json.dumps(fields).encode()
    path = write_tar(tmp_path_factory.getbasetemp() / "any.tar", [("k.jpg", b""), ("k.json", body), ("k.txt", txt)])
    (row,) = read(path, {"mine": schema.parse_type(kind), "exif": pa.string()})
    assert (row["source_status"], row["source_error"]) == ("ok", None)
    assert row["uid"]
    boxes = row["source_face_bboxes"]
    assert boxes is None or all(0 <= b[0] <= b[2] <= 1 and 0 <= b[1] <= b[3] <= 1 for b in boxes)
    if isinstance(fields["caption"], str) and fields["caption"].isprintable():
        assert row["caption"] == fields["caption"]


@settings(max_examples=200, deadline=None)
@given(
    body=st.one_of(st.binary(max_size=40), st.text(st.sampled_from('{}[]",:0N\\ua\n '), max_size=20).map(str.encode))
)
def test_any_bytes_as_json_are_a_row(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    members = [("k.jpg", b""), ("k.json", body), ("k.txt", b"text")]
    (row,) = read(write_tar(tmp_path_factory.getbasetemp() / "bytes.tar", members))
    try:
        is_object = isinstance(json.loads(body.removeprefix(b"\xef\xbb\xbf").decode("utf-8")), dict)
    except (ValueError, RecursionError):
        is_object = False
    assert row["source_status"] == ("ok" if is_object else "failed")
    assert (row["source_error"] or "BadJson: ").startswith("BadJson: ")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c/d"]), st.sampled_from(["jpg", "json", "txt"])), max_size=12
    )
)  # fmt: skip
def test_every_member_of_a_sample_is_in_one_row_in_order(
    tmp_path_factory: pytest.TempPathFactory, names: Sequence[tuple[str, str]]
) -> None:
    path = write_tar(tmp_path_factory.getbasetemp() / "rows.tar", [(".".join(name), b"{}") for name in names])
    rows = read(path)
    assert [(row["key"], place["ext"]) for row in rows for place in row["source_members"]] == list(names)
    assert all(one["key"] != other["key"] for one, other in itertools.pairwise(rows))
    again = {row["key"] for row in rows if sum(other["key"] == row["key"] for other in rows) > 1}
    for row in rows:
        extensions = [place["ext"] for place in row["source_members"]]
        faults = {
            "ScatteredSample": row["key"] in again,
            "DuplicateMember": len(set(extensions)) < len(extensions),
            "MissingImage": "jpg" not in extensions,
        }
        told = (row["source_error"] or "").partition(":")[0]
        assert faults[told] if told else not any(faults.values())


def test_vanished_and_deal(tmp_path: Path, dataset: Workspace) -> None:
    layout = dataset.load().layout
    found = Found({"00000001": tmp_path / "x.tar"}, [])
    assert found.gone(layout.shard_names()) == ["00000000"]
    assert deal(["0", "1", "2", "3", "4"], 2) == [["0", "2", "4"], ["1", "3"]]
    assert deal(["0"], 4) == [["0"]]
    assert deal([], 4) == []

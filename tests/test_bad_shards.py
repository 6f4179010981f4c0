"""Bad input through the whole pipeline: each fault becomes a row with a reason or a shard with an offset."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from click.testing import CliRunner

from builder.cli import main
from builder.engine.work import Choice
from builder.errors import ConfigError, TransientError
from builder.progress import Talk
from builder.verbs.ingest import run_ingest
from builder.verbs.stage import run_stage
from builder.verbs.write import run_write
from conftest import (
    PIPELINE,
    STANDARD_STAGES,
    Sample,
    Workspace,
    ingest_here,
    make_shard,
    picture,
    samples,
    write_tar,
)

JPG = picture()
FACE = [[0.1, 0.1, 0.5, 0.9]]
ENGLISH = "a man with a hat is standing in the street"


# --- bad samples: one shard that holds them all, between good ones ---


SORT = "sort the shard: tar --sort=name"


@dataclass
class Case:
    """A sample of the shard and what the table should say of it.

    Attributes:
        members: name and bytes, or a TarInfo for what is no file.
        values: other columns.
    """

    members: list[tuple[str, bytes] | tarfile.TarInfo]
    error: str | None = None
    notes: str | None = None
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        first = self.members[0]
        return (first.name if isinstance(first, tarfile.TarInfo) else first[0]).partition(".")[0]


def body(**fields: Any) -> bytes:
    return json.dumps({"caption": ENGLISH, "face_bboxes": [], **fields}).encode()


def sample(key: str, in_json: bytes | None = None, txt: bytes = ENGLISH.encode(), **expected: Any) -> Case:
    members = [(f"{key}.jpg", JPG), (f"{key}.json", body() if in_json is None else in_json), (f"{key}.txt", txt)]
    return Case(list(members), **expected)


def good(key: str) -> Case:
    return sample(key, body(face_bboxes=FACE, width=48), values={"caption": ENGLISH, "source_width": 48})


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def boxes(key: str, value: Any, note: str) -> Case:
    return sample(
        key, body(face_bboxes=value), notes=f"face_bboxes: {note}", values={"source_face_bboxes": None}
    )  # fmt: skip


NOT_FOUR = "is not a list of four numbers"
CASES = [
    good("good-0"),
    # members that are missing
    Case([("no-json.jpg", JPG), ("no-json.txt", b"text")], notes="no json", values={"caption": "text"}),
    Case([("no-txt.jpg", JPG), ("no-txt.json", body())], notes="no txt",
         values={"caption": ENGLISH, "caption_differs": None}),
    Case([("no-image.json", body()), ("no-image.txt", b"text")], values={"caption": ENGLISH},
         error="MissingImage: no jpg, jpeg, png or webp among: json, txt"),
    Case([("alone.jpg", JPG)], notes="no json; no txt", values={"caption": None, "source_face_bboxes": None}),
    Case([("alone-json.json", body())], notes="no txt",
         error="MissingImage: no jpg, jpeg, png or webp among: json"),
    # json that is none
    sample("cut-json", b'{"caption": ', error="BadJson: Expecting value at line 1 column 13",
           values={"caption": ENGLISH, "source_face_bboxes": None}),
    sample("empty-json", b"", error="BadJson: Expecting value at line 1 column 1"),
    sample("list-json", b"[1]", error="BadJson: the json is a list, not an object"),
    sample("null-json", b"null", error="BadJson: the json is null, not an object"),
    sample("text-json", b'"text"', error="BadJson: the json is text, not an object"),
    sample("latin-json", '{"caption": "café"}'.encode("latin-1"), error="BadJson: the json is not UTF-8 at byte 16"),
    sample("bom-json", b"\xef\xbb\xbf" + body(width=7), notes="json begins with a byte order mark",
           values={"source_width": 7, "caption": ENGLISH}),
    sample("nan-json", b'{"caption": "c", "width": NaN, "height": 3}', notes="width: expected int32, found NaN",
           values={"caption": "c", "source_width": None, "source_height": 3}),
    good("good-1"),
    # values of the wrong type
    sample("caption-number", body(caption=5), notes="caption: expected text, found a number",
           values={"caption": ENGLISH, "caption_differs": None}),
    sample("caption-list", body(caption=["a"]), txt=b"", notes="caption: expected text, found a list",
           values={"caption": ""}),
    sample("caption-null", body(caption=None), values={"caption": ENGLISH}),
    sample("caption-half", b'{"caption": "half \\ud83d of a pair"}', notes="caption: text that is not Unicode",
           values={"caption": ENGLISH}),
    sample("caption-nul", body(caption="a\0b"), txt=b"a\0b", values={"caption": "a\0b", "caption_differs": False}),
    sample("txt-latin", body(caption=None), "café".encode("latin-1"), notes="txt: not UTF-8 at byte 3",
           values={"caption": None}),
    sample("uid-number", body(uid=5), notes="uid: expected text, found a number",
           values={"uid": hashlib.sha256(b"bad/uid-number").hexdigest()[:32]}),
    sample("uid-half", b'{"uid": "\\udfff"}', notes="uid: text that is not Unicode",
           values={"uid": hashlib.sha256(b"bad/uid-half").hexdigest()[:32]}),
    sample("url-number", body(url=5), notes="url: expected text, found a number", values={"url": None}),
    sample("two-notes", body(uid=[], width="48"),
           notes='uid: expected text, found a list; width: expected int32, found "48"', values={"source_width": None}),
    # boxes
    sample("boxes-nan", b'{"caption": "c", "face_bboxes": [[0, 0, NaN, 1]]}', values={"source_face_bboxes": None},
           notes="face_bboxes: box 0 holds a value that is not finite"),
    boxes("boxes-inverted", [[0, 0, 1, 1], [0.5, 0, 0.4, 1]], "box 1 is inverted"),
    boxes("boxes-inverted-y", [[0, 0.5, 1, 0.4]], "box 0 is inverted"),
    boxes("boxes-outside", [[0, 0, 1.011, 1]], "box 0 lies outside 0..1"),
    boxes("boxes-pixels", [[10, 10, 200, 200]], "box 0 lies outside 0..1"),
    boxes("boxes-negative", [[-0.1, 0, 1, 1]], "box 0 lies outside 0..1"),
    boxes("boxes-object", {"a": 1}, "expected a list, found an object"),
    boxes("boxes-text", "[[0, 0, 1, 1]]", "expected a list, found text"),
    boxes("boxes-flat", [0, 0, 1, 1], f"box 0 {NOT_FOUR}"),
    boxes("boxes-three", [[0, 0, 1]], f"box 0 {NOT_FOUR}"),
    boxes("boxes-strings", [["0", "0", "1", "1"]], f"box 0 {NOT_FOUR}"),
    boxes("boxes-truth", [[False, False, True, True]], f"box 0 {NOT_FOUR}"),
    sample("boxes-null", body(face_bboxes=None), values={"source_face_bboxes": None}),
    good("good-2"),
    # members that are no sample's, or not where they belong
    Case([("scattered.jpg", JPG)], notes="no json; no txt",
         error="ScatteredSample: its key comes back at byte {scattered.json}; " + SORT),
    good("good-3"),
    Case([("scattered.json", body(face_bboxes=FACE)), ("scattered.txt", b"text")],
         error="ScatteredSample: its key was there before, at byte {scattered.jpg}; " + SORT),
    Case([("twice.jpg", JPG), ("twice.json", body(face_bboxes=FACE)), ("twice.json", body()), ("twice.txt", b"text")],
         error="DuplicateMember: a second member with extension 'json' at byte {twice.json 2}"),
    Case([("case.jpg", JPG), ("case.JPG", JPG), ("case.json", body()), ("case.txt", b"text")],
         error="DuplicateMember: a second member with extension 'jpg' at byte {case.JPG}"),
    Case([("soft.json", body()), link("soft.jpg", tarfile.SYMTYPE, "good-0.jpg"), ("soft.txt", b"text")],
         error="LinkMember: member 'soft.jpg' is a symbolic link, not a plain file"),
    Case([link("hard.jpg", tarfile.LNKTYPE, "good-0.jpg"), ("hard.json", body()), ("hard.txt", b"text")],
         error="LinkMember: member 'hard.jpg' is a hard link, not a plain file"),
    Case([("caf\udce9.jpg", JPG), ("caf\udce9.json", body()), ("caf\udce9.txt", b"text")],
         error="BadName: member 'caf\\xe9.jpg' has a name that is not UTF-8"),
    # a picture that no stage can read is the source's all the same
    Case([("broken.jpg", b"no picture"), ("broken.json", body(face_bboxes=None)), ("broken.txt", b"text")]),
    Case([("hollow.jpg", b""), ("hollow.json", body(face_bboxes=None)), ("hollow.txt", b"text")]),
    good("good-4"),
]  # fmt: skip
#: Members of no sample, put between the cases.
STRAY: list[tuple[str, bytes] | tarfile.TarInfo] = [
    ("README", b"made by hand"),
    link("folder", tarfile.DIRTYPE, ""),
    link("pipe.jpg", tarfile.FIFOTYPE, ""),
    ("__index__.json__", b"{}"),
]


def write_cases(path: Path) -> None:
    members: list[tuple[str, bytes] | tarfile.TarInfo] = []
    for i, case in enumerate(CASES):
        members += [*STRAY[i : i + 1], *case.members]
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))


def records(path: Path) -> list[tuple[str, bytes]]:
    """Name and raw bytes of every record, padding included, as Python's tarfile finds them."""
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
        ends = [*(info.offset for info in infos[1:]), infos[-1].offset_data + -(-infos[-1].size // 512) * 512]
    return [(info.name, content[info.offset : end]) for info, end in zip(infos, ends, strict=True)]


@dataclass
class Finished:
    """A pipeline that has run once, and the table's rows."""

    workspace: Workspace
    process: CompletedProcess[str]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("bad")
    write_cases(folder / "source/bad.tar")
    made = Workspace(folder, folder / "pipeline.toml")
    stages = STANDARD_STAGES.replace('source = "json"', 'source = "auto"')
    made.file.write_text(PIPELINE.format(folder=folder, stages=stages, workers=1, checkpoint_rows=2048))
    process = made.run("run", check=False)
    rows = json.loads(made.run("sql", "select * from samples order by row", "--json").stdout)
    return Finished(made, process, rows)


def offsets(path: Path) -> dict[str, int]:
    """The first byte of each member's record; a name that comes again has ` 2` behind it."""
    found: dict[str, int] = {}
    with tarfile.open(path) as archive:
        for info in archive:
            found[info.name if info.name not in found else f"{info.name} 2"] = info.offset
    return found


def test_every_bad_sample_is_a_row_with_its_reason(finished: Finished) -> None:
    at = offsets(finished.workspace.folder / "source/bad.tar")
    told = []
    for case in CASES:
        error = case.error
        for name in ("scattered.json", "scattered.jpg", "twice.json 2", "case.JPG"):
            error = error and error.replace("{" + name + "}", str(at[name]))
        told.append((case.key.encode("ascii", "backslashreplace").decode().replace("\\udce9", "\\xe9"),
                     "failed" if error else "ok", error, case.notes))  # fmt: skip
    got = [(row["key"], row["source_status"], row["source_error"], row["source_notes"]) for row in finished.rows]
    assert got == told


@pytest.mark.parametrize("number", [i for i, case in enumerate(CASES) if case.values])
def test_values_of_a_bad_sample(finished: Finished, number: int) -> None:
    row = finished.rows[number]
    assert {name: row[name] for name in CASES[number].values} == CASES[number].values


def untimed(text: str) -> list[str]:
    """Lines of talk without progress, seconds as S."""
    lines = [re.sub(r"\b\d+\.\d s", "S", line) for line in text.splitlines()]
    return [line for line in lines if not re.search(r" of \d+ (shards|rows),.*(S|/s)$", line)]


def test_run_says_what_failed_and_ends_with_3(finished: Finished) -> None:
    assert finished.process.returncode == 3
    assert untimed(finished.process.stderr)[:8] == [
        "ingest: no sample that was read has the json field 'original_width', which the pipeline names: "
        "fields that there are: caption, face_bboxes, height and 2 more",
        "ingest: 1 shards, 50 rows, 15 failed in S",
        "shard 'bad': the members of 2 samples are not next to each other; it has two members of the same name: "
        "make it again",
        "faces: 35 rows, 33 ok, 2 failed in S",
        "lang: 33 rows, 33 ok in S",
        "prompts: 5 rows, 5 ok in S",
        "generate: 5 rows, 5 ok in S",
        "write: 1 shards, 50 rows, 5 edited in S",
    ]
    assert (len(CASES), sum(case.error is not None for case in CASES)) == (50, 15)


def test_bad_samples_are_no_stage_s_work_and_the_others_are(finished: Finished) -> None:
    for case, row in zip(CASES, finished.rows, strict=True):
        if case.error is not None:
            answers = [row[f"{stage}_status"] for stage in ("faces", "lang", "prompts", "generate")]
            assert answers == [None] * 4, case.key
        elif case.key in ("broken", "hollow"):
            told = (row["faces_status"], row["faces_error"], row["face_count"])
            assert told == ("failed", "undecodable: the picture does not decode: no image format begins so", None)
        else:
            assert row["faces_status"] == "ok", case.key
            has_face = case.key.startswith("good")
            known = "source_face_bboxes" not in case.values and case.key not in ("no-json", "alone", "nan-json")
            is_json = known and not case.key.endswith("-half")
            assert (row["face_count"], row["face_source"]) == (int(has_face), "json" if is_json else "mtcnn"), case.key
            assert row["generate_status"] == ("ok" if has_face else None)


def test_bad_samples_are_copied_bit_for_bit_and_good_ones_edited(finished: Finished) -> None:
    source = records(finished.workspace.folder / "source/bad.tar")
    hybrid = records(finished.workspace.root / "shards/bad.tar")
    assert [name for name, _ in hybrid] == [name for name, _ in source]
    changed = [name for (name, old), (_, new) in zip(source, hybrid, strict=True) if old != new]
    assert changed == [f"good-{i}.{extension}" for i in range(5) for extension in ("jpg", "json", "txt")]


def test_bad_samples_are_proven_and_tried_no_more(finished: Finished) -> None:
    proof = json.loads(finished.workspace.run("verify", "--json").stdout)
    assert (proof["rows"], proof["edited"], proof["problems"]) == (50, 5, [])
    again = finished.workspace.run("run")
    assert again.stderr.splitlines() == [
        "ingest: nothing to do (1 shards)",
        "faces: nothing to do (33 ok, 2 failed of 35 covered)",
        "lang: nothing to do (33 ok, 0 failed of 33 covered)",
        "prompts: nothing to do (5 ok, 0 failed of 5 covered)",
        "generate: nothing to do (5 ok, 0 failed of 5 covered)",
        "write: nothing to do (1 hybrid shards up to date)",
    ]


def test_a_bad_sample_is_never_edited_even_if_the_write_sql_names_it(finished: Finished) -> None:
    made, sql = finished.workspace, finished.workspace.folder / "all.sql"
    sql.write_text("select shard, row, uid, 'new' as caption from samples where key in ('twice', 'soft', 'good-0')")
    plan = json.loads(made.run("plan", "--json", "--set", f"write.select={sql}").stdout)["write"]
    assert (plan["edited"], plan["refused"]) == (1, 2)


# --- bad shards ---


#: What is said of each bad shard of the test below, in its order.
REFUSED = """\
refused shard 'cut': the shard is truncated: member '00000000000000000000000000000004-0.json' ends at byte 5156, \
the file at 5000
  file: FOLDER/cut.tar
  offset: 3072
  fix: download or make it again
refused shard 'empty': the shard is empty (0 bytes)
  file: FOLDER/empty.tar
  fix: download or make it again
refused shard 'flip': no tar header at byte 1024: its checksum is wrong
  file: FOLDER/flip.tar
  offset: 1024
  fix: the shard is damaged or not a tar: download or make it again
refused shard 'gzip': the shard is compressed with gzip: byte offsets into it would mean nothing
  file: FOLDER/gzip.tar
  fix: mv FOLDER/gzip.tar FOLDER/gzip.tar.gz && gunzip < FOLDER/gzip.tar.gz > FOLDER/gzip.tar, \
and name that file in dataset.shards
refused shard 'html': the shard is not a tar: it is an HTML page
  file: FOLDER/html.tar
  bytes: 1600
  fix: a server sent it instead of the shard: download the shard again, logged in if the server needs it
refused shard 'two': zeros end the archive at byte 15360, but more data begins at byte 20480: most readers skip it
  file: FOLDER/two.tar
  offset: 15360
  fix: if the file contains two tars, split it; if not, make the shard again
refused shard 'gzip2.tar.gz': the shard is compressed with gzip: byte offsets into it would mean nothing
  file: FOLDER/gzip2.tar.gz
  fix: gunzip < FOLDER/gzip2.tar.gz > FOLDER/gzip2.tar, and name that file in dataset.shards
shard 'nothing': it holds no member, only 10240 bytes of zeros
"""


def test_bad_shards_are_refused_and_the_others_go_on(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"good-0": samples(2), "good-1": samples(2, start=2)}, stages="")
    folder = made.folder / "source"
    whole = make_shard(folder / "cut.tar", samples(2, start=4)).read_bytes()
    (folder / "cut.tar").write_bytes(whole[:5000])
    (folder / "empty.tar").touch()
    (folder / "gzip.tar").write_bytes(gzip.compress(whole))
    (folder / "gzip2.tar.gz").write_bytes(gzip.compress(whole))
    (folder / "html.tar").write_bytes(b"<html>404</html>" * 100)
    (folder / "flip.tar").write_bytes(whole[:1024] + b"\1" + whole[1025:])
    (folder / "two.tar").write_bytes(whole + whole)
    write_tar(folder / "nothing.tar", [])
    patterns = f'dataset.shards=["{folder}/*.tar", "{folder}/*.tar.gz"]'
    done = made.run("run", "--set", patterns, check=False)
    assert done.returncode == 3
    lines = untimed(done.stderr)
    told = REFUSED.replace("FOLDER", str(folder)).splitlines()
    assert lines[: len(told) + 2] == ["ingest: 3 shards, 4 rows in S", *told, "write: 3 shards, 4 rows in S"]
    good = ["good-0.tar", "good-1.tar", "nothing.tar"]
    assert sorted(path.name for path in (made.root / "shards").glob("*.tar")) == good
    for name in good:
        assert (made.root / "shards" / name).read_bytes() == (folder / name).read_bytes()
    made.run("verify", "--set", patterns)
    again = made.run("ingest", "--set", patterns, check=False)
    assert again.returncode == 3
    assert again.stderr.count("refused shard ") == 7


def test_all_shards_bad(workspace: Callable[..., Workspace]) -> None:
    made = workspace({}, stages="")
    (made.folder / "source").mkdir()
    (made.folder / "source/a.tar").touch()
    done = made.run("run", check=False)
    assert done.returncode == 1
    assert untimed(done.stderr) == [
        "ingest: nothing in S",
        "refused shard 'a': the shard is empty (0 bytes)",
        f"  file: {made.folder}/source/a.tar",
        "  fix: download or make it again",
        "error: no shard could be read",
        "  refused: 1",
        "  fix: for each shard that is refused above: take it out of dataset.shards, or download or make it again",
    ]


def test_shard_that_went_bad_keeps_the_rows_it_had(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(2), "b": samples(2, start=2)}, stages="")
    ingest_here(made.load())
    path = made.folder / "source/a.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    done = made.run("run", check=False)
    assert done.returncode == 3
    assert "refused shard 'a': the shard is truncated: " in done.stderr
    assert made.rows("select shard, count(*) from samples group by 1 order by 1") == [("a", 2), ("b", 2)]
    path.write_bytes(whole)
    made.run("run")
    made.run("verify")


# --- a root made from other shards ---


def ingest(made: Workspace, *sets: str) -> None:
    run_ingest(made.load(*sets), Talk())


def test_new_shard_is_read_by_the_next_run(
    workspace: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    made = workspace({"a": samples(2)}, stages="")
    ingest_here(made.load())
    before = (made.root / "samples/a.parquet").stat().st_ino
    make_shard(made.folder / "source/b.tar", samples(3, start=2))
    ingest(made)
    assert made.rows("select shard, count(*) from samples group by 1 order by 1") == [("a", 2), ("b", 3)]
    assert (made.root / "samples/a.parquet").stat().st_ino == before
    capsys.readouterr()
    ingest(made)
    assert capsys.readouterr().err == "ingest: nothing to do (2 shards)\n"


def test_vanished_and_missing_shards_are_told_and_left_alone(workspace: Callable[..., Workspace]) -> None:
    made = workspace({name: samples(2, start=i) for i, name in enumerate("abc")}, stages="")
    made.run("run")
    for name in "ab":
        (made.folder / f"source/{name}.tar").unlink()
    (made.root / "shards/a.tar").unlink()
    sets = ("--set", f"dataset.shards={made.folder}/source/{{b..d}}.tar")
    done = made.run("run", *sets)
    missing = [f"{made.folder}/source/{name}.tar" for name in "bd"]
    assert untimed(done.stderr) == [
        "2 of the shards that dataset.shards names are not files: "
        + ", ".join(f"{path} (does not exist)" for path in missing),
        "2 shards of the table are gone from dataset.shards, their rows stay and are not written: a, b",
        "ingest: nothing to do (1 shards)",
        "write: nothing to do (1 hybrid shards up to date)",
    ]
    assert made.rows("select shard, count(*) from samples group by 1 order by 1") == [("a", 2), ("b", 2), ("c", 2)]
    assert not (made.root / "shards/a.tar").exists()
    assert (made.root / "shards/b.tar").exists()
    plan = json.loads(made.run("plan", "--json", *sets).stdout)["ingest"]
    assert plan == {"shards": 1, "todo": 0, "missing": missing, "vanished": ["a", "b"]}


def test_shard_in_another_order_keeps_its_answers_by_key(workspace: Callable[..., Workspace]) -> None:
    old = samples(4)
    made = workspace({"a": old}, stages='[stages.faces]\nsource = "json"')
    ingest_here(made.load())
    run_stage(made.load(), "faces", Choice(), Talk())
    answers = dict(made.rows("select key, faces_run from samples"))
    assert len(answers) == 4
    assert None not in answers.values()
    other = Sample(old[2].key, old[2].caption, picture(99, width=80), fields=old[2].fields)
    new = [*samples(1, start=7), old[3], other, old[0]]
    make_shard(made.folder / "source/a.tar", new)
    ingest(made)
    rows = made.rows("select key, row, faces_run, face_count from samples order by row")
    assert rows == [
        (new[0].key, 0, None, None),
        (old[3].key, 1, answers[old[3].key], 0),
        (other.key, 2, answers[old[2].key], 1),
        (old[0].key, 3, answers[old[0].key], 0),
    ]
    done = made.run("run")
    assert untimed(done.stderr)[:3] == [
        "ingest: nothing to do (1 shards)",
        "faces: 1 rows, 1 ok in S",
        "write: 1 shards, 4 rows in S",
    ]
    assert (made.root / "shards/a.tar").read_bytes() == (made.folder / "source/a.tar").read_bytes()
    made.run("verify")


def test_output_where_the_source_lies(workspace: Callable[..., Workspace]) -> None:
    made = workspace({}, stages="")
    make_shard(made.folder / "out/shards/a.tar", samples(2))
    content = (made.root / "shards/a.tar").read_bytes()
    for verb in ("ingest", "write", "run"):
        done = made.run(verb, "--set", f"dataset.shards={made.folder}/out/shards/*.tar", check=False)
        assert done.returncode == 2
        assert done.stderr == (
            "error: hybrid shards would be written into the folder of the source\n"
            f"  source: {made.folder}/out/shards/a.tar\n"
            f"  output: {made.folder}/out/shards\n"
            "  fix: set dataset.root to another folder; hybrid shards go to its shards/, or to [write] folder\n"
        )
    assert (made.root / "shards/a.tar").read_bytes() == content


def test_output_where_the_source_lies_behind_a_link(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(2)}, stages="")
    made.root.mkdir()
    (made.root / "shards").symlink_to(made.folder / "source")
    before = (made.folder / "source/a.tar").read_bytes()
    with pytest.raises(ConfigError) as caught:
        ingest(made)
    assert caught.value.what == (
        f"'{made.root}/shards' is a link: nothing in a root is written, deleted or read behind links"
    )
    assert "[write]" in caught.value.fix
    assert (made.folder / "source/a.tar").read_bytes() == before


# --- disks ---


def test_file_system_without_hard_links(workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    made = workspace({"a": samples(2)}, stages="")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConfigError) as caught:
        ingest(made)
    told = re.sub(r"file system: \S+ at /\S*", "file system: TYPE at PLACE", str(caught.value))
    assert told == (
        f"the file system of '{made.root}' has no hard links, which every commit needs\n"
        "  file system: TYPE at PLACE\n"
        "  answer: Operation not permitted\n"
        "  fix: set dataset.root to a folder on a local disk, NFS, Lustre or GPFS"
    )
    assert list(made.root.rglob("*")) == []


def test_too_little_free_disk(workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    made = workspace({"a": samples(2), "b": samples(3, start=2)}, stages="")
    ingest_here(made.load())
    sizes = [(made.folder / f"source/{name}.tar").stat().st_size for name in "ab"]
    needed = sum(sizes) + max(sizes)  # all of the output, and the largest once more while it is replaced
    usage = shutil.disk_usage(made.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(TransientError) as caught:
        run_write(made.load(), Talk())
    assert str(caught.value) == (
        f"too little free disk for write: {needed:,} bytes needed, {needed - 1:,} free\n"
        f"  folder: {made.root}/shards\n"
        "  shards to write: 2\n"
        "  fix: free some space, or name a folder on another disk: [write] folder in the pipeline"
    )
    assert not (made.root / "shards").exists()
    shown = CliRunner().invoke(main, ["plan", "--pipeline", str(made.file)])
    assert re.search(rf"bytes needed +{needed:,}\n", shown.stdout)
    assert re.search(rf"bytes free +{needed - 1:,}\n", shown.stdout)
    assert (
        "too little free disk for write: free some space, or name a folder on another disk with [write] folder"
        in shown.stderr
    )
    value = json.loads(CliRunner().invoke(main, ["plan", "--json", "--pipeline", str(made.file)]).stdout)["write"]
    assert (value["bytes_needed"], value["bytes_free"]) == (needed, needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    run_write(made.load(), Talk())
    assert len(list((made.root / "shards").glob("*.tar"))) == 2
    (made.folder / "write.sql").write_text("select shard, row, uid, 'new' as caption from samples")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
    whole = ["run", "--pipeline", str(made.file), "--set", f"write.select={made.folder}/write.sql"]
    ended = CliRunner().invoke(main, whole)  # the hybrid shards exist, so their room is counted by write alone
    assert ended.exit_code == 1
    assert re.search(
        r"write: not finished: too little free disk for write: [\d,]+ bytes needed, 1 free\n"
        rf"  folder: {made.root}/shards\n"
        r"  shards to write: 2\n"
        r"  fix: free some space, or name a folder on another disk: \[write\] folder in the pipeline\n",
        ended.stderr,
    )

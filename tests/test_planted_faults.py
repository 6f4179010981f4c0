"""A writer with one planted fault each, which `verify` finds: the fault stays in the writer while verify looks."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from builder.hybrid import edit, image, manifest, output_folder, shard_plan, splice
from builder.hybrid.verify import proof
from builder.progress import Talk
from builder.tar import blocks, record_heads, walk
from builder.verbs.snapshot import Snapshot
from builder.verbs.verify import prove
from builder.verbs.write import write_plans
from conftest import Sample, Workspace, make_workspace, replace_everywhere, samples, write_tar

Patch = pytest.MonkeyPatch
Fields = dict[str, Any]
SHARD = "a"
#: Every sample gets a prompt and an image.
STAGES = """\
[stages.prompts]
sql = "{folder}/prompts.sql"

[stages.generate]
width = 64
height = 64
"""
IMAGES = """
select shard, row, uid, row = 5 as dropped, image_path, image_offset, image_size, image_width, image_height,
       image_sha256, image_seed, image_model, image_prompt, prompt,
       case when row <> 3 then 2.50 end as set_Rating, case when row <> 3 then [1, null] end as set_list
from samples where image_path is not null and row > 0
"""
CAPTIONS = "select shard, row, uid, 'new ü' as caption, 7 as set_rating from samples where row in (1, 2)"
#: Of shard `a`, row by row: not selected, a plain sample, one with a long name, one without a json, one that was edited
#: before, one that is dropped, the last one, which has pax records of its own.
LONG = "folder/" * 15 + f"{2:032x}-0"
OWN_RECORDS = {"LIBARCHIVE.creationtime": "1700000000", "comment": "a=b\n12 c=d\n"}
KEYS = [f"{0:032x}-0", f"{1:032x}-0", LONG, *(f"{i:032x}-0" for i in range(3, 7))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A root with generated images and nothing written; prompts have changed since the images were made."""
    folder = tmp_path_factory.mktemp("planted")
    made = make_workspace(folder, {SHARD: []}, stages=STAGES.format(folder=folder))
    (folder / "prompts.sql").write_text("select shard, row, uid, caption as text from samples")
    members: list[tuple[str, bytes]] = []
    for number, sample in enumerate(samples(7)):
        sample.key = KEYS[number]
        sample.fields |= {"face_bboxes": [[0.1, 0.1, 0.5, 0.9]], "rating": 1, "f": 2.50, "n": 10**30}
        if number == 4:
            sample.fields |= {"original_caption": "the first", "provenance": {"model": "older"}}
        members += [one for one in sample.members() if number != 3 or not one[0].endswith("json")]
    write_tar(made.folder / f"source/{SHARD}.tar", members, records=OWN_RECORDS)
    made.run("run")
    made.run("stage", "prompts", "--redo", "--set", "stages.prompts.style=A painting of {caption}")
    (made.folder / "images.sql").write_text(IMAGES)
    (made.folder / "captions.sql").write_text(CAPTIONS)
    return made


@pytest.fixture
def problems(root: Workspace) -> Iterator[Callable[..., list[str]]]:
    """Writes the hybrid shards anew and returns what verify says of them, without folders and fixes."""

    def look(sql: str = "images") -> list[str]:
        shutil.rmtree(root.root / "shards", ignore_errors=True)
        pipeline = root.load(f"write.select={root.folder}/{sql}.sql")
        for plan in write_plans(Snapshot(pipeline), [SHARD]):
            splice.write_shard(pipeline.layout, plan)
        output_folder.write_sizes(pipeline.layout)
        return [problem.partition("; fix: ")[0] for problem in prove(pipeline, Talk(quiet=True)).problems]

    yield look


@pytest.mark.parametrize("sql", ["images", "captions"])
def test_without_a_fault_all_is_proven(problems: Callable[..., list[str]], sql: str) -> None:
    assert problems(sql) == []


#: json that is written otherwise than it was, or that few tools write.
ODD = [
    b'{"caption": "a", "x": NaN, "y": [Infinity, -Infinity, 1e400, -1e999]}',
    b'{"caption": "a", "x": 2.50, "y": 1E16, "z": [1e-05, -0.0, 1.0, 0.1e1, 123456789012345678901234567890, -0]}',
    '{"caption": "ü\u2028\U0001f600", "x": "\x7f", "y": "a\\u0000b 1e16 \\" 2.50"}'.encode(),
    b'{"caption": "\\ud800 lone", "x": {"\\udfff": 1.5e300}}',
    b'{"caption": "a", "caption": "b", "x": 1, "x": 2.0}',
    b'\xef\xbb\xbf{"caption": "a", "x": [], "y": {}, "z": [{}, [[]]]}',
    b'{"caption": null, "url": "", "exif": null, "sha256": 7, "face_bboxes": "none", "width": "48"}',
    b'{"caption": "a", "original_caption": null, "provenance": [1]}',
    b'{"caption": "a", "deep": ' + b'[{"a": ' * 49 + b"1" + b"}]" * 49 + b"}",
    b'{"caption": "a", "deep": ' + b"[" * 99 + b"]" * 99 + b"}",
    b"{}",
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_json_is_proven(tmp_path: Path, number: int) -> None:
    made = make_workspace(tmp_path, {SHARD: []}, stages=STAGES.format(folder=tmp_path))
    (tmp_path / "prompts.sql").write_text("select shard, row, uid, 'a text' as text from samples")
    sample = Sample("k", json=ODD[number])
    write_tar(tmp_path / f"source/{SHARD}.tar", sample.members())
    made.run("run")
    proven = prove(made.load(), Talk(quiet=True))
    assert (proven.problems, proven.edited) == ([], 1)


def label(row: int) -> str:
    return f"shard '{SHARD}': row {row} (key '{KEYS[row]}'): "


# --- the json ---


def in_json(change: Callable[[Fields, Fields], object], indent: int = 4) -> Callable[[Patch], None]:
    """A fault of the json: `change` is given the new fields and those of before."""

    def plant(patch: Patch) -> None:
        real = edit.edited_json

        def edited(raw: bytes | None, *rest: Any) -> bytes:
            fields = json.loads(real(raw, *rest))
            change(fields, json.loads(raw or b"{}"))
            return json.dumps(fields, indent=indent).encode()

        replace_everywhere(patch, real, edited)

    return plant


def left(name: str) -> Callable[[Patch], None]:
    """A field that says what it said of the old picture."""
    return in_json(lambda new, old: new.update({name: old[name]}))


def of_provenance(change: Callable[[Fields], object]) -> Callable[[Patch], None]:
    return in_json(lambda new, old: change(new["provenance"]))


def reordered(new: Fields, old: Fields) -> None:
    items = sorted(new.items())
    new.clear()
    new.update(items)


JSON: list[tuple[str, Callable[[Patch], None], str]] = [
    (
        "original_caption dropped",
        in_json(lambda new, old: new.pop("original_caption")),
        "'original_caption' is nothing, but should be 'a man",
    ),
    (
        "original_caption is the new one",
        in_json(lambda new, old: new.update(original_caption=new["caption"])),
        "'original_caption' is 'A photo",
    ),
    ("a field dropped", in_json(lambda new, old: new.pop("status")), "'status' is nothing, but should be 'success'"),
    (
        "a null field dropped",
        in_json(lambda new, old: new.pop("error_message")),
        "'error_message' is nothing, but should be null",
    ),
    ("a field changed", in_json(lambda new, old: new.update(status="x")), "'status' is 'x', but should be 'success'"),
    ("a number as a float", in_json(lambda new, old: new.update(n=1e30)), "'n' is 1e+30, but should be 1000"),
    ("a number as text", in_json(lambda new, old: new.update(f="2.5")), "'f' is '2.5', but should be 2.5"),
    ("a field added", in_json(lambda new, old: new.update(more=1)), "'more' is 1, but should be nothing"),
    ("a null field added", in_json(lambda new, old: new.update(more=None)), "'more' is null, but should be nothing"),
    ("sha256 left", left("sha256"), "'sha256' is '000"),
    ("width left", left("width"), "'width' is 48"),
    ("height left", left("height"), "'height' is 32"),
    ("original_width left", left("original_width"), "'original_width' is 480, but should be 64"),
    ("original_height left", left("original_height"), "'original_height' is 320, but should be 64"),
    ("url left", left("url"), "'url' is 'https://example.org/a.jpg', but should be ''"),
    ("exif left", left("exif"), "'exif' is '{\"a\": 1}', but should be ''"),
    ("boxes left", left("face_bboxes"), "its json still has the old image's face_bboxes"),
    (
        "another caption",
        in_json(lambda new, old: new.update(caption=old["caption"])),
        "its json does not hold the new caption",
    ),
    ("a set field forgotten", left("rating"), "'rating' is 1, but should be 2.5"),
    (
        "a set list changed",
        in_json(lambda new, old: new.update(list=[1, 0])),
        "'list' is [1, 0], but should be [1, None]",
    ),
    (
        "no provenance",
        in_json(lambda new, old: new.pop("provenance")),
        "'provenance' is nothing, but should be {'replaced'",
    ),
    (
        "provenance without a replaced field",
        of_provenance(lambda all: all["replaced"].pop("url")),
        "'provenance' is {'replaced'",
    ),
    (
        "provenance of another replaced field",
        of_provenance(lambda all: all["replaced"].update(rating=9)),
        "'provenance' is {'replaced'",
    ),
    *(
        (
            f"provenance with another {name}",
            of_provenance(lambda all, name=name: all.update({name: "x"})),
            "'provenance' is {'replaced'",
        )
        for name in ("model", "seed", "prompt", "stage", "version", "options")
    ),
    ("fields in another order", in_json(reordered), "its json has the right fields in another order than the source"),
    (
        "another layout",
        in_json(lambda new, old: None, indent=2),
        "its json has the right fields, but not in the writer's layout",
    ),
]


@pytest.mark.parametrize(("plant", "said"), [one[1:] for one in JSON], ids=[one[0] for one in JSON])
def test_a_fault_of_the_json(
    problems: Callable[..., list[str]], monkeypatch: Patch, plant: Callable[[Patch], None], said: str
) -> None:
    plant(monkeypatch)
    [problem] = problems()
    assert problem.startswith(label(1)), problem
    assert said in problem


def test_the_provenance_before_is_lost(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    of_provenance(lambda all: all.pop("before", None))(monkeypatch)
    [problem] = problems()
    assert problem.startswith(f"{label(4)}its json field 'provenance' is")


def test_the_first_caption_is_lost(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    def caption_before(new: Fields, old: Fields) -> None:
        new["original_caption"] = old["caption"]

    in_json(caption_before)(monkeypatch)
    [problem] = problems()
    assert problem.startswith(f"{label(4)}its json field 'original_caption' is 'a man")


def test_a_caption_alone(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    """Of a sample that keeps its picture the fields that describe it stay."""
    in_json(lambda new, old: new.update(sha256=""))(monkeypatch)
    assert problems("captions") == [f"{label(1)}its json field 'sha256' is '', but should be '{'0' * 64}'"]


# --- what the writer takes for an edit ---


def of_edits(change: Callable[[edit.Edit], Any]) -> Callable[[Patch], None]:
    """A fault in what a row of the write SQL is taken for."""

    def plant(patch: Patch) -> None:
        real = shard_plan._edit

        def edited(*arguments: Any) -> Any:
            found = real(*arguments)
            return change(found) if isinstance(found, edit.Edit) else found

        patch.setattr(shard_plan, "_edit", edited)

    return plant


def with_caption_of_now(patch: Patch) -> None:
    """The prompt as it is now, and not the one that the picture was made from."""
    real = shard_plan._edit

    def edited(row: Fields, *rest: Any) -> Any:
        return real({**row, "image_prompt": row["prompt"]}, *rest)

    patch.setattr(shard_plan, "_edit", edited)


def rounding(patch: Patch) -> None:
    replace_everywhere(
        patch, shard_plan._json_value, lambda value, name, row: round(value) if name == "set_Rating" else value
    )


def another_run(patch: Patch) -> None:
    patch.setattr(image.Provenance, "of", lambda self, run: {"stage": "generate", "version": "0", "options": "0"})


def one_more(patch: Patch) -> None:
    """An edit of a row that the SQL does not return."""
    real = shard_plan.plan_shard

    def planned(*arguments: Any, **more: Any) -> shard_plan.ShardPlan:
        plan = real(*arguments, **more)
        plan.edits[0] = replace(plan.edits[1], row=0)
        return plan

    replace_everywhere(patch, real, planned)


def not_dropped(found: edit.Edit) -> Any:
    return None if found.dropped else found


EDITS: list[tuple[str, Callable[[Patch], None], str]] = [
    (
        "an edit forgotten",
        of_edits(lambda found: None if found.row == 1 else found),
        f"{label(1)}its txt is not the new caption",
    ),
    (
        "an edit kept back",
        of_edits(lambda found: edit.NO_TEXT if found.row == 1 else found),
        f"{label(1)}its txt is not the new caption",
    ),
    ("a sample not dropped", of_edits(not_dropped), f"{label(5)[:-2]} should be dropped"),
    (
        "a sample dropped",
        of_edits(lambda found: replace(found, dropped=True)),
        f"{label(1)[:-2]} should be edited, but is not at byte",
    ),
    ("a row that the SQL does not return", one_more, f"shard '{SHARD}': row 0: member '{KEYS[0]}.jpg' is not edited"),
    ("the prompt of now", with_caption_of_now, f"{label(1)}its txt is not the new caption"),
    (
        "a caption with a space",
        of_edits(lambda found: replace(found, caption=f"{found.caption} ")),
        f"{label(1)}its txt is not",
    ),
    (
        "other boxes",
        of_edits(lambda found: replace(found, boxes=("others",))),
        f"{label(1)}its json still has the old image's face_bboxes",
    ),
    (
        "a set field left out",
        of_edits(lambda found: replace(found, fields={})),
        f"{label(1)}its json field 'rating' is 1",
    ),
    ("a set field rounded", rounding, f"{label(1)}its json field 'rating' is 2"),
    ("another run", another_run, f"{label(1)}its json field 'provenance' is"),
]


@pytest.mark.parametrize(("plant", "said"), [one[1:] for one in EDITS], ids=[one[0] for one in EDITS])
def test_a_fault_of_an_edit(
    problems: Callable[..., list[str]], monkeypatch: Patch, plant: Callable[[Patch], None], said: str
) -> None:
    plant(monkeypatch)
    [problem] = problems()
    assert problem.startswith(said), problem


# --- members, pictures and captions ---


def of_members(change: Callable[[tuple[edit.Member, ...]], tuple[edit.Member, ...]]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        real = edit.members_of

        def members(*arguments: Any) -> Any:
            found = real(*arguments)
            return found if isinstance(found, str) else change(found)

        replace_everywhere(patch, real, members)

    return plant


def of_bodies(holds: str, change: Callable[[bytes], bytes]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        real = splice._Splicer._bodies

        def bodies(self: Any, *arguments: Any) -> Iterator[Any]:
            for member, content, digest in real(self, *arguments):
                yield (member, change(content), "") if member.holds == holds else (member, content, digest)

        patch.setattr(splice._Splicer, "_bodies", bodies)

    return plant


def picture_of_another(patch: Patch) -> None:
    real = splice._Splicer._picture

    def other(self: Any, one: edit.Edit) -> tuple[bytes, str]:
        rows = sorted(row for row, each in self._plan.edits.items() if each.image)
        return real(self, self._plan.edits[rows[rows.index(one.row) - 1]])

    patch.setattr(splice._Splicer, "_picture", other)


def unpadded(patch: Patch) -> None:
    """Bytes that are not zero behind a member."""
    real = splice._Splicer._prepare

    def prepared(self: Any, one: edit.Edit) -> Any:
        found = real(self, one)
        parts = [
            part.replace(b"\0", b"x") if isinstance(part, bytes) and part and not any(part) else part
            for part in found.parts
        ]
        return replace(found, parts=parts)

    patch.setattr(splice._Splicer, "_prepare", prepared)


MEMBERS: list[tuple[str, Callable[[Patch], None], str]] = [
    (
        "another order",
        of_members(lambda all: all[::-1]),
        "its members are txt, json, jpg, but should be jpg, json, txt",
    ),
    (
        "the json missing",
        of_members(lambda all: tuple(m for m in all if m.holds != "json")),
        "its members are jpg, txt, but should be jpg, json, txt",
    ),
    (
        "the txt missing",
        of_members(lambda all: tuple(m for m in all if m.holds != "txt" or len(all) == 2)),
        "its members are jpg, json, but should be",
    ),
    ("the picture missing", of_members(lambda all: all[1:]), "its members are json, txt, but should be"),
    (
        "one more",
        of_members(lambda all: (*all, edit.Member("cls", 0, "json", True))),
        "its members are jpg, json, txt, cls, but should be",
    ),
    (
        "another name",
        of_members(lambda all: (replace(all[0], extension="jpeg"), *all[1:])),
        "its members are jpeg, json, txt, but",
    ),
    ("the picture of another sample", picture_of_another, "its image is not the one that the table describes"),
    (
        "the picture cut",
        of_bodies("image", lambda data: data[:-1]),
        "its image is not the one that the table describes",
    ),
    ("the caption in the txt cut", of_bodies("txt", lambda data: data[:-1]), "its txt is not the new caption"),
    ("a line end after the caption", of_bodies("txt", lambda data: data + b"\n"), "its txt is not the new caption"),
    ("bytes behind a member", unpadded, "its member 'jpg' is followed by bytes that are not zero"),
]


@pytest.mark.parametrize(("plant", "said"), [one[1:] for one in MEMBERS], ids=[one[0] for one in MEMBERS])
def test_a_fault_of_members(
    problems: Callable[..., list[str]], monkeypatch: Patch, plant: Callable[[Patch], None], said: str
) -> None:
    plant(monkeypatch)
    [problem] = problems()
    assert problem.startswith(f"{label(1)}{said}"), problem


# --- headers ---


def of_header(start: int, value: bytes, *, kind: bytes = b"0", row: int | None = None) -> Callable[[Patch], None]:
    """A field of the headers of edited members, with a right checksum.

    Args:
        kind: type byte of the headers that are changed: `x` for those of pax.
    """

    def plant(patch: Patch) -> None:
        real = record_heads.remake_record_head

        def remade(old: bytes, name: str, size: int) -> bytes:
            head = bytearray(real(old, name, size))
            for at in range(0, len(head), blocks.BLOCK):
                if head[at + 156 : at + 157] == kind and head[at + 257 : at + 262] == b"ustar":
                    head[at + start : at + start + len(value)] = value
                    head[at + 148 : at + 156] = b" " * 8
                    head[at + 148 : at + 156] = b"%06o\0 " % sum(head[at : at + blocks.BLOCK])
            return bytes(head) if row is None or KEYS[row] in name else real(old, name, size)

        replace_everywhere(patch, real, remade)

    return plant


def of_pax(change: Callable[[dict[bytes, bytes]], object], row: int | None = None) -> Callable[[Patch], None]:
    """A fault in the pax records of edited members."""

    def plant(patch: Patch) -> None:
        real = record_heads.remake_record_head

        def remade(old: bytes, name: str, size: int) -> bytes:
            head = real(old, name, size)
            if head[156:157] != b"x" or (row is not None and KEYS[row] not in name):
                return head
            length = blocks.number_of(head[124:136])
            records = walk.pax_records(head[512 : 512 + length], 0)
            change(records)
            body = b"".join(record_heads._pax_record(key, value) for key, value in records.items())
            first, last = bytearray(head[:512]), head[-512:]
            first[124:136] = b"%011o\0" % len(body)
            first[148:156] = b" " * 8
            first[148:156] = b"%06o\0 " % sum(first)
            return (bytes(first) + body + bytes(blocks.padding(len(body))) if body else b"") + last

        replace_everywhere(patch, real, remade)

    return plant


HEADER = "its member 'jpg' has another header than the record that it replaces: "
HEADS: list[tuple[str, int, Callable[[Patch], None], str]] = [
    ("mode", 1, of_header(100, b"0000777\0"), "mode"),
    ("uid", 1, of_header(108, b"0000777\0"), "uid"),
    ("gid", 1, of_header(116, b"0000777\0"), "gid"),
    ("time", 1, of_header(136, b"00000000000\0"), "mtime"),
    ("user", 1, of_header(265, b"root\0\0\0"), "uname"),
    ("group", 1, of_header(297, b"root\0\0\0"), "gname"),
    ("device", 1, of_header(329, b"0000001\0"), "devmajor"),
    ("type", 1, of_header(156, b"7"), "type"),
    ("target of a link", 1, of_header(157, b"x"), "linkname"),
    ("rest of the block", 1, of_header(505, b"x"), "the end of the block"),
    ("not ustar", 1, of_header(257, b"ustar  \0"), "the format"),
    ("old tar", 1, of_header(257, bytes(8)), "the format"),
    ("pax mtime changed", 1, of_pax(lambda records: records.update({b"mtime": b"1.5"})), "the pax records"),
    ("pax mtime lost", 1, of_pax(lambda records: records.pop(b"mtime")), "the pax records"),
    ("a pax record more", 1, of_pax(lambda records: records.update({b"comment": b"x"})), "the pax records"),
    ("pax header's mode", 1, of_header(100, b"0000777\0", kind=b"x"), "mode of the pax header"),
    ("mode of a long name", 2, of_header(100, b"0000777\0", row=2), "mode"),
    ("pax header of a long name", 2, of_header(100, b"0000777\0", kind=b"x", row=2), "mode of the pax header"),
    ("pax mtime of a long name", 2, of_pax(lambda records: records.pop(b"mtime"), row=2), "the pax records"),
]


@pytest.mark.parametrize(("row", "plant", "said"), [one[1:] for one in HEADS], ids=[one[0] for one in HEADS])
def test_a_fault_of_headers(
    problems: Callable[..., list[str]], monkeypatch: Patch, row: int, plant: Callable[[Patch], None], said: str
) -> None:
    plant(monkeypatch)
    [problem] = problems()
    assert problem == f"{label(row)}{HEADER}{said}"


def test_a_fault_of_a_name_or_a_size(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    """The index of the tar finds these: another member is there, or the bytes do not follow one another."""
    with monkeypatch.context() as patch:
        of_header(0, b"x")(patch)
        [problem] = problems()
        assert problem.startswith(f"{label(1)[:-2]} should be edited, but is not at byte")
    with monkeypatch.context() as patch:
        of_header(124, b"00000001000\0")(patch)
        [problem] = problems()
        assert problem.startswith(f"shard '{SHARD}': the hybrid shard: no tar header at byte")
    with monkeypatch.context() as patch:
        of_pax(lambda records: records.update({b"path": b"x"}), row=2)(patch)
        [problem] = problems()
        assert problem.startswith(f"{label(2)[:-2]} should be edited, but is not at byte")


# --- the manifest and the statistics ---


def of_manifest(name: str, value: Any, row: int = 3) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        real = splice._Splicer._manifest

        def rows(self: Any) -> pa.Table:
            table = real(self)
            values = table[name].to_pylist()
            values[row] = value
            at = table.column_names.index(name)
            return table.set_column(at, table.field(name), pa.array(values, table.field(name).type))

        patch.setattr(splice._Splicer, "_manifest", rows)

    return plant


MANIFEST = [
    ("shard", "b", 3),
    ("row", 0, 3),
    ("member", "x.jpg", 3),
    ("sha256", "0" * 64, 3),
    ("sha256", "0" * 64, 0),
    ("origin", "source", 3),
    ("provenance", "{}", 3),
    ("provenance", "{}", 9),
]


@pytest.mark.parametrize(("name", "value", "row"), MANIFEST)
def test_a_fault_of_a_row_of_the_manifest(
    problems: Callable[..., list[str]], monkeypatch: Patch, name: str, value: Any, row: int
) -> None:
    of_manifest(name, value, row)(monkeypatch)
    [problem] = problems()
    assert problem.startswith(f"shard '{SHARD}': its manifest's row {row}, of member '")
    assert f"' says {name} = {value!r}, but should say " in problem.replace("', says", "' says")


def without_seed(patch: Patch) -> None:
    real = edit._provenance

    def provenance(*arguments: Any) -> Fields:
        found = real(*arguments)
        found.pop("seed", None)
        return found

    patch.setattr(edit, "_provenance", provenance)


def test_a_manifest_without_what_made_a_sample(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    """Row 3 has no json: how it was made stands in the manifest."""
    real = edit.manifest_provenance
    replace_everywhere(monkeypatch, real, lambda *arguments: json.dumps({**json.loads(real(*arguments)), "seed": -1}))
    [problem] = problems()
    assert problem.startswith(f"shard '{SHARD}': its manifest's row 9, of member '{KEYS[3]}.jpg', says provenance = ")


def test_provenance_without_a_seed_in_json_and_manifest(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    without_seed(monkeypatch)
    [problem] = problems()
    assert problem.startswith(f"{label(1)}its json field 'provenance' is")


@pytest.mark.parametrize("name", ["rows", "edited", "dropped", "size", "copied", "source_end_mark"])
def test_a_fault_of_what_the_manifest_says_of_the_shard(
    problems: Callable[..., list[str]], monkeypatch: Patch, name: str
) -> None:
    real = splice._Splicer._encoded

    def encoded(self: Any, table: pa.Table) -> pa.Buffer:
        written = self.written
        self.written = replace(written, **{name: not getattr(written, name) if name == "source_end_mark" else 1000})
        try:
            return real(self, table)
        finally:
            self.written = written

    monkeypatch.setattr(splice._Splicer, "_encoded", encoded)
    [problem] = problems()
    assert f"its manifest says {name} = " in problem


@pytest.mark.parametrize("name", ["count", "successes", "edited", "more"])
def test_a_fault_of_the_statistics(problems: Callable[..., list[str]], monkeypatch: Patch, name: str) -> None:
    real = manifest.Written.statistics.fget
    assert real is not None
    monkeypatch.setattr(manifest.Written, "statistics", property(lambda self: {**real(self), name: 1000}))
    found = problems()
    assert f"shard '{SHARD}': '{SHARD}_stats.json' says " in found[0]


# --- faults in code that the writer has from elsewhere ---


def test_a_pax_reader_that_loses_records(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    real = walk.pax_records

    def faulty(body: bytes, at: int) -> dict[bytes, bytes]:
        return {key: value for key, value in real(body, at).items() if not key.startswith(b"LIBARCHIVE.")}

    replace_everywhere(monkeypatch, real, faulty)
    assert problems() == [f"{label(6)}{HEADER}the pax records"]


def test_an_end_of_the_archive_that_is_too_short(problems: Callable[..., list[str]], monkeypatch: Patch) -> None:
    replace_everywhere(monkeypatch, blocks.end_of_archive, lambda length: bytes(2 * blocks.BLOCK))
    [problem] = problems()
    assert problem.startswith(f"shard '{SHARD}': it should end at byte "), problem


def test_names_of_fields_that_are_not_compared_as_sql_does(
    problems: Callable[..., list[str]], monkeypatch: Patch
) -> None:
    """The column `set_Rating` sets the field `rating`; the writer takes it for another one."""
    monkeypatch.setattr(edit, "folded", lambda name: name)
    [problem] = problems()
    assert problem == f"{label(1)}its json field 'rating' is 1, but should be 2.5"


# --- what the proof shares with the writer ---


#: What the proof takes from the packages of tars and of hybrid shards, and why a fault there is not one of the proof's.
OF_TAR_AND_HYBRID = {
    "hybrid.edit.Rules": "the settings of the pipeline, no more than data",
    "hybrid.manifest.read_description": "a manifest's digest and counts, which are compared with counted ones",
    "hybrid.shard_plan.ShardPlan": "of it only the source, the digest and the rows of the write SQL are read",
    "tar.blocks.BLOCK": "the block size of every tar",
    "tar.blocks.MAX_OCTAL": "the largest size of a header's field; a header beyond it has another length",
    "tar.blocks.REGULAR": "which members have content: the writer knows none of them by this",
    "tar.blocks.number_of": "reads every size of the source, which could not be read with a wrong one",
    "tar.blocks.padding": "leads from record to record of the source, which could not be read with a wrong one",
    "tar.index.Index": "where members are, no more than data",
    "tar.indexing.index": "reads the source, which other programs wrote, and refuses it where records do not follow",
    "tar.member_names.belongs": "which members are of samples; the table's rows are compared with it",
    "tar.member_names.split_name": "a sample's key in a member's name; every member of a row must have the row's key",
}
#: What the proof and the writer both take from elsewhere.
OF_BOTH = {
    "errors.BuilderError": "an error",
    "errors.ShardError": "an error",
    "formats.JPG": "the name of a format",
    "formats.OF_EXTENSION": "a table of extensions, no more than data",
    "machine.explained": "text of a message",
    "machine.is_of_the_machine": "which errors are the machine's",
    "sources.members.AGAIN": "text of a message",
    "store.files.read_at": "bytes at a place of a file; the source's are compared with the hybrid shard's",
    "store.layout.Layout": "paths",
    "store.layout.RunFiles": "paths",
    "table.edits.EditsReader": "bytes at a place of an edits tar; they are compared with the table's sha256",
    "table.edits.again": "text of a message",
    "table.partitions.partition_state": "the path of a source; its members are compared with the table's",
    "table.partitions.read_partition": "reads the table, which is compared with its column files",
}


def taken(paths: Iterable[Path], modules: Collection[str]) -> set[str]:
    """What files use of the package: `tar.blocks.BLOCK`, for modules of `modules` by attribute."""
    found: set[str] = set()
    for path in paths:
        tree = ast.parse(path.read_text("utf-8"))
        local: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "builder":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}".removeprefix("builder.")
                    if whole in modules:
                        local[alias.asname or alias.name] = whole
                    else:
                        found.add(whole)
            assert not (isinstance(node, ast.Import) and any(one.name[:7] == "builder" for one in node.names)), path
        inside = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in local]
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        by_attribute = {id(node.value): node.attr for node in used}
        found |= {f"{local[node.id]}.{by_attribute.get(id(node), '')}" for node in inside}
    return found


def test_the_proof_shares_no_decision_with_the_writer() -> None:
    """Whatever decides what an edited sample holds or what its header says is the proof's own."""
    folder = Path(proof.__file__).parent
    package = folder.parents[1]
    by_attribute = {str(path.relative_to(package).with_suffix("")).replace("/", ".") for path in package.rglob("*.py")}
    of_proof = taken(folder.glob("*.py"), by_attribute)
    of_proof = {name for name in of_proof if not name.startswith("hybrid.verify")}
    assert {name for name in of_proof if name.split(".")[0] in ("tar", "hybrid")} == OF_TAR_AND_HYBRID.keys()
    of_writer = taken([*folder.parent.glob("*.py"), package / "tar/record_heads.py"], by_attribute)
    assert (of_proof & of_writer) - OF_TAR_AND_HYBRID.keys() == OF_BOTH.keys()
    readers = {package / f"{name.replace('.', '/')}.py" for name in by_attribute if name.startswith("tar.")}
    readers.remove(package / "tar/record_heads.py")  # makes headers
    assert not [name for name in taken(readers, by_attribute) if name.startswith(("tar.record_heads", "hybrid"))]
    attributes = {
        node.attr
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("plan", "self._plan")
    }
    assert attributes == {"shard", "source", "digest", "selected"}

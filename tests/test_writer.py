"""The writer: what an edited sample is, what is refused, what is up to date."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import ConfigError, ShardError
from builder.hybrid import shard_plan, splice
from builder.hybrid.edit import Edit, edited_json
from builder.hybrid.output_folder import is_written
from builder.progress import Talk
from builder.store import files
from builder.table import partitions
from builder.verbs.ingest import run_ingest
from builder.verbs.snapshot import Snapshot
from builder.verbs.write import plan_write, run_write, write_plans
from conftest import Sample, Workspace, picture, read_tar, samples, write_tar

MADE = {
    "image_width": 64, "image_height": 48, "image_sha256": "f" * 64, "image_seed": 7, "image_model": "sketch",
    "image_prompt": "a new man", "stage": "generate", "version": "1", "options": "0011223344556677",
}  # fmt: skip


def plan_of(made: Workspace, *sets: str) -> shard_plan.ShardPlan:
    """What is planned for the first hybrid shard."""
    [plan] = write_plans(Snapshot(made.load(*sets)), ["00000000"])
    return plan


def test_edited_json_of_a_new_image_is_this_text() -> None:
    old = {
        "uid": "ab", "face_bboxes": [[0, 0, 1, 1]], "caption": "ein Mann", "url": "https://example.org/ä.jpg",
        "key": "1", "width": 512, "height": 384, "original_width": 1024, "original_height": 768, "exif": "{}",
        "sha256": "0",
    }  # fmt: skip
    edit = Edit(0, image=("edits/a/r.tar", 512, 100), caption="a new man", made=MADE)
    assert json.loads(edited_json(json.dumps(old).encode(), edit)) == {
        "uid": "ab",
        "caption": "a new man",
        "url": "",
        "key": "1",
        "width": 64,
        "height": 48,
        "original_width": 64,
        "original_height": 48,
        "exif": "",
        "sha256": "f" * 64,
        "original_caption": "ein Mann",
        "provenance": {
            "replaced": {
                "caption": "ein Mann",
                "width": 512,
                "height": 384,
                "original_width": 1024,
                "original_height": 768,
                "sha256": "0",
                "url": "https://example.org/ä.jpg",
                "exif": "{}",
                "face_bboxes": [[0, 0, 1, 1]],
            },
            "model": "sketch",
            "seed": 7,
            "prompt": "a new man",
            "stage": "generate",
            "version": "1",
            "options": "0011223344556677",
        },
    }


def test_edited_json_keeps_the_first_caption_and_the_provenance_before() -> None:
    old = {"caption": "second", "original_caption": "first", "provenance": {"model": "older"}}
    new = json.loads(edited_json(json.dumps(old).encode(), Edit(0, caption="third")))
    assert new == {
        "caption": "third",
        "original_caption": "first",
        "provenance": {"replaced": {"caption": "second"}, "before": {"model": "older"}},
    }


def test_edited_json_is_ascii_with_indent_4_and_reads_a_byte_order_mark() -> None:
    text = edited_json(b'\xef\xbb\xbf{"caption": "x"}', Edit(0, caption="é"))
    assert text.startswith(b'{\n    "caption": "\\u00e9",\n')


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_edited_json_is_laid_out_as_the_standard_library_does(value: object) -> None:
    fields = {"caption": None, "mine": value}
    expected = {**fields, "caption": "new", "original_caption": None, "provenance": {"replaced": {"caption": None}}}
    text = edited_json(json.dumps(fields).encode(), Edit(0, caption="new"))
    assert json.loads(text) == expected
    assert _numbers_alike(text) == _numbers_alike(json.dumps(expected, indent=4).encode())


def _numbers_alike(text: bytes) -> bytes:
    """json with its floats as Python has them: 1e16 may be written as 1e+16, and 1e-05 as 0.00001."""
    number = rb"-?\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)"
    return re.sub(number, lambda match: repr(float(match[0])).encode(), text)


def test_members_of_no_sample_between_those_of_an_edited_one_stay(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"b": []})
    sample = samples(2)[1]
    (jpg, txt, body) = (dict(sample.members())[f"{sample.key}.{e}"] for e in ("jpg", "txt", "json"))
    members = [
        ("README", b"first"), (f"{sample.key}.txt", txt), ("notes", b"between"), (f"{sample.key}.jpg", jpg),
        (f"{sample.key}.cls", b"7"), (f"{sample.key}.json", body), ("LICENSE", b"last"),
    ]  # fmt: skip
    write_tar(made.folder / "source/b.tar", members)
    made.run("run")
    made.run("verify")
    source, hybrid = read_tar(made.folder / "source/b.tar"), read_tar(made.root / "shards/b.tar")
    assert sorted(hybrid) == sorted(source)
    assert [name for name in source if source[name] != hybrid[name]] == [
        f"{sample.key}.txt", f"{sample.key}.jpg", f"{sample.key}.json",
    ]  # fmt: skip


def test_manifest_names_every_member_and_what_made_it(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(2)})
    made.run("run")
    rows = pq.read_table(made.root / "shards/manifest/a.parquet").to_pylist()
    assert [(row["row"], row["member"][-4:], row["origin"], row["sha256"] is None) for row in rows] == [
        (0, ".jpg", "source", True),
        (0, "json", "source", True),
        (0, ".txt", "source", True),
        (1, ".jpg", "edited", False),
        (1, "json", "edited", False),
        (1, ".txt", "edited", False),
    ]


def test_only_shards_that_changed_are_written_again(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")
    before = {path.name: path.stat().st_mtime_ns for path in (made.root / "shards").glob("*.tar")}
    sets = ("--set", "stages.prompts.style=A painting of {caption}")
    made.run("stage", "prompts", "--redo", "--where", "shard = '00000001'", *sets)
    made.run("stage", "generate", "--stale", *sets)
    assert "write: 1 shards" in made.run("write", *sets).stderr
    after = {path.name: path.stat().st_mtime_ns for path in (made.root / "shards").glob("*.tar")}
    assert after["00000000.tar"] == before["00000000.tar"]
    assert after["00000001.tar"] != before["00000001.tar"]


def test_a_lost_or_cut_output_is_written_again(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")
    wanted = (made.root / "shards/00000000.tar").read_bytes()
    for spoil in (lambda p: p.unlink(), lambda p: os.truncate(p, 512)):
        spoil(made.root / "shards/00000000.tar")
        assert "write: 1 shards" in made.run("write").stderr
        assert (made.root / "shards/00000000.tar").read_bytes() == wanted


def plan_error(made: Workspace, sql: str) -> str:
    made.folder.joinpath("w.sql").write_text(sql)
    pipeline = made.load(f"write.select={made.folder}/w.sql")
    with pytest.raises(ConfigError) as caught:
        plan_write(Snapshot(pipeline))
    return str(caught.value).replace(str(made.folder), "FOLDER")


def test_write_sql_with_an_unknown_column(dataset: Workspace) -> None:
    assert plan_error(dataset, "select shard, row, uid, 1 as rating from samples") == (
        "write SQL returned a column 'rating', which the writer does not know\n"
        "  file: FOLDER/w.sql\n"
        "  returned: shard, row, uid, rating\n"
        "  fix: to set a json field, write: rating as set_rating"
    )


def test_write_sql_with_an_image_without_its_prompt(dataset: Workspace) -> None:
    assert plan_error(dataset, "select shard, row, uid, image_path, image_offset, image_size from samples") == (
        "write SQL returned 'image_path' without 'image_prompt'\n"
        "  file: FOLDER/w.sql\n"
        "  returned: shard, row, uid, image_path, image_offset, image_size\n"
        "  fix: select all of: image_path, image_offset, image_size, image_prompt, "
        "prompt, image_width, image_height, image_sha256"
    )


def test_write_sql_with_a_row_twice(dataset: Workspace) -> None:
    sql = "select shard, row, uid, 'x' as caption from samples, range(2) where row = 3 and shard = '00000000'"
    assert plan_error(dataset, sql) == (
        "write SQL returns row 3 of shard '00000000' more than once\n"
        "  file: FOLDER/w.sql\n"
        "  fix: return each sample once: select distinct on (shard, row), or aggregate the join that repeats it"
    )


def test_a_run_that_is_gone_is_named(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")
    run = made.rows("select any_value(generate_run) from samples")[0][0]
    (made.root / "runs" / run / "run.json").unlink()
    with pytest.raises(ConfigError) as caught:
        run_write(made.load(), Talk(quiet=True))
    assert str(caught.value) == (
        f"run '{run}' is gone; it records how images were made\n"
        f"  file: {made.root}/runs/{run}/run.json\n"
        "  fix: make them again: builder stage generate --redo"
    )


def test_output_where_the_source_lies(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    source = made.folder / "shards"
    (made.folder / "source").rename(source)
    sets = (f"dataset.shards={source}/*.tar", f"dataset.root={made.folder}")
    before = {path: path.read_bytes() for path in source.iterdir()}
    for verb in (run_ingest, run_write):
        with pytest.raises(ConfigError) as caught:
            verb(made.load(*sets), Talk(quiet=True))
        assert str(caught.value) == (
            "hybrid shards would be written into the folder of the source\n"
            f"  source: {source}/00000000.tar\n"
            f"  output: {source}\n"
            "  fix: set dataset.root to another folder; hybrid shards go to its shards/, or to [write] folder"
        )
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_a_source_that_vanished_is_refused_and_the_others_are_written(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("ingest")
    plan = plan_write(Snapshot(made.load()))
    assert [part.shard for part in plan.todo] == ["00000000", "00000001"]
    first = plan_of(made)
    (made.folder / "source/00000000.tar").unlink()
    with pytest.raises(ShardError) as caught:
        splice.write_shard(made.load().layout, first)
    assert str(caught.value) == (
        "the source shard cannot be read: No such file or directory\n"
        "  shard: 00000000\n"
        f"  file: {made.folder}/source/00000000.tar\n"
        "  fix: put it back, or ingest it as it is now: builder ingest"
    )
    assert not (made.root / "shards/00000000.tar").exists()


@pytest.mark.parametrize("is_put_back", [False, True])
def test_a_source_cut_while_it_is_copied_is_refused(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, is_put_back: bool
) -> None:
    made = workspace()
    made.run("run")
    before = (made.root / "shards/00000000.tar").read_bytes()
    first = plan_of(made)
    source = made.folder / "source/00000000.tar"
    content, times, real = source.read_bytes(), source.stat(), os.writev

    def writev(target: int, parts: list[bytes]) -> int:
        os.truncate(source, len(content) - 100)  # in its last page, whose rest the kernel then shows as zeros
        done = real(target, parts)
        if is_put_back:
            with source.open("r+b") as file:
                file.write(content)
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
        return done

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(ShardError) as caught:
        splice.write_shard(made.load().layout, first)
    assert str(caught.value) == (
        "the source shard changed while it was copied\n"
        "  shard: 00000000\n"
        f"  file: {source}\n"
        "  fix: run the same command again; if that does not help: builder ingest"
    )
    assert (made.root / "shards/00000000.tar").read_bytes() == before
    assert [path.name for path in (made.root / "shards").iterdir() if path.name.startswith(".")] == []


def test_a_source_that_is_linked_meanwhile_is_copied_again(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workspace()
    made.run("run")
    before = (made.root / "shards/00000000.tar").read_bytes()
    first = plan_of(made)
    source, real = made.folder / "source/00000000.tar", os.writev

    def writev(target: int, parts: list[bytes]) -> int:
        if not (made.folder / "backup.tar").exists():
            os.link(source, made.folder / "backup.tar")
        return real(target, parts)

    monkeypatch.setattr(os, "writev", writev)
    assert splice.write_shard(made.load().layout, first).edited == len(first.edits)
    assert (made.root / "shards/00000000.tar").read_bytes() == before


def test_a_source_that_changes_while_its_partition_is_read_is_refused(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workspace()
    made.run("run")
    first = plan_of(made)
    source, real = made.folder / "source/00000000.tar", partitions.read_partition

    def read(*arguments: Any) -> Any:
        with source.open("r+b") as file:
            file.write(bytes(512))
        return real(*arguments)

    monkeypatch.setattr(partitions, "read_partition", read)
    with pytest.raises(ShardError, match="the source shard changed while it was copied"):
        splice.write_shard(made.load().layout, first)


def test_json_that_is_not_what_was_ingested_is_refused_with_its_row(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("ingest")
    source = made.folder / "source/00000000.tar"
    times, content = source.stat(), source.read_bytes()
    source.write_bytes(content.replace(b"{", b"!"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    sql = made.folder / "write.sql"
    sql.write_text("select shard, row, uid, 'new' as caption from samples where row = 3")
    first = plan_of(made, f"write.select={sql}")
    with pytest.raises(ShardError) as caught:
        splice.write_shard(made.load().layout, first)
    assert str(caught.value) == (
        "the json of an edited sample differs from what was ingested: Expecting value: line 1 column 1 (char 0)\n"
        "  shard: 00000000\n"
        "  row: 3\n"
        "  fix: put it back, or ingest it as it is now: builder ingest"
    )


def test_large_members_of_an_edited_sample_are_copied(
    workspace: Callable[..., Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = random.Random(3).randbytes(3_000_001)
    content = [
        ("0.jpg", picture(0)), ("0.npy", large), ("0.json", b'{"caption": "old"}'), ("0.txt", b"old"),
        ("1.jpg", picture(1)), ("1.json", b"{}"), ("1.txt", b"other"),
    ]  # fmt: skip
    made = workspace({})
    (tmp_path / "source").mkdir()
    write_tar(tmp_path / "source/a.tar", content)
    made.run("ingest")
    sql = tmp_path / "write.sql"
    sql.write_text("select shard, row, uid, 'new' as caption from samples where row = 0")
    made.run("write", "--set", f"write.select={sql}")
    made.run("verify", "--set", f"write.select={sql}")
    hybrid = read_tar(made.root / "shards/a.tar")
    assert list(hybrid) == [name for name, _ in content]
    assert hybrid["0.npy"] == large and hybrid["0.txt"] == b"new" and hybrid["1.txt"] == b"other"
    manifest = pq.read_table(made.root / "shards/manifest/a.parquet").to_pylist()
    assert [row["sha256"] for row in manifest if row["member"] == "0.npy"] == [hashlib.sha256(large).hexdigest()]

    sizes: list[int] = []
    real = files.read_at

    def read_at(descriptor: int, offset: int, size: int) -> bytes:
        sizes.append(size)
        return real(descriptor, offset, size)

    monkeypatch.setattr(files, "read_at", read_at)
    pipeline = made.load(f"write.select={sql}")
    [plan] = write_plans(Snapshot(pipeline), ["a"])
    splice.write_shard(pipeline.layout, plan)
    assert sum(sizes) > len(large) and max(sizes) <= 1 << 20  # read for its hash, a piece at a time


@pytest.mark.parametrize("value", [b"source", b"builder.output", b"builder.digest"])
def test_a_damaged_manifest_is_written_again(workspace: Callable[..., Workspace], value: bytes) -> None:
    made = workspace()
    made.run("run")
    manifest = made.load().layout.manifest("00000000")
    raw, planned = bytearray(manifest.read_bytes()), plan_of(made)
    for shift in range(-2, len(value) + 4):
        damaged = bytearray(raw)
        damaged[raw.rfind(value) + shift] ^= 0xFF
        manifest.write_bytes(damaged)
        assert not is_written(made.load().layout, planned), shift
    assert "1 shards" in made.run("write").stderr
    made.run("verify")


def test_a_webp_with_a_long_name_is_replaced(workspace: Callable[..., Workspace]) -> None:
    long_key = "folder/" * 15 + "f" * 32
    face = {"face_bboxes": [[0, 0, 1, 1]]}
    made = workspace(
        {
            "a": [
                Sample(
                    long_key, "a man with a hat is standing in the street", picture(1, extension="webp"), "webp", face
                )
            ]
        },
        form=tarfile.GNU_FORMAT,
        mtime=1_700_000_000,
    )
    made.run("run")
    made.run("verify")
    assert list(read_tar(made.root / "shards/a.tar")) == [f"{long_key}.{e}" for e in ("webp", "json", "txt")]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("date 'infinity'", "of type date32[day] outside the years 1 to 9999"),
        ("date '-infinity'", "of type date32[day] outside the years 1 to 9999"),
        ("date '20000-01-01'", "of type date32[day] outside the years 1 to 9999"),
        ("timestamp 'infinity'", "of type timestamp[us] outside the years 1 to 9999"),
        ("[date 'infinity']", "outside the years 1 to 9999"),
        ("{'a': timestamp '-infinity'}", "outside the years 1 to 9999"),
        ("union_value(a := 1)", "of type UNION(a INTEGER), which json does not have"),
        ("[union_value(a := 1)]", "which json does not have"),
        ("[340282366920938463463374607431768211455::uhugeint]", "of type UHUGEINT[], which json does not have"),
        (
            "170141183460469231731687303715884105727",
            "0141183460469231731687303715884105727, which has more than 38 digits",
        ),
        ("{'a': 100000000000000000000000000000000000000}", "which has more than 38 digits"),
    ],
)
def test_values_that_json_does_not_have_are_told_with_their_row(value: str, told: str, dataset: Workspace) -> None:
    """By plan and by write, without a traceback; null and text are taken."""
    path = dataset.folder / "write.sql"
    path.write_text(f"select shard, row, uid, case when row = 3 then {value} end as set_x from samples")
    for verb in ("plan", "write"):
        done = dataset.run(verb, "--set", f"write.select={path}", check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert "write SQL returned 'set_x'" in done.stderr
        assert told in done.stderr
        if "years" in told:
            assert "\n  shard: 00000000\n  row: 3\n  fix: return null or text: cast(set_x as varchar)" in done.stderr
    path.write_text(
        f"select shard, row, uid, cast(case when row = 3 then {value} end as varchar) as set_x from samples"
    )
    dataset.run("write", "--set", f"write.select={path}")

"""Other tools: they read our hybrid shards, and we read what they write, with the same keys and bytes."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from builder.tar import indexing
from conftest import PIPELINE, STANDARD_STAGES, USTAR_MTIME, Workspace, picture, samples, write_tar
from support.tars import Samples, by_builder, by_webdataset, gnu_tar, rows_of


def by_tarfile(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(info.name, archive.extractfile(info).read()) for info in archive if info.isreg()]  # type: ignore[union-attr]


def by_gnu_tar(path: Path) -> list[str]:
    return gnu_tar("--quoting-style=literal", "-tf", path, folder=path.parent)


# --- our shards in other tools ---


def written_by_webdataset(folder: Path) -> None:
    """Three shards by webdataset's ShardWriter: two of five samples, one of two; every third has no face."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%08d.tar", maxcount=5, verbose=0) as writer:
        for one in samples(12):
            writer.write({"__key__": one.key, "jpg": one.image, "json": one.body(), "txt": one.caption})


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A pipeline over what webdataset wrote, and a shard of long and odd names beside it; it has run."""
    folder = tmp_path_factory.mktemp("foreign")
    written_by_webdataset(folder / "source")
    odd = samples(6, start=20)
    for i, one in enumerate(odd):
        one.key = ["./", "a b/", "日本/", "folder-é/" * 14, "x/" * 60, ""][i] + one.key
    members = [member for one in odd for member in one.members()]
    write_tar(folder / "source/odd.tar", [("README", b"of no sample"), *members], form=tarfile.GNU_FORMAT, mtime=1)
    made = Workspace(folder, folder / "pipeline.toml")
    made.file.write_text(PIPELINE.format(folder=folder, stages=STANDARD_STAGES, workers=2, checkpoint_rows=2048))
    made.run("run")
    made.run("verify")
    return made


NAMES = ["00000000", "00000001", "00000002", "odd"]


@pytest.mark.parametrize("name", NAMES)
def test_gnu_tar_reads_hybrid_shards(hybrid: Workspace, name: str) -> None:
    new = by_gnu_tar(hybrid.root / f"shards/{name}.tar")
    assert new == by_gnu_tar(hybrid.folder / f"source/{name}.tar")
    assert len(new) == {"00000000": 15, "00000001": 15, "00000002": 6, "odd": 19}[name]


@pytest.mark.parametrize("name", NAMES)
def test_tarfile_reads_hybrid_shards(hybrid: Workspace, name: str) -> None:
    old, new = by_tarfile(hybrid.folder / f"source/{name}.tar"), by_tarfile(hybrid.root / f"shards/{name}.tar")
    assert [member for member, _ in new] == [member for member, _ in old]
    for (member, before), (_, after) in zip(old, new, strict=True):
        base = member.rpartition("/")[2]
        has_face = base != "README" and int(base[:32], 16) % 3 != 0
        assert (before != after) == has_face, member


@pytest.mark.parametrize("name", NAMES)
def test_webdataset_reads_hybrid_shards(hybrid: Workspace, name: str) -> None:
    old, new = by_webdataset(hybrid.folder / f"source/{name}.tar"), by_webdataset(hybrid.root / f"shards/{name}.tar")
    assert [key for key, _ in new] == [key for key, _ in old]
    for (key, before), (_, after) in zip(old, new, strict=True):
        assert list(after) == list(before) == ["jpg", "json", "txt"]
        if int(key.rpartition("/")[2][:32], 16) % 3 == 0:
            assert after == before
            continue
        with Image.open(io.BytesIO(after["jpg"])) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))
        assert json.loads(after["json"])["caption"] == after["txt"].decode()


def test_webdataset_reads_a_whole_set_of_hybrid_shards(hybrid: Workspace) -> None:
    urls = f"{hybrid.root}/shards/{{00000000..00000002}}.tar"
    keys = [one["__key__"] for one in webdataset.WebDataset(urls, shardshuffle=False)]
    assert keys == [f"{i:032x}-0" for i in range(12)]
    assert json.loads((hybrid.root / "shards/sizes.json").read_text()) == {
        "00000000.tar": 5, "00000001.tar": 5, "00000002.tar": 2, "odd.tar": 6,
    }  # fmt: skip


def test_gnu_tar_reads_edits_tars(hybrid: Workspace) -> None:
    paths = sorted((hybrid.root / "edits/00000000").glob("*.tar"))
    assert paths
    named = [name for path in paths for name in by_gnu_tar(path)]
    assert sorted(named) == [f"{row:08d}.jpg" for row in (1, 2, 4)]


# --- others' shards in ours ---


def two_samples() -> Samples:
    return [
        ("0001", {"jpg": picture(1), "json": b'{"caption": "one"}', "txt": b"one"}),
        ("dir/0002", {"json": b'{"caption": "two"}', "png": picture(2, extension="png"), "txt": b"zwei"}),
    ]


@pytest.mark.parametrize("options", [{}, {"mtime": USTAR_MTIME}, {"format": "GNU_FORMAT"}])
def test_what_tarwriter_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path), encoder=False, **options) as writer:
        for key, members in two_samples():
            writer.write({"__key__": key, **members})
    assert by_builder(path) == by_webdataset(path) == two_samples()
    # without a whole number as time every member has a pax header of its own
    record = indexing.index(path)
    assert (int(record.data[0]) == 1536) == ("mtime" not in options)


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_what_gnu_tar_writes(tmp_path: Path, form: str) -> None:
    (tmp_path / "in/dir").mkdir(parents=True)
    for key, members in two_samples():
        for extension, data in members.items():
            (tmp_path / f"in/{key}.{extension}").write_bytes(data)
    path = tmp_path / "a.tar"
    subprocess.run(["tar", f"--format={form}", "--sort=name", "-C", tmp_path / "in", "-cf", path, "."], check=True)
    got = by_builder(path)
    assert got == by_webdataset(path)
    assert got == [(f"./{key}", dict(sorted(members.items()))) for key, members in two_samples()]


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_what_gnu_tar_writes_with_long_names(tmp_path: Path, form: str) -> None:
    folder = "a-folder-with-quite-a-name/" * 5
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "0.jpg").write_bytes(picture(1))
    subprocess.run(["tar", f"--format={form}", "-C", tmp_path, "-cf", tmp_path / "a.tar", f"{folder}0.jpg"], check=True)
    assert by_builder(tmp_path / "a.tar") == by_webdataset(tmp_path / "a.tar") == [(f"{folder}0", {"jpg": picture(1)})]


# --- the same, for any tar ---


PART = st.text("ab.", min_size=1, max_size=3)
FOLDER = st.sampled_from(["", "./", "d/", "d.e/", "é/", "_/", "__m__/", "long-name/" * 12])
BASE = st.one_of(
    st.builds("{}.{}".format, st.sampled_from(["0", "1", "x_y"]), st.sampled_from(["jpg", "JSON", "txt", "a.b", ""])),
    st.sampled_from(["README", ".hidden", "__meta__", "__meta__.json", "__a.b__"]),
    PART,
)
MEMBER = st.tuples(st.builds("{}{}".format, FOLDER, BASE), st.one_of(st.none(), st.binary(max_size=600)))
FORMS = st.sampled_from([(tarfile.USTAR_FORMAT, 1.0), (tarfile.GNU_FORMAT, 1.0), (tarfile.PAX_FORMAT, 1.5)])


def write_any(path: Path, members: list[tuple[str, bytes | None]], form: int, mtime: float) -> None:
    """Writes members; without bytes it is a folder."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime if form == tarfile.PAX_FORMAT else int(mtime)  # type: ignore[assignment]
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            archive.addfile(info, io.BytesIO(data or b""))


def contiguous(members: list[tuple[str, bytes | None]]) -> Iterator[tuple[str, bytes | None]]:
    """The members so that those of one folder and stem are neighbours, as in a shard."""
    groups: dict[str, list[tuple[str, bytes | None]]] = {}
    for name, data in members:
        folder, slash, base = name.rpartition("/")
        groups.setdefault(folder + slash + base.partition(".")[0], []).append((name, data))
    for group in groups.values():
        yield from group


@settings(max_examples=250, deadline=None)
@given(
    members=st.one_of(
        st.lists(MEMBER, max_size=12, unique_by=lambda member: member[0].lower()), st.lists(MEMBER, max_size=5)
    ),
    form=FORMS,
)
def test_what_webdataset_reads_we_deliver_the_same(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes | None]], form: tuple[int, float]
) -> None:
    path = tmp_path_factory.getbasetemp() / "differential.tar"
    write_any(path, list(contiguous(members)), *form)
    try:
        expected = by_webdataset(path)
    except ValueError as error:
        assert "duplicate file name" in str(error)
        errors = [row["source_error"] for row in rows_of(path)]
        assert any((error or "").startswith("DuplicateMember: ") for error in errors)
        return
    assert len({key for key, _ in expected}) == len(expected)
    assert by_builder(path) == expected

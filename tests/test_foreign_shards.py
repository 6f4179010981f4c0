"""What people name as shards: paths of elsewhere, folders, links to nothing; tars of a Mac, and in no order."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.errors import ConfigError
from builder.progress import Talk
from builder.sources.tars.finding import find_shards
from conftest import Workspace, picture, read_tar, samples, write_tar

# --- which shards ---


def test_a_glob_tells_what_it_matches_that_is_no_file(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(2)}, stages="")
    source = made.folder / "source"
    (source / "gone.tar").symlink_to("nowhere.tar")
    (source / "folder.tar").mkdir()
    (source / "notes").mkdir()
    done = made.run("ingest")
    assert done.stderr.splitlines()[0] == (
        f"2 of the shards that dataset.shards names are not files: {source}/folder.tar (a folder; did you mean "
        f"{source}/folder.tar/*.tar?), {source}/gone.tar (a broken link)"
    )
    assert len(json.loads(made.run("plan", "--json").stdout)["ingest"]["missing"]) == 2
    everything = find_shards([f"{source}/*"])
    assert sorted(path.name for path in everything.missing) == ["folder.tar", "gone.tar"]


def refusal(*patterns: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find_shards(patterns)
    return str(caught.value)


def test_links_to_nothing_alone_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to("b.tar")
    assert f"{tmp_path}/a.tar: a broken link" in refusal(f"{tmp_path}/*.tar")


def test_a_folder_in_place_of_its_tars(tmp_path: Path) -> None:
    assert f"fix: '{tmp_path}/' is a folder; did you mean '{tmp_path}/*.tar'?" in refusal(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("pattern", "what", "fix"),
    [
        ("s3://bucket/{000..111}.tar", "'s3://bucket/{000..111}.tar' begins with 's3://'", "mount what holds them"),
        ("pipe:aws s3 cp s3://b/0.tar -", "begins with 'pipe:'", "copy the files to a disk of this machine"),
        ("a.tar::b.tar", "dataset.shards 'a.tar::b.tar' contains '::'", 'write a list: shards = ["a.tar", "b.tar"]'),
    ],
)
def test_paths_of_elsewhere_are_told_as_such(pattern: str, what: str, fix: str) -> None:
    said = refusal(pattern)
    assert what in said
    assert fix in said
    assert "does not exist" not in said


def test_names_that_only_look_foreign_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a::b.tar", "pipe:c.tar", "~d.tar"):
        write_tar(tmp_path / name, [])
    assert list(find_shards(["a::b.tar", "pipe:c.tar", "~d.tar", "~/a*.tar"]).paths) == ["a::b", "pipe:c", "~d"]


def test_every_path_of_a_pipeline_may_begin_with_a_tilde(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workspace({"a": samples(1)}, stages="")
    monkeypatch.setenv("HOME", str(made.folder))
    (made.folder / "w.sql").write_text("select shard, row, uid from samples")
    sets = ("--set", "dataset.shards=~/source/*.tar", "--set", "dataset.root=~/out", "--set", "write.select=~/w.sql")
    made.run("run", *sets)
    made.run("show", "a:0", "--save=~/saved", *sets)
    assert (made.folder / "out" / "shards" / "a.tar").exists()
    assert len(list((made.folder / "saved").iterdir())) == 1


@pytest.mark.parametrize(
    ("key", "section"), [("dataset.root", "dataset"), ("write.select", "write"), ("stages.lang.sql", "stages.lang")]
)
def test_every_path_of_a_pipeline_is_one_of_this_machine(
    workspace: Callable[..., Workspace], key: str, section: str
) -> None:
    done = workspace({"a": samples(1)}, stages="").run("plan", "--set", f"{key}=s3://bucket/x", check=False)
    assert done.returncode == 2
    name = key.rpartition(".")[2]
    assert done.stderr.startswith(f"error: '{name}' in [{section}]: 's3://bucket/x' begins with 's3://'")
    assert "  fix: copy the files to a disk of this machine" in done.stderr


def test_a_slow_rate_is_no_zero(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 8.0, 0.0, 1.0, 0.5])
    monkeypatch.setattr("builder.progress.time.monotonic", lambda: next(clock))
    for done in (1, 40):
        with Talk().bar("write", 40, "shards") as bar:
            bar.update(done)
    assert capfd.readouterr().err.splitlines() == [
        "write: 1 of 40 shards, 8.0 s, 0.12 shards/s",
        "write: 40 of 40 shards, 0.5 s, 80 shards/s",
    ]


# --- what macOS puts beside files ---

LITTER = b"\0\5\x16\7" + bytes(100)


def of_a_mac(count: int) -> list[tuple[str, bytes]]:
    """A folder's tar as a Mac writes it."""
    members: list[tuple[str, bytes]] = [
        ("._photos", LITTER),
        ("photos/.DS_Store", b"x"),
        ("__MACOSX/photos/._a", LITTER),
    ]
    for i in range(count):
        for extension, data in (("jpg", picture(i)), ("txt", b"a dog")):
            members += [(f"photos/._{i:05d}.{extension}", LITTER), (f"photos/{i:05d}.{extension}", data)]
    return members


def test_members_that_macos_puts_beside_files_are_no_members(workspace: Callable[..., Workspace]) -> None:
    made = workspace({}, stages="")
    shard = write_tar(made.folder / "source" / "0.tar", of_a_mac(3))
    done = made.run("ingest")
    assert "9 members that macOS adds next to files (._NAME, .DS_Store, __MACOSX/) belong to no sample" in done.stderr
    rows = made.rows("select key, source_status, len(source_members) from samples order by row")
    assert rows == [(f"photos/{i:05d}", "ok", 2) for i in range(3)]
    sql = made.folder / "write.sql"
    sql.write_text("select shard, row, uid, 'new' as caption, row = 2 as dropped from samples where row > 0")
    option = ("--set", f"write.select={sql}")
    made.run("write", *option)
    made.run("verify", *option)
    found, source = read_tar(made.root / "shards" / "0.tar"), read_tar(shard)
    left = [name for name in source if not name.startswith("photos/00002.")]
    assert sorted(name for name in found if not name.endswith(".json")) == sorted(left)
    assert all(found[name] == source[name] for name in left if not name.startswith("photos/00001"))


# --- no order ---


def test_a_shard_in_no_order_says_how_to_sort_it(workspace: Callable[..., Workspace]) -> None:
    made = workspace({}, stages="")
    members = [
        (f"{i}.{extension}", b"a dog" if extension == "txt" else picture(i))
        for extension in ("jpg", "txt")
        for i in range(3)
    ]
    shard = write_tar(made.folder / "source" / "0.tar", members)
    done = made.run("ingest", check=False)
    assert done.returncode == 3
    assert "tar --sort=name" in made.run("status").stdout
    (line,) = [line for line in done.stderr.splitlines() if "to sort it: " in line]
    assert line.startswith("shard '0': the members of 6 samples are not next to each other")
    subprocess.run(line.partition("to sort it: ")[2], shell=True, check=True, cwd="/")
    assert sorted(path.name for path in shard.parent.iterdir()) == ["0.tar", "0.unsorted"]
    made.run("ingest")
    assert made.rows("select key, source_status from samples order by row") == [(f"{i}", "ok") for i in range(3)]

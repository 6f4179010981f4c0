"""verify finds what was planted, and says which."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Workspace, read_tar


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def place(path: Path, name: str) -> int:
    """First byte of a member's content."""
    with tarfile.open(path) as archive:
        return archive.getmember(name).offset_data


UNEDITED, EDITED = f"{0:032x}-0", f"{1:032x}-0"


def flip_unedited(made: Workspace) -> None:
    hybrid = made.root / "shards/00000000.tar"
    flip(hybrid, place(hybrid, f"{UNEDITED}.jpg") + 20)


def flip_source(made: Workspace) -> None:
    source = made.folder / "source/00000000.tar"
    stat = source.stat()
    flip(source, place(source, f"{UNEDITED}.jpg") + 20)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip_edited_image(made: Workspace) -> None:
    hybrid = made.root / "shards/00000000.tar"
    flip(hybrid, place(hybrid, f"{EDITED}.jpg") + 20)


def flip_edited_caption(made: Workspace) -> None:
    hybrid = made.root / "shards/00000000.tar"
    flip(hybrid, place(hybrid, f"{EDITED}.txt"))


def old_image(made: Workspace) -> None:
    """Puts the source's whole sample where the edited one belongs, in a valid tar."""
    hybrid, source = made.root / "shards/00000000.tar", read_tar(made.folder / "source/00000000.tar")
    members = {name: source[name] if name.startswith(EDITED) else data for name, data in read_tar(hybrid).items()}
    rewrite(hybrid, members)


def rewrite(path: Path, members: dict[str, bytes]) -> None:
    import io

    with tarfile.open(path) as archive:
        infos = {info.name: info for info in archive}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = infos[name]
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def swap_captions(made: Workspace) -> None:
    hybrid = made.root / "shards/00000000.tar"
    members = read_tar(hybrid)
    other = f"{2:032x}-0"
    for extension in ("txt", "json"):
        one, two = f"{EDITED}.{extension}", f"{other}.{extension}"
        members[one], members[two] = members[two], members[one]
    rewrite(hybrid, members)


def drop_last(made: Workspace) -> None:
    hybrid = made.root / "shards/00000000.tar"
    members = read_tar(hybrid)
    last = f"{7:032x}-0"
    rewrite(hybrid, {name: data for name, data in members.items() if not name.startswith(last)})


def cut_edits(made: Workspace) -> None:
    os.truncate(next((made.root / "edits/00000000").glob("*.tar")), 700)


def lose_edits(made: Workspace) -> None:
    next((made.root / "edits/00000000").glob("*.tar")).unlink()


def lose_shard(made: Workspace) -> None:
    (made.root / "shards/00000000.tar").unlink()


def old_picture(made: Workspace) -> None:
    """The new caption with the old image."""
    hybrid, source = made.root / "shards/00000000.tar", read_tar(made.folder / "source/00000000.tar")
    name = f"{EDITED}.jpg"
    rewrite(hybrid, {**read_tar(hybrid), name: source[name]})


def stale_partition(made: Workspace) -> None:
    newest = sorted((made.root / "columns/00000000").glob("lang.*"))[-1]
    number = int(newest.name.split(".g")[1][:6])
    newest.with_name(f"lang.g{number + 1:06d}.parquet").write_bytes(newest.read_bytes())


def lose_manifest(made: Workspace) -> None:
    (made.root / "shards/manifest/00000000.parquet").unlink()


def grow(made: Workspace) -> None:
    with (made.root / "shards/00000000.tar").open("ab") as file:
        file.write(bytes(10240))


PLANTED: list[tuple[Callable[[Workspace], None], str]] = [
    (flip_unedited, f"of the source, at member '{UNEDITED}.jpg', which is not edited"),
    (flip_source, f"of the source, at member '{UNEDITED}.jpg', which is not edited"),
    (flip_edited_image, f"row 1 (key '{EDITED}'): its image is not the one that the table describes"),
    (flip_edited_caption, f"row 1 (key '{EDITED}'): its txt is not the new caption"),
    (old_image, f"row 1 (key '{EDITED}'): its txt is not the new caption"),
    (swap_captions, f"row 1 (key '{EDITED}'): its txt is not the new caption"),
    (drop_last, f"row 7 (key '{7:032x}-0') should be edited and is not at byte"),
    (cut_edits, "the file ends at byte 700"),
    (lose_edits, "is gone"),
    (stale_partition, "its partition is behind its column files; fix: builder fold"),
    (old_picture, f"row 1 (key '{EDITED}'): its image is not the one that the table describes"),
    (lose_shard, "it has not been written; fix: builder write"),
    (lose_manifest, "its manifest does not match the table; fix: builder write"),
    (grow, "its manifest does not match the table; fix: builder write"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root on which everything is as it should be."""
    from conftest import PIPELINE, STANDARD_STAGES, make_shard, samples

    folder = tmp_path_factory.mktemp("written")
    for shard, start in (("00000000", 0), ("00000001", 8)):
        make_shard(folder / f"source/{shard}.tar", samples(8, start=start))
    text = PIPELINE.format(folder=folder, stages=STANDARD_STAGES, workers=1, checkpoint_rows=2048)
    (folder / "pipeline.toml").write_text(text)
    Workspace(folder, folder / "pipeline.toml").run("run")
    return folder


@pytest.mark.parametrize(("plant", "said"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_a_planted_corruption_is_named(written: Path, plant: Callable[[Workspace], None], said: str) -> None:
    made = Workspace(written, written / "pipeline.toml")
    saved = {path: (path.read_bytes(), path.stat()) for path in written.rglob("*") if path.is_file()}
    try:
        plant(made)
        result = made.run("verify", "--json", check=False)
        proof = json.loads(result.stdout)
        assert result.returncode == 3
        assert len(proof["problems"]) == 1, proof["problems"]
        assert proof["problems"][0].startswith("shard '00000000': ")
        assert said in proof["problems"][0]
    finally:
        for path, (data, stat) in saved.items():
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for path in written.rglob("*"):
            if path.is_file() and path not in saved:
                path.unlink()
    assert made.run("verify", "--json").returncode == 0

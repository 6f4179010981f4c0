"""verify finds what was planted, says which and what mends it, and touches nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.errors import TransientError
from builder.hybrid import shard_plan
from builder.hybrid.verify import prover
from builder.progress import Talk
from builder.store.layout import Layout
from builder.tar import blocks, indexing, record_heads
from builder.verbs.verify import prove
from builder.verbs.write import run_write
from conftest import PIPELINE, STANDARD_STAGES, Workspace, make_shard, make_workspace, read_tar, samples, write_tar

#: Three shards of 8, 8 and 2 samples; nothing of the last one is edited. Row 5 of the first two is dropped.
COUNTS = {"00000000": 8, "00000001": 8, "00000002": 2}
WRITE = """
select shard, row, uid, row = 5 as dropped, image_path, image_offset, image_size, image_width, image_height,
       image_sha256, image_seed, image_model, image_prompt, prompt
from samples where image_path is not null and shard < '00000002' or row = 5
"""
SHARD = "00000000"


def key(number: int) -> str:
    return f"{number:032x}-0"


#: Of shard 00000000: row 0 is not edited, rows 1, 2, 4 and 7 are, row 5 is dropped.
PLAIN, EDITED, OTHER, DROPPED = key(0), key(1), key(2), key(5)


#: Values of a problem's text that the planting knows.
At = dict[str, object]


class Made(Workspace):
    """A finished dataset, and how its files are damaged."""

    @property
    def hybrid(self) -> Path:
        return self.root / f"shards/{SHARD}.tar"

    @property
    def source(self) -> Path:
        return self.folder / f"source/{SHARD}.tar"

    @property
    def manifest(self) -> Path:
        return self.root / f"shards/manifest/{SHARD}.parquet"

    @property
    def partition(self) -> Path:
        return self.root / f"samples/{SHARD}.parquet"

    @property
    def edits(self) -> Path:
        return next((self.root / f"edits/{SHARD}").glob("*.tar"))

    def column_file(self, stage: str) -> Path:
        return sorted((self.root / f"columns/{SHARD}").glob(f"{stage}.*"))[-1]

    def problems(self) -> list[str]:
        """What verify says, less what differs from run to run: folders, names of runs, words of other libraries."""
        text = "\n".join(prove(self.load(), Talk(quiet=True)).problems).replace(str(self.folder), "FOLDER")
        text = re.sub(r"edits/0+/\S+\.tar", "EDITS", re.sub(r"\d{8}T\d{6}-generate-\w{4}", "RUN", text))
        return re.sub(r"damaged \(.*\);", "damaged (REASON);", text).splitlines()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def place(path: Path, name: str) -> int:
    """First byte of a member's content."""
    with tarfile.open(path) as archive:
        return archive.getmember(name).offset_data


def begin(path: Path, name: str) -> int:
    """First byte of a member's record."""
    with tarfile.open(path) as archive:
        return archive.getmember(name).offset


def rewrite(path: Path, members: dict[str, bytes]) -> None:
    """Writes these members into a valid tar; a header stays as it is where name and size do."""
    data, index = path.read_bytes(), indexing.index(path)
    spans = zip(index.header.tolist(), index.data.tolist(), strict=True)
    heads = {name: data[start:stop] for name, (start, stop) in zip(index.names, spans, strict=True)}
    sizes = dict(zip(index.names, index.size.tolist(), strict=True))
    out = bytearray()
    for name, body in members.items():
        head = heads.get(name, data[: index.data[0]])
        out += head if sizes.get(name) == len(body) else record_heads.remake_record_head(head, name, len(body))
        out += body + bytes(blocks.padding(len(body)))
    path.write_bytes(out + blocks.end_of_archive(len(out)))


def swapped(members: dict[str, bytes], one: str, other: str) -> dict[str, bytes]:
    return {**members, one: members[other], other: members[one]}


def change_json(path: Path, name: str, **fields: Any) -> None:
    members = read_tar(path)
    members[name] = json.dumps({**json.loads(members[name]), **fields}, indent=4).encode()
    rewrite(path, members)


def change_rows(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a parquet file's rows and keeps what it says of itself."""
    with pq.ParquetFile(path) as file:
        rows, metadata = file.read(), file.schema_arrow.metadata
    pq.write_table(change(rows).replace_schema_metadata(metadata), path)


def set_value(rows: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    values = rows[name].to_pylist()
    values[row] = value
    at = rows.column_names.index(name)
    return rows.set_column(at, rows.field(name), pa.array(values, rows.field(name).type))


# --- the hybrid shard ---


def flip_unedited(made: Made) -> At:
    at = place(made.hybrid, f"{PLAIN}.jpg") + 20
    flip(made.hybrid, at)
    return {"at": at}


def flip_source(made: Made) -> At:
    stat, at = made.source.stat(), place(made.source, f"{PLAIN}.jpg") + 20
    flip(made.source, at)
    os.utime(made.source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return {"at": at}


def flip_edited_image(made: Made) -> None:
    flip(made.hybrid, place(made.hybrid, f"{EDITED}.jpg") + 20)


def flip_edited_txt(made: Made) -> None:
    flip(made.hybrid, place(made.hybrid, f"{EDITED}.txt"))


def flip_edited_json(made: Made) -> None:
    flip(made.hybrid, place(made.hybrid, f"{EDITED}.json"))


def flip_header(made: Made) -> At:
    at = place(made.hybrid, f"{EDITED}.jpg") - 512
    flip(made.hybrid, at)
    return {"at": at}


def flip_padding(made: Made) -> None:
    flip(made.hybrid, place(made.hybrid, f"{EDITED}.txt") + 500)


def swap_captions(made: Made) -> None:
    members = read_tar(made.hybrid)
    for extension in ("txt", "json"):
        members = swapped(members, f"{EDITED}.{extension}", f"{OTHER}.{extension}")
    rewrite(made.hybrid, members)


def swap_captions_in_json(made: Made) -> None:
    caption = json.loads(read_tar(made.hybrid)[f"{OTHER}.json"])["caption"]
    change_json(made.hybrid, f"{EDITED}.json", caption=caption)


def swap_images(made: Made) -> None:
    rewrite(made.hybrid, swapped(read_tar(made.hybrid), f"{EDITED}.jpg", f"{OTHER}.jpg"))


def old_image(made: Made) -> None:
    """The new caption with the old image."""
    name = f"{EDITED}.jpg"
    rewrite(made.hybrid, {**read_tar(made.hybrid), name: read_tar(made.source)[name]})


def old_sample(made: Made) -> None:
    source = read_tar(made.source)
    members = {name: source[name] if name.startswith(EDITED) else data for name, data in read_tar(made.hybrid).items()}
    rewrite(made.hybrid, members)


def old_size(made: Made) -> None:
    change_json(made.hybrid, f"{EDITED}.json", width=48, height=32)


def old_boxes(made: Made) -> None:
    change_json(made.hybrid, f"{EDITED}.json", face_bboxes=[[0.1, 0.1, 0.5, 0.9]])


def other_uid(made: Made) -> None:
    change_json(made.hybrid, f"{EDITED}.json", uid=f"{9:032x}")


def other_text_of_json(made: Made) -> None:
    members = read_tar(made.hybrid)
    members[f"{EDITED}.json"] = json.dumps(json.loads(members[f"{EDITED}.json"])).encode()
    rewrite(made.hybrid, members)


def other_mode(made: Made) -> None:
    at = place(made.hybrid, f"{EDITED}.txt") - 512
    data = bytearray(made.hybrid.read_bytes())
    head = data[at : at + 512]
    head[100:107] = b"0000777"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    data[at : at + 512] = head
    made.hybrid.write_bytes(data)


def extra_member(made: Made) -> None:
    members = {}
    for name, data in read_tar(made.hybrid).items():
        members[name] = data
        if name == f"{EDITED}.json":
            members[f"{EDITED}.exe"] = b"MZ"
    rewrite(made.hybrid, members)


def without(made: Made, unwanted: str) -> At:
    at = begin(made.hybrid, f"{unwanted}.jpg")
    rewrite(made.hybrid, {name: data for name, data in read_tar(made.hybrid).items() if not name.startswith(unwanted)})
    return {"at": at}


def missing_sample(made: Made) -> At:
    return without(made, key(3))


def missing_edited_sample(made: Made) -> At:
    return without(made, EDITED)


def missing_last_sample(made: Made) -> At:
    return without(made, key(7))


def extra_sample(made: Made) -> At:
    at, members = begin(made.hybrid, f"{key(3)}.jpg"), {}
    for name, data in read_tar(made.hybrid).items():
        if name == f"{key(3)}.jpg":
            members |= {f"extra.{extension}": b"x" for extension in ("jpg", "json", "txt")}
        members[name] = data
    rewrite(made.hybrid, members)
    return {"at": at}


def extra_last_sample(made: Made) -> At:
    at = indexing.index(made.hybrid).end
    rewrite(made.hybrid, {**read_tar(made.hybrid), "zzz.jpg": b"x"})
    return {"at": at}


def other_order(made: Made) -> At:
    at, members = begin(made.hybrid, f"{key(3)}.jpg"), read_tar(made.hybrid)
    later = {name: data for name, data in members.items() if name.startswith(key(3))}
    rewrite(made.hybrid, {name: data for name, data in members.items() if name not in later} | later)
    return {"at": at}


def dropped_sample(made: Made) -> At:
    at, source, members = begin(made.hybrid, f"{key(6)}.jpg"), read_tar(made.source), {}
    for name, data in read_tar(made.hybrid).items():
        if name == f"{key(6)}.jpg":
            members |= {name: data for name, data in source.items() if name.startswith(DROPPED)}
        members[name] = data
    rewrite(made.hybrid, members)
    return {"at": at}


def resized(made: Made, size: Callable[[int, int], int]) -> At:
    """Cuts the hybrid shard or appends zeros; `size` is given the end of its records and its size."""
    old = made.hybrid.stat().st_size
    end = indexing.index(made.hybrid).end
    os.truncate(made.hybrid, size(end, old))
    return {"size": old, "end": end, "found": size(end, old)}


def no_end_mark(made: Made) -> At:
    return resized(made, lambda end, size: end)


def short_end_mark(made: Made) -> At:
    return resized(made, lambda end, size: end + 1024)


def trailing_zeros(made: Made) -> At:
    return resized(made, lambda end, size: size + 10240)


def trailing_data(made: Made) -> At:
    size, end = made.hybrid.stat().st_size, indexing.index(made.hybrid).end
    with made.hybrid.open("ab") as file:
        file.write(made.hybrid.read_bytes())
    return {"size": size, "end": end}


def cut_shard(made: Made) -> At:
    index, at = indexing.index(made.hybrid), place(made.hybrid, f"{OTHER}.jpg")
    os.truncate(made.hybrid, at + 5)
    return {"cut": at + 5, "end": at + int(index.size[index.data.tolist().index(at)])}


def only_zeros(made: Made) -> None:
    made.hybrid.write_bytes(bytes(made.hybrid.stat().st_size))


def lose_shard(made: Made) -> None:
    made.hybrid.unlink()


# --- generated bytes ---


def cut_edits(made: Made) -> At:
    size = int(indexing.index(made.edits).size[0])
    os.truncate(made.edits, 700)
    return {"end": 512 + size}


def cut_end_of_edits(made: Made) -> None:
    os.truncate(made.edits, indexing.index(made.edits).end)


def flip_edits(made: Made) -> None:
    flip(made.edits, int(indexing.index(made.edits).data[0]) + 20)


def flip_header_of_edits(made: Made) -> None:
    flip(made.edits, 0)


def lose_edits(made: Made) -> None:
    made.edits.unlink()


# --- the source ---


def cut_source(made: Made) -> At:
    size = made.source.stat().st_size
    os.truncate(made.source, 10240)
    return {"size": size}


def other_source(made: Made) -> None:
    """Another image of row 0, a byte shorter, which the padding makes up for."""
    made_of = samples(8)
    made_of[0].image = (made_of[0].image or b"")[:-1]
    size = made.source.stat().st_size
    make_shard(made.source, made_of)
    assert made.source.stat().st_size == size


def lose_source(made: Made) -> None:
    made.source.unlink()


# --- the table ---


def stale_partition(made: Made) -> None:
    newest = made.column_file("lang")
    number = int(newest.name.split(".g")[1][:6])
    newest.with_name(f"lang.g{number + 1:06d}.parquet").write_bytes(newest.read_bytes())


def lose_partition(made: Made) -> None:
    made.partition.unlink()


def flip_partition(made: Made) -> None:
    flip(made.partition, 100)


def partition_of_another_tool(made: Made) -> None:
    pq.write_table(pq.read_table(made.partition).replace_schema_metadata(None), made.partition)


def permute_partition(made: Made) -> None:
    change_rows(made.partition, lambda rows: rows.take([1, 0, *range(2, 8)]))


def other_value(made: Made) -> None:
    change_rows(made.partition, lambda rows: set_value(rows, "face_count", 3, 7))


def junk_column_file(made: Made) -> None:
    made.column_file("lang").write_bytes(b"junk")


def flip_column_file(made: Made) -> None:
    flip(made.column_file("source"), 100)


# --- what lies beside the hybrid shard ---


def lose_manifest(made: Made) -> None:
    made.manifest.unlink()


def junk_manifest(made: Made) -> None:
    made.manifest.write_bytes(b"junk")


def manifest_of_another(made: Made) -> None:
    shutil.copy(made.root / "shards/manifest/00000001.parquet", made.manifest)


def manifest_row_less(made: Made) -> None:
    change_rows(made.manifest, lambda rows: rows.slice(0, rows.num_rows - 1))


def manifest_with_another_hash(made: Made) -> At:
    change_rows(made.manifest, lambda rows: set_value(rows, "sha256", 4, "0" * 64))
    return {"sha256": hashlib.sha256(read_tar(made.hybrid)[f"{EDITED}.json"]).hexdigest()}


def manifest_with_another_name(made: Made) -> None:
    change_rows(made.manifest, lambda rows: set_value(rows, "member", 0, "other.jpg"))


def other_statistics(made: Made) -> At:
    path = made.root / f"shards/{SHARD}_stats.json"
    should = path.read_text()
    path.write_text(should.replace("7", "8"))
    return {"say": path.read_text(), "should": should}


def lose_statistics(made: Made) -> None:
    (made.root / f"shards/{SHARD}_stats.json").unlink()


def sizes(made: Made, **change: int | None) -> None:
    path = made.root / "shards/sizes.json"
    found = json.loads(path.read_text()) | {f"{name}.tar": count for name, count in change.items()}
    path.write_text(json.dumps({name: count for name, count in found.items() if count is not None}))


def other_count_in_sizes(made: Made) -> None:
    sizes(made, **{SHARD: 9})


def no_count_in_sizes(made: Made) -> None:
    sizes(made, **{SHARD: None})


def foreign_name_in_sizes(made: Made) -> None:
    sizes(made, nobody=5)


def lose_sizes(made: Made) -> None:
    (made.root / "shards/sizes.json").unlink()


def junk_sizes(made: Made) -> None:
    (made.root / "shards/sizes.json").write_text("{")


def foreign_shard(made: Made) -> None:
    shutil.copy(made.hybrid, made.root / "shards/foreign.tar")


ONE = f"shard '{SHARD}': "
ROW = f"{ONE}row 1 (key '{EDITED}')"
THIRD = f"{ONE}row 3: member '{key(3)}.jpg' of the source should be at byte {{at}}, but member "
REWRITE = f"; fix: rm FOLDER/out/shards/{SHARD}.tar, then builder write"
REMAKE = f"; fix: rm FOLDER/out/shards/manifest/{SHARD}.parquet, then builder write"
WRITE_AGAIN = "; fix: builder write"
INGEST = "; fix: put it back, or ingest it as it is now: builder ingest, then builder write"
DRAW = "; fix: generate its rows again: builder stage generate --redo"
FOLD = f"; fix: rm FOLDER/out/samples/{SHARD}.parquet, then builder fold"
RUN = "builder run: it uses the generation before, or does the work again"
COLUMNS = f"FOLDER/out/columns/{SHARD}"
SIZES = "'FOLDER/out/shards/sizes.json': "
END = f"{ONE}it should end at byte {{size}}, with zeros from byte {{end}} on, but ends at byte {{found}}{REWRITE}"

PLANTED: list[tuple[Callable[[Made], At | None], str]] = [
    (flip_unedited, f"{ONE}row 0: member '{PLAIN}.jpg' is not edited, but byte {{at}} differs from byte {{at}} of the "
     f"source{REWRITE}"),
    (flip_source, f"{ONE}row 0: member '{PLAIN}.jpg' is not edited, but byte {{at}} differs from byte {{at}} of the "
     f"source{REWRITE}"),
    (flip_edited_image, f"{ROW}: its image is not the one that the table describes{REWRITE}"),
    (flip_edited_txt, f"{ROW}: its txt is not the new caption{REWRITE}"),
    (flip_edited_json, f"{ROW}: its json does not parse{REWRITE}"),
    (flip_header, f"{ONE}the hybrid shard: no tar header at byte {{at}}: its checksum is wrong{REWRITE}"),
    (flip_padding, f"{ROW}: its member 'txt' is followed by bytes that are not zero{REWRITE}"),
    (swap_captions, f"{ROW}: its txt is not the new caption{REWRITE}"),
    (swap_captions_in_json, f"{ROW}: its json does not hold the new caption{REWRITE}"),
    (swap_images, f"{ROW}: its image is not the one that the table describes{REWRITE}"),
    (old_image, f"{ROW}: its image is still the source's{REWRITE}"),
    (old_sample, f"{ROW}: its txt is not the new caption{REWRITE}"),
    (old_size, f"{ROW}: its json field 'width' is 48, but the new image's is 64{REWRITE}"),
    (old_boxes, f"{ROW}: its json still has the old image's face_bboxes{REWRITE}"),
    (other_uid, f"{ROW}: its json field 'uid' is '{9:032x}', but should be '{1:032x}'{REWRITE}"),
    (other_text_of_json, f"{ROW}: its json has the right fields, but not in the writer's layout{REWRITE}"),
    (other_mode, f"{ROW}: its member 'txt' has another header than the record that it replaces: mode{REWRITE}"),
    (extra_member, f"{ROW}: its members are jpg, json, exe, txt, but should be jpg, json, txt{REWRITE}"),
    (missing_sample, f"{THIRD}'{key(4)}.jpg' is there{REWRITE}"),
    (missing_edited_sample, f"{ROW} should be edited, but is not at byte {{at}}: member '{OTHER}.jpg' is there"
     f"{REWRITE}"),
    (missing_last_sample, f"{ONE}row 7 (key '{key(7)}') should be edited, but is not at byte {{at}}: the "
     f"archive's end is there{REWRITE}"),
    (extra_sample, f"{THIRD}'extra.jpg' is there{REWRITE}"),
    (extra_last_sample, f"{ONE}member 'zzz.jpg' is at byte {{at}}, after the source's last member{REWRITE}"),
    (other_order, f"{THIRD}'{key(4)}.jpg' is there{REWRITE}"),
    (dropped_sample, f"{ONE}row 5 (key '{DROPPED}') should be dropped, but is still at byte {{at}}{REWRITE}"),
    (no_end_mark, END),
    (short_end_mark, END),
    (trailing_zeros, END),
    (trailing_data, f"{ONE}the hybrid shard: zeros end the archive at byte {{end}}, but more data begins at byte "
     f"{{size}}: most readers skip it{REWRITE}"),
    (cut_shard, f"{ONE}the hybrid shard: the shard is truncated: member '{OTHER}.jpg' ends at byte {{end}}, the "
     f"file at {{cut}}{REWRITE}"),
    (only_zeros, f"{ONE}row 0: member '{PLAIN}.jpg' of the source should be at byte 0, but the archive's end is there"
     f"{REWRITE}"),
    (lose_shard, f"{ONE}it has not been written{WRITE_AGAIN}"),
    (cut_edits, f"{ROW}: edits tar 'EDITS': the shard is truncated: member '00000001.jpg' ends at byte {{end}}, the "
     f"file at 700{DRAW}"),
    (cut_end_of_edits, f"{ROW}: edits tar 'EDITS' has no end mark{DRAW}"),
    (flip_edits, f"{ROW}: edits tar 'EDITS' does not hold its image at byte 512{DRAW}"),
    (flip_header_of_edits, f"{ROW}: edits tar 'EDITS': no tar header at byte 0: its checksum is wrong{DRAW}"),
    (lose_edits, f"{ROW}: edits tar 'EDITS': No such file or directory{DRAW}"),
    (cut_source, f"{ONE}its source 'FOLDER/source/{SHARD}.tar' has 10240 bytes, but had {{size}} when it was ingested"
     f"{INGEST}"),
    (other_source, f"{ONE}row 0: member '{PLAIN}.jpg' is not at byte 0 of the source{INGEST}"),
    (lose_source, f"{ONE}its source 'FOLDER/source/{SHARD}.tar' is gone; fix: put it back"),
    (stale_partition, f"{ONE}its partition is behind its column files; fix: builder fold"),
    (lose_partition, f"{ONE}its partition is gone; fix: builder fold"),
    (flip_partition, f"{ONE}its partition is damaged (REASON){FOLD}"),
    (partition_of_another_tool, f"{ONE}its partition is behind its column files; fix: builder fold"),
    (permute_partition, f"{ONE}row 0: column 'uid' of its partition differs from its column files{FOLD}"),
    (other_value, f"{ONE}row 3: column 'face_count' of its partition differs from its column files{FOLD}"),
    (junk_column_file, f"{ONE}a column file is damaged: '{COLUMNS}/lang.g000001.parquet'; fix: rm "
     f"{COLUMNS}/lang.g000001.parquet, then {RUN}"),
    (flip_column_file, f"{ONE}a column file is damaged: '{COLUMNS}/source.g000001.parquet'; fix: rm "
     f"{COLUMNS}/source.g000001.parquet, then {RUN}"),
    (lose_manifest, f"{ONE}its manifest is gone{WRITE_AGAIN}"),
    (junk_manifest, f"{ONE}its manifest is damaged (REASON){WRITE_AGAIN}"),
    (manifest_of_another, f"{ONE}it was written from another state of the table{WRITE_AGAIN}"),
    (manifest_row_less, f"{ONE}the manifest has 20 rows, but the shard has 21 members{REMAKE}"),
    (manifest_with_another_hash, f"{ONE}its manifest's row 4, of member '{EDITED}.json', says sha256 = '{'0' * 64}', "
     f"but should say '{{sha256}}'{REMAKE}"),
    (manifest_with_another_name, f"{ONE}its manifest's row 0, of member '{PLAIN}.jpg', says member = 'other.jpg', but "
     f"should say '{PLAIN}.jpg'{REMAKE}"),
    (other_statistics, f"{ONE}'{SHARD}_stats.json' says {{say}}, but should say {{should}}{REWRITE}"),
    (lose_statistics, f"{ONE}'{SHARD}_stats.json' is gone{REWRITE}"),
    (other_count_in_sizes, f"{ONE}sizes.json says 9 samples, but it has 7{WRITE_AGAIN}"),
    (no_count_in_sizes, f"{ONE}sizes.json does not name it{WRITE_AGAIN}"),
    (foreign_name_in_sizes, f"{SIZES}it names 'nobody.tar', which does not exist{WRITE_AGAIN}"),
    (lose_sizes, f"{SIZES}it is gone{WRITE_AGAIN}"),
    (junk_sizes, f"{SIZES}it is not a json object{WRITE_AGAIN}"),
    (foreign_shard, "'FOLDER/out/shards/foreign.tar': it belongs to no shard of the table; fix: rm "
     "FOLDER/out/shards/foreign.tar"),
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A root on which everything is as it should be."""
    folder = tmp_path_factory.mktemp("written")
    start = 0
    for shard, count in COUNTS.items():
        make_shard(folder / f"source/{shard}.tar", samples(count, start=start))
        start += count
    (folder / "write.sql").write_text(WRITE)
    stages = f'{STANDARD_STAGES}\n[write]\nselect = "{folder}/write.sql"\n'
    text = PIPELINE.format(folder=folder, stages=stages, workers=1, checkpoint_rows=2048)
    (folder / "pipeline.toml").write_text(text)
    made = Made(folder, folder / "pipeline.toml")
    made.run("run")
    return made


@pytest.fixture
def made(written: Made) -> Iterator[Made]:
    """The same, put back as it was after the test."""
    saved = {path: (path.read_bytes(), path.stat()) for path in written.folder.rglob("*") if path.is_file()}
    yield written
    for path, (data, stat) in saved.items():
        if not path.exists() or path.stat().st_mtime_ns != stat.st_mtime_ns or path.read_bytes() != data:
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for path in written.folder.rglob("*"):
        if path.is_file() and path not in saved:
            path.unlink()


@pytest.mark.parametrize(("plant", "said"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_a_planted_corruption_is_named(made: Made, plant: Callable[[Made], At | None], said: str) -> None:
    values = plant(made)
    assert made.problems() == [said.format(**values or {})]


def odd_root(folder: Path) -> Made:
    """A shard of three samples that are edited, the last one without a json, whose boxes are called `retina`."""
    made = make_workspace(folder, {SHARD: []}, stages=STANDARD_STAGES.replace("min_faces = 1", "min_faces = 0"))
    three = samples(3)
    for sample in three:
        sample.fields = {"retina": [[0.1, 0.1, 0.5, 0.9]]}
    members = [member for sample in three for member in sample.members()]
    write_tar(folder / f"source/{SHARD}.tar", [member for member in members if member[0] != f"{key(2)}.json"])
    (folder / "faces.sql").write_text(
        "select shard, row, uid, [[0.1, 0.1, 0.5, 0.9]] as boxes, 'json' as boxes_from, 48 as width, 32 as height "
        "from samples"
    )
    text = made.file.read_text().replace('root = "', 'boxes = "retina"\nroot = "')
    made.file.write_text(text.replace("[stages.faces]", f'[stages.faces]\nsql = "{folder}/faces.sql"'))
    made.run("run")
    return Made(made.folder, made.file)


def test_boxes_of_the_old_picture_under_another_name(tmp_path: Path) -> None:
    made = odd_root(tmp_path)
    assert made.problems() == []
    change_json(made.hybrid, f"{EDITED}.json", retina=[[0.1, 0.1, 0.5, 0.9]])
    assert made.problems() == [f"{ROW}: its json still has the old image's retina{REWRITE}"]


def test_a_manifest_that_says_otherwise_how_a_sample_was_made(tmp_path: Path) -> None:
    made = odd_root(tmp_path)
    name = f"{key(2)}.jpg"
    [told] = [row["provenance"] for row in pq.read_table(made.manifest).to_pylist() if row["member"] == name]
    assert json.loads(told)["replaced"] == {"caption": samples(3)[2].caption}
    for planted in (told.replace("sketch", "FLUX"), None):
        change_rows(made.manifest, lambda rows, planted=planted: set_value(rows, "provenance", 6, planted))
        [problem] = made.problems()
        assert problem.startswith(f"{ONE}its manifest's row 6, of member '{name}', says provenance = ")
        assert problem.endswith(REMAKE)
    change_rows(made.manifest, lambda rows: rows.drop_columns(["provenance"]))
    assert [problem.partition(" says ")[0] for problem in made.problems()] == [
        f"{ONE}its manifest's row 6, of member '{name}',"
    ]


def listing(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Every file and folder with its inode, size and time of modification."""
    stats = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_verify_touches_nothing(made: Made) -> None:
    before = listing(made.folder)
    assert made.problems() == []
    assert listing(made.folder) == before
    for plant in (stale_partition, flip_column_file, cut_shard, lose_sizes):
        plant(made)
    before = listing(made.folder)
    assert len(made.problems()) == 2
    assert listing(made.folder) == before


def test_a_problem_of_one_shard_hides_those_of_no_other(made: Made) -> None:
    """One problem of each shard, whatever the state of the others; of the folder all of them."""
    lose_partition(made)
    flip(made.root / "shards/00000001.tar", place(made.root / "shards/00000001.tar", f"{key(8)}.jpg"))
    (made.root / "shards/00000002_stats.json").write_text("{")
    for plant in (foreign_shard, foreign_name_in_sizes):
        plant(made)
    told = [problem.partition(";")[0] for problem in made.problems()]
    assert told == [
        "shard '00000000': its partition is gone",
        f"shard '00000001': row 0 (key '{key(8)}'): its image is not the one that the table describes",
        "shard '00000002': '00000002_stats.json' does not parse",
        "'FOLDER/out/shards/foreign.tar': it belongs to no shard of the table",
        "'FOLDER/out/shards/sizes.json': it names 'nobody.tar', which does not exist",
    ]


def test_a_shard_that_may_be_read_later_has_no_problem(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it is read, nor where its plan is made."""
    busy = TransientError("a file was gone 20 times", fix="run the same command again")

    def fails(of: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(layout: Layout, shard: str, *others: Any) -> Any:
            if shard == of:
                raise busy
            return real(layout, shard, *others)

        return call

    for place, name, shard in ((prover, "partition_of", "00000000"), (shard_plan, "plan_shard", "00000001")):
        monkeypatch.setattr(place, name, fails(shard, getattr(place, name)))
    proof = prove(made.load(), Talk(quiet=True))
    assert proof.problems == []
    assert proof.unread == [f"shard '0000000{i}': {busy}" for i in (0, 1)]


def test_a_run_that_is_gone_is_a_problem_of_its_shards(made: Made) -> None:
    [(run,)] = made.rows("select distinct generate_run from samples where image_path is not null")
    (made.root / "runs" / run / "run.json").unlink()
    gone = "run 'RUN' is gone; it records how images were made; fix: make them again: builder stage generate --redo"
    assert made.problems() == [f"shard '0000000{i}': {gone}" for i in (0, 1)]


@pytest.mark.parametrize(
    "plant", [flip_edited_json, missing_sample, lose_manifest, manifest_row_less, lose_statistics, no_count_in_sizes]
)
def test_what_a_problem_tells_to_do_mends_it(made: Made, plant: Callable[[Made], object]) -> None:
    plant(made)
    [problem] = prove(made.load(), Talk(quiet=True)).problems
    for command in problem.partition("; fix: ")[2].split(", then "):
        if command.startswith("rm "):
            Path(command.removeprefix("rm ")).unlink()
        else:
            assert command == "builder write"
            run_write(made.load(), Talk(quiet=True))
    assert made.problems() == []


def test_verify_prints_the_proof_and_what_is_wrong(made: Made) -> None:
    proof = json.loads(made.run("verify", "--json").stdout)
    assert (proof["shards"], proof["proven"], proof["problems"]) == (3, 3, [])
    assert (proof["rows"], proof["edited"], proof["dropped"]) == (18, 8, 2)
    lose_shard(made)
    foreign = made.root / "shards/foreign.tar"
    foreign.write_bytes(b"")
    result = made.run("verify", check=False)
    assert result.returncode == 3
    assert "shards proven              2 of 3" in result.stdout
    assert [line for line in result.stderr.splitlines() if line.startswith("wrong: ")] == [
        "wrong: shard '00000000': it has not been written; fix: builder write",
        f"wrong: '{foreign}': it belongs to no shard of the table; fix: rm {foreign}",
    ]

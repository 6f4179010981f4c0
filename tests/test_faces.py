"""The stage `faces` on batches made by hand: decoded ahead or not, in threads or not, the same answers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import ExifTags, Image

from builder.engine.batches import answer, check_alone
from builder.errors import ConfigError, StageError
from builder.models import decoding
from builder.models.faces.detector import DetectorEntry
from builder.models.faces.detectors import DETECTORS, DetectorOptions
from builder.models.faces.finder import nearness
from builder.stages.check import Check, CheckOptions
from builder.stages.contract import Preparing, Resources, RowsFailed
from builder.stages.faces import Faces, FacesOptions
from builder.stages.signature import options_hash
from builder.table import lookups
from builder.table.lookups import Lookup
from builder.table.outputs import schema_of
from builder.table.schema import BOXES
from conftest import Sample, Workspace, make_workspace, metadata, picture, replace_everywhere, samples
from support.toy_scrfd import magenta, write_toy

Make = Callable[..., Workspace]
Detections = tuple[list[list[float]], list[float]]


def astronaut() -> bytes:
    out = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(out, "JPEG", quality=90)
    return out.getvalue()


@pytest.fixture(scope="module")
def stage() -> Iterator[Faces]:
    made = Faces(FacesOptions())
    made.setup("cpu")
    yield made
    made.close()


def batch(*images: bytes | None, boxes: object = ((0.1, 0.1, 0.5, 0.9),)) -> pa.RecordBatch:
    """Rows with these bytes; one without bytes has boxes of its own in the source."""
    known = [boxes if image is None else None for image in images]
    return pa.RecordBatch.from_arrays(
        [
            pa.array(known, BOXES), pa.array([None if box is None else "json" for box in known], pa.string()),
            pa.array([48] * len(images), pa.int32()), pa.array([32] * len(images), pa.int32()),
            pa.array(images, pa.large_binary()),
        ],
        names=["boxes", "boxes_from", "width", "height", "image"],
    )  # fmt: skip


def told(caught: pytest.ExceptionInfo[RowsFailed]) -> dict[int, str]:
    return {row: str(error) for row, error in caught.value.errors.items()}


# --- decoding ahead ---


def test_pictures_are_decoded_ahead(stage: Faces) -> None:
    assert isinstance(stage, Preparing)
    ahead = stage.prepare(batch(astronaut(), None, picture()))
    assert ahead is not None
    assert (ahead.start, ahead.stop, ahead.places) == (0, 3, [0, 2])
    assert [image.shape for image in ahead.room.images] == [(512, 512, 3), (32, 48, 3)]


@pytest.mark.parametrize(("limit", "ahead"), [(1, 1), (512 * 512, 1), (512 * 512 + 1, 3), (10**9, 4)])
@pytest.mark.parametrize("threads", [None, 2])
def test_what_is_decoded_ahead_is_bounded_and_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, limit: int, ahead: int, threads: int | None
) -> None:
    monkeypatch.setattr(decoding, "BLOCK_PIXELS", limit)
    stage = Faces(FacesOptions(decode_threads=threads))
    stage.setup("cpu")
    rows = batch(astronaut(), None, astronaut(), picture())
    prepared = stage.prepare(rows)
    assert prepared is not None
    assert prepared.stop == ahead
    answers = stage.process(rows, prepared)
    assert answers.column("face_count").to_pylist() == [1, 1, 1, 0]
    assert answers.column("face_source").to_pylist() == ["mtcnn", "json", "mtcnn", "mtcnn"]
    assert answers.equals(stage.process(rows))
    assert answers.column("face_boxes")[0] == answers.column("face_boxes")[2]
    assert not any(image is not None for image in prepared.room.images)  # freed one by one
    stage.close()


@pytest.mark.parametrize("limit", [1, 10**9])
def test_bytes_that_do_not_decode_fail_alone(stage: Faces, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(decoding, "BLOCK_PIXELS", limit)
    cut_short = astronaut()[:5000]  # its header is whole
    rows = batch(astronaut(), b"no picture", None, cut_short, picture())
    for prepared in (stage.prepare(rows), None):
        with pytest.raises(RowsFailed, match="2 of 5 rows failed") as caught:
            stage.process(rows, prepared)
        errors = told(caught)
        assert errors[1] == "the picture does not decode: no image format begins so"
        assert errors[3].startswith("the picture does not decode: ")
        assert [caught.value.result.column("face_count")[row].as_py() for row in (0, 2, 4)] == [1, 1, 0]


# --- as viewers show it ---


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def found(stage: Faces, *images: bytes) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = stage.process(batch(*images)).to_pylist()
    return answers


WIDE = Image.fromarray(skimage.data.astronaut()).crop((40, 0, 440, 300))
#: How a picture is to be stored for an orientation to set it upright.
STORED = {
    3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
    5: Image.Transpose.TRANSPOSE,
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_picture_is_upright_and_so_are_its_boxes(stage: Faces, orientation: int, form: str) -> None:
    """A portrait that a phone stores on its side: as stored, no face is seen."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = WIDE.transpose(STORED[orientation])
    upright, turned, as_stored = found(stage, saved(WIDE, form), saved(stored, form, exif=exif), saved(stored, form))
    assert upright["face_count"] == 1
    assert upright["face_boxes"][0] == pytest.approx([140 / 400, 61 / 300, 230 / 400, 173 / 300], abs=0.02)
    assert turned == upright
    assert as_stored["face_count"] == 0


def test_generated_pictures_are_looked_at_upright_too() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    checked = Check(CheckOptions())
    checked.setup("cpu")
    images = pa.array([saved(WIDE.transpose(Image.Transpose.ROTATE_90), exif=exif)], pa.large_binary())
    answers = checked.process(pa.RecordBatch.from_arrays([images], names=["edit"]))
    assert answers.column("check_faces").to_pylist() == [1]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_shows_the_faces_of_8_bits(stage: Faces, form: str) -> None:
    grey = np.asarray(Image.fromarray(skimage.data.astronaut()).convert("L"))
    eight, sixteen = found(
        stage, saved(Image.fromarray(grey), form), saved(Image.fromarray(grey.astype(np.uint16) * 257), form)
    )
    assert eight["face_count"] == 1
    assert sixteen == eight


def test_numbers_without_a_white_fail_their_row(stage: Faces) -> None:
    grey = np.asarray(Image.fromarray(skimage.data.astronaut()).convert("L")).astype(np.float32)
    with pytest.raises(RowsFailed) as caught:
        found(stage, saved(Image.fromarray(grey), "TIFF"), astronaut())
    assert told(caught) == {
        0: "the picture is of floating-point numbers, of which nothing says which is white; store it with 8 or 16 bits"
    }
    assert caught.value.result.column("face_count")[1].as_py() == 1


def test_a_large_picture_is_shrunk_and_one_at_the_limit_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes are shares of the picture: they stay where they were."""
    looked: list[tuple[int, ...]] = []
    stage = Faces(FacesOptions())
    stage.setup("cpu")
    assert stage._finder is not None
    monkeypatch.setattr(stage._finder, "_look", lambda image: looked.append(image.shape))
    picture = Image.fromarray(skimage.data.astronaut())
    answers = []
    for most in (512 * 512, 512 * 512 - 1):
        monkeypatch.setattr(decoding, "MOST_PIXELS", most)
        answers.append(found(stage, astronaut(), saved(picture, "PNG")))
    assert looked == [(512, 512, 3)] * 2 + [(256, 256, 3)] * 2
    monkeypatch.setattr(decoding, "MOST_PIXELS", 10**9)
    assert answers[0] == found(stage, astronaut(), saved(picture, "PNG"))
    for whole, shrunk in zip(*answers, strict=True):
        assert whole["face_count"] == shrunk["face_count"] == 1
        assert shrunk["face_boxes"][0] == pytest.approx(whole["face_boxes"][0], abs=0.02)
    stage.close()


def test_a_picture_of_megapixels_is_bounded_work(stage: Faces) -> None:
    """The limit is in pixels and fits common pictures: above it, between a quarter of it and all of it is left."""
    assert decoding.MOST_PIXELS == 8_000_000
    side = 3000
    picture = Image.fromarray(skimage.data.astronaut()).resize((side, side))
    prepared = stage.prepare(batch(saved(picture)))
    assert prepared is not None
    assert prepared.sizes == [(side // 2, side // 2)]


# --- boxes that are known ---


@pytest.mark.parametrize(
    ("boxes", "count", "kept"),
    [
        (None, None, None),
        ([], 0, []),
        ([[0.1, 0.1, 0.5, 0.9]], 1, [[0.1, 0.1, 0.5, 0.9]]),
        ([[0.1, 0.1, 0.12, 0.12]], 0, [[0.1, 0.1, 0.12, 0.12]]),
    ],
)
def test_boxes_an_empty_list_and_unknown_stay_apart(boxes: object, count: int | None, kept: object) -> None:
    assert given(boxes) == {
        "face_count": count,
        "face_boxes": kept,
        "face_scores": None,
        "face_source": "unknown" if boxes is None else "json",
        "face_notes": None,
    }


def given(boxes: object) -> dict[str, object]:
    """The answer of a row with these boxes."""
    stage = Faces(FacesOptions(source="json"))
    stage.setup("cpu")
    rows = batch(None, boxes=boxes)
    assert stage.needs_bytes(rows) == [False]
    [answer] = stage.process(rows, stage.prepare(rows)).to_pylist()
    return dict(answer)


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([10.0, 10.0, 200.0, 200.0], "lies outside 0..1"),
        ([-0.2, 0.1, 1.5, 0.9], "lies outside 0..1"),
        ([0.1, 0.2, 0.3], "is not a list of four numbers"),
        ([0.1, 0.2, 0.3, float("nan")], "holds a value that is not finite"),
        ([0.5, 0.1, 0.4, 0.9], "is inverted"),
        ([0.1, None, 0.3, 0.4], "is not a list of four numbers"),
    ],
)
def test_a_box_that_is_none_makes_the_count_unknown(box: list[float | None], fault: str) -> None:
    answer = given([[0.1, 0.1, 0.5, 0.9], box])
    assert answer == {
        "face_count": None,
        "face_boxes": None,
        "face_scores": None,
        "face_source": "unknown",
        "face_notes": f"json: box 1 {fault}",
    }


def test_a_box_a_hair_outside_is_cut() -> None:
    answer = given([[0.5, 0.5, 0.9, 1.0000001], [0.1, 0.1, 0.5, 0.9]])
    assert (answer["face_count"], answer["face_boxes"]) == (2, [[0.5, 0.5, 0.9, 1.0], [0.1, 0.1, 0.5, 0.9]])
    assert (answer["face_source"], answer["face_notes"]) == ("json", "json: 1 of 2 boxes cut at the edge")


def test_boxes_that_are_none_let_the_detector_look(stage: Faces) -> None:
    photo = astronaut()
    rows = batch(None, photo, boxes=[[10.0, 10.0, 200.0, 200.0]])
    assert stage.needs_bytes(rows) == [True, True]
    rows = rows.set_column(rows.schema.get_field_index("image"), "image", pa.array([photo, photo], pa.large_binary()))
    one, other = stage.process(rows, stage.prepare(rows)).to_pylist()
    assert (one["face_source"], one["face_notes"]) == ("mtcnn", "json: box 0 lies outside 0..1")
    assert (one["face_count"], one["face_boxes"]) == (other["face_count"], other["face_boxes"])


def test_metadata_goes_with_the_sources_that_read_it() -> None:
    with pytest.raises(ConfigError) as caught:
        Faces(FacesOptions(source="metadata"))
    assert str(caught.value) == (
        "source = 'metadata', but no metadata is named\n  fix: add metadata = \"DIR/*.parquet\" to [stages.faces]"
    )
    with pytest.raises(ConfigError) as caught:
        Faces(FacesOptions(source="json", metadata="x"))
    assert str(caught.value) == (
        "metadata is named, but source = 'json' does not read it\n"
        "  fix: leave metadata out, or set source = 'auto' or 'metadata'"
    )


# --- metadata, through the command line ---


def faces_of(made: Workspace) -> list[tuple[str, int, object, object, str]]:
    sql = "select shard, row, face_count, face_boxes, face_source from samples order by shard, row"
    return [tuple(row) for row in made.rows(sql)]  # type: ignore[misc]


def three_states(made: Make, stages: str) -> Workspace:
    """Two shards: json boxes, an empty list and none at all, by row."""
    own = samples(3)
    for sample, boxes in zip(own, ([[0.2, 0.2, 0.6, 0.6]], [], None), strict=True):
        sample.fields = {} if boxes is None else {"face_bboxes": boxes}
    rest = samples(4, start=3, boxes=False)
    return made({"a": own, "b": rest}, stages=stages)


def test_metadata_is_joined_by_uid(workspace: Make, tmp_path: Path) -> None:
    made = three_states(workspace, f'[stages.faces]\nsource = "metadata"\nmetadata = "{tmp_path}/meta/*.parquet"\n')
    box = [[0.0, 0.0, 0.5, 0.5]]
    uid = [f"{i:032x}" for i in range(9)]
    # in reverse, in files of both kinds, with uids that no sample has, and a row said twice
    metadata(tmp_path / "meta/one.parquet", [(uid[8], box), (uid[6], box), (uid[5], None), (uid[2], box)])
    metadata(tmp_path / "meta/two.parquet", [(uid[4], []), (uid[2], box), (uid[0], box)], name="face-boxes")
    made.run("ingest")
    made.run("stage", "faces")
    assert faces_of(made) == [
        ("a", 0, 1, box, "metadata"),
        ("a", 1, None, None, "unknown"),
        ("a", 2, 1, box, "metadata"),
        ("b", 0, None, None, "unknown"),
        ("b", 1, 0, [], "metadata"),
        ("b", 2, None, None, "unknown"),
        ("b", 3, 1, box, "metadata"),
    ]
    assert "nothing to do" in made.run("stage", "faces").stderr


def test_published_boxes_in_pixels_are_unknown_and_told(workspace: Make, tmp_path: Path) -> None:
    """The same boxes read alike wherever they are published."""
    values = {
        f"{0:032x}": ([[10.0, 10.0, 40.0, 30.0]], None),
        f"{1:032x}": ([[0.2, 0.2, 0.6, 1.005]], [[0.2, 0.2, 0.6, 1.0]]),
        f"{2:032x}": ([[0.2, 0.2, 0.6, 0.6]], [[0.2, 0.2, 0.6, 0.6]]),
    }
    own = samples(3, boxes=False)
    beside = workspace({"a": own}, stages=f'[stages.faces]\nsource = "metadata"\nmetadata = "{tmp_path}/m.parquet"\n')
    metadata(tmp_path / "m.parquet", {uid: published for uid, (published, _) in values.items()})
    beside.run("ingest")
    talk = beside.run("stage", "faces").stderr
    question = "select shard, row, face_notes from samples where face_notes is not null"
    assert (
        'faces: 2 rows have face_notes, for example "metadata: 1 of 1 boxes cut at the edge": '
        f"builder sql '{question}' --pipeline {beside.file}"
    ) in talk
    for sample, (published, _) in zip(own, values.values(), strict=True):
        sample.fields = {"face_bboxes": published}
    within = make_workspace(tmp_path / "within", {"a": own}, stages='[stages.faces]\nsource = "json"\n')
    within.run("ingest")
    within.run("stage", "faces")
    for made, source in ((beside, "metadata"), (within, "json")):
        assert faces_of(made) == [
            ("a", row, None if boxes is None else 1, boxes, "unknown" if boxes is None else source)
            for row, (_, boxes) in enumerate(values.values())
        ]
    assert beside.rows("select face_notes from samples order by row") == [
        ("metadata: box 0 lies outside 0..1",), ("metadata: 1 of 1 boxes cut at the edge",), (None,),
    ]  # fmt: skip
    assert within.rows("select source_notes from samples order by row") == [
        ("face_bboxes: box 0 lies outside 0..1",), ("face_bboxes: 1 of 1 boxes cut at the edge",), (None,),
    ]  # fmt: skip


def test_metadata_that_moved_makes_no_answer_stale() -> None:
    """Its boxes are inputs of the rows: what changed in them is seen there."""
    one, other = (FacesOptions(source="metadata", metadata=path) for path in ("a/*.parquet", "b.parquet"))
    assert options_hash(Faces(one), one) == options_hash(Faces(other), other)


def test_metadata_is_joined_once(dataset: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the freeze: reading it takes minutes where there is much of it."""
    path = metadata(dataset.folder / "meta.parquet", {f"{0:032x}": []})
    dataset.file.write_text(
        dataset.file.read_text().replace('source = "json"', f'source = "metadata"\nmetadata = "{path}"')
    )
    looked, look_up = [], lookups.look_up

    def noting(connection: Any, name: str, lookup: Lookup) -> None:
        looked.append(name)
        look_up(connection, name, lookup)

    replace_everywhere(monkeypatch, lookups.look_up, noting)
    assert "faces: 16 rows, 16 ok" in dataset.run("stage", "faces").stderr
    assert looked == ["metadata"]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_row_gets_the_boxes_of_its_own_uid(workspace: Make, tmp_path: Path, workers: int) -> None:
    """In whatever order the join gives them: the files hold the uids in the order of their hashes."""
    numbers = range(900)
    shards = {
        name: [Sample(f"{i:032x}-0") for i in numbers[start : start + 300]]
        for name, start in {"a": 0, "b": 300, "c": 600}.items()
    }
    stages = f'[stages.faces]\nsource = "metadata"\nmetadata = "{tmp_path}/meta/*.parquet"\n'
    made = workspace(shards, stages=stages, workers=workers)
    mixed = sorted((i for i in numbers if i % 7), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    for part in range(3):
        metadata(tmp_path / f"meta/{part}.parquet", {f"{i:032x}": [[i / 1000, 0.5, 0.95, 1]] for i in mixed[part::3]})
    made.run("ingest")
    made.run("stage", "faces")
    found = made.rows("select uid, face_boxes[1][1], face_source from samples order by shard, row")
    assert found == [(f"{i:032x}", i / 1000, "metadata") if i % 7 else (f"{i:032x}", None, "unknown") for i in numbers]


def test_auto_takes_json_then_metadata_then_the_detector(workspace: Make, tmp_path: Path) -> None:
    made = three_states(workspace, f'[stages.faces]\nmetadata = "{tmp_path}/meta.parquet"\n')
    box = [[0.0, 0.0, 0.5, 0.5]]
    metadata(tmp_path / "meta.parquet", {f"{i:032x}": box if i != 4 else [] for i in (4, 3, 1, 0)})
    made.run("ingest")
    made.run("stage", "faces")
    assert faces_of(made) == [
        ("a", 0, 1, [[0.2, 0.2, 0.6, 0.6]], "json"),
        ("a", 1, 0, [], "json"),
        ("a", 2, 0, [], "mtcnn"),
        ("b", 0, 1, box, "metadata"),
        ("b", 1, 0, [], "metadata"),
        ("b", 2, 0, [], "mtcnn"),
        ("b", 3, 0, [], "mtcnn"),
    ]


def test_an_ambiguous_uid_is_refused_with_examples(workspace: Make, tmp_path: Path) -> None:
    made = three_states(workspace, f'[stages.faces]\nsource = "metadata"\nmetadata = "{tmp_path}/meta/*.parquet"\n')
    uid = [f"{i:032x}" for i in range(9)]
    metadata(tmp_path / "meta/one.parquet", {uid[1]: [], uid[4]: [[0, 0, 1, 1]], uid[8]: [], uid[2]: None})
    metadata(tmp_path / "meta/two.parquet", {uid[1]: [[0, 0, 1, 1]], uid[4]: [], uid[8]: [[0, 0, 1, 1]], uid[2]: []})
    made.run("ingest")
    message = (
        "error: 2 uids of the samples are ambiguous in 'metadata': the files have different values for them\n"
        f"  row: {uid[1]}, [], in {tmp_path}/meta/one.parquet\n"
        f"  row: {uid[1]}, [[0.0, 0.0, 1.0, 1.0]], in {tmp_path}/meta/two.parquet\n"
        f"  row: {uid[4]}, [], in {tmp_path}/meta/two.parquet\n"
        f"  row: {uid[4]}, [[0.0, 0.0, 1.0, 1.0]], in {tmp_path}/meta/one.parquet\n"
        f"  fix: name files that agree instead of '{tmp_path}/meta/*.parquet', or delete the wrong rows from them\n"
    ).replace("row: ", "{}: ")
    for command in ("plan", "stage faces"):
        done = made.run(*command.split(), check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr == message.format(*(f"row {i}" for i in range(1, 5)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            "missing*.parquet",
            "no file matches '{folder}/missing*.parquet', from which 'metadata' is read\n  fix: name parquet "
            "files, relative to the working directory: a path, or a glob such as 'metadata/*.parquet'",
        ),
        (
            "nouid.parquet",
            "the file has no column 'uid'\n  file: {folder}/nouid.parquet\n  names looked for: uid\n"
            "  columns found: face-boxes\n  fix: write the column into the file, or name other files "
            "(dataset2metadata: add uid to additional_fields)",
        ),
        (
            "noboxes.parquet",
            "the file has no column 'boxes'\n  file: {folder}/noboxes.parquet\n"
            "  names looked for: face_bboxes, face-boxes\n  columns found: uid, url, faces\n"
            "  fix: write the column into the file, or name other files",
        ),
        (
            "text.parquet",
            "the parquet file cannot be read: Parquet magic bytes not found in footer. Either the file is corrupted or "
            "this is not a parquet file.\n  file: {folder}/text.parquet\n"
            "  fix: download or write it again, or name other files",
        ),
        (
            "others.parquet",
            "no uid of the samples is in the files of 'metadata'\n  files: {folder}/others.parquet\n"
            "  a uid of the samples: 00000000000000000000000000000000\n"
            "  a uid of the files: 00000000000000000000000000000063\n  fix: name the files of this dataset",
        ),
        (
            "empty.parquet",
            "no uid of the samples is in the files of 'metadata'\n  files: {folder}/empty.parquet\n"
            "  a uid of the samples: 00000000000000000000000000000000\n  a uid of the files: none\n"
            "  fix: name the files of this dataset",
        ),
        (
            "strings.parquet",
            "the files of 'metadata' do not fit: Conversion Error: Error while reading file "
            '"{folder}/strings.parquet"',
        ),
    ],
)
def test_files_that_cannot_be_joined_are_refused(dataset: Workspace, files: str, message: str) -> None:
    folder = dataset.folder / "meta"
    metadata(folder / "noboxes.parquet", {"a": []}, name="faces")
    pq.write_table(pa.table({"face-boxes": pa.array([[]], BOXES)}), folder / "nouid.parquet")
    metadata(folder / "others.parquet", {f"{99:032X}": []})
    metadata(folder / "empty.parquet", {})
    uids = pa.array([f"{0:032x}"])
    pq.write_table(pa.table({"uid": uids, "face_bboxes": ["none"]}), folder / "strings.parquet")
    (folder / "text.parquet").write_text("no parquet file\n")
    section = f'source = "metadata"\nmetadata = "{folder}/{files}"'
    dataset.file.write_text(dataset.file.read_text().replace('source = "json"', section))
    done = dataset.run("stage", "faces", check=False)
    assert done.returncode == 2
    wanted = f"error: {message.format(folder=folder)}"
    assert done.stderr.startswith(wanted)
    assert files == "strings.parquet" or done.stderr == wanted + "\n"


# --- SCRFD, through the command line ---


def test_scrfd_through_the_command_line(workspace: Make, tmp_path: Path) -> None:
    """Magenta squares are faces of the toy, in batches that are not full too; workers and order change nothing."""
    model = write_toy(tmp_path / "toy.onnx", "flat", fixed_batch=1)  # as insightface publishes its own
    stages = f"""[stages.faces]
source = "detector"
detector = "scrfd"
model = "{model}"
input_px = 320
detector_batch = 4
decode_threads = 2

[stages.faces.run]
batch_rows = 3
"""
    made = [Sample(f"{i:032x}-0", image=magenta(320, 320, [(32 * i, 64, 32 * i + 16, 80)])) for i in range(5)]
    made.insert(2, Sample(f"{9:032x}-0", image=b"no picture"))
    plain = [Sample(f"{i:032x}-0", image=magenta(64, 48, [])) for i in (20, 21)]
    first = workspace({"a": made, "b": plain}, stages=stages)
    first.run("ingest")
    done = first.run("stage", "faces", check=False)
    assert done.returncode == 3, done.stderr
    found = first.rows(
        "select face_count, face_source, face_boxes[1], faces_status, faces_error from samples order by shard, row"
    )
    assert [row[0] for row in found] == [1, 1, None, 1, 1, 1, 0, 0]
    assert [row[1] for row in found] == ["scrfd", "scrfd", None, *["scrfd"] * 5]
    assert found[2][3:] == ("failed", "undecodable: the picture does not decode: no image format begins so")
    assert [row[2] for row in found[:2]] == [[0, 0.1, 0.1, 0.3], [0, 0.1, 0.2, 0.3]]
    assert done.stderr.count("are licensed for non-commercial research only") == 1  # once a run, whatever the workers
    logs = "".join(path.read_text() for path in (first.root / "runs").glob("*faces*/logs/*"))
    assert "gets one picture at a time" not in logs
    assert logs.count("are licensed for non-commercial research only") == 1
    one = faces_of(first)
    for more in ("--set", "stages.faces.run.batch_rows=1"), ("--set", "stages.faces.run.workers=2"):
        first.run("stage", "faces", "--redo", *more, check=False)
        assert faces_of(first) == one


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            'model = "{folder}/none.onnx"',
            "there is no face model '{folder}/none.onnx'\n  looked for: {folder}/none.onnx\n{log}"
            '  fix: put the file there, or name another with model = "FILE.onnx"; builder downloads no models\n',
        ),
        (
            'model = "nobodys"',
            "there is no face model 'nobodys'\n  looked for: {home}/.insightface/models/nobodys/*.onnx\n{log}"
            '  fix: put the file there, or name another with model = "FILE.onnx"; builder downloads no models\n',
        ),
        (
            'model = "{folder}/toy.onnx"\n[stages.faces.run]\ndevices = ["cuda:0"]',
            "onnxruntime has no CUDAExecutionProvider for device 'cuda:0'\n"
            "  it has: AzureExecutionProvider, CPUExecutionProvider\n{log}"
            '  fix: install onnxruntime-gpu instead of onnxruntime, or set devices = ["cpu"]\n',
        ),
    ],
)
def test_a_detector_that_cannot_start_marks_no_row(dataset: Workspace, lines: str, message: str) -> None:
    write_toy(dataset.folder / "toy.onnx")
    section = f'source = "detector"\ndetector = "scrfd"\n{lines.format(folder=dataset.folder)}'
    dataset.file.write_text(dataset.file.read_text().replace('source = "json"', section))
    done = dataset.run("stage", "faces", check=False)
    assert done.returncode == 1
    [log] = (dataset.root / "runs").glob("*faces*/logs/00000.log")
    told = done.stderr[done.stderr.index("error: ") :]
    assert told == f"error: {message.format(folder=dataset.folder, home=Path.home(), log=f'  log: {log}' + chr(10))}"
    assert dataset.rows("select count(*) from samples where faces_status is not null") == [(0,)]


def test_a_stage_says_how_far_its_answers_may_be_apart(tmp_path: Path) -> None:
    assert Faces(FacesOptions(source="json")).tolerance == 0
    assert Faces(FacesOptions()).tolerance == 0
    assert Faces(FacesOptions(detector="scrfd")).tolerance == 0.001


@pytest.mark.parametrize("form", ["flat", "batched", "leaking"])
def test_a_row_alone_and_in_a_batch_agree(tmp_path: Path, form: str) -> None:
    """Within the tolerance: coordinates in 0..1 and scores."""
    model = write_toy(tmp_path / "toy.onnx", form)  # type: ignore[arg-type]
    options = FacesOptions(
        source="detector", detector="scrfd", model=str(model), input_px=320, detector_batch=4, threshold=0.1
    )
    stage = Faces(options)
    stage.setup("cpu")
    images = [magenta(300 + 20 * i, 250, [(30 * i, 40, 30 * i + 90, 150)]) for i in range(6)]
    together = stage.process(batch(*images))
    assert together.column("face_count").to_pylist() != [0] * 6
    for i, image in enumerate(images):
        [alone], row = stage.process(batch(image)).to_pylist(), together.slice(i, 1).to_pylist()[0]
        assert len(alone["face_boxes"]) == len(row["face_boxes"])
        assert np.array(alone["face_boxes"]) == pytest.approx(np.array(row["face_boxes"]), abs=stage.tolerance)
        assert alone["face_scores"] == pytest.approx(row["face_scores"], abs=stage.tolerance)


BOX, NEAR, FAR = [0.1, 0.1, 0.5, 0.5], [0.1, 0.1002, 0.5, 0.5], [0.6, 0.1, 0.9, 0.5]


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (([], []), ([], []), 0),
        (([BOX], [0.9]), ([BOX], [0.9]), 0),
        (([BOX], [0.9]), ([NEAR], [0.9]), 0.0002),
        (([BOX], [0.9]), ([BOX], [0.8]), 0.1),
        (([BOX, FAR], [0.9, 0.8996]), ([FAR, BOX], [0.9, 0.8996]), 0.0004),  # their order says nothing
        (([BOX], [0.9]), ([], []), 0.6),
        (([BOX, FAR], [0.9, 0.3004]), ([BOX], [0.9]), 0.0004),  # a hair more, and it is not reported
        (([BOX], [0.9]), ([FAR], [0.9]), 0.5),
    ],
)
def test_how_far_detections_are_apart(one: Detections, other: Detections, apart: float) -> None:
    assert nearness(one, other, 0.3) == nearness(other, one, 0.3) == pytest.approx(apart, abs=1e-9)


def told_of(face_count: int, *, boxes: list[list[float]], scores: list[float]) -> pa.RecordBatch:
    row = {"face_count": face_count, "face_boxes": boxes, "face_scores": scores, "face_source": "scrfd"}
    return pa.RecordBatch.from_pylist([row], schema=schema_of(Faces.outputs))


def test_a_score_at_a_threshold_is_no_difference() -> None:
    """Of two equal pictures a GPU may count one face more: what counts is how far its score moved."""
    stage = Faces(FacesOptions(source="detector", detector="scrfd"))
    one = told_of(2, boxes=[BOX, FAR], scores=[0.9, 0.5002])
    assert stage.difference(one, told_of(1, boxes=[BOX, FAR], scores=[0.9, 0.4999])) == pytest.approx(0.0003)
    assert stage.difference(one, told_of(1, boxes=[BOX], scores=[0.9])) > stage.tolerance


@pytest.mark.parametrize("source", ["detector", "auto"])
def test_a_detector_that_lets_pictures_change_each_other_is_refused(tmp_path: Path, source: str) -> None:
    options = {"detector": "scrfd", "model": str(write_toy(tmp_path / "toy.onnx", "leaking")), "input_px": 320}
    stage = Faces(FacesOptions(source=source, **options))  # type: ignore[arg-type]
    stage.setup("cpu")
    assert stage._finder is not None
    stage._finder._detector.batch = 4  # type: ignore[attr-defined]
    rows = batch(*(magenta(320, 320, [(32 * i, 64, 32 * i + 16, 80)]) for i in range(4)))
    rows = rows.append_column("shard", pa.array(["a"] * 4)).append_column("row", pa.array(range(4)))
    with pytest.raises(StageError, match="stage 'faces' gives a row another answer alone than in a batch of 4"):
        check_alone(stage, rows, list(answer(stage, rows)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "det_10g.onnx"},
            "model is set, but detector = 'mtcnn' does not read it\n"
            '  fix: set detector = "scrfd" in [stages.{}], or leave model out',
        ),
        (
            {"detector": "scrfd", "min_face_px": 30},
            "min_face_px is set, but detector = 'scrfd' does not read it\n"
            '  fix: set detector = "mtcnn" in [stages.{}], or leave min_face_px out',
        ),
    ],
)
def test_options_of_the_other_detector_are_refused(options: dict[str, Any], message: str) -> None:
    """Else a model that is named without `detector` would not be looked at, and MTCNN answer."""
    with pytest.raises(ConfigError) as caught:
        Faces(FacesOptions(**options))
    assert str(caught.value) == message.format("faces")
    with pytest.raises(ConfigError) as caught:
        Check(CheckOptions(**options))
    assert str(caught.value) == message.format("check")
    Faces(FacesOptions(source="json", **options))  # no detector at all


def test_options_belong_to_detectors() -> None:
    """Every option is read by all of them, or named by those that read it."""
    everyone = {"detector", "min_score", "min_size", "decode_threads"}
    named = {name for kind in DETECTORS.values() for name in kind.reads}
    assert named | everyone == set(DetectorOptions.model_fields)
    assert not named & everyone
    assert typing.get_args(DetectorOptions.model_fields["detector"].annotation) == tuple(DETECTORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"detector": "third", "min_face_px": 30},
            "min_face_px is set, but detector = 'third' does not read it\n"
            '  fix: set detector = "mtcnn" in [stages.faces], or leave min_face_px out',
        ),
        (
            {"detector": "third", "threshold": 0.5},
            "threshold is set, but detector = 'third' does not read it\n"
            '  fix: set detector = "scrfd" in [stages.faces], or leave threshold out',
        ),
        (
            {"detector": "mtcnn", "model": "m.onnx"},
            "model is set, but detector = 'mtcnn' does not read it\n"
            '  fix: set detector = "scrfd" or detector = "third" in [stages.faces], or leave model out',
        ),
        (
            {"detector": "third", "detector_batch": 8},
            "detector_batch is set, but detector = 'third' does not read it\n"
            '  fix: set detector = "scrfd" in [stages.faces], or leave detector_batch out',
        ),
        ({"detector": "third", "model": "m.onnx", "min_score": 0.4}, None),
        ({"detector": "scrfd", "model": "m.onnx"}, None),
    ],
)
def test_a_third_detector_has_options_of_its_own(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str | None
) -> None:
    asked: list[Any] = []
    third = dataclasses.replace(
        DETECTORS["scrfd"],
        check=lambda **given: asked.append(given),
        reads=frozenset({"model"}),
        tolerance=0.5,
        notice="a third one",
    )
    monkeypatch.setitem(DETECTORS, "third", third)
    chosen = FacesOptions().model_copy(update=options)
    if message is None:
        made = Faces(chosen)
        kind = DETECTORS[options["detector"]]
        assert (made.tolerance, made.notice) == (kind.tolerance, kind.notice)
        assert made.resources == Resources(batch_rows=kind.batch_rows, ahead=kind.ahead)
        if kind is third:
            made.check_setup()
            assert asked == [{"model": "m.onnx"}]
        return
    with pytest.raises(ConfigError) as caught:
        Faces(chosen)
    assert str(caught.value) == message


@pytest.mark.parametrize("detector", ["mtcnn", "third"])
def test_an_option_that_no_detector_reads_is_refused(monkeypatch: pytest.MonkeyPatch, detector: str) -> None:
    """A third detector that leaves an option of its own out of what it reads is not silently given it, nor another."""
    third = dataclasses.replace(DETECTORS["mtcnn"], reads=frozenset())
    monkeypatch.setitem(DETECTORS, "third", third)
    monkeypatch.setitem(DETECTORS, "mtcnn", dataclasses.replace(DETECTORS["mtcnn"], reads=frozenset()))
    chosen = FacesOptions().model_copy(update={"detector": detector, "min_face_px": 30})
    with pytest.raises(ConfigError) as caught:
        Faces(chosen)
    assert str(caught.value) == (
        f"min_face_px is set, but detector = '{detector}' does not read it\n  fix: leave min_face_px out"
    )


def test_a_third_detector_finds_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry is all that the stages need: what it reads, where its pictures go, what it finds."""

    class Whole:
        most_frames = 1

        def __init__(self, share: float) -> None:
            self._share = share

        def frames(self, count: int) -> Whole:
            self.shapes: list[tuple[int, ...]] = [(0, 0)] * count
            return self

        def put(self, place: int, image: Any) -> None:
            self.shapes[place] = image.shape

        def detect(self, frames: Whole) -> list[tuple[Any, Any]]:
            sides = [np.array([[0, 0, width * self._share, height]]) for height, width, _ in frames.shapes]
            return [(side.astype(float), np.array([0.8])) for side in sides]

    third = DetectorEntry(
        lambda *, device, name, threshold: Whole(threshold), lambda *, threshold: None, frozenset({"threshold"}),
        min_score=0.5, batch_rows=2, packages=("numpy",),
    )  # fmt: skip
    monkeypatch.setitem(DETECTORS, "third", third)
    stage = Faces(FacesOptions().model_copy(update={"source": "detector", "detector": "third", "threshold": 0.5}))
    stage.check_setup()
    stage.setup("cpu")
    result = stage.process(batch(saved(Image.new("RGB", (40, 20))), None, saved(Image.new("RGB", (20, 40)))))
    assert result["face_boxes"].to_pylist() == [[[0, 0, 0.5, 1]], None, [[0, 0, 0.5, 1]]]
    assert result["face_source"].to_pylist() == ["third", "unknown", "third"]
    stage.close()


def test_no_insightface_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError) as caught:
        Faces(FacesOptions(source="detector", detector="scrfd")).setup("cpu")
    assert str(caught.value) == (
        "package 'insightface' is not installed, which detector 'scrfd' needs\n"
        "  fix: pip install 'hybrid-shard-builder[insightface]'"
    )

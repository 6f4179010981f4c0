"""The stage `faces` on batches made by hand: decoded ahead or not, the same answers."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image

from builder.schema import BOXES
from builder.stage import Preparing
from builder.stages import faces
from builder.stages.faces import Faces, FacesOptions
from conftest import picture


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


def batch(*images: bytes | None) -> pa.RecordBatch:
    """Rows with these bytes; one without bytes has a box of its own in the source."""
    boxes = [[[0.1, 0.1, 0.5, 0.9]] if image is None else None for image in images]
    return pa.RecordBatch.from_arrays(
        [
            pa.array(boxes, BOXES), pa.array([48] * len(images), pa.int32()), pa.array([32] * len(images), pa.int32()),
            pa.array(images, pa.large_binary()),
        ],
        names=["boxes", "width", "height", "image"],
    )  # fmt: skip


def test_pictures_are_decoded_ahead(stage: Faces) -> None:
    assert isinstance(stage, Preparing)
    ahead = stage.prepare(batch(astronaut(), None, picture()))
    assert [None if image is None else image.shape for image in ahead] == [(512, 512, 3), None, (32, 48, 3)]


@pytest.mark.parametrize(("limit", "ahead"), [(1, 1), (512 * 512, 1), (512 * 512 + 1, 3), (10**9, 4)])
def test_what_is_decoded_ahead_is_bounded_and_changes_no_answer(
    stage: Faces, monkeypatch: pytest.MonkeyPatch, limit: int, ahead: int
) -> None:
    monkeypatch.setattr(faces, "AHEAD_PIXELS", limit)
    rows = batch(astronaut(), None, astronaut(), picture())
    prepared = stage.prepare(rows)
    assert len(prepared) == ahead
    answers = stage.process(rows, prepared)
    assert answers.column("face_count").to_pylist() == [1, 1, 1, 0]
    assert answers.column("face_source").to_pylist() == ["mtcnn", "json", "mtcnn", "mtcnn"]
    assert answers.equals(stage.process(rows))
    assert answers.column("face_boxes")[0] == answers.column("face_boxes")[2]
    assert not any(isinstance(image, np.ndarray) for image in prepared)  # freed one by one


def test_bytes_that_do_not_decode_raise_ahead_and_in_turn(stage: Faces, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batch(picture(), b"no picture")
    with pytest.raises(ValueError, match="no image format begins so"):
        stage.prepare(rows)
    monkeypatch.setattr(faces, "AHEAD_PIXELS", 1)
    prepared = stage.prepare(rows)
    with pytest.raises(ValueError, match="no image format begins so"):
        stage.process(rows, prepared)

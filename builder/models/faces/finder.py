"""Faces in many pictures: decoded ahead, found by the configured detector, counted by score and size.

Knows pictures as bytes and boxes; knows no stage, no columns and no table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.models.decoding import Block, Decoder
from builder.models.faces.detector import Floats
from builder.models.faces.detectors import DETECTORS, DetectorOptions, read_options
from builder.models.pictures import Pixels

#: Decimal places of a coordinate in 0..1: finer than a pixel of any picture.
DIGITS = 6


@dataclass(frozen=True)
class FacesFound:
    """What was found in one picture.

    Attributes:
        boxes: [x1, y1, x2, y2] in 0..1 of its width and height, those without area left out.
        scores: the detector's, best first.
        count: boxes that pass `min_score` and `min_size`.
    """

    boxes: list[list[float]]
    scores: list[float]
    count: int


@dataclass(frozen=True)
class PictureSeen:
    """A picture's faces, and what `look` returned for it."""

    faces: FacesFound
    looked: Any


class FaceFinder:
    """Finds the faces of batches of pictures.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; a detector that takes no device always runs on the CPU.
        stage: the name for messages in the log.
        look: what else is computed from every decoded picture; called in threads.

    Raises:
        StageError: the detector cannot start.
    """

    def __init__(
        self, options: DetectorOptions, device: str, *, stage: str, look: Callable[[Pixels], Any] = lambda image: None
    ) -> None:
        self._options, self._look, entry = options, look, DETECTORS[options.detector]
        self._min_score = entry.min_score if options.min_score is None else options.min_score
        self._detector = entry.start(device=device, name=stage, **read_options(options))
        on_gpu = entry.takes_device and device != "cpu"
        threads = options.decode_threads or (len(os.sched_getaffinity(0)) if on_gpu else 1)
        self._decoder = Decoder(
            threads,
            room=self._detector.frames,
            most=self._detector.most_frames,
            look=lambda image: self._look(image),
        )

    def ahead(self, pictures: Sequence[bytes | None]) -> Block:
        """Decodes the first block of a batch; may run in another thread while `find` works on the batch before."""
        return self._decoder.block(pictures)

    def find(
        self, pictures: Sequence[bytes | None], ahead: Block | None = None
    ) -> tuple[list[PictureSeen | None], dict[int, Exception]]:
        """The faces of each picture, None if it has no bytes; and why some do not decode, by place.

        Args:
            ahead: the first block of this batch, if it was decoded before.
        """
        seen: list[PictureSeen | None] = [None] * len(pictures)
        errors: dict[int, Exception] = {}
        at = 0
        while at < len(pictures):
            block = ahead if ahead is not None and at == 0 else self._decoder.block(pictures, at)
            errors |= block.errors
            found = self._detector.detect(block.room)
            each = zip(block.places, found, block.sizes, block.looked, strict=True)
            for place, (boxes, scores), size, looked in each:
                if place not in errors:
                    seen[place] = PictureSeen(self._faces(boxes, scores, size), looked)
            at = block.stop
        return seen, errors

    def _faces(self, boxes: Floats, scores: Floats, size: tuple[int, int]) -> FacesFound:
        width, height = size
        relative = (boxes / [width, height, width, height]).clip(0, 1).round(DIGITS)
        inside = (relative[:, 2] > relative[:, 0]) & (relative[:, 3] > relative[:, 1])
        listed, kept = relative[inside].tolist(), scores[inside]
        count = sum(
            score >= self._min_score and is_large(box, width, height, self._options.min_size)
            for box, score in zip(listed, kept.tolist(), strict=True)
        )
        return FacesFound(listed, kept.round(DIGITS).tolist(), count)

    def close(self) -> None:
        """Ends the threads."""
        self._decoder.close()


def is_large(box: Sequence[float], width: int, height: int, min_size: float) -> bool:
    """Whether the long side of a box in 0..1 is at least `min_size` of the long side of its picture."""
    long_side = max((box[2] - box[0]) * width, (box[3] - box[1]) * height)
    return long_side >= min_size * max(width, height)


def nearness(
    one: tuple[list[list[float]], list[float]], other: tuple[list[list[float]], list[float]], threshold: float
) -> float:
    """How much two answers of a detector for one picture differ, each as boxes in 0..1 and their scores.

    Every box is compared with the nearest of the other answer. A box without one counts by how far its score is above
    the threshold, since a tiny change of the score may leave it out.
    """
    a, b = (np.column_stack([np.reshape(boxes, (-1, 4)), scores]) for boxes, scores in (one, other))
    apart = np.abs(a[:, None] - b[None]).max(axis=2)
    found = 0.0
    for rows, nearest in ((a, apart.min(axis=1, initial=1.0)), (b, apart.min(axis=0, initial=1.0))):
        found = max(found, np.minimum(nearest, rows[:, 4] - threshold).max(initial=0.0))
    return found

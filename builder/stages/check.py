"""Checks generated images for faces, blank pictures and unsafe ones. SQL decides what happens to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from builder.errors import RowError
from builder.models.decoding import Block
from builder.models.faces.detectors import DETECTORS, FACE_PACKAGES, DetectorOptions, check_installed, check_options
from builder.models.faces.finder import DIGITS, FaceFinder
from builder.models.images import safety
from builder.models.images.safety import SafetyModel
from builder.models.pictures import Pixels
from builder.stages.contract import Preparing, Resources, answered
from builder.stages.faces import PICTURES_OF_2
from builder.table.outputs import Value

#: Weights of red, green and blue in the grey image, in thousandths. Source: ITU-R BT.601, as Pillow's mode L.
_GREY = np.array([299, 587, 114])
#: Pixels that are summed at a time: bounds memory.
_SUMMED = 1_000_000


class CheckOptions(DetectorOptions):
    """Options of `[stages.check]`."""

    #: Folder of a transformers image classifier that knows unsafe pictures; absent: `check_nsfw` stays null.
    nsfw_model: str | None = None
    #: Its labels that mean unsafe; none: nsfw, unsafe, porn, sexy, hentai, explicit.
    nsfw_labels: list[str] = Field(default_factory=list)


class Check(Preparing):
    """Adds `check_faces`, `check_std`, `check_nsfw` of the generated image."""

    name = "check"
    version = "2"
    changes: ClassVar[Mapping[str, str]] = {"2": PICTURES_OF_2}
    Options = CheckOptions
    inputs = pa.schema([])
    members = ("edit",)
    outputs = (
        Value("check_faces", pa.int32(), "faces in the generated image that pass min_score and min_size"),
        Value("check_std", pa.float64(), "standard deviation of its grey values, 0..127.5; near 0 = blank"),
        Value("check_nsfw", pa.float64(), "probability that it is unsafe, 0..1; null without nsfw_model"),
    )
    packages = (*FACE_PACKAGES, "torch", "transformers")
    resources = Resources(batch_rows=32)

    def __init__(self, options: CheckOptions) -> None:
        check_options(options, self.name)
        self.options = options
        entry = DETECTORS[options.detector]
        #: A classifier looks at one picture at a time: only the detector's answers may differ.
        self.tolerance, self.notice = entry.tolerance, entry.notice
        self.resources = Resources(batch_rows=entry.batch_rows, ahead=entry.ahead)
        self._finder: FaceFinder | None = None
        self._safety: SafetyModel | None = None

    def check_setup(self) -> None:
        """Raises StageError for what the detector and the classifier would miss."""
        check_installed(self.options)
        if self.options.nsfw_model is not None:
            safety.check_installed(self.options.nsfw_model)

    def setup(self, device: str) -> None:
        if self.options.nsfw_model is not None:
            self._safety = SafetyModel(self.options.nsfw_model, self.options.nsfw_labels, device=device)
        self._finder = FaceFinder(self.options, device, stage=self.name, look=self._look)

    def _look(self, image: Pixels) -> tuple[float, npt.NDArray[np.float32] | None]:
        return grey_std(image), None if self._safety is None else self._safety.look(image)

    def prepare(self, batch: pa.RecordBatch) -> Block:
        """Decodes the first images of a batch."""
        assert self._finder is not None
        return self._finder.ahead(batch.column("edit").to_pylist())

    def process(self, batch: pa.RecordBatch, prepared: Block | None = None) -> pa.RecordBatch:
        """Answers a batch.

        Raises:
            RowsFailed: images that are missing or do not decode.
        """
        assert self._finder is not None
        seen, errors = self._finder.find(batch.column("edit").to_pylist(), prepared)
        rows: list[tuple[Any, ...]] = []
        for place, found in enumerate(seen):
            if found is None:
                errors.setdefault(place, RowError("no_image", "the sample has no generated image"))
                rows.append((None, None, None))
                continue
            std, looked = found.looked
            unsafe = None if self._safety is None else round(self._safety.score(looked), DIGITS)
            rows.append((found.faces.count, std, unsafe))
        return answered(self.schema, rows, errors)

    def close(self) -> None:
        if self._finder is not None:
            self._finder.close()
        self._finder = self._safety = None


def grey_std(image: Pixels) -> float:
    """The standard deviation over all pixels of 0.299 R + 0.587 G + 0.114 B, each 0..255.

    0 if all pixels have the same grey, at most 127.5. Sums are of whole thousandths, so that it is exact whatever their
    order, and rounded to six digits.
    """
    total = squares = 0
    pixels = image.reshape(-1, 3)
    for start in range(0, len(pixels), _SUMMED):
        grey = pixels[start : start + _SUMMED].astype(np.int64) @ _GREY
        total += int(grey.sum())
        squares += int((grey * grey).sum())
    count = len(pixels)
    return round(math.sqrt(squares * count - total * total) / count / 1000, DIGITS)

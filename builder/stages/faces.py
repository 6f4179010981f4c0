"""Faces of every sample: from the source's own boxes, or by a detector."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from builder.config import Strict
from builder.models.mtcnn import Mtcnn
from builder.models.pictures import Pixels, decode
from builder.schema import BOXES, output
from builder.stage import Resources

#: Digits of a coordinate in 0..1: finer than a pixel of any picture.
_DIGITS = 6
#: Pixels of a batch that are decoded ahead, but for the picture that goes beyond: 96 MB. The rest of a batch is decoded
#: one by one when it is their turn. A batch of 32 pictures of 512 px has 8 million.
AHEAD_PIXELS = 32_000_000


class FacesOptions(Strict):
    """Options of `[stages.faces]`."""

    #: Where faces come from: auto takes the source's boxes and detects where there are none; json never detects;
    #: detector always does.
    source: Literal["auto", "json", "detector"] = "auto"
    #: mtcnn: embedded, CPU.
    detector: Literal["mtcnn"] = "mtcnn"
    #: Score from which a box counts as a face; boxes without a score always do.
    min_score: float = Field(default=0.9, ge=0, le=1)
    #: Size from which a box counts: its long side as a share of the picture's long side.
    min_size: float = Field(default=0.03, ge=0, le=1)
    #: Smallest face that the detector looks for, px.
    min_face_px: int = Field(default=20, ge=12)


class Faces:
    """Adds `face_count`, `face_boxes`, `face_scores`, `face_source`."""

    name: ClassVar[str] = "faces"
    version: ClassVar[str] = "1"
    Options = FacesOptions
    inputs: ClassVar[pa.Schema] = pa.schema([("boxes", BOXES), ("width", pa.int32()), ("height", pa.int32())])
    members: ClassVar[tuple[str, ...]] = ("image",)
    outputs: ClassVar[pa.Schema] = pa.schema(
        [
            output("face_count", pa.int32(), "boxes that pass min_score and min_size; null = unknown"),
            output("face_boxes", BOXES, "every box, [x1, y1, x2, y2] in 0..1 of width and height; null = unknown"),
            output(
                "face_scores", pa.list_(pa.float64()), "the detector's score of each box; null if the source has none"
            ),
            output("face_source", pa.string(), "json, mtcnn, or unknown"),
        ]
    )
    resources: ClassVar[Resources] = Resources(cpus=1, memory_gb=1, batch_rows=32)

    def __init__(self, options: FacesOptions) -> None:
        self.options = options
        self._detector: Mtcnn | None = None

    def setup(self, device: str) -> None:
        if self.options.source != "json":
            self._detector = Mtcnn(min_face_px=self.options.min_face_px)

    def needs_bytes(self, batch: pa.RecordBatch) -> list[bool]:
        """Only samples that the detector looks at are read."""
        if self.options.source == "detector":
            return [True] * batch.num_rows
        if self.options.source == "json":
            return [False] * batch.num_rows
        return [boxes is None for boxes in batch.column("boxes").to_pylist()]

    def prepare(self, batch: pa.RecordBatch) -> list[Pixels | None]:
        """Decodes the first pictures of a batch, as many as `AHEAD_PIXELS` hold; None for a sample without bytes."""
        ahead: list[Pixels | None] = []
        pixels = 0
        for data in batch.column("image"):
            if pixels >= AHEAD_PIXELS:
                break
            image = decode(data.as_py()) if data.is_valid else None
            pixels += 0 if image is None else image.shape[0] * image.shape[1]
            ahead.append(image)
        return ahead

    def process(self, batch: pa.RecordBatch, prepared: list[Pixels | None] | None = None) -> pa.RecordBatch:
        ahead = self.prepare(batch) if prepared is None else prepared
        known = zip(*(batch.column(name).to_pylist() for name in ("boxes", "width", "height")), strict=True)
        rows = []
        for i, (data, (boxes, width, height)) in enumerate(zip(batch.column("image"), known, strict=True)):
            if i < len(ahead):
                image, ahead[i] = ahead[i], None  # memory is free again as soon as a picture is done
            else:
                image = decode(data.as_py()) if data.is_valid else None
            rows.append(self._from_source(boxes, width, height) if image is None else self._detected(image))
        columns = zip(*rows, strict=True)
        return pa.RecordBatch.from_arrays(
            [pa.array(list(column), field.type) for column, field in zip(columns, self.outputs, strict=True)],
            schema=self.outputs,
        )

    def _from_source(self, boxes: list[list[float]] | None, width: int | None, height: int | None) -> tuple[Any, ...]:
        if boxes is None:
            return None, None, None, "unknown"
        count = sum(self._is_large(box, width or 1, height or 1) for box in boxes)
        return count, boxes, None, "json"

    def _detected(self, image: Pixels) -> tuple[Any, ...]:
        assert self._detector is not None
        height, width = image.shape[:2]
        found, scores = self._detector.detect(image)
        boxes = (found / [width, height, width, height]).clip(0, 1).round(_DIGITS).tolist()
        count = sum(
            score >= self.options.min_score and self._is_large(box, width, height)
            for box, score in zip(boxes, scores.tolist(), strict=True)
        )
        return count, boxes, scores.round(_DIGITS).tolist(), self.options.detector

    def _is_large(self, box: list[float], width: int, height: int) -> bool:
        """Whether a box's long side is min_size of the picture's; a picture of unknown size counts as square."""
        long_side = max((box[2] - box[0]) * width, (box[3] - box[1]) * height)
        return long_side >= self.options.min_size * max(width, height)

    def close(self) -> None:
        self._detector = None

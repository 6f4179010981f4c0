"""Faces of every sample: from the source's own boxes, from published metadata, or by a detector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from builder.answering import difference
from builder.errors import ConfigError
from builder.models.detectors import (
    TOLERANCES,
    Block,
    DetectorOptions,
    FaceFinder,
    Seen,
    check_options,
    is_large,
    nearness,
)
from builder.models.scrfd import LICENCE
from builder.query import Lookup
from builder.schema import BOXES, output
from builder.stage import Resources, answered


class FacesOptions(DetectorOptions):
    """Options of `[stages.faces]`."""

    #: Where faces come from: auto takes the source's boxes, then the metadata's, and detects where neither has any;
    #: json takes the source's alone, metadata the metadata's alone, detector always detects.
    source: Literal["auto", "json", "metadata", "detector"] = "auto"
    #: Parquet files with uid and face_bboxes (DataComp's) or face-boxes (dataset2metadata's): a path or a glob.
    metadata: str | None = Field(default=None, json_schema_extra={"decides": False})  # the boxes in them are inputs


class Faces:
    """Adds `face_count`, `face_boxes`, `face_scores`, `face_source`."""

    name: ClassVar[str] = "faces"
    version: ClassVar[str] = "1"
    Options = FacesOptions
    inputs: ClassVar[pa.Schema] = pa.schema(
        [("boxes", BOXES), ("boxes_from", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    )
    members: ClassVar[tuple[str, ...]] = ("image",)
    outputs: ClassVar[pa.Schema] = pa.schema(
        [
            output("face_count", pa.int32(), "boxes that pass min_score and min_size; null = unknown"),
            output("face_boxes", BOXES, "every box, [x1, y1, x2, y2] in 0..1 of width and height; null = unknown"),
            output(
                "face_scores", pa.list_(pa.float64()), "the detector's score of each box; null if the source has none"
            ),
            output("face_source", pa.string(), "json, metadata, mtcnn, scrfd, or unknown"),
        ]
    )
    resources: Resources = Resources(cpus=1, memory_gb=1, batch_rows=32)

    def __init__(self, options: FacesOptions) -> None:
        self.options = options
        self._finder: FaceFinder | None = None
        self._check_source()
        if options.metadata is not None:
            self.sql = "faces_metadata.sql"
            self.params = {"source": options.source}
            boxes = (BOXES, ("face_bboxes", "face-boxes"))
            self.lookups = {"metadata": Lookup(options.metadata, {"uid": (pa.string(), ("uid",)), "boxes": boxes})}
        if self._detects:
            check_options(options, self.name)
            self.tolerance = TOLERANCES[options.detector]
            if options.detector == "scrfd":
                self.notice = LICENCE
                self.resources = Resources(cpus=1, memory_gb=3, batch_rows=64, ahead=2)
        else:
            self.tolerance = 0.0

    def _check_source(self) -> None:
        source, metadata = self.options.source, self.options.metadata
        if source == "metadata" and metadata is None:
            raise ConfigError(
                "source = 'metadata', but no metadata is named", fix='add metadata = "DIR/*.parquet" to [stages.faces]'
            )
        if source in ("json", "detector") and metadata is not None:
            raise ConfigError(
                f"metadata is named, but source = '{source}' does not read it",
                fix="leave metadata out, or set source = 'auto' or 'metadata'",
            )

    @property
    def _detects(self) -> bool:
        return self.options.source in ("auto", "detector")

    def setup(self, device: str) -> None:
        if self._detects:
            self._finder = FaceFinder(self.options, device, stage=self.name)

    def needs_bytes(self, batch: pa.RecordBatch) -> list[bool]:
        """Only samples that the detector looks at are read."""
        if self.options.source == "auto":
            known: list[bool] = batch.column("boxes").is_null().to_pylist()
            return known
        return [self.options.source == "detector"] * batch.num_rows

    def prepare(self, batch: pa.RecordBatch) -> Block | None:
        """Decodes the first pictures of a batch."""
        return None if self._finder is None else self._finder.ahead(batch.column("image").to_pylist())

    def process(self, batch: pa.RecordBatch, prepared: Block | None = None) -> pa.RecordBatch:
        """Answers a batch.

        Raises:
            RowsFailed: pictures that do not decode, and boxes that are none.
        """
        seen: list[Seen | None] = [None] * batch.num_rows
        errors: dict[int, Exception] = {}
        if self._finder is not None:
            seen, errors = self._finder.find(batch.column("image").to_pylist(), prepared)
        known = zip(*(batch.column(name).to_pylist() for name in self.inputs.names), strict=True)
        rows: list[tuple[Any, ...]] = []
        for place, (found, given) in enumerate(zip(seen, known, strict=True)):
            row: tuple[Any, ...] = (None, None, None, "unknown")
            if found is not None:
                faces = found.faces
                row = (faces.count, faces.boxes, faces.scores, self.options.detector)
            elif place not in errors and self.options.source != "detector":
                try:
                    row = self._given(*given)
                except ValueError as error:
                    errors[place] = error
            rows.append(row)
        return answered(self.outputs, rows, errors)

    def difference(self, alone: pa.RecordBatch, within: pa.RecordBatch) -> float:
        """How far two answers for one row are apart; `face_count` follows from boxes and scores, and does not count."""
        [one], [other] = alone.to_pylist(), within.to_pylist()
        if one["face_scores"] is None or other["face_scores"] is None:
            return difference(alone, within)
        first, second = ((answer["face_boxes"], answer["face_scores"]) for answer in (one, other))
        return nearness(first, second, self.options.threshold)

    def _given(
        self, boxes: list[list[float]] | None, boxes_from: str | None, width: int | None, height: int | None
    ) -> tuple[Any, ...]:
        """The answer out of boxes that are known; a picture of unknown size counts as square."""
        if boxes is None:
            return None, None, None, "unknown"
        checked = [_checked(box) for box in boxes]
        count = sum(is_large(box, width or 1, height or 1, self.options.min_size) for box in checked)
        return count, checked, None, boxes_from

    def close(self) -> None:
        if self._finder is not None:
            self._finder.close()
        self._finder = None


def _checked(box: Sequence[float | None] | None) -> list[float]:
    """A box of a file, within the picture.

    Raises:
        ValueError: it is no box.
    """
    edges = [edge for edge in box or () if edge is not None and math.isfinite(edge)]
    if box is None or len(box) != 4 or len(edges) != 4 or edges[0] > edges[2] or edges[1] > edges[3]:
        raise ValueError(f"{box} is no box [x1, y1, x2, y2]")
    return [min(max(edge, 0.0), 1.0) for edge in edges]

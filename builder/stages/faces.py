"""Faces of every sample: from the source's own boxes, from published metadata, or by a detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from builder.errors import ConfigError
from builder.models.decoding import Block
from builder.models.faces.detectors import DETECTORS, FACE_PACKAGES, DetectorOptions, check_installed, check_options
from builder.models.faces.finder import FaceFinder, PictureSeen, is_large, nearness
from builder.stages.comparison import difference
from builder.stages.contract import Preparing, Resources, answered
from builder.table import boxes
from builder.table.lookups import Lookup
from builder.table.outputs import Value
from builder.table.schema import BOXES

#: What version 2 of the stages that detect faces changed in how pictures are looked at.
PICTURES_OF_2 = (
    "pictures are looked at as viewers show them (upright by their EXIF orientation, grey of 16 bits by its high 8, "
    "transparent parts on white), small ones for smaller faces, and those above 8 megapixels shrunk"
)


class FacesOptions(DetectorOptions):
    """Options of `[stages.faces]`."""

    #: Where faces come from: auto takes the source's boxes, else the metadata's, else detects; json takes only the
    #: source's, metadata only the metadata's; detector always detects.
    source: Literal["auto", "json", "metadata", "detector"] = "auto"
    #: Parquet files with uid and face_bboxes (DataComp's) or face-boxes (dataset2metadata's): a path or a glob.
    metadata: str | None = Field(default=None, json_schema_extra={"decides": False})  # the boxes in them are inputs


class Faces(Preparing):
    """Adds `face_count`, `face_boxes`, `face_scores`, `face_source`, `face_notes`."""

    name = "faces"
    version = "2"
    changes: ClassVar[Mapping[str, str]] = {
        "2": "published boxes up to 1 % of a side outside the picture are cut; those in pixels, or that are none, are "
        "unknown instead of no face or a failed row; " + PICTURES_OF_2
    }
    Options = FacesOptions
    inputs = pa.schema([("boxes", BOXES), ("boxes_from", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
    members = ("image",)
    outputs = (
        Value("face_count", pa.int32(), "boxes that pass min_score and min_size; null = unknown"),
        Value("face_boxes", BOXES, "every box, [x1, y1, x2, y2] in 0..1 of width and height; null = unknown"),
        Value("face_scores", pa.list_(pa.float64()), "the detector's score of each box; null if the source has none"),
        Value("face_source", pa.string(), "json, metadata, mtcnn, scrfd, or unknown"),
        Value("face_notes", pa.string(), "published boxes that were cut at the edge, or are none and so unknown"),
    )
    noting = "face_notes"
    packages = FACE_PACKAGES
    resources = Resources(batch_rows=32)

    def __init__(self, options: FacesOptions) -> None:
        self.options = options
        self._finder: FaceFinder | None = None
        self._check_source()
        if options.metadata is not None:
            self.sql = "faces_metadata.sql"
            self.params = {"source": options.source}
            published = (BOXES, ("face_bboxes", "face-boxes"))
            self.lookups = {"metadata": Lookup(options.metadata, {"uid": (pa.string(), ("uid",)), "boxes": published})}
        if self._detects:
            check_options(options, self.name)
            entry = DETECTORS[options.detector]
            self.tolerance, self.notice = entry.tolerance, entry.notice
            self.resources = Resources(batch_rows=entry.batch_rows, ahead=entry.ahead)
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

    def check_setup(self) -> None:
        """Raises StageError for what the detector would miss."""
        if self._detects:
            check_installed(self.options)

    def setup(self, device: str) -> None:
        if self._detects:
            self._finder = FaceFinder(self.options, device, stage=self.name)

    def needs_bytes(self, batch: pa.RecordBatch) -> list[bool]:
        """True only for samples that the detector looks at."""
        if self.options.source == "auto":
            return [boxes.read(value).boxes is None for value in batch.column("boxes").to_pylist()]
        return [self.options.source == "detector"] * batch.num_rows

    def prepare(self, batch: pa.RecordBatch) -> Block | None:
        """Decodes the first pictures of a batch."""
        return None if self._finder is None else self._finder.ahead(batch.column("image").to_pylist())

    def process(self, batch: pa.RecordBatch, prepared: Block | None = None) -> pa.RecordBatch:
        """Answers a batch.

        Raises:
            RowsFailed: pictures that do not decode.
        """
        seen: list[PictureSeen | None] = [None] * batch.num_rows
        errors: dict[int, Exception] = {}
        if self._finder is not None:
            seen, errors = self._finder.find(batch.column("image").to_pylist(), prepared)
        known = zip(*(batch.column(name).to_pylist() for name in self.inputs.names), strict=True)
        rows: list[tuple[Any, ...]] = []
        for found, given in zip(seen, known, strict=True):
            reading = boxes.Reading(None) if self.options.source == "detector" else boxes.read(given[0])
            row: tuple[Any, ...] = (None, None, None, "unknown")
            if found is not None:
                faces = found.faces
                row = (faces.count, faces.boxes, faces.scores, self.options.detector)
            elif reading.boxes is not None:
                row = self._given(reading.boxes, *given[1:])
            rows.append((*row, f"{given[1] or 'boxes'}: {reading.note}" if reading.note else None))
        return answered(self.schema, rows, errors)

    def difference(self, alone: pa.RecordBatch, within: pa.RecordBatch) -> float:
        """How much two answers for one row differ, by boxes and scores; `face_count` follows from them."""
        [one], [other] = alone.to_pylist(), within.to_pylist()
        if one["face_scores"] is None or other["face_scores"] is None:
            return difference(alone, within)
        first, second = ((answer["face_boxes"], answer["face_scores"]) for answer in (one, other))
        return nearness(first, second, self.options.threshold)

    def _given(
        self, known: list[list[float]], boxes_from: str | None, width: int | None, height: int | None
    ) -> tuple[Any, ...]:
        """The answer from known boxes; a picture of unknown size counts as square."""
        count = sum(is_large(box, width or 1, height or 1, self.options.min_size) for box in known)
        return count, known, None, boxes_from

    def close(self) -> None:
        if self._finder is not None:
            self._finder.close()
        self._finder = None

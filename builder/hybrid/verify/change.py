"""What a selected row changes in its sample, as the proof reads it.

Shares no code with the part of the writer that decides this, so that a fault there is found here.
The rules are those of docs/decisions/0006-an-edited-sample-has-the-members-of-its-source.md.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from builder.formats import IMAGE_EXTENSIONS, JPG, OF_EXTENSION, OTHER_EXTENSIONS
from builder.hybrid.edit import Rules
from builder.store.layout import Layout, RunFiles

#: The beginning of columns of the write selection that set json fields.
_SET = "set_"
#: The json field that holds boxes of faces in DataComp's shards; a pipeline can name another one.
_BOXES = "face_bboxes"


@dataclass(frozen=True)
class NewImage:
    """The generated image of a sample, as the table describes it.

    Attributes:
        place: edits tar relative to the root, first byte, bytes.
        width, height: pixels.
        kind: its format.
        provenance: how it was made, for json and manifest.
    """

    place: tuple[str, int, int]
    sha256: str
    width: int
    height: int
    kind: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """The change of one sample.

    Attributes:
        is_dropped: whether the sample is left out; then all else is ignored.
        image: the new image; None if the sample keeps its image.
        caption: the new caption; None if the sample keeps its caption.
        fields: json fields that the SQL sets, with values for json.
        boxes: json fields that are removed with the old image.
        members: extension of each member in order, and the position of the source's member that it replaces.
    """

    row: int
    is_dropped: bool = False
    image: NewImage | None = None
    caption: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    boxes: tuple[str, ...] = ()
    members: tuple[tuple[str, int], ...] = ()


class Changes:
    """Reads the selected rows of one shard. A run that made images is read once."""

    def __init__(self, layout: Layout, rules: Rules) -> None:
        self._layout, self._rules = layout, rules
        self._runs: dict[str, dict[str, Any]] = {}

    def of(self, row: dict[str, Any], extensions: Sequence[str]) -> Change | None:
        """What a row changes in its sample; None if the sample stays as in the source.

        Args:
            extensions: of the source's members, in order.
        """
        if row["source_status"] != "ok":
            return None
        if row.get("dropped"):
            return Change(row["row"], is_dropped=True)
        fields = {
            name.removeprefix(_SET): _as_json(value)
            for name, value in row.items()
            if name.startswith(_SET) and value is not None
        }
        image = None
        caption = row.get("caption")
        if row.get("image_path") is not None:
            image = self._image(row)
            caption = row["image_prompt"]
        if image is None and caption is None and not fields:
            return None
        members = self._members(extensions, image, caption is not None, bool(fields))
        if members is None:
            return None
        boxes = tuple(dict.fromkeys((_BOXES, self._rules.boxes))) if image is not None else ()
        return Change(row["row"], False, image, caption, fields, boxes, members)

    def _image(self, row: dict[str, Any]) -> NewImage:
        provenance = {"model": row.get("image_model"), "seed": row.get("image_seed"), "prompt": row["image_prompt"]}
        run = row.get("image_run")
        if run is not None:
            provenance |= self._run(run)
        kind = (row.get("image_format") or JPG).lower()
        return NewImage(
            place=(row["image_path"], row["image_offset"], row["image_size"]),
            sha256=row["image_sha256"],
            width=row["image_width"],
            height=row["image_height"],
            kind=OF_EXTENSION.get(kind, kind),
            provenance=provenance,
        )

    def _run(self, name: str) -> dict[str, Any]:
        if name not in self._runs:
            said = json.loads(RunFiles(self._layout, name).description.read_bytes())
            self._runs[name] = {"stage": said["stage"], "version": said["version"], "options": said["options_hash"]}
        return self._runs[name]

    def _members(
        self, extensions: Sequence[str], image: NewImage | None, has_caption: bool, has_fields: bool
    ) -> tuple[tuple[str, int], ...] | None:
        """The members of an edited sample; None if it cannot be edited."""
        lower = [extension.lower() for extension in extensions]
        own = own_picture(extensions)
        has_json = "json" in lower or self._rules.json
        is_recorded = has_json or ("txt" in lower and has_caption)  # a member can hold what is new
        if not is_recorded or (has_fields and not has_json):
            return None
        others = [place for place, extension in enumerate(extensions) if place != own and is_picture(extension)]
        gone: set[int] = set()
        name = extensions[own]
        if image is not None:
            if others and self._rules.other_pictures is None:
                return None
            if others and self._rules.other_pictures == "drop":
                gone = set(others)
            if image.kind != OF_EXTENSION[lower[own]]:
                if image.kind != JPG or self._rules.image != "jpg":
                    return None
                name = "jpg"
        kept = [(name if i == own else extensions[i], i) for i in range(len(extensions)) if i not in gone]
        if "json" not in lower and self._rules.json:
            kept.append(("json", own))
        return tuple(kept)


def own_picture(extensions: Sequence[str]) -> int:
    """The position of a sample's picture: its first jpg, else jpeg, png or webp."""
    lower = [extension.lower() for extension in extensions]
    return next(lower.index(extension) for extension in IMAGE_EXTENSIONS if extension in lower)


def is_picture(extension: str) -> bool:
    """Whether a member is a picture of any format, or a mask, by the last part of its extension."""
    last = extension.lower().rpartition(".")[2]
    return last in OF_EXTENSION or last in OTHER_EXTENSIONS


def _as_json(value: Any) -> Any:
    """A value of SQL for json: decimals as numbers, dates and times as ISO text."""
    if isinstance(value, decimal.Decimal):
        whole = int(value)
        return whole if whole == value else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return value

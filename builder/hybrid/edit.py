"""An edited sample: its members, its json, and the record of how it was made.

An edited sample has the members of its source. This module reads no tars and no table.
"""

from __future__ import annotations

import codecs
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import orjson

from builder import formats
from builder.table.schema import folded

#: What a member of an edited sample holds: the source's content, or a new image, json or txt.
Holds = Literal["source", "image", "json", "txt"]
#: json fields that describe the replaced image: emptied, since the new one has none. Source: img2dataset's fields.
_EMPTIED = ("url", "exif")
#: The json field that holds boxes of faces in DataComp's shards; a pipeline can name another one.
BOXES = "face_bboxes"
#: Why a sample that the write SQL returns stays as in the source.
OTHER_FORMAT, SEVERAL_PICTURES, NO_TEXT = "other format", "several pictures", "no json or txt"
#: The text shown for each reason.
REASONS = {
    OTHER_FORMAT: "samples whose new picture has another format than the one it would replace",
    SEVERAL_PICTURES: "samples with several pictures, of which a new one would replace the first",
    NO_TEXT: "samples without a json or txt for what is new",
}


@dataclass(frozen=True)
class Rules:
    """How the samples of a pipeline are edited.

    Attributes:
        image: `source`: a new picture replaces one of its own format only; `jpg`: a jpg replaces a picture of any
            format.
        other_pictures: the other pictures of a sample that has several: `keep` or `drop`. None: such samples are not
            edited.
        json: whether a json is added to an edited sample that has none.
        boxes: the json field that holds boxes of faces.
    """

    image: Literal["source", "jpg"] = "source"
    other_pictures: Literal["keep", "drop"] | None = None
    json: bool = False
    boxes: str = BOXES

    @property
    def box_fields(self) -> tuple[str, ...]:
        """json fields that hold boxes of the picture: the one that the pipeline names, and DataComp's."""
        return (BOXES,) if self.boxes == BOXES else (BOXES, self.boxes)


@dataclass(frozen=True)
class Edit:
    """One row of the write SQL that changes a sample.

    Attributes:
        dropped: whether the sample is left out; then all else is ignored.
        image: path, offset and size of the new image; None if the sample keeps its image.
        kind: format of the new image; None if the table does not record it: jpg.
        caption: the new caption; None if the sample keeps its caption.
        fields: json fields to set.
        made: how the image was made, for the json.
        members: of the edited sample; empty if it is dropped.
        boxes: json fields that hold boxes of the picture; they are removed with it.
    """

    row: int
    dropped: bool = False
    image: tuple[str, int, int] | None = None
    caption: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    members: tuple[Member, ...] = ()
    boxes: tuple[str, ...] = (BOXES,)
    kind: str | None = None


# --- its members ---


@dataclass(frozen=True)
class Member:
    """One member of an edited sample.

    Attributes:
        place: index in the source's members of the one whose header it takes.
        is_added: whether the source has no such member.
    """

    extension: str
    place: int
    holds: Holds
    is_added: bool = False


@lru_cache(maxsize=4096)
def members_of(
    extensions: tuple[str, ...], image: str | None, has_caption: bool, has_fields: bool, rules: Rules
) -> tuple[Member, ...] | str:
    """The members of an edited sample, in order; or the reason why it is not edited.

    Args:
        extensions: of the source's members, as in the archive; one of them is a picture.
        image: format of the new picture; None if the sample keeps its picture.
        has_caption: whether there is a new caption; always true with a new picture.
        has_fields: whether json fields are set.
    """
    lower = [extension.lower() for extension in extensions]
    own = formats.picture_of(extensions)
    assert own is not None
    gone: set[int] = set()
    renamed = extensions[own]
    if image is not None:
        others = set(formats.pictures_of(extensions)) - {own}
        if others and rules.other_pictures is None:
            return SEVERAL_PICTURES
        if rules.other_pictures == "drop":
            gone = others
        if image != formats.OF_EXTENSION[lower[own]]:
            if image != formats.JPG or rules.image != "jpg":
                return OTHER_FORMAT
            renamed = "jpg"
    has_json = "json" in lower or rules.json
    if not has_json and (has_fields or not (has_caption and "txt" in lower)):
        return NO_TEXT
    found = []
    for place, extension in enumerate(extensions):
        if place in gone:
            continue
        if place == own and image is not None:
            found.append(Member(renamed, place, "image"))
        elif lower[place] == "json":
            found.append(Member(extension, place, "json"))
        elif lower[place] == "txt" and has_caption:
            found.append(Member(extension, place, "txt"))
        else:
            found.append(Member(extension, place, "source"))
    if "json" not in lower and rules.json:
        found.append(Member("json", own, "json", is_added=True))
    return tuple(found)


@lru_cache(maxsize=4096)
def was_so(extensions: tuple[str, ...], has_image: bool, has_caption: bool, members: tuple[Member, ...]) -> bool:
    """Whether version 3 of the writer, which had no `Rules`, gave an edited sample the same members.

    It always added a json and a txt, wrote the picture as jpg, and left out every other jpg, jpeg, png or webp. A json
    that it added did not keep the caption of the txt.
    """
    lower = [extension.lower() for extension in extensions]
    if "txt" in lower and any(member.is_added for member in members):
        return False
    own = formats.picture_of(extensions)
    assert own is not None
    before: list[tuple[str, int]] = []
    for place, extension in enumerate(extensions):
        if not has_image or lower[place] not in formats.OF_EXTENSION:
            before.append((extension, place))
        elif place == own:
            before.append((extension if lower[place] == "jpeg" else "jpg", place))
    if "json" not in lower:
        before.append(("json", own))
    if "txt" not in lower and has_caption:
        before.append(("txt", own))
    return before == [(member.extension, member.place) for member in members]


# --- its json ---


def edited_json(raw: bytes | None, edit: Edit, txt: bytes | None = None) -> bytes:
    """A sample's json with its new caption and the description of its new image, in img2dataset's layout.

    `original_caption` keeps the first caption; `provenance` keeps every replaced field. ASCII, indent 4.

    Args:
        raw: the json in the source; None if there is none.
        txt: the txt in the source, which gives the caption if there is no json; None if there is none.
    """
    old: dict[str, Any] = _parsed(raw) if raw is not None else _known_from(txt)
    new = dict(old)
    changes: dict[str, Any] = {}
    if edit.caption is not None:
        changes["caption"] = edit.caption
    boxes: tuple[str, ...] = ()
    if edit.image:
        width, height = edit.made["image_width"], edit.made["image_height"]
        changes |= {"width": width, "height": height, "original_width": width, "original_height": height}
        changes["sha256"] = edit.made["image_sha256"]
        changes |= {name: "" for name in _EMPTIED if name in old}
        boxes = edit.boxes
        for name in boxes:
            new.pop(name, None)
    changes |= {_field_in(old, name): value for name, value in edit.fields.items()}
    replaced = {name: old[name] for name in (*changes, *boxes) if name in old}
    new.update(changes)
    if edit.caption is not None:
        new["original_caption"] = old.get("original_caption", old.get("caption"))
    new["provenance"] = _provenance(edit, replaced)
    if "provenance" in old:
        new["provenance"]["before"] = old["provenance"]
    return _pretty(new)


def _provenance(edit: Edit, replaced: dict[str, Any]) -> dict[str, Any]:
    """The replaced values, and how the image was made."""
    provenance: dict[str, Any] = {"replaced": replaced}
    if edit.image:
        names = {"image_model": "model", "image_seed": "seed", "image_prompt": "prompt"}
        provenance |= {short: edit.made.get(name) for name, short in names.items()}
        provenance |= {name: edit.made[name] for name in ("stage", "version", "options") if name in edit.made}
    return provenance


def manifest_provenance(txt: bytes, edit: Edit) -> str:
    """The provenance of an edited sample without a json, for the manifest: json on one line.

    Args:
        txt: its txt in the source.
    """
    return json.dumps(_provenance(edit, _known_from(txt)))


def _known_from(txt: bytes | None) -> dict[str, Any]:
    """The fields known for a sample without a json."""
    return {} if txt is None else {"caption": txt.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")}


def _field_in(fields: dict[str, Any], name: str) -> str:
    """The json field that a column `set_<name>` sets: the one of that name, or the only one in another case."""
    if name in fields:
        return name
    alike = [field for field in fields if folded(field) == folded(name)]
    return alike[0] if len(alike) == 1 else name


def _pretty(value: dict[str, Any]) -> bytes:
    """An object as ASCII json with indent 4. orjson indents by 2, so spaces are doubled: twice as fast as `json`."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(value, indent=4).encode()
    if b"\x7f" in text:
        return json.dumps(value, indent=4).encode()
    if not text.isascii():
        text = text.decode().encode("ascii", _ESCAPED)
    depth = 1
    while (line := b"\n" + b" " * (4 * depth - 2)) in text:  # never in a string, where line ends are escaped
        text = text.replace(line, line + b"  ")
        depth += 1
    return text


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Escapes characters that are not ASCII as json does."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


_ESCAPED = "builder.json"
codecs.register_error(_ESCAPED, _escaped)


def _parsed(raw: bytes) -> dict[str, Any]:
    """A json object with all digits of its integers; NaN and infinities, which json does not allow, become null."""
    return dict(_DECODER.decode(raw.removeprefix(b"\xef\xbb\xbf").decode()))


def _finite_float(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


_DECODER = json.JSONDecoder(parse_constant=lambda name: None, parse_float=_finite_float)

"""The proof of an edited sample's json: which fields are the source's, which are new, which are gone.

With a new caption, `caption` holds it and `original_caption` the first one that the sample had. With a new image,
`width`, `height`, `original_width`, `original_height` and `sha256` are the image's, `url` and `exif` are empty if the
source has them, and boxes are gone. Fields that the SQL sets hold its values. `provenance` holds each replaced value,
how the image was made, and under `before` the source's provenance. Every other field is the source's.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from builder.hybrid.verify.change import Change
from builder.hybrid.verify.problem import quoted_value

Fields = dict[str, Any]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NONE = object()
#: A string or a number of json. Strings are matched so that numbers inside them are not.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?')


def fields_of_source(raw: bytes | None, txt: bytes | None) -> Fields:
    """The fields of a sample in the source: those of its json, else the caption of its txt, else none.

    NaN, infinities and numbers beyond a float's range, which json does not have, become null.

    Raises:
        ValueError, RecursionError: the json does not parse.
    """
    if raw is not None:
        text = raw.removeprefix(_BYTE_ORDER_MARK).decode()
        return dict(json.loads(text, parse_constant=lambda name: None, parse_float=_finite))
    if txt is not None:
        return {"caption": txt.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "replace")}
    return {}


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def parsed(raw: bytes) -> Fields:
    """The json of an edited sample.

    Raises:
        ValueError, RecursionError: it does not parse, has NaN or an infinity, or is not an object.
    """
    value = json.loads(raw, parse_constant=_refused)
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


def _refused(name: str) -> None:
    raise ValueError(f"json has no {name}")


def new_fields(change: Change, source: Fields) -> Fields:
    """The fields whose values the change decides, in the order in which new ones are added after the source's."""
    new: Fields = {}
    if change.caption is not None:
        new["caption"] = change.caption
    image = change.image
    if image is not None:
        new |= {"width": image.width, "height": image.height}
        new |= {"original_width": image.width, "original_height": image.height, "sha256": image.sha256}
        new |= {name: "" for name in ("url", "exif") if name in source}
    new |= {_name_in(source, name): value for name, value in change.fields.items()}
    replaced = {name: source[name] for name in (*new, *change.boxes) if name in source}
    if change.caption is not None:
        new["original_caption"] = source.get("original_caption", source.get("caption"))
    new["provenance"] = provenance(change, replaced)
    if "provenance" in source:
        new["provenance"]["before"] = source["provenance"]
    return new


def _name_in(source: Fields, name: str) -> str:
    """The field that a column of SQL sets: SQL ignores case, json does not."""
    if name in source:
        return name
    alike = [one for one in source if _lower(one) == _lower(name)]
    return alike[0] if len(alike) == 1 else name


def _lower(name: str) -> bytes:
    """A name as SQL compares it, which ignores the case of ASCII letters only, as `bytes.lower` does."""
    return name.encode("utf-8", "surrogatepass").lower()


def provenance(change: Change, replaced: Fields) -> Fields:
    """How a sample was made: the replaced values, and how the image was made."""
    made = change.image.provenance if change.image is not None else {}
    return {"replaced": replaced, **made}


def fault_of_fields(found: Fields, source: Fields, change: Change) -> str | None:
    """The first field that is not what it should be, in words; None if all are."""
    new = new_fields(change, source)
    wanted = {name: new.get(name, value) for name, value in source.items() if name not in change.boxes}
    wanted |= new
    if repr(found) == repr(wanted):  # with order and types: 1 is not 1.0, and not true
        return None
    for name in [*wanted, *found]:
        have, should = found.get(name, _NONE), wanted.get(name, _NONE)
        if repr(have) != repr(should):
            return f"its json field '{name}' is {_in_words(have)}, but should be {_in_words(should)}"
    return "its json has the right fields in another order than the source"


def _in_words(value: Any) -> str:
    if value is _NONE:
        return "nothing"
    return "null" if value is None else quoted_value(value)


def is_laid_out(raw: bytes, found: Fields) -> bool:
    """Whether the text has img2dataset's layout: ASCII, each level indented by four spaces.

    Numbers may be written in another way: 1e16 as 1e+16.
    """
    wanted = json.dumps(found, indent=4).encode()
    return raw == wanted or _TOKEN.sub(_number, raw) == _TOKEN.sub(_number, wanted)


def _number(token: re.Match[bytes]) -> bytes:
    text = token[0]
    if text.startswith(b'"') or not set(text) & set(b".eE"):
        return text
    return repr(float(text)).encode()

"""Members of samples: which of them is the picture, where they lie, and digests of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from builder.formats import IMAGE_EXTENSIONS

#: Name under which the generated image of a row is read.
EDIT = "edit"
#: `<stage>_digest` where nothing was read, and where what was asked for could not be.
NOTHING_READ, NOT_READ = 0, 1
#: What helps against a source that is not what was ingested.
AGAIN = "put it back, or ingest it as it is now: builder ingest"


def place_of(members: Sequence[dict[str, Any]], member: str) -> dict[str, Any] | None:
    """Where a member lies: `image` is the first of jpg, jpeg, png, webp; else the extension."""
    places = by_extension(members)
    wanted = IMAGE_EXTENSIONS if member == "image" else (member,)
    return next((places[extension] for extension in wanted if extension in places), None)


def by_extension(members: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A sample's members by lower-case extension."""
    return {place["ext"].lower(): place for place in members}


def digest_of(member: str, data: bytes | None) -> int:
    """A member's bytes as 64 bits: others for each name, so that they can be joined, and for a sample that lacks it."""
    name = member if data is not None else f"no {member}"
    digest = hashlib.blake2b(data or b"", digest_size=8, person=name.encode()).digest()
    return max(int.from_bytes(digest, "big"), NOT_READ + 1)


def digests_of(members: Mapping[str, bytes | None]) -> int:
    """`<stage>_digest` of an answer: over all members of the source that were read for it."""
    joined = NOTHING_READ
    for name, data in members.items():
        joined ^= digest_of(name, data)
    return joined

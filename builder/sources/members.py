"""Members of samples: which one is the picture, where they are, and digests of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from builder.formats import IMAGE_EXTENSIONS

#: Name under which the generated image of a row is read.
EDIT = "edit"
#: `<stage>_digest` if nothing was read, and if the bytes could not be read.
NOTHING_READ, NOT_READ = 0, 1
#: The fix for a source that is not the one that was ingested.
AGAIN = "put it back, or ingest it as it is now: builder ingest"


def place_of(members: Sequence[dict[str, Any]], member: str) -> dict[str, Any] | None:
    """Where a member is: `image` is the first of jpg, jpeg, png, webp; any other name is an extension."""
    places = by_extension(members)
    extensions = IMAGE_EXTENSIONS if member == "image" else (member,)
    return next((places[extension] for extension in extensions if extension in places), None)


def by_extension(members: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A sample's members by lower-case extension."""
    return {place["ext"].lower(): place for place in members}


def digest_of(member: str, data: bytes | None) -> int:
    """A 64-bit digest of a member's bytes, or of the fact that a sample lacks it.

    It depends on the member's name, so that the digests of several members can be combined.
    """
    name = member if data is not None else f"no {member}"
    digest = hashlib.blake2b(data or b"", digest_size=8, person=name.encode()).digest()
    return max(int.from_bytes(digest, "big"), NOT_READ + 1)


def digests_of(members: Mapping[str, bytes | None]) -> int:
    """`<stage>_digest` of an answer: combines all members of the source that were read for it."""
    combined = NOTHING_READ
    for name, data in members.items():
        combined ^= digest_of(name, data)
    return combined

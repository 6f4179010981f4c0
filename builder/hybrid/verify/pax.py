"""Reads the pax records in front of a tar header, by the proof's own code: the writer has another reader.

Source: POSIX.1-2001 pax, "pax Header Block" and "pax Extended Header".
"""

from __future__ import annotations

import re

#: `<length> `, as every record begins. No header that the index accepts is as long as eight digits say.
_LENGTH = re.compile(rb"([0-9]{1,7}) ")


def records_of(body: bytes) -> list[tuple[bytes, bytes]]:
    r"""The records `<length> <key>=<value>\n` of one pax header, in order; a key may come more than once.

    A length counts the whole record with its own digits, so that a value may hold any byte. A key ends at the first
    `=`. Zeros that fill up the body are no record.

    Raises:
        ValueError: a record has another form, or is longer or shorter than it says.
    """
    found: list[tuple[bytes, bytes]] = []
    body = body.rstrip(b"\0")
    at = 0
    while at < len(body):
        begins = _LENGTH.match(body, at)
        if begins is None:
            raise ValueError(f"byte {at} of a pax header does not begin a record")
        stop = at + int(begins[1])
        record = body[begins.end() : stop]
        key, equals, value = record.partition(b"=")
        if stop > len(body) or not equals or not value.endswith(b"\n"):
            raise ValueError(f"the pax record at byte {at} is not as long as it says")
        found.append((key, value[:-1]))
        at = stop
    return found

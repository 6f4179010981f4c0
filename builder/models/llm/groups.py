"""Which group of people a sample's prompt must portray: one value per attribute, the same wherever it is computed.

Owns the choice. Knows uids and keys as text, and no stage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from builder.errors import ConfigError

#: Attributes as a pipeline writes them: lists of values, or a table of such lists by the attribute's name.
Attributes = Sequence[Sequence[str]] | Mapping[str, Sequence[str]]


class Groups:
    """All combinations of the values of some attributes.

    Args:
        attributes: lists of values, for example [["Black", "white"], ["man", "woman"]], or a table of them.
        seed: another seed assigns other groups.

    Raises:
        ConfigError: no attribute, one without values, an empty value, or one value twice.
    """

    def __init__(self, attributes: Attributes, *, seed: int = 0) -> None:
        named = dict(attributes) if isinstance(attributes, Mapping) else dict(enumerate(attributes))
        fix = 'for example: groups = [["Black", "white", "Asian"], ["man", "woman"]]'
        if not named:
            raise ConfigError("'groups' has no attribute", fix=fix)
        for name, values in named.items():
            shown = f"groups.{name}" if isinstance(name, str) else f"groups[{name}]"
            if not values:
                raise ConfigError(f"'{shown}' has no values", fix=fix)
            if any(not value.strip() or value.split() != value.strip().split(" ") for value in values):
                raise ConfigError(f"'{shown}' has a value that is not plain text on one line", fix=fix)
            if len({value.casefold() for value in values}) < len(values):
                raise ConfigError(f"'{shown}' has a value twice", fix="give each value once: all are equally likely")
        self._values = [tuple(value.strip() for value in values) for values in named.values()]
        self._seed = seed

    @property
    def count(self) -> int:
        """The number of combinations."""
        return math.prod(map(len, self._values))

    def of(self, uid: str, key: str) -> tuple[str, ...]:
        """A sample's group: one value per attribute, in the order given; all combinations are equally likely.

        128 bits are hashed, so that the share of a combination is off by less than count / 2**128.
        """
        digest = hashlib.blake2b(f"{self._seed}\0{uid}\0{key}".encode(), digest_size=16, person=b"builder.groups")
        number = int.from_bytes(digest.digest(), "big")
        chosen = []
        for values in self._values:
            number, place = divmod(number, len(values))
            chosen.append(values[place])
        return tuple(chosen)


def text_of(group: Sequence[str]) -> str:
    """A group as the table and a request have it: the values, with spaces between."""
    return " ".join(group)

"""Pictures of a batch decoded in threads, in blocks of a bounded number of pixels.

Owns the threads. What is made of a decoded picture is its caller's: a detector's frame, a mean, an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from builder.models.pictures import Pixels, decode, pixels_of

#: Pictures with more pixels are halved in decoding until they have at most these. At least 2 million are left, where a
#: face of 1 % of the long side is 16 px wide, and half a minute of work becomes seconds.
MOST_PIXELS = 8_000_000
#: Pixels that are decoded at a time, plus those of the picture that crosses the limit: 96 MB. 32 pictures of 512 px
#: are 8 million.
BLOCK_PIXELS = 32_000_000


class Room(Protocol):
    """Where the decoded pictures of a block go."""

    def put(self, place: int, image: Pixels) -> None:
        """Takes a picture, uint8 (height, width, 3) RGB, into its own place; in any thread. A place may stay empty."""


@dataclass(frozen=True)
class Block:
    """Some pictures of a batch, decoded: those from `start` to `stop` that have bytes.

    Attributes:
        places: which pictures of the batch are in `room`, in order.
        sizes: width and height of each of these, px.
        looked: what `look` returned for each of these.
        errors: why a picture does not decode, by its place in the batch.
    """

    start: int
    stop: int
    places: list[int]
    room: Any
    sizes: list[tuple[int, int]]
    looked: list[Any]
    errors: dict[int, Exception]


class Decoder:
    """Decodes pictures, several at once.

    Args:
        threads: how many; 1 decodes in the caller's thread.
        room: makes room for that many pictures.
        most: most pictures of one block.
        look: what else is computed from every decoded picture; called in threads.
    """

    def __init__(
        self,
        threads: int,
        *,
        room: Callable[[int], Room],
        most: int,
        look: Callable[[Pixels], Any] = lambda image: None,
    ) -> None:
        self._room, self._most, self._look = room, most, look
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def block(self, pictures: Sequence[bytes | None], start: int = 0) -> Block:
        """Decodes the first pictures from `start` on, as many as `BLOCK_PIXELS` hold; in any thread.

        Args:
            pictures: encoded pictures of a batch; None is skipped.
        """
        places: list[int] = []
        errors: dict[int, Exception] = {}
        pixels, stop = 0, start
        while stop < len(pictures) and pixels < BLOCK_PIXELS and len(places) < self._most:
            data, place = pictures[stop], stop
            stop += 1
            if data is None:
                continue
            try:
                pixels += pixels_of(data)
            except ValueError as error:
                errors[place] = error
            else:
                places.append(place)
        room = self._room(len(places))

        def put(at: int) -> tuple[tuple[int, int], Any]:
            data = pictures[places[at]]
            assert data is not None
            try:
                image = decode(data, MOST_PIXELS)
            except ValueError as error:
                errors[places[at]] = error
                return (1, 1), None
            room.put(at, image)
            return (image.shape[1], image.shape[0]), self._look(image)

        each = map if self._pool is None else self._pool.map
        done = list(each(put, range(len(places))))
        return Block(start, stop, places, room, [size for size, _ in done], [looked for _, looked in done], errors)

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()

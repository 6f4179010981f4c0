"""What a face detector is: how it is started, checked and fed, and what a stage has to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from builder.models.decoding import Room

Floats = npt.NDArray[np.float64]


class Detector(Protocol):
    """Finds faces in several pictures."""

    @property
    def most_frames(self) -> int:
        """Pictures that it is given at a time."""

    def frames(self, count: int) -> Room:
        """Room for so many pictures, as it takes them."""

    def detect(self, frames: Any) -> list[tuple[Floats, Floats]]:
        """By place the boxes, (n, 4) in pixels, and their scores, best first; nothing where no picture was put."""


@dataclass(frozen=True)
class DetectorEntry:
    """One value of the option `detector`.

    Attributes:
        start: loads it. It is called with `device`, `name` (whose messages it writes to the log, the stage's) and, by
            their names, the options that `reads` lists.
        check: raises StageError for packages and files that it would miss, and loads nothing. It is called with the
            options that `reads` lists, by their names.
        reads: the options that are its own; every other detector refuses them.
        min_score: `min_score` where the options do not set it.
        batch_rows: pictures of one batch.
        packages: those whose versions decide what it finds.
        ahead: batches that are decoded ahead.
        tolerance: how far the answers for one picture may be apart when the pictures around it change, in shares of its
            sides and in scores.
        takes_device: whether it runs on the device that it is given; else on the CPU.
        notice: what a run says of it once, such as the licence of its models.
    """

    start: Callable[..., Detector]
    check: Callable[..., object]
    reads: frozenset[str]
    min_score: float
    batch_rows: int
    packages: tuple[str, ...]
    ahead: int = 1
    tolerance: float = 0.0
    takes_device: bool = False
    notice: str = ""

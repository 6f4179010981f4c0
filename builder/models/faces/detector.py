"""What a face detector is: how it is started, checked and fed, and what a stage has to know about it."""

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
        """Most pictures that it is given at a time."""

    def frames(self, count: int) -> Room:
        """Room for `count` pictures, in the form that it takes."""

    def detect(self, frames: Any) -> list[tuple[Floats, Floats]]:
        """Per place the boxes, (n, 4) in pixels, and their scores, best first; empty if no picture was put there."""


@dataclass(frozen=True)
class DetectorEntry:
    """One value of the option `detector`.

    Attributes:
        start: loads it. It is called with `device`, `name` (the stage's, for messages in the log) and, by
            their names, the options that `reads` lists.
        check: raises StageError for packages and files that it would miss, and loads nothing. It is called with the
            options that `reads` lists, by their names.
        reads: its own options; every other detector refuses them.
        min_score: `min_score` if the options do not set it.
        batch_rows: pictures of one batch.
        packages: the packages whose versions decide what it finds.
        ahead: batches that are decoded ahead.
        tolerance: how much the answers for one picture may differ when the pictures around it change, in shares of its
            sides and in scores.
        takes_device: whether it runs on the device that it is given; else on the CPU.
        notice: what a run reports about it once, such as the licence of its models.
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

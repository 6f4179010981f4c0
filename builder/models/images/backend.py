"""What makes images of prompts: how it is started, checked and asked, and what a stage has to know about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from builder.models.images.queue import Job, Made


class ImageBackend(Protocol):
    """Makes images of jobs; it is loaded.

    Attributes:
        name: what made an image, as the table has it.
        steps: denoising steps; None if nothing is denoised.
        guidance: guidance scale; None if it has none.
        device_name: what it computes on, as far as that decides the last bits; None without a model.
    """

    name: str
    steps: int | None
    guidance: float | None
    device_name: str | None

    def add(self, jobs: list[Job]) -> list[Job]:
        """Accepts jobs and may begin to make their images; called from any thread."""

    def answers(self, jobs: list[Job]) -> list[Made | Exception]:
        """Waits for jobs that were added; returns for each its image, or why there is none."""

    def take_notes(self) -> list[dict[str, Any]]:
        """What the run's log should keep, since this was last called."""

    def close(self) -> None:
        """Ends the threads and frees the device's memory."""


@dataclass(frozen=True)
class ImageBackendEntry:
    """One value of the option `backend`.

    Attributes:
        start: loads it, for the options of the stage, the sizes that are asked for (width, height, px) and a device.
        check: raises StageError for packages and files that it would miss, and loads nothing.
        gpus: accelerators that one worker uses; with them images are made in batches of the option `batch_size`.
        tolerance: mean absolute difference of pixels, 0..255, up to which two images of one job are the same.
        multiple: the sides of an image are multiples of this, px.
    """

    start: Callable[[Any, Sequence[tuple[int, int]], str], ImageBackend]
    check: Callable[[Any], object]
    gpus: int = 0
    tolerance: float = 0.0
    multiple: int = 1

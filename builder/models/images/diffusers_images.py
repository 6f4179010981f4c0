"""Images by a diffusers pipeline, in batches: the back end `diffusers`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from builder.errors import StageError
from builder.machine import is_of_the_machine, is_out_of_memory
from builder.models.images.backend import ImageBackendEntry
from builder.models.images.diffusion import Diffusion, Unsafe
from builder.models.images.loading import DiffusionOptions, check_installed
from builder.models.images.queue import ImageQueue, Job, Made
from builder.models.pictures import decode, pixel_difference

#: Mean absolute difference of pixels, 0..255, up to which two images are the same. The shape of a batch does not depend
#: on how many of its images are real, so only a library's own noise makes a difference.
SAME_PIXELS = 1.0
#: Sizes of diffusion models are multiples of this: their VAEs shrink each side by it. FLUX needs 16, SANA 32; a size
#: that a model does not make is refused when it is loaded.
MULTIPLE = 8


class BatchOptions(Protocol):
    """Options that are not the pipeline's own."""

    batch_size: int
    quality: int


class DiffusersImages:
    """A pipeline and the queue that fills its batches.

    One batch of each size, the largest first, is made at the start and thrown away.

    Raises:
        StageError: the model cannot be loaded, does not take an option, makes no image of such a size, or another one
            each time.
    """

    def __init__(
        self, options: DiffusionOptions, batches: BatchOptions, sizes: Sequence[tuple[int, int]], device: str
    ) -> None:
        self._options, self._device = options, device
        self.model = Diffusion(options, device)
        self.name: str = self.model.name
        self.steps: int | None = self.model.steps
        self.guidance: float | None = self.model.guidance
        self.device_name: str | None = self.model.device_name
        self._queue = ImageQueue(
            self.model,
            batch_size=batches.batch_size,
            quality=batches.quality,
            is_out_of_memory=is_out_of_memory,
        )
        try:
            self._try(sizes)
        except BaseException:
            self.close()
            raise

    def add(self, jobs: list[Job]) -> list[Job]:
        """Encodes the prompts of jobs and queues them."""
        return self._queue.add(jobs)

    def answers(self, jobs: list[Job]) -> list[Made | Exception]:
        """Waits for jobs that were added; returns for each its image, or why there is none."""
        return self._queue.answers(jobs)

    def take_notes(self) -> list[dict[str, Any]]:
        """Batch sizes that were halved since this was last called."""
        return self._queue.take_notes()

    def close(self) -> None:
        """Ends the threads and frees the device's memory."""
        self._queue.close()
        self.model.free()

    def _try(self, sizes: Sequence[tuple[int, int]]) -> None:
        largest, *others = sorted(set(sizes), key=math.prod, reverse=True)
        before = self.model.common_noise()
        made = self._tried(largest)
        for size in others:
            self._tried(size)
        if self.model.common_noise() == before:
            return
        again = self._tried(largest)
        if made is None or again is None or made.batch_size != again.batch_size:
            return
        if (found := pixels_apart(made.data, again.data)) > SAME_PIXELS:
            raise StageError(
                "the model makes another image of the same prompt and seed each time",
                where={
                    "model": self._options.model, "device": self._device, "difference": f"{found:g}",
                    "tolerance": f"{SAME_PIXELS:g}",
                },
                fix="set another scheduler: the noise of this one does not depend on the seed",
            )  # fmt: skip

    def _tried(self, size: tuple[int, int]) -> Made | None:
        """An image of any prompt; None where the model's own safety checker has blacked it out."""
        where = {"model": self._options.model, "size": f"{size[0]}x{size[1]} px", "device": self._device}
        try:
            [made] = self._queue.answers(self._queue.add([Job("a photo", 0, size)]))
        except Exception as error:
            made = error
        if isinstance(made, StageError):
            raise made
        if isinstance(made, Made):
            return made
        if isinstance(made, Unsafe):
            return None
        if is_of_the_machine(made) and not is_out_of_memory(made):
            raise made
        fix = "set another dtype, size, scheduler or number of steps, as the model's card says"
        if is_out_of_memory(made):
            fix = 'set a smaller size, weights = "fp8", vae_slicing or vae_tiling'
        raise StageError(f"the model makes no image: {type(made).__name__}: {made}", where=where, fix=fix) from made


def pixels_apart(one: bytes, other: bytes) -> float:
    """The mean absolute difference of two encoded pictures, 0..255; 255 if they differ in size."""
    if one == other:
        return 0.0
    found = pixel_difference(decode(one), decode(other))
    return 255.0 if found is None else found[0]


def _start(options: Any, sizes: Sequence[tuple[int, int]], device: str) -> DiffusersImages:
    return DiffusersImages(options, options, sizes, device)


ENTRY = ImageBackendEntry(_start, check_installed, gpus=1, tolerance=SAME_PIXELS, multiple=MULTIPLE)

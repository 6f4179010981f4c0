"""Batches for an image model: filled from later rows, padded if there are none, halved when memory runs out.

Owns the threads between text encoding, denoising and encoding, and the batch size. Three kinds of threads work at the
same time: callers of `add` encode text, one thread makes batches in the order of the rows, a few encode pictures. Knows
only the `Model` protocol of the model.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from builder import formats
from builder.errors import StageError
from builder.models.pictures import Pixels, encode

#: Most threads that encode pictures: one encodes some 1,000 JPEGs of 384 px per second.
ENCODERS = 4


class Model(Protocol):
    """What makes images; see `builder.models.images.diffusion.Diffusion`."""

    def encode(self, prompts: Sequence[str]) -> list[Any]: ...

    def make(
        self, texts: Sequence[Any], seeds: Sequence[int], size: tuple[int, int]
    ) -> Callable[[], tuple[Pixels, list[Exception | None]]]: ...

    def check(self) -> None: ...

    def free(self) -> None: ...


@dataclass(frozen=True)
class Made:
    """One image.

    Attributes:
        data: its bytes, in the format that its job asks for.
        batch_size: images that the model made together with it, padding included; None if each is made alone.
    """

    data: bytes
    batch_size: int | None


@dataclass(eq=False)
class Job:
    """One image to make; `size` is width and height, px, `kind` one of `formats.FORMATS`."""

    prompt: str
    seed: int
    size: tuple[int, int]
    kind: str = formats.JPG
    made: Future[Made] = field(default_factory=Future)
    #: The encoded prompt, and how many were encoded together with it, padding included.
    text: Any = None
    text_batch: int = 0


class ImageQueue:
    """Images of jobs, each made in a batch of exactly `batch_size` of one size.

    A batch is made as soon as it is full. If it is not full, it is padded with copies of its last job, once one of its
    jobs is asked for and no more are being added. Jobs that nobody references any longer are dropped.

    A batch that fails is made again in padded halves until the failing jobs are alone; no other job fails with them.
    Running out of memory halves `batch_size` for good, and `take_notes` reports it. If the device no longer computes,
    the jobs get a StageError that says so.
    """

    def __init__(
        self, model: Model, *, batch_size: int, quality: int, is_out_of_memory: Callable[[BaseException], bool]
    ) -> None:
        self._model, self._quality, self._is_out_of_memory = model, quality, is_out_of_memory
        self.batch_size = batch_size
        self._notes: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._waiting: list[weakref.ref[Job]] = []
        self._asked: frozenset[Job] = frozenset()
        self._adding = 0
        self._closed = False
        self._encoding = threading.Lock()  # tokenizers are not thread-safe
        self._pool = ThreadPoolExecutor(min(ENCODERS, os.cpu_count() or 1), "pictures")
        self._maker = threading.Thread(target=self._work, name="images", daemon=True)
        self._maker.start()

    def add(self, jobs: list[Job]) -> list[Job]:
        """Encodes the prompts of jobs and queues them; for any thread.

        Raises:
            StageError: the device no longer computes.
            Exception: any error of the text encoder; none of these jobs is queued then.
        """
        with self._changed:
            self._adding += 1
        try:
            try:
                self._encode(jobs, self.batch_size)
            except RuntimeError:
                self._model.check()
                raise
            with self._changed:
                self._waiting += [weakref.ref(job) for job in jobs]
        finally:
            with self._changed:
                self._adding -= 1
                self._changed.notify_all()
        return jobs

    def answers(self, jobs: list[Job]) -> list[Made | Exception]:
        """Waits for jobs that were added; returns for each its image, or why there is none."""
        with self._changed:
            self._asked = frozenset(jobs)
            self._changed.notify_all()
        wait([job.made for job in jobs])
        with self._changed:
            self._asked = frozenset()
        found: list[Made | Exception] = []
        for job in jobs:
            error = job.made.exception()
            if error is None:
                found.append(job.made.result())
            elif isinstance(error, Exception):
                found.append(error)
            else:
                raise error
        return found

    def take_notes(self) -> list[dict[str, Any]]:
        """Batch sizes that were halved since this was last called."""
        with self._changed:
            notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Ends the threads; jobs that are queued are not made."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._maker.join()
        self._pool.shutdown()

    # --- the thread that makes batches ---

    def _work(self) -> None:
        while jobs := self._take():
            try:
                self._make(jobs)
            except BaseException as error:  # callers that wait for these must not wait forever
                for job in jobs:
                    if not job.made.done():
                        job.made.set_exception(error)

    def _take(self) -> list[Job]:
        """The jobs of the next batch, in order; none when the queue is closed."""
        with self._changed:
            while not self._closed:
                if jobs := self._next():
                    taken = set(jobs)
                    self._waiting = [job for job in self._waiting if job() is not None and job() not in taken]
                    return jobs
                self._changed.wait()
        return []

    def _next(self) -> list[Job]:
        held = [job for job in (reference() for reference in self._waiting) if job is not None]
        sizes: dict[tuple[int, int], list[Job]] = {}
        for job in held:
            same = sizes.setdefault(job.size, [])
            same.append(job)
        full = [same for same in sizes.values() if len(same) >= self.batch_size]
        if not full and not self._adding:
            full = [sizes[job.size] for job in held if job in self._asked]
        return full[0][: self.batch_size] if full else []

    def _make(self, jobs: list[Job]) -> None:
        """Makes the images of jobs of one size; a batch that fails is made again in parts, until the bad job is alone.

        Another thread may shrink the batch size while prompts are encoded. Jobs then hold texts of another batch size
        than the images', and their last bits would differ. So such texts are encoded again first, and if not all of
        them are of `size` then, the batch starts again with the present size.
        """
        size = self.batch_size
        if len(jobs) > size:
            self._make_apart(jobs, size)
            return
        try:
            if stale := [job for job in jobs if job.text_batch != size]:
                self._encode(stale, size)
            images = None
            if all(job.text_batch == size for job in jobs):
                padded = jobs + [jobs[-1]] * (size - len(jobs))
                images = self._model.make([job.text for job in padded], [job.seed for job in padded], jobs[0].size)
        except Exception as error:
            failure = self._cause(error).with_traceback(None)  # it holds the batch's tensors
            failure.__context__ = None
        else:
            if images is None:  # memory ran out while the prompts were encoded
                self._make(jobs)
                return
            for i, job in enumerate(jobs):
                job.text = None  # frees memory of the device
                self._pool.submit(self._finish, job, images, i, size)
            return
        if isinstance(failure, StageError):
            for job in jobs:
                job.made.set_exception(failure)
        elif self._is_out_of_memory(failure) and size > 1:
            self._halve(size)
            self._make_apart(jobs, self.batch_size)
        elif len(jobs) > 1:
            self._make_apart(jobs, (len(jobs) + 1) // 2)
        else:
            jobs[0].made.set_exception(failure)

    def _cause(self, error: Exception) -> Exception:
        """Why a batch failed: the model's error, or that its device no longer computes."""
        if isinstance(error, RuntimeError) and not self._is_out_of_memory(error):
            try:
                self._model.check()
            except StageError as lost:
                return lost
        return error

    def _make_apart(self, jobs: list[Job], count: int) -> None:
        for i in range(0, len(jobs), count):
            self._make(jobs[i : i + count])

    def _encode(self, jobs: list[Job], size: int) -> None:
        """Encodes prompts in batches of exactly `size`, padded: the last bits depend on it."""
        at = 0
        while at < len(jobs):
            part = jobs[at : at + size]
            prompts = [job.prompt for job in part] + [part[-1].prompt] * (size - len(part))
            try:
                with self._encoding:
                    texts = self._model.encode(prompts)
            except Exception as error:
                if not self._is_out_of_memory(error) or size == 1:
                    raise
                texts = []
            if not texts:
                self._halve(size)
                size = self.batch_size
                continue
            for job, text in zip(part, texts, strict=False):
                job.text, job.text_batch = text, size
            at += len(part)

    def _halve(self, size: int) -> None:
        """Halves the batch size, unless another thread just did."""
        with self._changed:
            if self.batch_size == size:
                self.batch_size = size // 2
                self._notes.append({"note": "out of memory", "batch_size": size, "batch_size_now": self.batch_size})
        gc.collect()
        self._model.free()

    # --- the threads that encode pictures ---

    def _finish(
        self, job: Job, images: Callable[[], tuple[Pixels, list[Exception | None]]], place: int, size: int
    ) -> None:
        try:
            pixels, faults = images()
            if fault := faults[place]:
                raise fault
            job.made.set_result(Made(encode(pixels[place], job.kind, self._quality), size))
        except Exception as error:
            job.made.set_exception(self._cause(error))
        except BaseException as error:
            job.made.set_exception(error)

"""Stages for the tests: one that adds a column, one that fails on some rows, ones that break or die."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
from pydantic import Field

from builder import Resources, Stage, Strict, Value


class Options(Strict):
    """Options of the test stages."""

    #: A file that gets one line `uid` for every row that `process` sees.
    log: str = ""
    #: Keys on which the stage fails or dies.
    bad: list[str] = Field(default_factory=list)
    #: Put before every answer.
    word: str = "seen"
    #: Seconds a batch takes.
    pause_s: float = 0.0


class Base(Stage):
    """Adds `note`: the word and the caption."""

    name = "note"
    version = "1"
    Options = Options
    inputs = pa.schema([("key", pa.string()), ("text", pa.string())])
    outputs = (Value("note", pa.string(), "the word and the caption"),)
    resources = Resources(batch_rows=4)

    def __init__(self, options: Options) -> None:
        self.options = options

    def setup(self, device: str) -> None:
        """Holds nothing."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self.options.log:
            with Path(self.options.log).open("a") as log:
                log.write("".join(f"{uid}\n" for uid in batch.column("uid").to_pylist()))
        if self.options.pause_s:
            time.sleep(self.options.pause_s)
        self.check(batch)
        notes = [f"{self.options.word}: {text}" for text in batch.column("text").to_pylist()]
        return pa.RecordBatch.from_arrays([pa.array(notes, pa.string())], schema=self.schema)

    def check(self, batch: pa.RecordBatch) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Holds nothing."""


class Note(Base):
    """The stage that works."""


class Licensed(Base):
    """Says something before it starts."""

    notice = "its weights are for research only"


class Fails(Base):
    """Raises for the bad keys."""

    def check(self, batch: pa.RecordBatch) -> None:
        for key in batch.column("key").to_pylist():
            if key in self.options.bad:
                raise ValueError(f"cannot note {key}")


def cannot(key: str) -> str:
    """The error of a row on which `Fails` has failed: with file and line."""
    return f"ValueError: cannot note {key} (stages.py:{Fails.check.__code__.co_firstlineno + 3})"


class Dies(Base):
    """Its process is killed in the bad keys, as by a fault in native code."""

    def check(self, batch: pa.RecordBatch) -> None:
        if set(batch.column("key").to_pylist()) & set(self.options.bad):
            os.kill(os.getpid(), signal.SIGKILL)


class Sized(Base):
    """Adds the size of the image, which it reads."""

    members = ("image",)

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        sizes = [str(len(data)) for data in batch.column("image").to_pylist()]
        return pa.RecordBatch.from_arrays([pa.array(sizes, pa.string())], schema=self.schema)


class SizedText(Sized):
    """Adds the size of the txt, which it reads; 0 where there is none."""

    members = ("txt",)

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        sizes = [str(len(data or b"")) for data in batch.column("txt").to_pylist()]
        return pa.RecordBatch.from_arrays([pa.array(sizes, pa.string())], schema=self.schema)


class Short(Base):
    """Breaks its contract: returns one row too few."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return super().process(batch).slice(1)


class Other(Base):
    """A second stage beside the first, with columns of its own."""

    name = "other"
    outputs = (Value("remark", pa.string(), "the word and the caption"),)


class Rival(Base):
    """Wants a column that another stage has."""

    name = "rival"


class NoModel(Base):
    """Cannot start."""

    def setup(self, device: str) -> None:
        from builder.errors import StageError

        raise StageError("there is no model in '/models/none'", fix="name a folder that has one")


class Faulty(Base):
    """Reads from nowhere in the bad keys: a fault in native code, in its own process."""

    def check(self, batch: pa.RecordBatch) -> None:
        if set(batch.column("key").to_pylist()) & set(self.options.bad):
            ctypes.string_at(0)


class DiesAtOnce(Base):
    """Its process is killed before the first row, as where memory is wanting for the model."""

    def setup(self, device: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Strained(Base):
    """Raises what a machine may say, as long as there is a file `strain`: a name of `SAID`, then keys, none for all.

    Every call of `process` is noted in `asked`.
    """

    @staticmethod
    def strain(batch: pa.RecordBatch) -> None:
        path = Path("strain")
        if not path.exists():
            return
        name, *keys = path.read_text().split()
        if not keys or set(batch.column("key").to_pylist()) & set(keys):
            raise SAID[name]()

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        with Path("asked").open("a") as log:
            log.write(" ".join(batch.column("uid").to_pylist()) + "\n")
        self.strain(batch)
        return super().process(batch)


class StrainedAhead(Strained):
    """The same out of `prepare`."""

    def prepare(self, batch: pa.RecordBatch) -> None:
        self.strain(batch)

    def process(self, batch: pa.RecordBatch, prepared: None = None) -> pa.RecordBatch:
        return Base.process(self, batch)


def _wrapped() -> Exception:
    """As a library that has a class of its own for everything."""
    error = ValueError("the file cannot be opened")
    error.__cause__ = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return error


class OutOfMemoryError(RuntimeError):
    """By its name that of torch."""


#: What machines say, by a name for each.
SAID: dict[str, Callable[[], Exception]] = {
    **{
        name: partial(OSError, getattr(errno, name), os.strerror(getattr(errno, name)))
        for name in ("ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT")
    },
    "memory": MemoryError,
    "arrow": lambda: pa.ArrowMemoryError("malloc of size 8 failed"),
    "arrow-number": lambda: pa.ArrowException("Failed to open local file 'a'. Detail: [errno 24] Too many open files"),
    "thread": lambda: RuntimeError("can't start new thread"),
    "cuda": lambda: OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cuda-text": lambda: RuntimeError("CUDA error: out of memory"),
    "wrapped": _wrapped,
}


class Looks(Base):
    """Reads the image and one field: says what it saw."""

    name = "looks"
    inputs = pa.schema([("width", pa.int32())])
    members = ("image",)
    outputs = (Value("seen", pa.string(), "what is to be seen"),)

    def answer(self, width: int, image: bytes) -> str:
        return f"{width}: {hashlib.sha256(image).hexdigest()[:16]}"

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        with Path(self.options.log).open("a") as log:
            log.write("".join(f"{self.name} {uid}\n" for uid in batch.column("uid").to_pylist()))
        columns = [batch.column(name).to_pylist() for name in (*self.inputs.names, *self.members)]
        answers = [self.answer(*row) for row in zip(*columns, strict=True)]
        return pa.RecordBatch.from_arrays([pa.array(answers, pa.string())], schema=self.schema)


class Words(Looks):
    """Reads the caption."""

    name = "words"
    inputs = pa.schema([("text", pa.string())])
    members = ()
    outputs = (Value("words", pa.string(), "the first words of the caption"),)

    def answer(self, text: str) -> str:  # type: ignore[override]
        if text.startswith("bad"):
            raise ValueError("bad words")
        return text[:8].upper()


class After(Looks):
    """Reads what `words` said."""

    name = "after"
    inputs = pa.schema([("words", pa.string())])
    members = ()
    outputs = (Value("echo", pa.string(), "the words again"),)

    def answer(self, words: str) -> str:  # type: ignore[override]
        return f"{words}, {words}"

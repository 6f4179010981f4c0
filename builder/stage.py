"""The Stage protocol, its check, and how a stage is found by name.

Owns the contract between the engine and a stage. Knows no stage and no table.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import orjson
import pyarrow as pa
from pydantic import BaseModel

from builder import schema
from builder.errors import SchemaError, StageError

ENTRY_POINTS = "builder.stages"
#: Binary columns that a stage may ask for: a member of the source sample, or the generated image.
MEMBERS = ("image", "json", "txt", "edit")
#: Columns of every batch.
_ALWAYS_GIVEN = ("shard", "row", "uid")
#: Names of stages and columns: plain enough for SQL without quotes, for TOML without quotes, and for files.
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage needs.

    Attributes:
        cpus: cores.
        gpus: accelerators.
        memory_gb: main memory.
        batch_rows: rows of one `process` call.
        ahead: batches that are read, and prepared, before the one in hand is answered.
        ahead_rows: rows that are, at least, however few a batch has.
    """

    cpus: int = 1
    gpus: int = 0
    memory_gb: float = 2.0
    batch_rows: int = 64
    ahead: int = 1
    ahead_rows: int = 0


class RowsFailed(Exception):
    """Raised by `process` where some rows of a batch have no answer and the others need not be asked again.

    None of them is tried again in this run: a stage that raises it has done so itself where that may help.

    Attributes:
        result: an answer of every row; those of the others are not looked at.
        errors: why, by position in the batch.
        left: positions of rows that are neither answered nor failed: they stay as they are, and the task ends.
        why: what ended it; None where the stage was told to `give_up`.
    """

    def __init__(
        self,
        result: pa.RecordBatch,
        errors: Mapping[int, Exception],
        *,
        left: Collection[int] = (),
        why: StageError | None = None,
    ) -> None:
        super().__init__(f"{len(errors)} of {result.num_rows} rows failed")
        self.result = result
        self.errors = dict(errors)
        self.left = frozenset(left)
        self.why = why


@runtime_checkable
class Stage(Protocol):
    """Code: a batch in, new columns out. Built as `Class(options)`, which loads nothing: plans build it, too.

    A row that the stage cannot answer is told by raising from `process` for a batch of that row alone: the engine
    halves a batch that raises until the bad rows stand alone. Where asking twice is dear, it raises `RowsFailed`. A
    `StageError` from `process` or `prepare` says that no row can be answered any more, as where a GPU is lost: the task
    stops, its checkpoints stay, and no row is marked.

    A stage that can do some of its work ahead, such as decoding, has `prepare` too: see `Preparing`.

    What a stage may have besides:

    - `needs_bytes(batch) -> list[bool]`, where only some rows need bytes: it is given the inputs, and the other rows
      arrive with null in the member columns.
    - `inputs` and `resources` of its own in an instance, where its options decide them.
    - `sql`: the name of its work SQL, where that is not `sql/<name>.sql`.
    - `recorded`: its own columns that hold an input as it was when a row was answered, by input.
    - `as_made(options, row) -> dict`: the options of a run with what a row of it has recorded of them.
    - `batch_option`: its option for how many rows its model takes at once, where these are not the rows of a batch.
    - `params`: values of $names in that SQL, where the pipeline gives none.
    - `lookups`: parquet files that its work SQL may join (`query.Lookup`), by the name of the view.
    - `changes`: what each raised version changed, a sentence by version, the oldest first: `builder plan` tells it of
      the answers of older versions.
    - `tolerance`: how far the answers of a row alone and of the same row in a batch may be apart, by its own
      `difference(alone, within) -> float` or `answering.difference`: it declares itself deterministic so, and is held
      to it.
    - `deciding`: its options in one form, for `options_hash`, where several forms ask for the same answers.
    - `notice`: what a run says of it before it starts, such as a licence.
    - `workers`: set before `setup` to the number of processes that the run has for it, which share what is limited.
    - `give_up()`, where `setup` or `process` waits for something outside: called from another thread when the run is
      stopped, more than once; `process` then raises `RowsFailed` at once, with the rows that are `left`.
    - `totals() -> dict`, what a worker has counted until `close`, as json; `summary(list of these) -> list[str]`, what
      the run says of them at its end.
    - `noting`: its column that says of a row what was not taken as it came: a run tells at its end how many there are.
    - `take_notes() -> list[dict]`: what the run's log should keep beside the answers, since it was last asked.
    """

    #: Its name in `[stages.<name>]` and `sql/<name>.sql`.
    name: ClassVar[str]
    #: Raised when the meaning of an output changes.
    version: ClassVar[str]
    #: A strict pydantic model, filled from the pipeline.
    Options: ClassVar[type[BaseModel]]
    #: What the work SQL returns besides shard, row, uid.
    inputs: ClassVar[pa.Schema]
    #: Bytes it needs, out of `MEMBERS`; they arrive as binary columns of that name.
    members: ClassVar[tuple[str, ...]]
    #: Columns it adds; one of type `schema.GENERATED` holds generated bytes.
    outputs: ClassVar[pa.Schema]
    resources: ClassVar[Resources]

    def setup(self, device: str) -> None:
        """Loads the model, once a worker. What would fail every row is raised here."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Answers a batch: the same rows in the same order, the columns of `outputs`."""

    def close(self) -> None:
        """Frees what `setup` took."""


@runtime_checkable
class Preparing(Stage, Protocol):
    """A stage whose batches are prepared in another thread, while `process` works on the batch before."""

    def prepare(self, batch: pa.RecordBatch) -> Any:
        """What `process` is given beside the batch. Called after `setup`, from another thread than `process`.

        It touches nothing that `process` changes, and releases the interpreter's lock where it takes long. What it
        raises counts as raised by `process`: the batch is halved, and its halves are prepared again. What it returns
        lives beside that of the batch before: a result that may be large is bounded here. If it has a method
        `cancel`, that is called where the batch is not going to be processed.
        """

    def process(self, batch: pa.RecordBatch, prepared: Any = None) -> pa.RecordBatch:
        """As `Stage.process`; `prepared` is what `prepare` returned for this batch."""


def find(name: str, python: str | None = None) -> type[Stage]:
    """The class of a stage: `python` as `file.py:Class`, or the entry point of that name.

    Raises:
        StageError: there is no such stage, file or class, it cannot be loaded, or it breaks the contract.
    """
    if python is not None:
        kind = _from_file(name, python)
    else:
        points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        if name not in points:
            near = difflib.get_close_matches(name, points, 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise StageError(
                f"there is no stage '{name}'",
                fix=f"{hint}stages: {', '.join(sorted(points))}; or name your own in [stages.{name}]: "
                'python = "my_stage.py:MyStage"',
            )
        try:
            kind = points[name].load()
        except (ImportError, AttributeError) as error:
            raise StageError(
                f"stage '{name}' cannot be loaded: {error}", fix=f"install again what brings {points[name].value}"
            ) from error
    _check_class(kind, name)
    found: type[Stage] = kind
    return found


def _from_file(name: str, python: str) -> Any:
    path, colon, attribute = python.rpartition(":")
    if not colon or not Path(path).is_file():
        raise StageError(
            f"stage '{name}': no file '{path or python}'",
            fix='write it as python = "my_stage.py:MyStage", the path from the working directory',
        )
    spec = importlib.util.spec_from_file_location(f"builder_stage_{name}", path)
    if spec is None or spec.loader is None:
        raise StageError(f"stage '{name}': '{path}' is no Python file", fix="name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"'{path}', line {line}" if line else f"'{path}'"
        raise StageError(
            f"stage '{name}': {place} raises {type(error).__name__}: {error}", fix="mend that line"
        ) from error
    if not hasattr(module, attribute):
        classes = [
            key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == spec.name
        ]
        raise StageError(
            f"stage '{name}': '{path}' has no '{attribute}'", fix=f"its classes: {', '.join(classes) or 'none'}"
        )
    return getattr(module, attribute)


def _check_class(kind: Any, name: str) -> None:
    if not _NAME.fullmatch(name) or name == schema.SOURCE:
        raise StageError(
            f"'{name}' cannot be the name of a stage",
            fix="use lower-case letters, digits and _, a letter first; 'source' is ingest's",
        )
    wanted = {
        "name": str, "version": str, "inputs": pa.Schema, "members": tuple, "outputs": pa.Schema,
        "resources": Resources,
    }  # fmt: skip
    for attribute, expected in wanted.items():
        value = getattr(kind, attribute, None)
        if not isinstance(value, expected):
            raise StageError(
                f"stage '{name}': attribute '{attribute}' is {_kind_of(value)}, not {expected.__name__}",
                fix=f"set {attribute} on the class, as builder.stage.Stage shows",
            )
    for method in ("setup", "process", "close"):
        if not callable(getattr(kind, method, None)):
            raise StageError(
                f"stage '{name}' has no method '{method}'", fix=f"write def {method}, as builder.stage.Stage shows"
            )
    if hasattr(kind, "prepare"):
        try:
            inspect.signature(kind.process).bind("self", "batch", "prepared")
        except TypeError:
            raise StageError(
                f"stage '{name}' has 'prepare', but its 'process' does not take what it returns",
                fix="write def process(self, batch, prepared=None), as builder.stage.Preparing shows",
            ) from None
    if not (isinstance(getattr(kind, "Options", None), type) and issubclass(kind.Options, BaseModel)):
        raise StageError(f"stage '{name}': Options is no pydantic model", fix="class Options(builder.Strict): ...")
    if kind.name != name:
        raise StageError(
            f"stage '{name}' calls itself '{kind.name}'", fix=f"write [stages.{kind.name}] in the pipeline"
        )
    unknown = [member for member in kind.members if member not in MEMBERS]
    if unknown:
        raise StageError(f"stage '{name}' asks for member '{unknown[0]}'", fix=f"valid: {', '.join(MEMBERS)}")
    _check_names(kind, name)


def _check_names(kind: Any, name: str) -> None:
    """Inputs and outputs: plain names, each once, of types that the table can hold."""
    given = [*_ALWAYS_GIVEN, *kind.members, *kind.inputs.names]
    own = [column.name for column in schema.output_columns(name, kind.outputs)]
    for names, what in ((given, "is given"), (own, "returns")):
        double = next((column for i, column in enumerate(names) if column in names[:i]), None)
        if double is not None:
            raise StageError(f"stage '{name}' {what} two columns '{double}'", fix="give each a name of its own")
    for column in (*kind.inputs.names, *kind.outputs.names):
        if not _NAME.fullmatch(column):
            raise StageError(
                f"stage '{name}': '{column}' cannot be the name of a column",
                fix="use lower-case letters, digits and _, a letter first",
            )
    for field in (*kind.inputs, *kind.outputs):
        if field.type == schema.GENERATED and field.name in kind.outputs.names:
            continue
        try:
            schema.type_text(field.type)
        except SchemaError as error:
            raise StageError(f"stage '{name}', column '{field.name}': {error.what}", fix=error.fix) from None


def _kind_of(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def with_built_in(columns: Iterable[schema.Column]) -> tuple[schema.Column, ...]:
    """Columns of a root, and those of the stages that come with builder: they read as nulls where no such stage ran."""
    have = tuple(columns)
    names = {column.name for column in have}
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    own = sorted(point.name for point in points if point.value.startswith("builder.stages."))
    return (*have, *(column for name in own for column in columns_of(find(name)) if column.name not in names))


def columns_of(stage: Stage | type[Stage]) -> tuple[schema.Column, ...]:
    """The columns that a stage adds to the table."""
    return schema.output_columns(stage.name, stage.outputs)


def pointers_of(columns: Iterable[schema.Column]) -> dict[str, list[str]]:
    """For each stage of a root its columns that name edits tars: those with offset, size and sha256 beside them."""
    names = {column.name for column in columns}
    found: dict[str, list[str]] = {}
    for column in columns:
        base = column.name.removesuffix("_path")
        if base != column.name and {f"{base}_offset", f"{base}_size", f"{base}_sha256"} <= names:
            found.setdefault(column.stage, []).append(column.name)
    return found


def options_hash(stage: Stage, options: BaseModel) -> str:
    """16 hex digits over a stage's name, version, inputs, outputs and the options that decide its result.

    An option whose field says `json_schema_extra={"decides": False}` (a timeout, a thread count) is left out, in models
    within models too; of a list with `{"decides": "as a set"}` neither order nor repetition counts. An output that is
    made with `decides=False` is left out, too. Where the stage has `deciding`, these are the options.
    """
    outputs = [field for field in stage.outputs if b"decides" not in (field.metadata or {})]
    columns = [[(field.name, str(field.type)) for field in side] for side in (stage.inputs, outputs)]
    decide = _deciding(getattr(stage, "deciding", options))
    text = json.dumps([stage.name, stage.version, columns, decide], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _deciding(value: Any, dumped: Any = None) -> Any:
    """An option's value as json, less what decides nothing."""
    if isinstance(value, BaseModel):
        dumped, found = value.model_dump(mode="json"), {}
        for name, field in type(value).model_fields.items():
            decides = (field.json_schema_extra or {}).get("decides", True)  # type: ignore[union-attr]
            if decides and name in dumped:
                found[name] = _deciding(getattr(value, name), dumped[name])
            if decides == "as a set" and found[name] is not None:
                found[name] = sorted({json.dumps(item, sort_keys=True) for item in found[name]})
        return found
    if isinstance(value, list | tuple):
        return [_deciding(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {name: _deciding(value[key], dumped[name]) for key, name in zip(value, dumped, strict=True)}
    return dumped


def inputs_hashes(signature: str, columns: Sequence[Sequence[Any]]) -> pa.UInt64Array:
    """`<stage>_inputs` of rows: 64 bits over the signature and each row's inputs, given as columns."""
    copy = hashlib.blake2b(signature.encode(), digest_size=8).copy
    digests = []
    for row in zip(*columns, strict=True):
        digest = copy()
        digest.update(orjson.dumps(row, default=str))
        digests.append(digest.digest())
    return pa.array(np.frombuffer(b"".join(digests), ">u8").astype(np.uint64))


def answered(outputs: pa.Schema, rows: Sequence[Sequence[Any]], errors: Mapping[int, Exception]) -> pa.RecordBatch:
    """A stage's answer, of one tuple a row in the order of its outputs.

    Raises:
        RowsFailed: there are errors; what stands in their rows is not looked at.
    """
    columns = zip(*rows, strict=True)
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, outputs, strict=True)]
    result = pa.RecordBatch.from_arrays(arrays, schema=outputs)
    if errors:
        raise RowsFailed(result, errors)
    return result


def check_result(kind: type[Stage], batch: pa.RecordBatch, result: Any) -> pa.RecordBatch:
    """Holds a result of `process` to the contract.

    Raises:
        StageError: another type, row count or schema than declared; both sides are shown.
    """
    name = kind.name
    if not isinstance(result, pa.RecordBatch):
        hint = ": did you forget the return statement?" if result is None else ""
        raise StageError(
            f"stage '{name}' returned {type(result).__name__}, not a RecordBatch{hint}",
            fix="return pa.RecordBatch.from_pydict({...}, schema=self.outputs)",
        )
    if result.num_rows != batch.num_rows:
        raise StageError(
            f"stage '{name}' returned {result.num_rows} rows for a batch of {batch.num_rows}",
            fix="return one row for each row of the batch, in the same order",
        )
    found = {output.name: output.type for output in result.schema}
    wanted = {output.name: output.type for output in kind.outputs}
    if found != wanted or len(result.schema) != len(found):
        raise StageError(
            f"stage '{name}' returned other columns than it declares",
            where={"declared": _listed(wanted), "returned": _listed(found)},
            fix="return pa.RecordBatch.from_pydict({...}, schema=self.outputs)",
        )
    return result.select(list(wanted))


def _listed(columns: dict[str, pa.DataType]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns.items()) or "none"

"""Finds the class of a stage by its name or in a file, checks it, and adapts plain classes to the contract."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from builder import machine
from builder.errors import BuilderError, SchemaError, StageError
from builder.stages.contract import MEMBERS, Preparing, Resources, Stage, columns_of, formats_asked, outputs_of
from builder.table import schema
from builder.table.outputs import Bytes, Output, output_columns

ENTRY_POINTS = "builder.stages"
#: Similarity by `difflib` from which a name counts as a misspelt member.
_NEAR = 0.82
#: In Python's message, the argument that a function does not have.
_UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
#: Columns of every batch.
_ALWAYS_GIVEN = ("shard", "row", "uid")
#: Where builder's own stages lie.
_BUILT_IN = "builder.stages."
_PACKAGE = Path(__file__).parents[1]


def find(name: str, python: str | None = None) -> type[Stage]:
    """The class of a stage: `python` as `file.py:Class`, or the entry point of that name.

    Raises:
        StageError: there is no such stage, file or class, it cannot be loaded, or it breaks the contract.
        BuilderError: the stage's file raised it.
    """
    if python is not None:
        kind = _from_file(name, python)
    else:
        points = _installed()
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
            if machine.is_of_the_machine(error):
                raise machine.explained(error) from error
            raise StageError(
                f"stage '{name}' cannot be loaded: {error}", fix=f"reinstall the package of {points[name].value}"
            ) from error
    return _checked(kind, name)


@cache
def _installed() -> dict[str, importlib.metadata.EntryPoint]:
    """The stages of installed packages by name; finding them reads a file of every package."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


@cache
def built_in() -> dict[str, type[Stage]]:
    """The stages that come with builder, by name, in the order of their names."""
    own = sorted(name for name, point in _installed().items() if point.value.startswith(_BUILT_IN))
    return {name: find(name) for name in own}


def _from_file(name: str, python: str) -> Any:
    path, colon, attribute = python.rpartition(":")
    if not colon or not Path(path).is_file():
        raise StageError(
            f"stage '{name}': no file '{path or python}'",
            fix='write it as python = "my_stage.py:MyStage", the path from the working directory',
        )
    spec = importlib.util.spec_from_file_location(f"builder_stage_{name}", path)
    if spec is None or spec.loader is None:
        raise StageError(f"stage '{name}': '{path}' is not a Python file", fix="name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BuilderError:
        raise
    except (Exception, SystemExit) as error:
        if machine.is_of_the_machine(error):
            raise machine.explained(error) from error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = lines[-1] if lines else None
        if isinstance(error, SyntaxError):
            line = error.lineno
        place = f"'{path}', line {line}" if line else f"'{path}'"
        unknown = _UNKNOWN.search(str(error)) if isinstance(error, TypeError) else None
        raise StageError(
            f"stage '{name}': {place} raises {type(error).__name__}: {error}",
            fix=f"remove {unknown[1]} from that line" if unknown else "correct that line",
        ) from error
    if not hasattr(module, attribute):
        classes = [
            key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == spec.name
        ]
        fix = f"name one of its classes: {', '.join(classes)}" if classes else f"write class {attribute}(builder.Stage)"
        raise StageError(f"stage '{name}': '{path}' has no '{attribute}'", fix=fix)
    return getattr(module, attribute)


def place_in(kind: type[Stage], error: BaseException) -> str:
    """`file.py:line` of the innermost line of a stage's own files that an error came through, or empty.

    It is empty for stages of this package: their errors are said in words.
    """
    functions = (value for base in kind.__mro__ for value in vars(base).values())
    names = {value.__code__.co_filename for value in functions if isinstance(value, types.FunctionType)}
    own = {name for name in names if not Path(name).is_relative_to(_PACKAGE)}
    found = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [(name, line) for name, line in found if name in own]
    return f"{Path(places[-1][0]).name}:{places[-1][1]}" if places else ""


@contextmanager
def own_code(kind: type[Stage], name: str) -> Iterator[None]:
    """Runs code of a stage that answers no rows: what it raises becomes a StageError that names the line.

    Errors of the system, and those that already say what to do, pass unchanged.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = place_in(kind, error)
        if not place or isinstance(error, BuilderError | OSError) or machine.is_of_the_machine(error):
            raise
        raise StageError(
            f"stage '{name}': {place} raises {type(error).__name__}: {error}", fix="correct that line"
        ) from error


class _Plain:
    """Ends the chain of `super()` in a plain class, as `object` does there."""

    def __init__(self) -> None:
        """Takes no options: a plain class has an `__init__` of its own."""


def _adapted(kind: type[Any]) -> type[Stage]:
    """The class of a stage as the engine uses it: derived from `Stage`, and from `Preparing` where it has `prepare`.

    A plain class gets the members that it lacks; its own members come first.
    """
    wanted = Preparing if hasattr(kind, "prepare") else Stage
    if issubclass(kind, wanted):
        return kind
    bases = (kind, wanted) if issubclass(kind, Stage) else (kind, _Plain, wanted)
    found: type[Stage] = types.new_class(kind.__name__, bases)
    found.__module__, found.__doc__ = kind.__module__, kind.__doc__
    return found


def _checked(kind: Any, name: str) -> type[Stage]:
    """The class of a stage as the engine uses it, after it is checked.

    Raises:
        StageError: it breaks the contract.
    """
    if not schema.NAME.fullmatch(name) or name == schema.SOURCE:
        raise StageError(
            f"'{name}' cannot be the name of a stage",
            fix="use lower-case letters, digits and _, a letter first; 'source' is ingest's",
        )
    _check_spelling(kind, name)
    expected = {
        "name": str, "version": str, "inputs": pa.Schema, "members": tuple, "outputs": pa.Schema | tuple | list,
        "resources": Resources,
    }  # fmt: skip
    for attribute, accepted in expected.items():
        value = getattr(kind, attribute, None)
        if not isinstance(value, accepted):
            what = "missing" if value is None else type(value).__name__
            known = accepted.__name__ if isinstance(accepted, type) else "a tuple of builder.Value and builder.Bytes"
            raise StageError(
                f"stage '{name}': attribute '{attribute}' is {what}, not {known}",
                fix=f"set {attribute} on the class, as builder.stages.contract.Stage shows",
            )
    for method in ("setup", "process", "close"):
        if not callable(getattr(kind, method, None)) or getattr(kind, method) is Stage.process:
            raise StageError(
                f"stage '{name}' has no method '{method}'",
                fix=f"write def {method}, as builder.stages.contract.Stage shows",
            )
    if hasattr(kind, "prepare"):
        try:
            inspect.signature(kind.process).bind("self", "batch", "prepared")
        except TypeError:
            raise StageError(
                f"stage '{name}' has 'prepare', but its 'process' does not take what it returns",
                fix="write def process(self, batch, prepared=None), as builder.stages.contract.Preparing shows",
            ) from None
    if not (isinstance(getattr(kind, "Options", None), type) and issubclass(kind.Options, BaseModel)):
        raise StageError(f"stage '{name}': Options is not a pydantic model", fix="class Options(builder.Strict): ...")
    if kind.name != name:
        raise StageError(
            f"stage '{name}' calls itself '{kind.name}'", fix=f"write [stages.{kind.name}] in the pipeline"
        )
    unknown = [member for member in kind.members if member not in MEMBERS]
    if unknown:
        raise StageError(f"stage '{name}' asks for member '{unknown[0]}'", fix=f"valid: {', '.join(MEMBERS)}")
    adapted = _adapted(kind)
    _check_names(adapted, name)
    return adapted


def _check_spelling(kind: type[Any], name: str) -> None:
    """Refuses an attribute or method whose name is nearly that of a member of the contract that the class leaves out.

    A member that is misspelt would have no effect, and nothing else would say so.
    """
    known = {member for member in (*vars(Preparing), *vars(Stage), *Stage.__annotations__) if member[0] != "_"}
    own = {key for base in kind.__mro__ if base not in (Stage, Preparing, object) for key in vars(base)}
    left_out = known - own
    for key in sorted(own - known):
        near = difflib.get_close_matches(key, left_out, 1, _NEAR)
        if near and not key.startswith("_"):
            raise StageError(
                f"stage '{name}' has '{key}', which is not a member of a stage",
                fix=f"did you mean '{near[0]}'? Otherwise give it a name that starts with _",
            )


def _check_names(kind: type[Stage], name: str) -> None:
    """Inputs and outputs: plain names, each once, of types that the table can hold."""
    for one in kind.outputs:
        if not isinstance(one, Output | pa.Field):
            raise StageError(
                f"stage '{name}' has an output that is {type(one).__name__}",
                fix='write outputs = (builder.Value("name", pa.string(), "what it means"),)',
            )
    outputs = {output.name: output for output in outputs_of(kind)}
    for named in kind.as_source:
        if not isinstance(outputs.get(named), Bytes):
            raise StageError(
                f"stage '{name}': as_source names '{named}', which is not an output of generated bytes",
                fix="name outputs that are builder.Bytes",
            )
    given = [*_ALWAYS_GIVEN, *kind.members, *kind.inputs.names, *formats_asked(kind)]
    own = [column.name for column in output_columns(name, kind.outputs)]
    for names, what in ((given, "is given"), (own, "returns")):
        double = next((column for i, column in enumerate(names) if column in names[:i]), None)
        if double is not None:
            raise StageError(f"stage '{name}' {what} two columns '{double}'", fix="give each a name of its own")
    for column in (*kind.inputs.names, *(output.name for output in outputs_of(kind))):
        if not schema.NAME.fullmatch(column):
            raise StageError(
                f"stage '{name}': '{column}' cannot be the name of a column",
                fix="use lower-case letters, digits and _, a letter first",
            )
    for field in (*kind.inputs, *(output for output in outputs_of(kind) if not isinstance(output, Bytes))):
        try:
            schema.type_text(field.type)
        except SchemaError as error:
            raise StageError(f"stage '{name}', column '{field.name}': {error.what}", fix=error.fix) from None


def with_built_in(columns: Iterable[schema.Column]) -> tuple[schema.Column, ...]:
    """Columns of a root, and those of the stages that come with builder: they read as nulls where no such stage ran."""
    have = tuple(columns)
    names = {schema.folded(column.name) for column in have}
    new = (column for kind in built_in().values() for column in columns_of(kind))
    return (*have, *(column for column in new if column.name not in names))


def with_unread(columns: Iterable[schema.Column], stage: Stage, params: Mapping[str, Any]) -> tuple[schema.Column, ...]:
    """Columns of a root, and those that a stage's work SQL names without looking at them: see `Stage.unread`."""
    have = tuple(columns)
    names = stage.unread(params)
    return (*have, *(column for column in with_built_in(have)[len(have) :] if column.name in names))


def packages() -> set[str]:
    """The packages whose versions decide what the stages that come with builder answer."""
    return {package for kind in built_in().values() for package in kind.packages}

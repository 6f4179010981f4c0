"""Pipelines: TOML files into strict models, every problem at once, each with its line.

Owns what a pipeline file may say. Knows the shape of `[stages.<name>]` but not the options of any stage: whoever knows
the stage checks them with `check` and the same `Problems`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from builder import machine
from builder.errors import ConfigError, SchemaError
from builder.store import layout
from builder.table import schema

#: Executors that this version carries.
EXECUTORS = ("local",)
Param = str | int | float | bool | list[str] | list[int] | list[float]


class Strict(BaseModel):
    """A model that refuses unknown keys and does not turn one type into another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _local(name: str) -> str:
    try:
        return layout.local(name)
    except ConfigError as error:
        raise ValueError(f"{error.what}\n{error.fix}") from None


#: A path of this machine, `~` expanded.
LocalPath = Annotated[str, AfterValidator(_local)]


class FieldSpec(Strict):
    """A json field with a type of its own: an entry `{name = ..., type = ...}` of `dataset.fields`."""

    #: The field's name in the json.
    name: str
    #: `string`, `bool`, `int32`, `int64`, `float64`, `list<TYPE>`, `struct<name: TYPE, ...>` and so on.
    type: str
    #: Its column in the table, where its own name is not free.
    column: str | None = Field(default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")


class Dataset(Strict):
    """What goes in and where the table lies."""

    #: Name of the dataset, for people.
    name: str = "dataset"
    #: Tar shards: a path or a list of paths, with braces `{000..335}` and globs, from the working directory.
    shards: str | list[str]
    #: Folder of the table, the edits and the hybrid shards.
    root: LocalPath
    #: json fields carried into the table; others than DataComp's and img2dataset's are text unless {name, type}.
    fields: list[str | FieldSpec] = []
    #: The json field that holds precomputed face boxes.
    boxes: str = "face_bboxes"


class Run(Strict):
    """How work is executed; `[run]` for all stages, `[stages.<name>.run]` for one."""

    #: Where tasks run; this version has `local` only.
    executor: Literal["local", "slurm", "ray"] = "local"
    #: Worker processes; one a device for a stage that takes a GPU, or whose own section names devices, and not this.
    workers: int = Field(default=2, ge=1)
    #: Most rows that a task answers without committing them: what a kill costs.
    checkpoint_rows: int = Field(default=2048, ge=1)
    #: Seconds after which a task commits.
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    #: Share of failed rows past which a task stops, judged after 100 rows.
    max_failed: float = Field(default=0.5, ge=0, le=1)
    #: Rows of one batch; the stage's own number if absent.
    batch_rows: int | None = Field(default=None, ge=1)
    #: Devices, one a worker in turn.
    devices: list[str] = Field(default=["cpu"], min_length=1)


class StageTable(BaseModel):
    """`[stages.<name>]`: keys that every stage has; the others are the stage's options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    #: A stage of one's own, `file.py:Class`.
    python: LocalPath | None = None
    #: The work SQL; `sql/<name>.sql` if absent.
    sql: LocalPath | None = None
    #: Values of the $names in the work SQL.
    params: dict[str, Param] = {}
    #: Keys of `[run]` that differ for this stage.
    run: dict[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Write(Strict):
    """What the writer does."""

    #: SQL that returns the samples which differ from the source.
    select: LocalPath = "sql/write.sql"
    #: Values of the $names in that SQL.
    params: dict[str, Param] = {}
    #: Format of new pictures. source: that of the picture that is replaced. jpg: always jpg, and a png or webp that is
    #: replaced becomes a .jpg, which readers that look for one kind of picture lose.
    image: Literal["source", "jpg"] = "source"
    #: Of a sample with several pictures, what becomes of those that a new one does not replace: keep or drop. Absent:
    #: such a sample is not edited.
    other_pictures: Literal["keep", "drop"] | None = None
    #: Whether an edited sample without a json gets one. Without it, how the sample was made is in the manifest.
    gives_json: bool = Field(default=False, alias="json")
    #: Folder of the hybrid shards, on another disk too; `shards` in `dataset.root` if absent.
    folder: str | None = Field(default=None, min_length=1)


#: A key inside a pipeline: names of sections and keys, and positions in lists.
Keys = tuple[str | int, ...]


@dataclass
class Problems:
    """What is wrong with one pipeline file, collected so that all of it is told at once.

    Attributes:
        sets: overrides, whose keys have no line in the file.
    """

    path: str
    text: str = ""
    sets: tuple[str, ...] = ()
    found: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, keys: Keys, message: str) -> None:
        """Notes one problem; the message's second line says how to fix it."""
        line = line_of(self.text, tuple(key for key in keys if isinstance(key, str)))
        place = f"{self.path}:{line}" if line else self.path
        for item in self.sets:
            name = item.partition("=")[0].strip().split(".")
            shared = min(len(name), len(keys)) if line == 0 else len(name)
            if name[:shared] == [str(key) for key in keys[:shared]]:
                line, place = 0, f"--set {item}"
        self.found.append((line, place, message))

    def raise_any(self) -> None:
        """Raises ConfigError if there is any problem."""
        if not self.found:
            return
        ordered = sorted(dict.fromkeys(self.found))
        if len(ordered) == 1:
            _, place, message = ordered[0]
            what, _, fix = message.partition("\n")
            raise ConfigError(what, where={"file": place}, fix=fix or "edit that line")
        text = [f"{len(ordered)} problems in the pipeline"]
        for _, place, message in ordered:
            what, _, fix = message.partition("\n")
            text.append(f"  {place}: {what}")
            if fix:
                text.append(f"    fix: {fix}")
        raise ConfigError("\n".join(text), fix="mend these and run the same command again")


@dataclass(frozen=True)
class Config:
    """A pipeline: the file's sections, and what was overridden.

    Attributes:
        path: the file it was read from.
        sets: the overrides as they were given.
    """

    path: str
    dataset: Dataset
    run: Run
    stages: dict[str, StageTable]
    write: Write
    problems: Problems
    sets: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return Path(self.dataset.root)

    @property
    def output(self) -> Path | None:
        """Where hybrid shards go, if not below the root."""
        return None if self.write.folder is None else Path(self.write.folder)

    @property
    def patterns(self) -> list[str]:
        return [self.dataset.shards] if isinstance(self.dataset.shards, str) else list(self.dataset.shards)


def load(path: Path, sets: tuple[str, ...] = ()) -> Config:
    """Reads a pipeline file.

    What is wrong with its form is kept in `Config.problems`, for the stages' own to join them: the caller raises them
    all, and uses nothing of the config before.

    Args:
        sets: overrides `dotted.key=value`, the value as TOML or else as text.

    Raises:
        ConfigError: no such file, or no TOML.
    """
    text = _read(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _no_toml(path, error) from None
    for item in sets:
        _set(data, item)
    problems = Problems(str(path), text, sets)
    valid = ("dataset", "run", "stages", "write")
    for name in data:
        if name not in valid:
            problems.add((name,), f"unknown section [{name}]\n{_hint(name, valid)}")
    if "dataset" not in data:
        problems.add(
            ("dataset",), 'missing section [dataset]\nadd it, with shards = "data/*.tar" and root = "out/mine"'
        )
    dataset = _section(Dataset, data, ("dataset",), problems, shards=[], root="")
    run = _section(Run, data, ("run",), problems)
    if run.executor not in EXECUTORS:
        problems.add(("run", "executor"), _no_executor(run.executor))
    stages = _table(data, ("stages",), problems)
    tables = {name: _section(StageTable, stages, ("stages", name), problems) for name in stages}
    return Config(str(path), dataset, run, tables, _section(Write, data, ("write",), problems), problems, sets)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no pipeline file '{path}'", fix="name one that exists, or start with: builder init DIR"
        ) from None
    except OSError as error:
        if machine.is_of_the_machine(error):
            raise
        raise ConfigError(
            f"the pipeline cannot be read: {error.strerror}", where={"file": path}, fix="name a file that can be read"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the pipeline is not UTF-8 text", where={"file": path, "byte": error.start}, fix="save it as UTF-8"
        ) from None


def _no_toml(path: Path, error: tomllib.TOMLDecodeError) -> ConfigError:
    what, _, place = str(error).removesuffix(")").partition(" (at ")
    line = re.match(r"line (\d+), column (\d+)$", place)
    where = {"file": f"{path}:{line[1]}", "column": line[2]} if line else {"file": path, "at": place}
    return ConfigError(f"the pipeline is not TOML: {what[0].lower()}{what[1:]}", where=where, fix="edit that line")


def _table(data: dict[str, Any], keys: Keys, problems: Problems) -> dict[str, Any]:
    """The section at the last of `keys`; empty if there is none."""
    value = data.get(str(keys[-1]), {})
    if isinstance(value, dict):
        return value
    name, place = _named(keys)
    section = ".".join(map(str, keys))
    problems.add(keys, f"'{name}'{place} is {value!r}, not a section\nwrite [{section}]")
    return {}


def find_pipeline(scale: str | None, pipeline: str | None) -> Path:
    """The file of `--pipeline FILE` or `--scale NAME`: `./pipelines/NAME.toml` first, then as installed."""
    if pipeline is not None:
        return Path(layout.local(pipeline))
    name = scale or "small"
    path, places = layout.find("pipelines", f"{name}.toml")
    if path is None:
        raise ConfigError(
            f"no pipeline for scale '{name}'",
            where={"looked at": ", ".join(str(place) for place in places)},
            fix="use --scale small or large, or name a file with --pipeline FILE",
        )
    return path


def run_of(config: Config, stage: str) -> Run:
    """`[run]` with what `[stages.<name>.run]` overrides."""
    own = dict(config.stages[stage].run)
    if isinstance(own.get("devices"), list) and own["devices"]:
        own.setdefault("workers", len(own["devices"]))
    keys = ("stages", stage, "run")
    merged = _section(Run, {"run": {**config.run.model_dump(), **own}}, keys, config.problems)
    if "executor" in own and merged.executor not in EXECUTORS:
        config.problems.add((*keys, "executor"), _no_executor(merged.executor))
    return merged


def _no_executor(name: str) -> str:
    return f"executor '{name}' is not part of this version\nuse: executor = \"local\""


def fields_of(dataset: Dataset, problems: Problems) -> tuple[dict[str, Any], dict[str, str]]:
    """json fields with their Arrow types, and the columns of those for which one is named."""
    fields: dict[str, Any] = {}
    named: dict[str, str] = {}
    for item in dataset.fields:
        spec = item if isinstance(item, FieldSpec) else FieldSpec(name=item, type="")
        try:
            kind = schema.parse_type(spec.type) if spec.type else schema.FIELD_TYPES.get(spec.name, schema.TEXT)
            if spec.column:
                named[spec.name] = spec.column
            fields[spec.name] = kind
        except SchemaError as error:
            problems.add(("dataset", "fields"), f"field '{spec.name}': {error.what}\n{error.fix}")
    try:
        schema.field_columns(fields, named)
    except SchemaError as error:
        problems.add(("dataset", "fields"), f"{error.what}\n{error.fix}")
    return fields, named


Model = TypeVar("Model", bound=BaseModel)


def check(model: type[Model], data: dict[str, Any], keys: Keys, problems: Problems) -> Model | None:
    """Fills a strict model; what does not fit is added to the problems, unknown keys with a suggestion.

    Args:
        keys: where `data` stands in the pipeline.
    """
    filled, errors = _filled(model, data)
    for location, items in errors.items():
        problems.add(keys + location, _problem(model, keys, location, items))
    return filled


def _section(model: type[Model], data: dict[str, Any], keys: Keys, problems: Problems, **stand_ins: Any) -> Model:
    """The section at the last of `keys`; what does not fit is left out after it was told, so that others are checked.

    Args:
        stand_ins: values of required keys that are missing or do not fit.
    """
    table = _table(data, keys, problems)
    is_given = str(keys[-1]) in data
    filled = check(model, table, keys, problems) if is_given else None
    if filled is not None:
        return filled
    bad = {location[0] for location in _filled(model, table)[1]}
    return model.model_validate({**stand_ins, **{name: value for name, value in table.items() if name not in bad}})


def _filled(model: type[Model], data: dict[str, Any]) -> tuple[Model | None, dict[Keys, list[Any]]]:
    """The model, or what does not fit by its key; of a union's branches those that came furthest into the value."""
    try:
        return model.model_validate(data), {}
    except pydantic.ValidationError as error:
        found: dict[Keys, list[Any]] = {}
        for item in error.errors():
            found.setdefault(_location(data, item), []).append(item)
    furthest = {
        keys: items
        for keys, items in found.items()
        if not any(other != keys and other[: len(keys)] == keys for other in found)
    }
    return None, furthest


def _location(data: Any, item: Any) -> Keys:
    """Where in `data` an error is, without the names of a union's branches that pydantic puts between."""
    *parts, last = item["loc"]
    location: list[str | int] = []
    for part in (*parts, last):
        is_there = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if is_there:
            data = data[part]
        if is_there or (item["type"] == "missing" and part is last):
            location.append(part)
    return tuple(location)


#: What a required key may look like.
_EXAMPLES = {
    "shards": 'shards = "data/*.tar"',
    "root": 'root = "out/mine"',
    "name": 'name = "license"',
    "type": 'type = "string"',
}


def _problem(model: type[BaseModel], keys: Keys, location: Keys, items: list[Any]) -> str:
    """One problem as text: what it is, and on a second line how to fix it."""
    name, place = _named(keys + location)
    kind, value = items[0]["type"], items[0]["input"]
    if kind == "missing":
        return f"missing key '{name}'{place}\nadd it, for example: {_EXAMPLES.get(name, name + ' = ...')}"
    if kind == "extra_forbidden":
        return f"unknown key '{name}'{place}\n{_hint(name, _valid_keys(model, keys, location))}"
    shown = f"'{name}'{place} is {value!r}"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", items[0]["ctx"]["expected"])
        return f"{shown}\n{_hint(str(value), valid)}"
    if kind in ("model_type", "dict_type"):
        return f"{shown}, not a section\nwrite [{'.'.join(map(str, keys + location))}]"
    if kind == "value_error" and "\n" in items[0]["msg"]:  # a validator of ours, with its fix
        what, _, fix = items[0]["msg"].removeprefix("Value error, ").partition("\n")
        return f"'{name}'{place}: {what}\n{fix}"
    wanted = list(dict.fromkeys(_told(item["msg"]) for item in items))
    text = " or ".join(wanted).replace(" or should be ", " or ")
    return f"{shown}: it {text}\n{_example(model, location, kind, value)}"


def _told(message: str) -> str:
    """What pydantic says of a value, as the end of a sentence about it."""
    message = re.sub("a valid dictionary or instance of FieldSpec", "{name = ..., type = ...}", message)
    should = re.match(r"(?:Input|List|String|Value) (should .*?)(?: after validation.*)?$", message)
    return should[1] if should else f"is refused: {message.removeprefix('Value error, ')}"


def _hint(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, valid, 1)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(sorted(valid))}"


def _named(keys: Keys) -> tuple[str, str]:
    """A key as `name` or `name[2]`, and ` in [section]`."""
    at = len(keys) - 1
    while isinstance(keys[at], int) and at > 0:
        at -= 1
    name = str(keys[at]) + "".join(f"[{key}]" for key in keys[at + 1 :])
    section = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys[:at]).lstrip(".")
    return name, f" in [{section}]" if section else ""


def _example(model: type[BaseModel], location: Keys, kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, int | float):
        return f'write it in quotes: "{value}"'
    info = keys_of(model).get(str(location[0])) if len(location) == 1 else None
    default = None if info is None or info.is_required() else info.get_default(call_default_factory=True)
    if isinstance(default, bool | int | float | str | list):
        return f"for example: {location[0]} = {json.dumps(default)}"
    return "change its value"


def _valid_keys(model: type[BaseModel], keys: Keys, location: Keys) -> list[str]:
    current: type[BaseModel] | None = model
    for part in location[:-1]:
        if current is not None and isinstance(part, str):
            info = keys_of(current).get(part)
            current = _model_in(info.annotation) if info else None
    names = list(keys_of(current)) if current else []
    is_stage = len(keys) == 2 and keys[0] == "stages" and len(location) == 1
    return names + list(StageTable.model_fields) if is_stage else names


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by their keys in a pipeline; a field is named otherwise where pydantic has the name."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation names, also inside a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _set(data: dict[str, Any], item: str) -> None:
    name, equals, value = item.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set takes KEY=VALUE, not '{item}'", fix="for example: --set dataset.root=out/try")
    current = data
    for key in keys[:-1]:
        current = current.setdefault(key, {})
        if not isinstance(current, dict):
            raise ConfigError(f"--set {name}: '{key}' is a value, not a section", fix="name a key inside a section")
    try:
        current[keys[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        current[keys[-1]] = value


def line_of(text: str, keys: tuple[str, ...]) -> int:
    """The line (from 1) on which a dotted key stands, or its nearest section; 0 if neither does."""
    section: tuple[str, ...] = ()
    best, depth = 0, 0
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\[?([^\]]+)\]\]?", line)
        if header:
            section = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            here = section
        elif pair := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            here = section + tuple(part.strip("\"'") for part in pair[1].split("."))
        else:
            continue
        shared = min(len(here), len(keys))
        if here[:shared] == keys[:shared] and shared > depth:
            best, depth = number, shared
    return best

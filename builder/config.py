"""Pipelines: TOML files into strict models, every problem at once, each with its line.

Owns what a pipeline file may say. Knows the shape of `[stages.<name>]` but not the options of any stage: whoever knows
the stage checks them with `check` and the same `Problems`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from builder import layout, schema
from builder.errors import ConfigError, SchemaError

#: Executors that this version carries.
EXECUTORS = ("local",)
Param = str | int | float | bool | list[str] | list[int] | list[float]


class Strict(BaseModel):
    """A model that refuses unknown keys and does not turn one type into another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FieldSpec(Strict):
    """A json field with a type of its own."""

    name: str
    type: str


class Dataset(Strict):
    """What goes in and where the table lies."""

    #: Name of the dataset, for people.
    name: str = "dataset"
    #: Tar shards: a path or a list of paths, with braces {000..335} and globs.
    shards: str | list[str]
    #: Folder of the table, the edits and the hybrid shards.
    root: str
    #: json fields carried into the table; others than DataComp's and img2dataset's are text unless {name, type}.
    fields: list[str | FieldSpec] = []
    #: The json field that holds precomputed face boxes.
    boxes: str = "face_bboxes"


class Run(Strict):
    """How work is executed; `[run]` for all stages, `[stages.<name>.run]` for one."""

    #: Where tasks run: local.
    executor: Literal["local", "slurm", "ray"] = "local"
    #: Worker processes.
    workers: int = Field(default=2, ge=1)
    #: Rows after which a task commits.
    checkpoint_rows: int = Field(default=2048, ge=1)
    #: Seconds after which a task commits.
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    #: Share of failed rows past which a task stops, judged after 100 rows.
    max_failed: float = Field(default=0.5, ge=0, le=1)
    #: Rows a batch; the stage's own number if absent.
    batch_rows: int | None = Field(default=None, ge=1)
    #: Devices, one a worker in turn.
    devices: list[str] = ["cpu"]


class StageTable(BaseModel):
    """`[stages.<name>]`: keys that every stage has; the others are the stage's options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    #: A stage of one's own, `file.py:Class`.
    python: str | None = None
    #: The work SQL; `sql/<name>.sql` if absent.
    sql: str | None = None
    #: Values of the $names in the work SQL.
    params: dict[str, Param] = {}
    run: dict[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Write(Strict):
    """What the writer does."""

    #: SQL that returns the samples which differ from the source.
    select: str = "sql/write.sql"
    #: Values of the $names in that SQL.
    params: dict[str, Param] = {}


class _Sections(Strict):
    dataset: Dataset
    run: Run = Run()
    stages: dict[str, StageTable] = {}
    write: Write = Write()


@dataclass
class Problems:
    """What is wrong with one pipeline file, collected so that all of it is told at once."""

    path: str
    text: str = ""
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, keys: tuple[str, ...], message: str) -> None:
        self.found.append((line_of(self.text, keys), message))

    def raise_any(self) -> None:
        """Raises ConfigError if there is any problem."""
        if not self.found:
            return
        ordered = sorted(self.found)
        lines = {f"{self.path}:{line}" if line else self.path: "" for line, _ in ordered}
        if len(ordered) == 1:
            message, _, fix = ordered[0][1].partition("\n")
            raise ConfigError(message, where={"file": next(iter(lines))}, fix=fix or "edit that line")
        text = [f"{len(ordered)} problems in the pipeline"]
        for line, message in ordered:
            what, _, fix = message.partition("\n")
            text.append(f"  {self.path}:{line}: {what}" if line else f"  {self.path}: {what}")
            if fix:
                text.append(f"    {fix}")
        raise ConfigError("\n".join(text), fix="edit those lines")


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
    def patterns(self) -> list[str]:
        return [self.dataset.shards] if isinstance(self.dataset.shards, str) else list(self.dataset.shards)


def load(path: Path, sets: tuple[str, ...] = ()) -> Config:
    """Reads a pipeline file; problems of form are kept in `Config.problems`, for the stages' own to join them.

    Args:
        sets: overrides `dotted.key=value`, the value as TOML or else as text.

    Raises:
        ConfigError: no such file, no TOML, or a section without which nothing else can be checked.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no pipeline file '{path}'", fix="name one that exists, or start with: builder init DIR"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the pipeline is not UTF-8 text", where={"file": path, "byte": error.start}, fix="save it as UTF-8"
        ) from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the pipeline is not TOML: {error}", where={"file": path}, fix="edit that line") from None
    for item in sets:
        _set(data, item)
    problems = Problems(str(path), text)
    sections = check(_Sections, data, (), problems)
    if sections is None:
        problems.raise_any()
        raise AssertionError("a model was refused without a problem")
    if sections.run.executor not in EXECUTORS:
        problems.add(("run", "executor"), _no_executor(sections.run.executor))
    return Config(str(path), sections.dataset, sections.run, sections.stages, sections.write, problems, sets)


def find_pipeline(scale: str | None, pipeline: str | None) -> Path:
    """The file of `--pipeline FILE` or `--scale NAME`: `./pipelines/NAME.toml` first, then as installed."""
    if pipeline is not None:
        return Path(pipeline)
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
    table = config.stages[stage].run
    merged = check(Run, {**config.run.model_dump(), **table}, ("stages", stage, "run"), config.problems)
    if merged is not None and merged.executor not in EXECUTORS:
        config.problems.add(("stages", stage, "run", "executor"), _no_executor(merged.executor))
    return merged or config.run


def _no_executor(name: str) -> str:
    return f"executor '{name}' is not part of this version\nuse: executor = \"local\""


def fields_of(dataset: Dataset, problems: Problems) -> dict[str, Any]:
    """json fields with their Arrow types."""
    fields: dict[str, Any] = {}
    for item in dataset.fields:
        if isinstance(item, str):
            fields[item] = schema.FIELD_TYPES.get(item, schema.parse_type("string"))
            continue
        try:
            fields[item.name] = schema.parse_type(item.type)
        except SchemaError as error:
            problems.add(("dataset", "fields"), f"field '{item.name}': {error.what}\n{error.fix}")
    return fields


Model = TypeVar("Model", bound=BaseModel)


def check(model: type[Model], data: dict[str, Any], keys: tuple[str, ...], problems: Problems) -> Model | None:
    """Fills a strict model; what does not fit is added to the problems, unknown keys with a suggestion."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        for item in error.errors():
            location = tuple(str(part) for part in item["loc"])
            problems.add(keys + location, _problem(model, keys + location, location, item))
        return None


def _problem(model: type[BaseModel], keys: tuple[str, ...], location: tuple[str, ...], item: Any) -> str:
    section = ".".join(keys[:-1])
    place = f" in [{section}]" if section else ""
    name = keys[-1]
    if item["type"] == "extra_forbidden":
        valid = _valid_keys(model, location[:-1])
        near = difflib.get_close_matches(name, valid, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(sorted(valid))}"
        return f"unknown key '{name}'{place}\n{hint}"
    if item["type"] == "missing":
        return f"missing key '{name}'{place}\nadd it"
    message = item["msg"]
    context = item.get("ctx") or {}
    if item["type"] == "literal_error":
        return f"'{name}'{place} is {item['input']!r}\nvalid: {context['expected']}"
    return f"'{name}'{place} is {item['input']!r}: {message[0].lower()}{message[1:]}\nchange its value"


def _valid_keys(model: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return []
        current = current.model_fields[part].annotation
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


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
        if keys[: len(here)] == here and len(here) > depth:
            best, depth = number, len(here)
    return best

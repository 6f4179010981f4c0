"""Every problem of a pipeline file at once, each with its line and how to fix it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import pydantic
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from builder.config.sections import StageTable
from builder.errors import ConfigError

#: A key inside a pipeline: names of sections and keys, and positions in lists.
Keys = tuple[str | int, ...]


@dataclass
class Problems:
    """What is wrong with one pipeline file, collected so that all of it is reported at once.

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
        raise ConfigError("\n".join(text), fix="correct these and run the same command again")


def table_at(data: dict[str, Any], keys: Keys, problems: Problems) -> dict[str, Any]:
    """The section at the last of `keys`; empty if it is missing."""
    value = data.get(str(keys[-1]), {})
    if isinstance(value, dict):
        return value
    name, place = shown_key(keys)
    section = ".".join(map(str, keys))
    problems.add(keys, f"'{name}'{place} is {value!r}, not a section\nwrite [{section}]")
    return {}


Model = TypeVar("Model", bound=BaseModel)


def check(model: type[Model], data: dict[str, Any], keys: Keys, problems: Problems) -> Model | None:
    """Fills a strict model; what does not fit is added to the problems, unknown keys with a suggestion.

    Args:
        keys: the place of `data` in the pipeline.
    """
    filled, errors = _filled(model, data)
    for location, items in errors.items():
        problems.add(keys + location, _problem(model, keys, location, items))
    return filled


def checked_section(
    model: type[Model], data: dict[str, Any], keys: Keys, problems: Problems, **stand_ins: Any
) -> Model:
    """Parses the section at the last of `keys`. Invalid keys are reported and dropped, so that the rest is checked.

    Args:
        stand_ins: values of required keys that are missing or do not fit.
    """
    table = table_at(data, keys, problems)
    is_given = str(keys[-1]) in data
    filled = check(model, table, keys, problems) if is_given else None
    if filled is not None:
        return filled
    bad = {location[0] for location in _filled(model, table)[1]}
    return model.model_validate({**stand_ins, **{name: value for name, value in table.items() if name not in bad}})


def _filled(model: type[Model], data: dict[str, Any]) -> tuple[Model | None, dict[Keys, list[Any]]]:
    """The model, or errors by key; for a union, only the errors of the branch that matched most."""
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
    """Where in `data` an error is, without the names of a union's branches that pydantic inserts."""
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
    name, place = shown_key(keys + location)
    kind, value = items[0]["type"], items[0]["input"]
    if kind == "missing":
        return f"missing key '{name}'{place}\nadd it, for example: {_EXAMPLES.get(name, name + ' = ...')}"
    if kind == "extra_forbidden":
        return f"unknown key '{name}'{place}\n{hint(name, _valid_keys(model, keys, location))}"
    shown = f"'{name}'{place} is {value!r}"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", items[0]["ctx"]["expected"])
        return f"{shown}\n{hint(str(value), valid)}"
    if kind in ("model_type", "dict_type"):
        return f"{shown}, not a section\nwrite [{'.'.join(map(str, keys + location))}]"
    if kind == "value_error" and "\n" in items[0]["msg"]:  # a validator of ours, with its fix
        what, _, fix = items[0]["msg"].removeprefix("Value error, ").partition("\n")
        return f"'{name}'{place}: {what}\n{fix}"
    wanted = list(dict.fromkeys(_told(item["msg"]) for item in items))
    text = " or ".join(wanted).replace(" or should be ", " or ")
    fix = _example(model, location, kind, value) or f"correct '{name}'{place}"
    return f"{shown}: it {text}\n{fix}"


def _told(message: str) -> str:
    """pydantic's message about a value, as the end of a sentence about it."""
    message = re.sub("a valid dictionary or instance of FieldSpec", "{name = ..., type = ...}", message)
    should = re.match(r"(?:Input|List|String|Value) (should .*?)(?: after validation.*)?$", message)
    return should[1] if should else f"is refused: {message.removeprefix('Value error, ')}"


def hint(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, valid, 1)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(sorted(valid))}"


def shown_key(keys: Keys) -> tuple[str, str]:
    """A key as `name` or `name[2]`, and ` in [section]`."""
    at = len(keys) - 1
    while isinstance(keys[at], int) and at > 0:
        at -= 1
    name = str(keys[at]) + "".join(f"[{key}]" for key in keys[at + 1 :])
    section = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys[:at]).lstrip(".")
    return name, f" in [{section}]" if section else ""


def _example(model: type[BaseModel], location: Keys, kind: str, value: Any) -> str:
    """A valid line for a key; empty if there is no example."""
    if kind == "string_type" and isinstance(value, int | float):
        return f'write it in quotes: "{value}"'
    info = keys_of(model).get(str(location[0])) if len(location) == 1 else None
    default = None if info is None or info.is_required() else info.get_default(call_default_factory=True)
    if isinstance(default, bool | int | float | str | list):
        return f"for example: {location[0]} = {json.dumps(default)}"
    return ""


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
    """The fields of a model by their keys in a pipeline; a field is renamed where pydantic uses the key."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation names, also inside a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def line_of(text: str, keys: tuple[str, ...]) -> int:
    """The line (from 1) of a dotted key, or of its nearest section; 0 if neither is there."""
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

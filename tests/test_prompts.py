"""The stage prompts against a real server on loopback: what is asked, what becomes of every fault."""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from builder.config.problems import Problems, check
from builder.errors import ConfigError, ShardError, StageError
from builder.models.llm.backend import AnswerOrError, ChatEntry, PromptBackend, RewriteEntry, Workload
from builder.models.llm.conversation import GROUP_SYSTEM, Answer, Conversation, Rewrites, Template
from builder.stages.contract import RowsFailed
from builder.stages.finding import find
from builder.stages.prompts import BACKENDS, Prompts, PromptsOptions
from builder.stages.signature import options_hash
from builder.store.layout import Layout
from builder.table import commits
from conftest import Workspace, ingest_here, samples
from support import llm_server as llm
from support.llm_server import LlmServer, Play, disconnect, hang
from support.planned import do, plan

GROUPS = [["Black", "white", "Asian"], ["man", "woman"]]
SQL = "select shard, row, uid, caption as text from samples"
REFUSAL = "I'm sorry, but I can't help with that request."


def rewritten(request: dict[str, Any]) -> str:
    """What a good model answers to a built-in request with a group."""
    found = re.fullmatch(r'sentence: "(.*)" group: "(.*)"', request["messages"][1]["content"])
    assert found is not None
    return f"One {found[2]}: {found[1]}"


def batch(*texts: str | None, **columns: list[Any]) -> pa.RecordBatch:
    n = range(len(texts))
    given = {"shard": ["a" for _ in n], "row": list(n), "uid": [f"u{i}" for i in n], "text": list(texts)}
    types = {"text": pa.string()}
    return pa.record_batch({name: pa.array(v, types.get(name)) for name, v in {**given, **columns}.items()})


def many(count: int) -> pa.RecordBatch:
    return batch(*(f"a person in street number {i}" for i in range(count)), key=["k"] * count)


@contextmanager
def stage_for(*servers: LlmServer, each: dict[str, Any] | None = None, **options: Any) -> Iterator[Prompts]:
    endpoints = [{"base_url": server.base_url, "model": server.model, **(each or {})} for server in servers]
    made = Prompts(PromptsOptions.model_validate({"backend": "openai", "endpoints": endpoints, **options}))
    made.setup("cpu")
    try:
        yield made
    finally:
        made.close()


def outcome(stage: Prompts, rows: pa.RecordBatch) -> tuple[list[str | None], dict[int, str]]:
    """Prompts, and classes of the rows that failed."""
    try:
        return stage.process(rows, stage.prepare(rows)).column("prompt").to_pylist(), {}
    except RowsFailed as failed:
        kinds = {i: error.kind for i, error in failed.errors.items()}  # type: ignore[attr-defined]
        return failed.result.column("prompt").to_pylist(), kinds


# --- what is asked and what is answered ---


def test_the_built_in_rewrite_and_its_columns() -> None:
    with LlmServer() as server, stage_for(server, groups=GROUPS, temperature=0.0, seed=7) as stage:
        server.always(Play(content=rewritten))
        rows = batch('a "happy" person\nat sea', key=["k"])
        [row] = stage.process(rows, stage.prepare(rows)).to_pylist()
        [request] = server.requests
    ms = row.pop("prompt_ms")
    group = row["prompt_group"]
    assert group in [f"{one} {two}" for one in GROUPS[0] for two in GROUPS[1]]
    assert row == {
        "prompt": f"One {group}: a happy person at sea",
        "prompt_group": group,
        "prompt_lang": "en",
        "prompt_model": "tiny",
        "prompt_endpoint": server.base_url,
        "prompt_tokens_in": 9,
        "prompt_tokens_out": 8,
    }
    assert ms >= 0
    assert request == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": GROUP_SYSTEM.replace("{language}", "Answer in English. ")},
            {"role": "user", "content": f'sentence: "a happy person at sea" group: "{group}"'},
        ],
        "temperature": 0.0,
        "max_tokens": 256,
        "seed": 7,
    }


def test_templates_take_columns_of_the_work_sql() -> None:
    options: dict[str, Any] = {"system": "", "user": "{text} / {place} / {uid}", "lang": "any"}
    with LlmServer() as server, stage_for(server, **options) as stage:
        server.always(llm.text("an animal in a city"))
        assert stage.inputs.names == ["text", "place"]
        assert outcome(stage, batch("a dog", "a cat", place=["Rome {x}", None]))[1] == {}
        assert sorted(server.contents()) == ["a cat /  / u1", "a dog / Rome {x} / u0"]
        assert [len(request["messages"]) for request in server.requests] == [1, 1]


def test_a_schema_and_further_fields_go_into_the_request() -> None:
    schema = {"type": "object", "properties": {"prompt": {"type": "string"}}, "required": ["prompt"]}
    body = {"max_completion_tokens": 50, "top_p": 0.5}
    with LlmServer() as server, stage_for(server, json_schema=schema, body=body) as stage:
        server.always(llm.text('{"prompt": "a small dog"}'))
        assert outcome(stage, batch("a dog")) == (["a small dog"], {})
        [request] = server.requests
    assert request.pop("messages")[0]["content"].endswith(
        'this schema, and answer with that object alone: {"type": "object", "properties": {"prompt": '
        '{"type": "string"}}, "required": ["prompt"]}'
    )
    assert request == {
        "model": "tiny",
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        **body,
    }


def test_rows_and_answers_stay_together_and_every_row_is_asked_once() -> None:
    with LlmServer(latency_s=0.005, slots=4) as one, LlmServer() as two, stage_for(one, two, groups=GROUPS) as stage:
        one.always(Play(content=rewritten))
        two.always(Play(content=rewritten))
        batches = [many(300).slice(i, 100) for i in (0, 100, 200)]
        prepared = [stage.prepare(rows) for rows in batches]
        prompts = [
            prompt
            for rows, asked in zip(batches, prepared, strict=True)
            for prompt in stage.process(rows, asked).column("prompt").to_pylist()
        ]
        assert [prompt.split(": ")[1] for prompt in prompts] == [f"a person in street number {i}" for i in range(300)]
        assert len(one.requests) + len(two.requests) == 300
        assert min(len(one.requests), len(two.requests)) > 0


def test_a_batch_alone_and_its_rows_alone_are_assigned_the_same_groups() -> None:
    with LlmServer() as server, stage_for(server, groups=GROUPS) as stage:
        server.always(Play(content=rewritten))
        rows = many(20)
        together = stage.process(rows).column("prompt_group").to_pylist()
        alone = [stage.process(rows.slice(i, 1)).column("prompt_group")[0].as_py() for i in range(20)]
    assert together == alone
    assert len(set(together)) > 2


# --- rejected answers ---


def test_a_rejected_answer_is_asked_for_again_with_the_reason() -> None:
    with LlmServer() as server, stage_for(server, groups=GROUPS) as stage:
        server.script(llm.text(REFUSAL), llm.text("two\nlines"), Play(content=rewritten))
        prompts, failed = outcome(stage, many(1))
        assert failed == {}
        assert "street number 0" in str(prompts[0])
        first, second, third = (request["messages"] for request in server.requests)
        alone = "give the sentence alone"
        again, remark = "Answer the first request again, as it was asked.", "I'm sorry, but I can't help with"
        assert second == [
            *first,
            {"role": "assistant", "content": REFUSAL},
            {
                "role": "user",
                "content": f'The answer was a remark, "{remark}", not the rewritten sentence; {alone}. {again}',
            },
        ]
        assert third[2:] == [
            {"role": "assistant", "content": "two\nlines"},
            {"role": "user", "content": f"The answer had several lines; give one line and nothing else. {again}"},
        ]
        place = {"uid": "u0", "shard": "a", "row": 0, "endpoint": server.base_url}
        assert stage.take_notes() == [
            {**place, "kind": "refusal", "text": REFUSAL},
            {**place, "kind": "lines", "text": "two\nlines"},
        ]
        assert stage.take_notes() == []


@pytest.mark.parametrize("retries", [0, 2])
def test_what_is_rejected_to_the_end_fails_with_the_last_class(retries: int) -> None:
    with LlmServer() as server, stage_for(server, groups=GROUPS, retries=retries) as stage:
        server.script(*[llm.text(REFUSAL)] * retries)
        server.always(llm.echo())
        assert outcome(stage, many(1)) == ([None], {0: "echo"})
        assert len(server.requests) == retries + 1
        assert [note["kind"] for note in stage.take_notes()] == ["refusal"] * retries + ["echo"]


def test_a_sample_without_text_is_not_asked_about() -> None:
    with LlmServer() as server, stage_for(server, system="", user="{text}") as stage:
        assert outcome(stage, batch(None, "a dog", " \n")) == ([None, "re: a dog", None], {0: "no_text", 2: "no_text"})
        assert server.contents() == ["a dog"]


# --- faults ---

#: What a server does with a row, and what becomes of the row: a class of failure, or None where it is answered.
FAULTS: list[tuple[list[Play], str | None]] = [
    ([Play(content=rewritten)], None),
    ([llm.status(500)], "server_error"),
    ([llm.status(400)], "rejected"),
    ([llm.hang()], "timeout"),
    ([llm.slow_drip(0.05)], "timeout"),
    ([llm.half_body()], "bad_reply"),
    ([llm.error_body()], "bad_reply"),
    ([llm.truncated_json()], "bad_reply"),
    ([llm.wrong_model()], "bad_reply"),
    ([llm.no_choices()], "bad_reply"),
    ([llm.text("A man cut in the mid", "length")], "bad_reply"),
    ([llm.text("  ")], "bad_reply"),
    ([llm.disconnect()] * 2, "unreachable"),  # the first closes a connection that was kept: that is no failure
    ([llm.text(REFUSAL)], "refusal"),
    ([llm.text("One line\nand another")], "lines"),
    ([llm.echo()], "echo"),
    ([llm.text("nobody is in this street")], "group"),
    ([llm.status(429, retry_after="0")], None),  # these two are asked again behind each other
    ([llm.status(429)], None),
]
ONE_BY_ONE: dict[str, Any] = {
    "groups": GROUPS,
    "timeout_s": 0.7,
    "attempts": 1,
    "retries": 0,
    "rest_after": 99,
    "model_names": "exact",
}


def test_every_fault_leaves_its_class_and_never_a_prompt() -> None:
    with LlmServer() as server, stage_for(server, each={"max_concurrency": 1}, **ONE_BY_ONE) as stage:
        server.script(*(play for plays, _ in FAULTS for play in plays))
        server.always(Play(content=rewritten))
        prompts, failed = outcome(stage, many(len(FAULTS)))
    assert failed == {i: kind for i, (_, kind) in enumerate(FAULTS) if kind is not None}
    for i, prompt in enumerate(prompts):
        if i in failed:
            assert prompt is None
        else:
            assert re.fullmatch(rf"One \w+ \w+: a person in street number {i}", prompt or "")


def test_faults_through_the_command_line(workspace: Callable[..., Workspace]) -> None:
    """Exactly the rows that were answered are ok; no other text reaches the table's prompts, and so no shard."""
    with LlmServer() as server:
        server.script(*(play for plays, _ in FAULTS for play in plays))
        server.always(Play(content=rewritten))
        stages = f"""\
[stages.faces]
source = "json"
[stages.lang]
[stages.prompts]
backend = "openai"
groups = [["Black", "white", "Asian"], ["man", "woman"]]
timeout_s = 0.7
attempts = 1
retries = 0
rest_after = 99
model_names = "exact"
[[stages.prompts.endpoints]]
base_url = "{server.base_url}"
model = "tiny"
max_concurrency = 1
[stages.prompts.params]
min_faces = 0
lang = "en"
[stages.prompts.run]
max_failed = 1.0
"""
        made = workspace({"a": samples(len(FAULTS))}, stages=stages)
        for command in (["ingest"], ["stage", "faces"], ["stage", "lang"]):
            made.run(*command)
        done = made.run("stage", "prompts", check=False)
        assert done.returncode == 3, done.stderr
    rows = made.rows(
        "select row, prompts_status, prompt, prompts_error, caption, prompt_group from samples order by row"
    )
    assert [row[1] for row in rows] == ["ok" if kind is None else "failed" for _, kind in FAULTS]
    for (_, status, prompt, error, caption, group), (_, kind) in zip(rows, FAULTS, strict=True):
        if kind is None:
            assert (status, prompt, error) == ("ok", f"One {group}: {caption}", None)
        else:
            assert (prompt, group) == (None, None)
            assert error


def test_an_endpoint_that_dies_costs_no_row() -> None:
    options: dict[str, Any] = {"groups": GROUPS, "rest_after": 1, "rest_s": 0.2}
    with LlmServer(latency_s=0.01) as one, LlmServer(latency_s=0.01) as two, stage_for(one, two, **options) as stage:
        one.always(Play(content=rewritten))
        two.always(Play(content=rewritten))
        rows = many(400)
        asked = stage.prepare(rows)
        one.die()
        prompts = stage.process(rows, asked).column("prompt").to_pylist()
        assert [prompt.split(": ")[1] for prompt in prompts] == rows.column("text").to_pylist()
        assert {note["kind"] for note in stage.take_notes()} == {"notice"}
        one.come_back()


def test_close_gives_up_what_is_not_answered() -> None:
    with LlmServer() as server, stage_for(server, groups=GROUPS) as stage:
        server.always(llm.hang())
        asked = stage.prepare(many(50))
        stage.close()
        assert asked is not None
        assert asked.outcomes.cancelled() or asked.outcomes.exception() is not None
        assert "asking" not in {thread.name for thread in threading.enumerate()}


# --- what ends the stage before its end ---


def prompts_for(server: LlmServer, each: dict[str, Any] | None = None, **options: Any) -> Prompts:
    one = {"base_url": server.base_url, "model": server.model, **(each or {})}
    given = {"backend": "openai", "endpoints": [one], "system": "", "user": "{text}", "timeout_s": 600.0, **options}
    return Prompts(PromptsOptions.model_validate(given))


def statuses(made: Workspace) -> Counter[str | None]:
    return Counter(status for (status,) in made.rows("select prompts_status from samples"))


@pytest.mark.parametrize("batch_rows", [4, 16])
def test_a_stop_leaves_what_is_not_answered_and_keeps_what_is(dataset: Workspace, batch_rows: int) -> None:
    """Answers about batches ahead are kept, too."""
    with LlmServer() as server:
        stage = prompts_for(server)
        server.script(*[hang()] * 2)
        layout = dataset.load().layout
        run = plan(layout, stage, sql=SQL)
        done = do(layout, run, stage, batch_rows=batch_rows, stopping=lambda: server.answered == 14)
        assert len(server.requests) == 16
    assert (done.stopped, done.ok, done.failed, done.dropped) == (True, 14, 0, 0)
    assert statuses(dataset) == {"ok": 14, None: 2}


def test_a_stop_does_not_wait_for_a_server_that_is_silent_at_the_start(dataset: Workspace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"backend": "openai", "ports": [silent.getsockname()[1]], "model": "m", "timeout_s": 600.0}
        stage = Prompts(PromptsOptions.model_validate(options))
        layout = dataset.load().layout
        with pytest.raises(StageError) as caught:
            do(layout, plan(layout, stage, sql=SQL), stage, stopping=lambda: True)
    assert caught.value.what == "the run was stopped before an endpoint answered"
    assert caught.value.fix == "run the same command again to continue"
    assert "asking" not in {thread.name for thread in threading.enumerate()}


def test_endpoints_that_are_all_gone_end_the_stage_and_mark_no_row(dataset: Workspace) -> None:
    with LlmServer() as server:
        stage = prompts_for(server, {"max_concurrency": 1}, rest_s=0.02, rest_after=1)
        server.script(*[Play()] * 5)
        server.always(disconnect())
        with pytest.raises(StageError) as caught:
            do(dataset.load().layout, plan(dataset.load().layout, stage, sql=SQL), stage)
    assert str(caught.value) == (
        f"no endpoint is open; {server.base_url}: the connection was closed before an answer\n"
        "  fix: start a server at one of them, or name others in [[stages.prompts.endpoints]]; "
        "then run the same command again for the rows that are left"
    )
    assert statuses(dataset) == {"ok": 5, None: 11}


def test_a_budget_that_is_spent_ends_the_stage_and_marks_no_row(dataset: Workspace) -> None:
    with LlmServer() as server:
        each = {"max_concurrency": 1, "price_in": 0.0, "price_out": 1e6, "budget": 30.0}  # 1 a token
        stage = prompts_for(server, each, max_tokens=10)
        server.always(Play(fields={"usage": {"prompt_tokens": 5, "completion_tokens": 7}}))
        with pytest.raises(StageError) as caught:
            do(dataset.load().layout, plan(dataset.load().layout, stage, sql=SQL), stage)
    assert str(caught.value) == (
        f"no endpoint is left; {server.base_url}: its budget of 30 allows no further request\n"
        "  fix: raise its 'budget', or name other endpoints; then run the same command again for the rows that are left"
    )
    assert statuses(dataset) == {"ok": 3, None: 13}


# --- how many requests there are ---


def test_small_batches_keep_all_places_of_the_servers_busy(dataset: Workspace) -> None:
    with LlmServer(latency_s=0.02) as server:
        stage = prompts_for(server, {"max_concurrency": 8})
        done = do(dataset.load().layout, plan(dataset.load().layout, stage, sql=SQL), stage, batch_rows=1)
        assert (done.ok, server.most_at_once) == (16, 8)
        assert done.totals[server.base_url]["answers"] == 16


def test_nobody_is_asked_any_more_about_a_shard_that_is_left(
    dataset: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = commits.commit

    def refused(layout: Layout, shard: str, *args: Any, **options: Any) -> Any:
        if shard == "00000000":
            raise ShardError("it cannot be used")
        return commit(layout, shard, *args, **options)

    monkeypatch.setattr(commits, "commit", refused)
    with LlmServer() as server:
        stage = prompts_for(server, {"max_concurrency": 4}, timeout_s=5.0)
        for number in range(4, 8):  # behind the second batch, whose checkpoint hears of the refusal at the latest
            server.about(f"number {number}", hang())
        layout = dataset.load().layout
        done = do(layout, plan(layout, stage, sql=SQL), stage, batch_rows=2, checkpoint_rows=2)
    assert (done.refused, done.ok) == ({"00000000": "it cannot be used"}, 8)
    assert done.totals[server.base_url]["failures"] == {}


def test_the_workers_of_a_run_share_its_limits(workspace: Callable[..., Workspace]) -> None:
    with LlmServer(latency_s=0.1) as server:
        stages = f"""\
[stages.prompts]
backend = "openai"
system = ""
user = "{{text}}"
sql = "all.sql"
[[stages.prompts.endpoints]]
base_url = "{server.base_url}"
model = "tiny"
max_concurrency = 4
"""
        made = workspace(stages=stages, workers=2)
        (made.folder / "all.sql").write_text(SQL)
        ingest_here(made.load())
        done = made.run("stage", "prompts", cwd=made.folder)
        assert server.most_at_once <= 4
    assert re.search(
        rf"^prompts: {server.base_url}: 16 answers in 0\.\d\d s on average, 0 failures, 0 rests$", done.stderr, re.M
    )


# --- what stops the stage before any row ---


def test_no_endpoint_stops_the_stage_and_marks_no_row(workspace: Callable[..., Workspace]) -> None:
    with LlmServer() as server:
        gone = server.port
    stages = f'[stages.prompts]\nbackend = "openai"\nports = [{gone}]\nmodel = "tiny"\nsql = "all.sql"\n'
    made = workspace({"a": samples(3)}, stages=stages)
    (made.folder / "all.sql").write_text("select shard, row, uid, caption as text from samples")
    made.run("ingest", cwd=made.folder)
    done = made.run("stage", "prompts", check=False, cwd=made.folder)
    assert done.returncode == 1
    assert "no endpoint answers" in done.stderr
    assert made.rows("select distinct prompts_status from samples") == [(None,)]


def test_an_unknown_model_is_told_with_those_that_there_are() -> None:
    with LlmServer() as server:
        options = PromptsOptions(backend="openai", ports=[server.port], model="other")
        before = threading.active_count()
        with pytest.raises(StageError) as caught:
            Prompts(options).setup("cpu")
        assert threading.active_count() == before
    assert caught.value.what == f"endpoint '{server.base_url}' has no model 'other'"
    assert caught.value.where == {"its models": "tiny"}


# --- the work SQL ---


@pytest.mark.parametrize(
    "backend",
    ['backend = "template"', 'backend = "openai"\nports = [1]\nmodel = "m"\ngroups = [["Black", "white"]]'],
    ids=["prompts.sql", "prompts_groups.sql"],
)
def test_the_shipped_sql_works_without_the_stage_lang_where_any_language_is_wanted(
    workspace: Callable[..., Workspace], backend: str
) -> None:
    params = '[stages.prompts.params]\nmin_faces = 0\nlang = "any"\n'
    made = workspace(
        {"a": samples(4)}, stages=f'[stages.faces]\nsource = "json"\n[stages.prompts]\n{backend}\n{params}'
    )
    for command in (["ingest"], ["stage", "faces"], ["plan"]):
        made.run(*command)
    if "template" in backend:
        made.run("stage", "prompts")
        assert made.rows("select count(prompt), count(*) from samples") == [(4, 4)]
    made.file.write_text(made.file.read_text().replace('"any"', '"en"'))
    done = made.run("stage", "prompts", check=False)
    assert done.returncode == 2
    assert 'Referenced column "lang" not found' in done.stderr


# --- options ---


def test_what_the_options_decide() -> None:
    kind = find("prompts")
    template = Prompts(PromptsOptions())
    assert (template.inputs, template.tolerance, template.resources.batch_rows) == (kind.inputs, 0.0, 1024)
    assert template.sql == ""
    asked = Prompts(PromptsOptions(backend="openai", ports=[11434] * 8, model="m", groups=GROUPS))
    assert (asked.inputs.names, asked.sql) == (["text", "key"], "prompts_groups.sql")
    assert (asked.resources.batch_rows, asked.resources.ahead) == (256, 1)
    assert asked.resources.ahead_rows == 256 + 4 * 8 * 64
    assert asked.tolerance is None
    inside = Prompts(PromptsOptions(backend="vllm", model="m"))
    assert (inside.inputs.names, inside.resources.gpus, inside.resources.batch_rows) == (["text"], 1, 4096)
    assert inside.tolerance is None


def test_template_fills_what_applies() -> None:
    stage = Prompts(PromptsOptions(style="{caption}, at night"))
    stage.setup("cpu")
    rows = batch("a dog")
    [row] = stage.process(rows, stage.prepare(rows)).to_pylist()
    assert {name: value for name, value in row.items() if value is not None} == {
        "prompt": "a dog, at night",
        "prompt_model": "template",
    }


def test_no_other_try_is_advised_where_none_would_help(workspace: Callable[..., Workspace]) -> None:
    """Classes of failures know: a caption without words stays one."""
    stages = '[stages.prompts]\nbackend = "template"\nsql = "all.sql"\n'
    made = workspace({"a": samples(3)}, stages=stages)
    sql = "select shard, row, uid, case when row = 1 then '...' else caption end as text from samples"
    (made.folder / "all.sql").write_text(sql)
    made.run("ingest", cwd=made.folder)
    done = made.run("stage", "prompts", "--set", "stages.prompts.run.max_failed=1.0", check=False, cwd=made.folder)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == "  another try would give the same: they need other inputs or options"
    assert made.rows("select prompts_error from samples where row = 1") == [("no_text: caption has no words",)]


GROUP_FIX = 'give them, for example: groups = [["Black", "white", "Asian"], ["man", "woman"]]'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "openai"},
            "backend 'openai' has no endpoint\n"
            '  fix: write an endpoints section with base_url and model, or ports = [11434] and model = "..."',
        ),
        (
            {"backend": "openai", "ports": [1]},
            "'ports' needs a model\n  fix: name it as the servers do: model = \"llama3.1:8b\"",
        ),
        (
            {"backend": "vllm"},
            "backend 'vllm' has no model\n  fix: name it: model = \"models/my-model\", or a hub's id",
        ),
        (
            {"backend": "vllm", "model": "m", "user": "{text} {group}"},
            f"'user' has a field '{{group}}', but no groups are given\n  fix: {GROUP_FIX}",
        ),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Prompts(PromptsOptions.model_validate(options))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"host": "::1"}, 'not the name of a host, such as "127.0.0.1", "node7" or "[::1]"'),
        ({"host": "http://node7"}, 'not the name of a host, such as "127.0.0.1", "node7" or "[::1]"'),
        ({"host": "a..b"}, 'not the name of a host, such as "127.0.0.1", "node7" or "[::1]"'),
        ({"lang": "English"}, 'not an ISO 639-1 code such as "en"'),
        ({"body": {"stream": True}}, "'stream' is set by the stage itself"),
        ({"body": {"messages": []}}, "'messages' is set by the stage itself"),
        ({"synonyms": {"Black": ["Nigerian", " "]}}, "an empty word would count as every group"),
    ],
)
def test_values_that_no_server_could_take(options: dict[str, Any], why: str) -> None:
    found = Problems("p.toml")
    check(PromptsOptions, options, ("stages", "prompts"), found)
    [(name, value)] = options.items()
    told = f"'{name}' in [stages.prompts] is {value!r}: it is refused: {why}\n"
    assert [text[: len(told)] for _, _, text in found.found] == [told]


def test_groups_that_a_template_does_not_assign_are_told() -> None:
    assert Prompts(PromptsOptions()).notice == ""
    told = "backend 'template' assigns no groups: its prompts show none"
    assert Prompts(PromptsOptions(groups=GROUPS)).notice == told


@pytest.mark.parametrize("text", ["{text!r}", "{text:>9}", "{0}", "{}", "{a.b}", "{Text}"])
def test_a_field_that_is_no_column_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="that is not a column name"):
        Template("user", text)


def test_labels_of_a_frame() -> None:
    assert Template("user", 'sentence: "{text}" group:"{group}"').labels == ("sentence", "group")
    assert Template("user", "The old caption : {text} and {a}{b}").labels == ("The old caption",)
    assert Template("user", "A photo of {text}, {{x}}: y").labels == ()


def test_languages_in_the_built_in_messages() -> None:
    def system(lang: str | None) -> str:
        made = Rewrites(system=None, user=None, has_groups=True, lang=lang, json_schema=None)
        return made.begin({"text": "a"}, ("x",))[0][0]["content"]

    assert "Answer in English. " in system("en")
    assert 'Answer in the language with the ISO 639-1 code "de". ' in system("de")
    assert "language" not in system(None)


def test_vllm_that_is_not_installed_and_a_folder_that_is_not_there() -> None:
    stage = Prompts(PromptsOptions(backend="vllm", model="./no-model"))
    with pytest.raises(StageError) as caught:
        stage.setup("cpu")
    assert str(caught.value) == (
        "package 'vllm' is not installed, which backend 'vllm' needs\n  fix: pip install 'hybrid-shard-builder[vllm]'"
    )


def signature(**options: Any) -> str:
    stage = Prompts(PromptsOptions.model_validate(options))
    return options_hash(stage, stage.options)


def servers(*models: str, **each: Any) -> list[dict[str, Any]]:
    return [{"base_url": f"http://127.0.0.1:{8000 + i}/v1", "model": model, **each} for i, model in enumerate(models)]


def test_how_servers_are_reached_makes_no_answer_stale() -> None:
    asked: dict[str, Any] = {"backend": "openai", "temperature": 0.5, "groups": GROUPS}
    limits = {
        "max_concurrency": 2, "api_key_env": "KEY", "requests_per_minute": 3.0, "tokens_per_minute": 5.0,
        "tier": "paid", "price_in": 1.0, "price_out": 1.0, "budget": 9.0,
    }  # fmt: skip
    said = [
        {"endpoints": servers("a")},
        {"endpoints": servers("a", "a", **limits)},
        {"ports": [1], "model": "a"},
        {"ports": [1, 2], "model": "a", "host": "node7"},
        {"ports": [1], "model": "a", "endpoints": servers("a")},
        {"endpoints": servers("a"), "model": "of no port", "style": "{caption}"},
        {
            "endpoints": servers("a"),
            "timeout_s": 7.0,
            "attempts": 1,
            "rest_after": 1,
            "rest_s": 1.0,
            "engine": {"x": 1},
        },
        {"endpoints": servers("a"), "groups": {"x": GROUPS[0], "y": GROUPS[1]}},
    ]
    assert len({signature(**{**asked, **one}) for one in said}) == 1
    both = {**asked, "endpoints": servers("a", "b")}
    assert signature(**both) == signature(**{**both, "endpoints": servers("b", "a", "b")})


def test_what_is_asked_makes_answers_stale() -> None:
    asked: dict[str, Any] = {"backend": "openai", "endpoints": servers("a"), "groups": {"x": GROUPS[0], "y": GROUPS[1]}}
    changes: list[dict[str, Any]] = [
        {}, {"endpoints": servers("b")}, {"endpoints": servers("a", "b")}, {"system": "s"}, {"user": "{text}"},
        {"temperature": 0.5}, {"seed": 1}, {"max_tokens": 9}, {"body": {"top_p": 0.5}}, {"lang": "de"}, {"retries": 0},
        {"groups": {"y": GROUPS[1], "x": GROUPS[0]}}, {"groups": [GROUPS[0]]}, {"group_seed": 1}, {"mention": "any"},
        {"synonyms": {"man": ["sir"]}}, {"min_chars": 9}, {"max_chars": 99}, {"backend": "vllm", "model": "a"},
        {"backend": "template"}, {"json_schema": {"properties": {"prompt": {}}}},
    ]  # fmt: skip
    assert len({signature(**{**asked, **change}) for change in changes}) == len(changes)


@pytest.mark.parametrize("in_flight", [0, 3])
def test_a_third_back_end_holds_the_conversations(monkeypatch: pytest.MonkeyPatch, in_flight: int) -> None:
    """Its entry is all that the stage needs: options are checked, batches submitted ahead, rows fail alone."""

    class Parrot(PromptBackend):
        def start(self) -> None:
            done.append("started")

        def submit(self, talks: Sequence[Conversation]) -> Future[list[AnswerOrError]]:
            submitted.append(len(talks))
            future: Future[list[AnswerOrError]] = Future()
            future.set_result([self._outcome(talk) for talk in talks])
            return future

        def _outcome(self, talk: Conversation) -> AnswerOrError:
            said = talk.messages[-1]["content"]
            if "number 1" in said:
                return ValueError("no")
            accepted = talk.hear(said.split('"')[1] + " at dawn")
            assert accepted is not None
            return Answer(accepted.prompt, accepted.lang, "parrot", None, 1, 2, 3)

        def notices(self) -> list[str]:
            return ["it is tired"]

        def totals(self) -> dict[str, dict[str, Any]]:
            return {"cage": {"requests": 2}}

        def give_up(self) -> None:
            done.append("given up")

        def close(self) -> None:
            done.append("closed")

    def make(options: Any, workers: int, device: str) -> Parrot:
        done.append(f"{options.model} for {workers} on {device}")
        return Parrot()

    submitted: list[int] = []
    done: list[str] = []
    checked: list[Any] = []
    third = ChatEntry(
        lambda options: Workload(batch_rows=2, gpus=1, in_flight=in_flight),
        make,
        checked.append,
        lambda options: {"model": "the same"},
    )
    monkeypatch.setitem(BACKENDS, "third", third)
    options = PromptsOptions(model="grey", lang="any").model_copy(update={"backend": "third"})
    stage = Prompts(options)
    needs = stage.resources
    assert (needs.gpus, needs.batch_rows, needs.ahead_rows) == (1, 2, 2 + 4 * 3 if in_flight else 0)
    assert isinstance(stage.deciding, PromptsOptions)
    assert (stage.deciding.backend, stage.deciding.model, stage.notice) == ("third", "the same", "")
    stage.check_setup()
    stage.workers = 2
    stage.setup("cpu")
    prepared = stage.prepare(many(2))
    assert submitted == ([2] if in_flight else [])
    with pytest.raises(RowsFailed) as failed:
        stage.process(many(2), prepared)
    assert submitted == [2]
    assert str(failed.value.errors) == "{1: ValueError('no')}"
    first = failed.value.result.to_pylist()[0]
    assert (first["prompt"], first["prompt_model"], first["prompt_tokens_out"]) == (
        "a person in street number 0 at dawn", "parrot", 2,
    )  # fmt: skip
    assert [(note["kind"], note["text"]) for note in stage.take_notes()] == [("notice", "it is tired")]
    assert stage.totals() == {"cage": {"requests": 2}}
    stage.give_up()
    stage.close()
    assert (stage.totals(), checked, done) == ({}, [options], ["grey for 2 on cpu", "started", "given up", "closed"])


def test_a_third_back_end_rewrites_captions_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets captions and no conversation; of the options those that it reads decide."""
    third = RewriteEntry(lambda options, caption: f"{options.host}: {caption}", reads=("host",))
    monkeypatch.setitem(BACKENDS, "third", third)
    options = PromptsOptions(host="node7", style="{caption}", groups=GROUPS).model_copy(update={"backend": "third"})
    stage = Prompts(options)
    assert stage.notice == "backend 'third' assigns no groups: its prompts show none"
    assert stage.deciding == PromptsOptions(host="node7").model_copy(update={"backend": "third"})
    stage.check_setup()
    stage.setup("cpu")
    assert stage.prepare(batch("a", None)) is None
    answers = stage.process(batch("a", None)).to_pylist()
    assert [(row["prompt"], row["prompt_model"], row["prompt_group"]) for row in answers] == [
        ("node7: a", "third", None), ("node7: ", "third", None),
    ]  # fmt: skip
    stage.close()

"""What is an answer, and what each failure is called."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from typing import Any

import pytest

from builder.models.llm.http import (
    AskFailed,
    Http,
    Reply,
    is_same_model,
    model_in,
    read_reply,
    read_retry_after,
    read_status,
    read_usage,
    said,
)
from support.llm_server import LlmServer, disconnect, text


def body(**fields: Any) -> bytes:
    """An answer with other fields than the right ones."""
    message = {"role": "assistant", "content": fields.pop("content", " A red house.\n")}
    choice = {"index": 0, "message": message, "finish_reason": fields.pop("finish_reason", "stop")}
    usage = {"prompt_tokens": 7, "completion_tokens": 4}
    return json.dumps({"model": "org/tiny", "choices": [choice], "usage": usage, **fields}).encode()


def read(data: bytes, **options: Any) -> Reply:
    return read_reply(data, asked="org/tiny", endpoint="here", ms=12, **options)


def test_an_answer_is_taken_as_it_came() -> None:
    assert read(body()) == Reply(" A red house.\n", "org/tiny", "here", 7, 4, 12)
    assert read(body(usage=None, model=None)) == Reply(" A red house.\n", "org/tiny", "here", None, None, 12)
    assert read(body(usage={"prompt_tokens": -1, "completion_tokens": "4"})).tokens_in is None
    assert read(body(usage={"prompt_tokens": 2**31, "completion_tokens": 2**31 - 1})).tokens_in is None
    assert read(body(model="tiny", finish_reason=None, error=None)).model == "tiny"


def test_an_answer_of_another_model_says_so_and_is_refused_where_names_are_exact() -> None:
    assert read(body(model="gpt-4.1")).model == "gpt-4.1"
    assert read(body(model=3)).model == "org/tiny"
    assert read(body(model=" a\u202e\nb " + "x" * 900)).model == "a b " + "x" * 193 + "..."
    assert read(body(model="tiny-2024-08-06"), is_exact=True).model == "tiny-2024-08-06"
    with pytest.raises(AskFailed) as failed:
        read(body(model="other"), is_exact=True)
    assert (failed.value.kind, failed.value.is_final) == ("bad_reply", False)
    assert str(failed.value) == "the answer is of model 'other', not of 'org/tiny'"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "A red "}, {"type": "text", "text": "house"}], "A red house"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "A house"}], "A house"),
        ([{"type": "image_url", "text": "no"}, 3, {"type": "text", "text": 4}, {"type": "text", "text": "x"}], "x"),
    ],
)
def test_a_content_in_parts_is_the_text_of_its_parts(content: list[Any], text: str) -> None:
    assert read(body(content=content)).text == text


def test_numbers_that_are_none_and_that_json_has_not_throw_no_answer_away() -> None:
    for wrong in ("NaN", "Infinity", "-Infinity", "1e999"):
        data = body().replace(b'"completion_tokens": 4', f'"completion_tokens": {wrong}'.encode())
        assert read(data) == Reply(" A red house.\n", "org/tiny", "here", 7, None, 12)
        data = data.replace(b'"prompt_tokens": 7', b'"prompt_tokens": 7, "quota": ' + b"9" * 30)
        assert read(data).tokens_in == 7
    for wrong in (b'{"a": NaN, "b": "\\ud800"}', b"[" * 100_000 + b"NaN", b"\xff"):
        with pytest.raises(AskFailed, match="the answer is not json"):
            read(wrong)


def test_more_tokens_than_there_can_be_are_not_believed() -> None:
    def counted(tokens_in: int, tokens_out: int) -> tuple[int | None, int | None]:
        data = body(usage={"prompt_tokens": tokens_in, "completion_tokens": tokens_out})
        reply = read(data, most=(100, 256))
        assert read_usage(data, (100, 256)) == (reply.tokens_in, reply.tokens_out)
        return reply.tokens_in, reply.tokens_out

    assert counted(100, 256) == (100, 256)
    assert counted(4196, 1) == (4196, 1)
    assert counted(4197, 257) == (None, None)
    assert counted(2_000_000_000, 2_000_000_000) == (None, None)


def test_a_server_that_closes_kept_connections_without_a_word_costs_nothing() -> None:
    """The request that finds its connection closed is sent again on a new one."""

    async def work(url: str) -> None:
        http = Http(timeout_s=5)
        try:
            for _ in range(5):
                status, _, _ = await http.request("GET", f"{url}/models", {})
                assert status == 200
                await asyncio.sleep(0.02)
        finally:
            await http.close()

    with LlmServer(is_closing=True) as server:
        asyncio.run(work(server.base_url))


def test_a_request_is_sent_once_more_only_where_its_connection_had_been_used() -> None:
    asked = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a house"}]}).encode()

    async def work(server: LlmServer) -> None:
        http = Http(timeout_s=5)
        try:
            for _ in range(2):  # the second one finds it closed
                status, _, _ = await http.request("POST", f"{server.base_url}/chat/completions", {}, asked)
                assert status == 200
        finally:
            await http.close()
        assert len(server.requests) == 3
        server.script(disconnect())
        http = Http(timeout_s=5)
        try:
            with pytest.raises(AskFailed, match="the connection was closed before an answer"):
                await http.request("POST", f"{server.base_url}/chat/completions", {}, asked)
        finally:
            await http.close()
        assert len(server.requests) == 4

    with LlmServer() as server:
        server.script(text("a red house"), disconnect(), text("a red house"))
        asyncio.run(work(server))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the answer is not json: empty"),
        (b"<html>\n Bad  gateway</html>", "the answer is not json: <html> Bad gateway</html>"),
        (body()[:-20], f"the answer is not json: {body()[:-20].decode()}"),
        (b"[1]", "the answer is an error: [1]"),
        (b'{"error": {"message": "out of memory", "code": 500}}', "the answer is an error: out of memory"),
        (b'{"error": "busy"}', "the answer is an error: busy"),
        (body(choices=[]), "the answer has no choice with a message"),
        (body(choices=None), "the answer has no choice with a message"),
        (body(choices=["text"]), "the answer has no choice with a message"),
        (body(choices=[{"text": "of a completion"}]), "the answer has no choice with a message"),
        (body(content=""), "the answer is empty"),
        (body(content=" \n"), "the answer is empty"),
        (body(content=None), "the answer is empty"),
        (body(content=["a", "b"]), "the answer is empty"),
    ],
)
def test_what_is_no_answer_may_be_asked_for_again(data: bytes, message: str) -> None:
    with pytest.raises(AskFailed) as failed:
        read(data)
    assert (failed.value.kind, str(failed.value), failed.value.is_final) == ("bad_reply", message, False)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("length", "the answer is cut: 'max_tokens' is too small"),
        ("content_filter", "a content filter of the server held the answer back"),
    ],
)
def test_a_cut_or_filtered_answer_is_no_answer_and_is_not_asked_for_again(reason: str, message: str) -> None:
    with pytest.raises(AskFailed) as failed:
        read(body(finish_reason=reason))
    assert (failed.value.kind, str(failed.value), failed.value.is_final) == ("bad_reply", message, True)


@pytest.mark.parametrize(
    ("code", "data", "kind", "status", "is_final", "message"),
    [
        (429, b'{"error": {"message": "slow down"}}', "rate_limited", 429, False, "status 429: slow down"),
        (429, b'{"error": {"code": "insufficient_quota"}}', "no_budget", 402, False, "status 429: insufficient_quota"),
        (429, b'{"error": "no insufficient_quota"}', "rate_limited", 429, False, "status 429: no insufficient_quota"),
        (402, b"", "no_budget", 402, False, "status 402"),
        (400, b'{"detail": "too long"}', "rejected", 400, True, "status 400: too long"),
        (422, b'{"message": "no field"}', "rejected", 422, True, "status 422: no field"),
        (401, b"who?", "rejected", 401, False, "status 401: who?"),
        (403, b"{}", "rejected", 403, False, "status 403: {}"),
        (404, b"", "rejected", 404, False, "status 404"),
        (408, b"", "timeout", 408, False, "status 408"),
        (500, b"a\nb", "server_error", 500, False, "status 500: a b"),
        (503, b"", "server_error", 503, False, "status 503"),
        (302, b"", "server_error", 302, False, "status 302"),
    ],
)
def test_every_status_has_its_kind(
    code: int, data: bytes, kind: str, status: int, is_final: bool, message: str
) -> None:
    with pytest.raises(AskFailed) as failed:
        read_status(code, {}, data)
    error = failed.value
    assert (error.kind, error.status, error.is_final, str(error)) == (kind, status, is_final, message)
    read_status(200, {}, data)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert read_retry_after("17") == 17
    assert read_retry_after(" 0.5 ") == 0.5
    in_an_hour = read_retry_after(email.utils.formatdate(time.time() + 3600, usegmt=True))
    assert in_an_hour is not None and 3500 < in_an_hour <= 3600
    assert read_retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert read_retry_after("9" * 9) == 999_999_999
    assert read_retry_after("9" * 400) == 1e9, "a number that json has"
    for value in (None, "", "soon", "-3", "nan", "inf", "\u0663", "Fri, 31 Dec 1999 23:59:59 +99999999"):
        assert read_retry_after(value) is None
    with pytest.raises(AskFailed) as failed:
        read_status(429, {"Retry-After": "17"}, b"")
    assert failed.value.retry_after == 17


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("tiny", "tiny"),
        ("org/Tiny", "org/tiny"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("./tinyllama", "/data/models/tinyllama"),
        ("/data/models/tinyllama/", "tinyllama"),
        ("gpt-4o", "gpt-4o-2024-08-06"),
        ("/models/llama", "/models/llama@main"),
        ("gpt-4", "gpt-4-0613"),
        ("claude-latest", "claude-20241022"),
        ("gemini-pro", "models/gemini-pro-002"),
        ("vertex", "vertex@20240229"),
        ("llama3", "llama3:latest"),
        ("llama3:latest", "llama3"),
    ],
)
def test_a_server_may_say_a_model_s_name_in_other_words(asked: str, found: str) -> None:
    assert is_same_model(asked, found)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("tiny", "another"),
        ("gpt-4o", "gpt-4o-mini"),
        ("gpt-4o-2024-08-06", "gpt-4o-2024-05-13"),
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("llama3:8b", "llama3:70b"),
        ("ours/llama", "theirs/llama"),
        ("llama-3-8b", "llama-3-70b"),
        ("llama", "llama-3"),
        ("tiny", ""),
    ],
)
def test_another_model_is_another(asked: str, found: str) -> None:
    assert not is_same_model(asked, found)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model": "llama@main"}', "llama@main"),
        (b'{"model": ""}', None),
        (b'{"model": 3}', None),
        (b"[]", None),
        (b"{", None),
    ],
)
def test_the_model_of_an_answer_is_told(body: bytes, expected: str | None) -> None:
    assert model_in(body) == expected


def test_what_a_server_says_is_bounded() -> None:
    words = said(json.dumps({"error": {"message": "a\u202eb\n" * 500_000}}).encode())
    assert words.startswith("a b a b a b")
    assert len(words) <= 4000

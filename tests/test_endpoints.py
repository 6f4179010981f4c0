"""The pool against real servers on loopback, with every fault that they have."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
from pydantic import ValidationError

from builder.config.problems import Problems, check
from builder.config.sections import Strict
from builder.errors import StageError
from builder.models.llm.http import Http
from builder.models.llm.pool import AskFailed, Endpoint, Over, Pool, Reply, summary
from builder.models.llm.served import LIMITING_S, Request, Served, probe
from support.llm_server import (
    LlmServer,
    Play,
    disconnect,
    error_body,
    half_body,
    hang,
    no_choices,
    slow_drip,
    status,
    text,
    truncated_json,
    wrong_model,
)

Serve = Callable[..., LlmServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(LlmServer(**options))


def endpoint(server: LlmServer, **options: Any) -> Endpoint:
    return Endpoint(base_url=server.base_url, model="tiny", **options)


@asynccontextmanager
async def started(*endpoints: Endpoint | LlmServer, **options: Any) -> AsyncIterator[Pool]:
    """A pool over endpoints, or over servers with nothing said of them."""
    found = [one if isinstance(one, Endpoint) else endpoint(one) for one in endpoints]
    pool = Pool(found, **{"timeout_s": 0.5, "rest_s": 0.3, **options})
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def ask(pool: Pool, words: str = "a house", **body: Any) -> Reply:
    return await pool.ask([{"role": "user", "content": words}], **body)


async def ask_all(pool: Pool, count: int, prefix: str = "house") -> list[str]:
    """Texts of so many requests, all at once; of a failed one its kind."""
    asked = (ask(pool, f"{prefix} {i}") for i in range(count))
    return [
        one.kind if isinstance(one, AskFailed) else one.text
        for one in await asyncio.gather(*asked, return_exceptions=True)
        if isinstance(one, AskFailed | Reply) or _raise(one)
    ]


def _raise(error: BaseException) -> bool:
    raise error


def right(count: int, prefix: str = "house") -> list[str]:
    return [f"re: {prefix} {i}" for i in range(count)]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        await asyncio.wait_for(work(), 60)

    asyncio.run(all_of_it())


# --- an answer ---


def test_a_request_is_answered(serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with started(server) as pool:
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a red house"}]
            reply = await pool.ask(messages, temperature=0.5, max_tokens=20, seed=3)
            assert reply == Reply("re: a red house", "tiny", server.base_url, 3, 4, reply.ms)
            assert 0 <= reply.ms < 500
            sent = {"model": "tiny", "messages": messages, "temperature": 0.5, "max_tokens": 20, "seed": 3}
            assert server.requests == [sent]
            assert pool.totals() == {
                server.base_url: {
                    "model": "tiny", "requests": 1, "answers": 1, "ms": reply.ms, "rests": 0, "pauses": 0,
                    "asked_to_wait": 0.0, "probes": 0, "answered_as": [], "failures": {},
                    "tokens_in": 3, "tokens_out": 4, "spent": 0.0, "limit": 8, "state": "open",
                }
            }  # fmt: skip
            assert list(pool.notices) == []

    run(work)


def test_what_pools_have_counted_is_told_in_a_line_an_endpoint() -> None:
    quiet: dict[str, Any] = {
        "answers": 0, "ms": 0, "rests": 0, "pauses": 0, "asked_to_wait": 0.0, "spent": 0.0, "failures": {},
        "answered_as": [],
    }  # fmt: skip
    one = {**quiet, "answers": 3, "ms": 4500, "rests": 1, "failures": {"timeout": 1, "server_error": 2}}
    two = {**quiet, "answers": 1, "ms": 500, "spent": 0.5, "failures": {"timeout": 4}}
    waited = {**quiet, "pauses": 2, "asked_to_wait": 999999999.0, "answered_as": ["gpt", "qwen"]}
    assert summary([{"a": one, "b": quiet}, {"a": two, "c": {**quiet, "answered_as": ["qwen"]}}, {"c": waited}]) == [
        "a: 4 answers in 1.25 s on average, 7 failures (timeout 5, server_error 2), 1 rests, 0.50 spent",
        "b: 0 answers, 0 failures, 0 rests",
        "c: 0 answers, 0 failures, 0 rests, 2 pauses (asked to wait 1e+09 s, at most 30 s kept), "
        "answers as 'qwen', answers as 'gpt'",
    ]


def test_the_model_is_the_one_that_the_server_says(serve: Serve) -> None:
    server = serve()
    server.script(wrong_model("org/tiny-2024-08-06"))

    async def work() -> None:
        async with started(server) as pool:
            assert (await ask(pool)).model == "org/tiny-2024-08-06"

    run(work)


# --- faults ---

FAULTS = [
    (status(500, "boom"), "server_error", "status 500: boom"),
    (status(503, "starting"), "server_error", "status 503: starting"),
    (half_body(), "bad_reply", "the connection was closed within the answer"),
    (error_body(), "bad_reply", "the answer is an error: out of memory"),
    (
        truncated_json(),
        "bad_reply",
        'the answer is not json: {"id": "1", "choices": [{"message": {"role": "assistant", "content": "a red',
    ),
    (no_choices(), "bad_reply", "the answer has no choice with a message"),
    (text(" "), "bad_reply", "the answer is empty"),
    (Play(body=b"{" + b" " * 1_100_000), "bad_reply", "the answer is longer than 1048576 bytes"),
    (hang(), "timeout", "no whole answer within 0.5 s"),
    (slow_drip(), "timeout", "no whole answer within 0.5 s"),
    (disconnect(), "unreachable", "the connection was closed before an answer"),
    (status(403, "flagged"), "rejected", "status 403: flagged"),
]


@pytest.mark.parametrize(("fault", "kind", "message"), FAULTS)
def test_a_fault_has_its_kind_and_goes_to_another_endpoint(serve: Serve, fault: Play, kind: str, message: str) -> None:
    server, other = serve(), serve()
    server.always(fault)

    async def work() -> None:
        async with started(server, attempts=1) as pool:
            with pytest.raises(AskFailed) as failed:
                await ask(pool)
            assert (failed.value.kind, str(failed.value)) == (kind, f"{server.base_url}: {message}")
            assert pool.totals()[server.base_url]["failures"] == {kind: 1}
        async with started(server, other) as pool:
            tried = len(server.requests)
            assert (await ask(pool)).endpoint == other.base_url
            assert len(server.requests) > tried
            assert len(other.requests) == 1

    run(work)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (status(400, "too long"), "rejected", "status 400: too long"),
        (status(422, "no field"), "rejected", "status 422: no field"),
        (text("a red", finish="length"), "bad_reply", "the answer is cut: 'max_tokens' is too small"),
    ],
)
def test_what_would_fail_again_is_not_tried_again(serve: Serve, fault: Play, kind: str, message: str) -> None:
    server, other = serve(), serve()
    server.always(fault)

    async def work() -> None:
        async with started(server, other, rest_after=1) as pool:
            with pytest.raises(AskFailed) as failed:
                await ask(pool)
            assert (failed.value.kind, str(failed.value)) == (kind, f"{server.base_url}: {message}")
            assert (len(server.requests), len(other.requests)) == (1, 0)
            assert pool.totals()[server.base_url]["state"] == "open"

    run(work)


def test_a_failed_request_waits_for_another_endpoint_that_is_full(serve: Serve) -> None:
    server, busy = serve(), serve(latency_s=0.3)
    server.always(status(500, "boom"))

    async def work() -> None:
        async with started(server, endpoint(busy, max_concurrency=1), attempts=2) as pool:
            assert await ask_all(pool, 3) == right(3)
            assert len(server.requests) <= 2
            assert len(busy.requests) == 3

    run(work)


def test_attempts_are_bounded(serve: Serve) -> None:
    server, other = serve(), serve()
    server.always(status(500, "boom"))
    other.always(half_body())

    async def work() -> None:
        async with started(server, other, attempts=3) as pool:
            with pytest.raises(AskFailed) as failed:
                await ask(pool)
            assert failed.value.kind in ("server_error", "bad_reply")
            assert len(server.requests) + len(other.requests) == 3
            assert min(len(server.requests), len(other.requests)) == 1

    run(work)


def test_all_faults_at_once_leave_every_request_answered(serve: Serve) -> None:
    servers = [serve(), serve()]
    for server in servers:
        server.script(*(fault for fault, _, _ in FAULTS[::-1]), status(429, retry_after="0"), status(429))

    async def work() -> None:
        async with started(*servers, attempts=30, rest_after=1000) as pool:
            assert await ask_all(pool, 200) == right(200)
            totals = pool.totals().values()
            assert sum(one["answers"] for one in totals) == 200
            failed = sum(sum(one["failures"].values()) for one in totals)
            again = 2 * (len(FAULTS) + 2) - failed  # a connection that was kept may be closed: that is no failure
            assert 0 <= again <= 2
            assert sum(one["requests"] for one in totals) == 200 + failed

    run(work)


def test_a_cancelled_request_leaves_its_place(serve: Serve) -> None:
    server = serve()
    server.script(hang())

    async def work() -> None:
        async with started(endpoint(server, max_concurrency=1), timeout_s=30) as pool:
            tasks = [asyncio.create_task(ask(pool, f"house {i}")) for i in range(3)]
            await until(lambda: len(server.requests) == 1)
            tasks[1].cancel()
            tasks[0].cancel()
            assert (await tasks[2]).text == "re: house 2"
            assert server.contents() == ["house 0", "house 2"]

    run(work)


def test_a_request_that_is_cancelled_as_it_gets_its_place_leaves_it(serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with started(endpoint(server, max_concurrency=1)) as pool:

            async def first() -> None:
                await ask(pool, "house 0")
                second.cancel()  # its place has been given to it, and it has not run since

            one = asyncio.create_task(first())
            second = asyncio.create_task(ask(pool, "house 1"))
            await one
            assert (await ask(pool, "house 2")).text == "re: house 2"
            assert second.cancelled()
            assert server.contents() == ["house 0", "house 2"]

    run(work)


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


# --- limits ---


def test_waiting_for_room_is_not_part_of_the_time_out(serve: Serve) -> None:
    server = serve(latency_s=0.2)

    async def work() -> None:
        async with started(endpoint(server, max_concurrency=2)) as pool:
            assert await ask_all(pool, 10) == right(10)
            assert server.most_at_once == 2
            assert server.contents() == [f"house {i}" for i in range(10)]

    run(work)


def test_what_is_to_be_next_goes_before_others_that_wait(serve: Serve) -> None:
    server = serve(latency_s=0.02)

    async def work() -> None:
        async with started(endpoint(server, max_concurrency=1)) as pool:
            first = asyncio.gather(*(ask(pool, f"house {i}") for i in range(3)))
            await until(lambda: len(server.requests) == 1)
            await pool.ask([{"role": "user", "content": "again"}], True)
            await first
            assert server.contents() == ["house 0", "again", "house 1", "house 2"]

    run(work)


def test_the_limit_grows_to_its_ceiling(serve: Serve) -> None:
    server = serve(latency_s=0.02)

    async def work() -> None:
        async with started(endpoint(server, max_concurrency=20)) as pool:
            assert pool.capacity == 8
            assert await ask_all(pool, 100) == right(100)
            assert pool.capacity == 20
            assert server.most_at_once == 20

    run(work)


def test_the_limit_shrinks_where_the_server_says_429(serve: Serve) -> None:
    server = serve(latency_s=0.02, limit=3)

    async def work() -> None:
        async with started(server, attempts=1) as pool:
            assert await ask_all(pool, 60) == right(60)
            assert pool.capacity < 8
            assert pool.totals()[server.base_url]["state"] == "open"

    run(work)


def test_the_limit_halves_once_for_the_time_outs_of_one_round(serve: Serve) -> None:
    server = serve()
    server.script(*[hang()] * 8)

    async def work() -> None:
        async with started(server, attempts=1, rest_after=100) as pool:
            assert await ask_all(pool, 8) == ["timeout"] * 8
            assert pool.capacity == 4

    run(work)


def test_the_least_loaded_endpoint_is_asked(serve: Serve) -> None:
    large, small = serve(latency_s=0.2), serve(latency_s=0.2)

    async def work() -> None:
        async with started(endpoint(large, max_concurrency=6), endpoint(small, max_concurrency=2)) as pool:
            assert pool.capacity == 8
            assert await ask_all(pool, 4) == right(4)
            assert (len(large.requests), len(small.requests)) == (3, 1)
            assert await ask_all(pool, 8) == right(8)
            assert (len(large.requests), len(small.requests)) == (9, 3)

    run(work)


def test_a_lower_tier_is_used_where_the_higher_ones_are_full_or_down(serve: Serve) -> None:
    paid, local, free = (serve(latency_s=0.2) for _ in range(3))
    tiers = {"paid": paid, "local": local, "free": free}
    endpoints = [endpoint(server, tier=tier, max_concurrency=2) for tier, server in tiers.items()]

    def came() -> list[int]:
        return [len(server.requests) for server in (free, local, paid)]

    async def work() -> None:
        async with started(*endpoints) as pool:
            for count, wanted in ((2, [2, 0, 0]), (3, [4, 1, 0]), (6, [6, 3, 2])):
                assert await ask_all(pool, count) == right(count)
                assert came() == wanted
            free.die()
            assert await ask_all(pool, 2) == right(2)
            assert came() == [6, 5, 2]

    run(work)


def test_requests_a_minute_are_held(serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with started(endpoint(server, requests_per_minute=600)) as pool:
            assert await ask_all(pool, 15) == right(15)
            assert server.times[-1] - server.times[0] >= 0.45

    run(work)


def test_tokens_a_minute_are_held_and_what_was_estimated_is_corrected(serve: Serve) -> None:
    server = serve()
    usage = {"prompt_tokens": 20, "completion_tokens": 30}
    server.always(Play(fields={"usage": usage}))

    async def work() -> None:
        async with started(endpoint(server, tokens_per_minute=6000)) as pool:  # 100 a second
            for i in range(7):
                await ask(pool, f"house {i}", max_tokens=1000)
            # 100 at once are two answers of 50; those after them wait half a second each
            assert 1.5 <= server.times[-1] - server.times[0] < 6

    run(work)


def test_a_budget_is_not_passed(serve: Serve) -> None:
    server, other = serve(), serve()
    costly = endpoint(server, price_in=0, price_out=1e6, budget=25)  # 1 a token; an answer has 3

    async def work() -> None:
        async with started(costly) as pool:
            for i in range(6):
                await ask(pool, f"house {i}", max_tokens=10)
            with pytest.raises(AskFailed) as failed:
                await ask(pool, max_tokens=10)
            message = f"no endpoint is left; {server.base_url}: its budget of 25 allows no further request"
            assert (failed.value.kind, str(failed.value)) == ("no_budget", message)
            assert isinstance(failed.value, Over)
            assert pool.totals()[server.base_url]["spent"] == 18
            notice = f"{server.base_url} is no longer used: its budget of 25 allows no further request"
            assert list(pool.notices) == [notice]
        async with started(costly, endpoint(other, max_concurrency=4)) as pool:
            assert await ask_all(pool, 20) == right(20)  # 1,024 tokens may come, where nothing is said
            assert len(server.requests) == 6

    run(work)


def test_requests_under_way_count_for_the_budget(serve: Serve) -> None:
    server = serve(latency_s=0.1)

    async def work() -> None:
        async with started(endpoint(server, price_in=0, price_out=1e6, budget=25)) as pool:
            asked = [ask(pool, f"house {i}", max_tokens=10) for i in range(8)]
            done = await asyncio.gather(*asked, return_exceptions=True)
            assert server.most_at_once == 2
            assert sum(isinstance(one, Reply) for one in done) == 6
            assert pool.totals()[server.base_url]["spent"] == 18

    run(work)


# --- 429 ---


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_obeyed_and_uses_up_no_attempt(serve: Serve, as_date: bool) -> None:
    server = serve()

    async def work() -> None:
        async with started(server, attempts=1, rest_s=30) as pool:
            # a date has whole seconds: the next but one is at least one away
            wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
            server.script(status(429, retry_after=wait))
            assert (await ask(pool)).text == "re: a house"
            assert server.times[1] - server.times[0] >= 0.99

    run(work)


def test_while_one_endpoint_is_to_be_left_alone_another_is_asked(serve: Serve) -> None:
    server, other = serve(), serve()
    server.always(status(429, retry_after="20"))

    async def work() -> None:
        async with started(server, other) as pool:
            assert await ask_all(pool, 30) == right(30)
            assert 1 <= len(server.requests) <= 8  # those that were sent before its 429 came
            before = len(server.requests)
            assert await ask_all(pool, 30) == right(30)
            assert set(server.contents()[before:]) <= {"Hello"}

    run(work)


def test_a_server_that_takes_nothing_ends_the_pool(serve: Serve) -> None:
    server = serve()
    server.always(status(429, "slow down", retry_after="0.2"))

    async def work() -> None:
        async with started(server, patience_s=1) as pool:
            assert await ask_all(pool, 20) == ["rate_limited"] * 20
            with pytest.raises(Over) as failed:
                await ask(pool)
            assert failed.value.kind == "rate_limited"
            assert str(failed.value).endswith(f"{server.base_url}: status 429: slow down")

    run(work)


# --- 429: the request's fault, or the server's ---


def poisoned(server: LlmServer, *words: str, retry_after: str | None = None) -> None:
    """Lets a server push back every request that ends so, for ever."""
    for word in words:
        server.about(word, status(429, "Request too large", retry_after=retry_after))


def pushed(server: LlmServer, words: str) -> int:
    return server.contents().count(words)


def test_a_request_that_is_always_pushed_back_fails_and_holds_up_no_other(serve: Serve) -> None:
    """With the attempts and rests that are shipped."""
    server = serve(latency_s=0.01)
    poisoned(server, "house 7", "house 20", "house 57")

    async def work() -> None:
        async with started(server, timeout_s=120, rest_s=30) as pool:
            found = await ask_all(pool, 58)
            wanted = right(58)
            right_words = {f"house {i}" for i in range(58)} - {"house 7", "house 20", "house 57"}
            for i in (7, 20, 57):
                wanted[i] = "rate_limited"
            assert found == wanted
            assert [pushed(server, f"house {i}") for i in (7, 20, 57)] == [4, 4, 4]
            others = [i for i, words in enumerate(server.contents()) if words in right_words]
            again = [i for i, words in enumerate(server.contents()) if words == "house 7"][1]
            assert sum(i > again for i in others) <= 16, "it was tried again before others that waited"
            assert pool.totals()[server.base_url]["state"] == "open"

    run(work)


def test_a_request_that_one_endpoint_pushes_back_is_answered_by_another(serve: Serve) -> None:
    """And fails where both push it back."""
    server, other = serve(), serve()
    poisoned(server, "house 3", "house 5")
    poisoned(other, "house 5")

    async def work() -> None:
        async with started(server, other, rest_s=30) as pool:
            wanted = right(20)
            wanted[5] = "rate_limited"
            assert await ask_all(pool, 20) == wanted
            assert pushed(server, "house 5") + pushed(other, "house 5") == 4
            assert min(pushed(server, "house 5"), pushed(other, "house 5")) >= 1

    run(work)


@pytest.mark.parametrize("retry_after", [None, "999999999"])
def test_requests_that_are_always_pushed_back_fail_where_there_are_no_others(
    serve: Serve, retry_after: str | None
) -> None:
    server = serve()
    poisoned(server, *(f"house {i}" for i in range(3)), retry_after=retry_after)

    async def work() -> None:
        async with started(endpoint(server, price_in=1e6, price_out=1e6), attempts=2, rest_s=30) as pool:
            assert await ask_all(pool, 3) == ["rate_limited"] * 3
            probes = pushed(server, "Hello")
            assert 1 <= probes <= 12
            totals = pool.totals()[server.base_url]
            assert (totals["probes"], totals["answers"], totals["requests"]) == (
                probes,
                0,
                len(server.requests) - probes,
            )
            assert totals["spent"] == probes * (1 + 2)  # a probe has one word, and its answer two

    run(work)


def test_a_busy_server_s_requests_are_not_poisoned(serve: Serve) -> None:
    """It takes one request in a while, whichever that is: each is pushed back many times."""
    free_at = [0.0]

    def pushes_back(_: object) -> bool:
        is_busy = time.monotonic() < free_at[0]
        if not is_busy:
            free_at[0] = time.monotonic() + 0.04
        return is_busy

    server = serve(pushes_back=pushes_back)

    async def work() -> None:
        async with started(server, attempts=1, rest_s=30) as pool:
            assert await ask_all(pool, 15) == right(15)
            assert pool.totals()[server.base_url]["failures"]["rate_limited"] > 15

    run(work)


def test_no_request_fails_while_its_endpoint_pushes_back_what_it_then_takes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it takes others, and probes, between one's refusals."""
    monkeypatch.setattr("builder.models.llm.served.LIMITING_S", 600.0)
    left = {"house 1": 1, "house 0": 4}

    def pushes_back(request: dict[str, Any]) -> bool:
        words = request["messages"][-1]["content"]
        left[words] = left.get(words, 0) - 1
        return left[words] >= 0

    server = serve(pushes_back=pushes_back)

    async def work() -> None:
        async with started(server, attempts=1, rest_s=30) as pool:
            assert (await ask(pool, "house 1")).text == "re: house 1"
            assert (await ask(pool, "house 0")).text == "re: house 0"
            assert pushed(server, "house 0") == 5

    run(work)


def test_a_pause_is_no_longer_than_its_bound_whatever_is_asked_for(serve: Serve) -> None:
    """Where nothing ends it: no other answer, no probe."""
    one = Served(endpoint(serve()), "one", 0.0)
    for sent, asked in ((1.0, 999999999.0), (2.0, float("inf"))):
        error = AskFailed("rate_limited", "no", status=429, retry_after=asked)
        one.failed(probe(), error, sent, sent + 0.5, rest_after=5, rest_s=30.0)
        assert one.opens() == sent + 0.5 + 30


def test_an_endpoint_that_pushes_back_a_probe_is_limiting_for_a_while(serve: Serve) -> None:
    """And so says nothing of the requests that it pushes back."""
    one = Served(endpoint(serve()), "one", 0.0)
    error = AskFailed("rate_limited", "no", status=429)
    one.failed(Request([], {}, probe().cost), error, 1.0, 1.5, rest_after=5, rest_s=30.0)
    assert not one.is_limiting(1.5)
    one.failed(probe(), error, 2.0, 2.5, rest_after=5, rest_s=30.0)
    assert one.is_limiting(2.5)
    assert one.is_limiting(2.4 + LIMITING_S)
    assert not one.is_limiting(2.6 + LIMITING_S)


def test_an_endpoint_that_asks_for_ages_is_probed_and_used_again(serve: Serve) -> None:
    server = serve()
    server.script(status(429, "come back", retry_after="999999999"))

    async def work() -> None:
        async with started(endpoint(server, max_concurrency=1), rest_s=30) as pool:
            assert await ask_all(pool, 5) == right(5)
            assert pushed(server, "Hello") == 1
            name = server.base_url
            assert list(pool.notices) == [f"{name} asks for a pause of 1e+09 s: it gets 30 s, and is probed"]
            [line] = summary([pool.totals()])
            assert line.endswith("0 rests, 1 pauses (asked to wait 1e+09 s, at most 30 s kept)")

    run(work)


def test_a_probe_that_is_pushed_back_leaves_a_pause_as_it_is_and_there_is_one_a_pause(serve: Serve) -> None:
    server = serve()
    server.script(status(429, retry_after="2.5"), status(429, retry_after="1"))

    async def work() -> None:
        async with started(endpoint(server, max_concurrency=1), rest_s=30) as pool:
            assert await ask_all(pool, 2) == right(2)
            contents = server.contents()
            assert contents == ["house 0", "Hello", "house 1", "house 0"]
            assert server.times[2] - server.times[0] >= 2.4

    run(work)


def test_a_pool_without_money_for_a_probe_sends_none(serve: Serve) -> None:
    server = serve()
    poisoned(server, "house 0")

    async def work() -> None:
        # room for the request, of which nothing was spent, and none for a probe beside what an answer took
        async with started(endpoint(server, price_in=0, price_out=1e6, budget=10.5), patience_s=2) as pool:
            server.always(Play(fields={"usage": {"prompt_tokens": 1, "completion_tokens": 10}}))
            await ask(pool, "a tree", max_tokens=10)
            with pytest.raises(Over) as failed:
                await ask(pool, "house 0", max_tokens=10)
            assert failed.value.kind == "no_budget"
            assert pushed(server, "Hello") == 0

    run(work)


def test_503_with_retry_after_is_being_pushed_back(serve: Serve) -> None:
    server = serve()
    server.script(status(503, retry_after="1"))

    async def work() -> None:
        async with started(server, attempts=1, rest_s=30) as pool:
            assert (await ask(pool)).text == "re: a house"
            assert server.times[1] - server.times[0] >= 0.99

    run(work)


# --- rests ---


def test_an_endpoint_that_fails_in_a_row_rests_until_it_answers_a_request_for_a_token(serve: Serve) -> None:
    server = serve(latency_s=0.2)
    server.script(*[status(500, "boom")] * 4)

    async def work() -> None:
        async with started(server, attempts=1, rest_after=3) as pool:
            for _ in range(3):
                with pytest.raises(AskFailed):
                    await ask(pool)
            assert pool.totals()[server.base_url]["state"] == "resting"
            assert await ask_all(pool, 6) == right(6)
            times = server.times
            assert server.contents()[3:5] == ["Hello"] * 2  # no row is risked
            assert [request["max_tokens"] for request in server.requests[3:5]] == [1, 1]
            assert times[3] - times[2] >= 0.49  # an answer and a rest
            assert times[4] - times[3] >= 0.49  # another rest
            assert times[5] - times[4] >= 0.19  # that request alone
            assert server.most_at_once == 6  # then all
            rests = f"{server.base_url} rests for 0.3 s: status 500: boom"
            assert list(pool.notices) == [rests, rests, f"{server.base_url} answers again"]

    run(work)


def test_nothing_waits_for_an_endpoint_that_hangs_and_rests(serve: Serve) -> None:
    server, other = serve(), serve()
    server.always(hang())

    async def work() -> None:
        async with started(server, endpoint(other, max_concurrency=2), rest_after=1, rest_s=0.01) as pool:
            assert await ask_all(pool, 30) == right(30)
            sent = len(server.requests)
            await until(lambda: len(server.requests) == sent + 1)
            assert server.contents()[sent] == "Hello"
            assert await ask_all(pool, 30) == right(30)
            assert set(server.contents()[sent:]) == {"Hello"}
            assert pool.totals()[server.base_url]["state"] == "resting"

    run(work)


def test_an_endpoint_that_refuses_the_key_after_a_rest_is_used_no_more(serve: Serve) -> None:
    server = serve()
    server.script(status(500, "boom"))
    server.always(status(401, "who?"))

    async def work() -> None:
        async with started(server, rest_after=1, rest_s=0.01) as pool:
            with pytest.raises(Over) as failed:
                await ask(pool)
            message = f"no endpoint is left; {server.base_url}: status 401: who?"
            assert (failed.value.kind, str(failed.value)) == ("rejected", message)
            assert len(server.requests) == 2

    run(work)


def test_an_answer_to_what_was_sent_before_a_rest_does_not_end_it(serve: Serve) -> None:
    server = serve()
    server.script(slow_drip(0.001), *[status(500, "boom")] * 3)

    async def work() -> None:
        async with started(server, attempts=1, rest_after=3, rest_s=30, timeout_s=30) as pool:
            late = asyncio.create_task(ask(pool, "house 0"))
            await until(lambda: len(server.requests) == 1)
            assert await ask_all(pool, 3) == ["server_error"] * 3
            assert not late.done()
            assert (await late).text == "re: house 0"
            assert pool.totals()[server.base_url]["state"] == "resting"

    run(work)


def test_an_answer_between_failures_ends_their_row(serve: Serve) -> None:
    server = serve()
    server.script(*[status(500), status(500), Play()] * 5)

    async def work() -> None:
        async with started(server, attempts=1, rest_after=3) as pool:
            for _ in range(5):
                assert [await kind_of(pool) for _ in range(3)] == ["server_error", "server_error", ""]
            assert list(pool.notices) == []

    run(work)


async def kind_of(pool: Pool) -> str:
    """The kind of failure of one request; empty if it is answered."""
    try:
        await ask(pool)
    except AskFailed as error:
        return error.kind
    return ""


def test_a_pool_that_is_down_waits_and_then_fails_what_waits(serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with started(server, rest_after=1, patience_s=1.2, rest_s=0.5, attempts=20) as pool:
            server.die()
            began = time.monotonic()
            assert await ask_all(pool, 20) == ["unreachable"] * 20
            assert time.monotonic() - began >= 0.99  # two rests; a third would be too long
            with pytest.raises(AskFailed) as failed:
                await asyncio.gather(ask(pool), ask(pool))
            assert str(failed.value).startswith(f"no endpoint is open; {server.base_url}: no connection: ")
            server.come_back()
            await asyncio.sleep(0.6)
            assert (await ask(pool)).text == "re: a house"

    run(work)


def test_a_pool_that_is_down_for_a_while_loses_nothing(serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with started(server, rest_s=0.1) as pool:
            server.die()
            asked = asyncio.create_task(ask_all(pool, 50))
            await asyncio.sleep(0.3)
            server.come_back()
            assert await asked == right(50)

    run(work)


def test_one_of_three_dies_and_comes_back_and_each_request_is_answered_once(serve: Serve) -> None:
    servers = [serve(latency_s=0.005) for _ in range(3)]

    async def work() -> None:
        async with started(*servers, rest_s=0.1) as pool:
            replies: list[Reply] = []

            async def row(i: int) -> None:
                replies.append(await ask(pool, f"house {i}"))

            rows = asyncio.gather(*(row(i) for i in range(3000)))
            await until(lambda: len(replies) > 500)
            servers[1].die()
            before = len(servers[1].requests)
            await until(lambda: len(replies) > 1500)
            assert len(servers[1].requests) == before
            servers[1].come_back()
            await rows
            assert sorted(reply.text for reply in replies) == sorted(right(3000))
            assert len(servers[1].requests) > before
            assert pool.totals()[servers[1].base_url]["state"] == "open"
            assert sum(one["answers"] for one in pool.totals().values()) == 3000

    run(work)


# --- closed ---


@pytest.mark.parametrize("code", [401, 404])
def test_an_endpoint_that_refuses_key_or_model_is_used_no_more(serve: Serve, code: int) -> None:
    server, other = serve(), serve()
    server.always(status(code, "no more"))

    async def work() -> None:
        async with started(server, other) as pool:
            for i in range(10):
                assert (await ask(pool, f"house {i}")).endpoint == other.base_url
            assert len(server.requests) == 1
            assert pool.totals()[server.base_url]["state"] == "closed"
            assert list(pool.notices) == [f"{server.base_url} is no longer used: status {code}: no more"]
            other.always(status(code, "nor here"))
            with pytest.raises(AskFailed) as failed:
                await ask(pool)
            message = f"no endpoint is left; {other.base_url}: status {code}: nor here"
            assert (failed.value.kind, str(failed.value)) == ("rejected", message)

    run(work)


def test_403_closes_an_endpoint_when_it_comes_in_a_row(serve: Serve) -> None:
    server, other = serve(), serve()
    server.script(status(403, "flagged"), Play(), *[status(403, "not in your country")] * 3)

    async def work() -> None:
        async with started(server, other, rest_after=3) as pool:
            for i in range(20):
                assert (await ask(pool, f"house {i}")).text == f"re: house {i}"
            assert len(server.requests) == 5
            notice = f"{server.base_url} is no longer used: status 403: not in your country"
            assert list(pool.notices) == [notice]

    run(work)


def test_an_account_without_money_is_used_no_more(serve: Serve) -> None:
    server = serve()
    server.always(status(402, "insufficient balance"))

    async def work() -> None:
        async with started(server) as pool:
            with pytest.raises(AskFailed) as failed:
                await ask(pool)
            message = f"no endpoint is left; {server.base_url}: status 402: insufficient balance"
            assert (failed.value.kind, str(failed.value)) == ("no_budget", message)
            assert len(server.requests) == 1

    run(work)


# --- start ---


def refusal(*endpoints: Endpoint, timeout_s: float = 5) -> str:
    """What the start of a pool says."""

    async def work() -> str:
        pool = Pool(endpoints, timeout_s=timeout_s)
        with pytest.raises(StageError) as refused:
            await pool.start()
        return str(refused.value)

    return asyncio.run(work())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_start_without_any_endpoint_that_answers_is_refused(serve: Serve) -> None:
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}/v1" for port in ports]
    assert refusal(*(Endpoint(base_url=url, model="tiny") for url in urls)) == (
        "no endpoint answers\n"
        f"  {urls[0]}: no connection: Connect call failed ('127.0.0.1', {ports[0]})\n"
        f"  {urls[1]}: no connection: Connect call failed ('127.0.0.1', {ports[1]})\n"
        "  fix: start a server there, or correct 'base_url'"
    )
    broken = serve(models_status=500)
    broken.always(status(500, "no memory"))
    assert refusal(endpoint(broken)) == (
        f"no endpoint answers\n  {broken.base_url}: status 500: no memory\n"
        "  fix: start a server there, or correct 'base_url'"
    )
    broken.always(hang())
    assert refusal(endpoint(broken), timeout_s=0.3) == (
        f"no endpoint answers\n  {broken.base_url}: no whole answer within 0.3 s\n"
        "  fix: start a server there, or correct 'base_url'"
    )


def test_a_server_that_takes_no_connection_is_unreachable_before_the_time_out() -> None:
    async def work() -> None:
        with socket.socket() as full, contextlib.ExitStack() as clients:
            full.bind(("127.0.0.1", 0))
            full.listen(0)  # more than its queue holds wait for a connection in vain
            for _ in range(3):
                one = clients.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            http = Http(timeout_s=60, connect_s=0.1)
            try:
                with pytest.raises(AskFailed) as failed:
                    await http.request("GET", f"http://127.0.0.1:{full.getsockname()[1]}/", {})
            finally:
                await http.close()
            assert (failed.value.kind, str(failed.value)) == ("unreachable", "no connection within 0.1 s")

    run(work)


def test_a_server_that_is_silent_is_asked_once_at_the_start() -> None:
    came = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.readuntil(b"\r\n"))
        await reader.read()
        writer.close()

    async def work() -> None:
        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            pool = Pool([Endpoint(base_url=url, model="tiny")], timeout_s=0.1)
            with pytest.raises(StageError) as refused:
                await pool.start()
            assert refused.value.where == {url: "no whole answer within 0.1 s"}
        assert came == [b"GET /v1/models HTTP/1.1\r\n"]

    run(work)


def test_an_endpoint_that_does_not_answer_at_the_start_rests_while_others_work(serve: Serve) -> None:
    server, other = serve(), serve()
    server.die()

    async def work() -> None:
        async with started(server, other, rest_s=0.2) as pool:
            assert pool.capacity == 8
            (notice,) = pool.notices
            assert notice.startswith(f"{server.base_url} rests for 0.2 s: no connection: ")
            assert (await ask(pool)).endpoint == other.base_url
            server.come_back()
            await asyncio.sleep(0.25)
            assert {(await ask(pool)).endpoint for _ in range(3)} == {server.base_url, other.base_url}
            assert pool.notices[1] == f"{server.base_url} answers again"

    run(work)


def test_an_unknown_model_is_refused(serve: Serve) -> None:
    server = serve(model="big")
    assert refusal(endpoint(server)) == (
        f"endpoint '{server.base_url}' has no model 'tiny'\n  its models: big\n  fix: set 'model' to one that it has"
    )
    server.models_status = 500
    assert refusal(endpoint(server)) == (
        f"endpoint '{server.base_url}' has no model 'tiny'\n  it says: status 404: no model tiny\n"
        "  fix: correct 'model', or 'base_url', which usually ends in /v1"
    )


def test_a_server_that_lists_other_names_than_it_takes_is_asked_for_a_token(serve: Serve) -> None:
    """As a deployment of a name of one's own is: the list has the models behind it."""
    server = serve()
    alias = Endpoint(base_url=server.base_url, model="mine")
    server.model = "mine"
    server.listed = ["gpt-4.1", "gpt-4o"]

    async def work() -> None:
        async with started(alias) as pool:
            assert (await ask(pool)).text == "re: a house"
            assert server.contents() == ["Hello", "a house"]
        server.script(status(400, "Unsupported parameter: 'max_tokens'"))
        async with started(alias) as pool:
            assert (await ask(pool)).text == "re: a house"

    run(work)
    server.script(status(400, "model 'mine' is unknown"))
    assert refusal(alias) == (
        f"endpoint '{server.base_url}' has no model 'mine'\n  its models: gpt-4.1, gpt-4o\n"
        "  fix: set 'model' to one that it has"
    )


def test_a_server_that_answers_under_another_name_is_told_once(serve: Serve) -> None:
    server = serve()
    server.always(wrong_model("gpt-4.1-2025-04-14"))

    async def work() -> None:
        async with started(server) as pool:
            assert {(await ask(pool)).model for _ in range(3)} == {"gpt-4.1-2025-04-14"}
            assert list(pool.notices) == [
                f"{server.base_url} answers as 'gpt-4.1-2025-04-14' when asked for 'tiny': its answers are "
                'accepted, with that name in prompt_model; model_names = "exact" would refuse them'
            ]
            [line] = summary([pool.totals()])
            assert line.endswith("0 rests, answers as 'gpt-4.1-2025-04-14'")

    run(work)


def test_names_that_are_kept_of_other_models_are_few(serve: Serve) -> None:
    one = Served(endpoint(serve()), "one", 0.0)
    told = [one.heard(f"model {i}") is not None for i in range(50)]
    assert told == [True] * 5 + [False] * 45
    assert len(one.totals()["answered_as"]) == 5


@pytest.mark.parametrize("by_endpoint", [False, True])
def test_another_name_is_refused_where_names_are_exact(
    serve: Serve, by_endpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    options: dict[str, Any] = {} if by_endpoint else {"model_names": "exact"}
    one = endpoint(server, model_names="exact" if by_endpoint else None)
    server.script(wrong_model("tiny-2024-08-06"))
    server.always(wrong_model())

    async def work() -> None:
        async with started(one, attempts=1, **options) as pool:
            assert (await ask(pool)).model == "tiny-2024-08-06"
            with pytest.raises(AskFailed) as failed:
                await ask(pool)
            assert failed.value.kind == "bad_reply"
            assert str(failed.value) == f"{server.base_url}: the answer is of model 'another', not of 'tiny'"

    run(work)
    monkeypatch.setenv("TEST_KEY", "k")
    assert refusal(endpoint(server, model_names="exact", api_key_env="TEST_KEY")) == (
        f"endpoint '{server.base_url}' has no model 'tiny'\n  it answers as: another\n"
        "  fix: set 'model' to that name, or take any: model_names = \"any\""
    )


def test_a_server_that_closes_its_connections_without_a_word_is_used(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "k")
    server = serve(is_closing=True)

    async def work() -> None:
        async with started(endpoint(server, api_key_env="TEST_KEY", max_concurrency=2), attempts=1) as pool:
            assert await ask_all(pool, 20) == right(20)
            assert list(pool.notices) == []

    run(work)


def test_a_request_for_which_a_server_closes_its_connection_is_sent_twice_an_attempt_at_most(serve: Serve) -> None:
    """Other answers go on making connections that could be used again, and it would be sent on each."""
    server = serve(latency_s=0.005)
    server.about("house 20", disconnect())

    async def work() -> None:
        async with started(server, attempts=2, rest_after=1000) as pool:
            wanted = right(600)
            wanted[20] = "unreachable"
            assert await ask_all(pool, 600) == wanted
            assert pool.totals()[server.base_url]["failures"] == {"unreachable": 2}
            assert 2 <= pushed(server, "house 20") <= 4

    run(work)


def test_a_count_of_tokens_that_cannot_be_loses_no_endpoint(serve: Serve) -> None:
    """Two thousand million of them would take its limit for months, and its budget for good."""
    server = serve()
    server.always(Play(fields={"usage": {"prompt_tokens": 2_000_000_000, "completion_tokens": 2_000_000_000}}))
    limited = endpoint(server, tokens_per_minute=60_000, price_in=1, price_out=1, budget=1)

    async def work() -> None:
        async with started(limited) as pool:
            for i in range(3):
                reply = await ask(pool, f"house {i}", max_tokens=20)
                assert (reply.tokens_in, reply.tokens_out) == (None, None)

    run(work)


def test_a_server_without_a_list_of_models_is_asked_for_a_token(serve: Serve) -> None:
    server = serve(models_status=500)

    async def work() -> None:
        for play in (text("Hi", finish="length"), status(400, "no max_tokens"), status(429)):
            server.script(play)
            async with started(server) as pool:
                assert list(pool.notices) == []

    run(work)
    message = {"role": "user", "content": "Hello"}
    assert server.requests == [{"model": "tiny", "messages": [message], "max_tokens": 1}] * 3


def test_a_key_is_read_from_the_environment_and_never_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(key="sk-secret")
    with_key = endpoint(server, api_key_env="TEST_KEY")
    monkeypatch.delenv("TEST_KEY", raising=False)
    assert refusal(with_key) == (
        f"environment variable 'TEST_KEY' is not set, but endpoint '{server.base_url}' needs it\n"
        "  fix: put the key into it: export TEST_KEY=..."
    )
    assert refusal(endpoint(server)) == (
        f"endpoint '{server.base_url}' needs a key\n  it says: status 401: wrong key: none\n"
        '  fix: name the environment variable that holds it: api_key_env = "..."'
    )
    monkeypatch.setenv("TEST_KEY", "sk-another")
    assert refusal(with_key) == (
        f"endpoint '{server.base_url}' refuses the key\n  it says: status 401: wrong key: Bearer ***\n"
        "  fix: put a valid key into the environment variable 'TEST_KEY'"
    )
    monkeypatch.setenv("TEST_KEY", "sk-secret")

    async def work() -> None:
        async with started(with_key) as pool:
            assert server.contents() == ["Hello"]
            assert (await ask(pool)).text == "re: a house"
            server.key = "sk-new"
            with pytest.raises(AskFailed) as failed:
                await ask(pool)
            assert str(failed.value) == (f"no endpoint is left; {server.base_url}: status 401: wrong key: Bearer ***")
            told = [*pool.notices, repr(failed.value), str(pool.totals())]
            assert len(told) == 3
            assert not any("sk-" in one for one in told)

    run(work)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert refusal(Endpoint(base_url="http://127.0.0.1:9/v1", model="tiny")) == (
        "package 'aiohttp' is not installed, which asking an LLM server needs\n"
        "  fix: pip install 'hybrid-shard-builder[llm]'"
    )


def test_endpoints_at_one_address_have_names_of_their_own(serve: Serve) -> None:
    server = serve()

    async def work() -> None:
        async with started(server, server) as pool:
            assert list(pool.totals()) == [f"{server.base_url} #1", f"{server.base_url} #2"]

    run(work)


# --- options ---


class _Options(Strict):
    endpoints: list[Endpoint]


def problems(**fields: Any) -> Sequence[str]:
    """What a pipeline with such an endpoint is told."""
    found = Problems("p.toml")
    one = {"base_url": "http://127.0.0.1:8000/v1", "model": "tiny", **fields}
    check(_Options, {"endpoints": [one]}, ("stages", "prompts"), found)
    return [message for _, _, message in found.found]


def test_an_endpoint_is_checked() -> None:
    assert problems() == []
    assert problems(tier="paid", price_in=0, price_out=2.5, budget=3, max_concurrency=2, api_key_env="KEY") == []
    where = "in [stages.prompts.endpoints[0]]"
    assert problems(base_url="127.0.0.1:8000") == [
        f"'base_url' {where} is '127.0.0.1:8000': it is refused: not an address such as \"http://127.0.0.1:8000/v1\"\n"
        f"correct 'base_url' {where}"
    ]
    for url in ("http://[::1/v1", "http://host:port/v1", "http://host:99999/v1", "http://a..b/v1", "http://my host/v1"):
        assert problems(base_url=url) == [
            f"'base_url' {where} is '{url}': it is refused: not an address such as \"http://127.0.0.1:8000/v1\"\n"
            f"correct 'base_url' {where}"
        ]
    assert problems(base_url="http://[::1]:8000/v1") == []
    assert problems(base_url="http://me:secret@host/v1") == [
        f"'base_url' {where} is 'http://me:secret@host/v1': it is refused: it has more than an address; "
        f"a key belongs in the variable that api_key_env names\ncorrect 'base_url' {where}"
    ]
    assert problems(base_url="http://host/v1/chat/completions/") == [
        f"'base_url' {where} is 'http://host/v1/chat/completions/': it is refused: "
        f"leave out \"/chat/completions\"\ncorrect 'base_url' {where}"
    ]
    assert problems(budget=1.0, price_in=1.0) == [
        f"'budget' {where} is 1.0: it is refused: a budget needs price_in and price_out\ncorrect 'budget' {where}"
    ]
    assert problems(teir="paid") == [f"unknown key 'teir' {where}\ndid you mean 'tier'?"]
    with pytest.raises(ValidationError):
        Endpoint(base_url="http://host/v1", model="")


def test_a_trailing_slash_does_not_matter() -> None:
    assert Endpoint(base_url="http://host/v1/", model="tiny").base_url == "http://host/v1"


def test_only_the_model_decides_the_answer() -> None:
    deciding = [
        name
        for name, info in Endpoint.model_fields.items()
        if (info.json_schema_extra or {}).get("decides", True)  # type: ignore[union-attr]
    ]
    assert deciding == ["model"]


def test_workers_share_an_endpoint() -> None:
    given = Endpoint(
        base_url="http://host/v1", model="m", max_concurrency=9, requests_per_minute=60, tokens_per_minute=6000,
        price_in=1, price_out=2, budget=20,
    )  # fmt: skip
    limits = {"max_concurrency": 2, "requests_per_minute": 15, "tokens_per_minute": 1500, "budget": 5}
    assert given.share(4) == given.model_copy(update=limits)
    assert given.share(1) == given
    with pytest.raises(StageError) as refused:
        Endpoint(base_url="http://host/v1", model="m", max_concurrency=2).share(4)
    assert str(refused.value) == (
        "endpoint 'http://host/v1' takes 2 requests at a time, fewer than the run has workers\n  workers: 4\n"
        "  fix: set workers = 1: one keeps all servers busy"
    )


def test_a_pool_needs_an_endpoint() -> None:
    with pytest.raises(ValueError, match=r"^a pool needs an endpoint$"):
        Pool([], timeout_s=1)

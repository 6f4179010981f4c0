"""The pool of LLM endpoints beside bare clients, against servers that do nothing.

    python -m bench.prompts [--rounds 5] [--requests 2000]

**Requests per second**: one server that answers at once, in a process of its own; `builder.models.llm.pool.Pool`, a
bare loop over aiohttp and a bare loop over `AsyncOpenAI`, as many requests in flight each, in turn.

**A fast and a slow endpoint**, 4 times apart: servers with a fixed latency and a fixed number of slots. Requests per
second of a pool over both, from the first to the last answer, beside the sum of a pool over each alone.

**Memory**: the peak of a process that asks 100,000 times, beside its peak after the first 10,000.

**A death**: one of three endpoints is killed after a third of the answers and started again after two thirds; answers
that came, each of its own request, beside the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from bench.report import Result, compared, peak_mb, rounds_of, table
from builder.models.llm.pool import Endpoint, Pool

#: Requests in flight of all comparisons.
CONCURRENCY = 64
#: Requests of a round; an AsyncOpenAI loop answers some hundred a second.
REQUESTS = 2000
#: Targets: times the requests per second of a bare aiohttp loop, of a bare AsyncOpenAI loop, of the sum of both alone.
AIOHTTP_TARGET, OPENAI_TARGET, SUM_TARGET = 0.5, 0.9, 0.95
#: Seconds of an answer of the fast and the slow server, and answers that each works on at a time.
FAST_S, SLOW_S, SLOTS = 0.02, 0.08, 8
#: Requests whose memory is compared, and growth that is allowed.
MANY, WARM, GROWTH = 100_000, 10_000, 1.05
#: Requests of the comparison with a death, and seconds of an answer and of a rest there.
DEATH_REQUESTS, DEATH_S, DEATH_REST_S = 9000, 0.005, 0.5
MODEL = "null"
SYSTEM = "Rewrite the sentence so that it shows the given group."


def messages(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"a man with a hat is standing in the street, number {number}"},
    ]


def measure(rounds: int, requests: int = REQUESTS) -> list[Result]:
    """All comparisons."""
    return [*throughput(rounds, requests), fast_and_slow(rounds), memory(), death()]


# --- a server that does nothing ---


class NullServer(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; an answer is the number in the request, after `latency_s` in one of `slots`."""

    def __init__(self, latency_s: float, slots: asyncio.Semaphore) -> None:
        self._latency_s, self._slots = latency_s, slots
        self._got = b""
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.I)
        size = int(length[1]) if length else 0
        if not end or len(body) < size:
            return
        self._got = body[size:]
        if head.startswith(b"GET"):
            self._send({"object": "list", "data": [{"id": MODEL}]})
        elif self._latency_s:
            self._tasks.add(task := asyncio.ensure_future(self._later(body)))
            task.add_done_callback(self._tasks.discard)
        else:
            self._answer(body)

    async def _later(self, body: bytes) -> None:
        async with self._slots:
            await asyncio.sleep(self._latency_s)
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        number = re.search(rb"number (\d+)", body)
        content = f"a woman with a hat, number {int(number[1]) if number else -1}"
        self._send(
            {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": MODEL,
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
                ],
                "usage": {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50},
            }
        )  # fmt: skip

    def _send(self, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


def _serve(pipe: Connection, port: int, latency_s: float, slots: int) -> None:
    async def work() -> None:
        at_a_time = asyncio.Semaphore(slots)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: NullServer(latency_s, at_a_time), "127.0.0.1", port, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(work())


class Server:
    """A null server in a process of its own."""

    def __init__(self, *, latency_s: float = 0.0, slots: int = 10_000) -> None:
        self._options = (latency_s, slots)
        self.port = 0
        self.start()

    def start(self) -> None:
        """Starts it, the second time on the same port."""
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.port, *self._options), daemon=True)
        self._process.start()
        self.port = pipe.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextlib.contextmanager
def serving(*servers: Server) -> Iterator[tuple[Server, ...]]:
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


# --- clients ---

Call = Callable[[int], Awaitable[str]]


async def ask_all(call: Call, requests: int, concurrency: int = CONCURRENCY) -> float:
    """Seconds for so many requests, so many at a time; leaves if an answer is another request's."""
    numbers = iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            text = await call(number)
            if not text.endswith(f" {number}"):
                raise SystemExit(f"request {number} was answered by '{text}'")

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return time.perf_counter() - began


def pooled(*servers: Server, requests: int, concurrency: int = CONCURRENCY, most: int = CONCURRENCY) -> float:
    """Requests per second of a pool, each endpoint with at most `most` in flight."""

    async def work() -> float:
        endpoints = [Endpoint(base_url=one.base_url, model=MODEL, max_concurrency=most) for one in servers]
        pool = Pool(endpoints, timeout_s=60)
        await pool.start()
        try:

            async def call(number: int) -> str:
                return (await pool.ask(messages(number), temperature=0.7, max_tokens=100)).text

            await ask_all(call, 2 * concurrency, concurrency)
            return requests / await ask_all(call, requests, concurrency)
        finally:
            await pool.close()

    return asyncio.run(work())


def bare_aiohttp(server: Server, requests: int) -> float:
    """Requests per second of a loop over aiohttp."""
    import aiohttp

    async def work() -> float:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def call(number: int) -> str:
                body = {"model": MODEL, "messages": messages(number), "temperature": 0.7, "max_tokens": 100}
                async with session.post(f"{server.base_url}/chat/completions", json=body) as got:
                    answer = await got.json()
                return str(answer["choices"][0]["message"]["content"])

            await ask_all(call, 2 * CONCURRENCY)
            return requests / await ask_all(call, requests)

    return asyncio.run(work())


def bare_openai(server: Server, requests: int) -> float:
    """Requests per second of a loop over AsyncOpenAI."""
    import openai

    async def work() -> float:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:

            async def call(number: int) -> str:
                got = await client.chat.completions.create(
                    model=MODEL,
                    messages=messages(number),  # type: ignore[arg-type]
                    temperature=0.7,
                    max_tokens=100,
                )
                return str(got.choices[0].message.content)

            await ask_all(call, 2 * CONCURRENCY)
            return requests / await ask_all(call, requests)

    return asyncio.run(work())


# --- comparisons ---


def throughput(rounds: int, requests: int) -> list[Result]:
    with serving(Server()) as (server,):
        ours, aiohttp, openai = rounds_of(
            rounds,
            lambda: pooled(server, requests=requests),
            lambda: bare_aiohttp(server, requests),
            lambda: bare_openai(server, requests),
        )
    name = f"prompts: pool, {CONCURRENCY} in flight / bare"
    return [
        compared(f"{name} aiohttp", ours, aiohttp, AIOHTTP_TARGET, unit="req/s", more=True),
        compared(f"{name} AsyncOpenAI", ours, openai, OPENAI_TARGET, unit="req/s", more=True),
    ]


def fast_and_slow(rounds: int) -> Result:
    """Each alone and both, about 6 s each, with twice as many requests in flight as there are slots."""
    most, seconds = 2 * SLOTS, 6
    fast_count, slow_count = (int(seconds * SLOTS / latency_s) for latency_s in (FAST_S, SLOW_S))
    with serving(Server(latency_s=FAST_S, slots=SLOTS), Server(latency_s=SLOW_S, slots=SLOTS)) as (fast, slow):
        both, one, other = rounds_of(
            rounds,
            lambda: pooled(fast, slow, requests=fast_count + slow_count, concurrency=2 * most, most=most),
            lambda: pooled(fast, requests=fast_count, concurrency=most, most=most),
            lambda: pooled(slow, requests=slow_count, concurrency=most, most=most),
        )
    sums = [a + b for a, b in zip(one, other, strict=True)]
    return compared("prompts: a fast and a slow endpoint / their sum", both, sums, SUM_TARGET, unit="req/s", more=True)


def memory() -> Result:
    with serving(Server()) as (server,):
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_ask_many, args=(theirs, server.base_url), daemon=True)
        process.start()
        theirs.close()
        warm, end = pipe.recv()
        process.join()
    name = f"prompts: peak memory of {MANY:,} requests / of the first {WARM:,}"
    return compared(name, [end], [warm], 1 / GROWTH, unit="MB")


def _ask_many(pipe: Connection, base_url: str) -> None:
    async def work() -> tuple[float, float]:
        pool = Pool([Endpoint(base_url=base_url, model=MODEL)], timeout_s=60)
        await pool.start()

        async def call(number: int) -> str:
            return (await pool.ask(messages(number), temperature=0.7, max_tokens=100)).text

        await ask_all(call, WARM)
        warm = peak_mb()
        await ask_all(call, MANY - WARM)
        await pool.close()
        return warm, peak_mb()

    pipe.send(asyncio.run(work()))


def death() -> Result:
    with serving(*(Server(latency_s=DEATH_S) for _ in range(3))) as servers:
        answered = asyncio.run(_with_a_death(servers))
    name = "prompts: answered, one of three endpoints dies and comes back / asked"
    return compared(name, [answered], [DEATH_REQUESTS], 1.0, unit="req", more=True)


async def _with_a_death(servers: tuple[Server, ...]) -> int:
    """Requests that got their own answer. The dead endpoint has to answer again before the last one."""
    pool = Pool([Endpoint(base_url=one.base_url, model=MODEL) for one in servers], timeout_s=10, rest_s=DEATH_REST_S)
    await pool.start()
    answers: list[int] = []
    is_back = asyncio.Event()

    async def call(number: int) -> str:
        if len(answers) >= 2 * DEATH_REQUESTS // 3:
            await is_back.wait()
        text = (await pool.ask(messages(number))).text
        answers.append(number)
        if len(answers) == DEATH_REQUESTS // 3:
            servers[1].kill()
        if len(answers) == 2 * DEATH_REQUESTS // 3:
            await asyncio.to_thread(servers[1].start)
            await asyncio.sleep(DEATH_REST_S)
            is_back.set()
        return text

    await ask_all(call, DEATH_REQUESTS)
    totals = list(pool.totals().values())
    await pool.close()
    if totals[1]["state"] != "open" or not totals[1]["failures"]:
        raise SystemExit(f"the endpoint did not die and come back: {totals[1]}")
    if len(answers) != len(set(answers)):
        raise SystemExit("a request was answered twice")
    return len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the pool of LLM endpoints on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, every method once in each [%(default)s]")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of a method in a round [%(default)s]")
    options = parser.parse_args()
    print(table(measure(options.rounds, options.requests)))


if __name__ == "__main__":
    main()

"""A real OpenAI-compatible server on loopback, with faults by script; a thread of its own, for any client.

    with LlmServer() as server:
        server.script(status(500), text("a red house"))     # for the next chat requests, in this order
        server.always(hang())                               # for those after them
        server.die(); server.come_back()                    # on the same port
        server.requests                                     # bodies of the chat requests, as they came

Without a script an answer is `re: ` and the last message. HTTP is written by hand, so that it can be wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Play:
    """What a server does with one chat request.

    Attributes:
        content: of the answer's message; a function of the request; None for the server's own.
        fields: of the answer, in place of the right ones.
        body: in place of the whole answer.
        sent: share of the body after which the connection is closed.
        drip_s: pause before each byte of the body.
        is_hanging: nothing is ever sent.
        is_closing: the connection is closed at once.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content: str | Callable[[dict[str, Any]], str] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    finish: str = "stop"
    body: bytes | None = None
    sent: float = 1.0
    drip_s: float = 0.0
    is_hanging: bool = False
    is_closing: bool = False


def text(content: str, finish: str = "stop") -> Play:
    """An answer with this text: a refusal, several lines, nothing."""
    return Play(content=content, finish=finish)


def echo() -> Play:
    """The answer is the request's last message."""
    return Play(content=lambda request: request["messages"][-1]["content"])


def status(code: int, message: str = "no", *, retry_after: str | None = None) -> Play:
    """A status with an error body, and `Retry-After` where one is given: 429, 500, 400 and so on."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Play(status=code, headers=headers, body=json.dumps({"error": {"message": message}}).encode())


def error_body(message: str = "out of memory") -> Play:
    """200 with an error in it."""
    return Play(body=json.dumps({"error": {"message": message, "code": 500}}).encode())


def truncated_json() -> Play:
    """A whole HTTP answer whose json ends early."""
    return Play(body=b'{"id": "1", "choices": [{"message": {"role": "assistant", "content": "a red')


def half_body() -> Play:
    """The connection is closed in the middle of the body."""
    return Play(sent=0.5)


def no_choices() -> Play:
    return Play(fields={"choices": []})


def wrong_model(name: str = "another") -> Play:
    return Play(fields={"model": name})


def hang() -> Play:
    return Play(is_hanging=True)


def slow_drip(pause_s: float = 0.1) -> Play:
    """Bytes come one by one, each well within any time-out between bytes."""
    return Play(drip_s=pause_s)


def disconnect() -> Play:
    """The connection is closed without an answer."""
    return Play(is_closing=True)


class LlmServer:
    """A server in a thread.

    Args:
        model: the one it serves, and lists at /models.
        key: the bearer token it wants; None for any or none.
        models_status: of GET /models; its list is sent with 200 alone.
        latency_s: of an answer.
        slots: answers that are worked on at a time; others wait. None for any number.
        limit: requests at a time past which it says 429. None for any number.
        pushes_back: asked of every chat request, whether it says 429 to it; not asked where None.
        is_closing: whether every connection is closed behind an answer, without a word.

    Attributes:
        listed: names of models that it lists, in place of its own.
        requests: bodies of chat requests, in order.
        times: when each came, `time.monotonic()`.
        answered: answers with 200 that were sent whole.
        most_at_once: chat requests that were there at a time, at most.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        key: str | None = None,
        models_status: int = 200,
        latency_s: float = 0.0,
        slots: int | None = None,
        limit: int | None = None,
        pushes_back: Callable[[dict[str, Any]], bool] | None = None,
        is_closing: bool = False,
    ) -> None:
        self.model, self.key, self.models_status = model, key, models_status
        self.latency_s, self.limit = latency_s, limit
        self.pushes_back, self.is_closing = pushes_back, is_closing
        self.listed: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.answered = 0
        self.most_at_once = 0
        self._at_once = 0
        self._slots = None if slots is None else asyncio.Semaphore(slots)
        self._plays: deque[Play] = deque()
        self._always = Play()
        self._endings: dict[str, Play] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    # --- what it shall do ---

    def script(self, *plays: Play) -> None:
        """For the next chat requests, one each."""
        self._plays.extend(plays)

    def always(self, play: Play) -> None:
        """For every request that the script does not cover."""
        self._always = play

    def about(self, ending: str, play: Play) -> None:
        """For every request whose last message ends so, whatever the script says."""
        self._endings[ending] = play

    def contents(self) -> list[str]:
        """The last message of every chat request, in order."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def die(self) -> None:
        """Stops listening and breaks every connection."""
        self._do(self._stop())

    def come_back(self) -> None:
        """Listens again, on the same port."""
        self._do(self._listen())

    # --- life ---

    def __enter__(self) -> LlmServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for writer in self._writers:
            writer.transport.abort()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._answer(writer, method, path, headers, body) or self.is_closing:
                    break
        self._writers.discard(writer)
        writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> bool:
        """Answers one request; False if the connection ends with it."""
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return await self._send(writer, status(401, f"wrong key: {headers.get('authorization', 'none')}"), {})
        if (method, path) == ("GET", "/v1/models"):
            names = self.listed or [self.model]
            listed = json.dumps(
                {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
            ).encode()
            play = Play(body=listed) if self.models_status == 200 else status(self.models_status)
            return await self._send(writer, play, {})
        if (method, path) != ("POST", "/v1/chat/completions"):
            return await self._send(writer, status(404, f"no {path}"), {})
        request = json.loads(body)
        self.requests.append(request)
        self.times.append(time.monotonic())
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            said = str(request["messages"][-1]["content"]).rstrip("\"'. ")
            endings = [play for ending, play in self._endings.items() if said.endswith(ending)]
            play = endings[0] if endings else self._plays.popleft() if self._plays else self._always
            if self.limit is not None and self._at_once > self.limit:
                play = status(429, "too many at a time")
            elif self.pushes_back is not None and self.pushes_back(request):
                play = status(429, "too many")
            elif request["model"] != self.model:
                play = status(404, f"no model {request['model']}")
            else:
                await self._work()
            return await self._send(writer, play, request)
        finally:
            self._at_once -= 1

    async def _work(self) -> None:
        async with self._slots or contextlib.nullcontext():
            if self.latency_s:
                await asyncio.sleep(self.latency_s)

    async def _send(self, writer: asyncio.StreamWriter, play: Play, request: dict[str, Any]) -> bool:
        if play.is_hanging:
            await asyncio.Event().wait()
        if play.is_closing:
            return False
        body = play.body if play.body is not None else json.dumps(self._chat(play, request)).encode()
        lines = [f"HTTP/1.1 {play.status} -"]
        lines += [f"{name}: {value}" for name, value in {**JSON, "Content-Length": len(body), **play.headers}.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if play.drip_s:
            writer.write(head)
            for i in range(len(body)):
                writer.write(body[i : i + 1])
                await writer.drain()
                await asyncio.sleep(play.drip_s)
        else:
            writer.write(head + body[: round(play.sent * len(body))])
            await writer.drain()
        if play.sent < 1:
            return False
        self.answered += bool(request) and play.status == 200
        return True

    def _chat(self, play: Play, request: dict[str, Any]) -> dict[str, Any]:
        last = request["messages"][-1]["content"]
        content = play.content(request) if callable(play.content) else play.content
        content = f"re: {last}" if content is None else content
        words: Sequence[str] = content.split()
        return {
            "id": f"chat-{len(self.requests)}",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": self.model,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": play.finish}
            ],
            "usage": {
                "prompt_tokens": len(last.split()),
                "completion_tokens": len(words),
                "total_tokens": len(last.split()) + len(words),
            },
            **play.fields,
        }

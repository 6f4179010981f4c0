"""One chat request over HTTP: sends it, waits for the answer, and checks it against the protocol.

Decides what counts as an answer of an OpenAI-compatible server, and defines the classes of failure. Limits and the
choice between endpoints are in `builder.models.llm.pool`.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import json
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import orjson

from builder.errors import check_packages
from builder.progress import shortened

#: Most bytes read of an answer (a chat's has a few thousand), and of a list of models, which can be long.
MAX_BYTES, MAX_BYTES_LISTED = 2**20, 8 * 2**20
#: Seconds that an idle connection is kept: less than the 5 s after which uvicorn, and so vLLM, closes it.
_KEEP_ALIVE_S = 4.0
#: Seconds in which a live server accepts a connection; packets to a dead machine are lost without an error.
_CONNECT_S = 10.0
#: Longest pause that is taken from a server's `Retry-After`, seconds.
_MOST_SECONDS = 1e9
#: Bytes of a server's error text that are read.
_WORDS = 4000
#: Characters that are kept of a server's model name and of its message.
MAX_NAME, MAX_SAID = 200, 240
#: Tokens that a server can count beyond the bytes of a request: those of its chat template.
_FRAME_TOKENS = 4096
#: Types of the parts of a message's content that are text; others are thoughts, pictures and so on.
_TEXT_PARTS = ("text", "output_text")


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: the message's content, unchanged and not empty.
        model: the name that the server gives, printable and of at most MAX_NAME characters; the requested one if it
            gives none.
        endpoint: name of the endpoint that answered: its base_url.
        tokens_in, tokens_out: as the server counted them; None if it did not, or counted more than possible.
        ms: from sending to the last byte, of the answered attempt only.
    """

    text: str
    model: str
    endpoint: str
    tokens_in: int | None
    tokens_out: int | None
    ms: int


class AskFailed(Exception):
    """A request has no answer; `str()` says why, without secrets.

    Attributes:
        kind: `timeout`: no whole answer in time; `rate_limited`: 429; `server_error`: 5xx; `bad_reply`: not a valid
            answer; `unreachable`: no connection; `rejected`: another 4xx; `no_budget`: the budget is spent.
        status: the HTTP status; None if there was none or it was 200.
        retry_after: seconds that the server asks to wait.
        is_final: whether the same request would fail again, on any endpoint.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message
        self.status = status
        self.retry_after = retry_after
        self.is_final = is_final

    def __str__(self) -> str:
        return self.message


class Over(AskFailed):
    """The request has no answer, and no other request would get one: the request is not the cause.

    Attributes:
        kind: that of the last failure; `stopped` if the caller asked for it.
    """


def check_installed() -> None:
    """Raises StageError if aiohttp is not installed; imports nothing."""
    check_packages("aiohttp", extra="llm", needed_by="asking an LLM server")


class Http:
    """A session with any number of servers, for the event loop in which it is made.

    Args:
        timeout_s: seconds from sending to the last byte, including the connection.
        connect_s: seconds for connecting alone.

    Raises:
        StageError: aiohttp is not installed.
    """

    def __init__(self, timeout_s: float, connect_s: float = _CONNECT_S) -> None:
        check_installed()
        import aiohttp

        self._aiohttp = aiohttp
        self._timeout_s, self._connect_s = timeout_s, connect_s
        limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_s, ceil_threshold=float("inf"))
        self._kept, self._fresh = (
            aiohttp.ClientSession(connector=connector, timeout=limits, cookie_jar=aiohttp.DummyCookieJar())
            for connector in (_connector(), aiohttp.TCPConnector(limit=0, force_close=True))
        )

    async def close(self) -> None:
        await self._kept.close()
        await self._fresh.close()

    async def request(
        self, method: str, url: Any, headers: Mapping[str, str], body: bytes | None = None, most: int = MAX_BYTES
    ) -> tuple[int, Mapping[str, str], bytes]:
        """The status, headers and body of any answer.

        The server can close a kept connection at any time: a request that meets a closed one is sent once more, on a
        new connection.

        Args:
            most: most bytes of a body that are read.

        Raises:
            AskFailed: `timeout`, `unreachable`, or `bad_reply` if the body is longer, or does not end as announced.
        """
        aiohttp = self._aiohttp
        _IS_REUSED.set(True)
        for session in (self._kept, self._fresh):
            try:
                async with session.request(method, url, headers=headers, data=body, allow_redirects=False) as got:
                    parts, size = [], 0
                    async for part in got.content.iter_any():
                        parts.append(part)
                        size += len(part)
                        if size > most:
                            got.close()
                            raise AskFailed("bad_reply", f"the answer is longer than {most} bytes")
                    return got.status, got.headers, b"".join(parts)
            except aiohttp.ConnectionTimeoutError:
                raise AskFailed("unreachable", f"no connection within {self._connect_s:g} s") from None
            except TimeoutError:
                raise AskFailed("timeout", f"no whole answer within {self._timeout_s:g} s") from None
            except aiohttp.ClientConnectorError as error:
                why = getattr(error, "certificate_error", None) or error.os_error
                raise AskFailed("unreachable", f"no connection: {getattr(why, 'strerror', None) or why}") from None
            except aiohttp.ClientPayloadError:
                raise AskFailed("bad_reply", "the connection was closed within the answer") from None
            except aiohttp.ClientConnectionError:
                if not _IS_REUSED.get():
                    break
            except aiohttp.ClientError as error:
                raise AskFailed("bad_reply", f"the answer is not HTTP: {type(error).__name__}") from None
        raise AskFailed("unreachable", "the connection was closed before an answer")


#: Whether the last connection of this task had been used before.
_IS_REUSED: ContextVar[bool] = ContextVar("is_reused", default=False)


def _connector() -> Any:
    """Keeps connections for a while, and records for each request whether it got a kept one.

    aiohttp's tracing reports this too, but takes a quarter of the time of a request.
    """
    import aiohttp

    class Connector(aiohttp.TCPConnector):
        async def _create_connection(self, *args: Any, **named: Any) -> Any:
            _IS_REUSED.set(False)
            return await super()._create_connection(*args, **named)

    return Connector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)


def read_status(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raises AskFailed for any status but 200, with the server's own words."""
    if status == 200:
        return
    words = said(body)
    message = f"status {status}: {words}" if words else f"status {status}"
    retry_after = read_retry_after(headers.get("Retry-After"))
    if status == 402 or (status == 429 and _is_out_of_quota(body)):
        raise AskFailed("no_budget", message, status=402)
    if status == 429:
        raise AskFailed("rate_limited", message, status=status, retry_after=retry_after)
    if status == 408:
        raise AskFailed("timeout", message, status=status)
    if 400 <= status < 500:
        raise AskFailed("rejected", message, status=status, is_final=status not in (401, 403, 404))
    raise AskFailed("server_error", message, status=status, retry_after=retry_after)


def read_retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which gives seconds or a date (RFC 9110, 10.2.3); None if it is neither.

    It can be very long: the caller limits it.
    """
    if value is None:
        return None
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", value):
        return min(float(value), _MOST_SECONDS)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def said(body: bytes) -> str:
    """The server's error text on one line; the message in its json, if it has one."""
    text = body[:_WORDS].decode("utf-8", "replace")
    data = _read_json(body)
    if isinstance(data, dict):
        error = data.get("error", data)
        found = [error.get(key) for key in ("message", "detail", "code")] if isinstance(error, dict) else [error]
        text = next((value if isinstance(value, str) else json.dumps(value) for value in found if value), text)
    return shown_text(text, _WORDS)


def _is_out_of_quota(body: bytes) -> bool:
    """Whether an error's code says that an account has no credit left: OpenAI sends it with 429."""
    data = _read_json(body)
    error = data.get("error", data) if isinstance(data, dict) else None
    return isinstance(error, dict) and "insufficient_quota" in (error.get("code"), error.get("type"))


def shown_text(text: str, most: int) -> str:
    """A server's text for people: printable, on one line, of at most `most` characters."""
    clean = text[: 4 * most]
    if not clean.isprintable():
        clean = "".join(char if char.isprintable() else " " for char in clean)
    return shortened(" ".join(clean.split()), most)


def _read_json(body: bytes) -> Any:
    """The value of a json text; None if it is not json.

    Servers also write NaN and Infinity, which json does not have: `json` reads them.
    """
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(body)
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # refuses half characters, which no column or file can hold
    except (ValueError, RecursionError):
        return None
    return value


def model_in(body: bytes) -> str | None:
    """The model that an answer names, or None."""
    data = _read_json(body)
    return _name(data.get("model")) if isinstance(data, dict) else None


def read_reply(
    body: bytes, *, asked: str, endpoint: str, ms: int, is_exact: bool = False, most: tuple[int, int] | None = None
) -> Reply:
    """The answer in the body of a 200.

    Another attempt does not help if an answer is cut (`finish_reason` "length") or held back by a filter of the server;
    every other failure may be temporary.

    Args:
        asked: the requested model.
        is_exact: whether an answer of another model is refused; `Reply.model` names it.
        most: bytes of the request, and most tokens of the answer: larger counts of the server are wrong.

    Raises:
        AskFailed: `bad_reply`: not json, an error in it, no choice, no text, a cut text, another model.
    """
    data = _read_json(body)
    if data is None:
        raise AskFailed("bad_reply", f"the answer is not json: {said(body) or 'empty'}")
    if not isinstance(data, dict) or data.get("error"):
        raise AskFailed("bad_reply", f"the answer is an error: {said(body)}")
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise AskFailed("bad_reply", "the answer has no choice with a message")
    model = _name(data.get("model")) or asked
    if is_exact and not is_same_model(asked, model):
        raise AskFailed("bad_reply", f"the answer is of model '{model}', not of '{asked}'")
    tokens_in, tokens_out = _tokens(data.get("usage"), len(body), most)
    if choice.get("finish_reason") == "length":
        raise AskFailed("bad_reply", "the answer is cut: 'max_tokens' is too small", is_final=True)
    if choice.get("finish_reason") == "content_filter":
        raise AskFailed("bad_reply", "a content filter of the server held the answer back", is_final=True)
    text = _text(message.get("content"))
    if not text.strip():
        raise AskFailed("bad_reply", "the answer is empty")
    return Reply(text, model, endpoint, tokens_in, tokens_out, ms)


def read_usage(body: bytes, most: tuple[int, int]) -> tuple[int | None, int | None]:
    """Tokens of request and answer, as in `read_reply`."""
    data = _read_json(body)
    return _tokens(data.get("usage") if isinstance(data, dict) else None, len(body), most)


def _name(value: Any) -> str | None:
    return shown_text(value, MAX_NAME) or None if isinstance(value, str) else None


def _text(content: Any) -> str:
    """The text of a message, which is a string, or a list of parts of which some are text; empty if there is none."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict) and part.get("type") in _TEXT_PARTS)
    return "".join(text for text in texts if isinstance(text, str))


def _tokens(usage: Any, size: int, most: tuple[int, int] | None) -> tuple[int | None, int | None]:
    """Tokens of request and answer as the server counts them; None if it does not, or counts more than possible.

    A token of text has at least one byte; there are at most as many hidden tokens as the request allowed.
    """
    bytes_in, most_out = most or (2**31, 2**31)
    counts = usage if isinstance(usage, dict) else {}
    tokens_in = _count(counts.get("prompt_tokens"), bytes_in + _FRAME_TOKENS)
    return tokens_in, _count(counts.get("completion_tokens"), max(most_out, size))


def _count(value: Any, most: int) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= min(most, 2**31 - 1)
    return value if is_count else None


@functools.lru_cache
def is_same_model(asked: str, said: str) -> bool:
    """Whether a server that says `said` serves the model `asked`.

    It does if the names are equal; if one is the end of the other's path (`org/name`, `/models/name`, `./name`); or if
    the server adds a version to the name: a date or number (`gpt-4o-2024-08-06` for `gpt-4o`), also in place of
    `latest`, Ollama's `:latest`, or a revision (transformers' `llama@main`). Case is ignored.
    """
    ours, theirs = _parts(asked), _parts(said)
    shared = min(len(ours), len(theirs))
    if shared == 0 or ours[-shared:-1] != theirs[-shared:-1]:
        return False
    name, found = ours[-1].removesuffix(":latest"), theirs[-1].removesuffix(":latest")
    if name == found:
        return True
    rest = found.removeprefix(name.removesuffix("-latest"))
    return rest != found and re.fullmatch(r"-(\d{4}-\d\d-\d\d|\d{3,8}|latest)|@[\w.-]+", rest) is not None


def _parts(model: str) -> list[str]:
    return [part for part in model.casefold().split("/") if part not in ("", ".")]

"""One chat request over HTTP: sent, waited for, and its answer held to the protocol.

Owns what counts as an answer of an OpenAI-compatible server, and the classes of failure. Knows no limits and no choice
between endpoints: see `builder.models.endpoints`.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from builder.errors import missing_extra

#: Bytes of an answer that are read; a chat answer has some thousand.
MAX_BYTES = 8 * 2**20
#: Seconds that an idle connection is kept: less than the 5 s after which uvicorn, and so vLLM, closes it.
_KEEP_ALIVE_S = 4.0
#: Seconds in which a server that is there takes a connection; packets to a machine that is gone are lost in silence.
_CONNECT_S = 10.0
#: Bytes of a server's own words that are looked at where they are no json.
_WORDS = 4000


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: the message's content as it came, not empty.
        model: what the server says it is; the one asked for where it says nothing.
        endpoint: name of the endpoint that answered: its base_url.
        tokens_in, tokens_out: as the server counted them; None where it did not.
        ms: from sending to the last byte, the attempt that was answered alone.
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
        kind: `timeout`: no whole answer in time; `rate_limited`: 429; `server_error`: 5xx; `bad_reply`: an answer that
            is none; `unreachable`: no connection; `rejected`: another 4xx; `no_budget`: what may be spent is spent.
        status: the HTTP status, None where there was none or where it was 200.
        retry_after: seconds that the server asks to wait.
        is_final: the same request would fail again, on any endpoint.
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
    """The request has no answer, and no other one will have: it says nothing of the request.

    Attributes:
        kind: that of the last failure; `stopped` where the caller asked for it.
    """


class Http:
    """A session to any number of servers, for the event loop in which it is made.

    Args:
        timeout_s: seconds from sending, connecting included, to the last byte.
        connect_s: seconds for connecting alone.

    Raises:
        StageError: aiohttp is not installed.
    """

    def __init__(self, timeout_s: float, connect_s: float = _CONNECT_S) -> None:
        try:
            import aiohttp
        except ImportError as error:
            raise missing_extra("aiohttp", "llm", "asking an LLM server") from error
        self._aiohttp = aiohttp
        self._timeout_s, self._connect_s = timeout_s, connect_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_s, ceil_threshold=float("inf")),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()

    async def request(
        self, method: str, url: Any, headers: Mapping[str, str], body: bytes | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """The status, headers and body of an answer, whatever it says.

        Raises:
            AskFailed: `timeout`, `unreachable`, or `bad_reply` where the body does not end as announced.
        """
        aiohttp = self._aiohttp
        try:
            async with self._session.request(method, url, headers=headers, data=body, allow_redirects=False) as got:
                parts, size = [], 0
                async for part in got.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    if size > MAX_BYTES:
                        got.close()
                        raise AskFailed("bad_reply", f"the answer is longer than {MAX_BYTES} bytes")
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
            raise AskFailed("unreachable", "the connection was closed before an answer") from None
        except aiohttp.ClientError as error:
            raise AskFailed("bad_reply", f"the answer is not HTTP: {type(error).__name__}") from None


def read_status(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raises AskFailed for any status but 200, with the server's own words."""
    if status == 200:
        return
    words = said(body)
    message = f"status {status}: {words}" if words else f"status {status}"
    retry_after = read_retry_after(headers.get("Retry-After"))
    if status == 402 or (status == 429 and b"insufficient_quota" in body):
        raise AskFailed("no_budget", message, status=402)
    if status == 429:
        raise AskFailed("rate_limited", message, status=status, retry_after=retry_after)
    if status == 408:
        raise AskFailed("timeout", message, status=status)
    if 400 <= status < 500:
        raise AskFailed("rejected", message, status=status, is_final=status not in (401, 403, 404))
    raise AskFailed("server_error", message, status=status, retry_after=retry_after)


def read_retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which gives seconds or a date (RFC 9110, 10.2.3); None where it is neither."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def said(body: bytes) -> str:
    """What the server says of an error, on one line; its json's message where there is one."""
    text = body[:_WORDS].decode("utf-8", "replace")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = None
    if isinstance(data, dict):
        error = data.get("error", data)
        found = [error.get(key) for key in ("message", "detail", "code")] if isinstance(error, dict) else [error]
        text = next((str(value) for value in found if value), text)
    return " ".join(text.split())


def other_model(body: bytes, asked: str) -> str | None:
    """The model that an answer is of, where that is not the one that was asked for."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    said_ = data.get("model") if isinstance(data, dict) else None
    return said_ if isinstance(said_, str) and said_ and not is_same_model(asked, said_) else None


def read_reply(body: bytes, *, asked: str, endpoint: str, ms: int) -> Reply:
    """The answer in the body of a 200.

    A cut answer (`finish_reason` "length") and one that a filter of the server has held back are failures that no
    other attempt would mend; everything else that is no answer may be the server's fault of the moment.

    Args:
        asked: the model that was asked for.

    Raises:
        AskFailed: `bad_reply`: no json, an error in it, no choice, no text, a cut text, another model.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise AskFailed("bad_reply", f"the answer is no json: {said(body) or 'empty'}") from None
    if not isinstance(data, dict) or data.get("error"):
        raise AskFailed("bad_reply", f"the answer is an error: {said(body)}")
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise AskFailed("bad_reply", "the answer has no choice with a message")
    model = data.get("model") or asked
    if not isinstance(model, str) or not is_same_model(asked, model):
        raise AskFailed("bad_reply", f"the answer is of model '{model}', not of '{asked}'")
    usage = data.get("usage")
    tokens_in, tokens_out = (_count(usage, key) for key in ("prompt_tokens", "completion_tokens"))
    if choice.get("finish_reason") == "length":
        raise AskFailed("bad_reply", "the answer is cut: 'max_tokens' is too small", is_final=True)
    if choice.get("finish_reason") == "content_filter":
        raise AskFailed("bad_reply", "a content filter of the server held the answer back", is_final=True)
    text = message.get("content")
    if not isinstance(text, str) or not text.strip():
        raise AskFailed("bad_reply", "the answer is empty")
    return Reply(text, model, endpoint, tokens_in, tokens_out, ms)


def _count(usage: Any, key: str) -> int | None:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def is_same_model(asked: str, said: str) -> bool:
    """Whether a server that says `said` serves the model `asked`.

    It does if the names are equal; if one is the end of the other's path (`org/name`, `/models/name`, `./name`); and if
    the server adds what it has chosen to the name: a date or number of a version (`gpt-4o-2024-08-06` for `gpt-4o`),
    also in place of `latest`, Ollama's `:latest`, or a revision (`llama@main`, by transformers). Case does not count.
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

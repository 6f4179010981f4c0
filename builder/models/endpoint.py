"""One OpenAI-compatible endpoint: what a pipeline says of it, and its limits, state and counts while it is used.

Owns when an endpoint may be sent a request, and what answers and failures change in that. Knows no other endpoint.

An endpoint is *open*, or it is *paused* (it said 429: for as long as it asks), *resting* (it failed several times in a
row: for a fixed time, and again until it answers a request for one token) or *closed* (it refused the key or the model,
or its budget is spent: for good).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson
from pydantic import Field, ValidationInfo, field_validator
from pydantic.config import JsonDict

from builder.config import Strict
from builder.errors import StageError
from builder.models.chat import AskFailed, Http, Reply, is_same_model, other_model, read_status
from builder.models.limits import Bucket, Concurrency

#: Seconds of the first pause where a server does not say how long; doubled for each further one, up to the other.
BACK_OFF_S, LONGEST_BACK_OFF_S = 0.25, 30.0
#: Bytes of English text a token, as OpenAI states for its own models: "about 4 characters".
_BYTES_A_TOKEN = 4
#: Characters of what a server says, in a message.
_LONGEST_TEXT = 240
_SAME_ANSWER: JsonDict = {"decides": False}


class Endpoint(Strict):
    """A server with the OpenAI chat API, and how it may be used."""

    #: As a client of OpenAI takes it, mostly ending in /v1: "http://127.0.0.1:8000/v1".
    base_url: str = Field(json_schema_extra=_SAME_ANSWER)
    #: The model to ask for.
    model: str = Field(min_length=1)
    #: Name of the environment variable that holds the key.
    api_key_env: str | None = Field(default=None, min_length=1, json_schema_extra=_SAME_ANSWER)
    #: Most requests in flight; how many there are adapts below it. A run's workers share this and all limits here.
    max_concurrency: int = Field(default=64, ge=1, json_schema_extra=_SAME_ANSWER)
    #: Requests a minute, in a steady flow.
    requests_per_minute: float | None = Field(default=None, gt=0, json_schema_extra=_SAME_ANSWER)
    #: Tokens a minute, of requests and answers together.
    tokens_per_minute: float | None = Field(default=None, gt=0, json_schema_extra=_SAME_ANSWER)
    #: A lower tier is used only where every endpoint of the higher ones is at its limits or does not answer.
    tier: Literal["free", "local", "paid"] = Field(default="local", json_schema_extra=_SAME_ANSWER)
    #: Price of a million tokens of requests and of answers, in any currency.
    price_in: float | None = Field(default=None, ge=0, json_schema_extra=_SAME_ANSWER)
    price_out: float | None = Field(default=None, ge=0, json_schema_extra=_SAME_ANSWER)
    #: What may be spent here, in the same currency; what no answer tells is counted at its most.
    budget: float | None = Field(default=None, gt=0, json_schema_extra=_SAME_ANSWER)

    def share(self, workers: int) -> Endpoint:
        """What one of several processes may take of it.

        Raises:
            StageError: each of them needs one request at a time, and that is more than `max_concurrency`.
        """
        if workers > self.max_concurrency:
            raise StageError(
                f"endpoint '{self.base_url}' takes {self.max_concurrency} requests at a time, "
                "fewer than the run has workers",
                where={"workers": workers},
                fix="workers = 1 in [stages.prompts.run]: one keeps all servers busy",
            )
        limits = {name: getattr(self, name) for name in ("requests_per_minute", "tokens_per_minute", "budget")}
        parts: dict[str, Any] = {name: limit / workers for name, limit in limits.items() if limit is not None}
        return self.model_copy(update={**parts, "max_concurrency": self.max_concurrency // workers})

    @field_validator("base_url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        if not is_address(value):
            raise ValueError('no address such as "http://127.0.0.1:8000/v1"')
        parts = urlsplit(value)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("it holds more than an address; a key belongs into the variable that api_key_env names")
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError('leave out "/chat/completions"')
        return value.rstrip("/")

    @field_validator("budget")
    @classmethod
    def _has_prices(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and None in (info.data.get("price_in"), info.data.get("price_out")):
            raise ValueError("a budget needs price_in and price_out")
        return value


def is_address(url: str) -> bool:
    """Whether a text is the address of a server, with a port or without one."""
    try:
        parts = urlsplit(url)
        _ = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[\s\x00-\x1f]", url)


@dataclass(frozen=True)
class Cost:
    """What a request may take. Bytes bound the tokens of a text from above: a token has at least one."""

    bytes_in: int
    most_out: int

    def tokens(self, mean_out: float | None) -> float:
        """Tokens that are likely, `mean_out` of them in the answer."""
        return self.bytes_in / _BYTES_A_TOKEN + min(self.most_out, self.most_out if mean_out is None else mean_out)


@dataclass(eq=False)
class Request:
    """One `ask` on its way.

    Attributes:
        is_next: whether it goes before others that wait.
        tried: endpoints that have failed it.
        attempts: how often it failed, being pushed back not counted.
        pushed_back: when it was pushed back for the first time.
    """

    messages: list[dict[str, str]]
    body: dict[str, Any]
    cost: Cost
    is_next: bool = False
    tried: list[Served] = field(default_factory=list)
    attempts: int = 0
    pushed_back: float | None = None


class Served:
    """An endpoint at work: its limits, its state and its counts."""

    def __init__(self, endpoint: Endpoint, name: str, now: float) -> None:
        self.endpoint = endpoint
        self.name = name
        self.key = _read_key(endpoint)
        self.headers = {"Content-Type": "application/json"}
        if self.key is not None:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.concurrency = Concurrency(endpoint.max_concurrency)
        rates = (endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._requests, self._tokens = (None if rate is None else Bucket(rate, now) for rate in rates)
        #: The kind of failure for which it is used no more.
        self.closed: str | None = None
        self.is_resting = False
        self._paused_until = 0.0
        self._failed_in_row = 0
        self._pushed_in_row = 0
        self._pending = 0.0
        self._spent = 0.0
        self._mean_out: float | None = None
        self.asked = 0
        self._answered = 0
        self._ms = 0
        self._rests = 0
        self._tokens_in = 0
        self._tokens_out = 0
        self._failures: Counter[str] = Counter()

    def is_open(self, now: float) -> bool:
        return self.closed is None and not self.is_resting and now >= self._paused_until

    def opens(self) -> float:
        """When it is worth trying, which may be past; infinite if it is closed."""
        return float("inf") if self.closed else self._paused_until

    def wait(self, cost: Cost, now: float) -> float:
        """Seconds until a request may be sent; 0 if now, infinite if that hangs on the end of another or of a rest."""
        if self.closed is not None or self.is_resting:
            return float("inf")
        if now < self._paused_until:
            return self._paused_until - now
        if not self.concurrency.has_room:
            return float("inf")
        if self.endpoint.budget is not None and self._spent + self._pending + self._most(cost) > self.endpoint.budget:
            return float("inf")
        waits = [0.0]
        if self._requests is not None:
            waits.append(self._requests.wait(1, now))
        if self._tokens is not None:
            waits.append(self._tokens.wait(cost.tokens(self._mean_out), now))
        return max(waits)

    def is_spent(self, cost: Cost) -> bool:
        """Whether the budget has no room for a request, and will have none: nothing is under way."""
        budget = self.endpoint.budget
        return budget is not None and not self._pending and self._spent + self._most(cost) > budget

    def _most(self, cost: Cost) -> float:
        return self._price(cost.bytes_in, cost.most_out)

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * (self.endpoint.price_in or 0) + tokens_out * (self.endpoint.price_out or 0)) / 1e6

    def begin(self, request: Request) -> float:
        """Counts a request as sent; returns the tokens that were taken for it."""
        self.asked += 1
        self.concurrency.in_flight += 1
        self._pending += self._most(request.cost)
        taken = request.cost.tokens(self._mean_out)
        if self._requests is not None:
            self._requests.take(1)
        if self._tokens is not None:
            self._tokens.take(taken)
        return taken

    def end(self, request: Request) -> None:
        """Counts a request as no longer under way, whatever came of it."""
        self.concurrency.in_flight -= 1
        self._pending -= self._most(request.cost)
        if not self.concurrency.in_flight:
            self._pending = 0.0  # what floating point numbers leave

    def answered(self, request: Request, reply: Reply, taken: float) -> None:
        """Takes note of an answer, for whose request `taken` tokens were taken."""
        self._answered += 1
        self._ms += reply.ms
        self.concurrency.increase()
        self._pushed_in_row = 0
        if reply.tokens_in is None or reply.tokens_out is None:
            self._spent += self._most(request.cost)
        else:
            self._tokens_in += reply.tokens_in
            self._tokens_out += reply.tokens_out
            self._spent += self._price(reply.tokens_in, reply.tokens_out)
            mean = self._mean_out
            self._mean_out = reply.tokens_out if mean is None else mean + 0.1 * (reply.tokens_out - mean)
            if self._tokens is not None:
                self._tokens.take(reply.tokens_in + reply.tokens_out - taken)
        self._failed_in_row = 0

    def failed(
        self, request: Request, error: AskFailed, sent: float, now: float, *, rest_after: int, rest_s: float
    ) -> str | None:
        """Takes note of a failure; returns what there is to tell."""
        self._failures[error.kind] += 1
        if error.kind in ("timeout", "bad_reply"):
            self._spent += self._most(request.cost)  # nobody knows what the server has done
        is_first = error.status in (429, 503) or error.kind == "timeout"
        is_first = is_first and self.concurrency.decrease(sent, now)
        if is_pushed_back(error):
            self._pushed_in_row += is_first
            pause = error.retry_after or 0.0
            if self._pushed_in_row > 1:  # a lower limit alone did not help
                pause = max(pause, min(BACK_OFF_S * 2.0 ** (self._pushed_in_row - 2), LONGEST_BACK_OFF_S))
            self._paused_until = max(self._paused_until, now + pause)
            self._failed_in_row = 0
            return None
        if error.status in (401, 402, 404):
            return self.close("no_budget" if error.status == 402 else "rejected", str(error))
        if error.status == 403:  # of a filter for one request, or of the endpoint for all
            self._failed_in_row += 1
            return self.close("rejected", str(error)) if self._failed_in_row >= rest_after else None
        self._failed_in_row = 0 if error.is_final else self._failed_in_row + 1
        if self._failed_in_row >= rest_after and not self.is_resting:
            return self.rest(str(error), now, rest_s)
        return None

    def rest(self, why: str, now: float, rest_s: float) -> str:
        self.is_resting = True
        self._rests += 1
        self._paused_until = max(self._paused_until, now + rest_s)
        return f"{self.name} rests for {rest_s:g} s: {why}"

    def wake(self) -> str:
        self.is_resting = False
        self._failed_in_row = 0
        return f"{self.name} answers again"

    def close(self, kind: str, why: str) -> str | None:
        if self.closed is not None:
            return None
        self.closed = kind
        return f"{self.name} is used no more: {why}"

    def told(self, text: str) -> str:
        """A text for people: without the key, and short."""
        text = text if self.key is None else text.replace(self.key, "***")
        return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."

    def totals(self) -> dict[str, Any]:
        return {
            "model": self.endpoint.model,
            "requests": self.asked,
            "answers": self._answered,
            "ms": self._ms,
            "rests": self._rests,
            "failures": dict(sorted(self._failures.items())),
            "tokens_in": self._tokens_in,
            "tokens_out": self._tokens_out,
            "spent": self._spent,
            "limit": self.concurrency.limit,
            "state": "closed" if self.closed else "resting" if self.is_resting else "open",
        }


def _read_key(endpoint: Endpoint) -> str | None:
    name = endpoint.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise StageError(
            f"environment variable '{name}' is not set, which endpoint '{endpoint.base_url}' needs",
            fix=f"put the key into it: export {name}=...",
        )
    return key


def is_pushed_back(error: AskFailed) -> bool:
    """Whether the server takes the request, only not now."""
    return error.status == 429 or (error.status == 503 and error.retry_after is not None)


async def check(one: Served, http: Http) -> str:
    """Why an endpoint does not answer; empty if it does, takes its key and has its model.

    It is asked for its list of models. Where it gives none, and where there is a key (lists are often public), it is
    asked for an answer of one token.

    Raises:
        StageError: the key is refused, or the model unknown.
    """
    models = None
    url = one.endpoint.base_url
    try:
        # Some servers close the connection after an error, and the next request shall not meet that.
        once = {**one.headers, "Connection": "close"}
        status, headers, body = await http.request("GET", f"{url}/models", once)
        if status in (401, 403):
            read_status(status, headers, body)
        models = _listed(body) if status == 200 else None
    except AskFailed as error:
        if error.status is not None:
            raise _refused(one, error) from None
        if error.kind in ("unreachable", "timeout"):
            return one.told(str(error))
    if models is not None and not any(is_same_model(one.endpoint.model, name) for name in models):
        raise _unknown_model(one, {"its models": ", ".join(models[:20]) or "none"}, "set 'model' to one that it has")
    if models is not None and one.key is None:
        return ""
    failure = await say_hello(one, http)
    return failure if models is None else ""


async def say_hello(one: Served, http: Http) -> str:
    """Why an endpoint does not answer a request for one token; empty if it does, or would take another request.

    Raises:
        StageError: the key is refused, or the model unknown.
    """
    message = {"role": "user", "content": "Hello"}
    content = orjson.dumps({"model": one.endpoint.model, "messages": [message], "max_tokens": 1})
    try:
        url = f"{one.endpoint.base_url}/chat/completions"
        status, headers, body = await http.request("POST", url, one.headers, content)
        read_status(status, headers, body)
        if (other := other_model(body, one.endpoint.model)) is not None:
            raise _unknown_model(one, {"it answers as": one.told(other)}, "set 'model' to that name")
    except AskFailed as error:
        if error.status in (401, 402, 403, 404):
            raise _refused(one, error) from None
        if error.kind not in ("rate_limited", "rejected"):
            return one.told(str(error))
    return ""


def _refused(one: Served, error: AskFailed) -> StageError:
    where = {"it says": one.told(str(error))}
    name = one.endpoint.api_key_env
    if error.status == 404:
        return _unknown_model(one, where, "mend 'model', or 'base_url', which mostly ends in /v1")
    if error.status == 402:
        return StageError(f"endpoint '{one.name}' wants to be paid", where=where, fix="pay, or leave it out")
    if name is None:
        fix = 'name the environment variable that holds it: api_key_env = "..."'
        return StageError(f"endpoint '{one.name}' wants a key", where=where, fix=fix)
    fix = f"put a valid key into the environment variable '{name}'"
    return StageError(f"endpoint '{one.name}' refuses the key", where=where, fix=fix)


def _unknown_model(one: Served, where: dict[str, str], fix: str) -> StageError:
    return StageError(f"endpoint '{one.name}' has no model '{one.endpoint.model}'", where=where, fix=fix)


def _listed(body: bytes) -> list[str] | None:
    """Names of models in the answer to GET /models; None where it is no such list."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    items = data.get("data") if isinstance(data, dict) else None
    if not isinstance(items, list):
        return None
    names = [item.get("id") if isinstance(item, dict) else None for item in items]
    return [name for name in names if isinstance(name, str)]

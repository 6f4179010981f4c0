"""A pool of OpenAI-compatible chat endpoints: each request goes where there is room, and comes back answered or failed.

Owns which endpoint is asked, when, and how often. Knows nothing of prompts: what an answer is worth, its caller says.

An endpoint is *open*, or it is *paused* (it said 429: for as long as it asks), *resting* (it failed several times in a
row: for a fixed time, after which one request probes it) or *closed* (it refused the key or the model, or its budget is
spent: for good). Everything happens in one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson
from pydantic import Field, field_validator, model_validator
from pydantic.config import JsonDict

from builder.config import Strict
from builder.errors import StageError
from builder.models.chat import AskFailed, Http, Reply, is_same_model, read_reply, read_status
from builder.models.limits import Bucket, Concurrency

__all__ = ["AskFailed", "Endpoint", "Pool", "Reply"]

TIERS = ("free", "local", "paid")
#: Seconds before a second attempt where there is no other endpoint; doubled for each further one, up to `_LONGEST_S`.
_BACK_OFF_S, _LONGEST_S = 0.25, 30.0
#: Tokens of an answer where neither the request nor an answer before says.
_TOKENS_OUT = 1024
#: Bytes of English text a token, as OpenAI states for its own models: "about 4 characters".
_BYTES_A_TOKEN = 4
#: Notices that are kept where nobody takes them.
_NOTICES = 1000
_SAME_ANSWER: JsonDict = {"decides": False}


class Endpoint(Strict):
    """A server with the OpenAI chat API, and how it may be used."""

    #: As a client of OpenAI takes it, mostly ending in /v1: "http://127.0.0.1:8000/v1".
    base_url: str = Field(json_schema_extra=_SAME_ANSWER)
    #: The model to ask for.
    model: str = Field(min_length=1)
    #: Name of the environment variable that holds the key.
    api_key_env: str | None = Field(default=None, min_length=1, json_schema_extra=_SAME_ANSWER)
    #: Most requests in flight; how many there are adapts below it.
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
    #: What may be spent here by one worker, in the same currency.
    budget: float | None = Field(default=None, gt=0, json_schema_extra=_SAME_ANSWER)

    @field_validator("base_url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError('no address such as "http://127.0.0.1:8000/v1"')
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("it holds more than an address; a key belongs into the variable that api_key_env names")
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError('leave out "/chat/completions"')
        return value.rstrip("/")

    @model_validator(mode="after")
    def _has_prices(self) -> Endpoint:
        if self.budget is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("a budget needs price_in and price_out")
        return self


@dataclass(frozen=True)
class _Cost:
    """What a request may take. Bytes bound the tokens of a text from above: a token has at least one."""

    bytes_in: int
    most_out: int

    def tokens(self, mean_out: float | None) -> float:
        """Tokens that are likely, `mean_out` of them in the answer."""
        return self.bytes_in / _BYTES_A_TOKEN + min(self.most_out, self.most_out if mean_out is None else mean_out)


@dataclass(eq=False)
class _Request:
    """One `ask` on its way.

    Attributes:
        tried: endpoints that have failed it.
        attempts: how often it failed, being pushed back not counted.
        pushed_back: when it was pushed back for the first time.
    """

    messages: list[dict[str, str]]
    body: dict[str, Any]
    cost: _Cost
    tried: list[_Served] = field(default_factory=list)
    attempts: int = 0
    pushed_back: float | None = None


class _Served:
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
        #: The one request that may end a rest.
        self._probe: _Request | None = None
        self._failed_in_row = 0
        self._pushed_in_row = 0
        self._pending = 0.0
        self._spent = 0.0
        self._mean_out: float | None = None
        self.asked = 0
        self._answered = 0
        self._tokens_in = 0
        self._tokens_out = 0
        self._failures: Counter[str] = Counter()

    def is_open(self, now: float) -> bool:
        return self.closed is None and not self.is_resting and now >= self._paused_until

    def opens(self) -> float:
        """When it is worth trying again; infinite if it is closed, or tried at this moment."""
        return float("inf") if self.closed or self._probe else self._paused_until

    def wait(self, cost: _Cost, now: float) -> float:
        """Seconds until a request may be sent; 0 if now, infinite if that hangs on the end of another."""
        if self.closed is not None:
            return float("inf")
        if now < self._paused_until:
            return self._paused_until - now
        if not self.concurrency.has_room or (self.is_resting and self._probe is not None):
            return float("inf")
        if self.endpoint.budget is not None and self._spent + self._pending + self._most(cost) > self.endpoint.budget:
            return float("inf")
        waits = [0.0]
        if self._requests is not None:
            waits.append(self._requests.wait(1, now))
        if self._tokens is not None:
            waits.append(self._tokens.wait(cost.tokens(self._mean_out), now))
        return max(waits)

    def is_spent(self, cost: _Cost) -> bool:
        """Whether the budget has no room for a request, and will have none: nothing is under way."""
        budget = self.endpoint.budget
        return budget is not None and not self._pending and self._spent + self._most(cost) > budget

    def _most(self, cost: _Cost) -> float:
        return self._price(cost.bytes_in, cost.most_out)

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * (self.endpoint.price_in or 0) + tokens_out * (self.endpoint.price_out or 0)) / 1e6

    def begin(self, request: _Request) -> float:
        """Counts a request as sent; returns the tokens that were taken for it."""
        self.asked += 1
        self.concurrency.in_flight += 1
        self._pending += self._most(request.cost)
        if self.is_resting:
            self._probe = request
        taken = request.cost.tokens(self._mean_out)
        if self._requests is not None:
            self._requests.take(1)
        if self._tokens is not None:
            self._tokens.take(taken)
        return taken

    def end(self, request: _Request) -> None:
        """Counts a request as no longer under way, whatever came of it."""
        self.concurrency.in_flight -= 1
        self._pending -= self._most(request.cost)
        if not self.concurrency.in_flight:
            self._pending = 0.0  # what floating point numbers leave
        if self._probe is request:
            self._probe = None

    def answered(self, request: _Request, reply: Reply, taken: float) -> bool:
        """Takes note of an answer; True if it ends a rest."""
        self._answered += 1
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
        return self._is_alive(request)

    def _is_alive(self, request: _Request) -> bool:
        """The server works; True if that ends a rest, which only the probe does."""
        if self.is_resting and self._probe is not request:
            return False
        was_resting, self.is_resting = self.is_resting, False
        self._failed_in_row = 0
        return was_resting

    def failed(
        self, request: _Request, error: AskFailed, sent: float, now: float, *, rest_after: int, rest_s: float
    ) -> str | None:
        """Takes note of a failure; returns what there is to tell."""
        self._failures[error.kind] += 1
        if error.kind in ("timeout", "bad_reply"):
            self._spent += self._most(request.cost)  # nobody knows what the server has done
        is_first = error.status in (429, 503) or error.kind == "timeout"
        is_first = is_first and self.concurrency.decrease(sent, now)
        if is_pushed_back(error):
            self._pushed_in_row += is_first
            self._is_alive(request)
            least = min(_BACK_OFF_S * 2.0 ** (self._pushed_in_row - 1), _LONGEST_S)
            self._paused_until = max(self._paused_until, now + max(least, error.retry_after or 0.0))
            return None
        if error.status in (401, 402, 403, 404):
            return self.close("no_budget" if error.status == 402 else "rejected", str(error))
        if error.is_final:
            return f"{self.name} answers again" if self._is_alive(request) else None
        if self.is_resting and self._probe is not request:
            return None
        self._failed_in_row += 1
        if self.is_resting or self._failed_in_row >= rest_after:
            return self.rest(str(error), now, rest_s)
        return None

    def rest(self, why: str, now: float, rest_s: float) -> str:
        self.is_resting = True
        self._paused_until = max(self._paused_until, now + rest_s)
        return f"{self.name} rests for {rest_s:g} s: {why}"

    def close(self, kind: str, why: str) -> str | None:
        if self.closed is not None:
            return None
        self.closed = kind
        return f"{self.name} is used no more: {why}"

    def told(self, text: str) -> str:
        """A text without the key."""
        return text if self.key is None else text.replace(self.key, "***")

    def totals(self) -> dict[str, Any]:
        return {
            "model": self.endpoint.model,
            "requests": self.asked,
            "answers": self._answered,
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


class Pool:
    """Endpoints that are asked as one. All but `__init__`, `totals` and `capacity` runs in one event loop.

    A failed request is sent to another endpoint where one is open, else again after a pause. Pushed back (429, or 503
    with `Retry-After`) it waits as long as it is asked to and has used up no attempt.

    Args:
        timeout_s: seconds from sending a request to the last byte of its answer; waiting for room does not count.
        attempts: how often one `ask` may fail before it does.
        rest_after: failures in a row after which an endpoint rests.
        rest_s: seconds of a rest.
        patience_s: seconds that one `ask` goes on being pushed back, and that the pool waits while no endpoint is open;
            after them what waits fails. By default ten rests.

    Attributes:
        notices: what a person should know of endpoints, oldest first; whoever shows them takes them out.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        timeout_s: float,
        attempts: int = 4,
        rest_after: int = 5,
        rest_s: float = 30.0,
        patience_s: float | None = None,
    ) -> None:
        if not endpoints:
            raise ValueError("a pool needs an endpoint")
        self.notices: deque[str] = deque(maxlen=_NOTICES)
        self._endpoints = list(endpoints)
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._rest_after = rest_after
        self._rest_s = rest_s
        self._patience_s = 10 * rest_s if patience_s is None else patience_s
        self._served: list[_Served] = []
        self._tiers: list[list[_Served]] = []
        self._waiting: deque[tuple[_Request, asyncio.Future[tuple[_Served, float]]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        #: Since when no endpoint is open.
        self._dark_since: float | None = None
        self._last_failure = AskFailed("unreachable", "none has answered")

    # --- start and end ---

    async def start(self) -> None:
        """Opens connections and asks every endpoint whether it serves its model.

        An endpoint that does not answer rests, and is told in `notices`, as long as another one does.

        Raises:
            StageError: aiohttp or a key is missing; a key is refused; a model is unknown; no endpoint answers.
        """
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        names = _names(self._endpoints)
        self._served = [_Served(one, name, now) for one, name in zip(self._endpoints, names, strict=True)]
        self._tiers = [[one for one in self._served if one.endpoint.tier == tier] for tier in TIERS]
        self._http = Http(self._timeout_s)
        try:
            failures = await asyncio.gather(*(self._check(one) for one in self._served))
            if all(failures):
                raise StageError(
                    "no endpoint answers",
                    where={one.name: failure for one, failure in zip(self._served, failures, strict=True)},
                    fix="start a server there, or mend 'base_url'",
                )
        except BaseException:
            await self._http.close()
            raise
        for one, failure in zip(self._served, failures, strict=True):
            if failure:
                self.notices.append(one.rest(failure, self._loop.time(), self._rest_s))

    async def _check(self, one: _Served) -> str:
        """Why an endpoint does not answer; empty if it does and knows its key and its model.

        It is asked for its list of models. Where it has none to give, and where there is a key (lists are often
        public), it is asked for one token.
        """
        listed = None
        try:
            status, headers, body = await self._http.request("GET", f"{one.endpoint.base_url}/models", one.headers)
            if status in (401, 403):
                read_status(status, headers, body)
            listed = _listed(body) if status == 200 else None
        except AskFailed as error:
            if error.status is not None:
                raise self._refused(one, error) from None
            if error.kind == "unreachable":
                return one.told(str(error))
        if listed is not None and not any(is_same_model(one.endpoint.model, name) for name in listed):
            raise StageError(
                f"endpoint '{one.name}' has no model '{one.endpoint.model}'",
                where={"its models": ", ".join(listed[:20]) or "none"},
                fix="set 'model' to one that it has",
            )
        if listed is not None and one.key is None:
            return ""
        content = orjson.dumps(
            {"model": one.endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        )
        try:
            read_status(
                *await self._http.request("POST", f"{one.endpoint.base_url}/chat/completions", one.headers, content)
            )
        except AskFailed as error:
            if error.status in (401, 402, 403, 404):
                raise self._refused(one, error) from None
            if listed is None and error.kind in ("unreachable", "timeout", "server_error", "bad_reply"):
                return one.told(str(error))
        return ""

    def _refused(self, one: _Served, error: AskFailed) -> StageError:
        where = {"endpoint": one.name, "it says": one.told(str(error))}
        name = one.endpoint.api_key_env
        if error.status == 404:
            fix = "mend 'model', or 'base_url', which mostly ends in /v1"
            return StageError(f"there is no model '{one.endpoint.model}' at an endpoint", where=where, fix=fix)
        if error.status == 402:
            return StageError("an endpoint wants to be paid", where=where, fix="pay, or leave the endpoint out")
        if name is None:
            fix = 'name the environment variable that holds the key: api_key_env = "..."'
            return StageError("an endpoint wants a key", where=where, fix=fix)
        return StageError("an endpoint refuses the key", where=where, fix=f"put a valid key into {name}")

    async def close(self) -> None:
        """Closes the connections; what still waits for room is cancelled."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        await self._http.close()

    # --- what is told ---

    @property
    def capacity(self) -> int:
        """Requests that may be in flight at present, over endpoints that answer; at least 1."""
        return max(1, sum(one.concurrency.limit for one in self._served if not one.closed and not one.is_resting))

    def totals(self) -> dict[str, dict[str, Any]]:
        """By endpoint: requests, answers, failures by kind, tokens, what was spent, the present limit, the state."""
        return {one.name: one.totals() for one in self._served}

    # --- asking ---

    async def ask(self, messages: list[dict[str, str]], **body: Any) -> Reply:
        """Sends a chat request until it is answered.

        Args:
            body: further fields: temperature, max_tokens, seed, response_format.

        Raises:
            AskFailed: it was rejected, or it failed as often as allowed, or no endpoint was open for too long; of
                several failures the last.
        """
        most_out = body.get("max_completion_tokens") or body.get("max_tokens") or _TOKENS_OUT
        request = _Request(messages, body, _Cost(len(orjson.dumps(messages)), most_out))
        while True:
            one, taken = await self._room(request)
            sent = self._loop.time()
            try:
                reply = await self._send(one, request)
                self._dark_since = None
                if one.answered(request, reply, taken):
                    self.notices.append(f"{one.name} answers again")
                return reply
            except AskFailed as error:
                failure, now = error, self._loop.time()
                failure.message = one.told(f"{one.name}: {failure.message}")
                self._last_failure = failure
                notice = one.failed(request, failure, sent, now, rest_after=self._rest_after, rest_s=self._rest_s)
                if notice:
                    self.notices.append(notice)
            finally:
                one.end(request)
                self._dispatch()
            await self._again(request, one, failure, now)

    async def _send(self, one: _Served, request: _Request) -> Reply:
        content = orjson.dumps({"model": one.endpoint.model, "messages": request.messages, **request.body})
        began = self._loop.time()
        status, headers, body = await self._http.request(
            "POST", f"{one.endpoint.base_url}/chat/completions", one.headers, content
        )
        ms = round(1000 * (self._loop.time() - began))
        read_status(status, headers, body)
        return read_reply(body, asked=one.endpoint.model, endpoint=one.name, ms=ms)

    async def _again(self, request: _Request, one: _Served, error: AskFailed, now: float) -> None:
        """Returns when a failed request may look for room again; raises its error if it may not."""
        if error.is_final:
            raise error
        request.tried.append(one)
        if is_pushed_back(error):
            request.pushed_back = request.pushed_back or now
            if now - request.pushed_back > self._patience_s:
                raise error
            return
        request.attempts += 1
        if request.attempts >= self._attempts:
            raise error
        if one.closed is None and not self._others(request, now):
            await asyncio.sleep(min(_BACK_OFF_S * 2.0 ** (request.attempts - 1), _LONGEST_S))

    def _others(self, request: _Request, now: float) -> bool:
        """Whether an endpoint is open that has not failed the request."""
        return any(one.is_open(now) and one not in request.tried for one in self._served)

    # --- room ---

    async def _room(self, request: _Request) -> tuple[_Served, float]:
        """The endpoint that a request is to be sent to, its place there taken, and the tokens taken for it."""
        if not self._waiting:
            one, _ = self._choose(request, self._loop.time())
            if one is not None:
                return one, one.begin(request)
        future: asyncio.Future[tuple[_Served, float]] = self._loop.create_future()
        if request.tried:
            self._waiting.appendleft((request, future))
        else:
            self._waiting.append((request, future))
        self._dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result()[0].end(request)
                self._dispatch()
            raise

    def _choose(self, request: _Request, now: float) -> tuple[_Served | None, float]:
        """The least loaded endpoint with room, of the highest tier that has one; else seconds until there may be room.

        An endpoint that has failed the request comes last: not while another one is open.
        """
        avoided = request.tried if request.tried and self._others(request, now) else ()
        soonest = float("inf")
        for tier in self._tiers:
            found, least = None, (float("inf"), 0)
            for one in tier:
                if one in avoided:
                    continue
                wait = one.wait(request.cost, now)
                if wait > 0:
                    soonest = min(soonest, wait)
                elif (load := (one.concurrency.load, one.asked)) < least:
                    found, least = one, load
            if found is not None:
                return found, 0.0
        return None, soonest

    def _dispatch(self) -> None:
        """Gives room to those who wait, first come, first served; those that have failed stand in front."""
        if not self._waiting:
            return
        now = self._loop.time()
        soonest = float("inf")
        passed = []
        while self._waiting:
            request, future = self._waiting[0]
            if not future.done():
                one, wait = self._choose(request, now)
                if one is not None:
                    future.set_result((one, one.begin(request)))
                else:
                    soonest = min(soonest, wait)
                    if not request.tried:
                        break  # those behind it can go nowhere else
                    passed.append((request, future))
            self._waiting.popleft()
        self._waiting.extendleft(reversed(passed))
        if self._waiting:
            self._wait(now, soonest)

    def _wait(self, now: float, soonest: float) -> None:
        """Sees to it that those who wait are looked at again, or fails them where nothing is to be hoped for."""
        self._close_spent()
        if all(one.closed for one in self._served):
            kind = "no_budget" if any(one.closed == "no_budget" for one in self._served) else "rejected"
            return self._fail_waiting(kind, "no endpoint is left")
        if any(one.is_open(now) for one in self._served):
            self._dark_since = None
        else:
            self._dark_since = now if self._dark_since is None else self._dark_since
            end = self._dark_since + self._patience_s
            if now >= end or min(one.opens() for one in self._served) > end:
                return self._fail_waiting(self._last_failure.kind, "no endpoint is open")
            soonest = min(soonest, end - now)
        if soonest < float("inf") and (self._timer is None or now + soonest < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(now + soonest, self._look_again)
        return None

    def _look_again(self) -> None:
        self._timer = None
        self._dispatch()

    def _close_spent(self) -> None:
        """Closes endpoints whose budget has no room for the first request that waits."""
        cost = self._waiting[0][0].cost
        for one in self._served:
            if one.closed is None and one.is_spent(cost):
                notice = one.close("no_budget", f"its budget of {one.endpoint.budget:g} is spent")
                self.notices.append(notice or "")

    def _fail_waiting(self, kind: str, what: str) -> None:
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(AskFailed(kind, f"{what}: {self._last_failure}"))
        self._waiting.clear()


def _names(endpoints: Sequence[Endpoint]) -> list[str]:
    """The base_url of each; where several have the same, with their place among all."""
    urls = [one.base_url for one in endpoints]
    return [f"{url} #{i + 1}" if urls.count(url) > 1 else url for i, url in enumerate(urls)]


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

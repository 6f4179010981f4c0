"""One endpoint at work: its limits, its state and its counts.

Decides when a request can be sent to the endpoint, and how answers and failures change that.

An endpoint is *open*, or one of these. *Paused*: it pushed requests back with 429; nothing is sent for as long as it
asks, within bounds, or until it answers a later request. *Resting*: it failed several times in a row; it rests for a
fixed time, and again until it answers a probe. *Closed* for good: it refused the key or the model, or its budget is
spent. A probe is a request of fixed text for one token, counted in what is spent.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import orjson

from builder.errors import StageError
from builder.models.llm.endpoint import Endpoint
from builder.models.llm.http import MAX_SAID, AskFailed, Reply, is_same_model, shown_text
from builder.models.llm.limits import Bucket, Concurrency

#: Seconds of the first pause if a server does not say how long, doubled for each further one; and of the longest pause,
#: whatever a server asks for.
BACK_OFF_S, LONGEST_BACK_OFF_S = 0.25, 30.0
#: Seconds for which an endpoint counts as limiting its load, after it was seen to do so.
LIMITING_S = 10.0
#: Bytes of English text per token, as OpenAI states for its own models: "about 4 characters".
_BYTES_A_TOKEN = 4
#: Most names of other models that an endpoint's counts hold.
_MOST_MODELS = 5


@dataclass(frozen=True)
class Cost:
    """What a request can cost. It has at most as many tokens as bytes: a token has at least one byte."""

    bytes_in: int
    most_out: int

    @property
    def most(self) -> tuple[int, int]:
        """The most that a server can count for request and answer, for `read_reply`."""
        return self.bytes_in, self.most_out

    def tokens(self, mean_out: float | None) -> float:
        """The likely number of tokens, `mean_out` of them in the answer."""
        return self.bytes_in / _BYTES_A_TOKEN + min(self.most_out, self.most_out if mean_out is None else mean_out)


@dataclass(eq=False)
class Request:
    """One `ask` on its way, or a probe.

    Attributes:
        is_next: whether it goes before others that wait.
        is_probe: whether it only asks for one token, to see whether an endpoint answers.
        tried: endpoints that have failed it.
        attempts: how often it failed, not counting how often it was pushed back.
        pushes: how often it was pushed back.
        doubts: how often an answer to a later request showed that the endpoint pushes back this one alone.
        pushers: endpoints that have pushed it back.
        pushed_back: when it was pushed back for the first time.
    """

    messages: list[dict[str, str]]
    body: dict[str, Any]
    cost: Cost
    is_next: bool = False
    is_probe: bool = False
    tried: list[Served] = field(default_factory=list)
    attempts: int = 0
    pushes: int = 0
    doubts: int = 0
    pushers: list[Served] = field(default_factory=list)
    pushed_back: float | None = None


def probe() -> Request:
    """A request for one token."""
    messages = [{"role": "user", "content": "Hello"}]
    return Request(messages, {"max_tokens": 1}, Cost(len(orjson.dumps(messages)), 1), is_probe=True)


class Served:
    """An endpoint at work: its limits, its state and its counts.

    Attributes:
        closed: the kind of failure for which it was closed.
        is_probed: whether it was probed in its pause.
        probing: held by whoever probes it.
    """

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
        self.closed: str | None = None
        self.is_resting = False
        self.is_probed = False
        self.probing = asyncio.Lock()
        self._paused_until = 0.0
        self._failed_in_row = 0
        #: Requests pushed back in a row; round trips in a row with such requests; when the last such trip was.
        self._pushed_in_row = self._trips_in_row = 0
        self._pushed_at = float("-inf")
        #: When the last request that was pushed back, and the last that was answered, had been sent.
        self._pushed_sent = self._answered_sent = float("-inf")
        #: When it last pushed back a request that it takes: a probe, or one that it has answered since.
        self._limiting_at = float("-inf")
        self._pending = 0.0
        self._spent = 0.0
        self._mean_out: float | None = None
        self.asked = 0
        self._probes = 0
        self._answered = 0
        self._ms = 0
        self._rests = 0
        self._pauses = 0
        self._longest_asked = 0.0
        self._tokens_in = 0
        self._tokens_out = 0
        self._failures: Counter[str] = Counter()
        self._models: list[str] = []

    def is_open(self, now: float) -> bool:
        return self.closed is None and not self.is_resting and now >= self._paused_until

    def opens(self) -> float:
        """When it is worth trying, possibly in the past; inf if it is closed."""
        return float("inf") if self.closed else self._paused_until

    def wait(self, cost: Cost, now: float) -> float:
        """Seconds until a request may be sent; inf until another request or a rest ends."""
        if self.closed is not None or self.is_resting:
            return float("inf")
        if now < self._paused_until:
            return self._paused_until - now
        if not self.concurrency.has_room:
            return float("inf")
        if not self.can_pay(cost):
            return float("inf")
        waits = [0.0]
        if self._requests is not None:
            waits.append(self._requests.wait(1, now))
        if self._tokens is not None:
            waits.append(self._tokens.wait(cost.tokens(self._mean_out), now))
        return max(waits)

    def can_pay(self, cost: Cost) -> bool:
        """Whether the budget has room for a request in addition to those under way."""
        budget = self.endpoint.budget
        return budget is None or self._spent + self._pending + self._most(cost) <= budget

    def is_spent(self, cost: Cost) -> bool:
        """Whether the budget has no room for a request and never will, since nothing is under way."""
        budget = self.endpoint.budget
        return budget is not None and not self._pending and self._spent + self._most(cost) > budget

    def _most(self, cost: Cost) -> float:
        return self._price(cost.bytes_in, cost.most_out)

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * (self.endpoint.price_in or 0) + tokens_out * (self.endpoint.price_out or 0)) / 1e6

    def begin(self, request: Request) -> float:
        """Counts a request as sent; returns the tokens that were reserved for it."""
        if request.is_probe:
            self._probes += 1
        else:
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
        """Counts a request as no longer under way, whatever its outcome."""
        self.concurrency.in_flight -= 1
        self._pending -= self._most(request.cost)
        if not self.concurrency.in_flight:
            self._pending = 0.0  # drops the rounding error

    def answered(self, request: Request, reply: Reply, taken: float, sent: float, now: float) -> None:
        """Records an answer; `taken` tokens were reserved for its request."""
        self._answered += 1
        self._ms += reply.ms
        self.concurrency.increase()
        self._failed_in_row = 0
        self._pay(request, reply.tokens_in, reply.tokens_out, taken)
        if reply.tokens_out is not None:
            mean = self._mean_out
            self._mean_out = reply.tokens_out if mean is None else mean + 0.1 * (reply.tokens_out - mean)
        if self in request.pushers:
            self._limiting_at = now
        self.takes(sent, now)

    def takes(self, sent: float, now: float) -> None:
        """Records that it answered a request sent at `sent`. A pause that an earlier request caused ends."""
        self._pushed_in_row = self._trips_in_row = 0
        self._answered_sent = max(self._answered_sent, sent)
        if sent > self._pushed_sent and not self.is_resting:
            self._paused_until = min(self._paused_until, now)

    def has_answered_since(self, sent: float) -> bool:
        """Whether it has answered a request that was sent later."""
        return self._answered_sent > sent

    def is_limiting(self, now: float) -> bool:
        """Whether it pushes back requests because there are too many: it recently pushed back some that it accepts."""
        return now - self._limiting_at < LIMITING_S

    def is_paused(self, now: float) -> bool:
        return self.closed is None and not self.is_resting and now < self._paused_until

    def _pay(self, request: Request, tokens_in: int | None, tokens_out: int | None, taken: float) -> None:
        if tokens_in is None or tokens_out is None:
            self._spent += self._most(request.cost)
            return
        self._tokens_in += tokens_in
        self._tokens_out += tokens_out
        self._spent += self._price(tokens_in, tokens_out)
        if self._tokens is not None:
            self._tokens.take(tokens_in + tokens_out - taken)

    def greeted(
        self, request: Request, tokens: tuple[int | None, int | None], taken: float, sent: float, now: float
    ) -> None:
        """Records the answer to a probe."""
        self._pay(request, *tokens, taken)
        self.takes(sent, now)

    @property
    def is_exact(self) -> bool:
        """Whether an answer of another model is refused."""
        return self.endpoint.model_names == "exact"

    def heard(self, model: str) -> str | None:
        """Records the model that answered; returns a notice, once per model."""
        asked = self.endpoint.model
        if is_same_model(asked, model) or model in self._models or len(self._models) >= _MOST_MODELS:
            return None
        self._models.append(model)
        return (
            f"{self.name} answers as '{self.redacted(model)}' when asked for '{asked}': its answers are accepted, with "
            'that name in prompt_model; model_names = "exact" would refuse them'
        )

    def failed(
        self, request: Request, error: AskFailed, sent: float, now: float, *, rest_after: int, rest_s: float
    ) -> str | None:
        """Records a failure; returns a notice, if there is one."""
        self._failures[error.kind] += 1
        if error.kind in ("timeout", "bad_reply"):
            self._spent += self._most(request.cost)  # nobody knows what the server has done
        if is_pushed_back(error):
            self._failed_in_row = 0
            return self._pushed_back(request, error, sent, now)
        if error.status == 503 or error.kind == "timeout":
            self.concurrency.decrease(sent, now)
        if error.status in (401, 402, 404):
            return self.close("no_budget" if error.status == 402 else "rejected", str(error))
        if error.status == 403:  # from a filter for one request, or from the endpoint for all
            self._failed_in_row += 1
            return self.close("rejected", str(error)) if self._failed_in_row >= rest_after else None
        self._failed_in_row = 0 if error.is_final else self._failed_in_row + 1
        if self._failed_in_row >= rest_after and not self.is_resting:
            return self.rest(str(error), now, rest_s)
        return None

    def _pushed_back(self, request: Request, error: AskFailed, sent: float, now: float) -> str | None:
        """Records that a request was pushed back; returns a notice, if there is one.

        One alone may be caused by the request itself and changes nothing; after two in a row fewer are sent at a time.
        A probe, or a request that was pushed back before, does not show how many at a time are too many.
        """
        if request.is_probe:
            self._limiting_at = now
        self._pushed_in_row += 1
        self._pushed_sent = max(self._pushed_sent, sent)
        if self._pushed_in_row > 1 and not request.pushes and not request.is_probe:
            self.concurrency.decrease(sent, now)
        if sent >= self._pushed_at:
            self._trips_in_row += 1
            self._pushed_at = now
        asked = error.retry_after or 0.0
        pause = min(asked, LONGEST_BACK_OFF_S)
        if self._trips_in_row > 1:
            pause = max(pause, min(BACK_OFF_S * 2.0 ** (self._trips_in_row - 2), LONGEST_BACK_OFF_S))
        if pause and now + pause > self._paused_until:
            if not self.is_paused(now):
                self._pauses += 1
                self.is_probed = False
            self._paused_until = now + pause
        is_news = asked > max(LONGEST_BACK_OFF_S, self._longest_asked)
        self._longest_asked = max(self._longest_asked, asked)
        if not is_news:
            return None
        return f"{self.name} asks for a pause of {asked:g} s: it gets {LONGEST_BACK_OFF_S:g} s, and is probed"

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
        return f"{self.name} is no longer used: {why}"

    def redacted(self, text: str) -> str:
        """A text for people: short, and without the key."""
        return shown_text(text if self.key is None else text.replace(self.key, "***"), MAX_SAID)

    def _state(self) -> str:
        if self.closed:
            return "closed"
        return "resting" if self.is_resting else "open"

    def totals(self) -> dict[str, Any]:
        return {
            "model": self.endpoint.model,
            "requests": self.asked,
            "answers": self._answered,
            "ms": self._ms,
            "rests": self._rests,
            "pauses": self._pauses,
            "asked_to_wait": self._longest_asked,
            "probes": self._probes,
            "answered_as": list(self._models),
            "failures": dict(sorted(self._failures.items())),
            "tokens_in": self._tokens_in,
            "tokens_out": self._tokens_out,
            "spent": self._spent,
            "limit": self.concurrency.limit,
            "state": self._state(),
        }


def _read_key(endpoint: Endpoint) -> str | None:
    name = endpoint.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise StageError(
            f"environment variable '{name}' is not set, but endpoint '{endpoint.base_url}' needs it",
            fix=f"put the key into it: export {name}=...",
        )
    return key


def is_pushed_back(error: AskFailed) -> bool:
    """Whether the server would take the request later."""
    return error.status == 429 or (error.status == 503 and error.retry_after is not None)

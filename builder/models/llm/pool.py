"""A pool of OpenAI-compatible chat endpoints: sends each request to one with room, until it is answered or has failed.

Decides which endpoint is asked, when, and how often. Does not know about prompts: its caller judges the answers.
Everything happens in one event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import orjson

from builder.errors import StageError
from builder.models.llm.endpoint import Endpoint
from builder.models.llm.greeting import check, say_hello
from builder.models.llm.http import AskFailed, Http, Over, Reply, read_reply, read_status
from builder.models.llm.served import BACK_OFF_S, LONGEST_BACK_OFF_S, Cost, Request, Served, is_pushed_back, probe

__all__ = ["AskFailed", "Endpoint", "Over", "Pool", "Reply"]

TIERS = ("free", "local", "paid")
#: A request that waits for room, and what it will get: an endpoint, and the tokens reserved for it there.
_Place: TypeAlias = tuple[Request, "asyncio.Future[tuple[Served, float]]"]
#: Most tokens of an answer, if the request does not say.
_TOKENS_OUT = 1024
#: Notices that are kept until somebody takes them.
_NOTICES = 1000
#: Seconds into a pause after which an endpoint is probed, once per pause.
PROBE_AFTER_S = 1.0
#: How often an endpoint must be seen to answer other requests, but not this one, before this one fails.
_DOUBTS = 2
#: Seconds between two such observations: as long as the endpoint asks for, within these bounds. By then a limit of
#: tokens per minute has room again.
DOUBT_S = (1.0, 5.0)


class Pool:
    """Endpoints that are used as one. All methods but `__init__`, `totals` and `capacity` run in one event loop.

    A failed request is sent to another endpoint if one is open, else again after a pause. 401 and 404 close an
    endpoint; 403 closes it only after `rest_after` times in a row, since some servers send it when a filter holds back
    one request.

    A request that is pushed back (429, or 503 with `Retry-After`) goes behind all others and uses up no attempt. It
    fails after it was pushed back `attempts` times, if at two of them its endpoint took others, which an answer to a
    later request or to a probe shows. This does not count while the endpoint limits its load: when it has recently
    pushed back a probe, or a request that it then answered. Such answers also end a pause.

    Args:
        timeout_s: seconds from sending a request to the last byte of its answer, without the wait for room.
        attempts: how many of its requests may fail before `ask` fails.
        rest_after: failures in a row after which an endpoint rests.
        rest_s: seconds of a rest.
        patience_s: seconds that the pool waits while no endpoint is open, or none takes a request or a probe; then the
            waiting requests fail. Default: ten rests.
        model_names: `exact`: an answer of another model than was asked for is a failure.

    Attributes:
        notices: messages about endpoints for people, oldest first; whoever shows them removes them.
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
        model_names: Literal["any", "exact"] = "any",
    ) -> None:
        if not endpoints:
            raise ValueError("a pool needs an endpoint")
        self.notices: deque[str] = deque(maxlen=_NOTICES)
        names = {"model_names": model_names}
        self._endpoints = [one if one.model_names else one.model_copy(update=names) for one in endpoints]
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._rest_after = rest_after
        self._rest_s = rest_s
        self._patience_s = 10 * rest_s if patience_s is None else patience_s
        self._served: list[Served] = []
        self._tiers: list[list[Served]] = []
        self._waiting: deque[_Place] = deque()
        self._timer: asyncio.TimerHandle | None = None
        #: Since when no endpoint is open.
        self._dark_since: float | None = None
        self._answered_at = 0.0
        #: Tasks that ask resting endpoints whether they answer again.
        self._wakening: dict[Served, asyncio.Task[None]] = {}
        #: Tasks that probe paused endpoints.
        self._probing: dict[Served, asyncio.Task[None]] = {}
        #: Kind and message of the last failure.
        self._last_failure = ("unreachable", "none has failed")

    # --- start and end ---

    async def start(self) -> None:
        """Opens connections and asks every endpoint whether it serves its model.

        An endpoint that does not answer rests and is reported in `notices`, as long as another one answers.

        Raises:
            StageError: aiohttp or a key is missing; a key is refused; a model is unknown; no endpoint answers.
        """
        self._loop = asyncio.get_running_loop()
        now = self._answered_at = self._loop.time()
        names = _names(self._endpoints)
        self._served = [Served(one, name, now) for one, name in zip(self._endpoints, names, strict=True)]
        self._tiers = [[one for one in self._served if one.endpoint.tier == tier] for tier in TIERS]
        self._http = Http(self._timeout_s)
        try:
            failures = await asyncio.gather(*(check(one, self._http, self._loop.time) for one in self._served))
            if all(failures):
                raise StageError(
                    "no endpoint answers",
                    where={one.name: failure for one, failure in zip(self._served, failures, strict=True)},
                    fix="start a server there, or correct 'base_url'",
                )
        except BaseException:
            await self._http.close()
            raise
        for one, failure in zip(self._served, failures, strict=True):
            if failure:
                self._rest("unreachable", one, failure)
                self._waken(one)

    async def close(self) -> None:
        """Closes the connections; requests that still wait for room are cancelled."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._wakening.values(), *self._probing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    # --- reports ---

    @property
    def capacity(self) -> int:
        """Requests that can be in flight now, at all endpoints that answer; at least 1."""
        return max(1, sum(one.concurrency.limit for one in self._served if not one.closed and not one.is_resting))

    def totals(self) -> dict[str, dict[str, Any]]:
        """By endpoint: counts, failures by kind, milliseconds of all answers, the present limit, the state."""
        return {one.name: one.totals() for one in self._served}

    def _notify(self, notice: str | None) -> None:
        if notice is not None:
            self.notices.append(notice)

    # --- asking ---

    async def ask(self, messages: list[dict[str, str]], is_next: bool = False, /, **body: Any) -> Reply:
        """Sends a chat request until it is answered.

        Args:
            is_next: whether it goes before others that wait.
            body: further fields: temperature, max_tokens, seed, response_format.

        Raises:
            Over: no endpoint is left, or none was open or answered for too long.
            AskFailed: it was rejected, or it failed as often as allowed; this is the last of its failures.
        """
        most_out = body.get("max_completion_tokens") or body.get("max_tokens") or _TOKENS_OUT
        request = Request(messages, body, Cost(len(orjson.dumps(messages)), most_out), is_next)
        while True:
            one, taken = await self._room(request)
            sent = self._loop.time()
            try:
                reply = await self._send(one, request)
                self._dark_since = None
                self._answered_at = self._loop.time()
                one.answered(request, reply, taken, sent, self._answered_at)
                self._notify(one.heard(reply.model))
                return reply
            except AskFailed as error:
                failure, now = error, self._loop.time()
                error.message = one.redacted(error.message)
                self._notify(one.failed(request, error, sent, now, rest_after=self._rest_after, rest_s=self._rest_s))
                error.message = f"{one.name}: {error.message}"
                self._last_failure = (error.kind, error.message)
                if one.is_resting:
                    self._waken(one)
            finally:
                one.end(request)
                self._dispatch()
            await self._again(request, one, failure, sent, now)

    async def _send(self, one: Served, request: Request) -> Reply:
        content = orjson.dumps({"model": one.endpoint.model, "messages": request.messages, **request.body})
        began = self._loop.time()
        status, headers, body = await self._http.request(
            "POST", f"{one.endpoint.base_url}/chat/completions", one.headers, content
        )
        ms = round(1000 * (self._loop.time() - began))
        read_status(status, headers, body)
        return read_reply(
            body, asked=one.endpoint.model, endpoint=one.name, ms=ms, is_exact=one.is_exact, most=request.cost.most
        )

    async def _again(self, request: Request, one: Served, error: AskFailed, sent: float, now: float) -> None:
        """Returns when a failed request can look for room again; raises its error if it has failed for good."""
        if error.is_final:
            raise error
        request.tried.append(one)
        if is_pushed_back(error):
            await self._behind_others(request, one, error, sent, now)
            return
        if now > self._end_of_patience(now):
            raise Over(error.kind, f"no endpoint is open; {error.message}")
        request.attempts += 1
        if request.attempts >= self._attempts:
            raise error
        if one.is_open(now) and not self._others(request, now):
            await asyncio.sleep(min(BACK_OFF_S * 2.0 ** (request.attempts - 1), LONGEST_BACK_OFF_S))

    def _others(self, request: Request, now: float) -> bool:
        """Whether an endpoint is open that has not failed the request."""
        return any(one.is_open(now) and one not in request.tried for one in self._served)

    # --- pauses ---

    async def _behind_others(self, request: Request, one: Served, error: AskFailed, sent: float, now: float) -> None:
        """Returns when a request that was pushed back can look for room again; raises if the request is the cause."""
        request.pushes += 1
        request.pushers.append(one)
        request.pushed_back = request.pushed_back or now
        if min(now - request.pushed_back, now - self._answered_at) > self._patience_s:
            what = "no endpoint takes a request"
            self._fail_waiting(error.kind, what)
            raise Over(error.kind, f"{what}; {error.message}")
        self._probe_later(one)
        if request.pushes > max(1, self._attempts - _DOUBTS) and await self._takes_others(one, sent):
            request.doubts += 1
            if request.doubts >= _DOUBTS:
                raise error
            await asyncio.sleep(min(max(error.retry_after or 0.0, DOUBT_S[0]), DOUBT_S[1]))

    async def _takes_others(self, one: Served, sent: float) -> bool:
        """Whether an endpoint that pushed back a request sent at `sent` answers others; a probe decides if in doubt."""
        async with one.probing:
            is_limiting = one.is_limiting(self._loop.time())
            if not is_limiting and not one.has_answered_since(sent):
                await self._probe(one)
        return one.has_answered_since(sent) and not one.is_limiting(self._loop.time())

    async def _probe(self, one: Served) -> None:
        one.is_probed = True
        if one.closed is not None or not one.can_pay(probe().cost):
            return
        try:
            sent = self._loop.time()
            failure = await say_hello(one, self._http, self._loop.time)
        except StageError as error:
            self._close(one, error)
            return
        now = self._loop.time()
        if failure is None:
            self._answered_at = now
            self._dark_since = None
        else:
            self._notify(one.failed(probe(), failure, sent, now, rest_after=self._rest_after, rest_s=self._rest_s))
            if one.is_resting:
                self._waken(one)
        self._dispatch()

    def _probe_later(self, one: Served) -> None:
        """Starts a probe of an endpoint during its pause, if the pause is long."""
        now = self._loop.time()
        if one not in self._probing and not one.is_probed and one.is_paused(now + PROBE_AFTER_S):
            self._probing[one] = self._loop.create_task(self._probe_in_pause(one))

    async def _probe_in_pause(self, one: Served) -> None:
        try:
            await asyncio.sleep(PROBE_AFTER_S)
            async with one.probing:
                if one.is_paused(self._loop.time()) and not one.is_probed:
                    await self._probe(one)
        finally:
            del self._probing[one]

    def _close(self, one: Served, error: StageError) -> None:
        """Stops using an endpoint that refused a probe for good."""
        why = str(error.where.get("it says", error.what))
        self._notify(one.close("rejected", why))
        self._last_failure = ("rejected", f"{one.name}: {why}")
        self._dispatch()

    # --- rests ---

    def _rest(self, kind: str, one: Served, why: str) -> None:
        self._notify(one.rest(why, self._loop.time(), self._rest_s))
        self._last_failure = (kind, f"{one.name}: {why}")

    def _waken(self, one: Served) -> None:
        """Starts to ask a resting endpoint until it answers again. It is asked with probes, so that no row can fail."""
        if one not in self._wakening:
            self._wakening[one] = self._loop.create_task(self._say_hello(one))

    async def _say_hello(self, one: Served) -> None:
        while one.is_resting and one.closed is None:
            await asyncio.sleep(max(0.0, one.opens() - self._loop.time()))
            try:
                failure = await say_hello(one, self._http, self._loop.time)
            except StageError as error:
                self._close(one, error)
                break
            if failure is None or failure.kind == "rate_limited":
                self._notify(one.wake())
            else:
                self._rest(failure.kind, one, one.redacted(str(failure)))
        del self._wakening[one]
        self._dispatch()

    # --- room ---

    async def _room(self, request: Request) -> tuple[Served, float]:
        """The endpoint for a request, with its place there reserved, and the tokens reserved for it."""
        if not self._waiting:
            one, _ = self._choose(request, self._loop.time())
            if one is not None:
                return one, one.begin(request)
        future: asyncio.Future[tuple[Served, float]] = self._loop.create_future()
        if request.is_next and not request.tried:
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

    def _choose(self, request: Request, now: float) -> tuple[Served | None, float]:
        """The least loaded endpoint with room, of the first tier that has one; else seconds until there may be room.

        An endpoint that has failed the request is chosen only if no other one is open.
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
        """Gives room to the requests that wait, first come, first served.

        Requests that are sent again come first, those that were pushed back last.
        """
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
                        break  # the ones behind it have no other endpoint either
                    passed.append((request, future))
            self._waiting.popleft()
        self._waiting.extendleft(reversed(passed))
        if self._waiting:
            self._wait(now, soonest)

    def _wait(self, now: float, soonest: float) -> None:
        """Schedules another look at waiting requests, or fails them if no endpoint can open again."""
        self._close_spent()
        if all(one.closed for one in self._served):
            kind = "no_budget" if any(one.closed == "no_budget" for one in self._served) else "rejected"
            return self._fail_waiting(kind, "no endpoint is left")
        end = self._end_of_patience(now)
        if now >= end:
            return self._fail_waiting(self._last_failure[0], "no endpoint is open")
        soonest = min(soonest, end - now)
        if soonest < float("inf") and (self._timer is None or now + soonest < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(now + soonest, self._look_again)
        return None

    def _end_of_patience(self, now: float) -> float:
        """Until when requests wait for an endpoint to open; infinite while one is open."""
        if any(one.is_open(now) for one in self._served):
            self._dark_since = None
            return float("inf")
        self._dark_since = now if self._dark_since is None else self._dark_since
        return self._dark_since + self._patience_s

    def _look_again(self) -> None:
        self._timer = None
        self._dispatch()

    def _close_spent(self) -> None:
        """Closes endpoints whose budget is too small for the first request that waits."""
        cost = self._waiting[0][0].cost
        for one in self._served:
            if one.closed is None and one.is_spent(cost):
                why = f"its budget of {one.endpoint.budget:g} allows no further request"
                self._notify(one.close("no_budget", why))
                self._last_failure = ("no_budget", f"{one.name}: {why}")

    def _fail_waiting(self, kind: str, what: str) -> None:
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(Over(kind, f"{what}; {self._last_failure[1]}"))
        self._waiting.clear()


def summary(totals: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """One line per endpoint, from the `totals` of several pools."""
    lines = []
    for name in dict.fromkeys(name for one in totals for name in one):
        parts = [one[name] for one in totals if name in one]
        answers, ms, rests, spent = (sum(part[key] for part in parts) for key in ("answers", "ms", "rests", "spent"))
        pauses, longest = sum(part["pauses"] for part in parts), max(part["asked_to_wait"] for part in parts)
        names = dict.fromkeys(name for part in parts for name in part["answered_as"])
        failures = sum((Counter(part["failures"]) for part in parts), Counter[str]())
        kinds = ", ".join(f"{kind} {count}" for kind, count in failures.most_common())
        line = f"{name}: {answers} answers"
        line += f" in {ms / answers / 1000:.2f} s on average" if answers else ""
        line += f", {failures.total()} failures" + (f" ({kinds})" if kinds else "") + f", {rests} rests"
        line += f", {pauses} pauses" if pauses else ""
        line += f" (asked to wait {longest:g} s, at most {LONGEST_BACK_OFF_S:g} s kept)" if longest else ""
        line += f", {spent:.2f} spent" if spent else ""
        lines.append(line + "".join(f", answers as '{name}'" for name in names))
    return lines


def _names(endpoints: Sequence[Endpoint]) -> list[str]:
    """The base_url of each; if several have the same one, with their position."""
    urls = [one.base_url for one in endpoints]
    return [f"{url} #{i + 1}" if urls.count(url) > 1 else url for i, url in enumerate(urls)]

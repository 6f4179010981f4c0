"""Holds conversations with a pool of endpoints, in an event loop that runs in its own thread.

A caller that is not a coroutine submits conversations and waits for the answers later.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from builder.errors import StageError
from builder.models.llm.backend import AnswerOrError, PromptBackend
from builder.models.llm.conversation import Answer, Conversation
from builder.models.llm.pool import Over, Pool


class Asking(PromptBackend):
    """Asks the endpoints of a pool.

    Args:
        pool: not yet started; this object starts and closes it.
        body: fields of every request besides model and messages.
    """

    def __init__(self, pool: Pool, body: dict[str, Any]) -> None:
        self._pool, self._body = pool, body
        self._working: set[asyncio.Task[Any]] = set()
        self._is_over = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="asking", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Must be called first.

        Raises:
            StageError: as `Pool.start`; or `give_up` was called.
        """
        try:
            self._wait(self._start)
        except CancelledError:
            self._end_loop()
            raise StageError(
                "the run was stopped before an endpoint answered", fix="run the same command again to continue"
            ) from None
        except BaseException:
            self._end_loop()
            raise

    async def _start(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._working.add(task)
        await self._pool.start()
        self._working.discard(task)

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[AnswerOrError]]:
        """Begins these conversations and returns at once; the result has their outcomes, in order."""
        return asyncio.run_coroutine_threadsafe(self._all(conversations), self._loop)

    async def _all(self, conversations: Sequence[Conversation]) -> list[AnswerOrError]:
        if self._is_over:
            return [_stopped() for _ in conversations]
        tasks = [asyncio.ensure_future(self._one(conversation)) for conversation in conversations]
        self._working.update(tasks)
        try:
            found = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._working.difference_update(tasks)
        return [one if isinstance(one, Answer | Exception) else _stopped() for one in found]

    async def _one(self, conversation: Conversation) -> AnswerOrError:
        try:
            while True:
                reply = await self._pool.ask(conversation.messages, bool(conversation.turned), **self._body)
                if accepted := conversation.hear(reply.text, reply.endpoint):
                    return Answer(
                        accepted.prompt,
                        accepted.lang,
                        reply.model,
                        reply.endpoint,
                        reply.tokens_in,
                        reply.tokens_out,
                        reply.ms,
                    )
        except Exception as error:  # any error: the answers of the other rows are paid for
            return error

    def give_up(self) -> None:
        """Ends at once every conversation without an outcome, and those that begin later: their outcome is `Over`."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end_conversations)

    def _end_conversations(self) -> None:
        self._is_over = True
        for task in self._working:
            task.cancel()

    def notices(self) -> list[str]:
        """The pool's notices about its endpoints since the last call."""
        taken = []
        while self._pool.notices:
            taken.append(self._pool.notices.popleft())
        return taken

    def totals(self) -> dict[str, dict[str, Any]]:
        """As `Pool.totals`."""
        return self._pool.totals()

    def close(self) -> None:
        """Ends conversations without an answer, and closes the connections."""
        try:
            self._wait(self._give_up)
        finally:
            self._end_loop()

    async def _give_up(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._pool.close()

    def _wait(self, function: Callable[[], Any]) -> None:
        asyncio.run_coroutine_threadsafe(function(), self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _stopped() -> Over:
    return Over("stopped", "the run was stopped")

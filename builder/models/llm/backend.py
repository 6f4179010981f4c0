"""What makes prompts: how a back end is checked, started and asked, and what a stage has to know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from builder.models.llm.conversation import Answer, Conversation

#: The outcome of a conversation.
AnswerOrError = Answer | Exception


class PromptBackend:
    """A language model that holds conversations."""

    def start(self) -> None:
        """Waits until it can be asked; before anything else. `give_up` ends the wait.

        Raises:
            StageError: it cannot be asked.
        """

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[AnswerOrError]]:
        """Holds these conversations; the result has their outcomes in order. It need not wait for them."""
        raise NotImplementedError

    def notices(self) -> list[str]:
        """Notices for the run's log, since this was last called."""
        return []

    def totals(self) -> dict[str, dict[str, Any]]:
        """What it has counted, by endpoint."""
        return {}

    def give_up(self) -> None:
        """Ends every conversation that has no outcome yet; called from any thread."""

    def close(self) -> None:
        """Frees what it holds."""


@dataclass(frozen=True)
class Workload:
    """How a back end is given rows.

    Attributes:
        batch_rows: rows of one batch.
        gpus: accelerators that one worker uses.
        in_flight: requests that it can have open at once; 0: batches are not submitted ahead.
    """

    batch_rows: int
    gpus: int = 0
    in_flight: int = 0


@dataclass(frozen=True)
class ChatEntry:
    """A value of the option `backend` that asks a language model. The first argument of each is the stage's options.

    Attributes:
        workload: how it is given rows; raises ConfigError for options that do not fit together.
        make: builds it, for the number of workers that share it and a device; may load it, too.
        check: raises StageError for packages that it would miss, and loads nothing.
        deciding: options in the form in which they are hashed, where they have several.
    """

    workload: Callable[[Any], Workload]
    make: Callable[[Any, int, str], PromptBackend]
    check: Callable[[Any], object]
    deciding: Callable[[Any], Mapping[str, Any]] = lambda options: {}


@dataclass(frozen=True)
class RewriteEntry:
    """A value of the option `backend` that rewrites captions without a language model: it knows no groups.

    Attributes:
        rewrite: makes a caption a prompt, by the stage's options; raises RowError for a caption without words, and
            ConfigError for options that it cannot use.
        reads: names of the options that it looks at.
    """

    rewrite: Callable[[Any, str], str]
    reads: tuple[str, ...] = ()

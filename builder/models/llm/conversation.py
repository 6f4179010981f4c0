"""The messages that turn a caption into a prompt, and the conversation about one sample until there is a prompt.

Owns the wording: the built-in system and user messages, their `{column}` fields, and asking again with the reason.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from builder.errors import ConfigError
from builder.models.llm.answers import Accepted, Contract, Question, Rejected
from builder.models.llm.groups import text_of
from builder.models.text.legible import legible

#: Where groups are given: the caption's meaning stays, the people in it are those of the group.
GROUP_SYSTEM = (
    "You edit image captions. You are given a sentence and a group of people. Rewrite the sentence with as few changes "
    "as possible so that it explicitly portrays people of that group. If it names another group, put the given one in "
    "its place. Names of persons may be adapted to the group. If it names nobody, add a person of the group in a way "
    "that suits the scene. Keep everything else: place, action, objects, style. {language}"
    "Answer with the rewritten sentence alone, on one line: no explanation, no quotation marks, no labels."
)
GROUP_USER = 'sentence: "{text}" group: "{group}"'
#: Where no groups are given.
PLAIN_SYSTEM = (
    "You write prompts for an image generator. You are given the caption of a picture from the web. Describe the "
    "picture in one plain sentence: people, place, action, objects, as far as the caption tells them. Leave out "
    "addresses, prices, credits and words of advertising. {language}"
    "Answer with the sentence alone, on one line: no explanation, no quotation marks, no labels."
)
PLAIN_USER = 'caption: "{text}"'
#: Fields that need no column of the work SQL: the group is assigned, and every batch has the others.
GIVEN = ("group", "shard", "row", "uid")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
#: Characters of a rejected answer that are repeated to the model, so that a request does not grow with it.
_SAID_BACK = 500
#: Characters of it that are kept for people to read.
_KEPT = 20_000

Messages = list[dict[str, str]]


class Template:
    """A text with `{column}` fields.

    Args:
        name: the option that holds it, for messages.

    Raises:
        ConfigError: a field is not a plain name, or the text is not a format text.
    """

    def __init__(self, name: str, text: str) -> None:
        where = {name: repr(text)}
        fix = f"write columns as {{text}}, and a brace as {{{{ or }}}}, for example: {name} = '{GROUP_USER}'"
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"'{name}' is not a format text: {error}", where=where, fix=fix) from None
        for _, field, spec, cast in parsed:
            if field is not None and (not _NAME.fullmatch(field) or spec or cast):
                raise ConfigError(f"'{name}' has a field '{{{field}}}' that is not a column name", where=where, fix=fix)
        self._parts = [(literal, field) for literal, field, _, _ in parsed]

    @property
    def fields(self) -> list[str]:
        """Names of its fields, each once, in order."""
        return list(dict.fromkeys(field for _, field in self._parts if field is not None))

    @property
    def labels(self) -> tuple[str, ...]:
        """Words before a colon in front of a field: `sentence` in `sentence: "{text}"`."""
        found = []
        for literal, field in self._parts:
            if field is not None and (label := re.search(r"([^\W\d_][\w ]*?)\s*:\s*[\"'“‘(\[<]*\s*$", literal)):
                found.append(label[1])
        return tuple(found)

    def fill(self, values: Mapping[str, str]) -> str:
        return "".join(literal + ("" if field is None else values[field]) for literal, field in self._parts)


class Rewrites:
    """The messages of samples.

    Args:
        system, user: templates; None: the built-in ones; an empty `system` is not sent.
        has_groups: whether every sample has a group.
        lang: ISO 639-1 code of the wanted language; None: any.
        json_schema: the form of the answer; the built-in system message states it for servers that do not enforce it.

    Raises:
        ConfigError: a template is invalid, or has `{group}` although no groups are given.
    """

    def __init__(
        self,
        *,
        system: str | None,
        user: str | None,
        has_groups: bool,
        lang: str | None,
        json_schema: Mapping[str, Any] | None,
    ) -> None:
        if system is None:
            system = (GROUP_SYSTEM if has_groups else PLAIN_SYSTEM).replace("{language}", _in_language(lang))
            if json_schema is not None:
                schema = json.dumps(json_schema, ensure_ascii=False).replace("{", "{{").replace("}", "}}")
                system += f" Put it into a JSON object of this schema, and answer with that object alone: {schema}"
        self._system = Template("system", system)
        if user is None:
            user = GROUP_USER if has_groups else PLAIN_USER
        self._user = Template("user", user)
        for name, template in (("system", self._system), ("user", self._user)):
            if "group" in template.fields and not has_groups:
                raise ConfigError(
                    f"'{name}' has a field '{{group}}', but no groups are given",
                    fix='give them, for example: groups = [["Black", "white", "Asian"], ["man", "woman"]]',
                )

    @property
    def columns(self) -> list[str]:
        """Columns that the templates read, `text` first."""
        fields = ["text", *self._system.fields, *self._user.fields]
        return [field for field in dict.fromkeys(fields) if field not in GIVEN]

    def begin(self, values: Mapping[str, Any], group: Sequence[str]) -> tuple[Messages, Question]:
        """The first messages about a sample, and what the answer is checked against.

        Line breaks and double quotes are removed from values, so that a value cannot leave its place in the message.

        Args:
            values: of every column that the templates read, and shard, row, uid.
        """
        plain = {name: _plain(value) for name, value in values.items()} | {"group": text_of(group)}
        user = self._user.fill(plain)
        system = self._system.fill(plain)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        more = " ".join(plain[name] for name in self.columns[1:])
        return messages, Question(plain["text"], user, self._user.labels, tuple(group), more=more)


@dataclass(frozen=True)
class Answer:
    """A prompt, and what it cost.

    Attributes:
        model: as the server calls it.
        endpoint: the server's address; None in process.
        tokens_in, tokens_out: of the request that gave the prompt; None if the server reports none.
        ms: milliseconds from sending that request to the last byte of its answer; None if it was not timed alone.
    """

    prompt: str
    lang: str | None
    model: str
    endpoint: str | None
    tokens_in: int | None
    tokens_out: int | None
    ms: int | None


@dataclass(frozen=True)
class Turned:
    """A rejected answer.

    Attributes:
        kind: class of the rejection.
        endpoint: the server's address; None in process.
    """

    kind: str
    text: str
    endpoint: str | None


class Conversation:
    """The messages about one sample until its answer is a prompt.

    Args:
        retries: how often a rejected answer is asked for again.

    Attributes:
        messages: what to ask next.
        turned: the answers that were rejected.
    """

    def __init__(self, contract: Contract, messages: Messages, request: Question, *, retries: int) -> None:
        self.messages = messages
        self.turned: list[Turned] = []
        self._contract, self._request, self._retries, self._begin = contract, request, retries, messages

    def hear(self, text: str, endpoint: str | None = None) -> Accepted | None:
        """The prompt; None if the answer was rejected and `messages` now asks again.

        Raises:
            Rejected: it was rejected, and no retry is left.
        """
        try:
            return self._contract.read(text, self._request)
        except Rejected as rejected:
            self.turned.append(Turned(rejected.kind, text[:_KEPT], endpoint))
            if len(self.turned) > self._retries:
                raise
            again = f"{rejected} Answer the first request again, as it was asked."
            said_back = {"role": "assistant", "content": text[:_SAID_BACK]}
            self.messages = [*self._begin, said_back, {"role": "user", "content": again}]
            self._request = replace(self._request, again=again)
            return None


def _plain(value: Any) -> str:
    """One line without double quotes and invisible characters; null is empty."""
    return "" if value is None else " ".join(legible(str(value)).replace('"', "").split())


def _in_language(lang: str | None) -> str:
    if lang is None:
        return ""
    return "Answer in English. " if lang == "en" else f'Answer in the language with the ISO 639-1 code "{lang}". '

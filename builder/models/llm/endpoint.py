"""What a pipeline says about one server with the OpenAI chat API."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic.config import JsonDict

from builder.config.sections import Strict
from builder.errors import StageError

_SAME_ANSWER: JsonDict = {"decides": False}


class Endpoint(Strict):
    """A server with the OpenAI chat API, and how it may be used."""

    #: As an OpenAI client takes it, usually ending in /v1: "http://127.0.0.1:8000/v1".
    base_url: str = Field(json_schema_extra=_SAME_ANSWER)
    #: The model to ask for.
    model: str = Field(min_length=1)
    #: Name of the environment variable that holds the key.
    api_key_env: str | None = Field(default=None, min_length=1, json_schema_extra=_SAME_ANSWER)
    #: Most requests in flight; the actual number adapts below it. A run's workers share this and all limits here.
    max_concurrency: int = Field(default=64, ge=1, json_schema_extra=_SAME_ANSWER)
    #: Requests per minute, in a steady flow.
    requests_per_minute: float | None = Field(default=None, gt=0, json_schema_extra=_SAME_ANSWER)
    #: Tokens per minute, of requests and answers together.
    tokens_per_minute: float | None = Field(default=None, gt=0, json_schema_extra=_SAME_ANSWER)
    #: A lower tier is used only where every endpoint of the higher ones is at its limits or does not answer.
    tier: Literal["free", "local", "paid"] = Field(default="local", json_schema_extra=_SAME_ANSWER)
    #: Price of a million tokens of requests and of answers, in any currency.
    price_in: float | None = Field(default=None, ge=0, json_schema_extra=_SAME_ANSWER)
    price_out: float | None = Field(default=None, ge=0, json_schema_extra=_SAME_ANSWER)
    #: What may be spent here, in the same currency; a request whose tokens are not reported counts at its most.
    budget: float | None = Field(default=None, gt=0, json_schema_extra=_SAME_ANSWER)
    #: As `model_names` of the stage, for this server only.
    model_names: Literal["any", "exact"] | None = Field(default=None, json_schema_extra=_SAME_ANSWER)

    def share(self, workers: int) -> Endpoint:
        """The share of it that one of several processes may use.

        Raises:
            StageError: each of them needs one request at a time, and that is more than `max_concurrency`.
        """
        if workers > self.max_concurrency:
            raise StageError(
                f"endpoint '{self.base_url}' takes {self.max_concurrency} requests at a time, "
                "fewer than the run has workers",
                where={"workers": workers},
                fix="set workers = 1: one keeps all servers busy",
            )
        limits = {name: getattr(self, name) for name in ("requests_per_minute", "tokens_per_minute", "budget")}
        parts: dict[str, Any] = {name: limit / workers for name, limit in limits.items() if limit is not None}
        return self.model_copy(update={**parts, "max_concurrency": self.max_concurrency // workers})

    @field_validator("base_url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        if not is_address(value):
            raise ValueError('not an address such as "http://127.0.0.1:8000/v1"')
        parts = urlsplit(value)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("it has more than an address; a key belongs in the variable that api_key_env names")
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError('leave out "/chat/completions"')
        return value.rstrip("/")

    @field_validator("budget")
    @classmethod
    def _has_prices(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and None in (info.data.get("price_in"), info.data.get("price_out")):
            raise ValueError("a budget needs price_in and price_out")
        return value


def is_address(url: str) -> bool:
    """Whether a text is the address of a server, with a port or without one."""
    try:
        parts = urlsplit(url)
        _ = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[\s\x00-\x1f]", url)

"""Asks an endpoint whether it answers, accepts its key and has its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import orjson

from builder.errors import StageError
from builder.models.llm.http import MAX_BYTES_LISTED, AskFailed, Http, is_same_model, model_in, read_status, read_usage
from builder.models.llm.served import Served, probe


async def check(one: Served, http: Http, clock: Callable[[], float]) -> str:
    """Why an endpoint does not answer; empty if it answers, accepts its key and has its model.

    It is asked for its list of models. It is probed if it gives no list, or a list without the model (a gateway lists
    other names than it accepts), or if there is a key (lists are often public).

    Raises:
        StageError: the key is refused, or the model unknown.
    """
    models = None
    try:
        url = f"{one.endpoint.base_url}/models"
        status, headers, body = await http.request("GET", url, one.headers, most=MAX_BYTES_LISTED)
        if status in (401, 403):
            read_status(status, headers, body)
        models = _listed(body) if status == 200 else None
    except AskFailed as error:
        if error.status is not None:
            raise _refused(one, error) from None
        if error.kind in ("unreachable", "timeout"):
            return one.redacted(str(error))
    is_listed = models is not None and any(is_same_model(one.endpoint.model, name) for name in models)
    if is_listed and one.key is None:
        return ""
    failure = await say_hello(one, http, clock, models if not is_listed else None)
    return "" if failure is None or is_listed or failure.kind == "rate_limited" else one.redacted(str(failure))


async def say_hello(
    one: Served, http: Http, clock: Callable[[], float], models: Sequence[str] | None = None
) -> AskFailed | None:
    """Probes an endpoint; returns why it does not answer, None if it does or would answer another request.

    Args:
        models: those that it lists, if its model is not among them.

    Raises:
        StageError: the key is refused, or the model unknown.
    """
    request = probe()
    content = orjson.dumps({"model": one.endpoint.model, "messages": request.messages, **request.body})
    sent = clock()
    taken = one.begin(request)
    try:
        url = f"{one.endpoint.base_url}/chat/completions"
        status, headers, body = await http.request("POST", url, one.headers, content)
        read_status(status, headers, body)
        one.greeted(request, read_usage(body, request.cost.most), taken, sent, clock())
    except AskFailed as error:
        is_named = error.kind == "rejected" and one.endpoint.model.casefold() in str(error).casefold()
        if models is not None and (error.status == 404 or (error.is_final and is_named)):
            listed = one.redacted(", ".join(models[:20]) or "none")
            raise _unknown_model(one, {"its models": listed}, "set 'model' to one that it has") from None
        if error.status in (401, 402, 403, 404):
            raise _refused(one, error) from None
        if error.kind != "rejected":
            return error
        one.takes(sent, clock())
        return None
    finally:
        one.end(request)
    name = model_in(body) or one.endpoint.model
    if one.is_exact and not is_same_model(one.endpoint.model, name):
        fix = "set 'model' to that name, or take any: model_names = \"any\""
        raise _unknown_model(one, {"it answers as": one.redacted(name)}, fix)
    return None


def _refused(one: Served, error: AskFailed) -> StageError:
    where = {"it says": one.redacted(str(error))}
    name = one.endpoint.api_key_env
    if error.status == 404:
        return _unknown_model(one, where, "correct 'model', or 'base_url', which usually ends in /v1")
    if error.status == 402:
        fix = "add credit to its account, or remove it from the pipeline"
        return StageError(f"endpoint '{one.name}' asks for payment", where=where, fix=fix)
    if name is None:
        fix = 'name the environment variable that holds it: api_key_env = "..."'
        return StageError(f"endpoint '{one.name}' needs a key", where=where, fix=fix)
    fix = f"put a valid key into the environment variable '{name}'"
    return StageError(f"endpoint '{one.name}' refuses the key", where=where, fix=fix)


def _unknown_model(one: Served, where: dict[str, str], fix: str) -> StageError:
    return StageError(f"endpoint '{one.name}' has no model '{one.endpoint.model}'", where=where, fix=fix)


def _listed(body: bytes) -> list[str] | None:
    """Names of models in the answer to GET /models; None if the answer is not such a list."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    items = data.get("data") if isinstance(data, dict) else None
    if not isinstance(items, list):
        return None
    names = [item.get("id") if isinstance(item, dict) else None for item in items]
    return [name for name in names if isinstance(name, str)]

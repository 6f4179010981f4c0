"""What identifies a stage's answers: its name, version, inputs, outputs and the options that decide them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from builder.stages.contract import Stage, outputs_of


def options_hash(stage: Stage, options: BaseModel) -> str:
    """16 hex digits over a stage's name, version, inputs, outputs and the options that decide its result.

    An option whose field says `json_schema_extra={"decides": False}` (a timeout, a thread count) is left out, in models
    within models too; of a list with `{"decides": "as a set"}` neither order nor repetition counts. An output with
    `decides=False` is left out, too. Where the stage has `deciding`, these are the options.
    """
    outputs = [output for output in outputs_of(stage) if output.decides]
    columns = [[(field.name, str(field.type)) for field in side] for side in (stage.inputs, outputs)]
    decide = _deciding(options if stage.deciding is None else stage.deciding)
    text = json.dumps([stage.name, stage.version, columns, decide], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _deciding(value: Any, dumped: Any = None) -> Any:
    """An option's value as json, without the parts that decide nothing."""
    if isinstance(value, BaseModel):
        dumped, found = value.model_dump(mode="json"), {}
        for name, field in type(value).model_fields.items():
            decides = (field.json_schema_extra or {}).get("decides", True)  # type: ignore[union-attr]
            if decides and name in dumped:
                found[name] = _deciding(getattr(value, name), dumped[name])
            if decides == "as a set" and found[name] is not None:
                found[name] = sorted({json.dumps(item, sort_keys=True) for item in found[name]})
        return found
    if isinstance(value, list | tuple):
        return [_deciding(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {name: _deciding(value[key], dumped[name]) for key, name in zip(value, dumped, strict=True)}
    return dumped

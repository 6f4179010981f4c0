"""The work that the stages of a pipeline have in a root."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from builder.engine.work import Choice, Work
from builder.errors import ConfigError
from builder.stages.finding import with_unread
from builder.stages.signature import options_hash
from builder.verbs.pipeline import StageUse, use_of
from builder.verbs.snapshot import Snapshot


def work_of(snapshot: Snapshot, name: str, choice: Choice, shards: Sequence[str]) -> Work:
    """The work of one stage over certain shards."""
    pipeline = snapshot.pipeline
    use = use_of(pipeline, name)
    signature = options_hash(use.stage, use.options)
    params = _next_draw(use) if choice.next_draw else use.params
    columns = with_unread(snapshot.columns, use.stage, params)
    image = pipeline.config.write.image
    return Work(use.stage, use.sql, params, choice, shards, columns, signature, image)


def _next_draw(use: StageUse) -> dict[str, Any]:
    """The parameters of the work SQL with one more for $draw, which it adds to the draw of a row's answer."""
    if not isinstance(use.params.get("draw"), int):
        raise ConfigError(
            f"stage '{use.stage.name}' has no draws: its work SQL uses no $draw",
            where={"file": use.sql.origin},
            fix="select coalesce(image_draw + $draw, 0) as draw, as the generate stage's own SQL does",
        )
    return {**use.params, "draw": use.params["draw"] + 1}

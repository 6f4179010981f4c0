"""The verb `status`: what the table holds."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from builder import formats
from builder.engine import outdated
from builder.engine.counting import count_rows
from builder.engine.work import Choice
from builder.errors import ConfigError
from builder.hybrid import image
from builder.hybrid.edit import Rules, members_of
from builder.sources.base import OF_SHARD
from builder.store.layout import names
from builder.table import partitions
from builder.table.query import Samples
from builder.table.schema import Column
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot
from builder.verbs.stage import failure_classes
from builder.verbs.works import work_of


def read_status(pipeline: Pipeline) -> dict[str, Any]:
    """What the table holds: shards, rows, for each stage its answers and failures by class, and new images that `write`
    leaves out, by reason.

    `out_of_date` is None for a stage that the pipeline has not, or whose SQL is refused.
    """
    snapshot = Snapshot(pipeline)
    layout, shards, columns = snapshot.layout, snapshot.table_shards, snapshot.columns
    healed = partitions.heal(layout, shards)
    stages = list(dict.fromkeys(column.stage for column in columns))
    result: dict[str, Any] = {"root": str(layout.root), "shards": len(shards), "healed": healed, "stages": {}}
    known = snapshot.known_columns
    with Samples(layout, known, layout.partitions()) as samples:
        counts = ", ".join(
            f"count(*) filter ({name}_status = 'ok'), count(*) filter ({name}_status = 'failed')" for name in stages
        )
        of_a_shard = f"max(source_notes) filter (starts_with(source_notes, '{OF_SHARD}'))"
        others = (
            f"count(source_notes), coalesce({of_a_shard}, max(source_notes)), count(distinct shard), count(image_path)"
        )
        suspects = "".join(
            f", count(*) filter ({outdated.suspicion(use.stage)} <> {outdated.SAME})"
            for use in pipeline.stages.values()
        )
        all_of_it = f"select count(*), {counts}, {others}{suspects} from samples s"  # one pass: partitions are many
        answer = samples.fixed(all_of_it)[0]
        row, rest = answer[: 1 + 2 * len(stages)], answer[1 + 2 * len(stages) :]
        noted, note, with_rows, images, *doubtful = rest
        late = _out_of_date(snapshot, doubtful)
        result["rows"] = row[0]
        result["notes"] = {"rows": noted, "example": note}
        result["no_sample"] = []
        if with_rows < len(shards):
            have = {shard for (shard,) in samples.fixed("select distinct shard from samples")}
            result["no_sample"] = [shard for shard in shards if shard not in have]
        for i, name in enumerate(stages):
            ok, failed = row[1 + 2 * i], row[2 + 2 * i]
            classes = failure_classes(samples, name) if failed else []
            result["stages"][name] = {
                "ok": ok,
                "failed": failed,
                "not_tried": row[0] - ok - failed,
                "out_of_date": late.get(name),
                "errors": [{"class": kind, "rows": count, "example": example} for kind, count, example in classes],
            }
        is_writing = images and pipeline.asked.has_hybrid_shards
        result["left_out"] = dict(_left_out(samples, known, pipeline.editing)) if is_writing else {}
    result["hybrid_shards"] = len(layout.hybrid_names())
    result["runs"] = len(names(layout.runs))
    return result


def _left_out(samples: Samples, columns: Sequence[Column], editing: Rules) -> Counter[str]:
    """New images that the writer leaves out, since their samples stay the source's, by reason."""
    found: Counter[str] = Counter()
    kind = "image_format" if image.says_format(columns) else "null"
    alike = samples.fixed(
        f"select list_transform(source_members, lambda m: m.ext), {kind}, count(*) from samples "
        "where image_path is not null and source_status = 'ok' group by all order by all"
    )
    for extensions, said, count in alike:
        members = members_of(tuple(extensions), formats.named(said), True, False, editing)
        if isinstance(members, str):
            found[members] += count
    return found


def _out_of_date(snapshot: Snapshot, suspects: Sequence[int]) -> dict[str, int]:
    """How many answers of each stage of the pipeline are out of date; inputs are read only where samples changed.

    Args:
        suspects: of each stage in order, answers whose sample changed.
    """
    found = {}
    for name, count in zip(snapshot.pipeline.stages, suspects, strict=True):
        if not count:
            found[name] = 0
            continue
        with contextlib.suppress(ConfigError):  # the stage's own command reports what is wrong with its SQL
            work = work_of(snapshot, name, Choice(), snapshot.table_shards)
            found[name] = count_rows(snapshot.layout, [work])[0].out_of_date
    return found

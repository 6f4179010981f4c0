"""The verb `plan`: what there is to do; nothing is started."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from builder.engine import rules
from builder.engine.counting import count_rows
from builder.engine.work import Choice, Counts
from builder.table import partitions
from builder.verbs.ingest import IngestPlan, plan_ingest
from builder.verbs.pipeline import Pipeline, shards_of, work_of
from builder.verbs.write import WritePlan, plan_write

# --- plan, status ---


@dataclass
class Plan:
    """What `builder run` would do now.

    Attributes:
        older: answers that older versions gave; a run leaves them as they are.
    """

    ingest: IngestPlan
    stages: dict[str, Counts]
    write: WritePlan
    older: list[rules.OlderRule]


def make_plan(pipeline: Pipeline, choice: Choice) -> Plan:
    """Counts what there is to do; starts nothing."""
    ingest_plan = plan_ingest(pipeline)
    layout = pipeline.layout
    shards = shards_of(pipeline)
    partitions.heal(layout, shards)
    by_run: dict[str, Counter[str]] = {}
    works = [work_of(pipeline, name, choice, shards) for name in pipeline.stages]
    counts = count_rows(layout, works, by_run)
    older = rules.of_ingest(ingest_plan.versions, pipeline.asked.changes)
    for use in pipeline.stages.values():
        older += rules.of_stage(layout, use.stage, by_run[use.stage.name])
    write_plan = plan_write(pipeline, is_healed=True)
    return Plan(ingest_plan, dict(zip(pipeline.stages, counts, strict=True)), write_plan, older)

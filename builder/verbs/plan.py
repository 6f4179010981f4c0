"""The verb `plan`: what there is to do; nothing is started."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from builder.engine import rules
from builder.engine.counting import count_rows
from builder.engine.work import Choice, Counts
from builder.verbs.ingest import IngestPlan, plan_ingest
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot
from builder.verbs.works import work_of
from builder.verbs.write import WritePlan, plan_write


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
    snapshot = Snapshot(pipeline)
    layout = snapshot.layout
    ingest_plan = plan_ingest(snapshot)
    snapshot.heal()
    by_run: dict[str, Counter[str]] = {}
    works = [work_of(snapshot, name, choice, snapshot.shards) for name in pipeline.stages]
    counts = count_rows(layout, works, by_run)
    older = rules.of_ingest(ingest_plan.versions, pipeline.asked.changes)
    for use in pipeline.stages.values():
        older += rules.of_stage(layout, use.stage, by_run[use.stage.name])
    write_plan = plan_write(snapshot)
    return Plan(ingest_plan, dict(zip(pipeline.stages, counts, strict=True)), write_plan, older)

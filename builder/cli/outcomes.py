"""Reports of a finished verb: one line on what it did, what was refused or left, how to try again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from builder import exit_codes
from builder.cli.failures import options_for
from builder.progress import Talk, plain

if TYPE_CHECKING:
    from builder.engine.runs import Outcome
    from builder.verbs.pipeline import Pipeline

#: Most remarks about shards that an ingest prints.
_REMARKS = 10


# --- what people read ---


def tell_outcome(loaded: Pipeline, name: str, outcome: Outcome, talk: Talk) -> None:
    """Prints one line on what a command did, and one per refused shard."""
    if outcome.counts:
        shown = ("shards", "rows", "changed", "ok", "failed", "kept", "dropped", "edited")
        words = _WORDS if name != "write" else {}
        counts = ", ".join(f"{outcome[key]} {words.get(key, key)}" for key in shown if outcome[key])
        talk.say(f"{name}: {counts or 'nothing'} in {outcome.seconds:.1f} s")
    if outcome["kept"] and outcome.run is not None:
        talk.say(f"  why: cat {outcome.run.all_failures}")
    for shard, reason in outcome.refused.items():
        talk.say(f"refused shard '{plain(shard)}': {reason}")
    if name == "ingest":
        for text in loaded.asked.summary(outcome.counts):
            talk.say(text)
    remarks = [(shard, text) for shard in sorted(outcome.remarks) for text in outcome.remarks[shard]]
    for shard, text in remarks[:_REMARKS]:
        talk.say(f"shard '{plain(shard)}': {text}")
    if len(remarks) > _REMARKS and outcome.run is not None:
        talk.say(f"and {len(remarks) - _REMARKS} more of these lines: 'remarks' in {outcome.run.all_results}")
    for shard, reason in outcome.left.items():
        talk.say(f"left shard '{plain(shard)}' as it is: {reason}")
    if outcome.unfinished is not None:
        talk.say(f"{name}: not finished: {outcome.unfinished}")
    if options := options_for(loaded, [*outcome.refused.values(), *outcome.left.values(), str(outcome.unfinished)]):
        talk.say(options)


_WORDS = {"kept": "failed again, their old answer stays", "dropped": "answered by another run or left out"}


def tell_failed(loaded: Pipeline, outcomes: dict[str, Outcome], talk: Talk) -> None:
    """Prints where to look after rows have failed, and how to try them again if that may help."""
    from builder.verbs.stage import is_lasting

    for name, outcome in outcomes.items():
        if outcome["failed"]:
            talk.say(f"{name}: {outcome['failed']} failed\n  why: {loaded.command('status')}")
            if name != "ingest" and is_lasting(loaded, name, outcome):
                talk.say("  another try would give the same: they need other inputs or options")
            elif name != "ingest":
                retry = loaded.command(f"stage {name} --retry failed")
                talk.say(f"  to try them again: {retry}")


def exit_code(outcomes: Iterable[Outcome]) -> int:
    done = list(outcomes)
    if any(outcome.left or outcome.unfinished for outcome in done):
        return exit_codes.UNFINISHED
    return exit_codes.DONE if all(outcome.is_clean for outcome in done) else exit_codes.FAILED_ROWS

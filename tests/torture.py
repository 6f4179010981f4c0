"""The kill harness: commands are killed at every point at which they touch the disk, and at random moments.

    python tests/torture.py [--kills 300] [--hiccups 300] [--seed N] [--minutes 25] [--hostile DIR...]

Every write, parquet file, fsync, link, rename, unlink and mkdir of ingest, stage, fold, write and gc on small roots is
struck before, after and (where it has bytes) amid it; then come kills at random moments, of forks and of real commands
with their workers. Besides, reads are answered with an error once: EIO, ESTALE, ETIMEDOUT, ENOMEM, EMFILE at every file
that is opened, read or mapped. After each the root is checked, see tests/support/kills.py.
Exit code 0 if all held, else 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # a fork has no threads of its parent's
REPOSITORY = str(Path(__file__).resolve().parent.parent)
sys.path.insert(1, REPOSITORY)  # the package beside these tests, in the commands too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [REPOSITORY, os.environ.get("PYTHONPATH")]))

from support.faults import READS  # noqa: E402
from support.kills import KILLED, READ_SCENES, SCENES, Broken, Harness, Kill, seeded  # noqa: E402

#: Kills of real commands with worker processes, and of forks at random moments, of a whole run.
ON_THE_COMMAND_LINE, AT_RANDOM = 40, 60
VERBS = ("ingest", "stage", "fold", "write", "gc", "verify")
COLUMNS = (*KILLED, "random", "command", *READS)
CHECKED = """After each: nothing that was committed is lost; no half
file has a name; the same command then does what is left and no more, and comes to the same table and the same bytes;
verify is clean; gc deletes what is dead, and nothing of a living process, of another host, or of a person's."""
#: Kills after which a lane says how far it is.
SHOWN = 50
#: Broken kills of one lane after which there is enough to look at.
ENOUGH = 5


@dataclass
class Report:
    """What a lane did: kills by verb and kind of point, how many there were to do, and what was broken."""

    counted: Counter[tuple[str, str]] = field(default_factory=Counter)
    jobs: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.counted += other.counted
        self.jobs += other.jobs
        self.broken += other.broken


def main() -> int:
    options = _options()
    began = time.monotonic()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="builder-torture-") as folder:
        places = [Path(folder) / str(number) for number in range(options.lanes)]
        print(f"seed {options.seed}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(options.lanes, multiprocessing.get_context("spawn")) as pool:
            for part in list(pool.map(_lane, places, range(options.lanes), [options] * options.lanes)):
                report.add(part)
    killed = sum(report.counted.values())
    _print(report.counted, time.monotonic() - began, options.seed)
    wanted = report.jobs if options.sample or options.only else min(options.kills, report.jobs)
    if killed < report.jobs:
        print(f"{report.jobs - killed} more were left out: {options.minutes:g} minutes were over, or enough was broken")
    hostile = 0
    if options.hostile:
        front = Path(__file__).with_name("hostile.py")
        sys.stdout.flush()  # the table first
        hostile = subprocess.run([sys.executable, str(front), *options.hostile]).returncode
    return 1 if report.broken or killed < wanted or hostile else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300, help="at least so many; every point once in any case")
    parser.add_argument("--hiccups", type=int, default=300, help="reads that fail once, every command its turn")
    parser.add_argument("--sample", type=int, default=0, help="only so many kills, and an error a command")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=25.0, help="stop after so many")
    parser.add_argument("--lanes", type=int, default=2, help="processes that kill beside each other")
    parser.add_argument("--hostile", nargs="+", metavar="DIR", help="then tests/hostile.py over these folders")
    parser.add_argument(
        "--only", metavar="KILL", action="append", help="do this one, as a broken one is called; repeatable"
    )
    return parser.parse_args()


def _jobs(harness: Harness, options: argparse.Namespace) -> list[Kill]:
    chosen = random.Random(options.seed)
    if options.only:
        return [_named(harness, text) for text in options.only]
    if options.sample:
        commands = options.sample // 10
        points = [kill for scene in SCENES if scene.short for kill in harness.kills(scene)]
        sample = seeded(points, options.sample - commands, options.seed)
        short = [kill for scene in READ_SCENES if scene.short for kill in harness.hiccups(scene)]
        sample += seeded(short, len(VERBS), options.seed)
        return sample + [_at_random(chosen, command=True) for _ in range(commands)]
    points = [kill for scene in SCENES for kill in harness.kills(scene)]
    forks = max(AT_RANDOM, options.kills - len(points) - ON_THE_COMMAND_LINE)
    jobs = points + [_at_random(chosen, command=False) for _ in range(forks)]
    jobs += [_at_random(chosen, command=True) for _ in range(ON_THE_COMMAND_LINE)]
    reads = [kill for scene in READ_SCENES for kill in harness.hiccups(scene)]
    jobs += seeded(reads, options.hiccups, options.seed)
    chosen.shuffle(jobs)  # if the time is over before all of them, some of each kind were done
    return jobs


def _at_random(chosen: random.Random, *, command: bool) -> Kill:
    scene = chosen.choice([scene for scene in SCENES if scene.short or not command])
    if command:
        who = ("command", "all", "worker") if scene.verb in ("ingest", "stage", "write") else ("command",)
        return Kill(scene.name, "command", None, chosen.choice(who))
    return Kill(scene.name, "random", None, "process")


def _named(harness: Harness, text: str) -> Kill:
    name, number, when = text.rsplit(":", 2)
    scene = next(scene for scene in READ_SCENES if scene.name == name)
    if when.startswith("E"):
        return Kill(name, harness.reads(scene)[int(number)].kind, int(number), when)
    if not number:
        return Kill(name, "command" if when != "process" else "random", None, when)
    return Kill(name, harness.points(scene)[int(number)].kind, int(number), when)


def _lane(folder: Path, number: int, options: argparse.Namespace) -> Report:
    """Every so many-th kill, one after the other, in a folder of its own."""
    until = time.monotonic() + options.minutes * 60
    harness = Harness(folder, options.seed + number)
    scenes = {scene.name: scene for scene in READ_SCENES}
    jobs = _jobs(harness, options)[number :: options.lanes]
    report = Report(jobs=len(jobs))
    for done, kill in enumerate(jobs):
        if done and done % SHOWN == 0:
            print(
                f"lane {number}: {done} of {len(jobs)} kills, {len(report.broken)} broken", file=sys.stderr, flush=True
            )
        is_alone = (parent := multiprocessing.parent_process()) is None or not parent.is_alive()
        if is_alone or time.monotonic() > until or len(report.broken) >= ENOUGH:
            break
        scene = scenes[kill.scene]
        is_read = kill.when.startswith("E")
        try:
            if is_read:
                harness.hiccup(scene, kill)
            while not is_read and not harness.kill(scene, kill):
                pass  # it ended before its random moment
        except Broken as error:
            points = harness.reads(scene) if is_read else harness.points(scene)
            place = "a random moment" if kill.number is None else points[kill.number]
            report.broken.append(f"broken: --only '{kill}' at {place}\n{error}")
            print(report.broken[-1], file=sys.stderr, flush=True)  # at once: the run may be stopped before its end
        report.counted[scene.verb, kill.kind] += 1
    return report


def _print(counted: Counter[tuple[str, str]], seconds: float, seed: int) -> None:
    columns = [kind for kind in COLUMNS if any(counted[verb, kind] for verb in VERBS)]
    lines = [["killed in", *columns, "total"]]
    for verb in VERBS:
        lines.append([verb, *(str(counted[verb, kind]) for kind in columns), str(_sum(counted, verb))])
    totals = [str(sum(counted[verb, kind] for verb in VERBS)) for kind in columns]
    lines.append(["total", *totals, str(sum(counted.values()))])
    print("\n".join("  ".join(f"{cell:>{8 if i else 9}}" for i, cell in enumerate(line)) for line in lines))
    print(f"{sum(counted.values())} kills and errors in {seconds:.0f} s, seed {seed}. {CHECKED}")


def _sum(counted: Counter[tuple[str, str]], verb: str) -> int:
    return sum(count for (name, _), count in counted.items() if name == verb)


if __name__ == "__main__":
    sys.exit(main())

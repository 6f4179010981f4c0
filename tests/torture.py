"""The kill harness: commands are killed at every point at which they touch the disk, and at random moments.

    python tests/torture.py [--kills 300] [--seed N] [--minutes 25] [--hostile DIR]

Every write, parquet file, fsync, link, rename, unlink and mkdir of ingest, stage, fold, write and gc on small roots is
struck before, after and (where it has bytes) amid it; then come kills at random moments, of forks and of real commands
with their workers. After each the root is checked, see tests/kills.py. Exit code 0 if all of it held, else 1.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # forks have no threads of their parent's
os.environ["COLUMNS"] = "120"

from kills import KILLED, SCENES, Broken, Harness, Kill, seeded  # noqa: E402

#: Kills of real commands with worker processes, and of forks at random moments, of a whole run; and of a sample of 25.
ON_THE_COMMAND_LINE, AT_RANDOM = 40, 60
VERBS = ("ingest", "stage", "fold", "write", "gc")
COLUMNS = (*KILLED, "random", "command")
#: Broken kills after which there is enough to look at.
ENOUGH = 5


def main() -> int:
    options = _options()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="builder-torture-") as folder:
        harness = Harness(Path(folder), options.seed)
        jobs = _jobs(harness, options)
        counted, broken = _kill(harness, jobs, began + options.minutes * 60)
    seconds = time.monotonic() - began
    _print(counted, seconds, options.seed)
    for text in broken:
        print(text)
    wanted = min(options.kills, len(jobs))
    missing = sum(counted.values()) < wanted
    if missing:
        print(f"only {sum(counted.values())} of {wanted} kills in {options.minutes:g} minutes")
    hostile = 0
    if options.hostile:
        hostile = subprocess.run([sys.executable, str(Path(__file__).with_name("hostile.py")), options.hostile]).returncode
    return 1 if broken or missing or hostile else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300, help="at least so many; every point once in any case")
    parser.add_argument("--sample", type=int, default=0, help="only so many, every command its turn: the short form")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=25.0, help="stop after so many")
    parser.add_argument("--hostile", metavar="DIR", help="then tests/hostile.py over a folder of broken files")
    parser.add_argument("--only", metavar="KILL", action="append", help="do this one, as a broken one is called; repeatable")
    return parser.parse_args()


def _jobs(harness: Harness, options: argparse.Namespace) -> list[Kill]:
    chosen = random.Random(options.seed)
    if options.only:
        return [_named(harness, text) for text in options.only]
    points = [kill for scene in SCENES for kill in harness.kills(scene)]
    if options.sample:
        commands = max(options.sample // 8, 1)
        sample = seeded(points, options.sample - commands, options.seed)
        return sample + [_at_random(chosen, command=True) for _ in range(commands)]
    forks = max(AT_RANDOM, options.kills - len(points) - ON_THE_COMMAND_LINE)
    return [
        *points,
        *(_at_random(chosen, command=False) for _ in range(forks)),
        *(_at_random(chosen, command=True) for _ in range(ON_THE_COMMAND_LINE)),
    ]


def _at_random(chosen: random.Random, *, command: bool) -> Kill:
    scene = chosen.choice(SCENES)
    if command:
        who = ("command", "all", "worker") if scene.verb in ("ingest", "stage", "write") else ("command",)
        return Kill(scene.name, "command", None, chosen.choice(who))
    return Kill(scene.name, "random", None, "process")


def _named(harness: Harness, text: str) -> Kill:
    name, number, when = text.rsplit(":", 2)
    scene = next(scene for scene in SCENES if scene.name == name)
    if not number:
        return Kill(name, "command" if when != "process" else "random", None, when)
    return Kill(name, harness.points(scene)[int(number)].kind, int(number), when)


def _kill(harness: Harness, jobs: list[Kill], until: float) -> tuple[Counter[tuple[str, str]], list[str]]:
    scenes = {scene.name: scene for scene in SCENES}
    counted: Counter[tuple[str, str]] = Counter()
    broken: list[str] = []
    for done, kill in enumerate(jobs):
        if time.monotonic() > until or len(broken) >= ENOUGH:
            break
        scene = scenes[kill.scene]
        try:
            while not harness.kill(scene, kill):
                pass  # it ended before its random moment
        except Broken as error:
            place = harness.points(scene)[kill.number] if kill.number is not None else "a random moment"
            broken.append(f"broken: --only '{kill}' --seed ... at {place}\n{error}")
        counted[scene.verb, kill.kind] += 1
        if sys.stderr.isatty():
            print(f"\r{done + 1} of {len(jobs)} kills", end="", file=sys.stderr, flush=True)
    return counted, broken


def _print(counted: Counter[tuple[str, str]], seconds: float, seed: int) -> None:
    columns = [kind for kind in COLUMNS if any(counted[verb, kind] for verb in VERBS)]
    lines = [["killed in", *columns, "total"]]
    for verb in VERBS:
        lines.append([verb, *(str(counted[verb, kind]) for kind in columns), str(_sum(counted, verb))])
    totals = [str(sum(counted[verb, kind] for verb in VERBS)) for kind in columns]
    lines.append(["total", *totals, str(sum(counted.values()))])
    print("\n".join("  ".join(f"{cell:>{8 if i else 9}}" for i, cell in enumerate(line)) for line in lines))
    print(
        f"{sum(counted.values())} kills in {seconds:.0f} s, seed {seed}. After each: nothing that was committed is lost, no half\n"
        "file has a name, the same command then comes to the same table and the same bytes, verify is clean, gc sweeps\n"
        "what is dead and leaves what is needed, of a process that lives, of another host, or a person's."
    )


def _sum(counted: Counter[tuple[str, str]], verb: str) -> int:
    return sum(count for (name, _), count in counted.items() if name == verb)


if __name__ == "__main__":
    sys.exit(main())

"""Every path of ours beside its peers, in turn, several rounds; one table and one file.

    python -m bench --folder build/bench

Every measurement is a process of its own whose imports lie outside the clock. Sources are hot: each is read once
before. A ratio is taken within a round and the median of the rounds is shown, since times of other rounds differ by
the state of the page cache more than by the method.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench import corpus, faces, images, prompts, tables, work
from bench.report import Result, compared, rounds_of, table, write
from builder.executors.base import DEFAULTS
from builder.sources.ingest import ingest_shard
from builder.stages.contract import columns_of
from builder.stages.finding import find as find_stage
from builder.store.layout import Layout
from builder.table import commits, partitions, root_schema
from builder.table.edits import EditsTar

#: Share of the samples that are edited.
EDITED = 0.15


# --- running things ---


@dataclass(frozen=True)
class Ran:
    """What one process measured of itself."""

    seconds: float
    peak_mb: float


def run(*works: Sequence[object]) -> list[Ran]:
    """Runs pieces of work side by side, one process each, from the same moment on."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.work", *map(str, one)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**(DEFAULTS if one[0] in work.OF_WORKERS else {}), **os.environ},
        )
        for one in works
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"bench.work {works} ended before it was ready")
    os.sync()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in processes]
    return [Ran(**json.loads(answer)) for answer in answers]


def seconds(*works: Sequence[object]) -> float:
    """The time until the last of them is done."""
    return max(ran.seconds for ran in run(*works))


def shell(*commands: str) -> float:
    """The time until the last of some shell commands is done, all begun at once."""
    os.sync()
    began = time.perf_counter()
    processes = [subprocess.Popen(["sh", "-c", command]) for command in commands]
    for process in processes:
        if process.wait() != 0:
            raise SystemExit(f"failed: {commands}")
    return time.perf_counter() - began


def fresh(*paths: Path) -> None:
    """Removes what a round before has written."""
    for path in paths:
        path.unlink(missing_ok=True)


def heat(*paths: Path) -> None:
    """Leaves files in the page cache as a reader does: in larger pieces than whoever wrote them did."""
    shell("sync")
    for path in paths:
        forget(path)
    shell(*(f"cat {path} >/dev/null" for path in paths))


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def uncached(path: Path, measure: Callable[[], float]) -> float:
    """What is measured with a file that is not in the page cache."""
    forget(path)
    return measure()


# --- ingest ---


def measure_ingest(folder: Path, rounds: int, samples: int) -> list[Result]:
    pax = corpus.make(folder, corpus.Shards("pax", 2, samples))
    ustar = corpus.make(folder, corpus.Shards("ustar", 2, samples, is_pax=False))
    long = corpus.make(folder, corpus.Shards("long", 2, samples // 5, is_pax=False, has_long_names=True))
    heat(*pax, *ustar)
    roots = [folder / f"ingest{i}" for i in range(2)]
    out = folder / "webdataset.parquet"
    values = rounds_of(
        rounds,
        lambda: seconds(("ingest", roots[0], pax[0])),
        lambda: seconds(("webdataset_ingest", out, pax[0])),
        lambda: seconds(("ingest", roots[0], ustar[0])),
        lambda: seconds(("webdataset_ingest", out, ustar[0])),
        lambda: shell(f"tar tf {pax[0]} >/dev/null"),
        lambda: shell(f"cat {pax[0]} >/dev/null"),
        lambda: shell(*(f"cat {path} >/dev/null" for path in pax)),
        lambda: seconds(*(("ingest", root, path) for root, path in zip(roots, pax, strict=True))),
        lambda: uncached(pax[0], lambda: seconds(("ingest", roots[0], pax[0]))),
        lambda: uncached(pax[0], lambda: shell(f"cat {pax[0]} >/dev/null")),
    )
    ours, peer, ours_ustar, peer_ustar, listed, cat, cat_two, ours_two, cold, cat_cold = values
    check_ingest(roots[0], pax[0])
    for path in long:
        run(("ingest", roots[0], path))
        check_ingest(roots[0], path)
    scaling = [2 * one / two for one, two in zip(ours, ours_two, strict=True)]
    cat_scaling = [2 * one / two for one, two in zip(cat, cat_two, strict=True)]
    return [
        compared("ingest pax / webdataset", ours, peer, 10),
        compared("ingest ustar / webdataset", ours_ustar, peer_ustar, 7),
        compared("ingest pax / tar tf", ours, listed, 1 / 4),
        compared("ingest, scaling of 2 processes / of 2 cat", scaling, cat_scaling, 0.85, unit="x", more=True),
        compared("ingest pax, cold / cat, cold", cold, cat_cold, 1 / 2.5),
    ]


def check_ingest(root: Path, path: Path) -> None:
    """Every sample is there with its own caption and its own bytes, by Python's tarfile."""
    layout = Layout(root)
    rows = pq.read_table(layout.partition(path.stem), columns=["key", "caption", "source_members"]).to_pylist()
    with tarfile.open(path) as archive, path.open("rb") as file:
        members = {info.name: info for info in archive}
        if len(members) != sum(len(row["source_members"]) for row in rows):
            raise SystemExit("ingest lost members")
        for row in random.Random(corpus.SEED).sample(rows, min(300, len(rows))):
            for place in row["source_members"]:
                info = members[f"{row['key']}.{place['ext']}"]
                file.seek(place["data"])
                content = file.read(place["size"])
                taken = archive.extractfile(info)
                if taken is None or content != taken.read():
                    raise SystemExit(f"ingest placed {info.name} wrongly")
                if place["ext"] == "txt" and content.decode() != row["caption"]:
                    raise SystemExit(f"ingest gave {row['key']} another caption")


# --- writer ---


def prepare_write(folder: Path, paths: Sequence[Path]) -> tuple[Layout, list[Path]]:
    """A root with generated images for a share of the samples; and the same edits as parquet, for the peer."""
    layout = Layout(folder / "write")
    edits = [folder / f"edits-{path.stem}.parquet" for path in paths]
    if (layout.root / "made").exists():
        return layout, edits
    shutil.rmtree(layout.root, ignore_errors=True)
    root_schema.extend_schema(layout, work.hybrid_columns())
    run = {"stage": "generate", "version": "1", "options_hash": "0" * 16}
    layout.run("bench").mkdir(parents=True)
    (layout.run("bench") / "run.json").write_text(json.dumps(run))
    for path, edit in zip(paths, edits, strict=True):
        ingest_shard(layout, work.READING, path.stem, path, "bench")
        _generate(layout, path.stem, edit)
    (layout.root / "made").touch()
    return layout, edits


def _generate(layout: Layout, shard: str, edits: Path) -> None:
    """Commits images of the corpus as if they had been generated."""
    stage = columns_of(find_stage("generate"))
    have, state = partitions.read_partition(layout, shard, ["key"])
    chance = random.Random(f"{corpus.SEED} {shard}")
    rows = sorted(chance.sample(range(have.num_rows), int(EDITED * have.num_rows)))
    chosen = [corpus.pictures()[chance.randrange(corpus.PICTURES)] for _ in rows]
    prompts = [f"a new picture, number {row}, of a street in the evening" for row in rows]
    tar = EditsTar(layout, shard, "bench-a", 0)
    places = [tar.add(f"{row:08d}.jpg", data) for row, (data, _) in zip(rows, chosen, strict=True)]
    tar.close()
    count = len(rows)
    values: dict[str, Any] = {
        "image_path": [place.path for place in places], "image_offset": [place.offset for place in places],
        "image_size": [place.size for place in places],
        "image_sha256": [hashlib.sha256(data).hexdigest() for data, _ in chosen],
        "image_width": [size[0] for _, size in chosen], "image_height": [size[1] for _, size in chosen],
        "image_seed": rows, "image_model": ["bench"] * count, "image_prompt": prompts,
        "image_draw": [0] * count, "generate_status": ["ok"] * count, "generate_run": ["bench"] * count,
        "generate_inputs": rows,
    }  # fmt: skip
    nothing = [None] * count
    done = pa.table({column.name: pa.array(values.get(column.name, nothing), column.type) for column in stage})
    done = done.append_column("row", pa.array(rows, pa.int64()))
    commits.commit(layout, shard, "generate", stage, done, [None] * count, rows=state.rows, attempt="bench-a")
    partitions.heal(layout, [shard])
    keys = [have["key"][row].as_py() for row in rows]
    pq.write_table(pa.table({"key": keys, "prompt": prompts, "image": [data for data, _ in chosen]}), edits)


def measure_write(folder: Path, rounds: int, samples: int) -> list[Result]:
    pax = corpus.make(folder, corpus.Shards("pax", 2, samples))
    layout, edits = prepare_write(folder, pax)
    shards = [path.stem for path in pax]
    copies = [folder / f"copy{i}.tar" for i in range(2)]
    peer_out = folder / "peer-%d.tar"
    heat(*pax)

    def copied(count: int, *, durable: bool) -> float:
        fresh(*copies)
        durably = [f" && sync {copy} {folder}" if durable else "" for copy in copies]
        commands = [f"cp {path} {copy}{more}" for path, copy, more in zip(pax, copies, durably, strict=True)]
        return shell(*commands[:count])

    def ours(count: int, durable: str) -> float:
        return seconds(*(("write", layout.root, durable, shard) for shard in shards[:count]))

    values = rounds_of(
        rounds,
        lambda: ours(1, "no"),
        lambda: copied(1, durable=False),
        lambda: ours(1, "yes"),
        lambda: copied(1, durable=True),
        lambda: seconds(("webdataset_write", pax[0], peer_out, edits[0])),
        lambda: ours(2, "no"),
        lambda: copied(2, durable=False),
    )
    hot, cp, durable, cp_durable, peer, two, cp_two = values
    check_write(layout, pax[0], edits[0])
    scaling = [2 * one / both for one, both in zip(hot, two, strict=True)]
    cp_scaling = [2 * one / both for one, both in zip(cp, cp_two, strict=True)]
    return [
        compared("write, 15 % edited / cp", hot, cp, 0.75),
        compared("write, 15 % edited, durable / cp + sync", durable, cp_durable, 0.85),
        compared("write, 15 % edited / webdataset rewriting", hot, peer, 15),
        compared("write, scaling of 2 processes / of 2 cp", scaling, cp_scaling, 0.85, unit="x", more=True),
    ]


def check_write(layout: Layout, path: Path, edits: Path) -> None:
    """Names and order are the source's; edited images and captions are the edits'; other members are the source's."""
    new = {row["key"]: row for row in pq.read_table(edits).to_pylist()}
    with tarfile.open(path) as source, tarfile.open(layout.hybrid(path.stem)) as hybrid:
        for old, made in zip(source, hybrid, strict=True):
            if old.name != made.name:
                raise SystemExit(f"write: {made.name} stands where {old.name} did")
            key, _, extension = old.name.partition(".")
            was, now = source.extractfile(old), hybrid.extractfile(made)
            assert was is not None and now is not None
            wanted = {"jpg": "image", "txt": "prompt"}.get(extension) if key in new else ""
            if wanted is None:
                continue
            expected = new[key][wanted] if wanted else was.read()
            if now.read() != (expected.encode() if isinstance(expected, str) else expected):
                raise SystemExit(f"write: {made.name} is not what it should be")


# --- table ---


def measure_table(folder: Path, rounds: int, samples: int) -> list[Result]:
    pax = corpus.make(folder, corpus.Shards("pax", 2, samples))
    layout, _ = prepare_write(folder, pax)
    root_schema.extend_schema(layout, columns_of(find_stage("lang")))
    partition = layout.partition(pax[0].stem)
    committed, rewritten = rounds_of(
        max(rounds, 9),
        lambda: seconds(("commit", layout.root, pax[0].stem)),
        lambda: seconds(("rewrite", partition)),
    )
    return [compared("commit and fold of 3 columns / pyarrow rewriting", committed, rewritten, 1 / 1.5)]


def measure_questions(folder: Path, rounds: int, partitions: int, rows: int) -> list[Result]:
    big = folder / f"table-{partitions}"
    tables.make(big, tables.pipeline_in(big), partitions, rows)
    linked = folder / f"table-{10 * partitions}-linked"
    _linked(big, linked)
    peaks: list[float] = []

    def ask() -> float:
        (ran,) = run(("ask", big))
        peaks.append(ran.peak_mb)
        return ran.seconds

    ask()
    ours, peer, many = rounds_of(rounds, ask, lambda: seconds(("polars_ask", big)), lambda: seconds(("ask", linked)))
    name = f"count over {partitions:,} partitions, {partitions * rows / 1e6:g} M rows"
    return [
        compared(f"{name} / polars", ours, peer, 1 / 1.2),
        compared(f"{name}: peak memory / 300 MB", peaks[1:], [300.0] * rounds, 1, unit="MB"),
        compared(f"count over {10 * partitions:,} partitions / 12 x the above", many, [12 * one for one in ours], 1),
    ]


def _linked(folder: Path, linked: Path) -> None:
    """Ten times as many partitions, hard links of the ones that are there."""
    source, target = tables.pipeline_in(folder).layout, tables.pipeline_in(linked).layout
    if target.samples.exists():
        return
    root_schema.extend_schema(target, tables.pipeline_in(linked).own_columns)
    target.samples.mkdir(parents=True)
    for number, shard in enumerate(source.partitions() * 10):
        os.link(source.partition(shard), target.partition(f"{number:08d}"))


def measure_scale(folder: Path, rounds: int, partitions: int, rows: int) -> list[Result]:
    """plan, status, freeze and healing checks: each within a minute, and ten times as long for ten times as many."""
    small, large = folder / f"many-{partitions // 10}", folder / f"many-{partitions}"
    for place, count in ((small, partitions // 10), (large, partitions)):
        tables.make(place, tables.pipeline_in(place), count, rows)
    results = []
    for verb in ("plan", "status", "freeze", "heal"):
        one, ten = rounds_of(max(rounds // 2, 1), partial(seconds, (verb, small)), partial(seconds, (verb, large)))
        limit = [60.0] * len(ten)
        results.append(compared(f"{verb} over {partitions:,} partitions / a minute", ten, limit, 1))
        results.append(compared(f"{verb}, 10 times as many / 12 times the time", ten, [12 * t for t in one], 1))
    return results


def measure_second_run(folder: Path, rounds: int, count: int) -> list[Result]:
    """`builder run` over shards that are done: the whole command, start and imports included."""
    place = folder / f"done-{count}"
    tables.pipeline_in(place)
    corpus.make(place, corpus.Shards("source", count, 2))
    command = [sys.executable, "-m", "builder", "run", "--pipeline", str(place / "pipeline.toml")]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--set", "run.workers=2"], check=True, **quiet)

    def again() -> float:
        began = time.perf_counter()
        subprocess.run(command, check=True, **quiet)
        return time.perf_counter() - began

    again()
    (ours,) = rounds_of(rounds, again)
    return [compared(f"second run with nothing to do, {count:,} shards / 5 s", ours, [5.0] * rounds, 1)]


# --- all ---


def main() -> None:
    options = arguments()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    print(machine(), flush=True)
    parts: dict[str, Callable[[], list[Result]]] = {
        "ingest": lambda: measure_ingest(folder, options.rounds, options.samples),
        "write": lambda: measure_write(folder, options.rounds, options.samples),
        "commit": lambda: measure_table(folder, options.rounds, options.samples),
        "questions": lambda: measure_questions(folder, options.rounds, options.partitions, options.samples),
        "scale": lambda: measure_scale(folder, options.rounds, 10 * options.partitions, 100),
        "again": lambda: measure_second_run(folder, options.rounds, options.partitions),
        "faces": lambda: faces.measure(options.rounds, folder / "faces"),
        "prompts": lambda: prompts.measure(options.rounds),
        "images": lambda: images.measure(options.rounds, folder),
    }
    results: list[Result] = []
    for name, part in parts.items():
        if not options.only or name in options.only:
            found = part()
            print(f"\n{table(found)}", flush=True)
            results += found
    write(results, options.results)
    print(f"\n{table(results)}")
    missed = sum(not result.met for result in results)
    print(
        f"\n{len(results) - missed} of {len(results)} targets met, {time.monotonic() - began:.0f} s, {options.results}"
    )
    sys.exit(1 if missed else 0)


def machine() -> str:
    """Cores, memory, load and versions: ratios are the facts, and these say where they were taken."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("duckdb", "pyarrow", "polars", "webdataset", "orjson", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, load {load}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures every path beside its peers.")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="corpus and outputs [%(default)s]")
    parser.add_argument("--results", type=Path, default=Path("bench/results.json"), help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--samples", type=int, default=10_000, help="samples of a shard [%(default)s]")
    parser.add_argument("--partitions", type=int, default=2_000, help="partitions of the table [%(default)s]")
    names = "ingest, write, commit, questions, scale, again, faces, prompts, images"
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help=f"some of {names}")
    return parser.parse_args()


if __name__ == "__main__":
    main()

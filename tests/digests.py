"""Digests of what fixed pipelines come to: a change that should change no result leaves them equal.

    python tests/digests.py before.json --shards DIR... --tars DIR...
    python tests/digests.py after.json --shards DIR... --tars DIR... --against before.json

The pipelines: the demo; `--shards`: every folder of shards through all built-in stages; `--tars`: every tar below these
folders alone; prompts from a server of OpenAI's chat API; images by a tiny diffusers pipeline. Each is run by the
command line that lies beside this Python, in the same place every time. There is a digest of every column of the table,
except those that a run, a place or a clock decides, and of every file of the output. Exit codes are compared, messages
are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.llm_server import LlmServer, Play
from support.tiny_diffusers import make_sd

#: Columns that are not the same in two runs over the same source: runs and attempts, places of bytes, clocks, servers.
VARYING = re.compile(r".*_run|image_path|image_offset|prompt_ms|prompt_endpoint")
#: Size and time of a source in a manifest: the demo makes its shards anew each time.
_SOURCE = re.compile(r'"source": \[(\d+), \d+\]')
#: Names of runs and paths, in manifests and messages.
_RUN = re.compile(r"\d{8}T\d{6}-\w+-[0-9a-f]{4}(-[0-9a-f]{6})?(-\d+)?")
PIPELINE = """\
[dataset]
name = "digests"
shards = {shards}
root = "{root}"
fields = ["url", "sha256", "original_width"]

[run]
workers = 2

[stages.faces]
source = "auto"

[stages.lang]

[stages.prompts]
{prompts}

[stages.prompts.params]
min_faces = {faces}
lang = "any"

[stages.generate]
{images}

[stages.check]
"""
SERVER = """\
backend = "openai"
model = "tiny"

[[stages.prompts.endpoints]]
base_url = "{url}"
model = "tiny"
"""
SKETCHES = "width = 64\nheight = 64"
DIFFUSERS = 'backend = "diffusers"\nmodel = "{model}"\nwidth = 64\nheight = 64\nsteps = 2\nbatch_size = 4'


def main() -> int:
    options = _options()
    work = Path(options.work)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found: dict[str, Any] = {"demo": _demo(work / "demo")}
    for folder in options.shards:
        shards = json.dumps([str(path) for path in sorted(Path(folder).resolve().glob("*.tar"))])
        name = Path(folder).name
        found[f"shards {name}"] = _run(work / name, shards)
    tars = sorted(tar for folder in options.tars for tar in Path(folder).resolve().rglob("*.tar"))
    for number, tar in enumerate(tars):
        found[f"tar {tar.parent.name}/{tar.name}"] = _run(work / f"tar-{number}", json.dumps([str(tar)]), faces=0)
    if options.shards:
        few = json.dumps([str(sorted(Path(options.shards[0]).resolve().glob("*.tar"))[0])])
        with LlmServer() as server:
            server.always(Play(content=_rewritten))
            prompts = SERVER.format(url=server.base_url)
            found["a server"] = _run(work / "server", few, prompts=prompts)
        model = make_sd(work / "sd")
        found["diffusers"] = _run(work / "diffusers", few, images=DIFFUSERS.format(model=model))
    Path(options.out).write_text(json.dumps(found, indent=1, sort_keys=True), "utf-8")
    print(f"{len(found)} pipelines, {sum(len(one['table']) for one in found.values())} columns: {options.out}")
    return _compare(json.loads(Path(options.against).read_text("utf-8")), found) if options.against else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", help="a json file to write")
    parser.add_argument("--against", help="digests of before: exit code 1 and every difference if any is another")
    parser.add_argument("--shards", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--tars", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--work", default="/tmp/builder-digests", help="a folder that is emptied, the same every time")
    return parser.parse_args()


def _rewritten(request: dict[str, Any]) -> str:
    """An answer that the request alone decides; every seventh is a refusal."""
    text = str(request["messages"][-1]["content"])
    number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    if number % 7 == 0:
        return "I'm sorry, I can't help with that."
    return f"a photo of a person in a garden, number {number}"


def _builder(*words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("builder")), *words]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _demo(folder: Path) -> dict[str, Any]:
    done = _builder("demo", "--out", str(folder))
    return {"exits": [done.returncode], **_content(folder)}


def _run(folder: Path, shards: str, *, prompts: str = "", images: str = SKETCHES, faces: int = 1) -> dict[str, Any]:
    folder.mkdir()
    file = folder / "pipeline.toml"
    file.write_text(
        PIPELINE.format(shards=shards, root=folder / "out", prompts=prompts, images=images, faces=faces), "utf-8"
    )
    exits = [_builder(words, "--pipeline", str(file)).returncode for words in ("run", "run", "verify")]
    return {"exits": exits, **_content(folder / "out")}


def _content(root: Path) -> dict[str, Any]:
    return {"table": _columns(root / "samples"), "output": _files(root / "shards")}


def _columns(samples: Path) -> dict[str, str]:
    """A digest of every column over all partitions, in order: its type and its values."""
    paths = sorted(samples.glob("*.parquet"))
    if not paths:
        return {}
    table = pa.concat_tables([pq.read_table(path).replace_schema_metadata(None) for path in paths])
    kept = [name for name in table.column_names if not VARYING.fullmatch(name)]
    return {name: _digest(repr((str(table.schema.field(name).type), table[name].to_pylist()))) for name in kept}


def _files(shards: Path) -> dict[str, str]:
    """A digest of every file of the output; of a manifest what is in it, less the names of runs."""
    found = {}
    for path in sorted(shards.rglob("*")) if shards.exists() else []:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            facts = {
                str(key): _SOURCE.sub(r'"source": [\1, TIME]', _RUN.sub("RUN", str(value)))
                for key, value in (table.schema.metadata or {}).items()
            }
            found[path.name] = _digest(repr((facts, _RUN.sub("RUN", repr(table.to_pylist())))))
        elif path.is_file():
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _compare(before: Any, after: Any, place: str = "") -> int:
    """Prints every difference; returns 1 if there is one."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(dict.fromkeys([*before, *after]))
        return max([_compare(before.get(key), after.get(key), f"{place}/{key}") for key in keys], default=0)
    if before == after:
        return 0
    print(f"{place}: {before} -> {after}")
    return 1


if __name__ == "__main__":
    sys.exit(main())

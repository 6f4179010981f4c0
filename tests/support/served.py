"""Real servers of language models as processes on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

#: Seconds in which a server has to be up; the packages it imports take most of them.
UP_S = 300


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Runs a server until the block ends; gives its base_url once it answers /health.

    Raises:
        RuntimeError: it ended, or does not answer; with the end of its log.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        until = time.monotonic() + UP_S
        while not _is_up(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server is not up, exit {process.poll()}:\n{log.read_text('utf-8')[-3000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def transformers_command(model: str, port: int) -> list[str]:
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--device", "cpu"]
    return [
        *serve,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--default-seed",
        "0",
        "--continuous-batching",
        "--cb-num-blocks",
        "64",
        "--cb-max-batch-tokens",
        "512",
    ]  # else it takes memory as for a large model

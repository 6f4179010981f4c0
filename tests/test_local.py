"""The local executor: every task is run, a worker that dies is replaced, nobody outlives the parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from builder.executors import local
from builder.executors.base import PARENT_PIPE, Ended, run_to_end
from builder.executors.local import TaskPool

#: A worker: writes its number, pid and start to a file of its own, then does what the test says.
HEAD = """\
import json, os, pathlib, signal, sys, time
number, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
start = folder / f"start-{number}-{len(list(folder.glob(f'start-{number}-*')))}"
start.write_text(f"{os.getpid()} {time.monotonic()} {os.environ.get('BUILDER_DEVICE')}")
"""


def ignore(task: int, done: int, failed: int) -> None:
    """Progress that a test does not look at."""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[Ended]]:
    """Runs tasks whose process is Python text."""

    def start(text: str, tasks: int, *, on_progress: Callable[..., None] = ignore, **options: Any) -> list[Ended]:
        def command(number: int) -> Sequence[str]:
            return [sys.executable, "-c", HEAD + text, str(number), str(tmp_path)]

        options = {"workers": 2, **options}
        return run_to_end(
            TaskPool(command, tasks, lambda number: tmp_path / f"logs/{number}.log", **options), tasks, on_progress
        )

    return start


def starts(folder: Path, number: int) -> list[tuple[int, float, str]]:
    """Process, time and device of every start of a task."""
    found = []
    for path in sorted(folder.glob(f"start-{number}-*")):
        pid, at, device = path.read_text().split()
        found.append((int(pid), float(at), device))
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_task_is_run_and_its_end_is_told(run: Callable[..., list[Ended]], tmp_path: Path) -> None:
    ended = run("sys.exit([0, 3, 1, 130, 2][number])", 5)
    assert ended == [Ended(0, 0, 0), Ended(1, 3, 0), Ended(2, 1, 0), Ended(3, 130, 0), Ended(4, 2, 0)]
    assert [len(starts(tmp_path, number)) for number in range(5)] == [1] * 5
    assert run("", 0) == []


def test_devices_are_dealt_and_no_more_workers_run_than_asked(run: Callable[..., list[Ended]], tmp_path: Path) -> None:
    run(
        "time.sleep(0.3); (folder / f'end-{number}').write_text(str(time.monotonic()))", 4, devices=["cuda:0", "cuda:1"]
    )
    begun = sorted(starts(tmp_path, number)[0] for number in range(4))
    assert sorted(device for _, _, device in begun) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    ends = sorted(float((tmp_path / f"end-{number}").read_text()) for number in range(4))
    assert sorted(at for _, at, _ in begun)[2] >= ends[0]  # the third begins when the first has ended


def test_progress_is_told_and_all_else_goes_to_the_log(run: Callable[..., list[Ended]], tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []
    text = """
print(json.dumps({"done": 1, "failed": 0}), flush=True)
print("a stage prints", flush=True)
print('{"done": "many"}', flush=True)
print("and to stderr", file=sys.stderr)
print(json.dumps({"done": 2, "failed": 1}), flush=True)
"""
    run(text, 1, on_progress=lambda *report: told.append(report))
    assert told == [(0, 1, 0), (0, 2, 1)]
    lines = (tmp_path / "logs/0.log").read_text().splitlines()
    assert sorted(lines) == ["a stage prints", "and to stderr", '{"done": "many"}']


def test_a_worker_knows_its_executor_and_how_the_last_one_died(run: Callable[..., list[Ended]], tmp_path: Path) -> None:
    text = """
said = [os.environ[name] for name in ("BUILDER_EXECUTOR", "BUILDER_DIED_OF", "BUILDER_PARENT_PIPE", "OMP_NUM_THREADS")]
with (folder / "said").open("a") as out:
    print(*said, sep=",", file=out)
if start.name.endswith("-0"):
    os.kill(os.getpid(), signal.SIGSEGV)
"""
    assert run(text, 1, in_hand=lambda number: tmp_path / "in_hand") == [Ended(0, 0, 1)]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    assert (tmp_path / "said").read_text().split() == [f"local,,1,{threads}", f"local,SIGSEGV,1,{threads}"]


def test_a_worker_that_dies_is_replaced(run: Callable[..., list[Ended]], tmp_path: Path) -> None:
    """Task 1 dies twice, each time in another batch."""
    text = """
(folder / "in_hand").write_text(start.name)
if number == 1 and len(list(folder.glob("start-1-*"))) < 3:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(text, 3, in_hand=lambda number: tmp_path / "in_hand") == [
        Ended(0, 0, 0), Ended(1, 0, 2), Ended(2, 0, 0),
    ]  # fmt: skip
    assert len(starts(tmp_path, 1)) == 3


@pytest.mark.parametrize(("in_hand", "deaths"), [(None, 3), ("never written", 3), ("same", 4)])
def test_a_task_that_dies_without_getting_on_is_given_up(
    run: Callable[..., list[Ended]], tmp_path: Path, in_hand: str | None, deaths: int
) -> None:
    """With the same batch in hand, the first death has told something and the next three have not."""
    text = "(folder / 'same').write_text('batch'); os.kill(os.getpid(), signal.SIGSEGV)"
    place = (lambda number: tmp_path / in_hand) if in_hand else None
    assert run(text, 1, in_hand=place) == [Ended(0, -signal.SIGSEGV, deaths)]
    assert len(starts(tmp_path, 0)) == deaths


def test_a_task_that_dies_in_ever_new_batches_is_given_up_some_day(
    run: Callable[..., list[Ended]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_DEATHS", 6)
    text = "(folder / 'in_hand').write_text(start.name); os.kill(os.getpid(), signal.SIGKILL)"
    assert run(text, 1, in_hand=lambda number: tmp_path / "in_hand") == [Ended(0, -9, 6)]


@pytest.mark.parametrize(("rows", "deaths"), [(10_000, 2), (9_999, 6)])
def test_deaths_far_apart_do_not_add_up(
    run: Callable[..., list[Ended]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, deaths: int
) -> None:
    """One process of seven does much; what was done before a process began is not its work."""
    monkeypatch.setattr(local, "MAX_DEATHS", 6)
    text = f"""
(folder / "in_hand").write_text(start.name)
number = len(list(folder.glob("start-0-*")))
for done in (50_000, 50_000 + {rows} * (number == 5)):
    print(json.dumps({{"done": done, "failed": 0}}), flush=True)
if number < 7:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    [ended] = run(text, 1, in_hand=lambda number: tmp_path / "in_hand")
    assert ended == Ended(0, 0 if deaths < 6 else -9, deaths)


def test_a_process_that_a_worker_leaves_behind_holds_nothing_up(
    run: Callable[..., list[Ended]], tmp_path: Path
) -> None:
    """It has the worker's standard output, which so never ends."""
    text = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "child").write_text(str(child.pid))
print(json.dumps({"done": 7, "failed": 0}), flush=True)
"""
    told: list[tuple[int, int, int]] = []
    assert run(text, 1, on_progress=lambda *report: told.append(report)) == [Ended(0, 0, 0)]
    assert told == [(0, 7, 0)]
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # it is there still: nobody has waited for it


#: A parent: runs two workers that commit when they are asked to stop, as `builder task` does.
PARENT = """\
import signal, sys
from pathlib import Path
from builder.executors.base import run_to_end
from builder.executors.local import TaskPool
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the same under nohup
folder = Path(sys.argv[1])
worker = (folder / "worker.py").read_text()
try:
    run_to_end(TaskPool(lambda number: [sys.executable, "-c", worker, str(number), str(folder)], 2,
                        lambda number: folder / "log", workers=2), 2)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
WORKER = """
from builder.executors import local
asked = []
signal.signal(signal.SIGINT, lambda *_: (folder / "interrupted").touch())
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
local.die_with_parent()
(folder / f"ready-{number}").touch()
while not asked or (folder / "stubborn").exists():
    time.sleep(0.01)
time.sleep(0.2)
(folder / f"committed-{number}").touch()
sys.exit(130)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A parent in a session of its own, its two workers at work; none of them outlives the test."""
    (tmp_path / "worker.py").write_text(HEAD + WORKER)
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    yield process
    process.kill()
    process.communicate()
    for pid in workers(tmp_path):
        with contextlib.suppress(OSError):
            if str(tmp_path) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)


def workers(folder: Path) -> list[int]:
    return [starts(folder, number)[0][0] for number in (0, 1)]


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_ctrl_c_asks_the_workers_to_stop_and_waits_for_them(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does, to its whole foreground group
    out, _ = parent.communicate(timeout=30)
    assert out == "stopped\n"
    assert names(tmp_path, "committed-*") == ["committed-0", "committed-1"]
    assert names(tmp_path, "interrupted") == []  # Ctrl-C reaches the parent alone
    assert not any(lives(pid) for pid in workers(tmp_path))


def test_a_second_ctrl_c_ends_workers_that_do_not_stop(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "stubborn").touch()
    os.killpg(parent.pid, signal.SIGINT)
    time.sleep(0.3)
    assert parent.poll() is None
    os.killpg(parent.pid, signal.SIGINT)
    out, _ = parent.communicate(timeout=30)
    assert out == "stopped\n"
    assert names(tmp_path, "committed-*") == []
    assert not any(lives(pid) for pid in workers(tmp_path))


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_die_with_their_parent(parent: subprocess.Popen[str], tmp_path: Path, sign: signal.Signals) -> None:
    pids = workers(tmp_path)
    assert all(lives(pid) for pid in pids)
    parent.send_signal(sign)
    parent.communicate(timeout=30)
    wait_for(lambda: not any(lives(pid) for pid in pids), 10)
    assert names(tmp_path, "committed-*") == []


def test_a_task_started_by_hand_needs_no_parent(tmp_path: Path) -> None:
    """Without the mark of the executor, a standard input that ends means nothing."""
    environment = {name: value for name, value in os.environ.items() if name != PARENT_PIPE}
    (tmp_path / "worker.py").write_text(HEAD + WORKER)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "worker.py"), "0", str(tmp_path)], stdin=subprocess.DEVNULL, env=environment
    )
    wait_for(lambda: names(tmp_path, "ready-*"))
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 130
    assert names(tmp_path, "committed-*") == ["committed-0"]

"""What a measurement is and how it is shown: one table, one file."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One of our paths beside a peer or a limit, measured in the same rounds.

    Attributes:
        ours, peer: medians, in `unit`.
        ratio: median over the rounds of how many times better ours is than the peer in that round.
        spread: the smallest and the largest of those.
        target: what `ratio` is held to.
        unit: of `ours` and `peer`.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    spread: tuple[float, float]
    target: float
    unit: str = "s"

    @property
    def met(self) -> bool:
        return self.ratio >= self.target


def compared(
    name: str, ours: Sequence[float], peer: Sequence[float], target: float, *, unit: str = "s", more: bool = False
) -> Result:
    """The result of paired rounds.

    Args:
        ours, peer: one value a round, in the same order.
        target: times better than the peer.
        more: whether a larger value is the better one.
    """
    ratios = [a / b if more else b / a for a, b in zip(ours, peer, strict=True)]
    middle = statistics.median
    return Result(name, middle(ours), middle(peer), middle(ratios), (min(ratios), max(ratios)), target, unit)


def rounds_of(count: int, *methods: Callable[[], float]) -> list[list[float]]:
    """Runs every method once a round, in turn; for each method its values."""
    values: list[list[float]] = [[] for _ in methods]
    for _ in range(count):
        for method, found in zip(methods, values, strict=True):
            found.append(method())
    return values


def peak_mb() -> float:
    """The most memory that this process has held, MB; getrusage would count its parent's, where that was larger."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def table(results: Sequence[Result]) -> str:
    """The results as aligned lines."""
    head = ("", "ours", "peer", "times better", "spread", "target", "")
    rows = [
        (
            result.name,
            f"{result.ours:.3g} {result.unit}",
            f"{result.peer:.3g} {result.unit}",
            f"{result.ratio:.2f}",
            f"{result.spread[0]:.2f} .. {result.spread[1]:.2f}",
            f">= {result.target:.2f}",
            "met" if result.met else "MISSED",
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    )


def write(results: Sequence[Result], path: Path) -> None:
    """The results as a json list of {name, ours, peer, ratio, spread, target, met}."""
    keys = ("name", "ours", "peer", "ratio", "spread", "target", "unit", "met")
    data = [{key: getattr(result, key) for key in keys} for result in results]
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")

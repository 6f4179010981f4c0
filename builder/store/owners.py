"""Whether the process that left something on disk is still alive, and how long that is assumed if it is not known."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

#: Seconds after its last write during which an owner that cannot be asked is assumed to be alive.
ASSUMED_ALIVE_S = 48 * 3600


class Liveness(Enum):
    """What is known of an owner."""

    LIVES = "lives"
    DEAD = "dead"
    #: For example a process of another host.
    CANNOT_BE_ASKED = "cannot be asked"


#: Returns whether an owner is alive; an owner is a record such as `{"host": name, "pid": number}`.
AskLiveness = Callable[[dict[str, Any]], Liveness]


def process_liveness(host: str, pid: int) -> Liveness:
    """Whether a process is alive; one of another host cannot be asked."""
    if host != socket.gethostname():
        return Liveness.CANNOT_BE_ASKED
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return Liveness.DEAD
    except PermissionError:
        return Liveness.LIVES
    return Liveness.DEAD if _is_zombie(pid) else Liveness.LIVES


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and its parent has not waited for it; False on a system without /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def is_abandoned(path: Path, liveness: Liveness) -> bool:
    """Whether the owner of a file or folder will not touch it again.

    Raises:
        FileNotFoundError: the file is gone and its owner cannot be asked.
    """
    if liveness is Liveness.CANNOT_BE_ASKED:
        return time.time() - path.stat().st_mtime > ASSUMED_ALIVE_S
    return liveness is Liveness.DEAD

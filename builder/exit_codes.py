"""The exit codes of every command, those of a run's tasks included."""

from __future__ import annotations

DONE = 0
#: It did not finish.
UNFINISHED = 1
#: Wrong usage, or a bad pipeline file.
USAGE = 2
#: Done, but its own work left failed rows or refused shards.
FAILED_ROWS = 3
#: Stopped when asked; everything committed is kept.
INTERRUPTED = 130

"""The exit codes of every command, those of a run's tasks included."""

from __future__ import annotations

DONE = 0
UNFINISHED = 1
USAGE = 2
FAILED_ROWS = 3
INTERRUPTED = 130

#: What each of them says. Everything committed is kept, whichever it is.
MEANINGS = {
    DONE: "done",
    UNFINISHED: "it did not finish",
    USAGE: "usage or a bad pipeline file",
    FAILED_ROWS: "done, but this command's own work left failed rows or refused shards",
    INTERRUPTED: "interrupted",
}

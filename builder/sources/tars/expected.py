"""What lies beside a shard and says how many samples it should have: img2dataset's and DataComp's statistics.

Owns the forms of `<shard>_stats.json` and `<shard>.parquet`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builder import machine
from builder.store.layout import shard_name

#: The column of img2dataset's parquet, a row an attempt, and its value for one that is in the tar. Source: 1.47.0.
_STATUS, _SUCCESS = "status", "success"


@dataclass(frozen=True)
class Expected:
    """How many samples a file says that a shard has; `samples` is None where the file cannot be read."""

    file: str
    samples: int | None


def expected(shard: Path) -> Expected | None:
    """What is said of a shard; None where nothing beside it says anything.

    `<shard>_stats.json` counts by its `successes`, `<shard>.parquet` by its rows of status `success`; files of other
    forms under these names are other tools'.
    """
    stem = shard.with_name(shard_name(shard))
    readers = {Path(f"{stem}_stats.json"): _statistics, Path(f"{stem}.parquet"): _attempts}
    found = (read(path) for path, read in readers.items() if path.is_file())  # a folder, or a pipe, says nothing
    return next((one for one in found if one is not None), None)


def _statistics(path: Path) -> Expected | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # the last one of json that is nested too deep
        if machine.is_of_the_machine(error):
            raise
        return Expected(path.name, None)
    count = found.get("successes") if isinstance(found, dict) else None
    return Expected(path.name, count) if type(count) is int else None


def _attempts(path: Path) -> Expected | None:
    try:
        with pq.ParquetFile(path) as file:
            if _STATUS not in file.schema_arrow.names:
                return None
            status = file.read([_STATUS])[_STATUS]
            if not _is_text(status.type):
                return None
            successes = pc.sum(pc.equal(status.cast(pa.string()), _SUCCESS)).as_py()
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        if machine.is_of_the_machine(error):
            raise
        return Expected(path.name, None)
    return Expected(path.name, successes or 0)


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds words: status codes of servers, which are numbers, say nothing of samples."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

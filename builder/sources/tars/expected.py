"""Reads how many samples a shard should have from the statistics that img2dataset and DataComp write next to it.

Owns the formats of `<shard>_stats.json` and `<shard>.parquet`.
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

#: In img2dataset's parquet with a row per attempt: the column, and its value for samples in the tar. Source: 1.47.0.
_STATUS, _SUCCESS = "status", "success"


@dataclass(frozen=True)
class Expected:
    """How many samples a shard has according to a file; `samples` is None if the file cannot be read."""

    file: str
    samples: int | None


def expected(shard: Path) -> Expected | None:
    """The number of samples according to the files next to a shard; None if there is no such file.

    It is `successes` in `<shard>_stats.json`, or the number of rows with status `success` in `<shard>.parquet`. Files
    of other formats with these names belong to other tools and are ignored.
    """
    stem = shard.with_name(shard_name(shard))
    readers = {Path(f"{stem}_stats.json"): _statistics, Path(f"{stem}.parquet"): _attempts}
    answers = (read(path) for path, read in readers.items() if path.is_file())  # not folders or pipes
    return next((one for one in answers if one is not None), None)


def _statistics(path: Path) -> Expected | None:
    try:
        statistics = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: json that is nested too deep
        if machine.is_of_the_machine(error):
            raise
        return Expected(path.name, None)
    count = statistics.get("successes") if isinstance(statistics, dict) else None
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
    """Whether a column is text; numbers would be HTTP status codes, which say nothing about samples."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

"""The proof of a partition: it equals the column files that it was folded from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from builder.errors import ShardError
from builder.hybrid.verify.problem import FOLD, Wrong, reason, removing
from builder.store import files
from builder.store.layout import Layout
from builder.table import partitions


def partition_of(layout: Layout, shard: str) -> pa.Table:
    """The whole partition of a shard.

    Raises:
        Wrong: it is gone or damaged.
    """
    path = layout.partition(shard)
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except FileNotFoundError:
        raise Wrong("its partition is gone", FOLD) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Wrong(f"its partition is damaged ({reason(error)})", removing(path, FOLD)) from error


def check_partition(layout: Layout, shard: str, partition: pa.Table) -> None:
    """Compares a partition with the column files that it was folded from.

    Raises:
        Wrong: it differs from them or is older, or one of them is damaged.
    """
    try:
        wanted, _ = files.retry_listing(partial(partitions.folded, layout, shard))
    except ShardError as error:
        file = Path(error.where["file"])
        again = "builder run: it uses the generation before, or does the work again"
        raise Wrong(f"{error.what}: '{file}'", removing(file, again)) from error
    if partitions.is_behind(layout, shard):
        raise Wrong("its partition is behind its column files", FOLD)
    fix = removing(layout.partition(shard), FOLD)
    if partition.num_rows != wanted.num_rows:
        raise Wrong(f"its partition has {partition.num_rows} rows, its column files have {wanted.num_rows}", fix)
    for name in wanted.column_names:
        if name not in partition.column_names:
            continue
        row = _first_difference(partition[name], wanted[name])
        if row is not None:
            raise Wrong(f"row {row}: column '{name}' of its partition differs from its column files", fix)


def _first_difference(one: pa.ChunkedArray, other: pa.ChunkedArray) -> int | None:
    """The first row whose values differ; NaN equals NaN."""
    if one.type != other.type or one.equals(other):
        return None  # another type: the partition is older than the column, and reads as nulls
    pairs = enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True))
    return next((row for row, (a, b) in pairs if repr(a) != repr(b)), None)

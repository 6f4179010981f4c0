"""The hash of a row's inputs, stored in `<stage>_inputs`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa


def inputs_hashes(
    signature: str, columns: Sequence[Sequence[Any]], more: Sequence[Any] | None = None
) -> pa.UInt64Array:
    """`<stage>_inputs` of rows: a 64-bit hash of the signature and each row's inputs, given as columns.

    Args:
        more: one more input of each row; None has the same hash as no such input.
    """
    copy = hashlib.blake2b(signature.encode(), digest_size=8).copy
    digests = []
    rows: Iterable[tuple[Any, ...]] = zip(*columns, strict=True)
    if more is not None:
        rows = (row if one is None else (*row, one) for row, one in zip(rows, more, strict=True))
    for row in rows:
        digest = copy()
        digest.update(orjson.dumps(row, default=str))
        digests.append(digest.digest())
    return pa.array(np.frombuffer(b"".join(digests), ">u8").astype(np.uint64))

"""The kinds of sources."""

from __future__ import annotations

from builder.config.sections import DatasetSection
from builder.errors import ShardError
from builder.sources.base import Source
from builder.sources.tars.shards import TarShards
from builder.table.origin import Origin

#: By the value of `[dataset] kind`.
KINDS: dict[str, type[Source]] = {kind.kind: kind for kind in (TarShards,)}


def sections() -> dict[str, type[DatasetSection]]:
    """The section `[dataset]` of each kind."""
    return {name: kind.Options for name, kind in KINDS.items()}


def kind_of(origin: Origin) -> type[Source]:
    """The kind of source from which a shard was read.

    Raises:
        ShardError: this version does not know it.
    """
    if origin.kind not in KINDS:
        raise ShardError(
            f"the shard was read from a source of kind '{origin.kind}', which this version does not know",
            where={"file": origin.path, "kinds": ", ".join(KINDS)},
            fix="use the version of builder that read it",
        )
    return KINDS[origin.kind]

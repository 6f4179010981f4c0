"""Image-text tar shards in, hybrid shards out: one table, stages that add columns, a writer that splices."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Bytes",
    "Dataset",
    "Preparing",
    "Resources",
    "Stage",
    "Strict",
    "UnderWay",
    "Value",
    "__version__",
    "open_dataset",
    "output",
]

if TYPE_CHECKING:
    from builder.config.sections import Strict
    from builder.dataset import Dataset, open_dataset
    from builder.stages.contract import Preparing, Resources, Stage, UnderWay
    from builder.table.outputs import Bytes, Value, output

_WHERE = {
    "Dataset": "dataset",
    "open_dataset": "dataset",
    "Strict": "config.sections",
    "Bytes": "table.outputs",
    "Value": "table.outputs",
    "output": "table.outputs",
    "Preparing": "stages.contract",
    "Resources": "stages.contract",
    "Stage": "stages.contract",
    "UnderWay": "stages.contract",
}


def __getattr__(name: str) -> Any:
    """Loads the public names when they are first used: `builder --help` needs none of what they import."""
    import importlib

    if name in _WHERE:
        return getattr(importlib.import_module(f"builder.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'builder' has no attribute '{name}'")

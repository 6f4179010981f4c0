"""A stage of one's own: how bright an image is.

    builder run --pipeline examples/write_a_stage.toml --set "dataset.shards=/data/*.tar"
    builder sql "select uid, brightness from samples order by 2 limit 5" --pipeline examples/write_a_stage.toml

To run it from the folder above this one.
"""

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from builder import Resources, Strict, output
from builder.models.pictures import decode


class Options(Strict):
    """Options of `[stages.brightness]`; a value that does not fit is refused when the pipeline is read."""

    #: Side of the square that is measured, as a share of each side of the image.
    middle: float = Field(default=1.0, gt=0, le=1)


class Brightness:
    """Adds `brightness`. A batch in, the same rows out: it sees no path, no rank and no table."""

    name: ClassVar[str] = "brightness"
    version: ClassVar[str] = "1"  # raise it when the meaning of an output changes
    Options = Options
    inputs: ClassVar[pa.Schema] = pa.schema([])  # what the work SQL returns besides shard, row, uid
    members: ClassVar[tuple[str, ...]] = ("image",)  # arrives as a binary column
    outputs: ClassVar[pa.Schema] = pa.schema([output("brightness", pa.float64(), "mean of all pixels, 0 to 1")])
    resources: ClassVar[Resources] = Resources(cpus=1, memory_gb=0.5, batch_rows=32)

    def __init__(self, options: Options) -> None:
        self.options = options

    def setup(self, device: str) -> None:
        """Once a worker: load a model here, and raise here what would fail every row."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        # A row that raises fails alone: the engine halves the batch until it has found it.
        images = [decode(data) for data in batch.column("image").to_pylist()]
        means = [float(self._middle(image).mean() / 255) for image in images]
        return pa.RecordBatch.from_pydict({"brightness": means}, schema=self.outputs)

    def _middle(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        y, x = (int(side * (1 - self.options.middle) / 2) for side in (height, width))
        return image[y : height - y, x : width - x]

    def close(self) -> None:
        """Frees what `setup` took."""

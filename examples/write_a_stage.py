"""A stage of your own: how bright an image is.

    builder run --pipeline examples/write_a_stage.toml --set "dataset.shards=/data/*.tar"
    builder sql "select uid, brightness from samples order by 2 limit 5" --pipeline examples/write_a_stage.toml

Run it from the folder above this one.
"""

import numpy as np
import pyarrow as pa
from pydantic import Field

from builder import Resources, Stage, Strict, Value
from builder.models.pictures import decode


class Options(Strict):
    """Options of `[stages.brightness]`; a value that does not fit is refused when the pipeline is read."""

    #: Side of the square that is measured, as a share of each side of the image.
    middle: float = Field(default=1.0, gt=0, le=1)


class Brightness(Stage):
    """Adds `brightness`. A batch in, the same rows out: it sees no path, no rank and no table."""

    name = "brightness"
    version = "1"  # raise it when the meaning of an output changes
    Options = Options
    options: Options
    inputs = pa.schema([])  # what the work SQL returns in addition to shard, row, uid
    members = ("image",)  # arrives as a binary column
    outputs = (Value("brightness", pa.float64(), "mean of all pixels, 0 to 1"),)
    resources = Resources(cpus=1, batch_rows=32)
    packages = ("pillow",)  # a run records their versions

    def setup(self, device: str) -> None:
        """Called once per worker: load a model here, and raise here what would fail every row."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        # A row that raises fails alone: the engine halves the batch until it has found it.
        images = [decode(data) for data in batch.column("image").to_pylist()]
        means = [float(self._middle(image).mean() / 255) for image in images]
        return pa.RecordBatch.from_pydict({"brightness": means}, schema=self.schema)

    def _middle(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        y, x = (int(side * (1 - self.options.middle) / 2) for side in (height, width))
        return image[y : height - y, x : width - x]

    def close(self) -> None:
        """Frees what `setup` took."""

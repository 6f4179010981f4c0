"""A new image for every prompt."""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from builder.config import Strict
from builder.models.sketch import draw
from builder.schema import GENERATED, output
from builder.stage import Resources


class GenerateOptions(Strict):
    """Options of `[stages.generate]`."""

    #: sketch: embedded; draws a labelled picture of the prompt, for trying a pipeline.
    backend: Literal["sketch"] = "sketch"
    #: Size of the image, px.
    width: int = Field(default=384, ge=32, le=4096)
    height: int = Field(default=384, ge=32, le=4096)
    #: JPEG quality.
    quality: int = Field(default=90, ge=1, le=100)
    #: Every image's seed comes from this one, the sample's uid and its key.
    seed: int = 0


class Generate:
    """Adds `image_*`: the bytes go to an edits tar, where they lie and how they were made into the table."""

    name: ClassVar[str] = "generate"
    version: ClassVar[str] = "1"
    Options = GenerateOptions
    inputs: ClassVar[pa.Schema] = pa.schema([("key", pa.string()), ("prompt", pa.string())])
    members: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[pa.Schema] = pa.schema(
        [
            output("image", GENERATED, "the generated JPEG", extension="jpg"),
            output("image_width", pa.int32(), "px"),
            output("image_height", pa.int32(), "px"),
            output("image_seed", pa.int64(), "seed of this image: hash of the configured seed, uid and key"),
            output("image_model", pa.string(), "what made the image"),
            output("image_prompt", pa.string(), "the exact text that the image was made from"),
        ]
    )
    resources: ClassVar[Resources] = Resources(cpus=1, memory_gb=0.5, batch_rows=32)
    recorded: ClassVar[dict[str, str]] = {"prompt": "image_prompt"}

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options

    def setup(self, device: str) -> None:
        """Holds nothing."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        options, count = self.options, batch.num_rows
        prompts = batch.column("prompt").to_pylist()
        identities = zip(batch.column("uid").to_pylist(), batch.column("key").to_pylist(), strict=True)
        seeds = [seed_of(options.seed, uid, key) for uid, key in identities]
        images = [
            draw(prompt, seed=seed, width=options.width, height=options.height, quality=options.quality)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return pa.RecordBatch.from_pydict(
            {
                "image": images,
                "image_width": [options.width] * count,
                "image_height": [options.height] * count,
                "image_seed": seeds,
                "image_model": [options.backend] * count,
                "image_prompt": prompts,
            },
            schema=self.outputs,
        )

    def close(self) -> None:
        """Holds nothing."""


def seed_of(configured: int, uid: str, key: str) -> int:
    """A sample's seed, 0 to 2**63 - 1: the same wherever and whenever it is drawn."""
    digest = hashlib.blake2b(f"{configured}\0{uid}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

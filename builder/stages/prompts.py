"""A text-to-image prompt for every chosen caption."""

from __future__ import annotations

from typing import ClassVar, Literal

import pyarrow as pa

from builder.config import Strict
from builder.models.template import DEFAULT_STYLE, rewrite
from builder.schema import output
from builder.stage import Resources


class PromptsOptions(Strict):
    """Options of `[stages.prompts]`."""

    #: template: embedded; tidies the caption and puts it into `style`. It understands nothing of it.
    backend: Literal["template"] = "template"
    #: The prompt, with {caption} where the tidied caption goes.
    style: str = DEFAULT_STYLE


class Prompts:
    """Adds `prompt`."""

    name: ClassVar[str] = "prompts"
    version: ClassVar[str] = "1"
    Options = PromptsOptions
    inputs: ClassVar[pa.Schema] = pa.schema([("text", pa.string())])
    members: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[pa.Schema] = pa.schema([output("prompt", pa.string(), "the text to make a new image from")])
    resources: ClassVar[Resources] = Resources(cpus=1, memory_gb=0.5, batch_rows=1024)

    def __init__(self, options: PromptsOptions) -> None:
        self.options = options

    def setup(self, device: str) -> None:
        rewrite("a check of the style", style=self.options.style)

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        prompts = [rewrite(text or "", style=self.options.style) for text in batch.column("text").to_pylist()]
        return pa.RecordBatch.from_pydict({"prompt": prompts}, schema=self.outputs)

    def close(self) -> None:
        """Holds nothing."""

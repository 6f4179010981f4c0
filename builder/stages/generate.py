"""A new image for every prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from builder.errors import StageError
from builder.models.images import diffusers_images, sketch
from builder.models.images.backend import ImageBackend, ImageBackendEntry
from builder.models.images.diffusers_images import pixels_apart
from builder.models.images.loading import DiffusionOptions
from builder.models.images.queue import Job, Made
from builder.stages.contract import Preparing, Resources, RowsFailed
from builder.table.outputs import Bytes, Value

#: Batches that are queued ahead: they fill the batches at the end of a shard, and of each size where there are several.
AHEAD = 3
#: Columns that `difference` looks at.
_COMPARED = ("image", "image_batch_size")
#: Every value of the option `backend`.
BACKENDS: dict[str, ImageBackendEntry] = {"sketch": sketch.ENTRY, "diffusers": diffusers_images.ENTRY}

Side = Annotated[int, Field(ge=32, le=4096)]
Size = Annotated[list[Side], Field(min_length=2, max_length=2)]


class GenerateOptions(DiffusionOptions):
    """Options of `[stages.generate]`; all from `model` on, except `seed`, are those of the backend diffusers."""

    #: sketch: embedded; draws a labelled picture of the prompt, for trying a pipeline. diffusers: a text-to-image
    #: pipeline from a directory or the hub.
    backend: Literal["sketch", "diffusers"] = "sketch"
    #: Size of the image, px.
    width: Side = 384
    height: Side = 384
    #: Quality of jpg and webp; png is lossless.
    quality: int = Field(default=90, ge=1, le=100)
    #: Every image's seed comes from this one, the sample's uid and key, and the number of its drawing.
    seed: int = 0
    #: Sizes [width, height], px; each sample gets one of them. They replace width and height.
    sizes: list[Size] = Field(default=[])
    #: How a sample gets one of `sizes`: hash: each equally often; aspect: the one nearest to the original's shape.
    size_by: Literal["hash", "aspect"] = "hash"
    #: Images that the model makes at once: a batch is always filled or padded. Running out of memory halves it.
    batch_size: int = Field(default=32, ge=1, json_schema_extra={"decides": False})

    @model_validator(mode="after")
    def _check_model(self) -> GenerateOptions:
        if self.model and self.backend == "sketch":
            raise ValueError(f"model = '{self.model}' has no effect without backend = \"diffusers\"")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> GenerateOptions:
        if self.size_by == "aspect" and not self.sizes:
            raise ValueError("size_by = 'aspect' needs sizes")
        multiple = BACKENDS[self.backend].multiple
        for width, height in self.sizes or [[self.width, self.height]]:
            if width % multiple or height % multiple:
                raise ValueError(f"{width}x{height} px: backend '{self.backend}' takes multiples of {multiple}")
        return self


class Generate(Preparing):
    """Adds `image_*`: the bytes go to an edits tar; the table says where they are and how they were made."""

    name = "generate"
    version = "1"
    Options = GenerateOptions
    inputs = pa.schema([("key", pa.string()), ("prompt", pa.string()), ("draw", pa.int32())])
    outputs = (
        Bytes("image", "the generated picture, in the format of the sample's own", extension="jpg"),
        Value("image_width", pa.int32(), "px"),
        Value("image_height", pa.int32(), "px"),
        Value("image_seed", pa.int64(), "seed of this image: hash of the configured seed, uid, key and image_draw"),
        Value("image_draw", pa.int32(), "which drawing of this sample it is, from 0; the next has another seed"),
        Value("image_model", pa.string(), "what made the image"),
        Value("image_prompt", pa.string(), "the exact text that the image was made from"),
        Value("image_steps", pa.int32(), "denoising steps; null where nothing is denoised"),
        Value("image_guidance", pa.float32(), "guidance scale; null where the model has none"),
        Value("image_batch_size", pa.int32(), "images made at once, padding counted; null where each is by itself"),
        Value(
            "image_device",
            pa.string(),
            "what the model ran on, such as a GPU's name; null without a model",
            decides=False,
        ),
    )
    packages = ("accelerate", "diffusers", "peft", "simplejpeg", "torch", "transformers")
    resources = Resources(cpus=1, batch_rows=32)
    as_source = ("image",)
    #: Values of $names in the work SQL: 1 draws each image again with its next seed.
    params: Mapping[str, Any] = {"draw": 0}
    #: Columns that record an input of an image at the time when it was made.
    recorded: ClassVar[Mapping[str, str]] = {
        "prompt": "image_prompt", "draw": "image_draw", "width": "image_width", "height": "image_height",
    }  # fmt: skip
    batch_option = "batch_size"

    @staticmethod
    def as_made(options: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a run with the size of the image's own batch, and the commit of its model on a hub."""
        made = dict(options)
        if row.get("image_batch_size"):
            made["batch_size"] = row["image_batch_size"]
        name, _, commit = str(row.get("image_model")).partition("@")
        if commit and name == options.get("model"):
            made["revision"] = commit
        return made

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.sizes = [(width, height) for width, height in options.sizes or [[options.width, options.height]]]
        self.sql = "generate.sql"
        if options.size_by == "aspect":
            self.sql = "generate_aspect.sql"
            self.inputs = pa.schema([*Generate.inputs, ("width", pa.int32()), ("height", pa.int32())])
        self._entry = BACKENDS[options.backend]
        self.tolerance = self._entry.tolerance
        if self._entry.gpus:
            batches = AHEAD + len(self.sizes) - 1
            self.resources = Resources(
                cpus=2, gpus=self._entry.gpus, batch_rows=options.batch_size, ahead=batches,
                ahead_rows=batches * options.batch_size,
            )  # fmt: skip
        self._backend: ImageBackend | None = None

    def check_setup(self) -> None:
        """Raises StageError for packages and model files that the back end would miss."""
        self._entry.check(self.options)

    def setup(self, device: str) -> None:
        """Loads the back end.

        Raises:
            StageError: it cannot be loaded, does not take an option, or makes no image of such a size.
        """
        self._backend = self._entry.start(self.options, self.sizes, device)

    def prepare(self, batch: pa.RecordBatch) -> list[Job] | None:
        """Hands the images of a batch to a back end that makes them in batches: it may begin them at once."""
        return self._add(batch) if self._entry.gpus else None

    def _add(self, batch: pa.RecordBatch) -> list[Job]:
        assert self._backend is not None
        prompts = batch.column("prompt").to_pylist()
        kinds = batch.column("image_format").to_pylist()
        jobs = zip(prompts, self._seeds(batch), self._sizes(batch), kinds, strict=True)
        return self._backend.add([Job(*job) for job in jobs])

    def process(self, batch: pa.RecordBatch, prepared: list[Job] | None = None) -> pa.RecordBatch:
        """Answers a batch.

        Raises:
            RowsFailed: prompts for which the model makes no image.
            StageError: the device no longer computes.
        """
        assert self._backend is not None
        jobs = self._add(batch) if prepared is None else prepared
        answers = self._backend.answers(jobs)
        errors = {i: answer for i, answer in enumerate(answers) if isinstance(answer, Exception)}
        if lost := next((error for error in errors.values() if isinstance(error, StageError)), None):
            raise lost
        made = [answer if isinstance(answer, Made) else None for answer in answers]
        count = batch.num_rows
        columns: dict[str, list[Any]] = {
            "image": [image.data if image else None for image in made],
            "image_width": [job.size[0] for job in jobs],
            "image_height": [job.size[1] for job in jobs],
            "image_seed": [job.seed for job in jobs],
            "image_draw": batch.column("draw").to_pylist(),
            "image_model": [self._backend.name] * count,
            "image_prompt": [job.prompt for job in jobs],
            "image_steps": [self._backend.steps] * count,
            "image_guidance": [self._backend.guidance] * count,
            "image_batch_size": [image.batch_size if image else None for image in made],
            "image_device": [self._backend.device_name] * count,
        }
        result = pa.RecordBatch.from_pydict(columns, schema=self.schema)
        if errors:
            raise RowsFailed(result, errors)
        return result

    def take_notes(self) -> list[dict[str, Any]]:
        """What the back end has to note, such as batch sizes that were halved, since this was last called."""
        return [] if self._backend is None else self._backend.take_notes()

    def difference(self, alone: pa.RecordBatch, within: pa.RecordBatch) -> float:
        """How much two answers of the same rows differ: the largest mean absolute difference of pixels, 0..255.

        Images of different batch sizes, as after running out of memory, are not compared.
        """
        sides = (zip(*(side.column(name).to_pylist() for name in _COMPARED), strict=True) for side in (alone, within))
        pairs = zip(*sides, strict=True)
        same = ((one, other) for (one, size), (other, other_size) in pairs if size == other_size)
        return max((pixels_apart(one, other) for one, other in same), default=0.0)

    def close(self) -> None:
        """Ends the threads and frees the device's memory."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _seeds(self, batch: pa.RecordBatch) -> list[int]:
        rows = zip(*(batch.column(name).to_pylist() for name in ("uid", "key", "draw")), strict=True)
        return [seed_of(self.options.seed, uid, key, drawn) for uid, key, drawn in rows]

    def _sizes(self, batch: pa.RecordBatch) -> list[tuple[int, int]]:
        if len(self.sizes) == 1:
            return [self.sizes[0]] * batch.num_rows
        if self.options.size_by == "aspect":
            shapes = zip(batch.column("width").to_pylist(), batch.column("height").to_pylist(), strict=True)
            return [nearest(self.sizes, width, height) for width, height in shapes]
        identities = zip(batch.column("uid").to_pylist(), batch.column("key").to_pylist(), strict=True)
        return [self.sizes[_hash(self.options.seed, uid, key, "size") % len(self.sizes)] for uid, key in identities]


def seed_of(configured: int, uid: str, key: str, draw: int = 0) -> int:
    """A sample's seed, 0 to 2**63 - 1: the same on every machine and in every run, another for each drawing."""
    return _hash(configured, uid, key, *([draw] if draw else [])) >> 1


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def nearest(sizes: Sequence[tuple[int, int]], width: int | None, height: int | None) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to a picture's; a picture of unknown size counts as square."""
    wanted = math.log(width / height) if width and height else 0.0
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - wanted))

"""A new image for every prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from builder.errors import StageError
from builder.machine import is_of_the_machine, is_out_of_memory
from builder.models.images.diffusion import Diffusion, DiffusionOptions, Unsafe, check_installed
from builder.models.images.queue import ImageQueue, Job, Made
from builder.models.images.sketch import draw
from builder.models.pictures import decode, difference
from builder.stages.contract import Preparing, Resources, RowsFailed
from builder.table.outputs import Bytes, Value

#: Batches that are queued ahead: they fill the batches at the end of a shard, and of each size where there are several.
AHEAD = 3
#: Sizes of diffusion models are multiples of this: their VAEs shrink each side by it. FLUX wants 16, SANA 32; a size
#: that a model does not make is refused when it is loaded.
MULTIPLE = 8

#: Mean absolute difference of pixels, 0..255, up to which two images of a diffusion model are the same.
SAME_PIXELS = 1.0
#: Columns that `difference` looks at.
_COMPARED = ("image", "image_batch_size")

Side = Annotated[int, Field(ge=32, le=4096)]
Size = Annotated[list[Side], Field(min_length=2, max_length=2)]


class GenerateOptions(DiffusionOptions):
    """Options of `[stages.generate]`; all from `model` on are those of the backend diffusers, but for `seed`."""

    #: sketch: embedded; draws a labelled picture of the prompt, for trying a pipeline. diffusers: a text-to-image
    #: pipeline from a directory or the hub.
    backend: Literal["sketch", "diffusers"] = "sketch"
    #: Size of the image, px.
    width: Side = 384
    height: Side = 384
    #: Quality of jpg and webp; png is lossless.
    quality: int = Field(default=90, ge=1, le=100)
    #: Every image's seed comes from this one, the sample's uid and key, and which drawing of it it is.
    seed: int = 0
    #: Sizes [width, height], px, of which each sample gets one, in place of width and height.
    sizes: list[Size] = Field(default=[])
    #: How a sample gets one of `sizes`: hash, each as often; aspect, the one nearest to the original's shape.
    size_by: Literal["hash", "aspect"] = "hash"
    #: Images that the model makes at once, always: a batch is filled or padded. Out of memory halves it.
    batch_size: int = Field(default=32, ge=1, json_schema_extra={"decides": False})

    @model_validator(mode="after")
    def _check_model(self) -> GenerateOptions:
        if self.model and self.backend == "sketch":
            raise ValueError(f"model = '{self.model}' is not looked at without backend = \"diffusers\"")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> GenerateOptions:
        if self.size_by == "aspect" and not self.sizes:
            raise ValueError("size_by = 'aspect' chooses of sizes, and there are none")
        if self.backend == "diffusers":
            for width, height in self.sizes or [[self.width, self.height]]:
                if width % MULTIPLE or height % MULTIPLE:
                    raise ValueError(f"{width}x{height} px: backend 'diffusers' takes multiples of {MULTIPLE}")
        return self


class Generate(Preparing):
    """Adds `image_*`: the bytes go to an edits tar, where they lie and how they were made into the table."""

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
    #: Columns that hold an input of an image as it was when it was made.
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
        self.tolerance = 0.0
        if options.size_by == "aspect":
            self.sql = "generate_aspect.sql"
            self.inputs = pa.schema([*Generate.inputs, ("width", pa.int32()), ("height", pa.int32())])
        if options.backend == "diffusers":
            # A batch's shape does not depend on how many are real: there is no difference but a library's own noise.
            self.tolerance = SAME_PIXELS
            batches = AHEAD + len(self.sizes) - 1
            self.resources = Resources(
                cpus=2, gpus=1, batch_rows=options.batch_size, ahead=batches,
                ahead_rows=batches * options.batch_size,
            )  # fmt: skip
        self._model: Diffusion | None = None
        self._queue: ImageQueue | None = None

    def check_setup(self) -> None:
        """Raises StageError for packages and model files that the backend would miss."""
        if self.options.backend == "diffusers":
            check_installed(self.options)

    def setup(self, device: str) -> None:
        """Loads the model, and makes one batch of each size, the largest first, that is thrown away.

        Raises:
            StageError: the model cannot be loaded, does not take an option, makes no such image, or another one each
                time.
        """
        if self.options.backend == "sketch":
            return
        self._model = Diffusion(self.options, device)
        self._queue = ImageQueue(
            self._model,
            batch_size=self.options.batch_size,
            quality=self.options.quality,
            is_out_of_memory=is_out_of_memory,
        )
        try:
            self._try(device)
        except BaseException:
            self.close()
            raise

    def _try(self, device: str) -> None:
        assert self._model is not None
        largest, *others = sorted(set(self.sizes), key=math.prod, reverse=True)
        before = self._model.common_noise()
        made = self._tried(device, largest)
        for size in others:
            self._tried(device, size)
        if self._model.common_noise() == before:
            return
        again = self._tried(device, largest)
        if made is None or again is None or made.batch_size != again.batch_size:
            return
        if (found := _apart(made.data, again.data)) > SAME_PIXELS:
            raise StageError(
                "the model makes another image of the same prompt and seed each time",
                where={
                    "model": self.options.model, "device": device, "difference": f"{found:g}",
                    "tolerance": f"{SAME_PIXELS:g}",
                },
                fix="set another scheduler: this one draws noise that no seed decides",
            )  # fmt: skip

    def _tried(self, device: str, size: tuple[int, int]) -> Made | None:
        """An image of any prompt; None where the model's own safety checker has blacked it out."""
        assert self._queue is not None
        where = {"model": self.options.model, "size": f"{size[0]}x{size[1]} px", "device": device}
        try:
            [made] = self._queue.answers(self._queue.add([Job("a photo", 0, size)]))
        except Exception as error:
            made = error
        if isinstance(made, StageError):
            raise made
        if isinstance(made, Made | Unsafe):
            return made if isinstance(made, Made) else None
        if is_of_the_machine(made) and not is_out_of_memory(made):
            raise made
        fix = "set another dtype, size, scheduler or number of steps, as the model's card says"
        if is_out_of_memory(made):
            fix = 'set a smaller size, weights = "fp8", vae_slicing or vae_tiling'
        raise StageError(f"the model makes no image: {type(made).__name__}: {made}", where=where, fix=fix) from made

    def prepare(self, batch: pa.RecordBatch) -> list[Job] | None:
        """Encodes the prompts of a batch and queues its images: they may be made before `process` is called."""
        if self._queue is None:
            return None
        prompts = batch.column("prompt").to_pylist()
        kinds = batch.column("image_format").to_pylist()
        jobs = zip(prompts, self._seeds(batch), self._sizes(batch), kinds, strict=True)
        return self._queue.add([Job(*job) for job in jobs])

    def process(self, batch: pa.RecordBatch, prepared: list[Job] | None = None) -> pa.RecordBatch:
        """Answers a batch.

        Raises:
            RowsFailed: prompts of which the model makes no image.
            StageError: the device computes no more.
        """
        prompts = batch.column("prompt").to_pylist()
        seeds, sizes = self._seeds(batch), self._sizes(batch)
        columns: dict[str, list[Any]] = {
            "image_width": [width for width, _ in sizes],
            "image_height": [height for _, height in sizes],
            "image_seed": seeds,
            "image_draw": batch.column("draw").to_pylist(),
            "image_prompt": prompts,
        }
        count, errors = batch.num_rows, {}
        if self._queue is None or self._model is None:
            columns["image"] = [
                draw(prompt, seed=seed, width=width, height=height, quality=self.options.quality, kind=kind)
                for prompt, seed, (width, height), kind in zip(
                    prompts, seeds, sizes, batch.column("image_format").to_pylist(), strict=True
                )
            ]
            columns["image_model"] = [self.options.backend] * count
            denoised = ("image_steps", "image_guidance", "image_batch_size", "image_device")
            columns |= {name: [None] * count for name in denoised}
        else:
            jobs = prepared if prepared is not None else self.prepare(batch)
            answers = self._queue.answers(jobs or [])
            errors = {i: answer for i, answer in enumerate(answers) if isinstance(answer, Exception)}
            if lost := next((error for error in errors.values() if isinstance(error, StageError)), None):
                raise lost
            made = [answer if isinstance(answer, Made) else None for answer in answers]
            columns["image"] = [image.data if image else None for image in made]
            columns["image_batch_size"] = [image.batch_size if image else None for image in made]
            columns["image_model"] = [self._model.name] * count
            columns["image_steps"] = [self._model.steps] * count
            columns["image_guidance"] = [self._model.guidance] * count
            columns["image_device"] = [self._model.device_name] * count
        result = pa.RecordBatch.from_pydict(columns, schema=self.schema)
        if errors:
            raise RowsFailed(result, errors)
        return result

    def take_notes(self) -> list[dict[str, Any]]:
        """Batch sizes that were halved since this was last asked."""
        return [] if self._queue is None else self._queue.take_notes()

    def difference(self, alone: pa.RecordBatch, within: pa.RecordBatch) -> float:
        """How far two answers of the same rows are apart: the largest mean absolute difference of pixels, 0..255.

        Images of other batch sizes, since memory ended between them, say nothing of each other.
        """
        sides = (zip(*(side.column(name).to_pylist() for name in _COMPARED), strict=True) for side in (alone, within))
        pairs = (
            _apart(one, other) for (one, size), (other, other_size) in zip(*sides, strict=True) if size == other_size
        )
        return max(pairs, default=0.0)

    def close(self) -> None:
        """Ends the threads and frees the device's memory."""
        model, queue = self._model, self._queue
        self._model = self._queue = None
        if queue is not None:
            queue.close()
        if model is not None:
            model.free()

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
    """A sample's seed, 0 to 2**63 - 1: the same wherever and whenever it is drawn, another for each drawing."""
    return _hash(configured, uid, key, *([draw] if draw else [])) >> 1


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def nearest(sizes: Sequence[tuple[int, int]], width: int | None, height: int | None) -> tuple[int, int]:
    """The size whose shape is nearest to a picture's, by ratio; one of unknown size counts as square."""
    wanted = math.log(width / height) if width and height else 0.0
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - wanted))


def _apart(one: bytes, other: bytes) -> float:
    if one == other:
        return 0.0
    found = difference(decode(one), decode(other))
    return 255.0 if found is None else found[0]

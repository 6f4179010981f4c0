"""Images of prompts by a diffusers pipeline: loading, text encoding, denoising.

Owns what differs between pipeline classes: how the options are called there, and what `encode_prompt` returns. Knows no
table, no threads and no JPEG; who batches, pads and halves is `builder.models.images.queue`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from builder.config.sections import Strict
from builder.errors import RowError, StageError, missing_extra
from builder.machine import is_of_the_machine, is_out_of_memory
from builder.models.pictures import Pixels

#: Names in `__call__` of what `encode_prompt` returns, in its order; None: not an argument. A pipeline class that is
#: not here encodes its prompts by itself, while it makes the images. Source: diffusers 0.42.
ENCODED: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "StableDiffusionXLPipeline": (
        "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    ),
    "StableDiffusion3Pipeline": (
        "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    ),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None),
    "Flux2KleinPipeline": ("prompt_embeds", None),
    "PixArtSigmaPipeline": (
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    ),
    "SanaPipeline": (
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    ),
    "SanaSprintPipeline": ("prompt_embeds", "prompt_attention_mask"),
}  # fmt: skip
#: Arguments without which a pipeline makes no image of a prompt with a size and a seed of its own.
NEEDED = ("prompt", "height", "width", "generator", "output_type")
#: What `__call__` and `encode_prompt` are given where they take it: the prompt and the size as they are.
AS_IS = {"use_resolution_binning": False, "clean_caption": False}
#: Steps of SanaSprintPipeline for which its `intermediate_timesteps` is meant; it refuses it for others.
_SPRINT_STEPS = 2
#: `owner/name` on the hub.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: A folder of the hub's cache: models--owner--name/snapshots/revision.
_SNAPSHOT = re.compile(r"models--([\w.-]+)--([\w.-]+)/snapshots/(\w+)$")

#: What `encode_prompt` said of one prompt, by argument of `__call__`, one row each; or the prompt itself.
Text = Mapping[str, Any]


class Unsafe(ValueError):
    """The model's own safety checker blacked an image out."""


class DiffusionOptions(Strict):
    """What a diffusers pipeline can be told. None: as the pipeline has it."""

    #: A directory that diffusers' `save_pretrained` wrote, or a hub id. Only a directory needs no network.
    model: str = ""
    #: Of a hub id: branch, tag or commit.
    revision: str | None = None
    #: Of the weights' files, such as fp16.
    variant: str | None = None
    #: Of weights and computation.
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    #: fp8: the weights of transformer or unet are stored as float8_e4m3fn, which halves their memory, and computed with
    #: in `dtype`.
    weights: Literal["same", "fp8"] = "same"
    #: torch.compile of transformer or unet: off, its repeated blocks (soon ready), or the whole.
    compile: Literal["off", "blocks", "whole"] = Field(default="off", json_schema_extra={"decides": False})
    #: Attention back end by diffusers' name, such as native, flash, _native_cudnn.
    attention: str | None = Field(default=None, json_schema_extra={"decides": False})
    #: Class of diffusers to use in place of the model's scheduler, made from its configuration.
    scheduler: str | None = None
    #: Decodes one image at a time: less memory.
    vae_slicing: bool = Field(default=False, json_schema_extra={"decides": False})
    #: Decodes large images in tiles: less memory, and seams may show.
    vae_tiling: bool = False
    #: File, directory or hub id of LoRA weights, which are fused into the model.
    lora: str | None = None
    #: How much of the LoRA is fused: 0 nothing, 1 all of it.
    lora_scale: float = 1.0
    #: What the image should not show; takes effect with `guidance` above 1.
    negative_prompt: str | None = None
    #: Denoising steps.
    steps: int | None = Field(default=None, ge=1)
    #: Guidance scale.
    guidance: float | None = Field(default=None, ge=0)
    #: Tokens of a prompt that are looked at.
    max_sequence_length: int | None = Field(default=None, ge=1)


class Diffusion:
    """A loaded pipeline on one device.

    Attributes:
        name: the model's name without paths of the machine; of the hub `owner/name@commit`.
        steps: denoising steps.
        guidance: guidance scale; None where the pipeline has none.
        device_name: what it computes on, as far as that decides the last bits: a GPU's name, a CPU's vector unit
            and threads.

    Raises:
        StageError: a package, the device, the model or a part of it is missing, it is no text-to-image pipeline, or it
            does not take an option that is set.
    """

    def __init__(self, options: DiffusionOptions, device: str) -> None:
        torch, _ = _packages()
        self.options, self.device = options, device
        _check_device(device)
        pipe = self._pipe = _loaded(options)
        self.name = _name_as_loaded(pipe, options)
        self._taken = inspect.signature(pipe.__call__).parameters
        self._names = _encoded(pipe)
        self._encoder_takes = inspect.signature(pipe.encode_prompt).parameters if self._names else {}
        self._check_taken()
        self.steps = options.steps or int(self._taken["num_inference_steps"].default)
        self.guidance = self._guidance()
        self._check_negative_prompt()
        _adapt(pipe, options)
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        _tell_memory(pipe)
        self._torch = torch
        self.device_name = _device_name(device)

    def _guidance(self) -> float | None:
        if "guidance_scale" not in self._taken:
            return None
        given = self.options.guidance
        return float(self._taken["guidance_scale"].default if given is None else given)

    def _check_taken(self) -> None:
        """Refuses a pipeline that is none for this, and options that it would not look at."""
        kind = type(self._pipe).__name__
        where = {"model": self.options.model, "pipeline": kind}
        if lacking := [name for name in NEEDED if name not in self._taken]:
            raise StageError(
                f"'{kind}' makes no images of prompts: it takes no '{lacking[0]}'",
                where=where,
                fix="name a text-to-image model",
            )
        called = {
            "steps": "num_inference_steps", "guidance": "guidance_scale", "negative_prompt": "negative_prompt",
            "max_sequence_length": "max_sequence_length",
        }  # fmt: skip
        for option, argument in called.items():
            missing = argument not in self._taken or (
                option == "negative_prompt" and self._encoder_takes and argument not in self._encoder_takes
            )
            if missing and getattr(self.options, option) is not None:
                raise StageError(f"'{kind}' does not take the option '{option}'", where=where, fix=f"take {option} out")
        if self.options.steps is None and "num_inference_steps" not in self._taken:
            raise StageError(f"'{kind}' takes no number of steps", where=where, fix="name a text-to-image model")

    def _check_negative_prompt(self) -> None:
        if self.options.negative_prompt and self.guidance is not None and self.guidance <= 1:
            raise StageError(
                f"negative_prompt has no effect with guidance = {self.guidance:g}",
                where={"model": self.options.model},
                fix="set guidance above 1, or take negative_prompt out",
            )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """No gradients and the right GPU: both belong to the thread."""
        on_device = self._torch.cuda.device(self.device) if self.device.startswith("cuda") else contextlib.nullcontext()
        with self._torch.no_grad(), on_device:
            yield

    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """The text encoders' answer for each prompt, on the device. The last bits depend on how many there are."""
        if not self._names:
            return [{"prompt": prompt} for prompt in prompts]
        args = {
            name: self._taken[name].default
            for name in self._encoder_takes
            if name in self._taken and self._taken[name].default is not inspect.Parameter.empty
        }
        args |= {
            "prompt": list(prompts), "device": self.device, "num_images_per_prompt": 1,
            "do_classifier_free_guidance": (self.guidance or 0) > 1, **AS_IS,
        }  # fmt: skip
        if self.options.max_sequence_length is not None:
            args["max_sequence_length"] = self.options.max_sequence_length
        if self.options.negative_prompt is not None:
            args["negative_prompt"] = [self.options.negative_prompt] * len(prompts)
        with self._computing():
            found = self._pipe.encode_prompt(**{k: v for k, v in args.items() if k in self._encoder_takes})
        named = [(name, value) for name, value in zip(self._names, found, strict=True) if name and value is not None]
        return [{name: value[i : i + 1] for name, value in named} for i in range(len(prompts))]

    def make(
        self, texts: Sequence[Text], seeds: Sequence[int], size: tuple[int, int]
    ) -> Callable[[], tuple[Pixels, list[Exception | None]]]:
        """Begins a batch of images.

        Args:
            texts: what `encode` returned, one an image.
            seeds: of each image's own generator, which is on the CPU: the noise is the same on every device.
            size: width and height, px.

        Returns:
            A function that waits for the device and returns uint8 (count, height, width, 3), and of each image why it
            is none, if it is none.

        Raises:
            ValueError: the pipeline made another size.
        """
        torch = self._torch
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        args: dict[str, Any] = {
            "width": size[0], "height": size[1], "num_inference_steps": self.steps, "generator": generators,
            "output_type": "pt", "guidance_scale": self.guidance, "num_images_per_prompt": 1, "prompt": None,
            "max_sequence_length": self.options.max_sequence_length, **AS_IS,
        }  # fmt: skip
        if args["max_sequence_length"] is None:
            del args["max_sequence_length"]
        if self.steps != _SPRINT_STEPS:
            args["intermediate_timesteps"] = None
        if self._names:
            args |= {"negative_prompt": None}
        elif self.options.negative_prompt is not None:
            args["negative_prompt"] = [self.options.negative_prompt] * len(texts)
        args = {name: value for name, value in args.items() if name in self._taken}
        with self._computing():
            for name in texts[0]:
                values = [text[name] for text in texts]
                args[name] = values if name == "prompt" else torch.cat(values)
            output = self._pipe(**args)
            images = output.images
            if tuple(images.shape[-2:]) != (size[1], size[0]):
                raise ValueError(
                    f"asked for {size[0]}x{size[1]} px, the pipeline made {images.shape[-1]}x{images.shape[-2]}"
                )
            finite = images.isfinite().flatten(1).all(1)
            pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            on_cuda = pixels.is_cuda
            pixels, finite = (tensor.to("cpu", non_blocking=on_cuda) for tensor in (pixels, finite))
            copied = torch.cuda.current_stream().record_event() if on_cuda else None

        blacked = getattr(output, "nsfw_content_detected", None) or [False] * len(texts)

        def wait() -> tuple[Pixels, list[Exception | None]]:
            if copied is not None:
                copied.synchronize()
            return np.asarray(pixels), [_fault(*of) for of in zip(blacked, finite.tolist(), strict=True)]

        return wait

    def common_noise(self) -> bytes:
        """The state of the generators that all of the process shares; an image's own generator leaves it as it is."""
        states = [self._torch.get_rng_state()]
        if self.device.startswith("cuda"):
            states.append(self._torch.cuda.get_rng_state(self.device))
        return b"".join(state.numpy().tobytes() for state in states)

    def check(self) -> None:
        """Computes one number.

        Raises:
            StageError: the device does not compute any more.
        """
        if not self.device.startswith("cuda"):
            return
        try:
            self._torch.ones(1, device=self.device).item()
        except Exception as error:
            if not is_out_of_memory(error):
                raise StageError(
                    f"device '{self.device}' computes no more: {_line(error)}",
                    where={"name": self.device_name},
                    fix="see nvidia-smi and dmesg, then run the same command again: it goes on where it was",
                ) from error

    def free(self) -> None:
        """Gives back device memory that nothing uses."""
        if self.device.startswith("cuda"):
            with contextlib.suppress(RuntimeError):  # of a device that is lost: no reason to hide why
                self._torch.cuda.empty_cache()


def _fault(is_blacked: bool, is_finite: bool) -> Exception | None:
    if is_blacked:
        return Unsafe("the model's own safety checker blacked the image out")
    if is_finite:
        return None
    return RowError("not_finite", "the model's image holds values that are no numbers: try another dtype")


def name_of(model: str, revision: str | None) -> str:
    """The name of a model without the paths of a machine: `owner/name@revision`, or a directory's name."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        if cached := _SNAPSHOT.search(directory.absolute().as_posix()):
            return f"{cached[1]}/{cached[2]}@{cached[3]}"
        return directory.resolve().name
    return f"{model}@{revision}" if revision else model


def _name_as_loaded(pipe: Any, options: DiffusionOptions) -> str:
    """`name_of`, with the commit where the model comes of the hub, whose branches move."""
    config = getattr(_network(pipe), "config", None)
    folder = Path(str(getattr(config, "_name_or_path", ""))).parent  # of the hub's cache
    if not Path(options.model).expanduser().is_dir() and _SNAPSHOT.search(folder.as_posix()):
        return name_of(str(folder), None)
    return name_of(options.model, options.revision)


def _network(pipe: Any) -> Any:
    """What denoises."""
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)


#: What every diffusers pipeline needs.
_PACKAGES = ("torch", "simplejpeg", "accelerate", "transformers", "diffusers")


def _packages() -> tuple[Any, Any]:
    """torch and diffusers, quiet; the others that every pipeline needs are there, too."""
    found = {}
    for package in _PACKAGES:
        try:
            module = found[package] = importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise missing_extra(package, "images", "backend 'diffusers'") from None
        if package in ("transformers", "diffusers"):  # before diffusers imports more of transformers, which talks
            module.utils.logging.set_verbosity_error()
            module.utils.logging.disable_progress_bar()
    return found["torch"], found["diffusers"]


def _encoded(pipe: Any) -> tuple[str | None, ...]:
    """What `encode_prompt` of a pipeline returns; empty where the pipeline has to encode prompts by itself."""
    kind = type(pipe).__name__
    if kind == "Flux2KleinPipeline" and not pipe.config.is_distilled:  # it encodes the negative prompt by itself only
        return ()
    return ENCODED.get(kind, ())


def _check_device(device: str) -> None:
    torch, _ = _packages()
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise StageError(f"there is no device '{device}'", fix='devices = ["cpu"] or ["cuda:0", "cuda:1"]') from None
    if wanted.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (wanted.index or 0) >= count:
        raise StageError(
            f"there is no device '{device}': torch {torch.__version__} sees {count} CUDA devices",
            fix='see nvidia-smi and CUDA_VISIBLE_DEVICES, or set devices = ["cpu"]',
        )


def _device_name(device: str) -> str:
    torch, _ = _packages()
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    if device != "cpu":
        return device
    threads = torch.get_num_threads()
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" + (f", {threads} threads" if threads > 1 else "")


def _tell_memory(pipe: Any) -> None:
    """Lets a VAE without memory be heard of: SANA's pipelines catch that error and go on without an image."""
    torch, _ = _packages()
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return
    decode = vae.decode

    def heard(*args: Any, **more: Any) -> Any:
        try:
            return decode(*args, **more)
        except torch.OutOfMemoryError as error:
            said = str(error)
        raise MemoryError(said)  # outside, so that it holds no tensors

    vae.decode = heard


def check_installed(options: DiffusionOptions) -> None:
    """Raises StageError for packages and model files that a pipeline would miss; loads nothing."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "images", "backend 'diffusers'")
    check_model(options)


def check_model(options: DiffusionOptions) -> None:
    """Raises StageError where no model is named, or one that can be no model."""
    model = options.model
    directory = Path(model).expanduser()
    if not model:
        raise StageError(
            "backend 'diffusers' needs a model",
            fix='set model to a directory or a hub id: model = "models/sd-turbo"',
        )
    is_local = directory.is_dir()
    if is_local and not (directory / "model_index.json").is_file():
        raise StageError(
            f"'{model}' holds no diffusers pipeline: it has no model_index.json",
            fix="name the directory that save_pretrained or `hf download` wrote",
        )
    if not is_local and (directory.exists() or not _HUB_ID.fullmatch(model)):
        raise StageError(
            f"there is no model directory '{model}'",
            fix="name a directory that diffusers' save_pretrained wrote, or a hub id: owner/name",
        )


def _loaded(options: DiffusionOptions) -> Any:
    """The pipeline on the CPU."""
    torch, diffusers = _packages()
    model = options.model
    check_model(options)
    directory = Path(model).expanduser()
    is_local = directory.is_dir()
    args = {
        "dtype": getattr(torch, options.dtype), "variant": options.variant, "revision": options.revision,
        "local_files_only": is_local,
    }  # fmt: skip
    given = {name: value for name, value in args.items() if value is not None}
    place = str(directory) if is_local else model
    try:
        try:
            return diffusers.AutoPipelineForText2Image.from_pretrained(place, **given)
        except ValueError as error:
            if "can't find a pipeline linked to" not in str(error):
                raise
            return diffusers.DiffusionPipeline.from_pretrained(place, **given)  # the class that the model names
    except Exception as error:  # of the hub, of files, of every loader: none of them is of a row
        if is_out_of_memory(error) or (is_local and is_of_the_machine(error)):
            raise
        fix = (
            "see that the directory is whole: load it with diffusers' AutoPipelineForText2Image by hand"
            if is_local
            else f"fetch it where there is a network, hf download {model} --local-dir DIR, and set model = DIR"
        )
        raise StageError(f"model '{model}' cannot be loaded: {_line(error)}", fix=fix) from error


def _adapt(pipe: Any, options: DiffusionOptions) -> None:
    """Scheduler, LoRA, VAE, attention, weights and compilation, in the order in which they build on each other."""
    torch, diffusers = _packages()
    kind = type(pipe).__name__
    where = {"model": options.model, "pipeline": kind}
    if options.scheduler is not None:
        pipe.scheduler = _scheduler(diffusers, options.scheduler, pipe.scheduler)
    if options.lora is not None:
        _fuse_lora(pipe, options, where)
    for option in ("slicing", "tiling"):
        if getattr(options, f"vae_{option}"):
            enable = getattr(getattr(pipe, "vae", None), f"enable_{option}", None)
            if enable is None:
                raise StageError(f"the VAE of '{kind}' has no {option}", where=where, fix=f"take vae_{option} out")
            enable()
    network = _network(pipe)
    if options.attention is not None:
        with _told(f'attention = "{options.attention}" cannot be set', where, "take attention out, or another name"):
            network.set_attention_backend(options.attention)
    if options.weights == "fp8":
        with _told('weights = "fp8" cannot be set', where, 'weights = "same"'):
            network.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=getattr(torch, options.dtype)
            )
    if options.compile == "blocks" and getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks()
    elif options.compile != "off":
        network.compile()


def _scheduler(diffusers: Any, name: str, current: Any) -> Any:
    base = diffusers.SchedulerMixin
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    kind = getattr(diffusers, name, None) if name in names else None
    if needed := getattr(kind, "_backends", None):  # diffusers' stand-in where one of them is missing
        raise StageError(f"scheduler '{name}' needs {' and '.join(needed)}", fix="install them, or name another one")
    if kind is None or not issubclass(kind, base):
        near = difflib.get_close_matches(name, names, 1)
        raise StageError(
            f"diffusers has no scheduler '{name}'",
            fix=f"did you mean '{near[0]}'?" if near else "name a class such as EulerDiscreteScheduler",
        )
    return kind.from_config(current.config)


def _fuse_lora(pipe: Any, options: DiffusionOptions, where: dict[str, Any]) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise StageError(f"'{type(pipe).__name__}' takes no LoRA", where=where, fix="take lora out")
    if importlib.util.find_spec("peft") is None:
        raise missing_extra("peft", "images", "option 'lora'")
    path = Path(str(options.lora)).expanduser()
    if not path.exists() and not _HUB_ID.fullmatch(str(options.lora)):
        raise StageError(f"there is no LoRA file '{options.lora}'", fix="name a file, a directory or a hub id")
    with _told(f"LoRA '{options.lora}' cannot be loaded", where, "name weights that were trained for this model"):
        place = str(path) if path.exists() else options.lora
        pipe.load_lora_weights(place, local_files_only=path.exists())
        if not pipe.get_list_adapters():
            raise ValueError("it holds no weights for this model")
        pipe.fuse_lora(lora_scale=options.lora_scale)
        pipe.unload_lora_weights()


@contextlib.contextmanager
def _told(what: str, where: dict[str, Any], fix: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # diffusers and peft have no class of their own for a request that cannot be met
        if is_of_the_machine(error):
            raise
        raise StageError(f"{what}: {_line(error)}", where=where, fix=fix) from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

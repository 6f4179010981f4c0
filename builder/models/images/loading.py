"""Loading a diffusers pipeline: what has to be installed, which device and model, scheduler, LoRA, weights."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from builder.config.sections import Strict
from builder.errors import StageError, check_packages, missing_extra
from builder.machine import is_of_the_machine, is_out_of_memory

#: `owner/name` on the hub.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: A folder of the hub's cache: models--owner--name/snapshots/revision.
_SNAPSHOT = re.compile(r"models--([\w.-]+)--([\w.-]+)/snapshots/(\w+)$")


class DiffusionOptions(Strict):
    """Options of a diffusers pipeline. None: the pipeline's own value."""

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


def name_of(model: str, revision: str | None) -> str:
    """The name of a model without the paths of a machine: `owner/name@revision`, or a directory's name."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        if cached := _SNAPSHOT.search(directory.absolute().as_posix()):
            return f"{cached[1]}/{cached[2]}@{cached[3]}"
        return directory.resolve().name
    return f"{model}@{revision}" if revision else model


def name_as_loaded(pipe: Any, options: DiffusionOptions) -> str:
    """`name_of`, with the commit if the model is from the hub, whose branches move."""
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


def packages() -> tuple[Any, Any]:
    """torch and diffusers, with their logs silenced; checks that the other packages of a pipeline are there."""
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


def check_device(device: str) -> None:
    torch, _ = packages()
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


def name_of_device(device: str) -> str:
    torch, _ = packages()
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    if device != "cpu":
        return device
    threads = torch.get_num_threads()
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" + (f", {threads} threads" if threads > 1 else "")


def check_installed(options: DiffusionOptions) -> None:
    """Raises StageError for packages and model files that a pipeline would miss; loads nothing."""
    check_packages(*_PACKAGES, extra="images", needed_by="backend 'diffusers'")
    check_model(options)


def check_model(options: DiffusionOptions) -> None:
    """Raises StageError if no model is named, or one that cannot be a model."""
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
            f"'{model}' is not a diffusers pipeline: it has no model_index.json",
            fix="name the directory that save_pretrained or `hf download` wrote",
        )
    if not is_local and (directory.exists() or not _HUB_ID.fullmatch(model)):
        raise StageError(
            f"there is no model directory '{model}'",
            fix="name a directory that diffusers' save_pretrained wrote, or a hub id: owner/name",
        )


def loaded(options: DiffusionOptions) -> Any:
    """The pipeline on the CPU."""
    torch, diffusers = packages()
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
    except Exception as error:  # of the hub, of files, of any loader; never the fault of a row
        if is_out_of_memory(error) or (is_local and is_of_the_machine(error)):
            raise
        fix = (
            "check that the directory is complete: load it with diffusers' AutoPipelineForText2Image by hand"
            if is_local
            else f"fetch it where there is a network, hf download {model} --local-dir DIR, and set model = DIR"
        )
        raise StageError(f"model '{model}' cannot be loaded: {one_line(error)}", fix=fix) from error


def adapt(pipe: Any, options: DiffusionOptions) -> None:
    """Scheduler, LoRA, VAE, attention, weights and compilation, in the order in which they build on each other."""
    torch, diffusers = packages()
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
        with saying(f'attention = "{options.attention}" cannot be set', where, "take attention out, or another name"):
            network.set_attention_backend(options.attention)
    if options.weights == "fp8":
        with saying('weights = "fp8" cannot be set', where, 'weights = "same"'):
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
    if needed := getattr(kind, "_backends", None):  # diffusers' placeholder if one of them is missing
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
        raise StageError(f"'{type(pipe).__name__}' does not take a LoRA", where=where, fix="take lora out")
    check_packages("peft", extra="images", needed_by="option 'lora'")
    path = Path(str(options.lora)).expanduser()
    if not path.exists() and not _HUB_ID.fullmatch(str(options.lora)):
        raise StageError(
            f"there is no LoRA file '{options.lora}'", fix="name a file or directory that exists, or a hub id"
        )
    with saying(f"LoRA '{options.lora}' cannot be loaded", where, "name weights that were trained for this model"):
        place = str(path) if path.exists() else options.lora
        pipe.load_lora_weights(place, local_files_only=path.exists())
        if not pipe.get_list_adapters():
            raise ValueError("it holds no weights for this model")
        pipe.fuse_lora(lora_scale=options.lora_scale)
        pipe.unload_lora_weights()


@contextlib.contextmanager
def saying(what: str, where: dict[str, Any], fix: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # diffusers and peft raise no error class of their own for this
        if is_of_the_machine(error):
            raise
        raise StageError(f"{what}: {one_line(error)}", where=where, fix=fix) from error


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

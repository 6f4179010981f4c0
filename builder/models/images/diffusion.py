"""Images of prompts by a diffusers pipeline: text encoding, denoising.

Owns what differs between pipeline classes: the names of their options, and what `encode_prompt` returns. Knows no
table, no threads and no JPEG; `builder.models.images.queue` batches, pads and halves.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from builder.errors import RowError, StageError
from builder.machine import is_out_of_memory
from builder.models.images.loading import (
    DiffusionOptions,
    adapt,
    check_device,
    loaded,
    name_as_loaded,
    name_of_device,
    one_line,
    packages,
)
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
#: Arguments that a pipeline needs to make an image of a prompt with a given size and seed.
NEEDED = ("prompt", "height", "width", "generator", "output_type")
#: Arguments of `__call__` and `encode_prompt` that leave prompt and size as they are, passed where they are accepted.
AS_IS = {"use_resolution_binning": False, "clean_caption": False}
#: Steps of SanaSprintPipeline for which its `intermediate_timesteps` is meant; it refuses it for others.
_SPRINT_STEPS = 2

#: The result of `encode_prompt` for one prompt, by argument of `__call__`, one row each; or the prompt itself.
Text = Mapping[str, Any]


class Unsafe(ValueError):
    """The model's own safety checker blacked out an image."""


class Diffusion:
    """A loaded pipeline on one device.

    Attributes:
        name: the model's name without paths of the machine; `owner/name@commit` for a model of the hub.
        steps: denoising steps.
        guidance: guidance scale; None if the pipeline has none.
        device_name: what it computes on, as far as that decides the last bits: a GPU's name, a CPU's vector unit
            and threads.

    Raises:
        StageError: a package, the device, the model or a part of it is missing, it is not a text-to-image pipeline, or
            it does not take an option that is set.
    """

    def __init__(self, options: DiffusionOptions, device: str) -> None:
        torch, _ = packages()
        self.options, self.device = options, device
        check_device(device)
        pipe = self._pipe = loaded(options)
        self.name = name_as_loaded(pipe, options)
        self._taken = inspect.signature(pipe.__call__).parameters
        self._names = _encoded(pipe)
        self._encoder_takes = inspect.signature(pipe.encode_prompt).parameters if self._names else {}
        self._check_taken()
        self.steps = options.steps or int(self._taken["num_inference_steps"].default)
        self.guidance = self._guidance()
        self._check_negative_prompt()
        adapt(pipe, options)
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        _tell_memory(pipe)
        self._torch = torch
        self.device_name = name_of_device(device)

    def _guidance(self) -> float | None:
        if "guidance_scale" not in self._taken:
            return None
        given = self.options.guidance
        return float(self._taken["guidance_scale"].default if given is None else given)

    def _check_taken(self) -> None:
        """Refuses a pipeline that cannot make images of prompts, and options that it would ignore."""
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
            raise StageError(f"'{kind}' does not take a number of steps", where=where, fix="name a text-to-image model")

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
            texts: what `encode` returned, one per image.
            seeds: one per image, for its own generator, which is on the CPU: the noise is the same on every device.
            size: width and height, px.

        Returns:
            A function that waits for the device and returns uint8 (count, height, width, 3), and per image an error
            or None.

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
            StageError: the device no longer computes.
        """
        if not self.device.startswith("cuda"):
            return
        try:
            self._torch.ones(1, device=self.device).item()
        except Exception as error:
            if not is_out_of_memory(error):
                raise StageError(
                    f"device '{self.device}' no longer computes: {one_line(error)}",
                    where={"name": self.device_name},
                    fix="see nvidia-smi and dmesg, then run the same command again: it continues where it stopped",
                ) from error

    def free(self) -> None:
        """Frees device memory that nothing uses."""
        if self.device.startswith("cuda"):
            with contextlib.suppress(RuntimeError):  # of a lost device; the first error says why
                self._torch.cuda.empty_cache()


def _fault(is_blacked: bool, is_finite: bool) -> Exception | None:
    if is_blacked:
        return Unsafe("the model's own safety checker blacked the image out")
    if is_finite:
        return None
    return RowError("not_finite", "the model's image has values that are not numbers: try another dtype")


def _encoded(pipe: Any) -> tuple[str | None, ...]:
    """What `encode_prompt` of a pipeline returns; empty where the pipeline has to encode prompts by itself."""
    kind = type(pipe).__name__
    if kind == "Flux2KleinPipeline" and not pipe.config.is_distilled:  # it encodes the negative prompt by itself only
        return ()
    return ENCODED.get(kind, ())


def _tell_memory(pipe: Any) -> None:
    """Turns a VAE's out-of-memory error into a MemoryError: SANA's pipelines catch the original and return no image."""
    torch, _ = packages()
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

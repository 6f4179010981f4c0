"""Images on one GPU: pipelines of real shapes with random weights, bare and as the stage `generate`.

    python -m bench.gpu_generate [--batches 32 64] [--compile off blocks whole] [--only flux sdxl] [--tiny]

Needs this checkout installed with the extra `images`, one GPU with 48 GB or more for FLUX, and no network: the weights
are random, in the shapes of FLUX.1-schnell and SDXL-Turbo, transformer or UNet, text encoders and VAE. Measured at
384 px, 2 steps, bfloat16, for each batch size and each way of compiling:

- **bare**: the pipeline called in a loop, each image with a generator of its own, the images left on the device.
- **stage**: the stage's `prepare` in a thread as far ahead as the engine goes, and its `process`, JPEG included. Its
  setup is not counted.
- **network**: one call of transformer or UNet alone with the inputs that the pipeline gave it. Its operations are
  counted by `torch.utils.flop_counter` and printed; `of peak` is their rate as a share of the device's dense bfloat16
  peak (`PEAKS`, from NVIDIA's data sheets), or of a large matmul measured here where the device is not listed.

`--tiny` goes the whole way on the CPU in seconds; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pyarrow as pa
import torch

from builder.models.images import diffusion
from builder.stages.generate import Generate, GenerateOptions
from tests.support.tiny_diffusers import clip_tokenizer, t5_tokenizer

#: Dense bfloat16 operations per second, by a part of the device's name. Source: NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
#: As FairCLIP makes its images.
SIDE, STEPS = 384, 2
TINY_SIDE = 32
#: Of one GPU like an H200: the best rate of the stage over that of the bare loop, and the network's share of the peak
#: where it is compiled.
TARGET, PEAK_TARGET = 0.97, 0.6
#: Batches of one measurement, and calls of the network alone.
ROUNDS, CALLS = 6, 10


@dataclass(frozen=True)
class Line:
    """One measurement."""

    model: str
    compile: str
    batch: int
    bare: float
    stage: float
    network_tflops: float
    of_peak: float


# --- pipelines of real shapes ---


def flux(tiny: bool) -> Any:
    """FLUX.1-schnell. Source: the configurations of black-forest-labs/FLUX.1-schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    width, pooled = (32, 32) if tiny else (4096, 768)
    shape: dict[str, Any] = (
        {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "axes_dims_rope": (4, 6, 6)}
        if tiny
        else {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
              "axes_dims_rope": (16, 56, 56)}
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, joint_attention_dim=width, pooled_projection_dim=pooled, guidance_embeds=False,
        **shape,
    )  # fmt: skip
    t5 = (
        T5Config(d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=128)
        if tiny
        else T5Config(
            d_model=width, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_vae(16, tiny, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tiny), tokenizer=_tokenizer(), text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def sdxl(tiny: bool) -> Any:
    """SDXL-Turbo. Source: the configurations of stabilityai/sdxl-turbo."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    shape: dict[str, Any] = (
        {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": (2, 4), "norm_num_groups": 8,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1),
         "cross_attention_dim": 64, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32}
        if tiny
        else {"block_out_channels": (320, 640, 1280), "layers_per_block": 2, "attention_head_dim": (5, 10, 20),
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
              "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
              "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, addition_embed_type="text_time", use_linear_projection=True,
        **shape,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(4, tiny, scaling_factor=0.13025), text_encoder=_clip(tiny), tokenizer=_tokenizer(),
        text_encoder_2=_clip(tiny, large=True), tokenizer_2=_tokenizer(), unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
        add_watermarker=False,
    )  # fmt: skip


def _vae(latents: int, tiny: bool, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16,) * 4 if tiny else (128, 256, 512, 512), layers_per_block=1 if tiny else 2,
        latent_channels=latents, norm_num_groups=8 if tiny else 32, in_channels=3, out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **more,
    )  # fmt: skip


def _clip(tiny: bool, *, large: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    hidden, layers, heads = (32, 2, 4) if tiny else (1280, 32, 20) if large else (768, 12, 12)
    config = CLIPTextConfig(
        vocab_size=514 if tiny else 49408, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, projection_dim=hidden, hidden_act="gelu" if large else "quick_gelu",
        max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if large else CLIPTextModel(config)


def _tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return clip_tokenizer(Path(folder))


MODELS: dict[str, tuple[str, Callable[[bool], Any]]] = {"flux": ("FLUX.1-schnell", flux), "sdxl": ("SDXL-Turbo", sdxl)}


def built(make: Callable[[bool], Any], device: str, dtype: torch.dtype, tiny: bool) -> Any:
    """A pipeline with random weights, made on the device at once."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipe = make(tiny)
    finally:
        torch.set_default_dtype(before)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as `from_pretrained` does: T5 drops values out while it is trained
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- measuring ---


def measure(name: str, make: Callable[[bool], Any], options: argparse.Namespace, peak: float) -> list[Line]:
    """All batch sizes and ways of compiling of one model; eager first, since compiling stays with the model."""
    device, side = options.device, TINY_SIDE if options.tiny else SIDE
    dtype = torch.float32 if options.tiny else torch.bfloat16
    pipe = built(make, device, dtype, options.tiny)
    network = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e9:.2f} G parameters of transformer or UNet")
    inputs = {batch: inputs_of(pipe, network, batch, side) for batch in options.batches}
    counted = {batch: operations(network, *given) for batch, given in inputs.items()}
    lines = []
    for compiled in options.compile:
        for batch in options.batches:
            stage_rate = drive(pipe, device, side, batch, compiled, options.tiny)  # its setup compiles
            bare_rate = bare(pipe, side, batch)
            seconds = timed(partial(network, *inputs[batch][0], **inputs[batch][1]), CALLS)
            rate = counted[batch] / seconds
            line = Line(name, compiled, batch, bare_rate, stage_rate, counted[batch] / 1e12, rate / peak)
            print(
                f"{name}, compile {compiled}, batch {batch}: bare {line.bare:.2f} images/s, stage {line.stage:.2f} "
                f"images/s ({line.stage / line.bare:.3f} x), network {line.network_tflops:.3f} TFLOP a call, "
                f"{rate / 1e12:.4g} TFLOP/s, {line.of_peak:.1%} of peak",
                flush=True,
            )
            lines.append(line)
    return lines


def call(pipe: Any, side: int, batch: int, first: int = 0) -> Any:
    seeds = [torch.Generator().manual_seed(first + i) for i in range(batch)]
    prompts = [f"a photo of number {first + i}" for i in range(batch)]
    more = {"max_sequence_length": 256} if "Flux" in type(pipe).__name__ else {}
    return pipe(
        prompts, height=side, width=side, num_inference_steps=STEPS, guidance_scale=0.0, generator=seeds,
        output_type="pt", **more,
    ).images  # fmt: skip


def inputs_of(pipe: Any, network: Any, batch: int, side: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the pipeline calls its network with."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = network.register_forward_pre_hook(lambda _, args, more: seen.append((args, more)), with_kwargs=True)
    try:
        call(pipe, side, batch)
    finally:
        hook.remove()
    return seen[0]


def operations(network: Any, args: tuple[Any, ...], more: dict[str, Any]) -> int:
    """Floating point operations of one call: a multiplication and an addition count as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*args, **more)
    return int(counter.get_total_flops())


def bare(pipe: Any, side: int, batch: int) -> float:
    """Images per second of the pipeline in a loop."""
    return batch / timed(lambda: call(pipe, side, batch), ROUNDS)


def timed(work: Callable[[], Any], count: int) -> float:
    """Seconds of one piece of work, the first left out."""
    with torch.no_grad():
        work()
        _wait()
        began = time.perf_counter()
        for _ in range(count):
            work()
        _wait()
    return (time.perf_counter() - began) / count


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def drive(
    pipe: Any, device: str, side: int, batch: int, compiled: Literal["off", "blocks", "whole"], tiny: bool
) -> float:
    """Images per second of the stage, asked as the engine asks it."""
    options = GenerateOptions(
        backend="diffusers", model="random/weights", dtype="float32" if tiny else "bfloat16", steps=STEPS,
        guidance=0.0, max_sequence_length=256 if "Flux" in type(pipe).__name__ else None, width=side, height=side,
        batch_size=batch, compile=compiled,
    )  # fmt: skip
    stage = Generate(options)
    with mock.patch.object(diffusion, "loaded", lambda _: pipe):
        stage.setup(device)
    try:
        _ask(stage, batch, 1)
        began = time.perf_counter()
        _ask(stage, batch, ROUNDS)
        seconds = time.perf_counter() - began
        if notes := stage.take_notes():
            raise SystemExit(f"batch {batch} does not fit: {notes}")
    finally:
        stage.close()
    return ROUNDS * batch / seconds


def _ask(stage: Generate, batch: int, count: int) -> None:
    """`prepare` in a thread, as many batches ahead as the stage wants, and `process`."""
    waiting = deque(_rows(range(i * batch, (i + 1) * batch)) for i in range(count))
    window: deque[Any] = deque()
    with ThreadPoolExecutor(1) as reader:
        while waiting or window:
            while waiting and len(window) <= stage.resources.ahead:
                rows = waiting.popleft()
                window.append((rows, reader.submit(stage.prepare, rows)))
            rows, prepared = window.popleft()
            result = stage.process(rows, prepared.result())
            assert result.num_rows == batch


def _rows(numbers: Sequence[int]) -> pa.RecordBatch:
    count = len(numbers)
    return pa.RecordBatch.from_pydict(
        {
            "shard": ["00000000"] * count,
            "row": list(numbers),
            "uid": [f"{i:032x}" for i in numbers],
            "key": [f"{i:08d}" for i in numbers],
            "prompt": [f"a photo of number {i}" for i in numbers],
            "draw": pa.array([0] * count, pa.int32()),
            "image_format": ["jpg"] * count,
        }
    )


def summary(lines: Sequence[Line]) -> str:
    """The best of each side of one model's measurements, with the targets."""
    stage, bare = max(line.stage for line in lines), max(line.bare for line in lines)
    share = max(line.of_peak for line in lines)
    return (
        f"{lines[0].model}: best stage {stage:.2f}, best bare {bare:.2f} images/s: {stage / bare:.3f} x, "
        f"target {TARGET}; network {share:.1%} of peak, target {PEAK_TARGET:.0%}"
    )


def peak_of(device: str, tiny: bool) -> float:
    """The device's bfloat16 peak, operations per second, from `PEAKS` or from a matmul."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    size = 256 if tiny else 8192
    a = torch.randn(size, size, device=device, dtype=torch.float32 if tiny else torch.bfloat16)
    matmul = 2 * size**3 / timed(lambda: a @ a, 20)
    listed = next((peak for part, peak in PEAKS.items() if part in name), None)
    print(f"{name}: matmul of {size} {matmul / 1e12:.4g} TFLOP/s, peak {(listed or matmul) / 1e12:.4g} TFLOP/s")
    return listed or matmul


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    parser = argparse.ArgumentParser(description="Measure the stage `generate` with pipelines of real shapes.")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64], help="[%(default)s]")
    parser.add_argument("--compile", nargs="+", choices=("off", "blocks", "whole"), default=["off", "whole"])
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="[%(default)s]")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="the whole way on the CPU, with tiny shapes")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.device, options.batches, options.compile = "cpu", [2], ["off"]
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --tiny goes the whole way on the CPU")
    print(f"torch {torch.__version__}, {TINY_SIDE if options.tiny else SIDE} px, {STEPS} steps")
    peak = peak_of(options.device, options.tiny)
    lines = []
    for key in options.only:
        name, make = MODELS[key]
        found = measure(name, make, options, peak)
        print(summary(found), flush=True)
        lines += found
        if not options.tiny:
            torch.cuda.empty_cache()
    return lines


if __name__ == "__main__":
    main()

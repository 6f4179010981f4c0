"""Faces on one GPU: a network of SCRFD-10G's shape with random weights, fed by JPEGs that are decoded on the CPU.

    python bench/gpu_faces.py                     one GPU, 640 px, batches of 64
    python bench/gpu_faces.py --tiny              the whole path on a CPU with tiny sizes, in seconds

Needs torch, numpy and Pillow; takes simplejpeg and cv2 where they are installed. It measures, in images per second:

- `network`: the network alone on frames that lie on the device, the most that the path can reach;
- `decode`: JPEG bytes to frames, in threads, nothing else running;
- `path`: both side by side: bytes, frames, upload, network, the best boxes down, non-maximum suppression.

The network is torch's, not the stage's: the stage runs ONNX files by onnxruntime. Decoding is the stage's own. The
weights are random, so that no box means anything: the best few of every picture go through suppression.

Source of the shape: insightface, detection/scrfd/configs/scrfd/scrfd_10g_bnkps.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

from builder.models import pictures
from builder.models.faces.mtcnn import suppress

#: Images per second of the whole path on a GPU of the H200's class with 16 cores.
TARGET = 1500.0
#: Boxes of a picture that are brought down, those of them that go through suppression, and the overlap of one face.
BEST, SUPPRESSED, OVERLAP = 64, 8, 0.4
STRIDES, ANCHORS = (8, 16, 32), 2
#: Batches that wait, decoded.
AHEAD = 3


@dataclass(frozen=True)
class Shape:
    """Widths and depths of the network."""

    blocks: Sequence[int] = (3, 4, 2, 3)
    planes: Sequence[int] = (56, 88, 88, 224)
    base: int = 56
    neck: int = 56
    head: int = 80


SCRFD_10G = Shape()
TINY = Shape((1, 1, 1, 1), (8, 8, 8, 16), 8, 8, 8)


# --- the network ---


def conv(inside: int, outside: int, *, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """A convolution, its normalization and perhaps a ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)]
    layers += [nn.BatchNorm2d(outside), *([nn.ReLU(inplace=True)] if relu else [])]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """ResNet's basic block; where it makes the map smaller, the shortcut does so by a mean."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(conv(inside, outside, stride=stride), conv(outside, outside, relu=False))
        shortcut: list[nn.Module] = [nn.AvgPool2d(stride, stride, ceil_mode=True)] if stride > 1 else []
        if stride > 1 or inside != outside:
            shortcut.append(conv(inside, outside, kernel=1, relu=False))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.main(x) + self.shortcut(x))


class Head(nn.Module):
    """Scores, distances and landmarks of one stride."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(conv(inside, width), conv(width, width), conv(width, width))
        self.score = nn.Conv2d(width, ANCHORS, 3, padding=1)
        self.box = nn.Conv2d(width, 4 * ANCHORS, 3, padding=1)
        self.landmarks = nn.Conv2d(width, 10 * ANCHORS, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.shared(x)
        parts = (self.score(x), self.box(x), self.landmarks(x))
        scores, boxes, landmarks = (
            part.permute(0, 2, 3, 1).reshape(len(x), -1, part.shape[1] // ANCHORS) for part in parts
        )
        return scores.sigmoid(), boxes, landmarks


class Scrfd(nn.Module):
    """ResNetV1e, PAFPN and a head a stride: (n, 3, h, w) to (n, cells, 1), (n, cells, 4), (n, cells, 10)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        half = shape.base // 2
        self.stem = nn.Sequential(
            conv(3, half, stride=2), conv(half, half), conv(half, shape.base), nn.MaxPool2d(3, 2, 1)
        )
        stages, inside = [], shape.base
        for number, (count, planes) in enumerate(zip(shape.blocks, shape.planes, strict=True)):
            blocks = [Block(inside if i == 0 else planes, planes, 2 if i == 0 and number else 1) for i in range(count)]
            stages.append(nn.Sequential(*blocks))
            inside = planes
        self.stages = nn.ModuleList(stages)
        width = shape.neck
        self.lateral = nn.ModuleList(nn.Conv2d(planes, width, 1) for planes in shape.planes[1:])
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in STRIDES[1:])
        self.fpn = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in STRIDES)
        self.pan = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in STRIDES[1:])
        self.heads = nn.ModuleList(Head(width, shape.head) for _ in STRIDES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        levels = [lateral(level) for lateral, level in zip(self.lateral, levels[1:], strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + functional.interpolate(levels[i + 1], size=levels[i].shape[2:], mode="nearest")
        levels = [smooth(level) for smooth, level in zip(self.fpn, levels, strict=True)]
        for i, down in enumerate(self.down):
            levels[i + 1] = levels[i + 1] + down(levels[i])
        levels[1:] = [smooth(level) for smooth, level in zip(self.pan, levels[1:], strict=True)]
        answers = [head(level) for head, level in zip(self.heads, levels, strict=True)]
        scores, boxes, landmarks = (torch.cat(part, 1) for part in zip(*answers, strict=True))
        return scores, boxes, landmarks


def multiplications(network: nn.Module, width: int, height: int) -> int:
    """Multiplications of its convolutions for one picture."""
    total = 0

    def count(layer: Any, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        total += out[0].numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    with torch.inference_mode():
        network(torch.zeros(1, 3, height, width))
    for hook in hooks:
        hook.remove()
    return total


class Detector:
    """The network on a device, and what is around it: bytes of pixels in, the best boxes of every picture out."""

    def __init__(self, shape: Shape, size: int, batch: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        network = Scrfd(shape).eval()
        self.multiplications = multiplications(network, size, size)
        self.size, self.batch, self.device, self.dtype = size, batch, torch.device(device), dtype
        self.network = network.to(self.device, dtype, memory_format=torch.channels_last)
        cells = [torch.cartesian_prod(torch.arange(size // s), torch.arange(size // s)).flip(1) * s for s in STRIDES]
        corners = torch.cat(cells).repeat_interleave(ANCHORS, 0)
        strides = torch.cat([torch.full((ANCHORS * (size // s) ** 2, 1), s) for s in STRIDES])
        self.corners, self.strides = corners.to(self.device, torch.float32), strides.to(self.device, torch.float32)

    def start(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Begins a batch, uint8 (n, size, size, 3): boxes (n, BEST, 4) and scores (n, BEST), on the device."""
        with torch.inference_mode():
            x = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(self.dtype)
            scores, distances, _ = self.network((x - 127.5) / 128)
            best, at = scores[:, :, 0].float().topk(min(BEST, scores.shape[1]), dim=1)
            sides = distances.float().gather(1, at[:, :, None].expand(-1, -1, 4)) * self.strides[at]
            corners = self.corners[at]
            return torch.cat([corners - sides[:, :, :2], corners + sides[:, :, 2:]], 2), best

    def finish(self, started: tuple[torch.Tensor, torch.Tensor]) -> int:
        """Waits for a batch and counts its boxes."""
        boxes, scores = (part.cpu().numpy().astype(np.float64) for part in started)
        count = 0
        for of, best in zip(boxes, scores, strict=True):
            count += len(suppress(of[:SUPPRESSED], best[:SUPPRESSED], OVERLAP))
        return count

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- pictures ---


def jpegs(count: int, side: int) -> list[bytes]:
    """Pictures of photos' texture and size: smooth colours under some noise."""
    made = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((side, side * 3 // 4))
        noise = random.normal(0, 6, (side * 3 // 4, side, 3))
        out = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


def fitter() -> tuple[str, Callable[[Any, int, int], Any]]:
    """What resizes a picture, with its name: cv2, as in the stage, or Pillow."""
    try:
        import cv2
    except ImportError:
        return "Pillow", lambda image, width, height: np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        )
    cv2.setNumThreads(1)
    return "cv2", lambda image, width, height: cv2.resize(image, (width, height))


class Decoder:
    """Fills batches of frames, in threads."""

    def __init__(self, detector: Detector, threads: int) -> None:
        self.name, self._resized = fitter()
        self._size, self._batch = detector.size, detector.batch
        self._pinned = detector.device.type == "cuda"
        self._pool = ThreadPoolExecutor(threads)

    def room(self) -> torch.Tensor:
        """Memory for one batch, that a device reads directly."""
        room = torch.zeros((self._batch, self._size, self._size, 3), dtype=torch.uint8)
        return room.pin_memory() if self._pinned else room

    def fill(self, room: torch.Tensor, data: Sequence[bytes]) -> None:
        """Decodes pictures into a batch."""
        frames = room.numpy()

        def put(place: int) -> None:
            image = pictures.decode(data[place])
            scale = self._size / max(image.shape[:2])
            width, height = (max(int(side * scale), 1) for side in (image.shape[1], image.shape[0]))
            frame = frames[place]
            frame[:height, :width] = self._resized(image, width, height)
            frame[height:], frame[:, width:] = 0, 0

        list(self._pool.map(put, range(len(data))))


def batches(data: Sequence[bytes], count: int, size: int) -> Iterator[list[bytes]]:
    """So many batches of pictures, in turn."""
    for number in range(count):
        yield [data[(number * size + i) % len(data)] for i in range(size)]


# --- measuring ---


def network_rate(detector: Detector, rounds: int) -> float:
    """Images per second of the network alone."""
    room = torch.randint(0, 256, (detector.batch, detector.size, detector.size, 3), dtype=torch.uint8)
    pixels = room.to(detector.device)
    for _ in range(3):
        detector.start(pixels)
    detector.wait()
    began = time.perf_counter()
    for _ in range(rounds):
        detector.start(pixels)
    detector.wait()
    return rounds * detector.batch / (time.perf_counter() - began)


def decode_rate(decoder: Decoder, data: Sequence[bytes], batch: int, rounds: int) -> float:
    """Images per second of decoding alone."""
    room = decoder.room()
    decoder.fill(room, next(batches(data, 1, batch)))
    began = time.perf_counter()
    for part in batches(data, rounds, batch):
        decoder.fill(room, part)
    return rounds * batch / (time.perf_counter() - began)


def path_rate(detector: Detector, decoder: Decoder, data: Sequence[bytes], rounds: int) -> tuple[float, int]:
    """Images per second of the whole path, and its boxes."""
    free: queue.Queue[torch.Tensor] = queue.Queue()
    ready: queue.Queue[torch.Tensor | BaseException | None] = queue.Queue()
    for _ in range(AHEAD):
        free.put(decoder.room())

    def feed() -> None:
        try:
            for part in batches(data, rounds, detector.batch):
                room = free.get()
                decoder.fill(room, part)
                ready.put(room)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    detector.finish(detector.start(decoder.room()))
    boxes = 0
    before: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None
    began = time.perf_counter()
    threading.Thread(target=feed, daemon=True).start()
    while True:
        room = ready.get()
        if isinstance(room, BaseException):
            raise room
        now = None if room is None else (room, detector.start(room))
        if before is not None:
            boxes += detector.finish(before[1])
            free.put(before[0])
        if now is None:
            return rounds * detector.batch / (time.perf_counter() - began), boxes
        before = now


@dataclass(frozen=True)
class Measured:
    """What was measured, images per second, and on what."""

    device: str
    cores: int
    shape: str
    size_px: int
    picture_px: int
    batch: int
    dtype: str
    decoder: str
    fitter: str
    gmac_per_image: float
    network: float
    decode: float
    path: float
    boxes: int
    target: float


def measure(options: argparse.Namespace) -> Measured:
    shape = TINY if options.tiny else SCRFD_10G
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.dtype]
    detector = Detector(shape, options.size, options.batch, options.device, dtype)
    decoder = Decoder(detector, options.threads)
    data = jpegs(options.pictures, options.picture_px)
    network = network_rate(detector, options.rounds)
    decode = decode_rate(decoder, data, options.batch, options.rounds)
    path, boxes = path_rate(detector, decoder, data, options.rounds)
    on_gpu = detector.device.type == "cuda"
    return Measured(
        device=torch.cuda.get_device_name(detector.device) if on_gpu else platform.processor() or platform.machine(),
        cores=options.threads,
        shape="tiny" if options.tiny else "SCRFD-10G",
        size_px=options.size,
        picture_px=options.picture_px,
        batch=options.batch,
        dtype="fp32 (TF32)" if on_gpu and options.dtype == "fp32" else options.dtype,
        decoder="simplejpeg" if pictures._HAS_SIMPLEJPEG else "Pillow",
        fitter=decoder.name,
        gmac_per_image=round(detector.multiplications / 1e9, 3),
        network=round(network, 1),
        decode=round(decode, 1),
        path=round(path, 1),
        boxes=boxes,
        target=TARGET,
    )


def main() -> None:
    options = arguments()
    measured = measure(options)
    for name, value in asdict(measured).items():
        print(f"{name:16} {value}")
    if options.json:
        options.json.write_text(json.dumps(asdict(measured), indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Faces on one GPU, decoding included.")
    parser.add_argument("--tiny", action="store_true", help="a tiny network and tiny sizes on the CPU")
    parser.add_argument("--device", default="cuda", help="[%(default)s]")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="[%(default)s]")
    parser.add_argument("--size", type=int, default=640, help="side of a frame, px [%(default)s]")
    parser.add_argument("--picture-px", type=int, default=512, help="longest side of a picture [%(default)s]")
    parser.add_argument("--batch", type=int, default=64, help="pictures a call [%(default)s]")
    parser.add_argument("--rounds", type=int, default=100, help="batches of each measurement [%(default)s]")
    parser.add_argument("--pictures", type=int, default=256, help="different pictures [%(default)s]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="that decode [%(default)s]")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    if options.tiny:
        small = {"device": "cpu", "size": 64, "picture_px": 48, "batch": 4, "rounds": 5, "pictures": 6, "threads": 2}
        for name, value in small.items():
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()

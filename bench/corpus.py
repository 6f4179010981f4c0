"""The corpus of the benchmarks: shards as img2dataset writes them, the same bytes from the same seed every time.

400 photographic-like JPEGs stand in every shard over and over: noise over octaves whose amplitude falls, correlated
channels, a few hard-edged ellipses, longest side 512 px. Flat or white-noise pictures would have wrong sizes and wrong
decoding times.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SEED = 20261101
PICTURES = 400
#: Width and height of the pictures, px: longest side 512 in six aspect ratios.
SIZES = ((512, 512), (512, 384), (384, 512), (512, 341), (341, 512), (512, 288))
#: Words of the captions, and the tails that 12 % of them get: other scripts, and what json escapes.
WORDS = (
    "red", "old", "small", "wooden", "large", "blue", "quiet", "modern", "vintage", "bright", "garden", "street",
    "kitchen", "window", "river", "mountain", "portrait", "market", "bicycle", "bridge", "table", "flowers", "dress",
    "coffee", "harbour", "winter", "morning", "poster", "print", "stock", "photo", "image", "of", "the", "a", "with",
    "and", "in", "front", "near", "under", "for", "sale", "free", "download",
)  # fmt: skip
UNUSUAL = (
    "кошка сидит на окне",
    "猫が窓辺に座っている写真",
    "قطة تجلس على النافذة",
    "खिड़की पर बैठी बिल्ली",
    'a "quoted" title',
    "back\\slash and\ttab",
    "two\nlines",
    "party 🎉🐈 time",
)
#: Faces of a sample, and how many samples of a hundred have them.
FACES = ((0, 70), (1, 18), (2, 9), (5, 3))
#: A fraction in the time makes tarfile write a pax header for each member, as webdataset's writer does.
PAX_MTIME, USTAR_MTIME = 1_700_000_000.5, 1_700_000_000


@dataclass(frozen=True)
class Shards:
    """One variant of the corpus.

    Attributes:
        is_pax: a pax header before every member; else plain ustar.
        has_long_names: member names beyond the 100 characters of a ustar header, some not ASCII.
    """

    name: str
    count: int
    samples: int
    is_pax: bool = True
    has_long_names: bool = False


def make(folder: Path, shards: Shards) -> list[Path]:
    """Writes the shards that are not there yet; returns all of them."""
    made = []
    for number in range(shards.count):
        path = folder / shards.name / f"{number:08d}.tar"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temp = path.with_suffix(".part")
            _write(temp, shards, number)
            temp.replace(path)
        made.append(path)
    return made


def _write(path: Path, shards: Shards, number: int) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if shards.is_pax else tarfile.USTAR_FORMAT) as archive:
        if shards.has_long_names:
            archive.format = tarfile.PAX_FORMAT if number % 2 else tarfile.GNU_FORMAT
        for name, data in members(shards, number):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
            info.mtime = PAX_MTIME if shards.is_pax else USTAR_MTIME
            archive.addfile(info, io.BytesIO(data))


def members(shards: Shards, number: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of one shard's members in order: jpg, json, txt."""
    chance = random.Random(f"{SEED} {shards.name} {number}")
    images = pictures()
    for i in range(shards.samples):
        uid = f"{chance.getrandbits(128):032x}"
        key = f"{uid}-{i}"
        if shards.has_long_names:
            key = f"part-{'ü' if i % 3 == 0 else 'u'}{'long' * 25}/{key}"
        image, (width, height) = images[chance.randrange(PICTURES)]
        caption = _caption(chance)
        yield f"{key}.jpg", image
        yield f"{key}.json", _fields(chance, uid, f"{number:05d}{i:04d}", caption, width, height)
        yield f"{key}.txt", caption.encode()


def _caption(chance: random.Random) -> str:
    words = " ".join(chance.choice(WORDS) for _ in range(chance.randint(5, 15)))
    return f"{words[:30]} {chance.choice(UNUSUAL)}" if chance.random() < 0.12 else words


def _fields(chance: random.Random, uid: str, number: str, caption: str, width: int, height: int) -> bytes:
    faces = chance.choices([count for count, _ in FACES], [share for _, share in FACES])[0]
    boxes = [sorted(round(chance.random(), 6) for _ in range(4)) for _ in range(faces)]
    exif = {"Image Make": "Canon", "Image Orientation": "Horizontal (normal)"} if chance.random() < 0.4 else {}
    fields = {
        "uid": uid, "caption": caption, "url": f"https://example.org/images/{chance.getrandbits(48):012x}/{number}.jpg",
        "key": number, "status": "success", "error_message": None, "width": width, "height": height,
        "original_width": 2 * width, "original_height": 2 * height, "exif": json.dumps(exif),
        "sha256": f"{chance.getrandbits(256):064x}", "face_bboxes": [[a, b, c, d] for a, b, c, d in boxes],
    }  # fmt: skip
    return json.dumps(fields, indent=4).encode()


@lru_cache
def pictures() -> list[tuple[bytes, tuple[int, int]]]:
    """The JPEGs with their width and height."""
    chance = np.random.default_rng(SEED)
    return [picture(chance, SIZES[i % len(SIZES)], 95 if i % 4 == 0 else 90) for i in range(PICTURES)]


def picture(chance: np.random.Generator, size: tuple[int, int], quality: int) -> tuple[bytes, tuple[int, int]]:
    """One picture that looks like a blurred photo to a JPEG encoder."""
    width, height = size
    roughness = chance.uniform(0.47, 0.66)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        cells = (max(2, height >> (8 - octave)), max(2, width >> (8 - octave)))
        grey = chance.normal(0, 1, (*cells, 1)).astype(np.float32)
        colour = chance.normal(0, 0.35, (*cells, 3)).astype(np.float32)
        total += 110 * roughness**octave * _enlarged(grey + colour, size)
    image = Image.fromarray(np.clip(total + chance.uniform(90, 160), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(chance.integers(2, 7))):
        x, y = chance.uniform(0, width), chance.uniform(0, height)
        a, b = chance.uniform(10, width / 5), chance.uniform(10, height / 5)
        pen.ellipse((x - a, y - b, x + a, y + b), tuple(int(c) for c in chance.integers(0, 255, 3)))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue(), size


def _enlarged(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Noise of a few cells (h, w, 3) as float32 (height, width, 3), smooth between them."""
    channels = [Image.fromarray(cells[:, :, i]).resize(size, Image.Resampling.BICUBIC) for i in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)

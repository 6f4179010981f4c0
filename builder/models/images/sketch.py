"""Draws a labelled picture of a prompt, for trying a pipeline without an image model.

Owns the drawing. Its pictures cannot be mistaken for generated photos: they show a flat landscape, the mark "sketch"
with the seed, and the prompt. The file has a remark that says so too, if the picture is too small for a label.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

from builder import formats
from builder.models.images.backend import ImageBackendEntry
from builder.models.images.queue import Job, Made
from builder.models.pictures import encoded
from builder.view.lettering import Color, fit, font, line_px, readable, text_px

#: Smallest and largest letters of the caption, pixels.
TEXT_PX = (9, 44)
#: Pictures up to this many pixels are drawn twice as large and shrunk, which smooths the edges.
SMOOTH_PX = 2_000_000
#: Characters of a prompt that are looked at; a panel holds fewer.
MAX_CHARS = 4000


def draw(prompt: str, *, seed: int, width: int, height: int, quality: int, kind: str = formats.JPG) -> bytes:
    """Draws a picture for a prompt.

    Args:
        prompt: any text; what the font cannot draw is named, not drawn.
        seed: picks scene and colours, together with the prompt.
        width, height: pixels; below about 100 the label shrinks to the mark, below about 50 it goes.
        quality: of a JPEG, 1..95, or a WebP.
        kind: one of `formats.FORMATS`.

    Returns:
        A baseline JPEG, a PNG or a WebP, RGB. The same arguments and the same Pillow give the same bytes.
    """
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode("utf-8", "surrogatepass")).digest()
    image = _scene(random.Random(int.from_bytes(digest, "big")), width, height)
    _label(image, readable(prompt[:MAX_CHARS]), f"sketch · seed {seed}")
    return encoded(image, kind, quality, remark=f"sketch, not a generated photo; seed {seed}")


def _label(image: Image.Image, text: str, mark: str) -> None:
    """Draws the mark at the top left and the caption in a panel at the bottom, as far as there is room."""
    width, height = image.size
    pad = max(4, min(width, height) // 40)
    _mark(image, mark, pad)
    inner, most = width - 4 * pad, int(height * 0.42)
    if inner < 80 or most < 36 or not text:
        return
    largest = max(TEXT_PX[0] + 1, min(TEXT_PX[1], min(width, height) // 17))
    smallest = TEXT_PX[0] + 1 if largest > 14 else TEXT_PX[0]
    lines, size = fit(text, inner, most - 2 * pad, (smallest, largest))
    step = line_px(size)
    top = height - 3 * pad - step * len(lines)
    _panel(image, (pad, top, width - pad, height - pad), radius=pad + 2)
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((2 * pad, top + pad + i * step + step // 2), line, (250, 250, 247), font(size), anchor="lm")


def _mark(image: Image.Image, mark: str, pad: int) -> None:
    size = max(TEXT_PX[0], min(image.size) // 32)
    for words in (mark, mark.split(" ")[0]):
        wide = math.ceil(text_px(words, size))
        if wide + 4 * pad <= image.width and 3 * line_px(size) <= image.height:
            box = (pad, pad, 3 * pad + wide, pad + line_px(size) + pad)
            _panel(image, box, radius=(box[3] - box[1]) // 2)
            ImageDraw.Draw(image).text(
                (2 * pad, (box[1] + box[3]) // 2), words, (250, 250, 247), font(size), anchor="lm"
            )
            return


def _panel(image: Image.Image, box: tuple[int, int, int, int], radius: int) -> None:
    """Darkens a rectangle with round corners, so that white text on it can be read on any picture."""
    size = (box[2] - box[0] + 1, box[3] - box[1] + 1)
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius, fill=184)
    image.paste((18, 20, 30), (box[0], box[1], box[0] + size[0], box[1] + size[1]), mask)


# Pictures


@dataclass(frozen=True)
class _Palette:
    """Colours of one time of day; `near` is the ground at the viewer's feet, `low` the haze at the horizon."""

    top: Color
    low: Color
    light: Color
    near: Color
    night: bool = False


_PALETTES = (
    _Palette((58, 123, 200), (214, 234, 248), (255, 248, 214), (38, 92, 66)),  # noon
    _Palette((92, 170, 214), (253, 240, 213), (255, 231, 150), (61, 107, 45)),  # morning
    _Palette((71, 60, 139), (255, 175, 120), (255, 226, 160), (52, 34, 74)),  # sunset
    _Palette((44, 62, 105), (245, 150, 150), (255, 214, 190), (38, 42, 70)),  # dusk
    _Palette((13, 22, 51), (66, 86, 140), (244, 241, 222), (10, 20, 34), night=True),
    _Palette((20, 14, 44), (122, 72, 130), (255, 236, 214), (22, 14, 36), night=True),
    _Palette((120, 190, 190), (250, 244, 226), (255, 255, 240), (32, 84, 92)),  # teal
    _Palette((226, 148, 92), (255, 232, 196), (255, 250, 230), (120, 56, 44)),  # desert
    _Palette((158, 174, 196), (240, 238, 236), (255, 255, 255), (74, 84, 104)),  # fog
    _Palette((236, 140, 168), (255, 228, 214), (255, 252, 236), (94, 52, 98)),  # pink
)


def _scene(dice: random.Random, width: int, height: int) -> Image.Image:
    """Draws a landscape without words; only `dice.random` is used, which is the same in every Python."""
    zoom = 2 if width * height <= SMOOTH_PX else 1
    w, h = width * zoom, height * zoom
    palette = _PALETTES[int(dice.random() * len(_PALETTES))]
    image = _sky(palette, w, h)
    sun_x = _lights(image, dice, palette)
    pen = ImageDraw.Draw(image)
    _clouds(pen, dice, palette, w, h)
    kind = int(dice.random() * 4)
    if kind == 0:
        _sea(pen, dice, palette, w, h, sun_x)
    elif kind == 1:
        _city(pen, dice, palette, w, h)
    else:
        _hills(pen, dice, palette, w, h, mountains=kind == 2)
    _birds(pen, dice, palette, w, h)
    return image.reduce(zoom) if zoom > 1 else image


def _mix(a: Color, b: Color, share: float) -> Color:
    """Returns the colour that lies `share` of the way from a to b."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def _between(dice: random.Random, low: float, high: float) -> float:
    return low + (high - low) * dice.random()


def _sky(palette: _Palette, w: int, h: int) -> Image.Image:
    column = Image.new("RGB", (1, h))
    horizon = h * 0.62
    column.putdata([_mix(palette.top, palette.low, min(1.0, y / horizon) ** 1.2) for y in range(h)])
    return column.resize((w, h), Image.Resampling.NEAREST)


@lru_cache(maxsize=32)
def _glow(size: int) -> Image.Image:
    """Returns an L mask of size x size pixels, bright in the middle and 0 at the rim."""
    gradient = Image.radial_gradient("L").point([max(0, round((1 - v / 180) * 190)) for v in range(256)])
    return gradient.resize((size, size))


def _lights(image: Image.Image, dice: random.Random, palette: _Palette) -> float:
    """Draws the sun, or the moon and stars; returns its place, pixels from the left."""
    w, h = image.size
    pen = ImageDraw.Draw(image)
    for _ in range(70 if palette.night else 0):
        x, y, r = w * dice.random(), h * 0.6 * dice.random(), max(1.0, w * _between(dice, 0.001, 0.0028))
        pen.ellipse((x - r, y - r, x + r, y + r), _mix(palette.low, (255, 255, 255), _between(dice, 0.4, 1)))
    radius = min(w, h) * _between(dice, 0.055, 0.1)
    x, y = w * _between(dice, 0.2, 0.8), h * _between(dice, 0.16, 0.34)
    glow = _glow(max(2, round(radius * 6)))
    image.paste(palette.light, (round(x - glow.width / 2), round(y - glow.height / 2)), glow)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), palette.light)
    if palette.night:
        for dx, dy, share in ((-0.3, -0.2, 0.22), (0.25, 0.3, 0.16), (0.3, -0.35, 0.12)):
            cx, cy, r = x + dx * radius, y + dy * radius, share * radius
            pen.ellipse((cx - r, cy - r, cx + r, cy + r), _mix(palette.light, palette.low, 0.25))
    return x


def _clouds(pen: ImageDraw.ImageDraw, dice: random.Random, palette: _Palette, w: int, h: int) -> None:
    for _ in range(1 + int(dice.random() * 4)):
        x, y, size = w * dice.random(), h * _between(dice, 0.1, 0.42), min(w, h) * _between(dice, 0.03, 0.06)
        color = _mix(_mix(palette.top, palette.low, y / h / 0.62), palette.light, 0.22 if palette.night else 0.6)
        puffs = 3 + int(dice.random() * 3)
        for i in range(puffs):
            r = size * _between(dice, 0.6, 1.0) * (1.25 if 0 < i < puffs - 1 else 0.8)
            cx = x + (i - puffs / 2) * size * 1.1
            pen.ellipse((cx - r, y - r, cx + r, y + r * 0.55), color)
        pen.rounded_rectangle(
            (x - (puffs / 2 + 0.6) * size * 1.1, y, x + (puffs / 2 - 0.4) * size * 1.1, y + size * 0.56),
            size * 0.28,
            color,
        )


def _birds(pen: ImageDraw.ImageDraw, dice: random.Random, palette: _Palette, w: int, h: int) -> None:
    x, y, span = w * _between(dice, 0.15, 0.75), h * _between(dice, 0.2, 0.42), min(w, h) * 0.022
    color = _mix(palette.near, palette.top, 0.25)
    for _ in range(int(dice.random() * 5)):
        bx, by = x + span * _between(dice, -5, 5), y + span * _between(dice, -3, 3)
        stroke = max(1, round(span / 6))
        pen.arc((bx - span, by, bx, by + span), 190, 340, color, stroke)
        pen.arc((bx, by, bx + span, by + span), 200, 350, color, stroke)


def _ridge(dice: random.Random, w: int, base: float, swing: float, *, jagged: bool) -> list[tuple[float, float]]:
    """Returns the outline of one range of hills, left to right, pixels."""
    if jagged:
        heights = [dice.random(), dice.random()]
        rough = 0.62
        while len(heights) < 49:
            middles = [(a + b) / 2 + (dice.random() - 0.5) * rough for a, b in itertools.pairwise(heights)]
            heights = [v for pair in zip(heights, middles, strict=False) for v in pair] + [heights[-1]]
            rough *= 0.52
        return [(w * i / (len(heights) - 1), base - swing * (v - 0.35)) for i, v in enumerate(heights)]
    waves = [(share, _between(dice, 1, 2.6) * k, math.tau * dice.random()) for share, k in ((0.7, 1), (0.3, 2.3))]
    return [
        (w * i / 48, base - swing * sum(s * math.sin(math.tau * f * i / 48 / 1.6 + p) for s, f, p in waves))
        for i in range(49)
    ]


def _hills(
    pen: ImageDraw.ImageDraw, dice: random.Random, palette: _Palette, w: int, h: int, *, mountains: bool
) -> None:
    layers = 4 + int(dice.random() * 2)
    haze = _mix(palette.low, palette.top, 0.3)
    for i in range(layers):
        depth = i / (layers - 1)
        jagged = mountains and i < 2
        swing = h * (0.24 if jagged else 0.05 + 0.02 * depth)
        line = _ridge(dice, w, h * (0.5 + 0.32 * depth), swing, jagged=jagged)
        color = _mix(haze, palette.near, 0.18 + 0.82 * depth)
        pen.polygon([(0, h), *line, (w, h)], color)
        if depth > 0.4:
            _trees(pen, dice, line, h * (0.022 + 0.05 * depth), _mix(color, palette.near, 0.55 if depth < 1 else 0))


def _trees(
    pen: ImageDraw.ImageDraw, dice: random.Random, line: list[tuple[float, float]], size: float, color: Color
) -> None:
    """Puts firs and round trees on a ridge; `size` is about their height, pixels."""
    firs = dice.random() < 0.6
    for x, y in line[1:-1]:
        if dice.random() > 0.34:
            continue
        x, tall = x + size * _between(dice, -0.4, 0.4), size * _between(dice, 0.7, 1.3)
        if firs:
            for low, high, wide in ((0.0, 0.55, 0.30), (0.3, 0.8, 0.23), (0.58, 1.0, 0.16)):
                pen.polygon(
                    [(x - tall * wide, y - tall * low), (x, y - tall * high), (x + tall * wide, y - tall * low)], color
                )
            pen.rectangle((x - tall * 0.04, y, x + tall * 0.04, y + tall * 0.2), color)
        else:
            pen.rectangle((x - tall * 0.05, y - tall * 0.5, x + tall * 0.05, y + tall * 0.2), color)
            pen.ellipse((x - tall * 0.3, y - tall, x + tall * 0.3, y - tall * 0.35), color)


def _sea(pen: ImageDraw.ImageDraw, dice: random.Random, palette: _Palette, w: int, h: int, sun_x: float) -> None:
    horizon = h * _between(dice, 0.5, 0.58)
    land = _ridge(dice, w, horizon, h * 0.05, jagged=True)
    pen.polygon(
        [(0, horizon), *((x, min(y, horizon)) for x, y in land), (w, horizon)], _mix(palette.low, palette.near, 0.4)
    )
    bands = 24
    deep = _mix(palette.top, palette.near, 0.45)
    for i in range(bands):
        y = horizon + (h - horizon) * i / bands
        pen.rectangle((0, y, w, h), _mix(_mix(palette.low, palette.top, 0.4), deep, i / bands))
    for i in range(40):
        depth = (i / 40) ** 1.3
        y, reach = horizon + (h - horizon) * depth, w * (0.015 + 0.05 * depth)
        x = sun_x + w * (0.03 + 0.12 * depth) * _between(dice, -1, 1)
        pen.line((x - reach, y, x + reach, y), _mix(palette.light, deep, 0.2 + 0.5 * depth), max(1, round(h * 0.004)))
    _boat(pen, dice, palette, w, h, horizon)


def _boat(pen: ImageDraw.ImageDraw, dice: random.Random, palette: _Palette, w: int, h: int, horizon: float) -> None:
    x, size = w * _between(dice, 0.2, 0.8), min(w, h) * _between(dice, 0.07, 0.12)
    y = horizon + h * 0.05
    hull, sail = _mix(palette.near, (90, 30, 20), 0.4), _mix(palette.light, (255, 255, 255), 0.4)
    pen.polygon(
        [
            (x - size, y - size * 0.1),
            (x + size, y - size * 0.1),
            (x + size * 0.6, y + size * 0.25),
            (x - size * 0.7, y + size * 0.25),
        ],
        hull,
    )
    pen.polygon(
        [(x - size * 0.05, y - size * 0.2), (x - size * 0.05, y - size * 1.7), (x - size * 0.85, y - size * 0.2)], sail
    )
    pen.polygon(
        [(x + size * 0.06, y - size * 0.2), (x + size * 0.06, y - size * 1.4), (x + size * 0.7, y - size * 0.2)], sail
    )


def _city(pen: ImageDraw.ImageDraw, dice: random.Random, palette: _Palette, w: int, h: int) -> None:
    haze = _mix(palette.low, palette.top, 0.35)
    for i in range(3):
        color = _mix(haze, palette.near, (0.25, 0.6, 1.0)[i])
        lit = _mix(color, palette.light, 0.75 if palette.night else 0.35)
        x = -w * 0.05 * dice.random()
        while x < w:
            wide = w * _between(dice, 0.05, 0.1) * (0.9 + 0.3 * i)
            top = h * (_between(dice, 0.3, 0.5) + 0.1 * i)
            pen.rectangle((x, top, x + wide, h), color)
            if dice.random() < 0.25:
                pen.polygon([(x, top), (x + wide / 2, top - wide * 0.7), (x + wide, top)], color)
            if i:
                _windows(pen, dice, (x, top, x + wide, h), lit)
            x += wide * _between(dice, 1.0, 1.25)


def _windows(
    pen: ImageDraw.ImageDraw, dice: random.Random, box: tuple[float, float, float, float], color: Color
) -> None:
    x0, top, x1, bottom = box
    columns = 3 + int(dice.random() * 2)
    step = (x1 - x0) / (columns + 0.5)
    y = top + step * 0.6
    while y + step < bottom:
        for column in range(columns):
            if dice.random() < 0.4:
                x = x0 + step * (column + 0.5)
                pen.rectangle((x, y, x + step * 0.5, y + step * 0.7), color)
        y += step * 1.3


# The back end `sketch`


class Sketches:
    """Draws each image alone, when it is asked for."""

    name = "sketch"
    steps: int | None = None
    guidance: float | None = None
    device_name: str | None = None

    def __init__(self, quality: int) -> None:
        self._quality = quality

    def add(self, jobs: list[Job]) -> list[Job]:
        """Does nothing ahead."""
        return jobs

    def answers(self, jobs: list[Job]) -> list[Made | Exception]:
        """Draws the images of jobs."""
        found: list[Made | Exception] = []
        for job in jobs:
            width, height = job.size
            data = draw(job.prompt, seed=job.seed, width=width, height=height, quality=self._quality, kind=job.kind)
            found.append(Made(data, None))
        return found

    def take_notes(self) -> list[dict[str, Any]]:
        """Has none."""
        return []

    def close(self) -> None:
        """Holds nothing."""


def _start(options: Any, sizes: Sequence[tuple[int, int]], device: str) -> Sketches:
    return Sketches(options.quality)


ENTRY = ImageBackendEntry(_start, lambda options: None)

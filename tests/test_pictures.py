"""Decoding: whatever the fast decoder takes, Pillow gives the same pixels, and whatever Pillow says is what is said."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import simplejpeg
import skimage.data
from PIL import Image

from builder.models import pictures
from builder.models.pictures import Pixels, decode

PHOTO = Image.fromarray(skimage.data.astronaut())


def encoded(size: tuple[int, int] = (64, 48), mode: str = "RGB", form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    PHOTO.resize(size).convert(mode).save(out, form, **options)
    return out.getvalue()


def by_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Pixels | str:
    """Pixels, or the message, without the fast decoder."""
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "_HAS_SIMPLEJPEG", False)
        return told(data)


def told(data: bytes) -> Pixels | str:
    try:
        return decode(data)
    except ValueError as error:
        return str(error)


def same(one: Pixels | str, other: Pixels | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    return one.shape == other.shape and bool((one == other).all())


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every picture that simplejpeg decoded."""
    done: list[int] = []
    real = simplejpeg.decode_jpeg

    def decoded(*args: Any, **options: Any) -> Any:
        pixels = real(*args, **options)
        done.append(len(done))
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    return done


@pytest.mark.parametrize("size", [(64, 48), (37, 17), (8, 8), (7, 5), (1, 1), (2, 3), (16, 1), (511, 383)])
def test_a_jpeg_has_pillow_s_pixels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch, fast: list[int]) -> None:
    kinds: list[dict[str, Any]] = [
        {"subsampling": subsampling, "progressive": progressive, "quality": quality}
        for subsampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
        for progressive in (False, True)
        for quality in (30, 95)
    ]
    kinds += [{"mode": "L"}, {"mode": "L", "progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}]
    for kind in kinds:
        data = encoded(size, **kind)
        pixels = decode(data)
        assert pixels.dtype == np.uint8
        assert same(pixels, by_pillow(data, monkeypatch)), kind
    assert len(fast) == len(kinds)


@pytest.mark.parametrize(
    "data",
    [
        encoded(mode="CMYK"), encoded(keep_rgb=True), encoded(form="PNG"), encoded(form="PNG", mode="P"),
        encoded(form="WEBP"), encoded(form="MPO", save_all=True, append_images=[PHOTO]),
    ],
    ids=["cmyk", "rgb in a jpeg", "png", "palette", "webp", "mpo"],
)  # fmt: skip
def test_other_pictures_are_pillow_s(data: bytes, fast: list[int]) -> None:
    with Image.open(io.BytesIO(data)) as image:
        assert same(decode(data), np.asarray(image.convert("RGB")))
    assert fast == []


def test_damaged_jpegs_are_what_pillow_makes_of_them(monkeypatch: pytest.MonkeyPatch, fast: list[int]) -> None:
    """Bytes changed, cut off, taken out and put in: the same pixels or the same message."""
    dice = random.Random(0)
    whole = [encoded(progressive=progressive, quality=80) for progressive in (False, True)]
    refused = 0
    for _ in range(600):
        data = bytearray(dice.choice(whole))
        at = dice.randrange(len(data))
        match dice.randrange(4):
            case 0:
                data[at] = dice.randrange(256)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + dice.randrange(1, 20)]
            case _:
                data[at:at] = dice.randbytes(dice.randrange(1, 6))
        found = told(bytes(data))
        assert same(found, by_pillow(bytes(data), monkeypatch)), bytes(data)
        refused += isinstance(found, str)
    assert 100 < refused < 500
    assert len(fast) > 50


def test_a_cut_jpeg_is_refused_with_pillow_s_reason() -> None:
    data = encoded((512, 512))
    assert told(data[: len(data) // 2]).startswith("the picture does not decode: image file is truncated (")  # type: ignore[union-attr]


def test_a_picture_beyond_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch, fast: list[int]) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 48 - 1)
    assert told(encoded()) == "the picture has 64 x 48 pixels, the limit is 3071"
    assert fast == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
@pytest.mark.parametrize("size", [(64, 48), (1000, 3), (3, 1000), (1, 1)])
def test_pictures_are_converted_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, mode: str, size: tuple[int, int]
) -> None:
    data = encoded(size, mode, "TIFF" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(data)) as image:
        whole = np.asarray(image.convert("RGB"))
    rows: list[int] = []
    real = Image.Image.convert

    def convert(image: Image.Image, *args: Any, **options: Any) -> Image.Image:
        rows.append(image.height)
        return real(image, *args, **options)

    monkeypatch.setattr(Image.Image, "convert", convert)
    monkeypatch.setattr(pictures, "_CONVERTED", 320)
    found = decode(data)
    assert found.dtype == np.uint8 and same(found, whole)
    assert max(rows) == min(max(320 // size[0], 1), size[1])

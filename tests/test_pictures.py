"""Decoding: whatever the fast decoder takes, Pillow gives the same pixels, and whatever Pillow says is what is said.

A picture is seen as viewers show it: upright, transparent parts on white, 16 bits by their high 8.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
import skimage.data
from PIL import ExifTags, Image, ImageOps

from builder.models import pictures
from builder.models.pictures import Pixels, decode

PHOTO = Image.fromarray(skimage.data.astronaut())


def encoded(size: tuple[int, int] = (64, 48), mode: str = "RGB", form: str = "JPEG", **options: Any) -> bytes:
    return saved(PHOTO.resize(size).convert(mode), form, **options)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def by_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch, *most: int) -> Pixels | str:
    """Pixels, or the message, without the fast decoder."""
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "_HAS_SIMPLEJPEG", False)
        return told(data, *most)


def told(data: bytes, *most: int) -> Pixels | str:
    try:
        return decode(data, *most)
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
    whole = decode(data)
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


# --- as viewers show it ---

GREY = PHOTO.resize((64, 48)).convert("L")
#: The same picture with 16 bits a value: 257 times the value, or the value and then zeros, as cameras write it.
WIDE, SHIFTED = (np.asarray(GREY).astype(np.uint16) * times for times in (257, 256))


@pytest.mark.parametrize(
    "data",
    [
        *(saved(Image.fromarray(values), form) for values in (WIDE, SHIFTED) for form in ("PNG", "TIFF", "PPM")),
        saved(Image.fromarray(WIDE), "JPEG2000"),
        saved(Image.frombytes("I;16B", GREY.size, WIDE.astype(">u2").tobytes()), "TIFF"),
        saved(Image.fromarray(65535 - WIDE), "TIFF", tiffinfo={262: 0}),
    ],
    ids=["png", "tiff", "pgm", "png shifted", "tiff shifted", "pgm shifted", "jpeg 2000", "big endian", "0 is white"],
)
def test_grey_of_16_bits_is_the_picture_of_8_bits(data: bytes) -> None:
    """Pillow takes all above 255 of 65,535 for white."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode.startswith("I")
    assert same(decode(data), np.asarray(GREY.convert("RGB")))


def test_grey_of_12_bits_is_the_picture_of_8_bits() -> None:
    """TIFF packs two values of 12 bits into three bytes; Pillow gives them as they are, in a mode of 16 bits."""
    first, second = np.asarray(GREY).astype(np.uint16).reshape(-1, 2).T * 16
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    tags = {256: GREY.width, 257: GREY.height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: GREY.height}
    head = b"II*\0" + (8 + len(packed)).to_bytes(4, "little")
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags.items()
    )
    entries += (279).to_bytes(2, "little") + b"\4\0\1\0\0\0" + len(packed).to_bytes(4, "little")
    data = head + packed + (len(tags) + 1).to_bytes(2, "little") + entries + bytes(4)
    assert same(decode(data), np.asarray(GREY.convert("RGB")))


@pytest.mark.parametrize(
    ("array", "form", "kind"),
    [
        (WIDE.astype(np.int32), "TIFF", "whole numbers of 32 bits or with a sign"),
        (WIDE.astype(np.float32), "TIFF", "floating-point numbers"),
        (WIDE.astype(np.float32) / 65535, "PPM", "floating-point numbers"),
    ],
    ids=["I", "F", "pfm"],
)
def test_numbers_without_a_white_are_refused(array: np.ndarray, form: str, kind: str) -> None:
    """What is white in them is the writer's secret; that a picture is all white or all black would be believed."""
    assert told(saved(Image.fromarray(array), form)) == (
        f"the picture is of {kind}, of which nothing says which is white; store it with 8 or 16 bits"
    )


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_colours_of_16_bits_are_those_of_8_bits(form: str) -> None:
    import tifffile  # scikit-image brings it; Pillow writes no such pictures

    colours = np.asarray(PHOTO.resize((64, 48)))
    out = io.BytesIO()
    if form == "TIFF":
        tifffile.imwrite(out, colours.astype(np.uint16) * 257, photometric="rgb")
    else:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours.astype(np.uint16) * 257)
        out.write(png_of(64, 48, depth=16, kind=2, rows=rows))
    assert same(decode(out.getvalue()), colours)


def png_of(width: int, height: int, *, depth: int, kind: int, rows: bytes, more: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def half_clear(mode: str) -> Image.Image:
    """The photo, whose left half is clear and black below."""
    pixels = np.asarray(PHOTO.resize((64, 48)).convert("RGBA")).copy()
    pixels[:, :32] = 0
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGBA", "PNG", {}), ("LA", "PNG", {}), ("RGBA", "TIFF", {}), ("LA", "TIFF", {}), ("PA", "TIFF", {}),
        ("LA", "TIFF", {"tiffinfo": {338: 1}}), ("RGBA", "WEBP", {"lossless": True}), ("RGBA", "JPEG2000", {}),
        ("P", "PNG", {"transparency": 0}), ("P", "GIF", {"transparency": 0}), ("L", "PNG", {"transparency": 0}),
        ("RGB", "PNG", {"transparency": (0, 0, 0)}), ("1", "PNG", {"transparency": 0}),
        ("I;16", "PNG", {"transparency": 0}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_transparent_is_on_white(mode: str, form: str, options: dict[str, Any]) -> None:
    match mode:
        case "P":
            left = Image.new("P", (64, 48))
            left.putpalette([0, 0, 0, 200, 100, 50])
            left.paste(1, (32, 0, 64, 48))
        case "I;16":
            left = Image.fromarray(np.asarray(half_clear("L")).astype(np.uint16) * 257)
        case "PA":
            left = Image.new("PA", (64, 48))
            left.putpalette([0, 0, 0, 200, 100, 50])
            left.paste((1, 255), (32, 0, 64, 48))
        case _:
            left = half_clear(mode)
    data = saved(left, form, **options)
    pixels = decode(data)
    assert (pixels[:, :32] == 255).all()
    with Image.open(io.BytesIO(data)) as image:
        if mode != "I;16":
            colours = image.convert("LA") if image.mode == "La" else image
            shown = np.asarray(colours.convert("RGBA").convert("RGB"))[:, 32:]
            clear = np.asarray(colours.convert("RGBA"))[:, 32:, 3:] == 0
            assert same(pixels[:, 32:], np.where(clear, np.uint8(255), shown))
    assert mode == "1" or pixels[:, 32:].min() < 128  # of two values, the other one is white


TURNED = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", TURNED)
def test_a_picture_is_upright(form: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its EXIF orientation, whichever decoder gives its pixels; TIFF's and AVIF's of Pillow turn some themselves."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    more = {"save_all": True, "append_images": [PHOTO]} if form == "MPO" else {}
    data = encoded((61, 47), form=form, exif=exif, **more)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape == ((61, 47, 3) if orientation > 4 else (47, 61, 3))
    pixels = decode(data)
    assert same(pixels, upright)
    assert pixels.flags.c_contiguous
    assert same(by_pillow(data, monkeypatch), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 60, b"Exif\0\0no exif", b"Exif\0\0"])
def test_a_damaged_exif_block_turns_nothing(exif: bytes, fast: list[int]) -> None:
    assert same(decode(encoded(exif=exif)), decode(encoded()))
    assert len(fast) == 2


# --- large pictures ---


@pytest.mark.parametrize("size", [(64, 48), (65, 47), (511, 383), (90, 9), (900, 3)])
@pytest.mark.parametrize("most", [1, 20, 191, 3071, 3072])
def test_a_large_picture_is_halved_until_it_is_small_enough(
    size: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the transform of JPEG, with the same pixels by both decoders, and by the mean of the pixels elsewhere."""
    factor = 1
    while size[0] * size[1] > most * factor**2:
        factor *= 2
    shape = (-(-size[1] // factor), -(-size[0] // factor), 3)
    options: list[dict[str, Any]] = [{}, {"subsampling": "4:4:4"}, {"progressive": True}, {"mode": "L"}]
    for kind in [{"mode": "CMYK"}, *options]:
        data = encoded(size, **kind)
        pixels = decode(data, most)
        assert pixels.shape == shape
        assert same(pixels, by_pillow(data, monkeypatch, most)), kind
    monkeypatch.setattr(pictures, "_CONVERTED", 1000)
    for form, mode in (("PNG", "RGB"), ("PNG", "RGBA"), ("TIFF", "I;16"), ("WEBP", "RGB")):
        data = encoded(size, mode, form)
        whole = Image.fromarray(decode(data))
        assert same(decode(data, most), np.asarray(whole.reduce(factor))), (form, mode)


def test_a_large_jpeg_is_never_decoded_whole(fast: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    real = simplejpeg.decode_jpeg

    def decode_jpeg(data: bytes, colours: str, *, min_factor: float, **options: Any) -> Any:
        asked.append(min_factor)
        return real(data, colours, min_factor=min_factor, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    data = encoded((512, 384))
    sizes = [decode(data, most).shape[:2] for most in (512 * 384, 512 * 384 - 1, 12_288, 1000, 50)]
    assert sizes == [(384, 512), (192, 256), (96, 128), (24, 32), (6, 8)]
    assert asked == [1, 2, 4, 8, 8]


def test_a_large_picture_is_upright_too() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for form in ("JPEG", "PNG"):
        turned, plain = encoded((100, 60), form=form, exif=exif), encoded((100, 60), form=form)
        assert same(decode(turned, 2000), np.rot90(decode(plain, 2000), -1))

"""The sketch backend: labelled pictures of any prompt at any size, always the same bytes."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from builder.models.images.sketch import draw
from builder.view.contact_sheet import contact_sheet
from builder.view.lettering import fit, readable, text_px, wrap

PROMPT = "A photo of an astronaut in an orange suit, natural light"
ODD = {
    "empty": "",
    "spaces": " \n\t ",
    "control": "a\x00b\x07\x1b[31m\r\nc\x85\u2028d",
    "emoji": "😀👨‍👩‍👧❤️",
    "scripts": "женщина 一位宇航员 رائدة فضاء アストロ हिन्दी 한국어",
    "surrogate": "half \ud83d an emoji",
    "one long word": "x" * 5000,
    "many words": "word " * 3000,
}


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_a_picture_is_a_baseline_jpeg_of_the_size_that_says_what_it_is() -> None:
    image = opened(draw(PROMPT, seed=7, width=384, height=256, quality=90))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (384, 256))
    assert "progressive" not in image.info
    assert image.info["comment"] == b"sketch, not a generated photo; seed 7"


def test_same_arguments_give_the_same_bytes_and_each_argument_matters() -> None:
    first = draw(PROMPT, seed=7, width=128, height=128, quality=90)
    assert draw(PROMPT, seed=7, width=128, height=128, quality=90) == first
    assert draw(PROMPT, seed=8, width=128, height=128, quality=90) != first
    assert draw(PROMPT + "s", seed=7, width=128, height=128, quality=90) != first
    assert len(draw(PROMPT, seed=7, width=128, height=128, quality=30)) < len(first)


@pytest.mark.parametrize(
    "size", [(32, 32), (33, 47), (64, 64), (96, 96), (32, 400), (600, 32), (192, 64), (512, 368), (1500, 1400)]
)
def test_any_size_works(size: tuple[int, int]) -> None:
    assert opened(draw(PROMPT, seed=2**63 - 1, width=size[0], height=size[1], quality=75)).size == size


@pytest.mark.parametrize("name", ODD)
def test_any_prompt_works(name: str) -> None:
    assert opened(draw(ODD[name], seed=0, width=200, height=200, quality=75)).size == (200, 200)


def test_twenty_seeds_draw_every_kind_of_scene() -> None:
    pictures = {draw("", seed=seed, width=64, height=64, quality=75) for seed in range(20)}
    assert len(pictures) == 20


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("  two\n\tlines  ", "two lines"),
        ("Crème brûlée – „größe“ ½", "Creme brulee - “grosse“ 1⁄2"),
        ("A photo of Портрет женщины, natural light", "A photo of [Cyrillic, 14 letters], natural light"),
        ("宇航员", "[CJK, 3 letters]"),
        ("a cat 😀 here", "a cat here"),
        ("\x00\x07", ""),
    ],
)
def test_text_is_made_readable(text: str, shown: str) -> None:
    assert readable(text) == shown


def test_lines_are_no_wider_than_asked_and_hold_all_words() -> None:
    lines, whole = wrap(PROMPT, 14, 150, 10)
    assert whole
    assert " ".join(lines) == PROMPT
    assert max(text_px(line, 14) for line in lines) <= 150


def test_a_text_that_is_too_long_ends_in_an_ellipsis() -> None:
    lines, whole = wrap("word " * 100, 14, 150, 3)
    assert not whole
    assert len(lines) == 3
    assert [line.endswith("…") for line in lines] == [False, False, True]
    assert text_px(lines[-1], 14) <= 150


def test_short_texts_get_large_letters_and_a_box_without_room_none() -> None:
    assert fit("a cat", 300, 60, (9, 24)) == (["a cat"], 24)
    assert fit("word " * 60, 300, 60, (9, 24))[1] == 9
    assert fit("a cat", 300, 8, (9, 24)) == ([], 9)


def test_a_contact_sheet_takes_images_notes_and_any_caption() -> None:
    jpeg = draw(PROMPT, seed=1, width=100, height=50, quality=75)
    rgba = io.BytesIO()
    Image.new("RGBA", (10, 20), (255, 0, 0, 0)).save(rgba, "PNG")
    pairs = [(jpeg, rgba.getvalue(), "", "new " * 500), (b"", b"no image", "котик", "😀")]
    sheet = opened(contact_sheet(pairs))
    assert (sheet.format, sheet.mode, sheet.size) == ("PNG", "RGB", (1168, 428))
    assert contact_sheet(pairs) == contact_sheet(pairs)
    assert opened(contact_sheet(pairs, columns=1)).size == (592, 804)
    assert opened(contact_sheet([])).width > 0


def test_a_contact_sheet_puts_the_original_left_of_the_new_image() -> None:
    red, blue = (io.BytesIO(), io.BytesIO())
    Image.new("RGB", (8, 8), (200, 0, 0)).save(red, "PNG")
    Image.new("RGB", (8, 8), (0, 0, 200)).save(blue, "PNG")
    sheet = opened(contact_sheet([(red.getvalue(), blue.getvalue(), "", "")]))
    assert sheet.getpixel((100, 150)) == (200, 0, 0)
    assert sheet.getpixel((450, 150)) == (0, 0, 200)

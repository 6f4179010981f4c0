"""The template backend: what a caption loses, what it gains, and which captions it refuses."""

from __future__ import annotations

import pytest

from builder.errors import ConfigError
from builder.models.llm.template import DEFAULT_STYLE, MAX_CHARS, check_style, clean, rewrite

CLEANED = [
    ("A  man\n\tat work ", "A man at work"),
    ("Portrait of a smiling woman | Shutterstock", "Portrait of a smiling woman"),
    ("Dog on the beach - Getty Images", "Dog on the beach"),
    ("The old man and the sea - Amazon.com: Books", "The old man and the sea"),
    ("Camera on a tripod - Alamy Stock Photo", "Camera on a tripod"),
    ("Red shoes on eBay", "Red shoes"),
    ("Woman at Amazon river", "Woman at Amazon river"),
    ("Tech CEO at Facebook headquarters", "Tech CEO at Facebook headquarters"),
    ("Businessman with laptop stock photo", "Businessman with laptop"),
    ("Woman drinking coffee, royalty-free stock image 123456789", "Woman drinking coffee"),
    ("Stock Photo - 1234567 : cute kitten", "cute kitten"),
    ("Портрет женщины | Фото", "Портрет женщины"),
    ("Eileen Collins, NASA astronaut, 1999", "Eileen Collins, NASA astronaut, 1999"),
    ("Nike Air Max 97 - Ref AB12345", "Nike Air Max 97"),
    ("Old barn #48151623", "Old barn"),
    ("Actress at the Oscars (Photo by Bob/Getty Images)", "Actress at the Oscars"),
    ("A dog in the snow. Photo by Ann Lee", "A dog in the snow"),
    ("sunset_over-the-lake.JPG", "sunset over the lake"),
    ("20190807_121314 family", "family"),
    ("see www.foo.com/x?y=1 for red shoes", "see for red shoes"),
    ("kitten https://example.com/a/b.jpg", "kitten"),
    ("kitten bit.ly/3xyz in a basket", "kitten in a basket"),
    ("kitten ftp://a.example/b", "kitten"),
    ("#sunset #beach with my #1 dad", "sunset beach with my #1 dad"),
    ("“Hello” said the 'cat' and \"dog\", don't", "Hello said the cat and dog, don't"),
    ("O'Neill &amp; Sons &quot;pub&quot;", "O'Neill & Sons pub"),
    ("<b>Red</b> shoes<br/>size 42", "Red shoes size 42"),
    ("a cat 😀❤️👨‍👩‍👧 here\x00\x07", "a cat here"),
    ("5 °C – price $20, 50% off", "5 °C – price $20, 50% off"),
    ("Photo of a dog", "a dog"),
    ("a photo of a photo of a dog", "a dog"),
    ("Picture of the day: moon", "Picture of the day: moon"),
    ("宇航员的照片。「你好」", "宇航员的照片。你好"),
    ("خلبان فضایی می\u200cخواهد", "خلبان فضایی می\u200cخواهد"),
]
USELESS = [
    "",
    " \n\t ",
    "😀🚀✨",
    "12345",
    "IMG_1234.jpg",
    "DSC00042",
    "https://example.com/a.jpg",
    "untitled",
    "Photo",
    "stock photo",
    "Getty Images",
    "Alamy Stock Photo",
    '""',
    "| - |",
]


@pytest.mark.parametrize(("caption", "cleaned"), CLEANED)
def test_cleaning(caption: str, cleaned: str) -> None:
    assert clean(caption) == cleaned


@pytest.mark.parametrize("caption", [caption for caption, _ in CLEANED])
def test_cleaning_twice_changes_nothing(caption: str) -> None:
    once = clean(caption)
    assert clean(once) == once


@pytest.mark.parametrize("caption", USELESS)
def test_captions_without_words_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match=r"^caption has no words$"):
        rewrite(caption, style=DEFAULT_STYLE)


@pytest.mark.parametrize(
    ("caption", "style", "prompt"),
    [
        ("A dog on a beach", DEFAULT_STYLE, "A photo of a dog on a beach, natural light"),
        ("a photo of a dog", DEFAULT_STYLE, "A photo of a dog, natural light"),
        ("Eileen Collins", DEFAULT_STYLE, "A photo of Eileen Collins, natural light"),
        ("Portrait of a man", DEFAULT_STYLE, "A photo of portrait of a man, natural light"),
        ("A dog", "{caption}", "A dog"),
        ("A dog", "{caption}, oil on canvas", "A dog, oil on canvas"),
        ("A {dog} {0}", "{caption}", "A {dog} {0}"),
        ("A dog", "{{x}} of\n{caption}", "{x} of a dog"),
    ],
)
def test_rewriting(caption: str, style: str, prompt: str) -> None:
    assert rewrite(caption, style=style) == prompt


@pytest.mark.parametrize("caption", ["word " * 300, "x" * 5000, "字" * 500, "a, " * 400, "-" * 5000 + "dog"])
def test_long_captions_are_cut(caption: str) -> None:
    try:
        cleaned = clean(caption)
    except ValueError:
        assert caption.startswith("-" * 5000)
        return
    assert 200 < len(cleaned) <= MAX_CHARS
    assert clean(cleaned) == cleaned


def test_words_stay_whole_where_a_caption_is_cut() -> None:
    assert clean("word " * 300) == " ".join(["word"] * 60)


def test_a_style_without_caption_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        rewrite("a dog", style="A photo, natural light")
    assert str(caught.value) == (
        "style has no '{caption}'\n"
        "  style: 'A photo, natural light'\n"
        "  fix: put {caption} where the caption goes, for example: style = 'A photo of {caption}, natural light'"
    )


@pytest.mark.parametrize(
    ("style", "what"),
    [
        ("{caption} by {artist}", "style has a field '{artist}' other than '{caption}'"),
        ("{caption:>9}", "style has no '{caption}'"),
        ("{caption!r}", "style has no '{caption}'"),
        ("{{caption}}", "style has no '{caption}'"),
        ("{caption", "style is not a format text: expected '}' before end of string"),
    ],
)
def test_other_bad_styles_are_refused(style: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_style(style)
    assert caught.value.what == what
    assert caught.value.fix


def test_the_default_style_is_good() -> None:
    check_style(DEFAULT_STYLE)

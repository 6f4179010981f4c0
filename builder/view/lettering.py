"""Text on pictures: what Pillow's own font can draw of a text, and how it fits into a box.

Knows text and sizes in pixels; draws nothing itself.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from PIL import ImageFont

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: Characters other than ASCII that Pillow's copy of Aileron can draw.
_DRAWABLE = frozenset("©«°±´·»‘’“”…‹›⁄™")
#: Letters that do not fall apart into a base letter and an accent.
_PLAIN = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "ı": "i"}
    | {"–": "-", "—": "-", "‐": "-", "‑": "-", "−": "-", "„": "“", "‚": "‘", "×": "x", "•": "·", "→": ">"}
)


@lru_cache(maxsize=64)
def font(size: int) -> Font:
    """Returns Pillow's own font, with letters of `size` pixels."""
    return ImageFont.load_default(size)


def readable(text: str) -> str:
    """Makes one line of `text` that the font can draw.

    Accents go ("é" is drawn as "e"), white space and control characters become one space, signs that have no letter
    (emoji) go, and words in another script become their description: "[Cyrillic, 12 letters]".
    """
    out: list[str] = []
    hidden: list[str] = []  # letters of other scripts since the last drawable word
    for word in unicodedata.normalize("NFKC", text).translate(_PLAIN).split():
        drawn, other = _split_word(word)
        if hidden and drawn and not other:
            out.append(_described(hidden))
            hidden = []
        hidden.extend(other)
        if drawn and not other:
            out.append(drawn)
        elif other and drawn[-1:] in tuple(",.;:!?"):
            out.append(_described(hidden) + drawn[-1])
            hidden = []
    if hidden:
        out.append(_described(hidden))
    return " ".join(out)


def _split_word(word: str) -> tuple[str, list[str]]:
    """Returns the drawable part of a word, and its letters that cannot be drawn."""
    if word.isascii():
        return "".join(c for c in word if " " < c < "\x7f"), []
    bare = [c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c)]
    drawn = "".join(c for c in bare if " " < c < "\x7f" or c in _DRAWABLE)
    other = [c for c in unicodedata.normalize("NFKC", "".join(bare)) if _is_foreign(c)]
    return drawn, other


def _is_foreign(char: str) -> bool:
    return not char.isascii() and char not in _DRAWABLE and unicodedata.category(char)[0] == "L"


def _described(letters: list[str]) -> str:
    script = unicodedata.name(letters[0], "other").split()[0]
    script = script if script == "CJK" else script.capitalize()
    return f"[{script}, {len(letters)} letter{'s' if len(letters) > 1 else ''}]"


@lru_cache(maxsize=8192)
def _char_px(char: str, size: int) -> float:
    return font(size).getlength(char)


def text_px(text: str, size: int) -> float:
    """Returns the width of a line, pixels; without kerning, so the drawn line may be a little narrower."""
    return sum(_char_px(char, size) for char in text)


def wrap(text: str, size: int, width: int, max_lines: int) -> tuple[list[str], bool]:
    """Breaks text into lines of at most `width` pixels, words wider than that between letters.

    Returns:
        At most `max_lines` lines, and whether all of the text is in them. A text that is cut ends in an ellipsis.
    """
    lines, line, used = [""], "", 0.0
    space = _char_px(" ", size)
    for word in _pieces(text, size, width):
        wide = text_px(word, size)
        if line and used + space + wide > width:
            if len(lines) == max_lines:
                return [*lines[:-1], _with_ellipsis(line, size, width)], False
            lines.append("")
            line, used = word, wide
        else:
            line, used = (f"{line} {word}", used + space + wide) if line else (word, wide)
        lines[-1] = line
    return lines, True


def _pieces(text: str, size: int, width: int) -> Iterator[str]:
    """Yields the words of a text, those wider than a line cut into parts that fit."""
    for word in text.split(" "):
        part, used = "", 0.0
        for char in word:
            wide = _char_px(char, size)
            if part and used + wide > width:
                yield part
                part, used = "", 0.0
            part, used = part + char, used + wide
        yield part


def _with_ellipsis(line: str, size: int, width: int) -> str:
    while line and text_px(line + "…", size) > width:
        line = line[:-1]
    return line.rstrip(" ,.;:-") + "…"


def line_px(size: int) -> int:
    """Returns the distance of two lines of text, pixels."""
    return math.ceil(size * 1.25)


def fit(text: str, width: int, height: int, sizes: tuple[int, int]) -> tuple[list[str], int]:
    """Finds the largest letters with which a text fits a box; else the smallest ones and an ellipsis.

    Args:
        text: as `readable` returns it.
        width, height: of the box, pixels.
        sizes: smallest and largest letters, pixels.

    Returns:
        The lines (none if the box has no room for one), and the size.
    """
    smallest, largest = sizes
    size = largest
    while size >= smallest:
        lines, whole = wrap(text, size, width, max(1, height // line_px(size)))
        if whole and len(lines) * line_px(size) <= height:
            return lines, size
        size -= max(1, size // 10)
    room = height // line_px(smallest)
    return (wrap(text, smallest, width, room)[0] if room else []), smallest

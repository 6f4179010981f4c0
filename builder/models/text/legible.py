"""What every prompt and caption must be, whoever wrote it: free of invisible characters and of addresses.

Owns which characters are removed, which are refused, and what counts as an address. Knows only strings.
"""

from __future__ import annotations

import re
import unicodedata

#: Most combining marks on one letter: Vietnamese, Tibetan and Hebrew with accents have fewer. Marks that take their own
#: place next to the letter do not count: Burmese has five on a letter, two of them piled on it.
MAX_MARKS = 4

#: Invisible characters that no script needs: byte order mark, zero-width space, soft hyphen, word joiner,
#: invisible operators, marks of direction, of interlinear notes and of shorthand, fillers, inherent vowels.
_TAKEN_OUT = frozenset(
    "\ufeff\u200b\u00ad\u034f\u061c\u180e\u200e\u200f\ufff9\ufffa\ufffb\u115f\u1160\u3164\uffa0\u17b4\u17b5"
    + "".join(map(chr, (*range(0x2060, 0x2065), *range(0x1BCA0, 0x1BCA4))))
)
#: Visible format characters: signs before or around numbers and hieroglyphs.
_SEEN = frozenset(
    "\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
    + "".join(map(chr, (*range(0x0600, 0x0606), *range(0x13430, 0x13440))))
)
_NON_JOINER, _JOINER = "\u200c", "\u200d"
#: Blocks whose letters change their form next to a joiner: Arabic to Mandaic, the Indic ones, Tibetan, Burmese, Khmer,
#: Mongolian to Vedic, their extensions, presentation forms, and the same beyond the first plane.
_JOINING = (
    (0x0600, 0x08FF), (0x0900, 0x0DFF), (0x0F00, 0x109F), (0x1780, 0x18AF), (0x1900, 0x1CFF), (0xA800, 0xABFF),
    (0xFB50, 0xFDFF), (0xFE70, 0xFEFC), (0x10A00, 0x10AFF), (0x10D00, 0x10FFF), (0x11000, 0x11FFF), (0x1E900, 0x1E95F),
)  # fmt: skip
#: Selectors of Mongolian letters' forms.
_MONGOLIAN = frozenset("\u180b\u180c\u180d\u180f")
_SKIN = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
#: Flags of parts of countries: a black flag, letters and digits as tags, the end tag. Source: Unicode, UTS 51, ED-14a.
_FLAG = re.compile("\U0001f3f4[\U000e0061-\U000e007a]{2}[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,3}\U000e007f")
_TAGS = frozenset(map(chr, range(0xE0000, 0xE0080)))

#: Blank, but not a space by its category: an empty cell of Braille.
_BLANK = "\u2800"
#: Ranges in which characters that this Python does not know yet are emoji or Han. Source: Unicode, emoji-data.txt
#: (Extended_Pictographic) and PropList.txt: planes 2 and 3 but for their last two.
_RESERVED = ((0x1F000, 0x1FAFF), (0x1FC00, 0x1FFFD), (0x20000, 0x2FFFD), (0x30000, 0x3FFFD))

#: Placeholders for an object that is not text, and for bytes that did not decode.
_REPLACEMENTS = "\ufffc\ufffd"
#: Characters without a name, by their category.
_UNNAMED = {"Cc": "a control character", "Co": "a character of private use", "Cs": "half a character"}

_TOP = "com|net|org|info|io|co\\.uk|de|fr|it|es|ru|jp|cn|br"
#: "https://x.org/y", "www.x.org", "mailto:a@x.org", "x.com/y".
_ADDRESS = re.compile(
    r"\b(?:[a-z][a-z0-9+.-]{1,20}://|mailto:)\S*|\bwww\d?\.[\w-]+\.\S+"
    rf"|\b(?:[a-z0-9-]+\.)+(?:{_TOP}|co|me|tv|to|cc|gg|ly|be|at|ch|dk|no|se|uk|us|ca|au|in|nl|pl|eu|edu|gov"
    r"|app|dev|shop|store|site|online|page|link|blog|xyz|ai|gl)/\S+",
    re.I,
)
#: "a@x.org", "x.com", "x.com/y".
DOMAIN = rf"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b|\b(?:[a-z0-9-]+\.)+(?:{_TOP})\b(?:/\S*)?"
_DOMAIN = re.compile(DOMAIN, re.I)


def visible(text: str) -> str:
    """A text without its invisible characters; joiners and selectors that scripts and emoji need are kept.

    Characters that are refused are kept: see `hidden_in`.
    """
    if text.isascii():
        return text
    kept: list[str] = []
    text = text.replace(_BLANK, " ")
    for i, char in enumerate(text):
        if char in _TAKEN_OUT:
            continue
        before = kept[-1] if kept else ""
        if char in (_NON_JOINER, _JOINER) and not _joins(char, kept, text[i + 1 : i + 2]):
            continue
        if _is_selector(char) and not _is_selected(char, before):
            continue
        kept.append(char)
    return "".join(kept)


def _joins(char: str, kept: list[str], after: str) -> bool:
    """Whether a joiner has something to join: a letter of a script that has joiners before it, or emoji around it."""
    before = next((one for one in reversed(kept[-3:]) if not _is_selector(one) and one not in _SKIN), "")
    if char == _JOINER and _is_pictured(before) and _is_pictured(after):
        return True
    return bool(kept) and _is_joining(kept[-1]) and (char == _JOINER or _is_joining(after))


def _is_joining(char: str) -> bool:
    place = ord(char) if char else 0
    is_letter = bool(char) and unicodedata.category(char)[0] in "LM" and not _is_selector(char)
    return is_letter and any(first <= place <= last for first, last in _JOINING)


def _is_pictured(char: str) -> bool:
    """Whether a character may be part of an emoji: a symbol, such as an arrow or a sign of Mars."""
    if not char or char < "\u2190":
        return False
    return unicodedata.category(char) in ("So", "Sm", "Sk") or (_is_reserved(char) and char < "\U00020000")


def _is_reserved(char: str) -> bool:
    """Whether a character that this Python does not know may be a newer emoji or Han letter."""
    return unicodedata.category(char) == "Cn" and any(first <= ord(char) <= last for first, last in _RESERVED)


def _is_selector(char: str) -> bool:
    """Whether a character selects a form of the one before it."""
    return "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef" or char in _MONGOLIAN


def _is_selected(selector: str, base: str) -> bool:
    """Whether a selector can choose a form of a character: emoji and digits, signs, Han, Mongolian."""
    if not base or base.isspace() or _is_selector(base) or (selector >= "\ufe0e" and _is_mark(base)):
        return False
    if selector in _MONGOLIAN:
        return "\u1800" <= base <= "\u18af"
    if selector > "\uffff":
        return base >= "\u3400" and base.isalpha()
    if selector >= "\ufe0e":
        return not base.isalpha()
    return base >= "\u1000" or unicodedata.category(base) == "Sm"


def hidden_in(text: str) -> str:
    """The first hidden character of a text that `visible` returned, in words; empty if there is none.

    These are characters that cannot be printed, that turn the direction of others around (overrides, embeddings,
    isolates), that hide letters (tags, except those of flags), and more than `MAX_MARKS` marks on a letter.
    """
    for char in _FLAG.sub("", text):
        if _is_hidden(char):
            return f"U+{ord(char):04X} ({_what(char)})"
    marks, letter = 0, ""
    for char in () if text.isascii() else unicodedata.normalize("NFD", text):
        if _is_letter(char):
            marks, letter = 0, char
        elif _is_mark(char) and (marks := marks + 1) > MAX_MARKS:
            return f'more than {MAX_MARKS} marks on "{letter}"'
    return ""


def _what(hidden: str) -> str:
    if hidden in _TAGS:
        return "a tag"
    unnamed = _UNNAMED.get(unicodedata.category(hidden), "no character")
    return unicodedata.name(hidden, unnamed).lower()


def legible(text: str) -> str:
    """A text without what `visible` removes and `hidden_in` refuses: for texts that cannot be asked for again."""
    if text.isascii() and text.isprintable():
        return text
    kept: list[str] = []
    marks, end = 0, 0
    text = visible(text)
    for i, char in enumerate(text):
        if flag := _FLAG.match(text, i):
            end = flag.end()
        if i < end:
            kept.append(char)
            continue
        own = sum(map(_is_mark, unicodedata.normalize("NFD", char)))
        marks = own if _is_letter(char) else marks + own
        if char.isspace():
            kept.append(" ")
        elif not _is_hidden(char) and not (_is_mark(char) and marks > MAX_MARKS):
            kept.append(char)
    return "".join(kept)


def _is_hidden(char: str) -> bool:
    kind = unicodedata.category(char)
    is_format = kind == "Cf" and char not in _SEEN and char not in (_NON_JOINER, _JOINER)
    is_unknown = kind == "Cn" and not _is_reserved(char)
    return char in _REPLACEMENTS or kind in ("Cc", "Cs", "Co") or is_unknown or is_format


def _is_letter(char: str) -> bool:
    """Whether the count of marks starts again at a character: it is neither a mark nor a joiner between marks."""
    return unicodedata.category(char)[0] != "M" and char not in (_NON_JOINER, _JOINER)


def _is_mark(char: str) -> bool:
    """Whether a character is piled on the one before it."""
    return unicodedata.category(char) in ("Mn", "Me") and not _is_selector(char)


def address_in(text: str, given: str = "") -> str:
    """The first web or mail address in a text; empty if there is none.

    Args:
        given: a text whose names of sites, such as "Amazon.com", are allowed.
    """
    plain = unicodedata.normalize("NFKC", text)
    if found := _ADDRESS.search(plain):
        return found[0]
    allowed = unicodedata.normalize("NFKC", given).casefold()
    names = (found[0] for found in _DOMAIN.finditer(plain))
    return next((name for name in names if name.casefold() not in allowed), "")

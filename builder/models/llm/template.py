"""Turns a web caption into a text-to-image prompt by fixed rules, for trying a pipeline without an LLM.

Owns the rules. It cleans and frames; it does not understand, translate or add anything about the picture. For prompts
that matter use an LLM.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from typing import Any

from builder.errors import ConfigError, RowError
from builder.models.llm.backend import RewriteEntry
from builder.models.text.legible import DOMAIN, address_in, legible

#: The style where the pipeline names none.
DEFAULT_STYLE = "A photo of {caption}, natural light"

#: Characters of a cleaned caption, before the style; image models read about 77 tokens.
MAX_CHARS = 300

_SPACE = re.compile(r"\s+")
_TAG = re.compile(r"</?[a-z][^<>]{0,200}>", re.I)
_URL = re.compile(rf"\(?\b(?:https?://|www\.)\S+|{DOMAIN}", re.I)
_FILE = re.compile(r"(\S+)\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|psd|eps)\b", re.I)
#: Names that cameras and phones give: IMG_1234, DSC00042, P1010023, 20190807_121314.
_CAMERA = re.compile(
    r"\b(?:(?:IMG|DSCF?|DSCN|PXL|MVIMG|VID|P|WP|Screenshot)[ _-]?\d{3,}\w*|\d{6,8}[_-]\d{4,}\w*)\b", re.I
)
_HASHTAG = re.compile(r"(?<!\w)#(?=[^\W\d_])")
_QUOTES = re.compile(r"""["“”„‟«»‹›「」『』《》〝〞＂]|(?<!\w)['‘’‚]|['‘’](?!\w)""")
_SITES = (
    "shutterstock|istock(?:photo)?|getty ?images?|adobe ?stock|alamy|dreamstime|depositphotos|123rf|bigstock(?:photo)?|"
    "fotolia|freepik|vecteezy|unsplash|pexels|pixabay|flickr|pinterest|instagram|facebook|twitter|tumblr|reddit|youtube|"
    "wikipedia|wikimedia commons|ebay|amazon|etsy|aliexpress|walmart|redbubble|zazzle|society6|deviantart|imgur|giphy|"
    "can stock photo|stock ?photo|picclick|wayfair"
)
#: " | Shutterstock", " - Getty Images / J. Doe", and " on eBay" where nothing follows.
_SITE_TAIL = re.compile(
    rf"\s*(?:\||[–—:/·»]|\s-)\s*(?:{_SITES})(?:\.\w+)?(?:\W.{{0,40}})?$"
    rf"|\s+(?:on|at|from|by|via)\s+(?:{_SITES})(?:\.\w+)?\W*$",
    re.I,
)
_SITE_ONLY = re.compile(rf"^(?:(?:{_SITES})\W*)+$", re.I)
#: "Photo by Ann Lee/Getty Images", "(Image: AP)", "© 2015 Ann Lee": who made it.
_CREDIT = re.compile(
    r"[(\[]\s*(?:photo(?:graph)?s?|images?|pic(?:ture)?s?|credits?|courtesy|source|©|\(c\))[\s:]*"
    r"(?:by|credit|courtesy|of|from|:|©)?[^)\]]{0,80}[)\]]"
    r"|\s*(?:\b(?:photo(?:graph)?|image|picture) (?:by|credit|courtesy of)\b|©|\(c\)\s).{0,80}$",
    re.I,
)
_STOCK = re.compile(
    r"[\s,;:|–—-]*\b(?:royalty[ -]free|editorial|premium|free)?\s*\b"
    r"(?:stock\s+(?:photo(?:graph|graphy)?s?|images?|pictures?|vectors?|illustrations?|footage)"
    r"|royalty[ -]free\s+(?:photos?|images?|pictures?|vectors?)|free (?:photo|image) download)(?:\s+of\b)?",
    re.I,
)
#: A part after " | " of at most four words, with something before it: nearly always a site or a rubric.
_PIPE_TAIL = re.compile(r"(?<=\w)\W*\s[|｜]\s*[^\s|]*(?:\s+[^\s|]+){0,3}\s*$")
#: "#123456", "ID: 1234567", "- 48151623", "ref AB12345": at least five digits, so that years stay.
_ID_TAIL = re.compile(
    r"[\s,;:|(\[–—-]*(?:\b(?:image|photo|stock|item|product|sku|ref|id|no|nr)\b[\s.:#-]*)*#?\b[A-Z]{0,4}[-_]?\d{5,}[A-Z]?\b[\s)\].]*$",
    re.I,
)
_ID_HEAD = re.compile(r"^#?[A-Z]{0,4}\d{5,}\b[\s:|–—-]*", re.I)
_PHOTO_OF = re.compile(
    r"^(?:(?:(?:this|here) is )?(?:an? |the )?(?:[a-z]+ )?(?:photo(?:graph)?|picture|image|pic|snapshot|shot)s? "
    r"(?:of|showing|depicting)\s+(?=\w)(?!the day))+",
    re.I,
)
_EMPTY_PARENS = re.compile(r"\(\W*\)|\[\W*\]")
_EDGES = " \t,;:.|/\\_–—-=~*+<>·•…、。，；：&@#"
#: First words that are not names: lower case within a sentence.
_OPENING = re.compile(
    r"^(?:An?|The|Some|One|Two|Three|Four|Five|His|Her|My|Our|Their|This|Old|Young|Beautiful|Happy|Smiling|Portrait|View|"
    r"Close[ -]?up|Man|Men|Woman|Women|Boys?|Girls?|Child|Children|People|Person|Group|Couple)(?=[ -])"
)
#: What is left of captions without content.
_USELESS = re.compile(
    r"^(?:untitled|no title|unnamed|image|img|(?:photo|photograph|picture|pic)(?: of)?|thumbnail|placeholder|logo|icon|"
    r"avatar|file|default|null|none|nan|n/?a|jpe?g|png)?[\s\d]*$",
    re.I,
)


def rewrite(caption: str, *, style: str = DEFAULT_STYLE) -> str:
    """Cleans a caption and puts it into a style.

    Args:
        caption: as found on the web.
        style: format text with `{caption}` in it.

    Returns:
        One line; the same for the same arguments.

    Raises:
        RowError: the caption has no words once it is clean.
        ConfigError: the style has no `{caption}`, or other fields.
    """
    check_style(style)
    text = clean(caption)
    if not style.startswith("{caption}"):
        text = _OPENING.sub(lambda match: match[0].lower(), text)
    return _SPACE.sub(" ", style.format(caption=text)).strip()


def check_style(style: str) -> None:
    """Refuses a style that is not a format text with the field `{caption}` alone.

    Raises:
        ConfigError: it is not.
    """
    fix = f"put {{caption}} where the caption goes, for example: style = '{DEFAULT_STYLE}'"
    try:
        fields = [(name, spec, cast) for _, name, spec, cast in string.Formatter().parse(style) if name is not None]
    except ValueError as error:
        raise ConfigError(f"style is not a format text: {error}", where={"style": repr(style)}, fix=fix) from error
    if ("caption", "", None) not in fields:
        raise ConfigError("style has no '{caption}'", where={"style": repr(style)}, fix=fix)
    others = [name for name, spec, cast in fields if (name, spec, cast) != ("caption", "", None)]
    if others:
        raise ConfigError(
            f"style has a field '{{{others[0]}}}' other than '{{caption}}'", where={"style": repr(style)}, fix=fix
        )


def clean(caption: str) -> str:
    """Removes what is not about the picture from a caption.

    Returns:
        One line of at most MAX_CHARS characters. Cleaning it again changes nothing.

    Raises:
        RowError: nothing is left.
    """
    text, before = _plain(caption[: 4 * MAX_CHARS]), ""
    for _ in range(50):  # a rule may uncover work for another; real captions settle after two or three rounds
        if text == before:
            break
        before = text
        text = _cut(_strip(_plain(text)))
    if _USELESS.match(text) or _SITE_ONLY.match(text) or not any(unicodedata.category(char)[0] == "L" for char in text):
        raise RowError("no_text", "caption has no words")
    return text


def _plain(text: str) -> str:
    """Undoes HTML; makes control characters, emoji and runs of white space one space."""
    text = _TAG.sub(" ", html.unescape(text))
    text = "".join(_plain_char(char) for char in legible(unicodedata.normalize("NFC", text)))
    return _SPACE.sub(" ", legible(text)).strip()  # a joiner may have lost what it joined


def _plain_char(char: str) -> str:
    if char < "\x7f":
        return char if char >= " " else " "
    kind = unicodedata.category(char)
    if char in "°©®™" or kind[0] in "LNP" or kind in ("Zs", "Sc"):
        return "" if char in "®™" else char
    if kind in ("Mn", "Mc"):
        return "" if "\ufe0e" <= char <= "\ufe0f" else char
    if kind == "Sm":
        return char if char < "\u2190" else " "
    return char if kind == "Cf" else " "


def _strip(text: str) -> str:
    """Applies every rule once."""
    text = _SITE_TAIL.sub("", _CREDIT.sub(" ", text))
    text = _URL.sub(" ", text)
    while address := address_in(text):
        text = unicodedata.normalize("NFKC", text).replace(address, " ")
    text = _FILE.sub(lambda match: match[1].rsplit("/", 1)[-1].replace("_", " ").replace("-", " "), text)
    text = _CAMERA.sub(" ", text)
    text = _HASHTAG.sub("", text)
    text = _QUOTES.sub("", text)
    text = _STOCK.sub(" ", text)
    text = _PIPE_TAIL.sub("", text)
    text = _ID_HEAD.sub("", _ID_TAIL.sub("", text))
    text = _EMPTY_PARENS.sub(" ", text)
    text = _SPACE.sub(" ", text).strip(_EDGES)
    return _PHOTO_OF.sub("", text)


def _cut(text: str) -> str:
    """Shortens to MAX_CHARS, at the end of a word where there is one in the last third."""
    if len(text) <= MAX_CHARS:
        return text
    head = text[: MAX_CHARS + 1]
    space = head.rfind(" ")
    head = head[:space] if space > MAX_CHARS * 2 // 3 else head[:MAX_CHARS]
    return head.rstrip(_EDGES)


def _rewrite(options: Any, caption: str) -> str:
    return rewrite(caption, style=options.style)


ENTRY = RewriteEntry(_rewrite, reads=("style",))

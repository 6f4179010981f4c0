"""Draws a sheet that shows originals next to the images that replaced them, with both captions.

Owns the layout of that one picture; takes bytes and texts, and knows nothing about shards and tables.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

from builder.models.pictures import decode
from builder.view.lettering import Color, fit, font, line_px, readable, text_px

#: What one image is fitted into, pixels.
TILE_PX = 256
#: Height of the captions below an image, pixels.
TEXT_HEIGHT_PX = 72
#: Smallest and largest letters of a caption, pixels.
CAPTION_PX = (11, 15)
GAP_PX = 16
HEADER_PX = 44
TITLE = "original -> hybrid"

_PAPER: Color = (246, 245, 241)
_CARD: Color = (255, 255, 255)
_RIM: Color = (222, 220, 212)
_EMPTY: Color = (236, 234, 228)
_INK: Color = (34, 36, 42)
_FAINT: Color = (120, 120, 124)
_ACCENT: Color = (196, 78, 44)


def contact_sheet(pairs: Sequence[tuple[bytes, bytes, str, str]], *, columns: int = 2) -> bytes:
    """Draws pairs of images side by side, captions below.

    Args:
        pairs: original image, new image, original caption, new caption; bytes that do not decode show as a note.
        columns: pairs in a row; at least 1.

    Returns:
        A PNG, RGB; the same pairs and the same Pillow give the same bytes.
    """
    columns = max(1, min(columns, len(pairs)))
    rows = -(-len(pairs) // columns)
    card = (2 * TILE_PX + 3 * GAP_PX, TILE_PX + TEXT_HEIGHT_PX + 2 * GAP_PX)
    size = (columns * (card[0] + GAP_PX) + GAP_PX, HEADER_PX + rows * (card[1] + GAP_PX) + GAP_PX // 2)
    sheet = Image.new("RGB", size, _PAPER)
    _header(sheet, len(pairs))
    for i, pair in enumerate(pairs):
        x = GAP_PX + i % columns * (card[0] + GAP_PX)
        y = HEADER_PX + i // columns * (card[1] + GAP_PX)
        ImageDraw.Draw(sheet).rounded_rectangle((x, y, x + card[0], y + card[1]), 8, _CARD, _RIM)
        _pair(sheet, pair, x + GAP_PX, y + GAP_PX)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _header(sheet: Image.Image, count: int) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP_PX, HEADER_PX // 2), TITLE, _INK, font(20), anchor="lm")
    words = f"{count} sample{'' if count == 1 else 's'}"
    if sheet.width > text_px(TITLE, 20) + text_px(words, 14) + 3 * GAP_PX:
        pen.text((sheet.width - GAP_PX, HEADER_PX // 2), words, _FAINT, font(14), anchor="rm")


def _pair(sheet: Image.Image, pair: tuple[bytes, bytes, str, str], x: int, y: int) -> None:
    """Draws one pair with its top left corner at x, y, pixels."""
    other = x + TILE_PX + GAP_PX
    _image(sheet, pair[0], x, y)
    _image(sheet, pair[1], other, y)
    _arrow(ImageDraw.Draw(sheet), x + TILE_PX + GAP_PX // 2, y + TILE_PX // 2)
    _caption(sheet, pair[2], x, y + TILE_PX, _FAINT)
    _caption(sheet, pair[3], other, y + TILE_PX, _INK)


def _image(sheet: Image.Image, data: bytes, x: int, y: int) -> None:
    box = (x, y, x + TILE_PX - 1, y + TILE_PX - 1)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle(box, _EMPTY)
    try:
        image = Image.fromarray(decode(data, (2 * TILE_PX) ** 2))
    except ValueError:
        pen.text((x + TILE_PX // 2, y + TILE_PX // 2), "no image", _FAINT, font(14), anchor="mm")
        return
    scale = TILE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(image, (x + (TILE_PX - size[0]) // 2, y + (TILE_PX - size[1]) // 2))


def _arrow(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """Draws the sign between two images, centred at x, y; it reaches over both."""
    pen.ellipse((x - 14, y - 14, x + 14, y + 14), _ACCENT, _CARD, 2)
    pen.line((x - 6, y, x + 5, y), _CARD, 2)
    pen.polygon([(x + 1, y - 5), (x + 7, y), (x + 1, y + 5)], _CARD)


def _caption(sheet: Image.Image, caption: str, x: int, y: int, color: Color) -> None:
    """Writes a caption into the space below an image, which begins at y."""
    text = readable(caption[:2000]) or "(no caption)"
    lines, size = fit(text, TILE_PX, TEXT_HEIGHT_PX, CAPTION_PX)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        pen.text((x, y + 10 + i * line_px(size)), line, color, font(size))

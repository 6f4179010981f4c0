"""Decoding pictures. Pillow is the truth of what decodes."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

#: Pictures with more pixels are refused before they are decoded: a decompression bomb of a few KB fills the memory.
MAX_PIXELS = 100_000_000


def decode(data: bytes) -> np.ndarray:
    """Decodes a picture to uint8 (height, width, 3) RGB, its first frame, as stored (no EXIF rotation).

    Raises:
        ValueError: no picture that Pillow knows, damaged, cut short, or more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(
                        f"the picture has {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}"
                    )
                return np.asarray(image.convert("RGB"))
    except ValueError:
        raise
    except UnidentifiedImageError:  # its own text holds an address in memory, which differs in every run
        raise ValueError("the picture does not decode: no image format begins so") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, EOFError, IndexError, TypeError) as error:
        raise ValueError(f"the picture does not decode: {error}") from error

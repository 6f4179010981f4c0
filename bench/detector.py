"""Counts faces in photos and compares with counts made by eye.

    python bench/detector.py --truth faces_truth.tsv --photos DIR

The truth is a TSV with the header file, faces, clear (further columns are not read; lines that begin with # are
comments); files are relative to --photos. Photos go the way of a shard's images: longest side at most --side px,
JPEG, decoded by Pillow. One line per photo with another count than the truth, then in how many of those with faces one
is found and in how many of the others none, and the exact counts of the clear ones.
"""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from builder.models.faces.mtcnn import Mtcnn
from builder.models.pictures import Pixels


@dataclass(frozen=True)
class Photo:
    """A row of the truth: path relative to the photos' folder, faces counted by eye, whether every eye agrees."""

    file: str
    faces: int
    clear: bool


def read_truth(path: Path) -> list[Photo]:
    """The rows of the TSV; the order of its columns is free."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    header, *rows = [line.split("\t") for line in lines] or [[]]
    if missing := {"file", "faces", "clear"} - set(header):
        raise SystemExit(f"'{path}' has no column {', '.join(sorted(missing))}; its first line names its columns")
    named = [dict(zip(header, row, strict=False)) for row in rows]
    return [Photo(row["file"], int(row["faces"]), row["clear"] == "yes") for row in named]


def shard_pixels(path: Path, side: int, quality: int) -> Pixels:
    """The photo as a shard would hold it, decoded: uint8 (H, W, 3). A quality of 0 leaves the JPEG out."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = side / max(picture.size)
    if scale < 1:
        width, height = (max(1, round(edge * scale)) for edge in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if quality:
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=quality)
        picture = Image.open(encoded).convert("RGB")
    return np.asarray(picture)


def count(detector: Mtcnn, pixels: Pixels, min_score: float, min_size: float) -> int:
    """Boxes with at least this score whose longer side is at least this part of the image's longer side."""
    boxes, scores = detector.detect(pixels)
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    return int(((scores >= min_score) & (sides >= min_size * max(pixels.shape[:2]))).sum())


def main() -> None:
    options = arguments()
    detector = Mtcnn(min_face_px=options.min_face_px)
    clear = exact = done = 0
    right = {True: [0, 0], False: [0, 0]}  # by whether there are faces: photos, and those where it is said rightly
    unreadable: list[str] = []
    seconds = 0.0
    for photo in read_truth(options.truth):
        try:
            pixels = shard_pixels(options.photos / photo.file, options.side, options.quality)
        except FileNotFoundError as error:
            raise SystemExit(f"no photo '{error.filename}': paths are relative to --photos") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unreadable.append(f"{photo.file} ({error})")
            continue
        start = time.perf_counter()
        found = count(detector, pixels, options.min_score, options.min_size)
        seconds += time.perf_counter() - start
        done += 1
        clear += photo.clear
        exact += photo.clear and found == photo.faces
        shows = photo.faces > 0
        right[shows] = [right[shows][0] + 1, right[shows][1] + ((found > 0) == shows)]
        if found != photo.faces:
            print(f"{photo.file}  faces {photo.faces}  found {found}{'' if photo.clear else '  (not clear)'}")
    for name in unreadable:
        print(f"does not decode: {name}")
    print(f"photos {done}, not decoded {len(unreadable)}")
    print("faces found in {1} of {0} with faces, none in {3} of {2} without".format(*right[True], *right[False]))
    print(f"clear {clear}, exact {exact}, not exact {clear - exact}")
    print(f"{done / seconds if seconds else 0:.1f} images/s in the detector, one thread")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the detector's counts with counts made by eye.")
    parser.add_argument("--truth", type=Path, required=True, help="TSV with the columns file, faces, clear")
    parser.add_argument("--photos", type=Path, required=True, help="folder that the files are relative to")
    parser.add_argument("--side", type=int, default=512, help="longest side fed to the detector, px [%(default)s]")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG; 0 leaves it out [%(default)s]")
    parser.add_argument("--min-score", type=float, default=0.9, help="least probability [%(default)s]")
    parser.add_argument("--min-size", type=float, default=0.03, help="least box, part of the long side [%(default)s]")
    parser.add_argument("--min-face-px", type=int, help="smallest face looked for, px [by the picture's size]")
    return parser.parse_args()


if __name__ == "__main__":
    main()

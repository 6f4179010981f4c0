"""Makes a small root with the version of builder that is installed, and packs it with its source and its pipeline.

    python tests/support/make_root.py tests/roots/0.1.0.tar.gz

Its SQL is that version's, as `builder init` copies it. The tests unpack it elsewhere. A root records absolute paths of
its source, so it is made in a folder whose path is as long as `PATH_LENGTH` says: another path of that length can
stand in its place in every file, footers of parquet included (`old_root.unpacked` does it).
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

#: Characters of the path of the folder in which a root is made or unpacked.
PATH_LENGTH = 200
#: Modification time of the source, whole seconds: archives keep these exactly.
MTIME = 1_700_000_000
PIPELINE = """\
[dataset]
name = "old"
shards = "{folder}/source/*.tar"
root = "{folder}/out"
fields = ["url", "original_width", "sha256", {{ name = "big", type = "string" }}]

[run]
workers = 1

[stages.faces]

[stages.lang]

[stages.prompts]

[stages.prompts.params]
min_faces = 1
lang = "any"

[stages.generate]
width = 64
height = 64

[stages.check]
"""


def folder_of_length(parent: Path) -> Path:
    """A new folder in `parent` whose path has `PATH_LENGTH` characters."""
    rest = PATH_LENGTH - len(str(parent)) - 1
    if not 1 <= rest <= 250:
        raise ValueError(f"'{parent}' is too long or too short for a path of {PATH_LENGTH} characters")
    folder = parent / ("r" * rest)
    folder.mkdir()
    return folder


def face(seed: int) -> Image.Image:
    """A portrait of 128 px, each cut a little differently. Source: scikit-image's astronaut, NASA, public domain."""
    left, top = 130 + 2 * seed, seed
    return Image.fromarray(data.astronaut()).crop((left, top, left + 220, top + 220)).resize((128, 128))


def plain(seed: int) -> Image.Image:
    """A small picture without a face."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((96, 64))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind], **options)
    return out.getvalue()


def rotated(image: Image.Image) -> bytes:
    """A jpeg that is stored on its side, as cameras do, and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.rotate(90, expand=True), "jpg", exif=exif)


def grey16(image: Image.Image) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(out, "PNG")
    return out.getvalue()


def sample(
    key: str, image: bytes, kind: str, caption: str, *, txt: bool = True, **fields: object
) -> list[tuple[str, bytes]]:
    body = {"uid": key, "caption": caption, "url": f"https://example.org/{key[-2:]}", "original_width": 640, **fields}
    members = [(f"{key}.{kind}", image), (f"{key}.json", json.dumps(body).encode())]
    return [*members, (f"{key}.txt", caption.encode())] if txt else members


def key_of(number: int) -> str:
    return f"{number:032x}"


def shards() -> dict[str, list[tuple[str, bytes]]]:
    """Members of three shards: jpg, png with a webp among them, and odd samples."""
    english = "a woman in an orange suit is smiling at the camera"
    boxes = [[0.25, 0.1, 0.75, 0.75]]
    jpg = [sample(key_of(i), encoded(face(i), "jpg"), "jpg", f"{english} {i}") for i in range(3)]
    jpg += [sample(key_of(i), encoded(plain(i), "jpg"), "jpg", "a street in the evening") for i in range(3, 5)]
    png = [sample(key_of(i), encoded(face(i), "png"), "png", english, face_bboxes=boxes) for i in range(10, 12)]
    png += [sample(key_of(12), encoded(face(2), "webp"), "webp", english, face_bboxes=boxes)]
    png += [sample(key_of(13), encoded(plain(13), "png"), "png", "a wall", face_bboxes=[])]
    odd = [
        sample(key_of(20), rotated(face(0)), "jpg", english),
        sample(key_of(21), grey16(face(1)), "png", english),
        sample(key_of(22), encoded(face(0), "jpg"), "jpg", english, face_bboxes=[[0.5, 0.5, 0.9, 1.0000001], *boxes]),
        sample(key_of(23), encoded(plain(23), "jpg"), "jpg", "北京大学", big=12345678901234567890123),
        sample(key_of(24), encoded(face(1), "jpg"), "jpg", english, txt=False, face_bboxes=boxes),
        [(f"{key_of(25)}.jpg", encoded(face(2), "jpg")), (f"{key_of(25)}.txt", english.encode())],
        [
            (f"{key_of(26)}.png", encoded(face(0), "png")),
            *sample(key_of(26), encoded(plain(6), "png"), "mask.png", english),
        ],
    ]
    return {
        "jpg": [member for made in jpg for member in made],
        "odd": [member for made in odd for member in made],
        "png": [member for made in png for member in made],
    }


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), MTIME
            archive.addfile(info, io.BytesIO(content))


def main(packed: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        folder = folder_of_length(Path(parent))
        (folder / "source").mkdir()
        for name, members in shards().items():
            path = folder / "source" / f"{name}.tar"
            write_tar(path, members)
            subprocess.run(["touch", "-d", f"@{MTIME}", str(path)], check=True)
        pipeline = folder / "pipeline.toml"
        pipeline.write_text(PIPELINE.format(folder=folder), "utf-8")
        builder = str(Path(sys.executable).with_name("builder"))
        subprocess.run([builder, "init", str(folder / "mine")], check=True)
        (folder / "mine/sql").rename(folder / "sql")
        shutil.rmtree(folder / "mine")
        subprocess.run([builder, "run", "--pipeline", str(pipeline)], check=True, cwd=folder)
        for description in folder.glob("out/runs/*/run.json"):
            facts = {**json.loads(description.read_text("utf-8")), "host": "elsewhere"}
            description.write_text(json.dumps(facts, indent=1), "utf-8")
        (folder / "made_in").write_text(str(folder), "utf-8")
        with tarfile.open(packed, "w:gz") as archive:
            for entry in sorted(folder.iterdir()):
                archive.add(entry, entry.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

"""Makes two small shards in DataComp's layout from photos on this disk, so that the demo needs no network.

Owns the photos, their captions and how they are varied. The photos are scikit-image's: two show one face each, the
others none; `truth.tsv` next to the shards records this for every sample. Knows nothing about tables and stages.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from builder.errors import ConfigError, package_folder
from builder.store.files import write_atomic

T = TypeVar("T")

SHARDS = 2
TRUTH = "truth.tsv"
TRUTH_COLUMNS = ("key", "photo", "faces", "lang")
#: Shortest and longest "longest side" of a stored image, pixels; none is enlarged.
SIDE_PX = (256, 512)
QUALITY = (85, 95)
#: Most that is cut off one side, as a share of the photo's width or height.
CUT = 0.15
#: One in FACE_EVERY samples shows a face, one in ODD_EVERY has an unusable caption.
FACE_EVERY = 4
ODD_EVERY = 14
#: mtime of the first member, seconds: 2024-07-01. Its fraction makes a pax header, as webdataset's writer does.
MTIME = 1719792000.25

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Photo:
    """One source photo."""

    file: str
    faces: int
    #: x1, y1, x2, y2 that every crop contains, as shares of width and height.
    keep: Box
    #: One "language caption" per line.
    captions: str
    #: Limits of every crop, and its longest side, pixels: set where MTCNN would find a false face.
    view: Box = (0.0, 0.0, 1.0, 1.0)
    longest_px: int = SIDE_PX[1]

    def captions_by_lang(self) -> dict[str, list[str]]:
        by_lang: dict[str, list[str]] = {}
        for line in self.captions.strip().splitlines():
            lang, caption = line.strip().split(" ", 1)
            by_lang.setdefault(lang, []).append(caption)
        return by_lang


#: Photos in which MTCNN (score of 0.9 or more) finds the true number of faces, in every crop: over 40 seeds of 200
#: samples the most certain false face scored 0.87, the least certain true one 0.995. Left out for false faces at 0.9
#: and more: coins (rightly), grass, gravel, hubble_deep_field, motorcycle_left and _right.
PHOTOS = (
    Photo(
        "astronaut.png",
        1,
        (0.27, 0.04, 0.68, 0.48),
        """
        en Portrait of NASA astronaut Eileen Collins in her orange launch suit
        en A smiling woman astronaut poses in front of the American flag and a model of the space shuttle
        en Eileen Collins, the first woman to command a space shuttle mission | NASA
        en Official portrait of an astronaut holding her helmet - stock photo
        en Woman in an orange space suit smiling at the camera, 1999
        en A photo of a female pilot and astronaut with short curly hair
        en The commander of the shuttle crew before her flight to orbit
        de Porträt einer lächelnden Astronautin im orangefarbenen Raumanzug vor der amerikanischen Flagge
        fr Portrait d'une astronaute souriante en combinaison orange devant le drapeau américain
        es Retrato de una astronauta sonriente con traje espacial naranja delante de la bandera
        it Ritratto di un'astronauta sorridente con la tuta arancione davanti alla bandiera americana
        pt Retrato de uma astronauta sorridente com traje espacial laranja em frente da bandeira
        ru Портрет улыбающейся женщины-астронавта в оранжевом скафандре на фоне американского флага
        zh 一位身穿橙色宇航服的女宇航员在美国国旗前微笑的肖像照
        ja オレンジ色の宇宙服を着て星条旗の前で微笑む女性宇宙飛行士の肖像写真です
        ar صورة لرائدة فضاء مبتسمة ترتدي بدلة فضاء برتقالية أمام العلم الأمريكي
        nl Portret van een lachende astronaute in een oranje ruimtepak voor de Amerikaanse vlag
        pl Portret uśmiechniętej astronautki w pomarańczowym skafandrze na tle amerykańskiej flagi
        """,
        view=(0.0, 0.0, 1.0, 0.56),  # the patch on her chest is taken for a face
    ),
    Photo(
        "camera.png",
        1,
        (0.27, 0.12, 0.68, 0.52),
        """
        en A man in a black coat looks through a camera on a tripod
        en Black and white photo of a cameraman filming on a lawn in front of a university
        en Photographer at work in the park | Shutterstock
        en Young man with dark hair adjusting his camera outdoors, stock photo
        en The famous cameraman test picture from MIT
        en Side view of a photographer bending over his tripod on a cloudy day
        de Ein Mann im schwarzen Mantel schaut durch eine Kamera auf einem Stativ
        fr Un homme en manteau noir regarde dans un appareil photo posé sur un trépied
        es Un hombre con abrigo negro mira por una cámara colocada sobre un trípode
        it Un uomo con il cappotto nero guarda attraverso una macchina fotografica sul treppiede
        pt Um homem de casaco preto olha por uma câmara montada num tripé no relvado
        ru Мужчина в чёрном пальто смотрит в фотоаппарат на штативе в парке
        zh 一个穿黑色大衣的男人在草地上用三脚架上的相机拍照
        ja 黒いコートを着た男性が芝生の上で三脚のカメラをのぞいている白黒写真
        ar رجل يرتدي معطفا أسود ينظر من خلال كاميرا على حامل ثلاثي في الحديقة
        nl Een man in een zwarte jas kijkt door een camera op een statief in het park
        tr Siyah paltolu bir adam parkta üç ayaklı sehpadaki kameraya bakıyor
        """,
        longest_px=320,  # in larger ones his ear is taken for a face
    ),
    Photo(
        "chelsea.png",
        0,
        (0.25, 0.2, 0.75, 0.8),
        """
        en Close-up of Chelsea, a ginger tabby cat with green eyes
        en A cat lying on a blanket and looking past the camera
        en Cute orange tabby cat portrait - stock photo
        de Nahaufnahme einer rötlichen Katze mit grünen Augen und langen Schnurrhaaren
        fr Gros plan d'un chat tigré roux aux yeux verts
        es Primer plano de un gato atigrado de ojos verdes mirando hacia un lado
        it Primo piano di un gatto rosso tigrato con gli occhi verdi
        ru Рыжая полосатая кошка с зелёными глазами крупным планом
        zh 一只绿眼睛的橘色虎斑猫的特写照片
        ja 緑色の目をした茶トラの猫のクローズアップ写真です
        ar صورة مقربة لقطة برتقالية مخططة ذات عيون خضراء
        ko 초록색 눈을 가진 주황색 줄무늬 고양이의 클로즈업 사진
        """,
    ),
    Photo(
        "coffee.png",
        0,
        (0.25, 0.1, 0.8, 0.9),
        """
        en A cup of espresso on a red saucer with a small spoon
        en Fresh espresso for a coffee break on an old wooden table
        en Espresso in a brown cup | Royalty-free stock image 48151623
        de Eine Tasse Espresso mit einem kleinen Löffel auf einem Holztisch
        fr Une tasse de café avec une petite cuillère sur une table en bois
        es Una taza de café expreso con una cucharilla sobre una mesa de madera
        it Una tazzina di caffè espresso con un cucchiaino su un tavolo di legno
        pt Uma chávena de café expresso com uma colher pequena numa mesa de madeira
        ru Чашка эспрессо с маленькой ложкой на деревянном столе
        zh 木桌上的一杯意式浓缩咖啡和一把小勺子
        ja 木のテーブルの上に置かれたエスプレッソのカップと小さなスプーン
        tr Ahşap masanın üzerinde küçük bir kaşıkla bir fincan espresso kahve
        """,
    ),
    Photo(
        "rocket.jpg",
        0,
        (0.3, 0.15, 0.7, 0.9),
        """
        en A Falcon 9 rocket stands on its launch pad at dusk
        en Rocket ready for lift-off at Cape Canaveral, lit by floodlights
        en SpaceX launch pad at night, Florida
        de Eine Rakete steht in der Abenddämmerung auf der Startrampe
        fr Une fusée sur son pas de tir au crépuscule, éclairée par des projecteurs
        es Un cohete en la plataforma de lanzamiento al anochecer
        it Un razzo sulla rampa di lancio al tramonto illuminato dai riflettori
        pt Um foguetão na plataforma de lançamento ao anoitecer
        ru Ракета стоит на стартовой площадке в вечерних сумерках
        zh 黄昏时分火箭矗立在发射台上准备发射
        ja 夕暮れの発射台で打ち上げを待つロケットの写真です
        ar صاروخ على منصة الإطلاق عند الغروب تضيئه الأضواء الكاشفة
        """,
    ),
    Photo(
        "brick.png",
        0,
        (0.3, 0.3, 0.7, 0.7),
        """
        en Old brick pavement seen from above, grey texture
        en Brick wall background - seamless texture for designers
        de Alte graue Ziegelsteine als Hintergrund für Gestalter
        fr Texture d'un vieux pavage de briques grises vu d'en haut
        es Textura de un viejo suelo de ladrillos grises visto desde arriba
        it Struttura di una vecchia pavimentazione di mattoni grigi
        pt Uma textura de tijolos cinzentos num pavimento muito antigo
        ru Текстура старой кирпичной кладки серого цвета
        zh 灰色旧砖铺成的地面纹理背景
        """,
    ),
    Photo(
        "moon.png",
        0,
        (0.3, 0.3, 0.7, 0.7),
        """
        en Craters on the surface of the moon, taken by a lunar orbiter
        en Moon landscape with a small bright crater | NASA archive
        de Krater auf der Oberfläche des Mondes, aufgenommen aus der Umlaufbahn
        fr Des cratères à la surface de la Lune vus depuis l'orbite
        es Cráteres en la superficie de la Luna vistos desde la órbita
        pt Fotografia das crateras na superfície da Lua, tirada por uma sonda em órbita
        zh 从轨道上拍摄的月球表面的陨石坑
        ar فوهات على سطح القمر كما تظهر من المدار
        """,
    ),
    Photo(
        "retina.jpg",
        0,
        (0.2, 0.2, 0.8, 0.8),
        """
        en Image of a human retina showing the optic disc and blood vessels
        en Medical photo of the back of the eye
        de Aufnahme einer menschlichen Netzhaut mit Blutgefäßen
        fr Image d'une rétine humaine montrant les vaisseaux sanguins
        es Imagen de una retina humana con los vasos sanguíneos
        it Immagine di una retina umana con i vasi sanguigni
        pt Imagem de uma retina humana com os vasos sanguíneos
        ja 血管が見える人間の網膜の医療写真です
        """,
    ),
    Photo(
        "horse.png",
        0,
        (0.05, 0.05, 0.95, 0.95),
        """
        en Black silhouette of a standing horse on a white background
        en Horse silhouette clipart - free stock vector
        de Schwarze Silhouette eines stehenden Pferdes auf weißem Grund
        fr Silhouette noire d'un cheval debout sur fond blanc
        es Silueta negra de un caballo de pie sobre fondo blanco
        ru Чёрный силуэт стоящей лошади на белом фоне
        zh 白色背景上一匹站立的马的黑色剪影
        ar صورة ظلية سوداء لحصان واقف على خلفية بيضاء
        """,
    ),
    Photo(
        "text.png",
        0,
        (0.2, 0.1, 0.8, 0.9),
        """
        en Handwritten mathematical formulas on squared paper
        en Notes from a maths lecture written with a pencil
        de Handgeschriebene mathematische Formeln auf kariertem Papier
        fr Des formules mathématiques écrites à la main sur une feuille quadrillée
        es Fórmulas matemáticas escritas a mano en papel cuadriculado
        pt Fórmulas matemáticas escritas à mão em papel quadriculado
        ru Математические формулы, написанные от руки на бумаге в клетку
        ko 모눈종이에 손으로 쓴 수학 공식
        """,
    ),
)

#: Odd captions, as the web has them. Their language is "" in the truth.
ODD_CAPTIONS = (
    "",
    "😀🚀✨",
    'He said "wow",\n\tthen took the picture\r\n(see the \\"making of\\")',
    "Limited offer! " + "cheap photos, best photos, free photos, " * 60 + "click here",
    "IMG_20190807_121314.JPG",
    "   ",
    "Photo &amp; more: https://example.com/gallery/view.php?id=48151623&amp;page=2 #photo #pic #nofilter",
)

_EXIF = (
    "{}",
    "{}",
    '{"Image Make": "Canon", "Image Model": "Canon EOS 5D", "EXIF ISOSpeedRatings": "200"}',
    '{"Image Orientation": "Horizontal (normal)"}',
    None,
)


def make_demo_shards(folder: Path, *, samples: int = 200, seed: int = 0) -> list[Path]:
    """Writes two shards, their `_stats.json` and `truth.tsv` into a folder. About 0.8 s for 200 samples.

    Args:
        folder: made if missing; files of the same names are replaced.
        samples: in all, at least 2; a quarter of them show a face.
        seed: other seeds give other uids, crops and captions.

    Returns:
        The paths of the tars. The same arguments and the same Pillow give the same bytes.

    Raises:
        ConfigError: samples is below 2.
        StageError: scikit-image is not installed.
    """
    if samples < SHARDS:
        raise ConfigError(f"the demo needs at least {SHARDS} samples, one per shard", fix="set samples = 200")
    photos = _photo_folder()
    dice = _Dice(seed)
    plans = _plans(dice, samples)
    sources: dict[str, _Source] = {}
    paths, truth = [], ["\t".join(TRUTH_COLUMNS)]
    for shard in range(SHARDS):
        part = plans[shard * (samples // SHARDS) : None if shard == SHARDS - 1 else (shard + 1) * (samples // SHARDS)]
        members: list[tuple[str, bytes]] = []
        for index, plan in enumerate(part):
            if plan.photo.file not in sources:
                sources[plan.photo.file] = _Source.read(photos / plan.photo.file)
            key, made = _sample(dice, plan, sources[plan.photo.file], shard, index, _format(index, len(part)))
            members.extend(made)
            truth.append(f"{key}\t{Path(plan.photo.file).stem}\t{plan.photo.faces}\t{plan.lang}")
        paths.append(folder / f"{shard:08d}.tar")
        write_atomic(paths[-1], _tar(members, shard), durable=False)
        write_atomic(folder / f"{shard:08d}_stats.json", json.dumps({"successes": len(part)}).encode(), durable=False)
    write_atomic(folder / TRUTH, ("\n".join(truth) + "\n").encode(), durable=False)
    return paths


def faces_placed(folder: Path) -> int:
    """Returns how many faces the photos in a folder's shards show, as `make_demo_shards` wrote it down.

    Raises:
        ConfigError: the folder has no truth.tsv.
    """
    path = folder / TRUTH
    if not path.is_file():
        raise ConfigError(
            f"no '{TRUTH}' next to the shards", where={"folder": folder}, fix="make the demo's shards: builder demo"
        )
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:]]
    return sum(int(row[TRUTH_COLUMNS.index("faces")]) for row in rows)


def _photo_folder() -> Path:
    """The folder with scikit-image's photos, found without importing the package."""
    return package_folder("skimage", extra="demo", needed_by="builder demo") / "data"


class _Dice:
    """Random numbers that are the same in every Python: made of `random.random` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def whole(self, low: int, high: int) -> int:
        """Returns low..high, both possible."""
        return low + int(self._random() * (high - low + 1))

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return [values[i] for _, i in sorted((self._random(), i) for i in range(len(values)))]

    def hex(self, digits: int) -> str:
        return "".join("0123456789abcdef"[self.whole(0, 15)] for _ in range(digits))


@dataclass(frozen=True)
class _Plan:
    """What one sample will be."""

    photo: Photo
    caption: str
    #: "" if the caption is an odd one.
    lang: str


@dataclass(frozen=True)
class _Source:
    """One decoded photo, and the facts of its "download" for the json."""

    image: Image.Image
    sha256: str

    @classmethod
    def read(cls, path: Path) -> _Source:
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data))
        return cls(image if image.mode == "L" else image.convert("RGB"), hashlib.sha256(data).hexdigest())


def _plans(dice: _Dice, samples: int) -> list[_Plan]:
    """Deals photos and captions, then shuffles."""
    with_face = [photo for photo in PHOTOS if photo.faces]
    without = [photo for photo in PHOTOS if not photo.faces]
    faces = max(1, round(samples / FACE_EVERY))
    plans = [
        *_dealt(dice, with_face, faces, english=0.65),
        *_dealt(dice, without, samples - faces, english=0.35),
    ]
    odd = itertools.cycle(ODD_CAPTIONS)
    plans = [_Plan(p.photo, next(odd), "") if i % ODD_EVERY == ODD_EVERY - 1 else p for i, p in enumerate(plans)]
    return dice.shuffled(plans)


def _dealt(dice: _Dice, photos: Sequence[Photo], count: int, *, english: float) -> Iterator[_Plan]:
    """Yields plans: photos in turn, a share of English captions, the other languages in turn."""
    decks = [_deck(dice, photo) for photo in photos]
    for i in range(count):
        photo, (own, others) = photos[i % len(photos)], decks[i % len(photos)]
        is_english = int((i + 1) * english) > int(i * english)
        lang, caption = next(own if is_english else others)
        yield _Plan(photo, caption, lang)


def _deck(dice: _Dice, photo: Photo) -> tuple[Iterator[tuple[str, str]], Iterator[tuple[str, str]]]:
    """Returns a photo's English captions and its others, each shuffled and without end."""
    pairs = [(lang, caption) for lang, captions in photo.captions_by_lang().items() for caption in captions]
    own = [pair for pair in pairs if pair[0] == "en"]
    return itertools.cycle(dice.shuffled(own)), itertools.cycle(dice.shuffled([p for p in pairs if p not in own]))


Format = Literal["jpg", "png", "webp"]


def _format(index: int, count: int) -> Format:
    """Returns how a sample is stored: one png and one webp in each shard that has three samples."""
    if count >= 3 and index == count // 3:
        return "png"
    if count >= 3 and index == 2 * count // 3:
        return "webp"
    return "jpg"


def _sample(
    dice: _Dice, plan: _Plan, source: _Source, shard: int, index: int, kind: Format
) -> tuple[str, list[tuple[str, bytes]]]:
    """Returns a sample's key and its members: name and bytes, sorted by extension."""
    uid = dice.hex(32)
    image = _varied(dice, source.image, plan.photo)
    record: dict[str, Any] = {
        "uid": uid,
        "caption": plan.caption,
        "url": f"https://example.com/photos/{Path(plan.photo.file).stem}/{uid[:8]}.{kind}",
        "key": f"{shard * 10_000 + index:012d}",
        "status": "success",
        "error_message": None,
        "width": image.width,
        "height": image.height,
        "original_width": source.image.width,
        "original_height": source.image.height,
        "exif": _EXIF[dice.whole(0, len(_EXIF) - 1)],
        "sha256": source.sha256,
    }
    members = {
        kind: _encoded(image, kind, dice.whole(*QUALITY)),
        "json": json.dumps(record, indent=4).encode(),
        "txt": plan.caption.encode(),
    }
    key = f"{uid}-0"
    return key, [(f"{key}.{extension}", members[extension]) for extension in sorted(members)]


def _varied(dice: _Dice, image: Image.Image, photo: Photo) -> Image.Image:
    """Cuts a little off the sides, flips half of the images and shrinks to a longest side within SIDE_PX."""
    keep, view = photo.keep, photo.view
    x1, y1 = (dice.between(view[i], min(view[i] + CUT, keep[i])) for i in (0, 1))
    x2, y2 = (dice.between(max(view[i] - CUT, keep[i]), view[i]) for i in (2, 3))
    box = (round(x1 * image.width), round(y1 * image.height), round(x2 * image.width), round(y2 * image.height))
    flip = dice.whole(0, 1)
    longest = max(box[2] - box[0], box[3] - box[1])
    scale = dice.whole(SIDE_PX[0], max(SIDE_PX[0], min(photo.longest_px, longest))) / longest
    size = (round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale))
    image = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def _encoded(image: Image.Image, kind: Format, quality: int) -> bytes:
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG")
    elif kind == "webp":
        image.convert("RGB").save(buffer, "WEBP", quality=quality)
    else:
        image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _tar(members: Sequence[tuple[str, bytes]], shard: int) -> bytes:
    """Returns a tar with a pax header (mtime) for each member, as webdataset's TarWriter leaves it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            info.uname = info.gname = "bigdata"
            info.mtime = MTIME + shard * 60 + i / 128  # binary fractions: the same text in every Python
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()

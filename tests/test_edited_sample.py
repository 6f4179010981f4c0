"""What becomes of a sample that is edited: the members of its source, what they say, and where it stays as it is."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builder import formats
from builder.hybrid.edit import (
    NO_TEXT,
    OTHER_FORMAT,
    REASONS,
    SEVERAL_PICTURES,
    Rules,
    members_of,
    was_so,
)
from builder.table import partitions, root_schema
from builder.verbs.snapshot import Snapshot
from builder.verbs.write import write_plans
from conftest import CAPTION, Workspace, members_like, picture, read_tar, write_tar

Make = Callable[..., Workspace]
#: Every sample gets a prompt and an image.
STAGES = """\
[stages.prompts]
sql = "{folder}/prompts.sql"

[stages.generate]
width = 64
height = 64
quality = 80
"""


@pytest.fixture
def prompted(workspace: Make) -> Callable[..., Workspace]:
    """A shard of samples with these members, in which every sample has a prompt; nothing has run."""

    def make(*samples: tuple[str, ...], fields: dict[str, Any] | None = None, more: str = "") -> Workspace:
        made = workspace({}, stages="")
        (made.folder / "prompts.sql").write_text(f"select shard, row, uid, '{CAPTION}' as text from samples")
        text = made.file.read_text("utf-8") + STAGES.format(folder=made.folder) + more
        made.file.write_text(text)
        parts = [members_like(f"s{i}", *sample, number=i, fields=fields) for i, sample in enumerate(samples)]
        write_tar(made.folder / "source/a.tar", [member for part in parts for member in part])
        return made

    return make


def tars(made: Workspace) -> tuple[dict[str, bytes], dict[str, bytes]]:
    return read_tar(made.folder / "source/a.tar"), read_tar(made.root / "shards/a.tar")


def as_older(made: Workspace) -> None:
    """Makes the root one of before there were formats: jpg images everywhere, and no column that says so."""
    made.run("run", "--set", "write.image=jpg")
    layout = made.load().layout
    for path in sorted((layout.columns / "a").glob("generate.*")):
        with pq.ParquetFile(path) as file:
            rows, metadata = file.read(), file.schema_arrow.metadata
        assert rows["image_format"].to_pylist() == ["jpg"] * rows.num_rows
        pq.write_table(rows.drop_columns(["image_format"]).replace_schema_metadata(metadata), path)
    root_schema.change_schema(layout, lambda have: tuple(column for column in have if column.name != "image_format"))
    partitions.fold(layout, "a")
    for path in (layout.hybrid("a"), layout.manifest("a"), layout.stats("a"), layout.sizes()):
        path.unlink()


def numbers(made: Workspace, *arguments: str) -> dict[str, Any]:
    return dict(json.loads(made.run("plan", "--json", *arguments).stdout))


# --- the members ---


def test_a_new_picture_has_the_format_and_the_name_of_the_old_one(prompted: Make) -> None:
    extensions = ("jpg", "jpeg", "png", "webp", "JPG", "Jpeg", "PNG", "WebP")
    made = prompted(*((extension, "json", "txt") for extension in extensions))
    made.run("run")
    made.run("verify")
    source, hybrid = tars(made)
    assert list(hybrid) == list(source)
    rows = made.rows(
        "select image_path, image_offset, image_size, image_sha256, image_format from samples order by row"
    )
    for row, (extension, (path, offset, size, digest, kind)) in enumerate(zip(extensions, rows, strict=True)):
        data = hybrid[f"s{row}.{extension}"]
        assert data != source[f"s{row}.{extension}"]
        with Image.open(io.BytesIO(data)) as image:
            wanted = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension.lower()]
            assert (image.format, image.mode, image.size) == (wanted, "RGB", (64, 64))
        stored = (made.root / path).read_bytes()[offset : offset + size]
        written = json.loads(hybrid[f"s{row}.json"])
        assert stored == data and hashlib.sha256(data).hexdigest() == digest == written["sha256"]
        assert kind == formats.OF_EXTENSION[extension.lower()]
        assert made.run("regen", f"a:{row}", "--check").stdout.splitlines()[-1] == "the same image, bit for bit"


def test_a_png_is_lossless_and_a_webp_as_good_as_quality_says(prompted: Make) -> None:
    made = prompted(("png", "json", "txt"), ("webp", "json", "txt"))
    sizes = {}
    for quality in (20, 95):
        made.run("run", "--set", f"stages.generate.quality={quality}")
        made.run("stage", "generate", "--stale", "--set", f"stages.generate.quality={quality}")
        sizes[quality] = [size for (size,) in made.rows("select image_size from samples order by row")]
    assert sizes[20][0] == sizes[95][0]
    assert sizes[20][1] < sizes[95][1]


@pytest.mark.parametrize(
    ("mode", "extension"), [("RGBA", "png"), ("I;16", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "webp")]
)
def test_a_picture_of_another_kind_is_replaced_by_rgb(prompted: Make, mode: str, extension: str) -> None:
    made = prompted((extension, "json", "txt"))
    out = io.BytesIO()
    Image.new(mode, (48, 32)).save(out, "PNG" if extension == "png" else "WEBP")
    members = [(f"s0.{extension}", out.getvalue()), *members_like("s0", "json", "txt")]
    write_tar(made.folder / "source/a.tar", members)
    made.run("run")
    made.run("verify")
    with Image.open(io.BytesIO(tars(made)[1][f"s0.{extension}"])) as image:
        assert (image.format, image.mode) == (extension.upper(), "RGB")


def test_without_a_json_the_manifest_says_how_a_sample_was_made(prompted: Make) -> None:
    made = prompted(("png", "txt"), ("jpg", "txt", "cls"), ("jpg", "json"))
    made.run("run")
    made.run("verify")
    source, hybrid = tars(made)
    assert list(hybrid) == list(source)
    prompt = f"A photo of {CAPTION}, natural light"
    assert hybrid["s0.txt"] == hybrid["s1.txt"] == prompt.encode()
    assert hybrid["s1.cls"] == source["s1.cls"]
    told = json.loads(hybrid["s2.json"])
    assert (told["caption"], told["original_caption"], told["provenance"]["prompt"]) == (prompt, CAPTION, prompt)
    rows = pq.read_table(made.root / "shards/manifest/a.parquet").to_pylist()
    assert [row["member"] for row in rows if row["provenance"]] == ["s0.png", "s1.jpg"]
    [(run, seed)] = made.rows("select generate_run, image_seed from samples where row = 0")
    description = json.loads((made.root / f"runs/{run}/run.json").read_text())
    assert json.loads(rows[0]["provenance"]) == {
        "replaced": {"caption": CAPTION}, "model": "sketch", "seed": seed, "prompt": prompt, "stage": "generate",
        "version": description["version"], "options": description["options_hash"],
    }  # fmt: skip


def test_a_sample_with_neither_json_nor_txt_is_edited_where_it_gets_a_json(prompted: Make) -> None:
    made = prompted(("jpg",), ("jpg", "txt"), ("jpg", "json", "txt"))
    made.run("run")
    source, hybrid = tars(made)
    assert list(hybrid) == list(source)
    assert hybrid["s0.jpg"] == source["s0.jpg"]
    assert numbers(made)["write"]["kept"] == {NO_TEXT: 1}
    made.run("verify")
    json_too = ("--set", "write.json=true")
    made.run("write", *json_too)
    made.run("verify", *json_too)
    hybrid = tars(made)[1]
    assert list(hybrid) == ["s0.jpg", "s0.json", "s1.jpg", "s1.txt", "s1.json", "s2.jpg", "s2.json", "s2.txt"]
    assert json.loads(hybrid["s0.json"])["caption"] == f"A photo of {CAPTION}, natural light"
    assert json.loads(hybrid["s0.json"])["original_caption"] is None
    told = json.loads(hybrid["s1.json"])
    assert told["original_caption"] == told["provenance"]["replaced"]["caption"] == CAPTION
    assert numbers(made, *json_too)["write"]["kept"] == {}


def test_fields_that_no_json_can_hold_are_not_lost_in_silence(prompted: Make) -> None:
    made = prompted(("jpg", "txt"), ("jpg", "json"))
    sql = made.folder / "w.sql"
    sql.write_text("select shard, row, uid, 'new' as caption, 7 as set_rating from samples")
    sets = ("--set", f"write.select={sql}")
    made.run("ingest")
    made.run("write", *sets)
    made.run("verify", *sets)
    source, hybrid = tars(made)
    assert numbers(made, *sets)["write"]["kept"] == {NO_TEXT: 1}
    assert hybrid["s0.txt"] == source["s0.txt"]
    assert json.loads(hybrid["s1.json"])["rating"] == 7
    sql.write_text("select shard, row, uid, 'new' as caption from samples")
    made.run("write", *sets)
    made.run("verify", *sets)
    assert tars(made)[1]["s0.txt"] == b"new"


SEVERAL = ("jpg", "png", "mask.png", "depth.tiff", "txt", "json")


@pytest.mark.parametrize(
    ("choice", "left"), [("keep", list(SEVERAL)), ("drop", ["jpg", "txt", "json"]), (None, list(SEVERAL))]
)
def test_several_pictures_of_one_sample(prompted: Make, choice: str | None, left: list[str]) -> None:
    made = prompted(SEVERAL)
    sets = ("--set", f"write.other_pictures={choice}") if choice else ()
    assert "several pictures" not in made.run("ingest", *sets).stderr
    said = made.run("run", *sets).stderr
    made.run("verify", *sets)
    source, hybrid = tars(made)
    assert list(hybrid) == [f"s0.{extension}" for extension in left]
    assert (hybrid["s0.jpg"] == source["s0.jpg"]) == (choice is None)
    assert [name for name in hybrid if hybrid[name] != source[name]] == (
        [] if choice is None else ["s0.jpg", "s0.txt", "s0.json"]
    )
    assert numbers(made, *sets)["write"]["kept"] == ({SEVERAL_PICTURES: 1} if choice is None else {})
    told = "write: 1 samples with several pictures, of which a new one would replace the first stay the source's"
    assert (told in said) == (choice is None)
    if choice is None:
        assert '[write] other_pictures = "keep" or "drop"' in said
        assert "1 new images are left out by write, of samples with several pictures" in made.run("status").stdout


def test_advice_on_a_shard_that_is_refused_says_how_the_pipeline_is_named(prompted: Make) -> None:
    made = prompted(("jpg", "json", "txt"))
    made.run("run")
    [(path,)] = made.rows("select image_path from samples")
    (made.root / path).unlink()
    other = ("--set", "dataset.boxes=retina")  # another digest: the shard is not up to date
    for verb in ("write", "verify"):
        said = made.run(verb, *other, check=False).stderr
        assert said.splitlines()[-1] == f"(each builder command with --pipeline {made.file} {' '.join(other)})"


# --- roots of before ---


def test_jpg_images_of_an_older_root_stay_out_of_png_and_webp_samples(prompted: Make) -> None:
    made = prompted(("jpg", "json", "txt"), ("png", "json", "txt"), ("webp", "json", "txt"), ("jpeg", "json", "txt"))
    as_older(made)
    said = made.run("run").stderr
    assert "generate: nothing to do (4 ok" in said
    fix = (
        f"make them in that format: builder stage generate --stale --pipeline {made.file}, or take jpg: "
        '[write] image = "jpg"'
    )
    assert f"write: 2 {REASONS[OTHER_FORMAT]} stay the source's ({fix})" in said
    made.run("verify")
    source, hybrid = tars(made)
    assert list(hybrid) == list(source)
    edited = {name[:2] for name in source if hybrid[name] != source[name]}
    assert edited == {"s0", "s3"}
    plan = numbers(made)["write"]
    assert (plan["edited"], plan["kept"], plan["todo"]) == (2, {OTHER_FORMAT: 2}, 0)
    assert json.loads(made.run("status", "--json").stdout)["left_out"] == {OTHER_FORMAT: 2}
    assert fix in made.run("status").stdout and fix in made.run("plan").stderr
    assert numbers(made, "--stale")["stages"]["generate"]["todo"] == 2
    before = dict(made.rows("select row, generate_run from samples"))
    made.run("stage", "generate", "--stale")
    after = dict(made.rows("select row, generate_run from samples"))
    assert [row for row in before if before[row] != after[row]] == [1, 2]
    assert [kind for (kind,) in made.rows("select image_format from samples order by row")] == [
        None,
        "png",
        "webp",
        None,
    ]
    assert numbers(made, "--stale")["stages"]["generate"]["todo"] == 0
    made.run("write")
    made.run("verify")
    hybrid = tars(made)[1]
    assert list(hybrid) == list(source)
    assert {name[:2] for name in source if hybrid[name] != source[name]} == {"s0", "s1", "s2", "s3"}
    assert numbers(made)["write"]["kept"] == {}


def test_jpg_images_of_an_older_root_go_in_where_the_pipeline_says_jpg(prompted: Make) -> None:
    made = prompted(("jpg", "json", "txt"), ("PNG", "json", "txt"))
    as_older(made)
    jpg = ("--set", "write.image=jpg")
    assert numbers(made, "--stale", *jpg)["stages"]["generate"]["todo"] == 0
    made.run("run", *jpg)
    made.run("verify", *jpg)
    source, hybrid = tars(made)
    assert [name for name in hybrid if name not in source] == ["s1.jpg"]
    assert list(hybrid) == ["s0.jpg", "s0.json", "s0.txt", "s1.jpg", "s1.json", "s1.txt"]
    assert made.run("regen", "a:1", "--check").stdout.splitlines()[-1] == "the same image, bit for bit"


def test_a_picture_of_another_format_than_its_row_says_is_not_written(prompted: Make) -> None:
    made = prompted(("png", "json", "txt"))
    made.run("run", "--set", "write.image=jpg")
    wrong = made.folder / "wrong.sql"
    wrong.write_text(f"select * replace ('png' as image_format) from ({WRITE_FORMAT})")
    done = made.run("write", "--set", f"write.select={wrong}", check=False)
    assert "the image is jpg, but its row says png" in done.stderr
    assert done.returncode != 0


def test_no_rule_makes_a_shard_new_whose_bytes_it_leaves_as_they_were(prompted: Make) -> None:
    made = prompted(
        ("jpg", "json", "txt"), ("jpeg", "json", "txt"), ("JPEG", "json", "txt"), ("jpg", "txt", "json", "cls")
    )
    made.run("run")
    plain = digest(made)
    for sets in ("write.image=jpg", "write.json=true", "write.other_pictures=keep", "write.other_pictures=drop"):
        assert digest(made, sets) == plain, sets
    assert digest(made, "dataset.boxes=retina") != plain


@pytest.mark.parametrize(
    ("sample", "sets", "is_new"),
    [
        (("png", "json", "txt"), {"image": "jpg"}, False),
        (("JPG", "json", "txt"), {}, True),
        (("jpg", "txt"), {}, True),
        (("jpg", "txt"), {"json": True}, True),
        (("jpg", "json"), {}, True),
        (("jpg", "png", "json", "txt"), {"other_pictures": "drop"}, False),
        (("jpg", "png", "json", "txt"), {"other_pictures": "keep"}, True),
        (("jpg", "mask.png", "json", "txt"), {"other_pictures": "keep"}, False),
        (("jpg", "mask.png", "json", "txt"), {"other_pictures": "drop"}, True),
    ],
)
def test_a_shard_is_new_where_a_rule_changes_it(sample: tuple[str, ...], sets: dict[str, Any], is_new: bool) -> None:
    rules = Rules(**sets)
    kind = "jpg" if rules.image == "jpg" else formats.OF_EXTENSION[sample[0].lower()]
    members = members_of(sample, kind, True, False, rules)
    assert not isinstance(members, str)
    assert was_so(sample, True, True, members) != is_new


@pytest.mark.parametrize(
    ("sample", "one", "other"),
    [
        (("jpg", "txt"), (), ("write.json=true",)),
        (("jpg", "mask.png", "json", "txt"), ("write.other_pictures=keep",), ("write.other_pictures=drop",)),
    ],
)
def test_a_shard_is_written_again_for_a_rule_that_gives_its_samples_other_members(
    prompted: Make, sample: tuple[str, ...], one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    made = prompted(sample)
    first, second = ([word for rule in rules for word in ("--set", rule)] for rules in (one, other))
    made.run("run", *first)
    assert "nothing to do" in made.run("write", *first).stderr
    assert "1 edited" in made.run("write", *second).stderr
    made.run("verify", *second)


WRITE_FORMAT = """
select shard, row, uid, image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed,
       image_model, image_prompt, prompt, image_format
from samples where image_path is not null
"""


def digest(made: Workspace, *sets: str) -> str:
    [plan] = write_plans(Snapshot(made.load(*sets)), ["a"])
    return plan.digest


# --- other stages, and whoever looks at new pictures ---

PAINT = """
import io
import pyarrow as pa
from PIL import Image
from builder import Resources, Strict, output
from builder.table.schema import GENERATED

class Paint:
    name, version, Options, members = "paint", "1", Strict, ()
    inputs = pa.schema([("prompt", pa.string())])
    outputs = pa.schema([
        output("image", GENERATED, "a plain picture", extension="png"), output("image_width", pa.int32(), "px"),
        output("image_height", pa.int32(), "px"), output("image_seed", pa.int64(), "none"),
        output("image_model", pa.string(), "none"), output("image_prompt", pa.string(), "the prompt"){more},
    ])
    resources = Resources(batch_rows=4)
    def __init__(self, options): pass
    def setup(self, device): pass
    def close(self): pass
    def process(self, batch):
        assert batch.schema.names == ["shard", "row", "uid", "prompt"]
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, "PNG")
        prompts = batch.column("prompt").to_pylist()
        columns = {"image": out.getvalue(), "image_width": 8, "image_height": 8, "image_seed": 0}
        columns |= {"image_model": "x"{value}}
        found = {name: [value] * len(prompts) for name, value in columns.items()}
        return pa.RecordBatch.from_pydict({**found, "image_prompt": prompts}, schema=self.outputs)
"""


@pytest.mark.parametrize(
    ("more", "value"),
    [
        ("", ""),
        (', output("image_format", pa.string(), "its own")', ', "image_format": "PNG"'),
        (', output("image_format", pa.int32(), "a number")', ', "image_format": 7'),
    ],
    ids=["as before", "says it itself", "means something else"],
)
def test_a_stage_that_knows_no_formats_goes_on_working(workspace: Make, more: str, value: str) -> None:
    made = workspace({}, stages="")
    parts = [members_like(f"s{i}", extension, "json", "txt", number=i) for i, extension in enumerate(("jpg", "png"))]
    write_tar(made.folder / "source/a.tar", [member for part in parts for member in part])
    code = made.folder / "paint.py"
    code.write_text(PAINT.replace("{more}", more).replace("{value}", value))
    (made.folder / "paint.sql").write_text("select shard, row, uid, caption as prompt from samples")
    (made.folder / "w.sql").write_text(
        "select shard, row, uid, image_path, image_offset, image_size, image_width, image_height, image_sha256, "
        "image_seed, image_model, image_prompt, image_prompt as prompt from samples where image_path is not null"
    )
    stage = f'[stages.paint]\npython = "{code}:Paint"\nsql = "{made.folder}/paint.sql"\n'
    made.file.write_text(made.file.read_text() + stage + f'[write]\nselect = "{made.folder}/w.sql"\n')
    made.run("run")
    made.run("verify")
    source, hybrid = tars(made)
    assert list(hybrid) == list(source)
    edited = "s0" if value.endswith("7") else "s1"  # where nothing says what it is, it counts as jpg, as it always did
    assert {name[:2] for name in source if source[name] != hybrid[name]} == {edited}
    assert numbers(made)["write"]["kept"] == {OTHER_FORMAT: 1}
    assert f"builder stage paint --stale --pipeline {made.file}" in made.run("plan").stderr
    assert made.run("regen", "a:0", "--check").stdout.splitlines()[-1] == "the same image, bit for bit"


def test_new_pictures_of_every_format_are_looked_at_shown_and_saved(prompted: Make) -> None:
    check = '\n[stages.check]\ndetector = "mtcnn"\n'
    made = prompted(*((extension, "json", "txt") for extension in ("jpg", "png", "webp")), more=check)
    made.run("ingest")
    made.run("stage", "prompts")
    made.run("stage", "generate", "--try", "3", "--save", str(made.folder / "tried"))
    made.run("run")
    assert made.rows("select count(*) from samples where check_status = 'ok' and check_std > 1") == [(3,)]
    names = [f"a-00000{row}-image.{extension}" for row, extension in enumerate(("jpg", "png", "webp"))]
    assert sorted(path.name for path in (made.folder / "tried").iterdir()) == names
    for row, extension in enumerate(("jpg", "png", "webp")):
        made.run("show", f"a:{row}", "--save", str(made.folder / "shown"))
        new = made.folder / f"shown/a-00000{row}-new.{extension}"
        assert new.read_bytes() == tars(made)[1][f"s{row}.{extension}"]
        assert new.read_bytes() == (made.folder / f"tried/{names[row]}").read_bytes()


# --- boxes of the replaced picture ---


@pytest.mark.parametrize("name", ["face_bboxes", "retina"])
def test_boxes_of_the_replaced_picture_go_whatever_they_are_called(prompted: Make, name: str) -> None:
    boxes = {"face_bboxes": [[0.1, 0.1, 0.5, 0.9]], "retina": [[0.2, 0.2, 0.6, 0.8]]}
    made = prompted(("jpg", "json", "txt"), fields=boxes)
    sets = ("--set", f"dataset.boxes={name}")
    made.run("run", *sets)
    made.run("verify", *sets)
    told = json.loads(tars(made)[1]["s0.json"])
    gone = ["face_bboxes"] if name == "face_bboxes" else ["face_bboxes", "retina"]
    assert [field for field in boxes if field not in told] == gone
    assert {field: told["provenance"]["replaced"].get(field) for field in gone} == {
        field: boxes[field] for field in gone
    }


def test_a_field_of_boxes_cannot_be_set_beside_a_new_picture(prompted: Make) -> None:
    made = prompted(("jpg", "json", "txt"))
    made.run("run")
    sql = made.folder / "w.sql"
    image = "image_path, image_offset, image_size, image_width, image_height, image_sha256, image_prompt, prompt"
    sql.write_text(f"select shard, row, uid, {image}, 1 as set_retina from samples")
    done = made.run("write", "--set", f"write.select={sql}", "--set", "dataset.boxes=retina", check=False)
    assert done.returncode == 2 and "'set_retina', which the writer sets itself" in done.stderr
    assert made.run("write", "--set", f"write.select={sql}").returncode == 0


# --- the rules themselves ---

EXTENSION = st.sampled_from(
    ["jpg", "JPG", "jpeg", "png", "webp", "gif", "mask.png", "json", "txt", "cls", "a.json", "TXT"]
)


@given(
    extensions=st.lists(EXTENSION, min_size=1, max_size=6, unique_by=str.lower).map(tuple),
    image=st.sampled_from([None, "jpg", "png", "webp", "gif"]),
    has_caption=st.booleans(),
    has_fields=st.booleans(),
)
def test_an_edited_sample_has_exactly_the_members_of_its_source(
    extensions: tuple[str, ...], image: str | None, has_caption: bool, has_fields: bool
) -> None:
    if formats.picture_of(extensions) is None or not (image or has_caption or has_fields):
        return
    members = members_of(extensions, image, has_caption or image is not None, has_fields, Rules())
    if isinstance(members, str):
        assert members in REASONS
        return
    assert tuple(member.extension for member in members) == extensions
    assert [member.place for member in members] == list(range(len(extensions)))
    new = {member.holds for member in members}
    assert ("image" in new) == (image is not None)
    if has_caption or image is not None:
        assert new & {"json", "txt"}
    if has_fields:
        assert "json" in new


def test_a_picture_is_known_by_its_first_bytes() -> None:
    found = [formats.of_bytes(picture(1, extension=extension)) for extension in ("jpg", "png", "webp")]
    assert found == ["jpg", "png", "webp"]
    assert (
        formats.of_bytes(b"GIF89a") is None
        and formats.of_bytes(b"") is None
        and formats.of_bytes(b"RIFF1234WAVE") is None
    )

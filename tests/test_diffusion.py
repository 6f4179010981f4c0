"""The backend diffusers of the stage `generate`, on two tiny pipelines with random weights."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import re
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

from builder.engine.batches import check_alone, error_text
from builder.engine.work import Choice
from builder.errors import StageError
from builder.machine import is_out_of_memory
from builder.models.images.backend import ImageBackendEntry
from builder.models.images.diffusers_images import DiffusersImages
from builder.models.images.diffusion import Diffusion
from builder.models.images.loading import name_of
from builder.models.images.queue import Job, Made
from builder.stages.contract import Preparing, RowsFailed
from builder.stages.generate import BACKENDS, Generate, GenerateOptions, nearest, seed_of
from builder.table import partitions
from conftest import Workspace, ingest_here, read_tar, samples
from support import planned, tiny_diffusers

ROOT = Path(__file__).parent.parent
BATCH = 4
SMALL = {"dtype": "float32", "steps": 2, "width": 64, "height": 64, "batch_size": BATCH}


def saved(name: str) -> Callable[[Path], Path]:
    """A maker of one of the pipelines that bench/gpu_generate.py measures, tiny."""

    def make(folder: Path) -> Path:
        import torch

        from bench import gpu_generate

        make_tiny = gpu_generate.MODELS[name][1]
        gpu_generate.built(make_tiny, "cpu", torch.float32, tiny=True).save_pretrained(folder)
        return folder

    return make


#: Pipelines beside the two tiny ones, with the options of their blocks in docs/generate.md.
OTHERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "sd3": (tiny_diffusers.make_sd3, {"guidance": 7.0, "negative_prompt": "blurry, deformed"}),
    "klein": (tiny_diffusers.make_klein, {"guidance": 1.0}),
    "sprint": (tiny_diffusers.make_sprint, {}),
    "flux": (saved("flux"), {"guidance": 0.0, "max_sequence_length": 256}),
    "sdxl": (saved("sdxl"), {"guidance": 0.0}),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"sd": tiny_diffusers.make_sd(folder / "sd"), "dit": tiny_diffusers.make_dit(folder / "dit")}


@pytest.fixture
def start(models: dict[str, Path]) -> Iterator[Callable[..., Generate]]:
    """Sets up a stage over a tiny model; it is closed behind the test."""
    begun: list[Generate] = []

    def make(model: str = "sd", **options: Any) -> Generate:
        stage = Generate(GenerateOptions(backend="diffusers", model=str(models[model]), **{**SMALL, **options}))
        stage.setup("cpu")
        begun.append(stage)
        return stage

    yield make
    for stage in begun:
        stage.close()


@pytest.fixture(scope="module")
def tiny(models: dict[str, Path]) -> Iterator[Generate]:
    stage = Generate(GenerateOptions(backend="diffusers", model=str(models["sd"]), **SMALL))
    stage.setup("cpu")
    yield stage
    stage.close()


def batch(rows: Sequence[int], *, draw: int = 0, **more: list[Any]) -> pa.RecordBatch:
    columns = {
        "shard": ["00000000"] * len(rows),
        "row": list(rows),
        "uid": [f"{row:032x}" for row in rows],
        "key": [f"{row:08d}" for row in rows],
        "prompt": [f"a photo of number {row}" for row in rows],
        "draw": pa.array([draw] * len(rows), pa.int32()),
        "image_format": ["jpg"] * len(rows),
    }
    return pa.RecordBatch.from_pydict({**columns, **more})


def images(result: pa.RecordBatch) -> list[bytes]:
    return result.column("image").to_pylist()


def model_of(stage: Generate) -> Diffusion:
    """The model of a stage that is set up."""
    assert isinstance(stage._backend, DiffusersImages)
    return stage._backend.model


def recorded(stage: Generate, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of every batch that the model makes from now on."""
    made: list[list[int]] = []
    make = model_of(stage).make

    def recording(texts: Any, seeds: Sequence[int], size: tuple[int, int]) -> Any:
        made.append(list(seeds))
        return make(texts, seeds, size)

    monkeypatch.setattr(model_of(stage), "make", recording)
    return made


def seeds(rows: Sequence[int]) -> list[int]:
    return [seed_of(0, f"{row:032x}", f"{row:08d}") for row in rows]


# --- determinism ---


@pytest.mark.parametrize("model", ["sd", "dit"])
def test_an_image_is_the_same_in_any_order_beside_any_neighbours_and_padded(
    start: Callable[..., Generate], model: str
) -> None:
    stage = start(model)
    made = dict(zip(range(6), images(stage.process(batch(range(6)))), strict=True))
    assert len(set(made.values())) == 6
    assert images(stage.process(batch([5, 4, 3, 2, 1, 0]))) == [made[row] for row in (5, 4, 3, 2, 1, 0)]
    assert images(stage.process(batch([90, 3, 91, 92])))[1] == made[3]
    assert images(stage.process(batch([3]))) == [made[3]]
    stage.close()
    again = start(model)
    assert images(again.process(batch([1, 2]))) == [made[1], made[2]]


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_pipelines_make_what_they_make_when_they_are_called(tmp_path: Path, name: str) -> None:
    """Encoded apart, in any order: the images of the pipeline called with the prompts themselves."""
    make, options = OTHERS[name]
    stage = Generate(GenerateOptions(backend="diffusers", model=str(make(tmp_path / name)), **{**SMALL, **options}))
    stage.setup("cpu")
    assert model_of(stage)._names
    made = images(stage.process(batch(range(BATCH))))
    assert len(set(made)) == BATCH
    assert images(stage.process(batch([2, 0]))) == [made[2], made[0]]
    model_of(stage)._names, model_of(stage)._encoder_takes = (), {}
    assert model_of(stage).encode(["a"]) == [{"prompt": "a"}]
    assert images(stage.process(batch(range(BATCH)))) == made
    stage.close()


def test_prompt_seed_and_draw_each_decide(tiny: Generate) -> None:
    first = images(tiny.process(batch([1])))
    assert images(tiny.process(batch([1], prompt=["another prompt"]))) != first
    assert images(tiny.process(batch([1], draw=1))) != first
    assert images(tiny.process(batch([1], key=["another"]))) != first
    assert images(tiny.process(batch([1]))) == first


def test_seeds_are_what_they_always_were() -> None:
    assert seed_of(0, "u1", "k1") == 1528385617982717309
    assert seed_of(7, "a" * 32, "b-0") == 7877127354249443466
    assert len({seed_of(0, "u1", "k1", draw) for draw in range(100)}) == 100
    assert all(0 <= seed_of(0, "u1", str(i), 1) < 2**63 for i in range(100))


def test_the_sketch_is_what_it_always_was() -> None:
    stage = Generate(GenerateOptions(width=64, height=64))
    stage.setup("cpu")
    rows = batch([0], uid=["u1"], key=["k1"], prompt=["a cat"])
    assert stage.prepare(rows) is None
    [row] = stage.process(rows).to_pylist()
    data = row.pop("image")
    assert Image.open(io.BytesIO(data)).size == (64, 64)
    assert row == {
        "image_width": 64, "image_height": 64, "image_seed": 1528385617982717309, "image_draw": 0,
        "image_model": "sketch", "image_prompt": "a cat", "image_steps": None, "image_guidance": None,
        "image_batch_size": None, "image_device": None,
    }  # fmt: skip
    assert stage.resources.gpus == 0
    assert (stage.tolerance, stage.sql, stage.take_notes()) == (0.0, "generate.sql", [])


def test_the_row_says_how_the_image_was_made(start: Callable[..., Generate], models: dict[str, Path]) -> None:
    stage = start("dit", guidance=3.5, seed=9, quality=50)
    [row] = stage.process(batch([7], draw=2)).to_pylist()
    image = Image.open(io.BytesIO(row.pop("image")))
    assert (image.format, image.mode, image.size, image.layer) == (
        "JPEG", "RGB", (64, 64), [(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)],
    )  # fmt: skip
    assert row == {
        "image_width": 64, "image_height": 64, "image_seed": seed_of(9, f"{7:032x}", "00000007", 2), "image_draw": 2,
        "image_model": "dit", "image_prompt": "a photo of number 7", "image_steps": 2, "image_guidance": 3.5,
        "image_batch_size": BATCH, "image_device": this_cpu(),
    }  # fmt: skip
    assert (stage.resources.batch_rows, stage.resources.gpus, stage.resources.ahead) == (BATCH, 1, 3)


def test_the_difference_of_two_answers_is_the_mean_of_the_pixels(tiny: Generate) -> None:
    both = tiny.process(batch([1, 2]))
    assert tiny.difference(both, both) == 0
    assert tiny.difference(tiny.process(batch([2])), both.slice(1)) <= tiny.tolerance
    assert tiny.difference(both.slice(0, 1), both.slice(1)) > 10
    assert tiny.difference(both.slice(0, 0), both.slice(0, 0)) == 0

    def plain(level: int, side: int = 8, size: int = BATCH) -> pa.RecordBatch:
        out = io.BytesIO()
        Image.new("L", (side, side), level).save(out, "PNG")
        return pa.RecordBatch.from_pydict(
            {"image": pa.array([out.getvalue()], pa.large_binary()), "image_batch_size": [size]}
        )

    assert tiny.difference(plain(10), plain(13)) == 3
    assert tiny.difference(plain(10), plain(10, side=16)) == 255
    assert tiny.difference(plain(10), plain(13, size=2)) == 0  # memory ended between the two


def test_each_image_of_a_batch_has_the_format_that_its_row_asks_for(tiny: Generate) -> None:
    kinds = ["png", "jpg", "webp", "png"]
    data = images(tiny.process(batch(range(4), image_format=kinds)))
    opened = [Image.open(io.BytesIO(one)) for one in data]
    assert [(image.format, image.mode) for image in opened] == [
        ({"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind], "RGB") for kind in kinds
    ]
    as_jpg = images(tiny.process(batch(range(4))))
    assert data[1] == as_jpg[1]
    pixels = [np.asarray(image).astype(int) for image in opened]
    other = [np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in as_jpg]
    assert max(np.abs(one - two).mean() for one, two in zip(pixels, other, strict=True)) < 12
    assert images(tiny.process(batch(range(4), image_format=kinds))) == data
    lossless = images(tiny.process(batch([0], image_format=["png"])))[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(lossless))), np.asarray(opened[0]))


def test_names_of_models_hold_no_path(tmp_path: Path) -> None:
    cached = tmp_path / "models--black-forest-labs--FLUX.1-schnell/snapshots/741f7c3ce8"
    cached.mkdir(parents=True)
    (tmp_path / "flux").symlink_to(cached)
    assert name_of(str(cached), None) == "black-forest-labs/FLUX.1-schnell@741f7c3ce8"
    assert name_of(str(tmp_path / "flux"), None) == "741f7c3ce8"
    assert name_of(f"{tmp_path}/", "main") == tmp_path.name
    assert name_of("stabilityai/sd-turbo", None) == "stabilityai/sd-turbo"
    assert name_of("stabilityai/sd-turbo", "main") == "stabilityai/sd-turbo@main"


@pytest.fixture
def hub(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with the model `some/sd`, whose branch is at `COMMIT`; the other commit in it is another model."""
    import huggingface_hub.constants

    cached = tmp_path / "models--some--sd"
    shutil.copytree(models["sd"], cached / "snapshots" / COMMIT)
    shutil.copytree(models["dit"], cached / "snapshots" / LATER)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return cached


COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "1" * 40


def test_an_image_is_made_again_by_the_commit_that_made_it(hub: Path, workspace: Callable[..., Workspace]) -> None:
    made = workspace({"00000000": samples(6)}, stages=STAGES.format(model="some/sd"))
    made.run("run")
    [(uid, model)] = made.rows("select uid, image_model from samples where image_path is not null order by uid limit 1")
    assert model == f"some/sd@{COMMIT}"
    (hub / "refs/main").write_text(LATER)
    assert made.run("regen", uid, "--check").stdout.endswith("the same image, bit for bit\n")


def test_a_model_of_the_hub_is_named_with_its_commit(hub: Path) -> None:
    stage = Generate(GenerateOptions(backend="diffusers", model="some/sd", revision="main", **SMALL))
    stage.setup("cpu")
    assert model_of(stage).name == f"some/sd@{COMMIT}"
    stage.close()


# --- batches ---


def test_batches_are_filled_from_rows_ahead_and_the_last_is_padded(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = start()
    assert isinstance(stage, Preparing)
    made = recorded(stage, monkeypatch)
    given = [batch([0, 1, 2]), batch([3, 4, 5]), batch([6])]
    ahead = [stage.prepare(rows) for rows in given]
    answers = [stage.process(rows, prepared) for rows, prepared in zip(given, ahead, strict=True)]
    assert made == [seeds([0, 1, 2, 3]), seeds([4, 5, 6, 6])]
    assert [answer.column("image_seed").to_pylist() for answer in answers] == [
        seeds([0, 1, 2]), seeds([3, 4, 5]), seeds([6]),
    ]  # fmt: skip
    together = images(stage.process(batch(range(7))))
    assert [image for answer in answers for image in images(answer)] == together


def test_full_batches_are_made_before_they_are_asked_for(start: Callable[..., Generate]) -> None:
    stage = start()
    rows = batch(range(5))
    jobs = stage.prepare(rows)
    assert jobs is not None
    first = [job.made.result(timeout=60).data for job in jobs[:4]]
    assert not jobs[4].made.done()
    assert images(stage.process(rows, jobs))[:4] == first


def test_rows_that_nobody_asks_for_any_more_are_not_made(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = start()
    made = recorded(stage, monkeypatch)
    jobs = stage.prepare(batch([0, 1, 2]))
    del jobs
    gc.collect()
    stage.process(batch([9]))
    assert made == [seeds([9, 9, 9, 9])]


def test_a_batch_may_come_unprepared_or_in_halves(start: Callable[..., Generate]) -> None:
    stage = start()
    rows = batch([0, 1, 2])
    whole = images(stage.process(rows, stage.prepare(rows)))
    halves = [rows.slice(0, 1), rows.slice(1)]
    assert [image for half in halves for image in images(stage.process(half, stage.prepare(half)))] == whole
    assert [image for half in halves for image in images(stage.process(half))] == whole


def test_prepared_by_one_thread_and_processed_by_another(start: Callable[..., Generate]) -> None:
    stage = start()
    given = [batch(range(i, i + 3)) for i in range(0, 30, 3)]
    prepared: list[Any] = []

    def read() -> None:
        prepared.extend(stage.prepare(rows) for rows in given)

    reader = threading.Thread(target=read)
    reader.start()
    answers = []
    for i, rows in enumerate(given):
        while len(prepared) <= i:
            time.sleep(0.001)
        answers += images(stage.process(rows, prepared[i]))
    reader.join()
    assert answers == images(stage.process(batch(range(30))))


def test_closing_ends_the_threads_and_forgets_what_was_queued(start: Callable[..., Generate]) -> None:
    before = set(threading.enumerate())
    stage = start()
    jobs = stage.prepare(batch([0]))
    stage.close()
    assert set(threading.enumerate()) <= before
    assert jobs is not None and not jobs[0].made.done()
    stage.close()


# --- sizes ---


def test_each_sample_gets_one_of_the_sizes_by_its_hash(start: Callable[..., Generate]) -> None:
    sizes = [[64, 64], [64, 32], [32, 64]]
    stage = start(sizes=sizes)
    assert stage.resources.ahead == 5
    result = stage.process(batch(range(24)))
    found = list(zip(result.column("image_width").to_pylist(), result.column("image_height").to_pylist(), strict=True))
    assert [Image.open(io.BytesIO(data)).size for data in images(result)] == found
    assert {size: found.count(size) for size in set(found)} == {(64, 64): 6, (64, 32): 6, (32, 64): 12}
    assert set(result.column("image_batch_size").to_pylist()) == {BATCH}
    again = stage.process(batch([5], draw=1))
    assert (again["image_width"][0].as_py(), again["image_height"][0].as_py()) == found[5]
    assert images(stage.process(batch([7]))) == [images(result)[7]]


def test_sizes_are_chosen_equally_often() -> None:
    stage = Generate(GenerateOptions(sizes=[[64, 64], [64, 32], [32, 64]]))
    found = stage._sizes(batch(range(3000)))
    counts = [found.count(size) for size in stage.sizes]
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_the_size_nearest_to_the_original(start: Callable[..., Generate]) -> None:
    stage = start(sizes=[[64, 64], [96, 64], [64, 96]], size_by="aspect")
    assert stage.sql == "generate_aspect.sql"
    assert stage.inputs.names == ["key", "prompt", "draw", "width", "height"]
    rows = batch(range(4), width=[640, 300, 500, None], height=[427, 900, 512, 100])
    assert [Image.open(io.BytesIO(data)).size for data in images(stage.process(rows))] == [
        (96, 64), (64, 96), (64, 64), (64, 64),
    ]  # fmt: skip


def test_a_size_that_is_not_the_largest_is_tried_too(models: dict[str, Path]) -> None:
    assert refused(model=str(models["dit"]), sizes=[[64, 64], [40, 64]]).splitlines()[1:4] == [
        f"  model: {models['dit']}", "  size: 40x64 px", "  device: cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(100, 100, (64, 64)), (122, 100, (64, 64)), (123, 100, (96, 64)), (100, 123, (64, 96)), (1, 4000, (64, 96)),
     (0, 5, (64, 64)), (None, None, (64, 64))],
)  # fmt: skip
def test_nearest(width: int | None, height: int | None, size: tuple[int, int]) -> None:
    assert nearest([(64, 64), (96, 64), (64, 96)], width, height) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "diffusers", "width": 100}, "100x384 px: backend 'diffusers' takes multiples of 8"),
        ({"size_by": "aspect"}, "size_by = 'aspect' needs sizes"),
        ({"model": "models/flux"}, "model = 'models/flux' has no effect without backend = \"diffusers\""),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GenerateOptions(**options)
    assert caught.value.errors()[0]["msg"] == f"Value error, {message}"


# --- memory and other faults ---


def out_of_memory_above(
    limit: int, monkeypatch: pytest.MonkeyPatch, method: str = "make", error: type[Exception] | None = None
) -> None:
    """Lets every model fail, from now on, on more than `limit` images at once, as torch does."""
    import torch

    real = getattr(Diffusion, method)

    def failing(self: Diffusion, first: Sequence[Any], *more: Any) -> Any:
        if len(first) > limit:
            raise (error or torch.OutOfMemoryError)("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, first, *more)

    monkeypatch.setattr(Diffusion, method, failing)


@pytest.mark.parametrize("method", ["make", "encode"])
def test_out_of_memory_halves_the_batch_for_good(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    wanted = images(start(batch_size=2).process(batch(range(7))))
    stage = start(batch_size=8)
    out_of_memory_above(3, monkeypatch, method)
    result = stage.process(batch(range(7)))
    assert result.column("image_batch_size").to_pylist() == [2] * 7
    assert images(result) == wanted
    assert stage.take_notes() == [
        {"note": "out of memory", "batch_size": 8, "batch_size_now": 4},
        {"note": "out of memory", "batch_size": 4, "batch_size_now": 2},
    ]
    assert stage.take_notes() == []
    made = recorded(stage, monkeypatch)
    assert images(stage.process(batch([0]))) == wanted[:1]
    assert made == [seeds([0, 0])]


def test_out_of_memory_for_prompts_that_are_encoded_again(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halved once by the images, and again by the prompts that are encoded anew for that size."""
    wanted = images(start(batch_size=1).process(batch(range(4))))
    stage = start(batch_size=4)
    jobs = stage.prepare(batch(range(3)))
    out_of_memory_above(2, monkeypatch)
    out_of_memory_above(1, monkeypatch, "encode")
    result = stage.process(batch(range(3)), jobs)
    assert result.column("image_batch_size").to_pylist() == [1] * 3
    assert images(result) == wanted[:3]


def test_out_of_memory_at_the_start(start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(1, monkeypatch)
    stage = start()
    assert [note["batch_size_now"] for note in stage.take_notes()] == [2, 1]
    assert stage.process(batch([1, 2])).column("image_batch_size").to_pylist() == [1, 1]


def test_not_even_one_image_fits(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]
) -> None:
    out_of_memory_above(0, monkeypatch)
    before = set(threading.enumerate())
    with pytest.raises(StageError) as caught:
        start()
    assert str(caught.value) == (
        "the model makes no image: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
        f"  model: {models['sd']}\n"
        "  size: 64x64 px\n"
        "  device: cpu\n"
        '  fix: set a smaller size, weights = "fp8", vae_slicing or vae_tiling'
    )
    assert set(threading.enumerate()) <= before


def test_what_counts_as_out_of_memory() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


def test_a_row_that_the_model_fails_on_fails_alone(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = start()
    wanted = images(stage.process(batch(range(8))))
    make, bad = Diffusion.make, seeds([2])[0]

    def failing(self: Diffusion, texts: Any, given: Sequence[int], size: tuple[int, int]) -> Any:
        if bad in given:
            raise ValueError("a poisoned prompt")
        return make(self, texts, given, size)

    monkeypatch.setattr(Diffusion, "make", failing)
    given = [batch([0, 1, 2]), batch([3, 4, 5, 6, 7])]
    ahead = [stage.prepare(rows) for rows in given]
    with pytest.raises(RowsFailed) as caught:
        stage.process(given[0], ahead[0])
    assert {i: str(error) for i, error in caught.value.errors.items()} == {2: "a poisoned prompt"}
    assert images(caught.value.result) == [*wanted[:2], None]
    assert caught.value.result.column("image_batch_size").to_pylist() == [BATCH, BATCH, None]
    assert images(stage.process(given[1], ahead[1])) == wanted[3:]


def test_values_that_are_no_numbers_are_no_image(start: Callable[..., Generate]) -> None:
    import torch

    stage = start()
    with torch.no_grad():
        model_of(stage)._pipe.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(RowsFailed) as caught:
        stage.process(batch([1]))
    assert str(caught.value.errors[0]) == "the model's image has values that are not numbers: try another dtype"


def test_an_image_that_the_models_own_safety_checker_blacked_out_is_none(
    start: Callable[..., Generate], models: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    plain = StableDiffusionPipeline.from_pretrained(models["sd"], local_files_only=True)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=small, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=16)
    )
    looks = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for threshold, folder in ((2.0, "calm"), (-2.0, "strict")):
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        parts = {**plain.components, "safety_checker": checker, "feature_extractor": looks}
        StableDiffusionPipeline(**parts).save_pretrained(tmp_path / folder)
    calm, strict = (
        Generate(GenerateOptions(backend="diffusers", model=str(tmp_path / name), **SMALL))
        for name in ("calm", "strict")
    )
    calm.setup("cpu")
    strict.setup("cpu")
    assert images(calm.process(batch([1]))) == images(start().process(batch([1])))
    with pytest.raises(RowsFailed) as caught:
        strict.process(batch([1]))
    assert [error_text(error) for error in caught.value.errors.values()] == [
        "Unsafe: the model's own safety checker blacked the image out"
    ]
    calm.close()
    strict.close()


def test_sana_is_heard_where_its_vae_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipelines catch the error, warn, and fail on the image that is not there."""
    import torch
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    forward = Decoder.forward

    def failing(self: Any, latents: Any) -> Any:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, latents)

    monkeypatch.setattr(Decoder, "forward", failing)
    model = tiny_diffusers.make_sprint(tmp_path)
    stage = Generate(GenerateOptions(backend="diffusers", model=str(model), **SMALL))
    stage.setup("cpu")
    assert stage.process(batch(range(3))).column("image_batch_size").to_pylist() == [2] * 3
    stage.close()


# --- what stops the stage before the first row ---


def refused(device: str = "cpu", **options: Any) -> str:
    stage = Generate(GenerateOptions(backend="diffusers", **{**SMALL, **options}))
    with pytest.raises(StageError) as caught:
        stage.setup(device)
    assert stage._backend is None
    return str(caught.value)


def test_no_model_is_named() -> None:
    assert refused() == (
        "backend 'diffusers' needs a model\n  fix: set model to a directory or a hub id: model = \"models/sd-turbo\""
    )


@pytest.mark.parametrize("model", ["/nowhere/sd", "./sd", "models", "a/b/c"])
def test_a_model_directory_that_is_not_there(model: str) -> None:
    assert refused(model=model) == (
        f"there is no model directory '{model}'\n"
        "  fix: name a directory that diffusers' save_pretrained wrote, or a hub id: owner/name"
    )


def test_a_directory_without_a_pipeline(tmp_path: Path) -> None:
    assert refused(model=str(tmp_path)) == (
        f"'{tmp_path}' is not a diffusers pipeline: it has no model_index.json\n"
        "  fix: name the directory that save_pretrained or `hf download` wrote"
    )


def test_a_directory_that_is_not_whole(tmp_path: Path) -> None:
    import shutil

    folder = tiny_diffusers.make_sd(tmp_path / "sd")
    shutil.rmtree(folder / "unet")
    message = refused(model=str(folder))
    assert message.startswith(f"model '{folder}' cannot be loaded: ")
    assert message.endswith(
        "\n  fix: check that the directory is complete: load it with diffusers' AutoPipelineForText2Image by hand"
    )


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused(model="nobody/nothing")
    assert message.startswith("model 'nobody/nothing' cannot be loaded: ")
    assert message.endswith(
        "\n  fix: fetch it where there is a network, hf download nobody/nothing --local-dir DIR, and set model = DIR"
    )


def test_a_device_that_is_not_there(models: dict[str, Path]) -> None:
    import torch

    count = torch.cuda.device_count()
    assert refused("cuda:99", model=str(models["sd"])) == (
        f"there is no device 'cuda:99': torch {torch.__version__} sees {count} CUDA devices\n"
        '  fix: see nvidia-smi and CUDA_VISIBLE_DEVICES, or set devices = ["cpu"]'
    )
    assert refused("gpu", model=str(models["sd"])) == (
        'there is no device \'gpu\'\n  fix: devices = ["cpu"] or ["cuda:0", "cuda:1"]'
    )


def test_a_pipeline_without_prompts(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert refused(model=str(tmp_path)) == (
        "'DDPMPipeline' makes no images of prompts: it takes no 'prompt'\n"
        f"  model: {tmp_path}\n"
        "  pipeline: DDPMPipeline\n"
        "  fix: name a text-to-image model"
    )


@pytest.mark.parametrize(
    ("model", "kind", "options", "what", "fix"),
    [
        ("sd", "StableDiffusionPipeline", {"max_sequence_length": 100},
         "'StableDiffusionPipeline' does not take the option 'max_sequence_length'", "take max_sequence_length out"),
        ("dit", "PixArtSigmaPipeline", {"lora": "x"}, "'PixArtSigmaPipeline' does not take a LoRA", "take lora out"),
    ],
)  # fmt: skip
def test_an_option_that_the_pipeline_does_not_take(
    models: dict[str, Path], model: str, kind: str, options: dict[str, Any], what: str, fix: str
) -> None:
    place = models[model]
    assert refused(model=str(place), **options) == f"{what}\n  model: {place}\n  pipeline: {kind}\n  fix: {fix}"


def test_options_that_cannot_be_met(models: dict[str, Path]) -> None:
    sd = str(models["sd"])
    assert refused(model=sd, scheduler="EulerDiscreetScheduler") == (
        "diffusers has no scheduler 'EulerDiscreetScheduler'\n  fix: did you mean 'EulerDiscreteScheduler'?"
    )
    assert refused(model=sd, scheduler="UNet2DModel") == (
        "diffusers has no scheduler 'UNet2DModel'\n  fix: name a class such as EulerDiscreteScheduler"
    )
    assert refused(model=sd, scheduler="DPMSolverSDEScheduler") == (
        "scheduler 'DPMSolverSDEScheduler' needs torch and torchsde\n  fix: install them, or name another one"
    )
    assert refused(model=sd, lora="./lora.safetensors") == (
        "there is no LoRA file './lora.safetensors'\n  fix: name a file or directory that exists, or a hub id"
    )
    assert refused(model=sd, negative_prompt="blur", guidance=1.0) == (
        f"negative_prompt has no effect with guidance = 1\n  model: {sd}\n"
        "  fix: set guidance above 1, or take negative_prompt out"
    )
    assert refused(model=sd, attention="nonsense").startswith('attention = "nonsense" cannot be set: ValueError: ')


def test_a_size_that_the_pipeline_does_not_make(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX and others round a size without a word."""
    from diffusers import StableDiffusionPipeline

    call = StableDiffusionPipeline.__call__

    def rounding(self: Any, prompt: Any = None, height: Any = None, width: Any = None, **more: Any) -> Any:
        return call(self, prompt=prompt, height=height // 16 * 16, width=width // 16 * 16, **more)

    rounding.__signature__ = __import__("inspect").signature(call)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", rounding)
    assert refused(model=str(models["sd"]), width=72) == (
        "the model makes no image: ValueError: asked for 72x64 px, the pipeline made 64x64\n"
        f"  model: {models['sd']}\n"
        "  size: 72x64 px\n"
        "  device: cpu\n"
        "  fix: set another dtype, size, scheduler or number of steps, as the model's card says"
    )


def test_a_scheduler_whose_noise_no_seed_decides(tmp_path: Path) -> None:
    """Stable Diffusion 3 does not give its scheduler the generators."""
    model = str(tiny_diffusers.make_sd3(tmp_path))
    told = refused(model=model, scheduler="LCMScheduler", guidance=1.0, max_sequence_length=16).splitlines()
    assert float(told.pop(3).removeprefix("  difference: ")) > 1
    assert told == [
        "the model makes another image of the same prompt and seed each time",
        f"  model: {model}",
        "  device: cpu",
        "  tolerance: 1",
        "  fix: set another scheduler: the noise of this one does not depend on the seed",
    ]


def test_a_model_that_lets_images_of_a_batch_change_each_other(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = start(steps=1)
    make = Diffusion.make

    def leaking(self: Diffusion, texts: Any, given: Sequence[int], size: tuple[int, int]) -> Any:
        return make(self, texts, [sum(given) % 2**63] * len(given), size)

    monkeypatch.setattr(Diffusion, "make", leaking)
    rows = batch(range(BATCH))
    with pytest.raises(StageError) as caught:
        check_alone(stage, rows, [(0, stage.process(rows))])
    assert caught.value.fix == (
        "its model lets rows of one batch change each other: use another model, or batch_size = 1 in [stages.generate]"
    )


# --- options that decide ---


def test_options_reach_the_pipeline(start: Callable[..., Generate], models: dict[str, Path]) -> None:
    rows = batch([0, 1])
    plain = start(guidance=3.0)
    first = plain.process(rows)
    for options in (
        {"negative_prompt": "number"},
        {"guidance": 5.0},
        {"guidance": 0.0},
        {"steps": 3},
        {"scheduler": "EulerAncestralDiscreteScheduler"},
        {"dtype": "float16"},
    ):
        stage = start(**{"guidance": 3.0, **options})
        result = stage.process(rows)
        assert images(result) != images(first), options
        assert images(stage.process(batch([1, 0])))[::-1] == images(result), options
        stage.close()
    for same in ({"vae_slicing": True}, {"attention": "native"}):
        stage = start(**{"guidance": 3.0, **same})
        assert stage.difference(stage.process(rows), first) < 1, same
        stage.close()
    tiling = start(vae_tiling=True)
    assert model_of(tiling)._pipe.vae.use_tiling


def test_fp8_weights_are_stored_so_and_make_nearly_the_same_image(start: Callable[..., Generate]) -> None:
    import torch

    plain, small = start("dit"), start("dit", weights="fp8")
    kinds = {parameter.dtype for parameter in model_of(small)._pipe.transformer.parameters()}
    assert torch.float8_e4m3fn in kinds
    rows = batch(range(3))
    result = small.process(rows)
    assert 0 < small.difference(result, plain.process(rows)) < 40
    assert images(small.process(batch([2]))) == images(result)[2:]


def test_a_lora_is_fused_at_its_scale(start: Callable[..., Generate], models: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(models["sd"], local_files_only=True)
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    rows = batch([0, 1])
    plain = images(start().process(rows))
    path = str(tmp_path / "pytorch_lora_weights.safetensors")
    scaled = [images(start(lora=path, lora_scale=scale).process(rows)) for scale in (0.0, 1.0, 2.0)]
    assert scaled[0] == plain
    assert len({images_[0] for images_ in scaled}) == 3
    (tmp_path / "other").mkdir()
    assert refused(model=str(models["sd"]), lora=str(tmp_path / "other")).startswith(
        f"LoRA '{tmp_path / 'other'}' cannot be loaded: "
    )


def test_a_pipeline_of_another_class_encodes_prompts_itself(
    start: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch
) -> None:
    from builder.models.images import diffusion

    rows = batch(range(5))
    first = images(start().process(rows))
    monkeypatch.setattr(diffusion, "ENCODED", {})
    stage = start()
    assert model_of(stage).encode(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]
    assert images(stage.process(rows)) == first


# --- the command line ---

STAGES = """\
[stages.faces]
source = "json"

[stages.lang]

[stages.prompts.params]
min_faces = 1
lang = "en"

[stages.generate]
backend = "diffusers"
model = "{model}"
dtype = "float32"
steps = 2
width = 64
height = 64
batch_size = 4
"""


DRAWN = """\
[stages.generate]
sql = "{folder}/drawn.sql"
backend = "diffusers"
model = "{model}"
dtype = "float32"
steps = 2
sizes = [[64, 64], [64, 32]]
batch_size = 4
"""


def test_the_whole_way_gives_the_same_bytes_with_other_batches(
    workspace: Callable[..., Workspace], models: dict[str, Path]
) -> None:
    shards = {"00000000": samples(8), "00000001": samples(5, start=8)}
    made = workspace(shards, stages=STAGES.format(model=models["sd"]))
    first = made.run("run")
    assert "generate: 8 rows, 8 ok" in first.stdout + first.stderr
    made.run("verify")
    rows = made.rows(
        "select image_model, image_steps, image_batch_size, image_draw, image_guidance, image_width from samples"
    )
    assert [row for row in rows if row[0]] == [("sd", 2, 4, 0, 7.5, 64)] * 8
    tars = {path.name: read_tar(path) for path in sorted((made.root / "shards").glob("*.tar"))}
    assert [len(members) for members in tars.values()] == [24, 15]
    before = digest(made)
    made.run("stage", "generate", "--redo", "--set", "stages.generate.run.batch_rows=3")
    assert digest(made) == before


@pytest.fixture
def pictured(workspace: Callable[..., Workspace], models: dict[str, Path]) -> Workspace:
    """Six samples with an image each, made in this process."""
    made = workspace({"00000000": samples(6)}, stages=DRAWN.format(model=models["sd"], folder="{folder}"))
    (made.folder / "drawn.sql").write_text(
        "select shard, row, uid, key, caption as prompt, coalesce(image_draw + $draw, 0) as draw from samples"
    )
    made.file.write_text(made.file.read_text().replace("{folder}", str(made.folder)))
    pipeline = made.load()
    ingest_here(pipeline)
    run = planned.described(pipeline, "generate", Choice(), 1)
    assert planned.do(pipeline.layout, run, pipeline.stages["generate"].stage).ok == 6
    return made


def test_an_image_that_comes_out_otherwise_is_told_with_what_is_not_as_it_was(
    pictured: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    [description] = pictured.root.glob("runs/*/run.json")
    data = json.loads(description.read_text())
    versions = {name: data["packages"].pop(name) for name in ("torch", "peft")}
    data["packages"] |= {"torch": "1.0"}
    data["options"]["steps"] = 3
    description.write_text(json.dumps(data))
    monkeypatch.setattr("builder.models.images.diffusion.name_of_device", lambda device: "NVIDIA H200")
    out_of_memory_above(2, monkeypatch)
    again = pictured.run("regen", "00000000:1", "--check", check=False)
    [pixels] = re.findall(r"pixels differ by .* of 255 on average, \d+ at most", again.stdout)
    assert (again.returncode, again.stdout) == (
        3,
        f"sample {1:032x}: shard 00000000 row 1\n"
        f"another image: {pixels}\n"
        f"  peft: not recorded, now {versions['peft']}\n"
        f"  torch: 1.0, now {versions['torch']}\n"
        "  image_steps: 2, now 3\n"
        "  image_batch_size: 4, now 2\n"
        f"  image_device: {this_cpu()}, now NVIDIA H200\n",
    )


def this_cpu() -> str:
    import torch

    threads = torch.get_num_threads()
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" + (f", {threads} threads" if threads > 1 else "")


def test_the_threads_of_a_cpu_are_told_where_an_image_is_made_again_with_others(pictured: Workspace) -> None:
    """They decide its last bits."""
    import torch

    [(before,)] = pictured.rows("select image_device from samples where row = 0")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        told = pictured.run("regen", "00000000:0", "--check", "--json", check=False).stdout
    finally:
        torch.set_num_threads(threads)
    now = f"{before.partition(',')[0]}, {threads + 1} threads"
    assert json.loads(told)["reasons"] == [f"image_device: {before}, now {now}"]


def test_an_image_is_made_again_though_the_sql_of_its_run_no_longer_returns_it(pictured: Workspace) -> None:
    [description] = pictured.root.glob("runs/*/run.json")
    data = json.loads(description.read_text())
    data["sql"]["text"] += " where image_path is null"
    description.write_text(json.dumps(data))
    again = pictured.run("regen", "00000000:1", "--check", check=False)
    assert (again.returncode, again.stdout) == (
        0, f"sample {1:032x}: shard 00000000 row 1\nthe same image, bit for bit\n",
    )  # fmt: skip


@pytest.mark.parametrize("method", ["make", "encode"])
def test_a_device_that_computes_no_more_marks_no_row(
    pictured: Workspace, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As with a GPU that fell off its bus: every call fails from then on, also one that computes a single number."""
    real, calls = getattr(Diffusion, method), []
    pipeline = pictured.load("stages.generate.sizes=[[64, 64]]", "stages.generate.batch_size=1")
    run = planned.described(pipeline, "generate", Choice(redo=True, next_draw=True), 1)
    lost = StageError("device 'cuda:0' no longer computes: AcceleratorError: CUDA error: unspecified launch failure")

    def failing(self: Diffusion, *given: Any) -> Any:
        calls.append(given)
        if len(calls) > 4:  # one at the start, and three rows
            raise RuntimeError("CUDA error: unspecified launch failure")
        return real(self, *given)

    def check(self: Diffusion) -> None:
        if len(calls) > 4:
            raise lost

    monkeypatch.setattr(Diffusion, method, failing)
    monkeypatch.setattr(Diffusion, "check", check)
    with pytest.raises(StageError) as caught:
        planned.do(pipeline.layout, run, pipeline.stages["generate"].stage, batch_rows=1, checkpoint_rows=1)
    assert caught.value is lost
    partitions.heal(pipeline.layout, ["00000000"])
    found = pictured.rows("select generate_status, count(*), count(image_path) from samples group by 1")
    assert found == [("ok", 6, 6)]
    assert pictured.rows("select row, image_draw from samples order by row") == [*((i, i < 3) for i in range(6))]


def digest(made: Workspace) -> list[tuple[Any, ...]]:
    found = made.rows("select uid, image_sha256, image_seed from samples where image_path is not null order by uid")
    assert len({row[1] for row in found}) == len(found) == 8
    return found


def test_a_missing_model_marks_no_row(workspace: Callable[..., Workspace]) -> None:
    made = workspace(stages=STAGES.format(model="/nowhere/sd"))
    done = made.run("run", check=False)
    assert done.returncode == 1
    assert "there is no model directory '/nowhere/sd'" in done.stderr
    assert made.rows("select count(*) from samples where generate_status is not null") == [(0,)]


def test_the_measurement_on_a_gpu_goes_its_whole_way_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from bench import gpu_generate

    threads = torch.get_num_threads()
    try:
        gpu_generate.main(["--tiny"])
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    for name in ("FLUX.1-schnell", "SDXL-Turbo"):
        [line] = re.findall(rf"^{re.escape(name)}, compile off, batch 2: (.*)$", told, re.M)
        figures = re.fullmatch(
            r"bare ([\d.]+) images/s, stage ([\d.]+) images/s \([\d.]+ x\), network ([\d.]+) TFLOP a call, "
            r"([\d.e-]+) TFLOP/s, [\d.]+% of peak",
            line,
        )
        assert figures, line
        assert float(figures[1]) > 0 < float(figures[2])
        assert float(figures[4]) > 0
        [best] = re.findall(rf"^{re.escape(name)}: best stage (.*)$", told, re.M)
        assert re.fullmatch(
            rf"{figures[2]}, best bare {figures[1]} images/s: [\d.]+ x, target 0.97; "
            r"network [\d.]+% of peak, target 60%",
            best,
        )


def test_the_tiny_models_have_the_same_weights_whenever_they_are_made(models: dict[str, Path], tmp_path: Path) -> None:
    """Making the tiny models again gives the same weights: the tests of another process see the same images."""
    again = tiny_diffusers.make_sd(tmp_path / "sd")
    for name in ("unet", "vae"):
        files = [folder / name / "diffusion_pytorch_model.safetensors" for folder in (models["sd"], again)]
        assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1


def test_the_blocks_of_the_docs_are_valid() -> None:
    text = (ROOT / "docs/generate.md").read_text("utf-8")
    blocks = [tomllib.loads(block)["stages"]["generate"] for block in re.findall(r"```toml\n(.*?)```", text, re.S)]
    models = [
        GenerateOptions(**{key: value for key, value in block.items() if key != "run"}).model
        for block in blocks
        if "backend" in block
    ]
    assert len(models) == 8
    assert re.findall(r"^### (.*)$", text, re.M) == [
        "FLUX.1-schnell", "FLUX.2-klein", "SD-Turbo", "SDXL-Turbo", "SANA-Sprint", "PixArt-Sigma", "Stable Diffusion 3",
    ]  # fmt: skip


def test_a_third_back_end_makes_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry is all that the stage needs: options are checked, batches prepared ahead, rows fail alone."""

    class Plain:
        name, steps, guidance, device_name = "plain", 7, None, "cpu"

        def add(self, jobs: list[Job]) -> list[Job]:
            return jobs

        def answers(self, jobs: list[Job]) -> list[Made | Exception]:
            return [ValueError("no") if job.prompt.endswith("1") else Made(job.prompt.encode(), 2) for job in jobs]

        def take_notes(self) -> list[dict[str, Any]]:
            return [{"note": "a"}]

        def close(self) -> None:
            closed.append(self.name)

    closed: list[str] = []
    checked: list[Any] = []
    third = ImageBackendEntry(lambda options, sizes, device: Plain(), checked.append, gpus=1, tolerance=0.5)
    monkeypatch.setitem(BACKENDS, "third", third)
    options = GenerateOptions(batch_size=2).model_copy(update={"backend": "third"})
    stage = Generate(options)
    assert (stage.tolerance, stage.resources.gpus, stage.resources.batch_rows) == (0.5, 1, 2)
    stage.check_setup()
    stage.setup("cpu")
    with pytest.raises(RowsFailed) as failed:
        stage.process(batch([0, 1]), stage.prepare(batch([0, 1])))
    assert str(failed.value.errors) == "{1: ValueError('no')}"
    first = failed.value.result.to_pylist()[0]
    assert (first["image"], first["image_model"], first["image_steps"]) == (b"a photo of number 0", "plain", 7)
    assert stage.take_notes() == [{"note": "a"}]
    stage.close()
    assert (checked, closed) == ([options], ["plain"])

"""The stage `check`: faces, blank and unsafe pictures among the generated ones, and SQL that decides by it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image

from builder.errors import StageError
from builder.stages.check import Check, CheckOptions, grey_std
from builder.stages.contract import RowsFailed
from conftest import STANDARD_STAGES, Workspace
from support.toy_scrfd import magenta, write_toy

Make = Callable[..., Workspace]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def batch(*images: bytes | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(images, pa.large_binary())], names=["edit"])


def checked(stage: Check, *images: bytes | None) -> list[dict[str, object]]:
    rows = batch(*images)
    found: list[dict[str, object]] = stage.process(rows, stage.prepare(rows)).to_pylist()
    return found


# --- blank and noise ---


def test_std_of_the_grey_image() -> None:
    half = np.zeros((10, 10, 3), np.uint8)
    half[:, 5:] = 255
    assert grey_std(half) == 127.5
    assert grey_std(np.full((7, 3, 3), (200, 10, 90), np.uint8)) == 0
    red = np.zeros((2, 2, 3), np.uint8)
    red[0, :, 0] = 100  # grey 29.9 and 0, half each
    assert grey_std(red) == 14.95
    assert grey_std(np.arange(12, dtype=np.uint8).reshape(4, 1, 3)) == pytest.approx(np.std([0, 3, 6, 9]), abs=1)


def test_std_is_that_of_numpy_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    image = skimage.data.astronaut()
    wanted = (image.astype(np.float64) @ [0.299, 0.587, 0.114]).std()
    assert grey_std(image) == pytest.approx(wanted, abs=1e-6)
    monkeypatch.setattr("builder.stages.check._SUMMED", 1001)
    assert grey_std(image) == pytest.approx(wanted, abs=1e-6)


# --- faces ---


def test_faces_of_generated_images() -> None:
    stage = Check(CheckOptions())
    stage.setup("cpu")
    person, blank = png(skimage.data.astronaut()), png(np.full((64, 64, 3), 7))
    found = checked(stage, person, blank, person)
    assert [row["check_faces"] for row in found] == [1, 0, 1]
    assert found[1] == {"check_faces": 0, "check_std": 0.0, "check_nsfw": None}
    assert found[0]["check_std"] == grey_std(skimage.data.astronaut())
    assert found[0] == found[2]
    stage.close()


def test_images_that_do_not_decode_fail_alone() -> None:
    stage = Check(CheckOptions())
    stage.setup("cpu")
    with pytest.raises(RowsFailed) as caught:
        checked(stage, png(np.zeros((8, 8, 3))), b"no image", None)
    assert {row: str(error) for row, error in caught.value.errors.items()} == {
        1: "the picture does not decode: no image format begins so",
        2: "the sample has no generated image",
    }
    assert caught.value.result.column("check_std").to_pylist() == [0, None, None]


def test_faces_by_scrfd(tmp_path: Path) -> None:
    model = str(write_toy(tmp_path / "toy.onnx", "batched"))
    stage = Check(CheckOptions(detector="scrfd", model=model, input_px=320, detector_batch=2, decode_threads=2))
    stage.setup("cpu")
    images = [magenta(320, 320, [(64, 96, 80, 112)]), magenta(320, 320, []), magenta(320, 320, [(16, 16, 32, 32)])]
    assert [row["check_faces"] for row in checked(stage, *images)] == [1, 0, 1]
    assert stage.tolerance == 0.001
    stage.close()


# --- unsafe ---


def classifier(folder: Path, labels: dict[int, str], **more: str) -> str:
    """A tiny ViT of random weights, and its processor."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        id2label=labels, label2id={name: number for number, name in labels.items()}, **more,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    model.classifier.weight.data *= 100  # so that pictures differ clearly
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_a_safety_checker_says_how_unsafe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier(tmp_path / "model", {0: "normal", 1: "NSFW", 2: "odd"})
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = "~/model"
    images = [png(skimage.data.astronaut()), png(skimage.data.coffee()), png(np.full((32, 32, 3), 7))]
    stages = {
        name: Check(CheckOptions(nsfw_model=folder, nsfw_labels=labels))
        for name, labels in {"default": [], "nsfw": ["nsfw"], "rest": ["Normal", "ODD"]}.items()
    }
    scores = {}
    for name, stage in stages.items():
        stage.setup("cpu")
        scores[name] = np.array([row["check_nsfw"] for row in checked(stage, *images)])
        alone = [checked(stage, image)[0]["check_nsfw"] for image in images]
        assert scores[name].tolist() == alone
        stage.close()
    assert (scores["default"] == scores["nsfw"]).all()
    assert scores["nsfw"] + scores["rest"] == pytest.approx([1, 1, 1], abs=2e-6)
    assert len(set(scores["nsfw"].tolist())) == 3
    assert ((scores["nsfw"] >= 0) & (scores["nsfw"] <= 1)).all()


@pytest.mark.parametrize(
    ("labels", "more"),
    [
        ({0: "normal", 1: "nsfw"}, {}),
        ({0: "nsfw"}, {}),
        ({0: "cat", 1: "nsfw"}, {"problem_type": "multi_label_classification"}),
    ],
)
def test_the_score_is_that_of_transformers(tmp_path: Path, labels: dict[int, str], more: dict[str, str]) -> None:
    folder = classifier(tmp_path / "model", labels, **more)
    from transformers import pipeline

    wanted = pipeline("image-classification", folder, device="cpu")(Image.fromarray(skimage.data.astronaut()))
    stage = Check(CheckOptions(nsfw_model=folder))
    stage.setup("cpu")
    [found] = checked(stage, png(skimage.data.astronaut()))
    assert found["check_nsfw"] == pytest.approx(next(x["score"] for x in wanted if x["label"] == "nsfw"), abs=1e-5)


def refusal(options: CheckOptions) -> str:
    with pytest.raises(StageError) as caught:
        Check(options).setup("cpu")
    return str(caught.value)


def test_a_safety_checker_that_cannot_start_is_told(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", {0: "cat", 1: "dog"})
    assert refusal(CheckOptions(nsfw_model=folder)) == (
        f"no label of the image classifier means unsafe\n  folder: {folder}\n  its labels: cat, dog\n"
        '  fix: name those that do: nsfw_labels = ["..."]'
    )
    assert refusal(CheckOptions(nsfw_model=folder, nsfw_labels=["dog", "bird"])) == (
        f"the image classifier has no label 'bird'\n  folder: {folder}\n  its labels: cat, dog\n"
        '  fix: name those that do: nsfw_labels = ["..."]'
    )
    assert refusal(CheckOptions(nsfw_model=str(tmp_path / "none"))) == (
        f"there is no model in '{tmp_path / 'none'}'\n  looked for: {tmp_path / 'none/config.json'}\n"
        "  fix: set nsfw_model to a folder with an image classifier, as save_pretrained writes it"
    )
    (tmp_path / "model/config.json").write_text("{}")
    told = refusal(CheckOptions(nsfw_model=folder))
    assert told.startswith("the image classifier cannot be loaded: ")
    assert told.endswith(
        f"\n  folder: {folder}\n"
        "  fix: set nsfw_model to a folder with an image classifier and its preprocessor_config.json"
    )


# --- through the command line ---


def test_generated_images_are_checked_and_sql_decides(workspace: Make) -> None:
    made = workspace(stages=STANDARD_STAGES + '\n[stages.check]\n\n[write]\nselect = "write.sql"\n')
    sql = made.folder / "write.sql"
    columns = (
        "shard, row, uid, image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed, "
        "image_model, image_prompt, prompt"
    )
    sql.write_text(f"select {columns} from samples where image_path is not null and check_std > 1000")
    made.run("run", cwd=made.folder)
    [counts] = made.rows(
        "select count(*), count(image_path), count(check_faces), count(check_nsfw), count(check_status), "
        "min(check_std) > 1 and max(check_std) < 128, max(check_faces) from samples"
    )
    assert counts[0] == 16
    assert counts[1] == counts[2] == counts[4] > 0
    assert counts[3:] == (0, counts[1], True, 0)
    source, hybrid = (made.folder / "source/00000000.tar", made.root / "shards/00000000.tar")
    assert hybrid.read_bytes() == source.read_bytes()  # no image was good enough
    sql.write_text(f"select {columns} from samples where check_faces = 0 and check_std > 1")
    made.run("write", cwd=made.folder)
    assert hybrid.read_bytes() != source.read_bytes()
    made.run("verify", cwd=made.folder)
    assert "check: nothing to do" in made.run("stage", "check", cwd=made.folder).stderr
    before = made.rows("select check_faces, check_std from samples order by shard, row")
    again = made.run("stage", "check", "--redo", "--set", "stages.check.run.batch_rows=1", cwd=made.folder)
    assert again.returncode == 0
    assert made.rows("select check_faces, check_std from samples order by shard, row") == before


def test_an_image_that_is_drawn_again_is_stale(workspace: Make) -> None:
    made = workspace(stages=STANDARD_STAGES + "\n[stages.check]\n")
    made.run("run")
    assert "check: nothing to do" in made.run("stage", "check", "--stale").stderr
    made.run("stage", "generate", "--redo", "--set", "stages.generate.seed=5", "--where", "shard = '00000000'")
    counted = made.rows("select count(image_path) from samples where shard = '00000000'")[0][0]
    assert f"{counted} rows" in made.run("stage", "check", "--stale").stderr.replace(f"{counted} of ", "")


def test_checking_loads_no_torch_without_a_safety_checker() -> None:
    before = "torch" in sys.modules
    stage = Check(CheckOptions())
    stage.setup("cpu")
    stage.close()
    assert ("torch" in sys.modules) == before

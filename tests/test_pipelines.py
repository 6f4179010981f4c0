"""The pipelines that come with builder: complete, and alike but for sizes, places and backends."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from builder.errors import ConfigError
from builder.sources.tars.finding import expand_braces
from builder.stages.finding import built_in
from builder.store import layout
from builder.verbs.pipeline import load_pipeline

FOLDER = layout.installed("pipelines")
SCALES = ("small", "large")
#: Keys in which the scales may differ: sizes, places, backends.
MAY_DIFFER = (
    r"dataset\.(name|shards|root)|run\.(executor|workers|devices|checkpoint_rows|checkpoint_seconds)"
    r"|stages\.(faces|prompts|generate|check)\..+"
)


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key with its section, and its value."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def keys(scale: str) -> dict[str, Any]:
    return flat(tomllib.loads((FOLDER / f"{scale}.toml").read_text("utf-8")))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys that only one has, or that differ without leave."""
    apart = set(one) ^ set(other) | {name for name in set(one) & set(other) if one[name] != other[name]}
    return sorted(name for name in apart if not re.fullmatch(MAY_DIFFER, name))


def test_every_pipeline_is_of_a_known_scale() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == sorted(SCALES)


@pytest.mark.parametrize("scale", SCALES)
def test_it_loads(scale: str) -> None:
    pipeline = load_pipeline(FOLDER / f"{scale}.toml")
    assert pipeline.config.dataset.name == scale
    assert sorted(pipeline.stages) == list(built_in())
    assert all(use.sql.text for use in pipeline.stages.values())
    assert pipeline.config.write.select == "sql/write.sql"


@pytest.mark.parametrize(("scale", "count"), [("small", 336), ("large", 43_028)])
def test_it_names_the_shards_of_its_scale(scale: str, count: int) -> None:
    names = list(expand_braces(keys(scale)["dataset.shards"]))
    assert (len(names), Path(names[0]).name, Path(names[-1]).name) == (count, "00000000.tar", f"{count - 1:08d}.tar")


def test_scales_differ_in_sizes_places_and_backends_only() -> None:
    assert differing(keys("small"), keys("large")) == []


def test_another_difference_would_be_told() -> None:
    small = keys("small")
    assert differing(small, {**small, "run.workers": 99, "stages.generate.backend": "x"}) == []
    other = {**small, "stages.lang.threshold": 0.4, "stages.lang.new": 1, "write.select": "x"}
    assert differing(small, other) == ["stages.lang.new", "stages.lang.threshold", "write.select"]


def test_their_sections_stand_in_the_same_order() -> None:
    """One file is read beside the other; only large has backends that are worth workers of their own."""
    heads = [re.findall(r"^\[(.+)\]", (FOLDER / f"{scale}.toml").read_text("utf-8"), re.M) for scale in SCALES]
    assert heads[0] == [head for head in heads[1] if not head.startswith("stages.") or not head.endswith(".run")]


@pytest.mark.parametrize("scale", SCALES)
def test_keys_in_comments_are_keys_with_their_defaults(scale: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{scale}.toml").read_text("utf-8")
    head, stages, rest = text.partition("[stages.faces]")
    if scale == "large":  # its sections of stages show what else there is
        head, stages, rest = head, "", stages + rest
    else:
        head, rest = head + stages + rest, ""
    shown = re.sub(r"^# (?=\w+ += )", "", head, flags=re.M) + rest
    assert "\nbatch_rows = " not in shown  # a stage has its own number
    assert sum(a != b for a, b in zip(shown.splitlines(), text.splitlines(), strict=True)) == 5
    path = tmp_path / "shown.toml"
    path.write_text(shown, "utf-8")
    one, other = load_pipeline(FOLDER / f"{scale}.toml"), load_pipeline(path)
    assert (one.config.dataset, one.config.run, one.asked) == (other.config.dataset, other.config.run, other.asked)
    assert {name: use.options for name, use in one.stages.items()} == {
        n: use.options for n, use in other.stages.items()
    }


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text((FOLDER / "small.toml").read_text("utf-8").replace("min_score", "min_scor"), "utf-8")
    line = path.read_text("utf-8").splitlines().index(next(x for x in path.read_text().splitlines() if "min_scor" in x))
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    assert str(caught.value) == (
        f"unknown key 'min_scor' in [stages.faces]\n  file: {path}:{line + 1}\n  fix: did you mean 'min_score'?"
    )

"""Pipeline files: what is refused, with the whole message, and beside it what is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.config.loading import find_pipeline
from builder.config.problems import line_of
from builder.errors import ConfigError, TransientError
from builder.store import layout
from builder.verbs.pipeline import load_pipeline

GOOD = """\
[dataset]
shards = "data/*.tar"
root = "out"

[run]
workers = 1

[stages.faces]
source = "auto"

[stages.lang]
"""
STAGES = Path(__file__).parent / "support/stages.py"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`p.toml` in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    path = Path("p.toml")
    path.write_text(GOOD)
    return path


def refusal(path: Path, text: str | bytes | None = None, *sets: str) -> str:
    """The message with which a pipeline is refused."""
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path, sets)
    return str(caught.value)


def test_a_good_pipeline_is_taken(file: Path) -> None:
    pipeline = load_pipeline(file)
    assert (list(pipeline.asked.patterns), str(pipeline.config.root), list(pipeline.stages)) == (
        ["data/*.tar"], "out", ["faces", "lang"],
    )  # fmt: skip
    assert pipeline.stages["faces"].options.model_dump()["min_size"] == 0.03


def test_unknown_key_with_suggestion_and_line(file: Path) -> None:
    assert refusal(file, GOOD.replace("source =", "sourc =")) == (
        "unknown key 'sourc' in [stages.faces]\n  file: p.toml:9\n  fix: did you mean 'source'?"
    )


def test_unknown_key_without_a_near_one_lists_the_valid(file: Path) -> None:
    assert refusal(file, GOOD.replace("workers", "xyz")) == (
        "unknown key 'xyz' in [run]\n  file: p.toml:6\n"
        "  fix: valid: batch_rows, checkpoint_rows, checkpoint_seconds, devices, executor, max_failed, workers"
    )


def test_keys_that_every_stage_has_are_suggested_too(file: Path) -> None:
    assert refusal(file, GOOD + 'sqll = "x.sql"\n') == (
        "unknown key 'sqll' in [stages.lang]\n  file: p.toml:12\n  fix: did you mean 'sql'?"
    )


def test_unknown_section(file: Path) -> None:
    assert refusal(file, GOOD.replace("[stages.faces]", "[stage.faces]")) == (
        "unknown section [stage]\n  file: p.toml:8\n  fix: did you mean 'stages'?"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "workers = 1", 'workers = "two"',
            "'workers' in [run] is 'two': it should be a valid integer\n  file: p.toml:6\n"
            "  fix: for example: workers = 2",
        ),
        (
            "workers = 1", "workers = 0",
            "'workers' in [run] is 0: it should be greater than or equal to 1\n  file: p.toml:6\n"
            "  fix: for example: workers = 2",
        ),
        (
            "workers = 1", "devices = []",
            "'devices' in [run] is []: it should have at least 1 item\n  file: p.toml:6\n"
            '  fix: for example: devices = ["cpu"]',
        ),
        (
            'root = "out"', "root = 7",
            "'root' in [dataset] is 7: it should be a valid string\n  file: p.toml:3\n  fix: write it in quotes: \"7\"",
        ),
        (
            '"data/*.tar"', "5",
            "'shards' in [dataset] is 5: it should be a valid string or a valid list\n  file: p.toml:2\n"
            '  fix: write it in quotes: "5"',
        ),
        (
            '"data/*.tar"', '["a.tar", 5]',
            "'shards[1]' in [dataset] is 5: it should be a valid string\n  file: p.toml:2\n"
            '  fix: write it in quotes: "5"',
        ),
        (
            'root = "out"', 'root = "out"\nfields = ["url", {name = "license"}]',
            "missing key 'type' in [dataset.fields[1]]\n  file: p.toml:4\n"
            '  fix: add it, for example: type = "string"',
        ),
        (
            'root = "out"', 'root = "out"\nfields = [{name = "license", type = "strin"}]',
            "field 'license': 'strin' is not a type\n  file: p.toml:4\n  fix: use one of: string, bool, int8, int16, "
            "int32, int64, uint64, float32, float64, binary, list<TYPE>, struct<name: TYPE, ...>",
        ),
        (
            'source = "auto"', 'source = "jason"',
            "'source' in [stages.faces] is 'jason'\n  file: p.toml:9\n  fix: did you mean 'json'?",
        ),
        (
            'source = "auto"', 'source = "x"',
            "'source' in [stages.faces] is 'x'\n  file: p.toml:9\n  fix: valid: auto, detector, json, metadata",
        ),
        (
            'source = "auto"', "min_size = 2",
            "'min_size' in [stages.faces] is 2: it should be less than or equal to 1\n  file: p.toml:9\n"
            "  fix: for example: min_size = 0.03",
        ),
        (
            'source = "auto"', "run = {worker = 2}",
            "unknown key 'worker' in [stages.faces.run]\n  file: p.toml:9\n  fix: did you mean 'workers'?",
        ),
        (
            'source = "auto"', "params = [1]",
            "'params' in [stages.faces] is [1], not a section\n  file: p.toml:9\n  fix: write [stages.faces.params]",
        ),
        (
            "[stages.lang]", "[stages]\nlang = 1",
            "'lang' in [stages] is 1, not a section\n  file: p.toml:12\n  fix: write [stages.lang]",
        ),
        (
            'root = "out"\n', "",
            "missing key 'root' in [dataset]\n  file: p.toml:1\n  fix: add it, for example: root = \"out/mine\"",
        ),
        (
            '[dataset]\nshards = "data/*.tar"\nroot = "out"\n', "",
            "missing section [dataset]\n  file: p.toml\n"
            '  fix: add it, with shards = "data/*.tar" and root = "out/mine"',
        ),
        (
            "workers = 1", 'executor = "slurm"',
            "executor 'slurm' is not part of this version\n  file: p.toml:6\n  fix: use: executor = \"local\"",
        ),
        (
            'source = "auto"', 'run = {executor = "ray"}',
            "executor 'ray' is not part of this version\n  file: p.toml:9\n  fix: use: executor = \"local\"",
        ),
        (
            "workers = 1", 'executor = "locl"',
            "'executor' in [run] is 'locl'\n  file: p.toml:6\n  fix: did you mean 'local'?",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_whole(file: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert refusal(file, GOOD.replace(old, new)) == message


def test_all_problems_at_once_in_the_order_of_the_file(file: Path) -> None:
    text = GOOD.replace("workers = 1", "workers = 0\nexecutor = 'ray'").replace("source", "sourc")
    assert refusal(file, text + "\n[stages.genrate]\n\n[write]\nselct = 'x'\n") == (
        "5 problems in the pipeline\n"
        "  p.toml:6: 'workers' in [run] is 0: it should be greater than or equal to 1\n"
        "    fix: for example: workers = 2\n"
        "  p.toml:7: executor 'ray' is not part of this version\n"
        '    fix: use: executor = "local"\n'
        "  p.toml:10: unknown key 'sourc' in [stages.faces]\n"
        "    fix: did you mean 'source'?\n"
        "  p.toml:14: there is no stage 'genrate'\n"
        "    fix: did you mean 'generate'? stages: check, faces, generate, lang, prompts; or name your own in "
        '[stages.genrate]: python = "my_stage.py:MyStage"\n'
        "  p.toml:17: unknown key 'selct' in [write]\n"
        "    fix: did you mean 'select'?\n"
        "  fix: correct these and run the same command again"
    )


# --- files ---


def test_no_file(file: Path) -> None:
    assert refusal(Path("none.toml")) == (
        "no pipeline file 'none.toml'\n  fix: name one that exists, or start with: builder init DIR"
    )


def test_a_folder(file: Path) -> None:
    assert refusal(Path()) == (
        "the pipeline cannot be read: Is a directory\n  file: .\n  fix: name a file that can be read"
    )


def test_bad_toml_with_line(file: Path) -> None:
    assert refusal(file, "[dataset]\nroot = \n") == (
        "the pipeline is not TOML: invalid value\n  file: p.toml:2\n  column: 8\n  fix: edit that line"
    )
    assert refusal(file, "[dataset]\n[dataset]\n") == (
        "the pipeline is not TOML: cannot declare ('dataset',) twice\n  file: p.toml:2\n  column: 9\n"
        "  fix: edit that line"
    )


def test_not_utf8(file: Path) -> None:
    assert refusal(file, GOOD.encode() + b"# caf\xe9\n") == (
        f"the pipeline is not UTF-8 text\n  file: p.toml\n  byte: {len(GOOD) + 5}\n  fix: save it as UTF-8"
    )
    file.write_text(GOOD + "# café\n", "utf-8")
    assert load_pipeline(file).config.root == Path("out")


def test_scale_that_is_not_there(file: Path) -> None:
    installed = Path(layout.installed("pipelines")) / "medium.toml"
    with pytest.raises(ConfigError) as caught:
        find_pipeline("medium", None)
    assert str(caught.value) == (
        f"no pipeline for scale 'medium'\n  looked at: pipelines/medium.toml, {installed}\n"
        "  fix: use --scale small or large, or name a file with --pipeline FILE"
    )


def test_scales_are_looked_up_here_first(file: Path) -> None:
    assert find_pipeline(None, None) == layout.installed("pipelines") / "small.toml"
    Path("pipelines").mkdir()
    Path("pipelines/small.toml").write_text(GOOD)
    assert find_pipeline("small", None) == Path("pipelines/small.toml")
    assert find_pipeline(None, "p.toml") == Path("p.toml")


@pytest.mark.parametrize(
    ("sets", "workers"),
    [
        ((), 8),  # the sketch takes no GPU
        (("stages.generate.backend=diffusers", "stages.generate.model=a/b"), 2),
        (("stages.generate.backend=diffusers", "stages.generate.model=a/b", "stages.generate.run.workers=4"), 4),
        (("stages.generate.backend=diffusers", "stages.generate.model=a/b", "run.devices=['cpu']"), 8),
    ],
)
def test_a_stage_that_takes_a_gpu_gets_one_worker_for_each(file: Path, sets: tuple[str, ...], workers: int) -> None:
    file.write_text(GOOD.replace("workers = 1", 'workers = 8\ndevices = ["cuda:0", "cuda:1"]') + "[stages.generate]\n")
    pipeline = load_pipeline(file, sets)
    assert pipeline.stages["generate"].run.workers == workers
    assert pipeline.stages["faces"].run.workers == 8


# --- overrides ---


def test_set_overrides_with_the_type_that_it_has(file: Path) -> None:
    sets = (
        "run.workers=7",
        "dataset.shards=/data/{00..11}.tar",
        "dataset.name=2024 small",
        "stages.lang.threshold=0.75",
    )
    pipeline = load_pipeline(
        file, (*sets, "write.params.limit=3", 'dataset.root="a = b"', "stages.prompts.style={caption}")
    )
    dataset = pipeline.config.dataset
    assert (pipeline.config.run.workers, dataset.shards, dataset.name, dataset.root) == (
        7, "/data/{00..11}.tar", "2024 small", "a = b",
    )  # fmt: skip
    assert pipeline.stages["lang"].options.model_dump() == {"threshold": 0.75}
    assert pipeline.stages["prompts"].options.model_dump()["style"] == "{caption}"
    assert pipeline.config.write.params == {"limit": 3}
    assert pipeline.config.sets[0] == "run.workers=7"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("run", "--set takes KEY=VALUE, not 'run'\n  fix: for example: --set dataset.root=out/try"),
        ("run.=1", "--set takes KEY=VALUE, not 'run.=1'\n  fix: for example: --set dataset.root=out/try"),
        (
            "dataset.root.x=1",
            "--set dataset.root.x: 'root' is a value, not a section\n  fix: name a key inside a section",
        ),
        ("run.worker=1", "unknown key 'worker' in [run]\n  file: --set run.worker=1\n  fix: did you mean 'workers'?"),
        (
            "run.workers=none",
            "'workers' in [run] is 'none': it should be a valid integer\n  file: --set run.workers=none\n"
            "  fix: for example: workers = 2",
        ),
        ("rn.workers=1", "unknown section [rn]\n  file: --set rn.workers=1\n  fix: did you mean 'run'?"),
        (
            "dataset.name=2024",
            "'name' in [dataset] is 2024: it should be a valid string\n  file: --set dataset.name=2024\n"
            '  fix: write it in quotes: "2024"',
        ),
    ],
)
def test_a_bad_override_is_named(file: Path, item: str, message: str) -> None:
    assert refusal(file, None, item) == message


# --- stages ---


def test_unknown_stage(file: Path) -> None:
    assert refusal(file, GOOD.replace("stages.faces", "stages.fases")) == (
        "there is no stage 'fases'\n  file: p.toml:8\n  fix: did you mean 'faces'? stages: check, faces, generate, "
        'lang, prompts; or name your own in [stages.fases]: python = "my_stage.py:MyStage"'
    )


def test_two_stages_with_one_output_column(file: Path) -> None:
    both = f'\n[stages.note]\npython = "{STAGES}:Note"\n\n[stages.rival]\npython = "{STAGES}:Rival"\n'
    assert refusal(file, GOOD + both) == (
        "stages 'note' and 'rival' both have a column 'note'\n  file: p.toml\n"
        "  note: note string\n  rival: note string\n"
        "  fix: rename the output of one of them, or drop the old column: builder drop note"
    )
    other = f'\n[stages.note]\npython = "{STAGES}:Note"\n\n[stages.other]\npython = "{STAGES}:Other"\n'
    file.write_text(GOOD + other)
    assert list(load_pipeline(file).stages) == ["faces", "lang", "note", "other"]


def _own(file: Path, source: str, python: str = "mine.py:Mine", name: str = "mine") -> str:
    Path("mine.py").write_text(source)
    return refusal(file, GOOD + f'\n[stages.{name}]\npython = "{python}"\n')


MINE = """\
import pyarrow as pa
from builder import Resources, Strict, output

class Mine:
    name, version, members = "mine", "1", ()
    Options = Strict
    inputs = pa.schema([("text", pa.string())])
    outputs = pa.schema([output("mine", pa.string(), "mine")])
    resources = Resources()
    def __init__(self, options): ...
    def setup(self, device): ...
    def process(self, batch): ...
    def close(self): ...
"""


def test_an_own_stage_is_found(file: Path) -> None:
    Path("mine.py").write_text(MINE)
    file.write_text(GOOD + '\n[stages.mine]\npython = "mine.py:Mine"\n')
    assert load_pipeline(file).stages["mine"].stage.version == "1"


def test_an_own_stage_without_file_or_class(file: Path) -> None:
    place = "\n  file: p.toml:13\n  fix: "
    hint = 'write it as python = "my_stage.py:MyStage", the path from the working directory'
    assert _own(file, MINE, "none.py:Mine") == f"stage 'mine': no file 'none.py'{place}{hint}"
    assert _own(file, MINE, "mine.py") == f"stage 'mine': no file 'mine.py'{place}{hint}"
    assert (
        _own(file, MINE, "mine.py:Mein") == f"stage 'mine': 'mine.py' has no 'Mein'{place}name one of its classes: Mine"
    )


def test_an_own_stage_whose_file_raises(file: Path) -> None:
    assert _own(file, "import os\nimport no_such_package\n") == (
        "stage 'mine': 'mine.py', line 2 raises ModuleNotFoundError: No module named 'no_such_package'\n"
        "  file: p.toml:13\n  fix: correct that line"
    )
    assert _own(file, "x = 1\ny = = 2\n") == (
        "stage 'mine': 'mine.py', line 2 raises SyntaxError: invalid syntax (mine.py, line 2)\n"
        "  file: p.toml:13\n  fix: correct that line"
    )


def test_errors_of_an_own_stage_that_say_what_to_do_keep_their_words(file: Path) -> None:
    raising = "from builder.errors import {0}\nraise {0}('no weights', fix='fetch them')\n"
    assert _own(file, raising.format("StageError")) == "no weights\n  file: p.toml:13\n  fix: fetch them"
    later = MINE.replace("(self, options): ...", "(self, options): raise TransientError('busy')")
    Path("mine.py").write_text("from builder.errors import TransientError\n" + later)
    with pytest.raises(TransientError, match=r"^busy$"):  # no problem of the pipeline
        load_pipeline(file)


@pytest.mark.parametrize(
    ("old", "new", "message", "fix"),
    [
        (
            'version, members = "mine", "1"', 'version, members = "mine", 1',
            "stage 'mine': attribute 'version' is int, not str",
            "set version on the class, as builder.stages.contract.Stage shows",
        ),
        (
            "    resources = Resources()\n", "",
            "stage 'mine': attribute 'resources' is missing, not Resources",
            "set resources on the class, as builder.stages.contract.Stage shows",
        ),
        (
            "    def close(self): ...\n", "",
            "stage 'mine' has no method 'close'", "write def close, as builder.stages.contract.Stage shows",
        ),
        (
            "    def close(self): ...\n", "    def close(self): ...\n    def prepare(self, batch): ...\n",
            "stage 'mine' has 'prepare', but its 'process' does not take what it returns",
            "write def process(self, batch, prepared=None), as builder.stages.contract.Preparing shows",
        ),
        (
            "Options = Strict", "Options = dict",
            "stage 'mine': Options is not a pydantic model", "class Options(builder.Strict): ...",
        ),
        (
            'members = "mine"', 'members = "yours"',
            "stage 'mine' calls itself 'yours'", "write [stages.yours] in the pipeline",
        ),
        ('"1", ()', '"1", ("png",)', "stage 'mine' asks for member 'png'", "valid: image, json, txt, edit"),
        (
            'output("mine", pa.string()', 'output("mine", pa.date32()',
            "stage 'mine', column 'mine': type 'date32[day]' cannot be a column",
            "use one of: string, bool, int8, int16, int32, int64, uint64, float32, float64, binary, list<TYPE>, "
            "struct<name: TYPE, ...>",
        ),
        (
            'output("mine", pa.string()', 'output("My Column", pa.string()',
            "stage 'mine': 'My Column' cannot be the name of a column",
            "use lower-case letters, digits and _, a letter first",
        ),
        (
            'output("mine", pa.string()', 'output("mine_status", pa.string()',
            "stage 'mine' returns two columns 'mine_status'", "give each a name of its own",
        ),
        (
            '("text", pa.string())', '("uid", pa.string())',
            "stage 'mine' is given two columns 'uid'", "give each a name of its own",
        ),
    ],
)  # fmt: skip
def test_an_own_stage_that_breaks_the_contract(file: Path, old: str, new: str, message: str, fix: str) -> None:
    assert old in MINE
    assert _own(file, MINE.replace(old, new)) == f"{message}\n  file: p.toml:13\n  fix: {fix}"


def test_names_that_no_stage_can_have(file: Path) -> None:
    rule = "use lower-case letters, digits and _, a letter first; 'source' is ingest's"
    for name, shown in (("source", "source"), ('"My-Stage"', "My-Stage")):
        assert (
            _own(file, MINE, name=name) == f"'{shown}' cannot be the name of a stage\n  file: p.toml:13\n  fix: {rule}"
        )


def test_unknown_option_of_an_own_stage(file: Path) -> None:
    Path("mine.py").write_text(MINE.replace("Options = Strict", "class Options(Strict):\n        size: int = 3"))
    file.write_text(GOOD + '\n[stages.mine]\npython = "mine.py:Mine"\nsice = 4\n')
    assert refusal(file) == "unknown key 'sice' in [stages.mine]\n  file: p.toml:15\n  fix: did you mean 'size'?"
    file.write_text(GOOD + '\n[stages.mine]\npython = "mine.py:Mine"\nsize = 4\n')
    options: Any = load_pipeline(file).stages["mine"].options
    assert options.size == 4


def test_run_of_a_stage_overrides_that_of_all(file: Path) -> None:
    file.write_text(GOOD + "\n[stages.lang.run]\nworkers = 5\n")
    pipeline = load_pipeline(file)
    assert (pipeline.stages["faces"].run.workers, pipeline.stages["lang"].run.workers) == (1, 5)


@pytest.mark.parametrize(("more", "workers"), [("", 4), ("workers = 2\n", 2)])
def test_a_stage_with_devices_of_its_own_has_a_worker_for_each(file: Path, more: str, workers: int) -> None:
    devices = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    file.write_text(GOOD + f"\n[stages.lang.run]\ndevices = {devices}\n{more}".replace("'", '"'))
    pipeline = load_pipeline(file)
    assert (pipeline.stages["faces"].run.workers, pipeline.stages["lang"].run.workers) == (1, workers)
    assert pipeline.stages["lang"].run.devices == devices


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("dataset", "root"), 3),
        (("run", "workers"), 6),
        (("run", "nothing"), 5),
        (("stages", "lang"), 11),
        (("stages", "lang", "threshold"), 11),
        (("stages",), 8),
        (("write", "select"), 0),
    ],
)
def test_line_of_a_key_or_its_nearest_section(keys: tuple[str, ...], line: int) -> None:
    assert line_of(GOOD, keys) == line

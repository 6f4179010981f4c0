"""A source that comes again: each answer stays with its key, and what its own inputs made false is answered again.

`test_any_history...` draws histories of a source and keeps beside the root a model of what every answer was made from.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from builder.engine import workset
from builder.engine.work import Choice
from builder.executors.by_name import EXECUTORS
from builder.progress import Talk
from builder.sources.members import digest_of
from builder.store import files
from builder.table import partitions
from builder.verbs.gc import collect_garbage
from builder.verbs.ingest import run_ingest
from builder.verbs.plan import make_plan
from builder.verbs.run import run_all
from builder.verbs.snapshot import Snapshot
from builder.verbs.stage import run_stage
from builder.verbs.status import read_status
from builder.verbs.verify import prove
from builder.verbs.works import work_of
from builder.verbs.write import plan_write
from conftest import STAGES, Sample, Workspace, make_shard, make_workspace, read_tar, samples
from support import make_root, old_root, planned
from support.in_process import InProcess

QUIET = Talk(quiet=True)
SQL = {
    "looks": "select shard, row, uid, source_width as width from samples",
    "words": "select shard, row, uid, caption as text from samples",
    "after": "select shard, row, uid, words from samples where words is not null",
}
KINDS = {"looks": "Looks", "words": "Words", "after": "After"}


@pytest.fixture(autouse=True)
def _tasks_in_this_process() -> Iterator[None]:
    """And no disk is waited for: nobody pulls the plug here."""
    with mock.patch.dict(EXECUTORS, local=InProcess), mock.patch.object(os, "fsync", lambda descriptor: None):
        yield


@dataclass
class Root:
    """A root over one shard, the samples that lie in it, and what every answer was made from."""

    made: Workspace
    shard: list[Sample] = field(default_factory=list)
    removed: list[Sample] = field(default_factory=list)
    answered: dict[tuple[str, str], tuple[Any, ...]] = field(default_factory=dict)
    clock: int = 1_700_000_000

    @classmethod
    def over(cls, folder: Path, shard: list[Sample]) -> Root:
        sections = []
        for name, kind in KINDS.items():
            (folder / f"{name}.sql").write_text(SQL[name])
            sections.append(f'[stages.{name}]\npython = "{STAGES}:{kind}"\nsql = "{folder}/{name}.sql"\nlog = "log"\n')
        root = cls(make_workspace(folder, {}, stages="\n".join(sections)), shard)
        root.write()
        return root

    def write(self) -> None:
        """Puts the samples on disk, at a time of its own."""
        make_shard(self.made.folder / "source/a.tar", self.shard)
        self.touch()

    def touch(self) -> None:
        self.clock += 1
        os.utime(self.made.folder / "source/a.tar", (self.clock, self.clock))

    def good(self) -> list[Sample]:
        """The samples that stages see: a key that comes back fails its rows."""
        count = Counter(sample.key for sample in self.shard)
        return [sample for sample in self.shard if count[sample.key] == 1]

    def run(self) -> Counter[str]:
        """`builder run`; returns what stages were asked, `stage uid` by number."""
        log = self.made.folder / "log"
        log.write_text("")
        with contextlib.chdir(self.made.folder):  # the log's path is an option
            for _ in run_all(self.made.load(), QUIET):
                pass
        return Counter(log.read_text().splitlines())

    def expected(self) -> Counter[str]:
        """What has to be asked now: what never was, and what was asked about something else. Takes note of it."""
        asked: Counter[str] = Counter()
        for sample in self.good():
            uid, image = sample.fields["uid"], sample.image
            words = (sample.caption or "")[:8].upper()
            for stage, inputs in (
                ("looks", (uid, sample.fields["width"], image)),
                ("words", (uid, sample.caption)),
                ("after", (uid, words)),
            ):
                if self.answered.get((stage, sample.key)) != inputs:
                    asked[f"{stage} {uid}"] += 1
                    self.answered[stage, sample.key] = inputs
        return asked

    def answers(self) -> list[tuple[Any, ...]]:
        return self.made.rows(
            "select key, seen, words, echo, looks_inputs, words_inputs, after_inputs, looks_digest from samples "
            "where source_status = 'ok' order by row"
        )


def sample(number: int, **fields: Any) -> Sample:
    return Sample(
        f"k{number}", f"caption {number}", b"picture %d" % number,
        fields={"uid": f"u{number}", "width": 48, **fields},
    )  # fmt: skip


def other_bytes(data: bytes) -> bytes:
    """As many."""
    return data[1:] + bytes([(data[0] + 1) % 256])


#: What may happen to a source: each is given the root and a number that chooses the sample.
def mend_by_as_many(root: Root, at: int) -> None:
    old = root.shard[at]
    old.caption = (old.caption or "")[1:] + chr(97 + (ord((old.caption or "a")[0]) + 1) % 26)


def mend_longer(root: Root, at: int) -> None:
    root.shard[at].caption = f"{'xyz'[at % 3]}{root.shard[at].caption}"


def mend_at_the_end(root: Root, at: int) -> None:
    """The words of it stay as they are."""
    root.shard[at].caption = f"{root.shard[at].caption}."


def repaint_by_as_many(root: Root, at: int) -> None:
    root.shard[at].image = other_bytes(root.shard[at].image or b"")


def repaint_larger(root: Root, at: int) -> None:
    root.shard[at].image = (root.shard[at].image or b"") + b"+"


def resize(root: Root, at: int) -> None:
    root.shard[at].fields["width"] += 1


def rename(root: Root, at: int) -> None:
    root.shard[at].fields["uid"] += "x"


def insert(root: Root, at: int) -> None:
    root.shard.insert(at, sample(100 + root.clock % 10_000))


def remove(root: Root, at: int) -> None:
    if len(root.shard) > 1:
        root.removed.append(root.shard.pop(at))


def put_back(root: Root, at: int) -> None:
    keys = {sample.key for sample in root.shard}
    if root.removed and root.removed[-1].key not in keys:
        root.shard.insert(at, root.removed.pop())


def move(root: Root, at: int) -> None:
    root.shard.append(root.shard.pop(at))


def double(root: Root, at: int) -> None:
    """The same key again, at the end: neither is a sample then."""
    root.shard.append(Sample(root.shard[at].key, "another", b"another", fields={"uid": "double", "width": 1}))


def undouble(root: Root, at: int) -> None:
    first: dict[str, Sample] = {}
    for one in root.shard:
        first.setdefault(one.key, one)
    root.shard = list(first.values())


def nothing(root: Root, at: int) -> None:
    """A touch."""


def ingest(root: Root, at: int) -> None:
    root.write()
    run_ingest(root.made.load(), QUIET)


def run(root: Root, at: int) -> None:
    root.write()
    asked = root.run()
    assert asked == root.expected()


def sweep(root: Root, at: int) -> None:
    collect_garbage(root.made.load(), QUIET, dry_run=False)


CHANGES = (
    mend_by_as_many, mend_longer, mend_at_the_end, repaint_by_as_many, repaint_larger, resize, rename, insert, remove,
    put_back, move, double, undouble, nothing,
)  # fmt: skip
STEPS = st.lists(
    st.tuples(st.sampled_from((*CHANGES, ingest, ingest, run, run, sweep)), st.integers(0, 30)), min_size=1, max_size=12
)


@settings(
    max_examples=int(os.environ.get("BUILDER_HISTORIES", "3")),
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a history takes a second: shrinking one, minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
def test_any_history_of_a_source_ends_as_a_fresh_root_and_answers_nothing_twice(
    steps: list[tuple[Any, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = Root.over(tmp_path_factory.mktemp("root"), [sample(i) for i in range(3)])
    run(root, 0)
    for step, number in steps:
        step(root, number % len(root.shard))
    run(root, 0)
    assert root.run() == Counter()
    fresh = Root.over(tmp_path_factory.mktemp("fresh"), root.shard)
    fresh.run()
    assert root.answers() == fresh.answers()
    assert prove(root.made.load(), QUIET).problems == []


# --- one rule each ---


def counts(made: Workspace, choice: Choice = Choice()) -> dict[str, tuple[int, int]]:  # noqa: B008
    """Of each stage what is out of date, and what is to be done."""
    return {name: (c.out_of_date, c.todo) for name, c in make_plan(made.load(), choice).stages.items()}


def rewritten(made: Workspace) -> tuple[str, ...]:
    """Runs everything; returns the hybrid shards that were written."""
    before = {path.name: path.stat().st_ino for path in (made.root / "shards").glob("*.tar")}
    for _ in run_all(made.load(), QUIET):
        pass
    after = {path.name: path.stat().st_ino for path in (made.root / "shards").glob("*.tar")}
    return tuple(sorted(name for name in after if after[name] != before.get(name)))


@pytest.mark.parametrize(
    "mended", ["a man with a cat is standing in the street number 1", "a man with a horse is here"]
)
def test_a_mended_caption_gives_a_new_prompt_and_a_new_image_in_one_run(tmp_path: Path, mended: str) -> None:
    """Of as many letters or not; the picture's faces stay, and so does everything of the other samples."""
    shards = {"a": samples(4), "b": samples(4, start=4)}
    made = make_workspace(tmp_path, shards)
    assert rewritten(made) == ("a.tar", "b.tar")
    question = "select key, faces_run, lang_run, prompts_run, generate_run from samples order by shard, row"
    before = {key: runs for key, *runs in made.rows(question)}
    key = shards["a"][1].key
    shards["a"][1].caption = mended
    make_shard(made.folder / "source/a.tar", shards["a"])
    run_ingest(made.load(), QUIET)
    assert counts(made) == {"faces": (0, 0), "lang": (1, 1), "prompts": (1, 1), "generate": (0, 0)}
    assert {name: s["out_of_date"] for name, s in read_status(made.load())["stages"].items()} == {
        "source": None, "faces": 0, "lang": 1, "prompts": 1, "generate": 0,
    }  # fmt: skip
    assert rewritten(made) == ("a.tar",)
    after = {key: runs for key, *runs in made.rows(question)}
    changed = {k: [new != old for new, old in zip(after[k], before[k], strict=True)] for k in after}
    assert changed.pop(key) == [False, True, True, True]
    assert not any(any(differ) for differ in changed.values())
    [(prompt, painted)] = made.rows(f"select prompt, image_prompt from samples where key = '{key}'")
    assert prompt == painted
    assert " ".join(mended.split()[2:5]) in prompt
    assert read_tar(made.root / "shards/a.tar")[f"{key}.txt"].decode() == prompt
    assert counts(made) == dict.fromkeys(("faces", "lang", "prompts", "generate"), (0, 0))
    assert rewritten(made) == ()
    assert prove(made.load(), QUIET).problems == []


def test_a_picture_replaced_by_as_many_bytes_is_looked_at_again(tmp_path: Path) -> None:
    root = Root.over(tmp_path, [sample(i) for i in range(4)])
    root.run()
    repaint_by_as_many(root, 2)
    root.write()
    run_ingest(root.made.load(), QUIET)
    assert counts(root.made) == {"looks": (1, 1), "words": (0, 0), "after": (0, 0)}
    assert root.made.rows("select source_changed from samples where row = 2") == [(None,)]  # nobody knew its bytes
    assert root.run() == Counter(["looks u2"])
    repaint_by_as_many(root, 2)
    root.write()
    run_ingest(root.made.load(), QUIET)
    assert root.made.rows("select row from samples where source_changed is not null") == [(2,)]
    assert root.run() == Counter(["looks u2"])


def test_a_touch_makes_nothing_out_of_date(tmp_path: Path) -> None:
    root = Root.over(tmp_path, [sample(i) for i in range(3)])
    root.run()
    root.touch()
    assert root.run() == Counter()
    assert counts(root.made, Choice(stale=True)) == {"looks": (0, 0), "words": (0, 0), "after": (0, 0)}


@pytest.mark.parametrize(("kind", "value"), [("float64", float("nan")), ("list<float64>", [1.0, float("nan")])])
def test_a_touch_changes_no_sample_whose_json_has_a_number_that_is_none(tmp_path: Path, kind: str, value: Any) -> None:
    """NaN equals nothing."""
    root = Root.over(tmp_path, [sample(i, score=value) for i in range(3)])
    text = root.made.file.read_text().replace("fields = [", f'fields = [{{ name = "score", type = "{kind}" }}, ')
    root.made.file.write_text(text)
    root.run()
    root.touch()
    assert run_ingest(root.made.load(), QUIET)["changed"] == 0
    assert root.made.rows("select count(*) from samples where source_changed is not null") == [(0,)]


def test_a_first_ingest_reads_no_picture_and_one_of_a_changed_shard_digests_them(tmp_path: Path) -> None:
    root = Root.over(tmp_path, [sample(0), sample(1)])
    real, read = files.read_at, []

    def read_at(descriptor: int, offset: int, size: int) -> bytes:
        read.append(size)
        return real(descriptor, offset, size)

    with mock.patch.object(files, "read_at", read_at):
        run_ingest(root.made.load(), QUIET)
        assert read == []
        run_ingest(root.made.load(), QUIET, redo=True)  # as it was on disk
        assert read == []
        root.touch()
        run_ingest(root.made.load(), QUIET)
        assert len(read) == 6
    [(digests,), _] = root.made.rows("select source_digests from samples order by row")
    assert digests == {name: digest_of(name, data) for name, data in zip(
        ("image", "json", "txt"), (body for _, body in root.shard[0].members()), strict=True)}  # fmt: skip
    run_ingest(root.made.load(), QUIET, redo=True)
    assert root.made.rows("select source_digests from samples order by row")[0] == (digests,)


def test_what_ingest_remembers_of_samples_that_changed(tmp_path: Path) -> None:
    root = Root.over(tmp_path, [sample(i) for i in range(3)])
    run_ingest(root.made.load(), QUIET)
    sizes = [[(name.rpartition(".")[2], len(body)) for name, body in one.members()] for one in root.shard]
    mend_longer(root, 1)
    root.write()
    run_ingest(root.made.load(), QUIET)
    question = "select row, source_was, source_changed is not null from samples order by row"
    members = [{"ext": ext, "size": size, "digest": None} for ext, size in sizes[1]]
    was = {"uid": "u1", "members": members}
    assert root.made.rows(question) == [(0, None, False), (1, was, True), (2, None, False)]
    members[0]["digest"] = digest_of("image", root.shard[1].image)  # the first that is known, of so many bytes
    repaint_by_as_many(root, 1)
    rename(root, 2)
    root.write()
    run_ingest(root.made.load(), QUIET)
    found = root.made.rows(question)
    assert found[:2] == [(0, None, False), (1, was, True)]
    assert (found[2][1]["uid"], found[2][2]) == ("u2", True)
    for step in (remove, nothing, put_back):  # two ingests do not have it
        step(root, 1)
        root.write()
        run_ingest(root.made.load(), QUIET)
    assert root.made.rows(question)[1] == (1, was, True)


def test_options_that_changed_make_nothing_out_of_date(tmp_path: Path) -> None:
    """Not of a sample that changed, either, where the stage's own inputs are what they were."""
    root = Root.over(tmp_path, [sample(i) for i in range(3)])
    root.run()
    mend_longer(root, 0)
    root.write()
    run_ingest(root.made.load(), QUIET)
    other = root.made.load('stages.looks.word="other"', 'stages.words.word="other"')
    found = make_plan(other, Choice()).stages
    assert {name: c.out_of_date for name, c in found.items()} == {"looks": 0, "words": 1, "after": 0}
    stale = make_plan(other, Choice(stale=True)).stages
    assert {name: (c.out_of_date, c.todo) for name, c in stale.items()} == {
        "looks": (0, 3), "words": (1, 3), "after": (0, 0),
    }  # fmt: skip


def test_prompts_redone_make_no_image_out_of_date(tmp_path: Path) -> None:
    """They are counted, as images older than their prompts, of samples that changed before as of others."""
    shard = samples(4)
    made = make_workspace(tmp_path, {"a": shard})
    rewritten(made)
    shard[1].caption = "a man with a horse is here"
    make_shard(made.folder / "source/a.tar", shard)
    rewritten(made)
    assert made.rows("select row from samples where source_changed is not null") == [(1,)]
    style = 'stages.prompts.style="An oil painting of {caption}"'
    run_stage(made.load(style), "prompts", Choice(stale=True), QUIET)
    plan = make_plan(made.load(style), Choice())
    assert plan.stages["generate"].todo == plan.stages["generate"].out_of_date == 0
    assert plan.write.stale == plan.write.edited > 0


def test_a_failed_row_whose_inputs_changed_is_tried_again(tmp_path: Path) -> None:
    root = Root.over(tmp_path, [sample(i) for i in range(4)])
    for at in (1, 2):
        root.shard[at].caption = "bad"
    root.write()
    root.run()
    assert root.made.rows("select row from samples where words_status = 'failed' order by row") == [(1,), (2,)]
    assert root.run() == Counter()
    root.shard[1].caption = "mended"
    root.shard[2].fields["width"] = 7  # nothing that `words` reads
    root.write()
    assert root.run() == Counter(["looks u2", "words u1", "after u1"])
    assert root.made.rows("select row from samples where words_status = 'failed' order by row") == [(2,)]


def test_what_choices_do_with_rows_that_are_out_of_date(tmp_path: Path) -> None:
    """Row 0 is out of date, row 1 has failed and is not; rows 2 and 3 are as they were."""
    root = Root.over(tmp_path, [sample(i) for i in range(4)])
    root.shard[1].caption = "bad"
    root.write()
    root.run()
    mend_longer(root, 0)
    root.write()
    run_ingest(root.made.load(), QUIET)
    for choice, todo in (
        (Choice(), 1), (Choice(retry="failed"), 2), (Choice(retry="failed:ValueError"), 1), (Choice(redo=True), 4),
        (Choice(stale=True), 1), (Choice(where="row > 0"), 0), (Choice(redo=True, where="row > 0"), 3),
    ):  # fmt: skip
        [found] = [make_plan(root.made.load(), choice).stages["words"]]
        late = 0 if choice.where else 1
        assert (found.out_of_date, found.todo, found.ok, found.failed) == (late, todo, 3 - (not late), 1), choice
        outcome = workset.first_rows(
            root.made.load().layout, work_of(Snapshot(root.made.load()), "words", choice, ["a"]), 9
        )
        assert outcome.num_rows == todo, choice


def test_a_task_planned_before_a_caption_was_mended_is_out_of_date_after(tmp_path: Path) -> None:
    """Its answers count, since the rows are the same; those of the mended caption are done again."""
    root = Root.over(tmp_path, [sample(i) for i in range(3)])
    run_ingest(root.made.load(), QUIET)
    pipeline = root.made.load()
    run = planned.described(pipeline, "words", Choice(), 1)
    mend_longer(root, 1)
    root.write()
    run_ingest(root.made.load(), QUIET)
    with contextlib.chdir(tmp_path):
        done = planned.do(pipeline.layout, run, pipeline.stages["words"].stage)
    assert (done.ok, done.left) == (3, {})
    assert counts(root.made)["words"] == (1, 1)
    assert root.run() == Counter(["looks u0", "looks u1", "looks u2", "words u1", "after u0", "after u1", "after u2"])


def test_a_failure_of_a_row_that_is_out_of_date_keeps_the_answer_and_is_told(tmp_path: Path) -> None:
    root = Root.over(tmp_path, [sample(i) for i in range(2)])
    root.run()
    before = root.made.rows("select words, words_run from samples where row = 1")
    root.shard[1].caption = "bad"
    root.write()
    run_ingest(root.made.load(), QUIET)
    with contextlib.chdir(tmp_path):
        outcome = run_stage(root.made.load(), "words", Choice(), QUIET)
    assert (outcome["kept"], outcome["failed"], outcome.is_clean) == (1, 0, False)
    assert root.made.rows("select words, words_run from samples where row = 1") == before
    assert counts(root.made)["words"] == (1, 1)


def test_answers_of_an_old_root_are_compared_by_size_and_ingest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = old_root.unpacked("0.1.0", tmp_path)
    monkeypatch.chdir(made.folder)
    key = make_root.key_of(4)
    path = made.folder / "source/jpg.tar"
    members = list(read_tar(path).items())
    touched = make_plan(made.load(), Choice()).stages
    assert all(c.todo == 0 for c in touched.values())

    def put(name: str, body: bytes) -> None:
        at = [n for n, _ in members].index(name)
        members[at] = (name, body)
        make_root.write_tar(path, members)
        capsys.readouterr()
        run_ingest(made.load(), Talk())

    json_name, picture_name = f"{key}.json", f"{key}.jpg"
    body = dict(members)[json_name]
    put(json_name, body.replace(b"a street in the evening", b"a street in the morning, early"))
    assert (
        "faces: 5 answers of samples in changed shards are from a version that recorded no digest of what it read: "
        "only sizes were compared. To be sure: builder stage faces --redo --where "
        "'faces_digest is null and source_digests is not null'\n"
    ) in capsys.readouterr().err
    found = counts(made)
    assert (found["faces"], found["lang"]) == ((0, 0), (1, 1))
    image = dict(members)[picture_name]
    put(picture_name, image + b"\0")
    assert counts(made)["faces"] == (1, 1)
    put(picture_name, image)
    assert counts(made)["faces"] == (0, 0)
    put(picture_name, image[:-1] + b"\0")  # of the same size; an ingest has known its bytes
    assert counts(made)["faces"] == (1, 1)


def test_an_old_root_that_is_read_again_keeps_its_rows_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their identity is one that counted sizes in: it stays, so that files that follow it need not be realigned."""
    made = old_root.unpacked("0.1.0", tmp_path)
    monkeypatch.chdir(made.folder)
    layout = made.load().layout
    before = {shard: partitions.partition_state(layout, shard).rows for shard in layout.shard_names()}  # type: ignore[union-attr]
    todo = [part.shard for part in plan_write(Snapshot(made.load())).todo]
    run_ingest(made.load(), QUIET, redo=True)
    assert {shard: partitions.partition_state(layout, shard).rows for shard in before} == before  # type: ignore[union-attr]
    assert [part.shard for part in plan_write(Snapshot(made.load())).todo] == todo

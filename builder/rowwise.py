"""SQL that looks at every row of the table on its own: its condition, so that one pass can ask several of them.

A pass over a table of many partitions costs about as much for one question as for ten: most of it is their footers.
Knows nothing of stages and of the table.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from builder import repeatable
from builder.schema import folded

#: What a SELECT of rows, one for each of the table, has none of.
_PARTS = ("group_expressions", "group_sets", "having", "modifiers", "qualify", "sample")
#: Rows of the answer are not rows of the table where a column has one of these, or a function that is no plain one.
_OTHER_ROWS = ("STAR", "SUBQUERY", "WINDOW")
_SOURCE = ("catalog_name", "schema_name", "at_clause", "sample", "column_name_alias")


@dataclass(frozen=True)
class Condition:
    """When a SELECT returns a row of the table: SQL over its columns, and the values of its parameters."""

    text: str
    params: dict[str, Any]


def condition_of(text: str, columns: Collection[str], params: Mapping[str, Any], prefix: str) -> Condition | None:
    """The condition of a SELECT from `samples` alone that returns `shard` and `row` as they are, at most once each.

    Args:
        columns: of the table.
        prefix: goes before the names of parameters, so that those of several SELECTs stay apart.

    Returns:
        None where the SELECT is any other, such as a join, or compares rows with each other.
    """
    node = _select(text)
    if node is None:
        return None
    source = node["from_table"]
    names = {folded(name) for name in columns}
    own = folded(source["alias"] or source["table_name"])
    chosen = {_plain_name(item, own) for item in node["select_list"]}
    if not {"shard", "row"} <= chosen or not all(_is_of_one_row(item) for item in node["select_list"]):
        return None
    where = node["where_clause"]
    if where is None:
        return Condition("true", {})
    where, used = copy.deepcopy(where), set()
    for part in repeatable.nodes(where):
        if part.get("class") in _OTHER_ROWS:
            return None
        if part.get("class") == "COLUMN_REF":
            head, *rest = part["column_names"]
            if rest and folded(head) == own:
                part["column_names"] = rest
                head = rest[0]
            if folded(head) not in names:
                return None
        if part.get("class") == "PARAMETER":
            used.add(folded(part["identifier"]))
            part["identifier"] = f"{prefix}_{part['identifier']}"
    values = {f"{prefix}_{name}": value for name, value in params.items() if folded(name) in used}
    return Condition(_as_text(where), values)


def _select(text: str) -> dict[str, Any] | None:
    """The tree of one SELECT from `samples` and nothing more."""
    statements = repeatable.parsed(text)
    node: dict[str, Any] | None = statements[0]["node"] if statements and len(statements) == 1 else None
    if node is None or node["type"] != "SELECT_NODE" or node["cte_map"]["map"] or any(node[part] for part in _PARTS):
        return None
    source = node["from_table"]
    is_table = source["type"] == "BASE_TABLE" and folded(source["table_name"]) == "samples"
    if not is_table or any(source[part] for part in _SOURCE) or node["aggregate_handling"] != "STANDARD_HANDLING":
        return None
    return node


def _plain_name(item: dict[str, Any], own: str) -> str | None:
    """The name of a column that a SELECT returns as it is and under its own name."""
    if item.get("class") != "COLUMN_REF":
        return None
    *head, name = map(folded, item["column_names"])
    return name if head in ([], [own]) and folded(item["alias"] or name) == name else None


def _is_of_one_row(item: dict[str, Any]) -> bool:
    for part in repeatable.nodes(item):
        if part.get("class") in _OTHER_ROWS:
            return False
        if part.get("class") == "FUNCTION" and folded(part["function_name"]) in _not_plain():
            return False
    return True


@lru_cache(maxsize=1)
def _not_plain() -> frozenset[str]:
    """Functions that make another number of rows: aggregates, those that unnest, and macros that use one of these."""
    others = "select distinct function_name from duckdb_functions() where function_type not in ('scalar', 'macro')"
    return repeatable.with_macros(repeatable.listed(others) | {"unnest", "unlist"})


def _as_text(expression: dict[str, Any]) -> str:
    [statement] = repeatable.parsed("select 1")
    statement["node"]["select_list"] = [expression]
    return repeatable.text_of(statement).removeprefix("SELECT ")

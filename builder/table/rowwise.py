"""Splits SQL that looks at each row on its own into pieces, so that several queries can share one pass.

A pass over a table of many partitions takes about as long for one query as for ten: most of it is reading footers.
Knows nothing about stages and the table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import duckdb

from builder.table import repeatable
from builder.table.schema import folded

#: Clauses that must be empty in a SELECT that looks at each row on its own.
_PARTS = ("group_expressions", "group_sets", "having", "modifiers", "qualify", "sample")
#: An expression with one of these is not a value of one row, or defines names, like the parameters of a lambda.
_OTHER = ("LAMBDA", "STAR", "SUBQUERY", "WINDOW")
_SOURCE = ("catalog_name", "schema_name", "at_clause", "sample", "column_name_alias")


@dataclass(frozen=True)
class Rowwise:
    """A SELECT that looks at each row on its own, as pieces of SQL over the table's columns.

    Attributes:
        condition: whether it returns a row.
        values: the expressions that it returns for a row, by name in lower case.
        params: values of the parameters that these pieces use.
    """

    condition: str
    values: dict[str, str]
    params: dict[str, Any]

    def params_in(self, sql: str) -> dict[str, Any]:
        """The parameters that SQL with some of the pieces uses."""
        return {name: value for name, value in self.params.items() if re.search(rf"\${name}\b", sql, re.IGNORECASE)}


def rowwise(text: str, columns: Collection[str], params: Mapping[str, Any], prefix: str = "of") -> Rowwise | None:
    """The pieces of a SELECT from only `samples` that returns `shard` and `row` unchanged, and each row at most once.

    Args:
        columns: the columns of the table.
        prefix: put in front of the names of parameters, to keep those of several SELECTs apart.

    Returns:
        None for any other SELECT, for example a join, one that compares rows, or one that is nested too deeply.
    """
    node = _select(text)
    if node is None:
        return None
    names = {folded(name) for name in columns}
    own = folded(node["from_table"]["alias"] or node["from_table"]["table_name"])
    items, where = node["select_list"], node["where_clause"]
    if not all(_is_of_one_row(part, names, own) for part in (*items, where)):
        return None
    used: set[str] = set()
    for part in repeatable.nodes([items, where]):
        if part.get("class") == "COLUMN_REF" and len(part["column_names"]) > 1:
            head, *rest = part["column_names"]
            part["column_names"] = rest if folded(head) == own else [head, *rest]
        if part.get("class") == "PARAMETER":
            used.add(folded(part["identifier"]))
            part["identifier"] = f"{prefix}_{part['identifier']}"
    if not all(any(_is_column(item, name) for item in items) for name in ("shard", "row")):
        return None
    try:
        values = {folded(item["alias"] or item.get("column_names", [""])[-1]): _as_text(item) for item in items}
        condition = "true" if where is None else _as_text(where)
    except duckdb.SerializationException:  # DuckDB cannot write a tree of more than 256 levels as text
        return None
    given = {f"{prefix}_{name}": value for name, value in params.items() if folded(name) in used}
    return Rowwise(condition, values, given)


def _select(text: str) -> dict[str, Any] | None:
    """The tree of a simple SELECT from `samples`, without other clauses than WHERE; None for any other text."""
    statements = repeatable.parsed(text)
    node: dict[str, Any] | None = statements[0]["node"] if statements and len(statements) == 1 else None
    if node is None or node["type"] != "SELECT_NODE" or node["cte_map"]["map"] or any(node[part] for part in _PARTS):
        return None
    source = node["from_table"]
    is_table = source["type"] == "BASE_TABLE" and folded(source["table_name"]) == "samples"
    if not is_table or any(source[part] for part in _SOURCE) or node["aggregate_handling"] != "STANDARD_HANDLING":
        return None
    return node


def _is_column(item: dict[str, Any], name: str) -> bool:
    """Whether an item of a SELECT is the column of this name, unchanged and under its own name."""
    if item.get("class") != "COLUMN_REF":
        return False
    return [folded(part) for part in item["column_names"]] == [name] == [folded(item["alias"] or name)]


def _is_of_one_row(expression: dict[str, Any] | None, columns: Collection[str], own: str) -> bool:
    """Whether an expression is a value of one row, computed only from columns of the table.

    Args:
        own: the name of the table in the SELECT.
    """
    for part in repeatable.nodes(expression):
        if part.get("class") in _OTHER:
            return False
        if part.get("class") == "FUNCTION" and folded(part["function_name"]) in _not_plain():
            return False
        if part.get("class") == "COLUMN_REF":
            head, *rest = map(folded, part["column_names"])
            column = rest[0] if rest and head == own else head
            if column not in columns:
                return False
    return True


@lru_cache(maxsize=1)
def _not_plain() -> frozenset[str]:
    """Functions that change the number of rows (aggregates, unnest) or return the name of a value, and macros that use
    one of these."""
    others = "select distinct function_name from duckdb_functions() where function_type not in ('scalar', 'macro')"
    return repeatable.with_macros(repeatable.listed(others) | {"unnest", "unlist", "alias"})


def _as_text(expression: dict[str, Any]) -> str:
    [statement] = repeatable.parsed("select 1")
    statement["node"]["select_list"] = [{**expression, "alias": ""}]
    return repeatable.text_of(statement).removeprefix("SELECT ")

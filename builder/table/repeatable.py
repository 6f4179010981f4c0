"""Whether SQL gives the same rows on every machine and at any time: what in it the machine decides, and not the table.

Owns which functions, tables and clauses those are, out of DuckDB's own lists. Knows SQL as text alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import duckdb

#: Aggregates whose answer is the same in whatever order rows come. All others run on one thread.
_ORDER_FREE = frozenset({
    "count", "count_star", "count_if", "countif", "min", "max", "bool_and", "bool_or", "bit_and", "bit_or", "bit_xor",
    "approx_count_distinct",
})  # fmt: skip
#: Functions of DuckDB's lists that are repeatable all the same: `error` ends the query.
_HARMLESS = frozenset({"error"})
#: Functions whose stability DuckDB does not tell: its version.
_UNTOLD = frozenset({"version"})
#: Words that are functions without brackets where no column has their name. Source: DuckDB, GetSQLValueFunctionName.
_WORDS = frozenset({
    "current_catalog", "current_date", "current_schema", "current_time", "current_timestamp", "localtime",
    "localtimestamp",
})  # fmt: skip
#: Table functions whose rows come from their arguments alone, or from the table's own files, which no others are let.
_TABLES = frozenset({
    "generate_series", "json_each", "json_tree", "parquet_scan", "range", "read_parquet", "repeat", "repeat_row",
    "unnest",
})  # fmt: skip
#: Joins and clauses whose rows depend on the order in which rows come.
_ORDERED_JOINS = frozenset({"ASOF", "POSITIONAL"})
_LIMITS = frozenset({"LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER"})
_CATALOGS = frozenset({"information_schema", "pg_catalog"})
_ROWS_FIX = "to draw rows use their uid, for example: where hash(uid) % 100 < 10"
_DATE_FIX = "to name a day give it as a parameter of the pipeline, for example: $day"


@dataclass(frozen=True)
class Finding:
    """What was found in one SELECT.

    Attributes:
        refused: what the machine decides in it, as in SQL; empty if nothing does.
        line: where that stands, from 1; 0 if unknown.
        fix: what to write instead.
        by_order: whether its answer may depend on the order in which threads bring rows.
    """

    refused: str = ""
    line: int = 0
    fix: str = ""
    by_order: bool = False


@lru_cache(maxsize=64)
def examine(text: str, columns: frozenset[str] = frozenset()) -> Finding:
    """Looks through a SELECT; of a text that is none, nothing is said.

    Args:
        columns: names that are columns, even where they are words of SQL.
    """
    tree = parsed(text)
    if tree is None:
        return Finding()
    by_order = False
    own = {str(entry["key"]).lower() for node in nodes(tree) for entry in (node.get("cte_map") or {}).get("map", [])}
    for node in nodes(tree):
        if (what := _of_the_machine(node, columns, own)) is not None:
            at = node.get("query_location")
            is_known = isinstance(at, int) and at < len(text.encode())
            line = text.encode()[:at].count(b"\n") + 1 if is_known else 0
            is_date = any(word in what for word in ("date", "time", "now", "today", "age(", "ago("))
            return Finding(what, line, _DATE_FIX if is_date else _ROWS_FIX)
        by_order = by_order or _hangs_on_order(node)
    return Finding(by_order=by_order)


def parsed(text: str) -> Any:
    """DuckDB's parse tree of one SELECT; None of anything else."""
    try:
        found = _connection().execute("select json_serialize_sql(?)", [text]).fetchall()[0][0]
    except duckdb.Error:
        return None
    return _parsed(found)


def text_of(statement: dict[str, Any]) -> str:
    """The SQL of a statement's parse tree."""
    tree = json.dumps({"error": False, "statements": [statement]})
    return str(_connection().execute("select json_deserialize_sql(?)", [tree]).fetchall()[0][0])


def _parsed(serialized: str) -> Any:
    """What `json_serialize_sql` gives; None where it could not parse the text."""
    tree = json.loads(serialized)
    return None if tree["error"] else tree["statements"]


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a parse tree."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += reversed(list(node.values()))
        elif isinstance(node, list):
            waiting += reversed(node)


def _of_the_machine(node: dict[str, Any], columns: frozenset[str], own: set[str]) -> str | None:
    """What the machine decides in this node alone; None if nothing.

    Args:
        own: names of tables that the SQL makes itself.
    """
    kind = node.get("type")
    if node.get("sample") and not node["sample"]["repeatable"]:
        return "a sample without repeatable"
    if kind == "TABLE_FUNCTION":
        name = str(node["function"].get("function_name", "")).lower()
        return None if name in _TABLES else f"the table function {name}()"
    if kind == "BASE_TABLE":
        folder, name = str(node["schema_name"]).lower(), str(node["table_name"]).lower()
        is_catalog = folder in _CATALOGS if folder else name not in own and name in _catalog()
        return f"DuckDB's own table {name}" if is_catalog else None
    if node.get("class") == "COLUMN_REF":
        [*_, name] = node["column_names"] or [""]
        word = str(name).lower()
        is_word = len(node["column_names"]) == 1 and word in _WORDS and word not in columns
        return word if is_word else None
    if node.get("class") in ("FUNCTION", "WINDOW"):
        name = str(node["function_name"]).lower()
        if name == "age" and len(node.get("arguments") or node.get("children") or []) == 1:
            return "age() of one argument"
        return f"{name}()" if name in _functions() else None
    return None


def _hangs_on_order(node: dict[str, Any]) -> bool:
    if node.get("class") == "WINDOW" or str(node.get("type")) in _LIMITS or node.get("sample"):
        return True
    if node.get("class") == "FUNCTION":
        name = str(node["function_name"]).lower()
        return name in _aggregates() and name not in _ORDER_FREE
    return bool(node.get("distinct_on_targets")) or str(node.get("ref_type")) in _ORDERED_JOINS


@lru_cache(maxsize=1)
def _aggregates() -> frozenset[str]:
    return listed("select distinct function_name from duckdb_functions() where function_type = 'aggregate'")


@lru_cache(maxsize=1)
def _catalog() -> frozenset[str]:
    """Tables of DuckDB's own that are found without a schema."""
    return listed("select view_name from duckdb_views() where internal and schema_name <> 'information_schema'")


@lru_cache(maxsize=1)
def _functions() -> frozenset[str]:
    """Functions whose value the machine decides: those that DuckDB says may differ from call to call, or from query to
    query without being given a time, and macros that call one of them.

    A function that is given a time differs by the session's time zone alone, which is pinned.
    """
    found = set(_UNTOLD) | listed(
        "select distinct function_name from duckdb_functions() where stability = 'VOLATILE' or "
        "(stability = 'CONSISTENT_WITHIN_QUERY' and list_has_all(['VARCHAR', 'BOOLEAN'], parameter_types))"
    )
    return with_macros((found - _HARMLESS) | _WORDS) - _WORDS


def with_macros(names: Collection[str]) -> frozenset[str]:
    """These functions and words, and every macro that uses one of them or such a macro."""
    query = (
        "select function_name, json_serialize_sql('select ' || macro_definition) from duckdb_functions() "
        "where function_type = 'macro'"
    )
    bodies = [(name, _names(_parsed(tree))) for name, tree in _connection().execute(query).fetchall()]
    found, more = set(names), True
    while more:
        new = {name for name, called in bodies if called & found} - found
        found, more = found | new, bool(new)
    return frozenset(found)


def _names(tree: Any) -> set[str]:
    """Names of functions and columns in a parse tree."""
    found = set()
    for node in nodes(tree):
        if node.get("class") in ("FUNCTION", "WINDOW"):
            found.add(str(node["function_name"]).lower())
        elif node.get("class") == "COLUMN_REF" and node["column_names"]:
            found.add(str(node["column_names"][-1]).lower())
    return found


def listed(query: str) -> frozenset[str]:
    return frozenset(str(name).lower() for (name,) in _connection().execute(query).fetchall())


@lru_cache(maxsize=1)
def _opened() -> duckdb.DuckDBPyConnection:
    return duckdb.connect()


def _connection() -> duckdb.DuckDBPyConnection:
    """A connection that reads DuckDB's own lists, and never a table."""
    return _opened().cursor()

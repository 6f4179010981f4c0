"""Whether SQL returns the same rows on every machine at any time: finds what depends on the machine, not on the table.

Owns which functions, tables and clauses those are, from DuckDB's own lists. Knows SQL only as text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import duckdb

#: Aggregates that do not depend on the order of rows. All others run on one thread.
_ORDER_FREE = frozenset({
    "count", "count_star", "count_if", "countif", "min", "max", "bool_and", "bool_or", "bit_and", "bit_or", "bit_xor",
    "approx_count_distinct",
})  # fmt: skip
#: Functions in DuckDB's lists that are repeatable nevertheless: `error` ends the query.
_HARMLESS = frozenset({"error"})
#: Functions that depend on the installed DuckDB, which its list does not say.
_NOT_LISTED = frozenset({"version"})
#: Functions that are called without brackets, unless a column has their name. Source: DuckDB, GetSQLValueFunctionName.
_WORDS = frozenset({
    "current_catalog", "current_date", "current_schema", "current_time", "current_timestamp", "localtime",
    "localtimestamp",
})  # fmt: skip
#: Table functions whose rows come only from their arguments, or from files: only the table's own files can be read.
_TABLES = frozenset({
    "generate_series", "json_each", "json_tree", "parquet_scan", "range", "read_parquet", "repeat", "repeat_row",
    "unnest",
})  # fmt: skip
#: Joins and clauses whose result depends on the order of rows.
_ORDERED_JOINS = frozenset({"ASOF", "POSITIONAL"})
_LIMITS = frozenset({"LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER"})
_CATALOGS = frozenset({"information_schema", "pg_catalog"})
_ROWS_FIX = "to draw rows use their uid, for example: where hash(uid) % 100 < 10"
_DATE_FIX = "to name a day give it as a parameter of the pipeline, for example: $day"


@dataclass(frozen=True)
class Finding:
    """What was found in one SELECT.

    Attributes:
        refused: the part that depends on the machine, as in SQL; empty if there is none.
        line: its line, from 1; 0 if unknown.
        fix: what to write instead.
        by_order: whether the answer may depend on the order in which threads deliver rows.
    """

    refused: str = ""
    line: int = 0
    fix: str = ""
    by_order: bool = False


@lru_cache(maxsize=64)
def examine(text: str, columns: frozenset[str] = frozenset()) -> Finding:
    """Examines a SELECT; any other text has an empty finding.

    Args:
        columns: names that are columns, even if they are also functions called without brackets.
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
    """DuckDB's parse tree of one SELECT, which the caller may change; None for anything else."""
    try:
        return _parsed(_serialized(text))
    except (duckdb.OutOfMemoryException, duckdb.IOException):
        raise
    except duckdb.Error:
        return None


def text_of(statement: dict[str, Any]) -> str:
    """The SQL of a statement's parse tree."""
    return _deserialized(json.dumps({"error": False, "statements": [statement]}))


@lru_cache(maxsize=64)
def _serialized(text: str) -> str:
    return str(_connection().execute("select json_serialize_sql(?)", [text]).fetchall()[0][0])


@lru_cache(maxsize=256)
def _deserialized(tree: str) -> str:
    return str(_connection().execute("select json_deserialize_sql(?)", [tree]).fetchall()[0][0])


def _parsed(serialized: str) -> Any:
    """The tree in the result of `json_serialize_sql`; None if it could not parse the text."""
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
    """What depends on the machine in this node alone; None if nothing does.

    Args:
        own: names of tables that the SQL defines itself.
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
    """DuckDB's own tables that can be named without a schema."""
    return listed("select view_name from duckdb_views() where internal and schema_name <> 'information_schema'")


@lru_cache(maxsize=1)
def _functions() -> frozenset[str]:
    """Functions whose value depends on the machine: those that DuckDB says may differ from call to call, or from query
    to query without taking a time as an argument, and macros that call one of them.

    A function that takes a time depends only on the session's time zone, which is fixed.
    """
    found = set(_NOT_LISTED) | listed(
        "select distinct function_name from duckdb_functions() where stability = 'VOLATILE' or "
        "(stability = 'CONSISTENT_WITHIN_QUERY' and list_has_all(['VARCHAR', 'BOOLEAN'], parameter_types))"
    )
    return with_macros((found - _HARMLESS) | _WORDS) - _WORDS


def with_macros(names: Collection[str]) -> frozenset[str]:
    """These functions, and every macro that uses one of them, directly or through other macros."""
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
    """A connection for DuckDB's own lists; it never reads a table."""
    return _opened().cursor()

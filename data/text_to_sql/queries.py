"""A query as data, its one spelling as SQL, and the check that a database tells it from likely wrong queries."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data.text_to_sql.tables import Value, write_literal

AGGREGATES = ("AVG", "MIN", "MAX", "SUM")
MISTAKEN_OPERATORS = {">": (">=", "<"), "<": ("<=", ">"), "=": ("!=",)}


@dataclass(frozen=True)
class Condition:
    """One comparison in WHERE."""

    column: str
    operator: str
    value: Value


@dataclass(frozen=True)
class Query:
    """One SELECT. Columns are spelled as in the SQL: bare, or `table.column` where `join` is set."""

    select: tuple[str, ...]
    table: str
    join: str = ""
    where: tuple[Condition, ...] = ()
    any_of: bool = False
    group_by: str = ""
    order_by: str = ""
    descending: bool = False
    limit: int | None = None
    distinct: bool = False


def write_sql(query: Query) -> str:
    """The query in the only spelling that this data set uses."""
    sql = f"SELECT {'DISTINCT ' if query.distinct else ''}{', '.join(query.select)} FROM {query.table}"
    if query.join:
        sql += f" JOIN {query.join}"
    if query.where:
        tests = [f"{test.column} {test.operator} {write_literal(test.value)}" for test in query.where]
        sql += " WHERE " + (" OR " if query.any_of else " AND ").join(tests)
    if query.group_by:
        sql += f" GROUP BY {query.group_by}"
    if query.order_by:
        sql += f" ORDER BY {query.order_by} {'DESC' if query.descending else 'ASC'}"
    if query.limit is not None:
        sql += f" LIMIT {query.limit}"
    return sql


def list_mistakes(query: Query) -> Iterator[Query]:
    """Queries that a model could write by mistake, each of which must give another result."""
    if query.where:
        yield replace(query, where=())
    if len(query.where) > 1:
        yield replace(query, any_of=not query.any_of)
    for place, test in enumerate(query.where):
        before, after = query.where[:place], query.where[place + 1 :]
        if after or before:
            yield replace(query, where=before + after)
        for operator in MISTAKEN_OPERATORS[test.operator]:
            yield replace(query, where=(*before, replace(test, operator=operator), *after))
    if query.distinct:
        yield replace(query, distinct=False)
    if query.order_by:
        yield replace(query, descending=not query.descending)
        yield replace(query, order_by="")
    if query.limit is not None:
        yield replace(query, limit=query.limit + 1)
    yield from _list_mistaken_results(query)


def _list_mistaken_results(query: Query) -> Iterator[Query]:
    last = query.select[-1]
    if last.startswith("COUNT(DISTINCT "):
        yield replace(query, select=("COUNT(*)",))
    if last[:3] in AGGREGATES:
        for name in AGGREGATES:
            if name != last[:3]:
                yield replace(query, select=(*query.select[:-1], name + last[3:]))


def is_discriminating(query: Query, connection: sqlite3.Connection) -> bool:
    """Whether the query has a result (rows, no NULL, no count of zero, no ties in its order) that no mistake shares."""
    in_order = bool(query.order_by)
    expected = _fetch(query, connection, in_order=in_order)
    cells = [cell for row in expected for cell in row]
    if not cells or None in cells or expected == [(0,)]:
        return False
    if in_order and _has_ties(query, connection):
        return False
    return all(_fetch(mistake, connection, in_order=in_order) != expected for mistake in list_mistakes(query))


def _fetch(query: Query, connection: sqlite3.Connection, *, in_order: bool) -> list[tuple[Value, ...]]:
    rows: list[tuple[Value, ...]] = connection.execute(write_sql(query)).fetchall()
    return rows if in_order else sorted(rows, key=repr)


def _has_ties(query: Query, connection: sqlite3.Connection) -> bool:
    keys = _fetch(replace(query, select=(query.order_by,), limit=None), connection, in_order=True)
    compared = keys if query.limit is None else keys[: query.limit + 1]
    return len(set(compared)) < len(compared)

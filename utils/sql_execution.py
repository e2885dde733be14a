"""Judges SQL that a model wrote: finds the query in the answer, runs it locked up, compares the results.

    >>> database = "CREATE TABLE city (name TEXT); INSERT INTO city VALUES ('Oslo'), ('Rome');"
    >>> execution_match("```sql\\nselect name from city;\\n```", "SELECT name FROM city", database)
    True

A model may write anything, so a query runs in a fresh in-memory SQLite that can read its own tables and nothing else:
no file, no write, no PRAGMA, a time limit, and limits on rows, cells and bytes.
"""

import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

from utils.exceptions import DataError

Cell = int | float | str | bytes | None
Row = tuple[Cell, ...]

REFERENCE_TIME_LIMIT_S = 10.0
MAX_CELL_BYTES = 200_000
MAX_RESULT_BYTES = 10_000_000
MAX_COLUMNS = 200
MAX_PATTERN_BYTES = 200
STEPS_BETWEEN_CLOCK_READS = 1000

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_OUTSIDE = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH}
_DENIED_FUNCTIONS = {"load_extension", "randomblob", "zeroblob", "readfile", "writefile", "edit", "fts3_tokenizer"}

_FENCE = re.compile(r"```[ \t]*(?:\w+[ \t]*\n|\n)?(.*?)(?:```|\Z)", re.DOTALL)
_QUERY_START = r"(?:SELECT\b|WITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^)]*\)\s*)?AS\s*(?:(?:NOT\s+)?MATERIALIZED\s*)?\()"
_QUOTED = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/"
# What ends a query: a semicolon, a fence, an end-of-turn mark, a blank line, or a line that is plainly prose.
_QUERY_END = re.compile(
    rf"{_QUOTED}|(?P<end>;|```|<\||\n[ \t]*\n|\n[ \t]*(?:Explanation|Note|This|The|Here|It|I|In|Question|Tables)\b)",
    re.DOTALL,
)


def extract_sql(answer: str) -> str:
    """Takes the one query out of a model's answer, without its semicolon; "" when there is none.

    Accepts ```sql fences, prose before SELECT or WITH, and an explanation after the query. Of several statements the
    first counts.
    """
    for fenced in _FENCE.finditer(answer):
        if query := _find_query(fenced.group(1)):
            return query
    return _find_query(answer)


def run_query(sql: str, database: str, time_limit_s: float = 1.0, max_rows: int = 10_000) -> list[Row]:
    """Runs one reading statement in a fresh in-memory database and returns its rows.

    Args:
        sql: the statement.
        database: the SQL script that builds the tables.
        time_limit_s: seconds the statement may take; building the tables may take `REFERENCE_TIME_LIMIT_S`.
        max_rows: more rows are an error.

    Raises:
        sqlite3.Error: the statement is wrong, not allowed, too slow or too large.
        DataError: the database script fails.
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        _build_tables(connection, database)
        _lock(connection)
        _limit_time(connection, time_limit_s)
        with _raising_sqlite_errors():
            return _fetch_rows(connection.execute(sql), max_rows)


def execution_match(answer: str, reference: str, database: str, time_limit_s: float = 1.0) -> bool:
    """Whether the query in a model's answer gives the reference's result.

    Rows count as a multiset, and in order when the reference has an ORDER BY of its own (not only inside a subquery).
    Column names do not count; numbers may differ by rounding. An answer that holds no query or fails to run does not
    match.

    Raises:
        DataError: the reference or the database script fails, which is a fault of the data.
    """
    try:
        expected = run_query(reference, database, REFERENCE_TIME_LIMIT_S)
    except sqlite3.Error as error:
        raise DataError(
            f"the reference query fails: {error}", where=reference, fix="correct the row's query or its database"
        ) from error
    sql = extract_sql(answer)
    if not sql:
        return False
    try:
        actual = run_query(sql, database, time_limit_s)
    except sqlite3.Error:
        return False
    return _same_in_order(expected, actual) if has_top_level_order(reference) else _same_rows(expected, actual)


def has_top_level_order(sql: str) -> bool:
    """Whether the query sorts its result: an ORDER BY outside quotes, comments and parentheses."""
    bare = re.sub(_QUOTED, " ", sql, flags=re.DOTALL)
    while (inner := re.sub(r"\([^()]*\)", " ", bare)) != bare:
        bare = inner
    return re.search(r"\bORDER\s+BY\b", bare, re.IGNORECASE) is not None


def _find_query(text: str) -> str:
    text = text.strip()
    # Upper case first where the text starts with prose: "I select the names: SELECT name FROM city".
    start = (
        re.match(_QUERY_START, text, re.IGNORECASE)
        or re.search(rf"\b{_QUERY_START}", text)
        or re.search(rf"\b{_QUERY_START}", text, re.IGNORECASE)
    )
    if start is None:
        return ""
    query = text[start.start() :]
    ends = (found.start() for found in _QUERY_END.finditer(query) if found.group("end"))
    return query[: next(ends, len(query))].strip()


def _build_tables(connection: sqlite3.Connection, database: str) -> None:
    # Data may come from anywhere: the script may do what it likes to its own memory, but reach no file.
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action in _OUTSIDE else sqlite3.SQLITE_OK)
    _limit_time(connection, REFERENCE_TIME_LIMIT_S)
    try:
        with _raising_sqlite_errors():
            connection.executescript(database)
    except sqlite3.Error as error:
        raise DataError(
            f"the database script fails: {error}", where=database[:200], fix="correct the script"
        ) from error


def _lock(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA query_only = ON")
    connection.set_authorizer(_allow_reading)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_PATTERN_BYTES)


def _allow_reading(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    denied = action not in _READING or (action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _DENIED_FUNCTIONS)
    return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK


def _limit_time(connection: sqlite3.Connection, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > deadline), STEPS_BETWEEN_CLOCK_READS)


@contextmanager
def _raising_sqlite_errors() -> Iterator[None]:
    """A second statement is a sqlite3.Warning before Python 3.12; a NUL or a lone surrogate is a ValueError."""
    try:
        yield
    except (sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        raise sqlite3.ProgrammingError(str(error)) from error


def _fetch_rows(cursor: sqlite3.Cursor, max_rows: int) -> list[Row]:
    rows: list[Row] = []
    size = 0
    for row in cursor:
        rows.append(row)
        size += sum(len(cell) for cell in row if isinstance(cell, (str, bytes)))
        if len(rows) > max_rows or size > MAX_RESULT_BYTES:
            raise sqlite3.DataError(f"the result exceeds {max_rows} rows or {MAX_RESULT_BYTES} bytes")
    return rows


def _same_in_order(expected: list[Row], actual: list[Row]) -> bool:
    return len(expected) == len(actual) and all(map(_same_row, expected, actual))


def _same_rows(expected: list[Row], actual: list[Row]) -> bool:
    """Equal rows cancel out exactly first; only what differs by rounding is left to pair off one by one."""
    if len(expected) != len(actual):
        return False
    wanted, given = Counter(expected), Counter(actual)
    left = list((given - wanted).elements())
    for row in (wanted - given).elements():
        partner = next((place for place, other in enumerate(left) if _same_row(row, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _same_row(expected: Row, actual: Row) -> bool:
    return len(expected) == len(actual) and all(map(_same_cell, expected, actual))


def _same_cell(expected: Cell, actual: Cell) -> bool:
    if isinstance(expected, (int, float)) and isinstance(actual, (int, float)):
        return math.isclose(expected, actual, rel_tol=1e-6, abs_tol=1e-9)
    return expected == actual

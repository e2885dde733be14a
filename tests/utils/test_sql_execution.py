"""SQL from a model is found in its answer, cannot do harm, and is judged by its result."""

import sqlite3
import time
from pathlib import Path

import pytest

from utils.exceptions import DataError
from utils.sql_execution import execution_match, extract_sql, has_top_level_order, run_query

DATABASE = """
CREATE TABLE city (name TEXT, country TEXT, population INTEGER, rating REAL);
INSERT INTO city VALUES ('Oslo', 'Norway', 700, 4.1), ('Bergen', 'Norway', 290, 4.5), ('Rome', 'Italy', 2800, 4.1),
    ('Semi;colon', 'Italy', 10, 1.0);
"""
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT name FROM city",
        "  SELECT name FROM city;  ",
        "```sql\nSELECT name FROM city;\n```",
        "```\nSELECT name FROM city\n```",
        "``` SELECT name FROM city ```",
        "```sql\nSELECT name FROM city",
        "Sure! Here is the query:\n\n```sql\nSELECT name FROM city\n```\nIt lists ```name``` of every row.",
        "I select the names with this query: SELECT name FROM city",
        "SQL: SELECT name FROM city;\nThis returns all names; nothing else.",
        "SELECT name FROM city\n\nThe query reads the table.",
        "SELECT name FROM city\nExplanation: it reads the table.",
        "SELECT name FROM city; DROP TABLE city;",
        "SELECT name FROM city<|im_end|>",
    ],
)
def test_the_query_is_found_in_an_answer(answer: str) -> None:
    assert extract_sql(answer) == "SELECT name FROM city"


def test_a_query_may_start_with_a_common_table_expression() -> None:
    sql = "WITH big AS (SELECT * FROM city) SELECT name FROM big"
    assert extract_sql(f"With pleasure: {sql};") == sql
    assert execution_match(sql, "SELECT name FROM city", DATABASE)


def test_marks_inside_quotes_do_not_end_a_query() -> None:
    sql = "SELECT population FROM city WHERE name = 'Semi;colon' -- why; not\nAND rating < 2"
    assert extract_sql(sql + "; and more") == sql
    assert run_query(sql, DATABASE) == [(10,)]


def test_a_query_over_several_lines_is_kept_whole() -> None:
    sql = "select name\nfrom city\nwhere country = 'Italy'\n  and population > 100"
    assert extract_sql(sql) == sql


@pytest.mark.parametrize("answer", ["", "I do not know.", "DROP TABLE city", "with all my heart"])
def test_an_answer_without_a_query_counts_as_wrong(answer: str) -> None:
    assert extract_sql(answer) == ""
    assert not execution_match(answer, "SELECT name FROM city", DATABASE)


def test_rows_match_in_any_order_but_as_often() -> None:
    reference = "SELECT country FROM city"
    assert execution_match("SELECT country AS land FROM city ORDER BY name DESC", reference, DATABASE)
    assert not execution_match("SELECT DISTINCT country FROM city", reference, DATABASE)
    assert not execution_match("SELECT country, name FROM city", reference, DATABASE)
    twice_the_other = "SELECT country FROM city WHERE name != 'Oslo' UNION ALL SELECT 'Italy'"
    assert not execution_match(twice_the_other, reference, DATABASE)


def test_the_order_counts_when_the_reference_sorts() -> None:
    reference = "SELECT name FROM city ORDER BY population DESC"
    assert execution_match("SELECT name FROM city ORDER BY -population", reference, DATABASE)
    assert not execution_match("SELECT name FROM city ORDER BY population", reference, DATABASE)


def test_an_order_inside_a_subquery_or_a_string_is_no_order_of_the_result() -> None:
    assert has_top_level_order("SELECT a FROM t WHERE b = (SELECT 1) order\n by a")
    assert not has_top_level_order("SELECT a FROM (SELECT a FROM (t) ORDER BY a LIMIT 3)")
    assert not has_top_level_order("SELECT a FROM t WHERE b = 'ORDER BY' /* ORDER BY a */ -- ORDER BY a")
    reference = "SELECT name FROM (SELECT name FROM city ORDER BY population LIMIT 2)"
    assert execution_match("SELECT name FROM city WHERE population < 300 ORDER BY name DESC", reference, DATABASE)


def test_numbers_may_differ_by_rounding_and_type() -> None:
    reference = "SELECT country, AVG(rating) FROM city GROUP BY country"
    assert execution_match("SELECT country, SUM(rating) / COUNT(*) + 1e-12 FROM city GROUP BY 1", reference, DATABASE)
    assert not execution_match("SELECT country, AVG(rating) + 0.01 FROM city GROUP BY country", reference, DATABASE)
    assert execution_match("SELECT COUNT(*) * 1.0 FROM city", "SELECT COUNT(*) FROM city", DATABASE)
    assert not execution_match("SELECT CAST(COUNT(*) AS TEXT) FROM city", "SELECT COUNT(*) FROM city", DATABASE)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO city VALUES ('Lima', 'Peru', 1, 1.0)",
        "DELETE FROM city",
        "DROP TABLE city",
        "CREATE TEMP TABLE copy AS SELECT * FROM city",
        "WITH a AS (SELECT 1) UPDATE city SET population = 0",
        "PRAGMA query_only = OFF",
        "SELECT * FROM pragma_database_list",
        "SELECT load_extension('x')",
        "SELECT name FROM city; SELECT name FROM city",
        "SELECT nothing FROM city",
        "SELECT 'a\0b'",
        "SELECT '\ud800'",
        "SELECT CAST(x'ff' AS TEXT)",
    ],
)
def test_a_query_that_does_more_than_read_or_is_wrong_fails(sql: str) -> None:
    with pytest.raises(sqlite3.Error):
        run_query(sql, DATABASE)


def test_no_file_can_be_reached(tmp_path: Path) -> None:
    for number, sql in enumerate(("ATTACH '{}' AS other", "VACUUM INTO '{}'")):
        target = tmp_path / f"{number}.db"
        with pytest.raises(sqlite3.Error):
            run_query(sql.format(target), DATABASE)
        with pytest.raises(DataError):
            run_query("SELECT 1", DATABASE + sql.format(target))
        assert not target.exists()


def test_a_query_that_never_ends_counts_as_wrong() -> None:
    begin = time.monotonic()
    assert not execution_match(ENDLESS, "SELECT COUNT(*) FROM city", DATABASE, time_limit_s=0.2)
    assert time.monotonic() - begin < 2


def test_endless_rows_stop_at_the_row_limit() -> None:
    endless_rows = ENDLESS.replace("COUNT(*)", "i")
    with pytest.raises(sqlite3.Error, match="exceeds 50 rows"):
        run_query(endless_rows, DATABASE, time_limit_s=5, max_rows=50)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT zeroblob(2000000000)",
        "SELECT length(hex(randomblob(900000000)))",
        "SELECT replace(printf('%100000d', 1), ' ', '0123456789')",
        "WITH RECURSIVE s(x, i) AS (SELECT 'aaaaaaaa', 1 UNION ALL SELECT x || x, i + 1 FROM s WHERE i < 30) "
        "SELECT x FROM s",
    ],
)
def test_a_huge_value_is_refused_at_once(sql: str) -> None:
    begin = time.monotonic()
    with pytest.raises(sqlite3.Error):
        run_query(sql, DATABASE, time_limit_s=30)
    assert time.monotonic() - begin < 2


def test_a_broken_reference_or_database_is_a_fault_of_the_data() -> None:
    with pytest.raises(DataError, match="reference query fails"):
        execution_match("SELECT name FROM city", "SELECT nothing FROM city", DATABASE)
    with pytest.raises(DataError, match="database script fails"):
        execution_match("SELECT name FROM city", "SELECT name FROM city", "CREATE TABEL city (name TEXT)")

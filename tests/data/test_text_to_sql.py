"""The committed text-to-SQL set is what its generator writes, shares nothing between splits and asks fairly."""

import json
import random
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from data.text_to_sql.generate import EVAL_ROWS_PER_LEVEL, LEVELS, check_nothing_shared, describe_split
from data.text_to_sql.generate_preference import FILES, FIRST_LEVEL, PAIRS_PER_LEVEL
from data.text_to_sql.tables import read_domains
from utils.sql_execution import execution_match, run_query

FOLDER = Path(__file__).resolve().parents[2] / "data" / "text_to_sql"
LITERAL = re.compile(r"'([^']+)'")


def read_rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def read_pairs(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def read_prompt(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def read_question(row: dict[str, Any]) -> str:
    return read_prompt(row).splitlines()[-1]


def read_reference(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def read_schemas(row: dict[str, Any]) -> set[str]:
    return set(read_prompt(row).splitlines()[:-1])


TRAIN, EVAL = read_rows("train"), read_rows("eval")


def test_the_generator_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "generate.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), f"run generate.py: {name} is out of date"


def test_every_level_has_its_rows() -> None:
    assert Counter(row["level"] for row in TRAIN) == {n: level.train_rows for n, level in enumerate(LEVELS, start=1)}
    assert set(Counter(row["level"] for row in EVAL).values()) == {EVAL_ROWS_PER_LEVEL}
    assert {row["level"] for row in EVAL} == set(range(1, len(LEVELS) + 1))


def test_the_readme_counts_the_rows_of_every_level() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for number, level in enumerate(LEVELS, start=1):
        assert f"| {number} | {level.name} | {level.train_rows} | {EVAL_ROWS_PER_LEVEL} |" in readme


def test_no_question_is_asked_twice() -> None:
    questions = [read_question(row) for row in TRAIN + EVAL]
    assert len(set(questions)) == len(questions)


def test_training_and_evaluation_share_no_table_value_or_wording() -> None:
    check_nothing_shared()
    train, held_out = describe_split("train"), describe_split("eval")
    assert not set().union(*map(read_schemas, TRAIN)) & set().union(*map(read_schemas, EVAL))
    for rows, own, other in ((TRAIN, train, held_out), (EVAL, held_out, train)):
        for row in rows:
            values = {value.lower() for value in LITERAL.findall(read_reference(row))}
            assert values <= own["values"]
            assert not values & other["values"]


def test_every_kind_of_question_has_sentences_to_train_on_and_at_least_three_others_to_judge_by() -> None:
    counts = {}
    for split in ("train", "eval"):
        counts[split] = Counter(line.split(": ")[0] for line in describe_split(split)["wordings"])
    assert counts["train"].keys() == counts["eval"].keys()
    assert min(counts["train"].values()) >= 5
    assert min(counts["eval"].values()) >= 3


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_key_phrase_always_means_the_same(rows: list[dict[str, Any]]) -> None:
    # "the number of towers of every castle" once meant a column, "the number of couriers" COUNT(*): nobody could know.
    for row in rows:
        question, sql = read_question(row).lower(), read_reference(row)
        phrases = {
            "for each": "GROUP BY" in sql and "LIMIT" not in sql,
            r"most|fewest": "ORDER BY COUNT(*)" in sql,
            r"how many|count": "COUNT(" in sql and "ORDER BY" not in sql,
            r"different|distinct": "DISTINCT" in sql,
            r"average": "AVG(" in sql,
            r"total": "SUM(" in sql,
            r"maximum|(?<!with the )highest": "MAX(" in sql,
            r"minimum|(?<!with the )lowest": "MIN(" in sql,
            r"from high to low|descending|with the highest|most": " DESC" in sql,
            r"from low to high|ascending|with the lowest|fewest": " ASC" in sql,
            r"above|greater than": " > " in sql,
            r"below|less than": " < " in sql,
        }
        for phrase, meant in phrases.items():
            assert bool(re.search(rf"\b({phrase})\b", question)) == meant, question


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_question_can_only_mean_one_column_and_copies_it_as_it_is_spelled(split: str) -> None:
    for domain in read_domains(FOLDER / f"tables_{split}.txt", random.Random(0)):
        nouns = {noun for table in domain.tables for noun in (table.name, table.singular)}
        columns = [column.name for table in domain.tables for column in table.columns]
        assert columns.count("name") == len(domain.tables)
        assert len(set(columns)) == len(columns) - domain.is_pair, f"two tables share a column: {columns}"
        assert not nouns & set(columns)
        for table in domain.tables:
            assert table.name == f"{table.singular}s"
            assert not table.parent or table.parent == domain.tables[0].singular
            words = [word for column in table.columns for value in column.values for word in value.split()]
            assert all(re.fullmatch(r"[A-Z][A-Za-z0-9]*|[0-9]+", word) for word in words), words


def test_there_are_enough_tables() -> None:
    assert len({schema.split("(")[0] for row in TRAIN for schema in read_schemas(row)}) >= 45
    assert len({schema.split("(")[0] for row in EVAL for schema in read_schemas(row)}) >= 14


def test_a_prompt_names_every_value_that_the_query_needs_but_no_rows() -> None:
    for row in TRAIN + EVAL:
        question = read_question(row)
        assert all(value in question for value in LITERAL.findall(read_reference(row)))
        assert "INSERT" not in read_prompt(row)


def test_a_prompt_shows_the_tables_of_its_database_as_they_are() -> None:
    for row in EVAL:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(row["database"])
            for schema in read_schemas(row):
                table = schema.split("(")[0]
                columns = [column[0] for column in connection.execute(f"SELECT * FROM {table}").description]
                assert schema == f"{table}({', '.join(columns)})"
                assert 8 <= len(connection.execute(f"SELECT * FROM {table}").fetchall()) <= 20


@pytest.mark.parametrize("row", EVAL, ids=lambda row: f"level {row['level']}")
def test_a_reference_runs_and_wrong_queries_give_something_else(row: dict[str, Any]) -> None:
    reference, database = read_reference(row), row["database"]
    result = run_query(reference, database)
    assert result
    assert all(cell is not None for line in result for cell in line)
    assert execution_match(f"```sql\n{reference};\n```", reference, database)
    for wrong in list_wrong_queries(reference):
        assert not execution_match(wrong, reference, database), wrong


def list_wrong_queries(sql: str) -> list[str]:
    """Mistakes written on the SQL itself, independently of the generator's own list."""
    edits = [
        (r" WHERE .*?(?= GROUP| ORDER|$)", ""),
        (r" (AND|OR) .*?(?= GROUP| ORDER|$)", ""),
        (r" > ", " < "),
        (r" > ", " >= "),
        (r" < ", " > "),
        (r" < ", " <= "),
        (r"SELECT DISTINCT", "SELECT"),
        (r"COUNT\(DISTINCT \w+\)", "COUNT(*)"),
        (r"MAX\(", "MIN("),
        (r"MIN\(", "MAX("),
        (r"AVG\(", "SUM("),
        (r"SUM\(", "AVG("),
        (r" LIMIT \d+", ""),
        (r" DESC", " ASC"),
        (r" ASC", " DESC"),
        (r" ORDER BY [\w()*]+ (ASC|DESC)", ""),
        (r" ON \S+ = \S+", ""),
        (r" GROUP BY \S+", ""),
    ]
    return [wrong for pattern, new in edits if (wrong := re.sub(pattern, new, sql, count=1)) != sql]


def test_every_training_query_is_valid_sql_on_its_schema() -> None:
    for row in TRAIN:
        with closing(sqlite3.connect(":memory:")) as connection:
            for schema in read_schemas(row):
                connection.execute(f"CREATE TABLE {schema}")
            connection.execute(read_reference(row))


def test_rows_are_short() -> None:
    # SmolLM2 needs a token for about 3.2 characters of this text: 46 a row, at most 81, and the chat template's 32.
    lengths = [len(read_prompt(row) + read_reference(row)) for row in TRAIN + EVAL]
    assert max(lengths) <= 310
    assert sum(lengths) / len(lengths) <= 170


PAIRS = {split: read_pairs(name) for split, name in FILES.items()}


def test_the_preference_generator_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "generate_preference.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    for name in FILES.values():
        committed = (FOLDER / name).read_bytes()
        assert (tmp_path / name).read_bytes() == committed, f"run generate_preference.py: {name} is out of date"


@pytest.mark.parametrize("split", FILES)
def test_every_level_but_the_first_has_its_pairs_and_no_question_is_asked_twice(split: str) -> None:
    levels = Counter(row["level"] for row in PAIRS[split])
    assert levels == dict.fromkeys(range(FIRST_LEVEL, len(LEVELS) + 1), PAIRS_PER_LEVEL[split])
    questions = [row["prompt"].splitlines()[-1] for row in PAIRS[split]]
    known = [read_question(row) for row in TRAIN + EVAL]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & set(known)


def test_held_out_pairs_are_about_tables_that_no_training_pair_shows() -> None:
    tables = {
        split: {line for row in rows for line in row["prompt"].splitlines()[:-1]} for split, rows in PAIRS.items()
    }
    assert not tables["train"] & tables["eval"]


def test_a_rejected_query_runs_and_gives_another_result() -> None:
    for row in PAIRS["eval"]:
        assert execution_match(row["chosen"], row["chosen"], row["database"])
        assert run_query(row["rejected"], row["database"]) is not None
        assert not execution_match(row["rejected"], row["chosen"], row["database"]), row["prompt"]
    assert all(row["chosen"] != row["rejected"] for row in PAIRS["train"])

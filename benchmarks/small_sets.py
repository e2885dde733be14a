"""The tasks of `small_data.py`: rows from files, the shortest ones, split into those to train on and those to measure on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TEST_ROWS = 40
POOL = 4  # rows are drawn from the shortest ones, this many times as many as are needed: a CPU is slow
Row = dict[str, str]


@dataclass(frozen=True)
class SmallSet:
    """One task: rows to draw training sets from, rows to measure on, and how long an answer may be in tokens."""

    name: str
    metric: str
    longest_answer: int
    pool: list[Row]
    test: list[Row]


def list_sets(wikisql: Path | None, gsm8k: Path | None, count: int) -> list[SmallSet]:
    """The tasks whose files are there, for training sets of `count` rows."""
    shipped = ROOT / "data" / "text_to_sql"
    sets = [make_set("text to SQL", "execution_accuracy", 40, read_messages(shipped / "train.jsonl"), count)]
    test = read_messages(shipped / "eval.jsonl")
    sets[0].test[:] = draw(sorted(test, key=measure_row)[: 2 * TEST_ROWS], TEST_ROWS, 0)
    if wikisql:
        sets.append(make_set("WikiSQL", "exact_match", 32, read_wikisql(wikisql), count))
    if gsm8k:
        sets.append(make_set("GSM8K", "exact_match", 6, read_gsm8k(gsm8k), count))
    return sets


def measure_row(row: Row) -> int:
    """Characters of prompt and completion."""
    return len(row["prompt"]) + len(row["completion"])


def make_set(name: str, metric: str, longest_answer: int, rows: list[Row], count: int) -> SmallSet:
    """Takes the shortest rows, every prompt once, and sets test rows aside."""
    unique = list({row["prompt"]: row for row in rows}.values())
    short = sorted(unique, key=measure_row)[: POOL * count + TEST_ROWS]
    shuffled = draw(short, len(short), 0)
    return SmallSet(name, metric, longest_answer, shuffled[TEST_ROWS:], shuffled[:TEST_ROWS])


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """A seeded choice without repetition."""
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))[:count]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_messages(path: Path) -> list[Row]:
    """Conversations of one question and one answer; a database to run the answer on is kept."""
    return [
        {
            "prompt": f"{row['messages'][0]['content']}\n",
            "completion": row["messages"][1]["content"],
            **({"database": row["database"]} if "database" in row else {}),
        }
        for row in read_lines(path)
    ]


def read_wikisql(path: Path) -> list[Row]:
    """Columns and question → query; the table's id, a dozen tokens that say nothing, becomes `t`."""
    rows = []
    for row in read_lines(path):
        table, _, rest = row["text"].partition("\n")
        prompt, _, query = rest.partition("\nA: ")
        name = re.escape(table.removeprefix("table: ").strip())
        rows.append({"prompt": f"{prompt.strip()}\n", "completion": re.sub(rf"FROM {name}", "FROM t", query.strip())})
    return rows


def read_gsm8k(path: Path) -> list[Row]:
    """Question → the number alone: a task that a small model hardly learns, so that training too long would show."""
    return [
        {"prompt": f"{row['question'].strip()}\n", "completion": row["answer"].rpartition("#### ")[2].strip()}
        for row in read_lines(path)
    ]

"""Writes the text-to-SQL preference sets, the same bytes every time: a right query and a likely mistake for each question.

    python data/text_to_sql/generate_preference.py
    python data/text_to_sql/generate_preference.py --out /tmp/sql --seed 8

A row of `preference.jsonl` (a row of `preference_eval.jsonl` also holds "database", the SQL script for both queries)::

    {"prompt": "lakes(name, level)\\nShow the ...", "chosen": "SELECT ...", "rejected": "SELECT ...", "level": 2}
"""

import argparse
import contextlib
import itertools
import json
import random
import sqlite3
import sys
from pathlib import Path

# Run as a script, Python looks beside the script and not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.text_to_sql.generate import (
    FIRST_JOIN_LEVEL,
    HERE,
    LEVELS,
    Row,
    draw_question,
    take_turns,
    write_jsonl,
    write_row,
)
from data.text_to_sql.queries import Query, list_mistakes, write_sql
from data.text_to_sql.source import read_wordings
from data.text_to_sql.tables import Domain, Value, read_domains

FILES = {"train": "preference.jsonl", "eval": "preference_eval.jsonl"}
PAIRS_PER_LEVEL = {"train": 16, "eval": 6}
FIRST_LEVEL = 2  # a plain SELECT, level 1, has no likely mistake that its database would show


def write_pairs(split: str, rng: random.Random) -> list[Row]:
    """Every pair of a split ("train" or "eval"), in mixed order."""
    wordings = read_wordings(HERE / f"wordings_{split}.txt")
    seen = read_questions(HERE / f"{split}.jsonl")
    rows = []
    for number, level in enumerate(LEVELS, start=1):
        domains = read_domains(HERE / f"tables_{split}.txt", rng)
        domains = [domain for domain in domains if domain.is_pair or number < FIRST_JOIN_LEVEL]
        turns = take_turns(domains, rng)
        draws = itertools.count()
        wanted = PAIRS_PER_LEVEL[split] if number >= FIRST_LEVEL else 0
        pairs: list[Row] = []
        while len(pairs) < wanted:
            intent = level.intents[next(draws) % len(level.intents)]
            domain, asked = draw_question(intent, turns, wordings, rng, seen)
            if not (mistakes := list_wrong_queries(asked.query, domain)):
                continue  # such as COUNT(*) over a whole table
            messages = write_row(domain, asked, rng)["messages"]
            prompt, chosen = (message["content"] for message in messages)
            row = {"prompt": prompt, "chosen": chosen, "rejected": rng.choice(mistakes), "level": number}
            pairs.append(row if split == "train" else row | {"database": domain.write_script()})
        rows += pairs
    rng.shuffle(rows)
    return rows


def read_questions(path: Path) -> set[str]:
    """The questions of the sample set, which no pair asks again."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["messages"][0]["content"].splitlines()[-1] for row in rows}


def list_wrong_queries(query: Query, domain: Domain) -> list[str]:
    """Likely mistakes as SQL, each of which was run and gives another result than the right query."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(domain.write_script())
        in_order = bool(query.order_by)
        right = fetch(connection, write_sql(query), in_order=in_order)
        wrong = dict.fromkeys(write_sql(mistake) for mistake in list_mistakes(query))
        return [sql for sql in wrong if fetch(connection, sql, in_order=in_order) != right]


def fetch(connection: sqlite3.Connection, sql: str, *, in_order: bool) -> list[tuple[Value, ...]]:
    """Rows of a query; sorted where their order says nothing."""
    rows: list[tuple[Value, ...]] = connection.execute(sql).fetchall()
    return rows if in_order else sorted(rows, key=repr)


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description="Write the text-to-SQL preference sets.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for preference.jsonl and preference_eval.jsonl")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, name in FILES.items():
        rows = write_pairs(split, random.Random(f"{options.seed} preference {split}"))
        write_jsonl(options.out / name, rows)
        print(f"{options.out / name}: {len(rows)} pairs")


if __name__ == "__main__":
    main()

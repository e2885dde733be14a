"""Writes the text-to-SQL sample set, the same bytes every time.

    python data/text_to_sql/generate.py
    python data/text_to_sql/generate.py --out /tmp/sql --seed 8

A row of `train.jsonl` (a row of `eval.jsonl` also holds "database", the SQL script that the answers are run against)::

    {"messages": [{"role": "user", "content": "lakes(name, level)\\nShow the ..."},
                  {"role": "assistant", "content": "SELECT ..."}], "level": 2}
"""

import argparse
import contextlib
import itertools
import json
import random
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, Python looks beside the script and not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.text_to_sql import questions as ask
from data.text_to_sql.queries import is_discriminating, write_sql
from data.text_to_sql.source import NoSuchColumnError, Source, Wordings, read_wordings
from data.text_to_sql.tables import Domain, read_domains

HERE = Path(__file__).resolve().parent
AskFunction = Callable[[Source], ask.Asked]
Row = dict[str, Any]

DISTRACTOR_SHARE = 0.35
ATTEMPTS_PER_DOMAIN = 60
MAX_DOMAINS_TRIED = 200


@dataclass(frozen=True)
class Level:
    """One level of difficulty: how many rows train, and the kinds of question, one entry for each turn."""

    name: str
    train_rows: int
    intents: tuple[AskFunction, ...]


LEVELS = (
    Level("select", 35, (ask.ask_select,)),
    Level("filter", 50, (ask.ask_filter_text, ask.ask_filter_number, ask.ask_lookup)),
    Level("two conditions", 75, (ask.ask_filter_both, ask.ask_filter_both, ask.ask_filter_either)),
    Level("count", 60, (ask.ask_count_where, ask.ask_count_where, ask.ask_count_where, ask.ask_count_all)),
    Level("aggregate", 65, (ask.ask_aggregate, ask.ask_aggregate_where)),
    Level("distinct", 45, (ask.ask_distinct, ask.ask_count_distinct, ask.ask_distinct_where)),
    Level("order and limit", 75, (ask.ask_sort, ask.ask_top, ask.ask_top_one)),
    Level("group", 75, (ask.ask_group_count, ask.ask_group_aggregate, ask.ask_group_top)),
    Level("join", 80, (ask.ask_join_filter, ask.ask_join_filter, ask.ask_join_both)),
    Level("join and aggregate", 80, (ask.ask_join_count, ask.ask_join_aggregate, ask.ask_join_group)),
)
FIRST_JOIN_LEVEL = 9
EVAL_ROWS_PER_LEVEL = 12


def write_rows(split: str, rng: random.Random) -> list[Row]:
    """Every row of a split ("train" or "eval"), in mixed order."""
    wordings = read_wordings(HERE / f"wordings_{split}.txt")
    seen: set[str] = set()
    rows = []
    for number, level in enumerate(LEVELS, start=1):
        # Tables are filled anew for each level: more values in the questions, more databases in the evaluation.
        domains = read_domains(HERE / f"tables_{split}.txt", rng)
        domains = [domain for domain in domains if domain.is_pair or number < FIRST_JOIN_LEVEL]
        turns = take_turns(domains, rng)
        for place in range(level.train_rows if split == "train" else EVAL_ROWS_PER_LEVEL):
            domain, asked = draw_question(level.intents[place % len(level.intents)], turns, wordings, rng, seen)
            row = write_row(domain, asked, rng) | {"level": number}
            rows.append(row if split == "train" else row | {"database": domain.write_script()})
    rng.shuffle(rows)
    return rows


def take_turns(domains: list[Domain], rng: random.Random) -> Iterator[Domain]:
    """Every domain once in mixed order, then again, for ever."""
    while True:
        yield from rng.sample(domains, k=len(domains))


def draw_question(
    ask_question: AskFunction, turns: Iterator[Domain], wordings: Wordings, rng: random.Random, seen: set[str]
) -> tuple[Domain, ask.Asked]:
    """A question that is new and that its database answers unlike any likely mistake. Adds it to `seen`."""
    for domain in itertools.islice(turns, MAX_DOMAINS_TRIED):
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(domain.write_script())
            for _ in range(ATTEMPTS_PER_DOMAIN):
                try:
                    asked = ask_question(Source(domain, wordings, rng))
                except NoSuchColumnError:
                    continue
                if asked.question not in seen and is_discriminating(asked.query, connection):
                    seen.add(asked.question)
                    return domain, asked
    raise RuntimeError(f"{ask_question.__name__} finds no new question; add tables or wordings")


def write_row(domain: Domain, asked: ask.Asked, rng: random.Random) -> Row:
    """The row's messages; one in three that need one table of a pair also show the other."""
    shown = list(asked.tables)
    if domain.is_pair and len(shown) == 1 and rng.random() < DISTRACTOR_SHARE:
        shown = list(domain.tables)
    rng.shuffle(shown)
    prompt = f"{domain.write_schema(shown)}\n{asked.question}"
    answer = {"role": "assistant", "content": write_sql(asked.query)}
    return {"messages": [{"role": "user", "content": prompt}, answer]}


def check_nothing_shared() -> None:
    """Raises ValueError when the two splits share a table, a set of columns, a text value or a wording."""
    train = describe_split("train")
    for name, held_out in describe_split("eval").items():
        if shared := held_out & train[name]:
            raise ValueError(f"training and evaluation share {name}: {sorted(shared)}")


def describe_split(split: str) -> dict[str, set[str]]:
    """What must not be shared: the split's table names, sets of columns, text values and wordings."""
    domains = read_domains(HERE / f"tables_{split}.txt", random.Random(0))
    tables = [table for domain in domains for table in domain.tables]
    wordings = read_wordings(HERE / f"wordings_{split}.txt")
    values = {value.lower() for table in tables for column in table.columns for value in column.values}
    return {
        "tables": {name for table in tables for name in (table.name, table.singular)},
        "columns": {" ".join(sorted(column.name for column in table.columns)) for table in tables},
        "values": values,
        "wordings": {f"{kind}: {line}" for kind, lines in wordings.items() for line in lines},
    }


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Writes one JSON object a line, with the same line ends on every system."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description="Write the text-to-SQL sample set.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    check_nothing_shared()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        rows = write_rows(split, random.Random(f"{options.seed} {split}"))
        write_jsonl(options.out / f"{split}.jsonl", rows)
        print(f"{options.out / split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()

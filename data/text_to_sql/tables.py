"""Reads the tables that the text-to-SQL questions are about, and fills them with rows.

`tables_train.txt` and `tables_eval.txt` hold one table a line; an empty line ends a domain (one table, or a parent and
its child)::

    @cities = Paris|Rome|Oslo
    teams: name=Lions|Tigers|Eagles; city=@cities; budget 10 99
    players <team>: name=Anna|Ben|Emma; role=Keeper|Captain; age 17 38

A table is called by its noun and an s, and `<team>` gives the child its key `team_id`. `column=a|b` is text (the first
column, `name`, tells rows apart; `@cities` is a list shared by several tables), `column low high [step]` a whole
number.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Value = str | int
"""One cell."""

NEVER_ADDED = {"age", "grade", "level", "power", "rating", "risk", "score", "speed"}
ROWS_PER_TABLE = (10, 16)
PARENT_ROWS = 8


@dataclass(frozen=True)
class Column:
    """One column: `values` for text, a range for a number."""

    name: str
    values: tuple[str, ...] = ()
    numbers: range = range(0)

    @property
    def is_number(self) -> bool:
        """Whether the column can be compared, averaged and sorted."""
        return not self.values


@dataclass(frozen=True)
class Table:
    """One table; `parent` (one row of it) is empty unless the table points to another one."""

    name: str
    columns: tuple[Column, ...]
    parent: str = ""

    @property
    def singular(self) -> str:
        """What one row is called."""
        return self.name.removesuffix("s")

    @property
    def label(self) -> Column:
        """The column that tells rows apart."""
        return self.columns[0]

    @property
    def key(self) -> str:
        """The column that points to the parent, e.g. `team_id`."""
        return f"{self.parent}_id"


@dataclass(frozen=True)
class Domain:
    """One table, or a parent and its child, with rows: `rows[table name]` is a list of {column: value}."""

    tables: tuple[Table, ...]
    rows: dict[str, list[dict[str, Value]]]

    @property
    def is_pair(self) -> bool:
        """Whether a join is possible."""
        return len(self.tables) == 2

    def column_names(self, table: Table) -> list[str]:
        """The columns as SQL knows them: a parent begins with its `id`, a child has its key after its name."""
        names = [column.name for column in table.columns]
        if table.parent:
            return [names[0], table.key, *names[1:]]
        return ["id", *names] if self.is_pair else names

    def write_schema(self, shown: Sequence[Table]) -> str:
        """The schema a prompt shows, one `table(column, column)` a line."""
        return "\n".join(f"{table.name}({', '.join(self.column_names(table))})" for table in shown)

    def write_script(self) -> str:
        """The SQL script that builds the tables with their rows."""
        return "\n".join(self._write_table(table) for table in self.tables)

    def _write_table(self, table: Table) -> str:
        texts = {column.name for column in table.columns if not column.is_number}
        names = self.column_names(table)
        columns = ", ".join(f"{name} {'TEXT' if name in texts else 'INTEGER'}" for name in names)
        rows = ", ".join("(" + ", ".join(write_literal(row[n]) for n in names) + ")" for row in self.rows[table.name])
        return f"CREATE TABLE {table.name} ({columns});\nINSERT INTO {table.name} VALUES {rows};"


def write_literal(value: Value) -> str:
    """A value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def read_domains(path: Path, rng: random.Random) -> list[Domain]:
    """Reads a tables file and fills its tables with rows."""
    pools: dict[str, str] = {}
    domains = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("@"):
            pools = dict(line.split(" = ") for line in lines)
            continue
        tables = tuple(_read_table(line, pools) for line in lines)
        domains.append(Domain(tables, _draw_rows(tables, rng)))
    return domains


def _read_table(line: str, pools: dict[str, str]) -> Table:
    match = re.fullmatch(r"(\w+s)(?: <(\w+)>)?: (.+)", line)
    if match is None:
        raise ValueError(f"not a table: {line}")
    name, parent, columns = match.groups()
    return Table(name, tuple(_read_column(text, pools) for text in columns.split("; ")), parent or "")


def _read_column(text: str, pools: dict[str, str]) -> Column:
    if "=" in text:
        name, values = text.split("=")
        return Column(name, values=tuple(pools.get(values, values).split("|")))
    name, low, high, *step = text.split(" ")
    width = int(step[0]) if step else 1
    return Column(name, numbers=range(int(low), int(high) + width, width))


def _draw_rows(tables: tuple[Table, ...], rng: random.Random) -> dict[str, list[dict[str, Value]]]:
    if len(tables) == 1:
        return {tables[0].name: _draw_table(tables[0], rng.randint(*ROWS_PER_TABLE), rng)}
    parent, child = tables
    parents = _draw_table(parent, PARENT_ROWS, rng)
    children = _draw_table(child, rng.randint(*ROWS_PER_TABLE), rng)
    for number, row in enumerate(parents, start=1):
        row["id"] = number
    # Every parent has a child: "count the players for each team name" then has one answer, whether or not a reader
    # would have listed teams without players.
    ids: list[Value] = [row["id"] for row in parents]
    keys = ids + rng.choices(ids[:3], k=len(children) - len(ids))
    rng.shuffle(keys)
    for row, key in zip(children, keys, strict=True):
        row[child.key] = key
    return {parent.name: parents, child.name: children}


def _draw_table(table: Table, count: int, rng: random.Random) -> list[dict[str, Value]]:
    labels = rng.sample(table.label.values, k=min(count, len(table.label.values)))
    columns: dict[str, list[Value]] = {table.label.name: list(labels)}
    for column in table.columns[1:]:
        columns[column.name] = _draw_column(column, len(labels), rng)
    return [{name: values[place] for name, values in columns.items()} for place in range(len(labels))]


def _draw_column(column: Column, count: int, rng: random.Random) -> list[Value]:
    if column.is_number:
        drawn = sorted(rng.sample(column.numbers, k=count))
        if rng.random() < 0.5:
            # One tie, away from both ends, so that a sort by this column can still ask for the first few.
            drawn[count // 2] = drawn[count // 2 - 1]
        return rng.sample(drawn, k=count)
    # A few values, unevenly often: groups differ in size, and DISTINCT and COUNT(DISTINCT) matter.
    chosen = rng.sample(column.values, k=min(4, len(column.values)))
    return list(rng.choices(chosen, weights=range(len(chosen), 0, -1), k=count))

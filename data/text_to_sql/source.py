"""What a question is drawn from: a domain's columns and values, and the split's sentences around key phrases.

A question is a sentence of its split (`wordings_train.txt`, `wordings_eval.txt`: one a line under its kind) around key
phrases, `PHRASES`, that both splits share and that always mean the same: "for each" is GROUP BY, "different" is
DISTINCT, "with the highest" sorts::

    [list]
    Show the {t} of the {p}{cond}.      ->  Show the name of the books with price above 20.

Slots: `{p}` the table, `{t}` the columns asked for, `{cond}` the conditions, `{one}` "book named Red Moon" or "3 books
with the highest price", `{c}` a column, `{number}` another, `{most}` "most" or "fewest", the rest as in `PHRASES`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.text_to_sql.queries import Condition
from data.text_to_sql.tables import Column, Domain, Table

Wordings = dict[str, tuple[str, ...]]

PHRASES: dict[str, tuple[str, ...]] = {
    "=": ("{v}",),
    ">": ("above {v}", "greater than {v}"),
    "<": ("below {v}", "less than {v}"),
    "MAX": ("highest", "maximum"),
    "MIN": ("lowest", "minimum"),
    "AVG": ("average",),
    "SUM": ("total",),
    "distinct": ("different", "distinct"),
    "descending": ("{c} from high to low", "{c} in descending order"),
    "ascending": ("{c} from low to high", "{c} in ascending order"),
}


class NoSuchColumnError(LookupError):
    """The table has no column of the kind that the question needs."""


@dataclass(frozen=True)
class Source:
    """What a question is drawn from."""

    domain: Domain
    wordings: Wordings
    rng: random.Random

    def pick_table(self) -> Table:
        """Any table of the domain."""
        return self.rng.choice(self.domain.tables)

    def pick_column(self, table: Table, kind: str, without: Sequence[Column] = ()) -> Column:
        """A "text", "number" or "any" column other than the label and those.

        Raises:
            NoSuchColumnError: the table has none.
        """
        left = [column for column in table.columns[1:] if column not in without]
        fitting = [column for column in left if kind == "any" or column.is_number == (kind == "number")]
        if not fitting:
            raise NoSuchColumnError(kind)
        return self.rng.choice(fitting)

    def pick_targets(self, table: Table, without: Sequence[Column] = ()) -> list[Column]:
        """Mostly the label; sometimes another column, or both."""
        draw = self.rng.random()
        if draw < 0.5:
            return [table.label]
        other = self.pick_column(table, "any", without)
        return [other] if draw < 0.75 else [table.label, other]

    def draw_condition(self, table: Table, column: Column) -> Condition:
        """A comparison with a value that some row holds, so that > and >= differ."""
        operator = self.rng.choice((">", ">", "<", "<", "=")) if column.is_number else "="
        return Condition(column.name, operator, self.rng.choice(self.domain.rows[table.name])[column.name])

    def say(self, kind: str, table: Table, **slots: str) -> str:
        """One of the kind's sentences, filled."""
        return self.rng.choice(self.wordings[kind]).format(p=table.name, **slots)

    def say_phrase(self, name: str, **slots: str) -> str:
        """One of the ways to say a key phrase."""
        return self.rng.choice(PHRASES[name]).format(**slots)

    def say_conditions(self, tests: Sequence[Condition], *, any_of: bool = False) -> str:
        """Conditions as one phrase: " with city Rome and age above 20", " whose city is Rome or Oslo"."""
        before, verb = self.rng.choice(((" with ", " "), (" whose ", " is ")))
        bodies = [test.column + verb + self.say_phrase(test.operator, v=str(test.value)) for test in tests]
        if any_of:
            return f"{before}{bodies[0]} or {tests[1].value}"
        return before + (" and whose " if verb == " is " else " and ").join(bodies)


def read_wordings(path: Path) -> Wordings:
    """Reads a wordings file: kind → its sentences."""
    sections = path.read_text(encoding="utf-8").strip().split("\n\n")
    return {head.strip("[]"): tuple(lines) for head, *lines in (section.splitlines() for section in sections)}

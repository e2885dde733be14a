"""One function per kind of question: draws columns and values, words the question and builds its query.

In the docstrings `t` is any table, `c` a child and `p` its parent. A join reads `FROM c JOIN p ON c.p_id = p.id`, and
every column then carries its table's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.text_to_sql.queries import Condition, Query
from data.text_to_sql.source import Source
from data.text_to_sql.tables import NEVER_ADDED, Column, Table


@dataclass(frozen=True)
class Asked:
    """A question, its query, and the tables the query needs."""

    question: str
    query: Query
    tables: tuple[Table, ...]


def _join_names(columns: Sequence[Column]) -> str:
    return " and ".join(column.name for column in columns)


def _select(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(column.name for column in columns)


def ask_select(source: Source) -> Asked:
    """`SELECT name FROM t`, `SELECT name, age FROM t`."""
    table = source.pick_table()
    columns = source.rng.sample(table.columns, k=source.rng.choice((1, 2, 2)))
    question = source.say("list", table, t=_join_names(columns), cond="")
    return Asked(question, Query(_select(columns), table.name), (table,))


def ask_lookup(source: Source) -> Asked:
    """`SELECT age FROM t WHERE name = 'Anna'`."""
    table = source.pick_table()
    column = source.pick_column(table, "any")
    test = source.draw_condition(table, table.label)
    question = source.say("pick", table, t=column.name, one=f"{table.singular} named {test.value}")
    return Asked(question, Query((column.name,), table.name, where=(test,)), (table,))


def _ask_filter(source: Source, table: Table, columns: Sequence[Column], *, any_of: bool = False) -> Asked:
    tests = tuple(source.draw_condition(table, column) for column in columns)
    targets = source.pick_targets(table, columns)
    question = source.say("list", table, t=_join_names(targets), cond=source.say_conditions(tests, any_of=any_of))
    return Asked(question, Query(_select(targets), table.name, where=tests, any_of=any_of), (table,))


def ask_filter_text(source: Source) -> Asked:
    """`SELECT name FROM t WHERE city = 'Rome'`."""
    table = source.pick_table()
    return _ask_filter(source, table, [source.pick_column(table, "text")])


def ask_filter_number(source: Source) -> Asked:
    """`SELECT name FROM t WHERE age > 20`."""
    table = source.pick_table()
    return _ask_filter(source, table, [source.pick_column(table, "number")])


def ask_filter_both(source: Source) -> Asked:
    """`SELECT name FROM t WHERE city = 'Rome' AND age > 20`."""
    table = source.pick_table()
    first = source.pick_column(table, "number")
    second = source.pick_column(table, "any", [first])
    return _ask_filter(source, table, source.rng.sample([first, second], k=2))


def ask_filter_either(source: Source) -> Asked:
    """`SELECT name FROM t WHERE city = 'Rome' OR city = 'Oslo'`."""
    table = source.pick_table()
    column = source.pick_column(table, "text")
    return _ask_filter(source, table, [column, column], any_of=True)


def ask_count_all(source: Source) -> Asked:
    """`SELECT COUNT(*) FROM t`."""
    table = source.pick_table()
    return Asked(source.say("count", table, cond=""), Query(("COUNT(*)",), table.name), (table,))


def ask_count_where(source: Source) -> Asked:
    """`SELECT COUNT(*) FROM t WHERE age > 20`."""
    table = source.pick_table()
    test = source.draw_condition(table, source.pick_column(table, "any"))
    question = source.say("count", table, cond=source.say_conditions([test]))
    return Asked(question, Query(("COUNT(*)",), table.name, where=(test,)), (table,))


def _draw_aggregate(source: Source, column: Column) -> tuple[str, str]:
    """The SQL function and how it is said."""
    choices = ["AVG", "MAX", "MIN"] + ["SUM"] * (column.name not in NEVER_ADDED)
    function = source.rng.choice(choices)
    return function, source.say_phrase(function)


def ask_aggregate(source: Source) -> Asked:
    """`SELECT AVG(age) FROM t`."""
    table = source.pick_table()
    column = source.pick_column(table, "number")
    function, spoken = _draw_aggregate(source, column)
    question = source.say("aggregate", table, agg=spoken, c=column.name, cond="")
    return Asked(question, Query((f"{function}({column.name})",), table.name), (table,))


def ask_aggregate_where(source: Source) -> Asked:
    """`SELECT AVG(age) FROM t WHERE city = 'Rome'`."""
    table = source.pick_table()
    column = source.pick_column(table, "number")
    test = source.draw_condition(table, source.pick_column(table, "any", [column]))
    function, spoken = _draw_aggregate(source, column)
    question = source.say("aggregate", table, agg=spoken, c=column.name, cond=source.say_conditions([test]))
    return Asked(question, Query((f"{function}({column.name})",), table.name, where=(test,)), (table,))


def ask_distinct(source: Source) -> Asked:
    """`SELECT DISTINCT city FROM t`."""
    table = source.pick_table()
    column = source.pick_column(table, "text")
    question = source.say("distinct", table, different=source.say_phrase("distinct"), c=column.name, cond="")
    return Asked(question, Query((column.name,), table.name, distinct=True), (table,))


def ask_distinct_where(source: Source) -> Asked:
    """`SELECT DISTINCT city FROM t WHERE age > 20`."""
    table = source.pick_table()
    column = source.pick_column(table, "text")
    test = source.draw_condition(table, source.pick_column(table, "any", [column]))
    slots = {"different": source.say_phrase("distinct"), "c": column.name, "cond": source.say_conditions([test])}
    query = Query((column.name,), table.name, where=(test,), distinct=True)
    return Asked(source.say("distinct", table, **slots), query, (table,))


def ask_count_distinct(source: Source) -> Asked:
    """`SELECT COUNT(DISTINCT city) FROM t`."""
    table = source.pick_table()
    column = source.pick_column(table, "text")
    question = source.say("count_distinct", table, different=source.say_phrase("distinct"), c=column.name)
    return Asked(question, Query((f"COUNT(DISTINCT {column.name})",), table.name), (table,))


def ask_sort(source: Source) -> Asked:
    """`SELECT name FROM t ORDER BY age DESC`."""
    table = source.pick_table()
    column = source.pick_column(table, "number")
    descending = source.rng.random() < 0.5
    order = source.say_phrase("descending" if descending else "ascending", c=column.name)
    targets = source.pick_targets(table, [column])
    question = source.say("sort", table, t=_join_names(targets), order=order)
    return Asked(question, Query(_select(targets), table.name, order_by=column.name, descending=descending), (table,))


def _ask_top(source: Source, limit: int) -> Asked:
    table = source.pick_table()
    column = source.pick_column(table, "number")
    descending = source.rng.random() < 0.5
    targets = source.pick_targets(table, [column])
    noun = table.singular if limit == 1 else f"{limit} {table.name}"
    one = f"{noun} with the {'highest' if descending else 'lowest'} {column.name}"
    question = source.say("pick", table, t=_join_names(targets), one=one)
    query = Query(_select(targets), table.name, order_by=column.name, descending=descending, limit=limit)
    return Asked(question, query, (table,))


def ask_top(source: Source) -> Asked:
    """`SELECT name FROM t ORDER BY age DESC LIMIT 3`."""
    return _ask_top(source, source.rng.randint(2, 5))


def ask_top_one(source: Source) -> Asked:
    """`SELECT name FROM t ORDER BY age DESC LIMIT 1`."""
    return _ask_top(source, 1)


def ask_group_count(source: Source) -> Asked:
    """`SELECT city, COUNT(*) FROM t GROUP BY city`."""
    table = source.pick_table()
    column = source.pick_column(table, "text").name
    question = source.say("group_count", table, c=column)
    return Asked(question, Query((column, "COUNT(*)"), table.name, group_by=column), (table,))


def ask_group_aggregate(source: Source) -> Asked:
    """`SELECT city, AVG(age) FROM t GROUP BY city`."""
    table = source.pick_table()
    column = source.pick_column(table, "text").name
    number = source.pick_column(table, "number")
    function, spoken = _draw_aggregate(source, number)
    question = source.say("group_aggregate", table, agg=spoken, number=number.name, c=column)
    return Asked(question, Query((column, f"{function}({number.name})"), table.name, group_by=column), (table,))


def ask_group_top(source: Source) -> Asked:
    """`SELECT city FROM t GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1`."""
    table = source.pick_table()
    column = source.pick_column(table, "text").name
    descending = source.rng.random() < 0.5
    question = source.say("group_top", table, c=column, most="most" if descending else "fewest")
    query = Query((column,), table.name, group_by=column, order_by="COUNT(*)", descending=descending, limit=1)
    return Asked(question, query, (table,))


def _write_join(source: Source) -> tuple[Table, Table, str]:
    parent, child = source.domain.tables
    return parent, child, f"{parent.name} ON {child.name}.{child.key} = {parent.name}.id"


def _ask_of_parent(source: Source, select: str, kind: str, **slots: str) -> Asked:
    """A question about the child's rows " of the team named Lions" or " of teams with city Rome"."""
    parent, child, join = _write_join(source)
    if source.rng.random() < 0.5:
        test = source.draw_condition(parent, parent.label)
        spoken = f" of the {parent.singular} named {test.value}"
    else:
        test = source.draw_condition(parent, source.pick_column(parent, "any"))
        spoken = f" of {parent.name}{source.say_conditions([test])}"
    where = Condition(f"{parent.name}.{test.column}", test.operator, test.value)
    question = source.say(kind, child, cond=spoken, **slots)
    return Asked(question, Query((select,), child.name, join=join, where=(where,)), (parent, child))


def ask_join_filter(source: Source) -> Asked:
    """`SELECT c.name FROM c JOIN p ON c.p_id = p.id WHERE p.city = 'Rome'`."""
    child = source.domain.tables[1]
    target = child.label if source.rng.random() < 0.5 else source.pick_column(child, "any")
    return _ask_of_parent(source, f"{child.name}.{target.name}", "list", t=target.name)


def ask_join_both(source: Source) -> Asked:
    """`SELECT c.name, p.name FROM c JOIN p ON c.p_id = p.id`."""
    parent, child, join = _write_join(source)
    own, other = source.rng.choice(child.columns), source.rng.choice(parent.columns)
    question = source.say("list", child, t=f"{own.name} and {parent.singular} {other.name}", cond="")
    select = (f"{child.name}.{own.name}", f"{parent.name}.{other.name}")
    return Asked(question, Query(select, child.name, join=join), (parent, child))


def ask_join_count(source: Source) -> Asked:
    """`SELECT COUNT(*) FROM c JOIN p ON c.p_id = p.id WHERE p.city = 'Rome'`."""
    return _ask_of_parent(source, "COUNT(*)", "count")


def ask_join_aggregate(source: Source) -> Asked:
    """`SELECT AVG(c.age) FROM c JOIN p ON c.p_id = p.id WHERE p.city = 'Rome'`."""
    child = source.domain.tables[1]
    column = source.pick_column(child, "number")
    function, spoken = _draw_aggregate(source, column)
    select = f"{function}({child.name}.{column.name})"
    return _ask_of_parent(source, select, "aggregate", agg=spoken, c=column.name)


def ask_join_group(source: Source) -> Asked:
    """`SELECT p.name, COUNT(*) FROM c JOIN p ON c.p_id = p.id GROUP BY p.name`."""
    parent, child, join = _write_join(source)
    column = parent.label if source.rng.random() < 0.5 else source.pick_column(parent, "text")
    question = source.say("group_count", child, c=f"{parent.singular} {column.name}")
    grouped = f"{parent.name}.{column.name}"
    return Asked(question, Query((grouped, "COUNT(*)"), child.name, join=join, group_by=grouped), (parent, child))

"""Runs a chat template as transformers does, but for limits: a template comes with a model, so a stranger wrote it.

transformers' sandbox keeps a template away from Python's internals. It does not stop one from looping for hours or from
filling the memory. Here every loop and call looks at a clock, every operator, filter and call looks at the size of what it
makes, and on Linux a limit of the address space stands behind them. No framework is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from utils.template_limits import (
    MAX_BITS,
    MAX_CHARACTERS,
    MAX_ITEMS,
    Limits,
    TemplateLimitError,
    check_arguments,
    check_pattern,
    check_product,
    check_size,
    concatenate,
    measure,
)

MAX_SOURCE = 256 * 1024
MAX_DEPTH = 200
MAX_NODES = 20_000
# A run must be repeatable and its cache valid tomorrow, so «today» is always the day that Llama 3's template falls back to.
TODAY = datetime(2024, 7, 26)
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# What a template can make Python raise. Anything else is a bug of ours and must be seen.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, NotImplementedError,
    RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def guard_filter(name: str, function: Callable[..., Any], limits: Limits) -> Callable[..., Any]:
    """Puts the checks around one of Jinja's filters; `wraps` keeps Jinja's marks for what it passes in."""

    @wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        if len(arguments) + len(named) == 1:  # the usual case: nothing but the value itself
            return limits.check(function(*arguments, **named))
        check_arguments((*arguments, *named.values()))
        if name == "format":
            check_pattern(arguments[0])
        elif name == "join":
            arguments = tuple(list(v) if isinstance(v, (Iterator, range)) else v for v in arguments)
            lists = [value for value in arguments if isinstance(value, list)]
            check_product(next((v for v in (*arguments, *named.values()) if isinstance(v, str)), ""), name, lists)
        else:
            first = next((index for index, value in enumerate(arguments) if isinstance(value, str)), 0)
            check_product(arguments[first], name, [*arguments[first + 1 :], *named.values()])
        return limits.check(function(*arguments, **named))

    return guarded


class Generation(Extension):
    """`{% generation %}`, which training templates write around what is learned: here it only groups."""

    tags = {"generation"}  # noqa: RUF012 Jinja's own way to declare it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Reads up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """`namespace(…)` that takes no name with an underscore, as in transformers: none leads to Python's internals."""

    def __init__(*arguments: Any, **named: Any) -> None:  # `namespace(self=…)` must work
        self, given = arguments[0], dict(*arguments[1:], **named)
        for name in given:
            check_attribute(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        check_attribute(name)
        jinja2.utils.Namespace.__setitem__(self, name, check_size(value))


def check_attribute(name: Any) -> None:
    """No underscore first."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class MakeDict:
    """`dict(…)` without the attributes of Python's class."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """`dict.fromkeys(…)`."""
        return dict.fromkeys(*arguments)


def refuse_conversation(message: str) -> None:
    """`raise_exception(…)`: how templates say that they do not take a conversation."""
    raise jinja2.TemplateError(message)


def write_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """`tojson` as transformers has it: Jinja's own would write HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def write_today(pattern: str) -> str:
    """`strftime_now(…)` of one fixed day."""
    if len(pattern) > 100 or re.search(r"\d{3}", pattern):
        raise TemplateLimitError("its date pattern is too long")
    return TODAY.strftime(pattern)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers 5.23 (`chat_template_utils.py`) with limits."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        self.limits = Limits()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, LoopControlExtension],
            finalize=self.limits.count_output,
            optimized=False,  # folding constants would run filters while compiling, where no clock is looked at
        )
        self.filters["tojson"] = write_json
        for slow in (
            "urlize",
            "wordwrap",
        ):  # they need quadratic time between two looks at the clock, and no chat uses them
            del self.filters[slow]
        self.filters = {name: guard_filter(name, function, self.limits) for name, function in self.filters.items()}
        self.filters["_tick"], self.filters["_join"], self.filters["_size"] = self.limits.tick, concatenate, check_size
        self.globals |= {"raise_exception": refuse_conversation, "strftime_now": write_today}
        self.globals |= {"dict": MakeDict(), "namespace": Namespace}
        del self.globals["lipsum"]  # random text

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        check_depth(tree)
        checked: jinja2.nodes.Template = InsertChecks().visit(tree)
        return checked

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
        """Every call: of a macro, a method, a global function."""
        __self.limits.check_time()
        if isinstance(owner := __obj.__self__ if type(__obj) in METHODS else None, str):
            check_product(owner, __obj.__name__, arguments)
        check_arguments((*arguments, *named.values()) if owner is not None else ())
        return __self.limits.check(super().call(__context, __obj, *arguments, **named))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`'{}'.format(…)`, which the sandbox replaces; a field may take its width from an argument."""
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None

        def guarded(*arguments: Any, **named: Any) -> str:
            given = [item for one in arguments for item in (one.values() if isinstance(one, dict) else [one])]
            check_pattern(value.__self__)
            check_arguments((*given, *named.values()))
            return wrapper(*arguments, **named)

        return guarded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*`, `**`, `+` and `%`, looked at before they are done."""
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    size = (len(many) if isinstance(many, str) else measure(many)[0]) * max(times, 0)
                    if size > (MAX_CHARACTERS if isinstance(many, str) else MAX_ITEMS):
                        raise TemplateLimitError(f"it repeats something {times:,} times")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_BITS:
                raise TemplateLimitError(f"it makes a number of more than {MAX_BITS:,} bits")
        elif operator == "%" and isinstance(left, str):
            check_pattern(left)
            check_arguments(right if isinstance(right, tuple) else (right,))
        return self.limits.check(super().call_binop(context, operator, left, right))


METHODS = (type("".join), type(refuse_conversation.__get__(0)))


def check_depth(tree: jinja2.nodes.Node) -> None:
    """Refuses templates so deep or so wide that compiling them would fail or take seconds."""
    level: list[jinja2.nodes.Node] = [tree]
    depth = nodes = 0
    while level:
        depth += 1
        nodes += len(level)
        if nodes > MAX_NODES:
            raise TemplateLimitError(f"it has more than {MAX_NODES:,} parts")
        level = [child for node in level for child in node.iter_child_nodes()]
        if depth > MAX_DEPTH:
            raise TemplateLimitError(f"it is nested more than {MAX_DEPTH} levels deep")


class InsertChecks(NodeTransformer):
    """Sends loops, `~` and literal lists of a parsed template through the checks."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        """A loop looks at the clock for each item."""
        self.generic_visit(node)
        node.iter = call_filter("_tick", node.iter)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """`a ~ b` is not among the operators that a sandbox can intercept."""
        self.generic_visit(node)
        return call_filter("_join", jinja2.nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:
        """A list of lists of lists can stand for more items than there is time to look at."""
        self.generic_visit(node)
        return call_filter("_size", node) if node.items else node

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:
        """As a list."""
        self.generic_visit(node)
        return call_filter("_size", node) if node.items else node

    def refuse(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        """There is nothing to load from, and a compiled template would say so only when it runs."""
        raise jinja2.TemplateSyntaxError("a chat template cannot load other templates", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = refuse


def call_filter(name: str, node: jinja2.nodes.Node) -> jinja2.nodes.Filter:
    """`node | name`."""
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Compiles a template once for each source.

    Raises:
        jinja2.TemplateError: the source is too long, too deep or no Jinja.
    """
    if len(source.encode()) > MAX_SOURCE:
        raise TemplateLimitError(f"it is longer than {MAX_SOURCE // 1024} KiB")
    try:
        return LimitedEnvironment().from_string(source)
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise TemplateLimitError("it is nested too deeply to be compiled") from error


def run_template(source: str, variables: Mapping[str, Any]) -> str:
    """Renders a template within the limits.

    Raises:
        jinja2.TemplateError and the other TEMPLATE_ERRORS: what the template did wrong.
    """
    template = compile_template(source)
    environment = template.environment
    assert isinstance(environment, LimitedEnvironment)
    limits = environment.limits
    limits.start(variables)
    try:
        text = "".join(template.generate(**variables))
        limits.check_output(len(text))
    finally:
        limits.stop()
    return text

"""Writes a recipe for a model and rows, in the look of the shipped ones, and checks it at once.

Nothing here trains or decides at run time: what is written is a file that people read, edit and keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from config.recipe_io import LoadedRecipe, build_recipe, check_document
from config.yaml_reader import RecipeDumper, parse_yaml
from utils.exceptions import RecipeError
from utils.preflight import Preflight, check_recipe
from utils.recipe_choices import (
    Line,
    Plan,
    Profile,
    choose_method,
    choose_profile,
    choose_strategy,
    describe_formats,
    iterate_sections,
)
from utils.recipe_facts import SEED, ModelFacts, count_tokens, find_origin, inspect_model, inspect_rows
from utils.rule_checks import Facts, show_count
from utils.rules import apply_rules

COMMENT_COLUMN = 28  # as in the shipped recipes
SAME_FOR_ALL = ("train", "data", "rows")  # names of files that say nothing; their folder does


@dataclass(frozen=True)
class Order:
    """What the user asks for; None is for `plan_recipe` to find out.

    Attributes:
        model: hub id, folder or `embedded/<name>`.
        data: training rows, as in `data.train`.
        size: parameters of the model.
        out: the file to write.
        backend: as in the recipe.
    """

    model: str
    data: str
    profile: Profile | None = None
    method: str | None = None
    size: int | None = None
    out: Path | None = None
    backend: str = "auto"


def plan_recipe(order: Order) -> Plan:
    """Finds out everything that a recipe needs; what is wrong with rows or model is raised before anything is written.

    Raises:
        RecipeError: no such model, nothing tells its size, or the file exists.
        DataError: rows that cannot be read, or that no method fits.
        ModelLoadingError: the model's files are damaged.
    """
    path = order.out or choose_path(order.model, order.data, order.backend)
    check_target(path)
    rows = inspect_rows(order.data)
    method = choose_method(order.method, rows)
    model = inspect_model(order.model, order.size)
    plan = Plan(path, model, rows, order.profile or choose_profile(rows), method, order.backend)
    rows = count_tokens(rows, make_draft(plan), model.source)
    return replace(plan, rows=rows, profile=order.profile or choose_profile(rows))


def make_draft(plan: Plan) -> LoadedRecipe:
    """A recipe that exists in memory only, with a limit that no row exceeds: to count tokens with."""
    strategy, _ = choose_strategy(plan)
    values = {
        "seed": SEED,
        "model": {"name": plan.model.name},
        "data": {"train": plan.rows.train, "eval": plan.rows.eval, "strategy": strategy, "max_length": 1_048_576},
        "training": {"method": plan.method},
    }
    recipe = build_recipe(values, find_origin)
    return LoadedRecipe(recipe, plan.path, {key: find_origin(key) for key in ("model.name", "data.train", "data.eval")})


def choose_path(model: str, data: str, backend: str = "auto") -> Path:
    """`recipes/<model>_<data>.yaml`, with the back end where it is named; a file called train.jsonl is known by its folder."""
    path = Path(data)
    stem = path.name.partition(".")[0]
    if stem in SAME_FOR_ALL or not any(character.isalnum() for character in stem):
        stem = path.parent.name or stem
    parts = (model.rstrip("/").rsplit("/", 1)[-1], stem)
    words = ["".join(c if c.isalnum() else "_" for c in part.lower()).strip("_") for part in parts]
    words += [] if backend == "auto" else [backend]
    return Path("recipes") / f"{'_'.join(words)}.yaml"


def check_target(path: Path) -> None:
    """Refuses to overwrite.

    Raises:
        RecipeError: the file exists.
    """
    if path.exists():
        fix = f"train it (python scripts/train.py --recipe {path}), or name another file with --out"
        raise RecipeError("this recipe exists already", where=str(path), fix=fix, code="exists")


def write_recipe(text: str, path: Path) -> None:
    """Writes the file.

    Raises:
        RecipeError: the file has come into being meanwhile, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        message = f"the recipe cannot be written: {error.strerror}"
        fix = "name another file with --out"
        raise RecipeError(message, where=str(path), fix=fix, code="exists") from error


def check_new_recipe(text: str, plan: Plan) -> Preflight | None:
    """Runs the pre-flight where the model's files are here, and the rules that need none elsewhere.

    Args:
        text: of the recipe, before it is written: one that is refused leaves no file behind.

    Returns:
        None if the model's files are not here.

    Raises:
        RecipeError, DataError, MachineError: what is wrong.
    """
    loaded = check_document(parse_yaml(text, str(plan.path)), plan.path)
    if plan.model.source is not None:
        return check_recipe(loaded)
    model = plan.model
    facts = Facts(
        loaded.recipe,
        model.family,
        has_chat_template=model.can_chat,
        formats=plan.rows.scan.formats,
        parameters=model.parameters,
    )
    apply_rules(loaded, facts)
    return None


def format_recipe(plan: Plan) -> str:
    """The recipe's text."""
    lines = [*format_header(plan), format_line(Line("seed", SEED, "any number; the same one repeats the run"), "")]
    if plan.backend != "auto":
        lines.append(format_line(Line("backend", plan.backend, "as asked for; auto would choose by the machine"), ""))
    for section, content in iterate_sections(plan):
        lines.append(f"{section}:")
        lines += [format_line(line, "  ") for line in content]
    return "\n".join(lines) + "\n"


def format_header(plan: Plan) -> Iterator[str]:
    """The comment at the top: what, command, rows, hardware, what was run."""
    model, rows = plan.model, plan.rows
    short = model.name.rstrip("/").rsplit("/", 1)[-1]
    yield f"# {short} ({show_count(model.parameters)}) learns from {rows.train}: profile {plan.profile}, method {plan.method}."
    yield "#"
    yield f"#   python scripts/train.py --recipe {plan.path}"
    yield "#"
    yield f"# Rows: {rows.rows:,} as {describe_formats(rows)}. Written by scripts/new_recipe.py; edit it as you like."
    gigabytes = 2 * model.parameters / 1e9
    yield f"# Needs: {gigabytes:.1f} GB for the weights in 16 bits; what the run takes here, scripts/validate.py predicts."
    yield "# Run end to end: not yet. No number here was measured on these rows; each says where it comes from."
    if model.missing:
        yield "# The model's files were not here: its family and size are those of its name, and tokens are estimated."


def format_line(line: Line, indent: str) -> str:
    """`  key: value      # why`, the comment in the column of the shipped recipes."""
    key, value, why = line
    if isinstance(value, float) and 0 < value < 0.001:
        digits, power = f"{value:.1e}".split("e")
        text = f"{key}: {digits}e{int(power)}"
    else:
        dumped = yaml.dump(
            {key: value},
            Dumper=RecipeDumper,
            default_flow_style=True,
            sort_keys=False,
            width=10_000,
            allow_unicode=True,
        )
        text = dumped.strip()[1:-1]
    text = indent + text
    return f"{text:<{COMMENT_COLUMN - 2}}  # {why}" if why else text


def describe_unchecked(model: ModelFacts) -> str:
    """What could not be checked of a model whose files are not here, for people."""
    family = model.family.name if model.family else "unknown, so every linear module is adapted"
    return (
        f"Not checked: {model.missing}\nTaken from {model.name!r} alone: family {family}; {show_count(model.parameters)} "
        f"parameters ({model.origin}); the rows' lengths in tokens are estimated."
    )

"""What a run depends on: recipe, rows, template, base and code, written down at its start and compared later."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from config.recipe_io import LoadedRecipe
from utils.cache_keys import hash_project
from utils.exceptions import Problem, RunError
from utils.logging import get_logger, hide_in_values

if TYPE_CHECKING:
    from utils.preflight import Preflight
    from utils.prepared_data import SourceHashes

# Hashes in run.json that a run and its checkpoints share.
SAME = ("recipe_hash", "data_hash", "eval_hash", "tokenizer_hash", "template_hash", "model_hash", "adapter_hash")
RECIPE_FACTS = ("recipe_hash", "settings", "automatic")
# Facts that may differ when a run goes on: it will, but perhaps not bit for bit.
MAY_DIFFER = {
    "device": "device",
    "device_name": "hardware",
    "dtype": "number format",
    "threads": "threads",
    "cores": "cores",
}
SHOWN_LINES = 6


def list_settings(loaded: LoadedRecipe) -> dict[str, Any]:
    """All values of a recipe as they may be written down; a secret in one is hidden."""
    settings: dict[str, Any] = hide_in_values(loaded.recipe.model_dump(mode="json"))
    return settings


def identify_recipe(loaded: LoadedRecipe) -> dict[str, Any]:
    """Facts about a recipe: its hash, its values, and which of them an automatic rule has chosen."""
    settings = list_settings(loaded)
    automatic = [key for key, origin in loaded.origins.items() if origin.startswith("auto")]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return {"recipe_hash": digest, "settings": settings, "automatic": automatic}


def identify_inputs(preflight: Preflight) -> dict[str, Any]:
    """Facts about rows, template, tokenizer, base and code."""
    template, source = preflight.tokenizer.template, preflight.source
    return {
        "model_hash": source.hash_weights(),
        "adapter_hash": source.hash_adapter(),
        "sources": preflight.data.hashes,
        "tokenizer_hash": preflight.tokenizer.hash,
        "template": template.name,
        "template_hash": template.hash,
        "template_source": template.source,
        "code_hash": hash_project(),
    }


def check_recipe_is_same(facts: Mapping[str, Any], now: LoadedRecipe, fix: str) -> None:
    """Refuses a recipe that is not the one that a run began with.

    Args:
        facts: of the run, from its run.json.
        now: the recipe to go on with.
        fix: what to do about a difference.

    Raises:
        RunError: each value that differs, with its line.
    """
    ran, asked = dict(flatten(facts["settings"])), dict(flatten(list_settings(now)))
    problems = []
    for key in sorted(ran.keys() | asked.keys()):
        before, after = ran.get(key, "nothing"), asked.get(key, "nothing")
        # What a rule has chosen in the run is what the recipe leaves to the rules.
        is_left_open = key in facts["automatic"] and (now.origins.get(key) == "default" or after == "auto")
        if before != after and not is_left_open:
            message = f"{key}: {show(before)} in the run, {show(after)} now"
            problems.append(Problem("recipe-changed", message, now.find_origin(key), fix))
    if problems:
        raise RunError.from_problems(problems)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of a recipe's settings; a section that is left out has no keys."""
    for name, value in values.items():
        if isinstance(value, dict) and "." not in prefix:
            yield from flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def show(value: Any) -> str:
    """A value as a recipe says it."""
    return value if isinstance(value, str) else json.dumps(value)


def check_rows_are_same(facts: Mapping[str, Any], now: SourceHashes, where: Mapping[str, str]) -> None:
    """Refuses rows that are not those that a run began with.

    Args:
        now: name and hash of each source, by `describe_sources`.
        where: place of `data.train` and `data.eval` in the recipe, by `train` and `eval`.

    Raises:
        RunError: the files that have changed, come or gone.
    """
    problems = []
    for part, place in where.items():
        before, after = (
            {str(name): digest for name, digest in found or ()} for found in (facts["sources"][part], now[part])
        )
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                what = "has changed" if name in before and name in after else "is new" if name in after else "is gone"
                message, fix = f"{name} {what} since the run began", "restore it, or train again"
                problems.append(Problem("data-changed", message, place, fix))
    if problems:
        raise RunError.from_problems(problems)


def check_inputs_are_same(facts: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Refuses a template or tokenizer that is not the one that a run began with.

    Args:
        facts, now: of the run, and what `identify_inputs` finds.
        place: of `data.template` in the recipe.

    Raises:
        RunError: with the lines of the template that differ.
    """
    fix = "restore it, or train again"
    if facts["template_hash"] != now["template_hash"]:
        before, after = (str(each["template_source"]).splitlines() for each in (facts, now))
        lines = list(difflib.unified_diff(before, after, "in the run", "now", n=0, lineterm=""))[2:]
        shown = "\n".join([*lines[:SHOWN_LINES], *(["…"] if len(lines) > SHOWN_LINES else [])])
        message = f"the template has changed since the run began:\n{shown}\n"
        raise RunError(message, where=place, fix=fix, code="template-changed")
    if facts["tokenizer_hash"] != now["tokenizer_hash"]:
        raise RunError(
            "the model's tokenizer has changed since the run began", where=place, fix=fix, code="tokenizer-changed"
        )


def warn_about_changes(facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says what else is not as it was when the run began: it goes on, and its numbers may differ in their last bits."""
    changes = ["the project's code"] if facts.get("code_hash") != now["code_hash"] else []
    for key, title in MAY_DIFFER.items():
        if facts.get(key) != now[key]:
            changes.append(f"{title} {facts.get(key)} → {now[key]}")
    before, after = facts.get("versions") or {}, now["versions"]
    changes += [
        f"{name} {before.get(name)} → {version}" for name, version in after.items() if before.get(name) != version
    ]
    if changes:
        message = "Not as when the run began: %s. It goes on, but perhaps not bit for bit as if it had never stopped"
        get_logger().warning(message, "; ".join(changes))

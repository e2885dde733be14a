"""Check a recipe completely, without loading weights.

    python scripts/validate.py --recipe recipes/smollm2_sql.yaml
    python scripts/validate.py --recipe recipes/smollm2_sql.yaml --json

Reads the recipe, every row, the model's config and tokenizer, encodes all examples and derives the steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config.recipe_io import format_resolved, load_recipe
from utils import cli
from utils.logging import hide_in_values, hide_secrets


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what the run would be; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result for programs")
    parser.add_argument("--show-recipe", action="store_true", help="print every value with its origin")
    options = parser.parse_args(arguments)
    loaded = load_recipe(options.recipe, options.overrides)

    from utils.preflight import check_recipe, summarise_preflight
    from utils.preview import print_first_example, print_warnings

    preflight = check_recipe(loaded)
    facts = summarise_preflight(preflight)
    if options.json:
        problems = [problem.to_json() for problem in preflight.warnings]
        print(json.dumps(hide_in_values({"ok": True, "problems": problems, "facts": facts}), indent=2))
        return 0
    if options.show_recipe:
        print(hide_secrets(format_resolved(preflight.loaded)))
    print_warnings(preflight.warnings)
    print_first_example(preflight)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = "; ".join(f"{key} {text}" for key, text in value.items()) or "none"
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"\nThe recipe is valid. Next: {cli.show_train_command(options)}")
    return 0


if __name__ == "__main__":
    cli.run(main)

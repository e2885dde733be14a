"""Write a recipe for a model and your rows, with a reason beside every number.

    python scripts/new_recipe.py --model embedded/smollm2-135m-instruct --data data/text_to_sql/train.jsonl
    python scripts/new_recipe.py --model Qwen/Qwen2.5-0.5B-Instruct --data my_chats.jsonl --profile chat --out recipes/mine.yaml

The numbers come from the family table, the model's size, and the rows' format, number and length. The recipe is printed and
validated, and written only where nothing refuses it. A model of the hub that is not in the cache is known by its name only, and
what could not be checked is said. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config.model_families import guess_parameters
from utils import cli
from utils.recipe_choices import BACKENDS, METHODS, PROFILES


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks and writes the recipe; returns the exit code."""
    options = read_options(arguments)

    from utils.preflight import summarise_preflight
    from utils.preview import print_warnings
    from utils.recipe_writer import (
        Order,
        check_new_recipe,
        describe_unchecked,
        format_recipe,
        plan_recipe,
        write_recipe,
    )

    asked = (options.profile, options.method, options.size, options.out, options.backend)
    plan = plan_recipe(Order(options.model, options.data, *asked))
    text = format_recipe(plan)
    print(text)
    preflight = check_new_recipe(text, plan)
    write_recipe(text, plan.path)
    print(f"Recipe: {plan.path}")
    if preflight is None:
        print(describe_unchecked(plan.model), file=sys.stderr)
        print(f"Next: python scripts/validate.py --recipe {plan.path}")
        return 0
    print_warnings(preflight.warnings)
    for name, value in summarise_preflight(preflight).items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"\nThe recipe is valid. Next: python scripts/train.py --recipe {plan.path}")
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.make_parser(__doc__)
    filled, what = cli.read_name, "training rows: file, glob or hub dataset"
    parser.add_argument("--model", required=True, type=filled, metavar="NAME", help="hub id, folder or embedded/<name>")
    parser.add_argument("--data", required=True, type=filled, metavar="FILE", help=what)
    parser.add_argument(
        "--profile", choices=PROFILES, help="kind of answers: sampling and metrics (default: by the rows)"
    )
    parser.add_argument("--method", choices=METHODS, help="as in training.method (default: what fits the rows)")
    parser.add_argument(
        "--size", type=read_size, metavar="N", help="parameters, such as 1.5B, where nothing tells them"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="as in backend (default: auto)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: recipes/<model>_<data>.yaml)")
    return parser.parse_args(arguments)


def read_size(text: str) -> int:
    """`1.5B` or `135M` as a number."""
    found = guess_parameters(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1.5B or 135M")
    return found


if __name__ == "__main__":
    cli.run(main)

"""Replay the first steps of a run from its folder, and compare losses and gradient norms with what it wrote down.

    python scripts/reproduce.py
    python scripts/reproduce.py --run outputs/smollm2_sql/2026-11-21_12-00-00 --steps 10

On the machine, versions and code of the run every bit must be the same; elsewhere the largest relative difference is told.
Nothing is written into the run folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from utils.allocator import restart_with_settings

    restart_with_settings()

from config.recipe_io import locate_problems
from utils import cli
from utils.logging import show_controls
from utils.run_folder import find_run

DEFAULT_STEPS = 5


def read_count(text: str) -> int:
    """A number of steps, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the inputs, takes the steps again, compares; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_run_argument(parser)
    cli.add_trust_argument(parser)
    parser.add_argument(
        "--steps", type=read_count, default=DEFAULT_STEPS, metavar="N", help=f"steps (default: {DEFAULT_STEPS})"
    )
    options = parser.parse_args(arguments)
    folder = find_run(options.run)
    loaded, facts = folder.load_recipe(trusts_code=options.trusts_code), folder.read_facts()

    from utils.backends import choose_backend, load_backend
    from utils.preflight import check_recipe
    from utils.replay import check_inputs, find_changes, format_steps, judge_replay, read_first_steps, replay_steps
    from utils.seed_manager import SeedManager
    from utils.threads import keep_threads
    from utils.training_run import PreparedRun, choose_micro_batch_size

    recorded = read_first_steps(folder, options.steps)
    preflight = check_recipe(loaded)
    check_inputs(folder, preflight)
    source, recipe = preflight.find_weights(), preflight.loaded.recipe
    folder.check_base(source)
    backend = load_backend(choose_backend(recipe, source.config))
    SeedManager(recipe.seed, deterministic=recipe.deterministic).seed_everything()
    with locate_problems(preflight.loaded), keep_threads(facts.get("threads")):
        model = backend.attach_lora(backend.load_model(source, recipe), recipe)
    machine = backend.describe_machine(model)
    loaded = choose_micro_batch_size(preflight.loaded, preflight, machine)
    run = PreparedRun(loaded, preflight, backend, model, folder)
    changes = find_changes(run, facts)
    steps = replay_steps(run, recorded)
    print("\n".join(format_steps(steps)))
    for change in changes:
        print(show_controls(f"differs: {change}"))
    print(judge_replay(steps, changes, machine.dtype, str(folder.path)))
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Compare a run's model with the untouched one on held-out rows.

    python scripts/evaluate_run.py
    python scripts/evaluate_run.py --run outputs/smollm2_sql/2026-11-21_12-00-00

Writes report.md, report.json and pictures into the run folder and prints the before/after table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils import cli
from utils.run_folder import find_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures both models and writes the report; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_run_argument(parser)
    cli.add_trust_argument(parser)
    options = parser.parse_args(arguments)
    folder = find_run(options.run)
    loaded = folder.load_recipe(trusts_code=options.trusts_code)

    from utils.backends import choose_backend, load_backend
    from utils.evaluation import evaluate_run
    from utils.preflight import check_recipe
    from utils.report import print_summary, write_report
    from utils.seed_manager import SeedManager

    folder.check_complete()
    preflight = check_recipe(loaded, folder)
    source = preflight.find_weights()
    folder.check_base(source)
    backend = load_backend(choose_backend(preflight.loaded.recipe, source.config))
    SeedManager(loaded.recipe.seed).seed_everything()
    examples, samples = preflight.read_evaluation_examples(), loaded.recipe.evaluation.samples
    evaluation = evaluate_run(backend, preflight, examples, source, folder)
    verdict = write_report(folder, evaluation, examples, samples, str(folder.read_facts()["recipe"]))
    print_summary(evaluation, verdict)
    print(f"\nReport: {folder.report_file}")
    print(f"Next: python scripts/infer.py --run {folder.path}")
    if not loaded.recipe.scratch:  # a new model has no base to merge with
        print(f"      python scripts/merge.py --run {folder.path}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Say what differs between two runs: recipe, rows, model, template, versions, machine, results, and where their losses part.

    python scripts/diff_runs.py outputs/smollm2_sql/2026-11-21_12-00-00 outputs/smollm2_sql/2026-11-21_13-00-00
    python scripts/diff_runs.py A B --json

Reads the run folders alone, also those of runs that failed, were stopped or are of an older version.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils import cli
from utils.logging import show_controls
from utils.run_comparison import compare_runs
from utils.run_folder import find_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the differences; returns the exit code."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="run folder")
    parser.add_argument("second", type=Path, metavar="B", help="run folder to compare it with")
    parser.add_argument("--json", action="store_true", help="print the result for programs")
    options = parser.parse_args(arguments)
    comparison = compare_runs(find_run(options.first), find_run(options.second))
    if options.json:
        print(json.dumps({"ok": True, "problems": [], **comparison.to_json()}, indent=2, allow_nan=False))
        return 0
    print(f"{options.first} → {options.second}")
    print(show_controls("\n".join(comparison.format())))
    return 0


if __name__ == "__main__":
    cli.run(main)

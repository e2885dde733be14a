"""Merge a run's adapter into its base model: a folder that every tool loads.

    python scripts/merge.py
    python scripts/merge.py --run outputs/smollm2_sql/2026-11-21_12-00-00 --out my_model
    python scripts/merge.py --compare
    python scripts/merge.py --base dequantized

The weights go from file to file in a few megabytes of memory, without a framework. What was written is read back and rows of
every changed tensor are computed anew; if they differ, nothing is left. --compare also loads both models and compares their
predictions. What cannot be merged from file to file is merged in memory, with the reason, and always compared so.

An adapter that was trained on a quantised base goes into the full-precision one, or with --base dequantized into the weights
that the quantised base stands for. A run that trained all weights is copied in the number format of its base.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils import cli
from utils.exceptions import AdapterError, RunError
from utils.run_folder import find_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges and verifies; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_run_argument(parser)
    cli.add_trust_argument(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to create (default: merged/ in the run folder)")
    what = "of a quantised run: merge into the full-precision base (default), or into its dequantised weights"
    parser.add_argument("--base", choices=("full", "dequantized"), default="full", help=what)
    what = "also load base, adapter and merged model, and compare their predictions"
    parser.add_argument("--compare", action="store_true", help=what)
    options = parser.parse_args(arguments)
    folder = find_run(options.run)
    loaded = folder.load_recipe(trusts_code=options.trusts_code)
    folder.check_complete()
    target = options.out or folder.path / "merged"
    if options.base == "dequantized" and loaded.recipe.model.quantization == "none":
        message = "--base dequantized is for runs on a quantised base, and this one has none"
        raise RunError(message, where=str(folder.path), fix="leave --base out", code="not-quantised")
    if loaded.recipe.scratch:
        message = "this run trained a new model: there is no base to merge with"
        raise AdapterError(message, where=str(folder.path), fix=f"use {folder.model}", code="no-adapter")
    if target.exists():
        raise RunError("the folder exists already", where=str(target), fix="name another one with --out", code="exists")

    # Our threads share out the rows; a BLAS that starts its own beside them takes twice as long. numpy reads this once.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from utils.merging import Trained, merge_run
    from utils.model_source import find_model
    from utils.run_tokenizer import open_run_tokenizer

    source = find_model(loaded.recipe.model, loaded.find_origin("model.name"), with_weights=True)
    folder.check_base(source)
    tokenizer = open_run_tokenizer(loaded, source, folder)
    merge = merge_run(Trained(loaded, source, folder, tokenizer), target, options.base, compare=options.compare)
    print("\n".join(merge.describe(loaded.recipe.model.quantization)))
    print(f"Model folder: {target}")
    print(f"Next: python scripts/infer.py --model {target}")
    return 0


if __name__ == "__main__":
    cli.run(main)

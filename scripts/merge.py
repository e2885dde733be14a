"""Merge an adapter into its base model: a folder that every tool loads.

    python scripts/merge.py
    python scripts/merge.py --run outputs/smollm2_sql/2026-11-21_12-00-00 --out my_model
    python scripts/merge.py --compare
    python scripts/merge.py --base dequantized
    python scripts/merge.py --model Qwen/Qwen2.5-0.5B-Instruct --adapter my_adapter --out my_model

The weights go from file to file in a few megabytes of memory, without a framework. What was written is read back and rows of
every changed tensor are computed anew; if they differ, nothing is left. --compare also loads both models and compares their
predictions. What cannot be merged from file to file is merged in memory, with the reason, and always compared so.

An adapter that was trained on a quantised base goes into the full-precision one, or with --base dequantized into the weights
that the quantised base stands for. A run that trained all weights is copied in the number format of its base. With --model an
adapter of any run or tool is merged, in the format of PEFT or of mlx-lm, and the chat template beside it goes with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils import cli
from utils.exceptions import RunError
from utils.run_folder import find_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges and verifies; returns the exit code."""
    parser = cli.make_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    cli.add_run_argument(which)
    cli.add_base_arguments(parser, which)
    cli.add_trust_argument(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to create (default: merged/ in the run folder)")
    what = "of a quantised run: merge into the full-precision base (default), or into its dequantised weights"
    parser.add_argument("--base", choices=("full", "dequantized"), default="full", help=what)
    what = "also load base, adapter and merged model, and compare their predictions"
    parser.add_argument("--compare", action="store_true", help=what)
    options = cli.parse_base_arguments(parser, arguments, both=True)
    if options.model and (not options.out or options.base == "dequantized"):
        parser.error("--model needs --out, and has no --base dequantized")
    folder = None if options.model else find_run(options.run)
    target: Path = options.out if folder is None else options.out or folder.path / "merged"
    if target.exists():
        raise RunError("the folder exists already", where=str(target), fix="name another one with --out", code="exists")

    # Our threads share out the rows; a BLAS that starts its own beside them takes twice as long. numpy reads this once.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from utils.merge_sources import open_plain_adapter, open_trained_run
    from utils.merging import merge_run

    if folder:
        trained = open_trained_run(folder, options.base, trusts_code=options.trusts_code)
    else:
        trained = open_plain_adapter(options.model, options.adapter)
    merge = merge_run(trained, target, options.base, compare=options.compare)
    print("\n".join(merge.describe(trained.recipe.model.quantization)))
    print(f"Model folder: {target}")
    print(f"Next: python scripts/infer.py --model {target}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Write an adapter in the format of another tool: mlx-lm's from PEFT's, or PEFT's from mlx-lm's.

    python scripts/export.py --to mlx
    python scripts/export.py --to mlx --run outputs/smollm2_sql/2026-11-21_12-00-00 --out my_adapter
    python scripts/export.py --to peft --adapter adapters --model Qwen/Qwen2.5-0.5B-Instruct

Without --run or --adapter the latest run's adapter is taken; it is in PEFT's format, whichever back end trained it. LoRA,
rsLoRA and DoRA travel, and predict the same on the other side. What the other format cannot hold is refused by name: modules
that were trained whole, added tokens, ranks that differ between modules, embeddings, experts. Of the base only shapes are
looked at. Both formats are also read as they are: by scripts/infer.py, scripts/merge.py and model.adapter of a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config.structured_config import ModelSection
from utils import cli
from utils.exceptions import RunError
from utils.model_source import ModelSource, find_model
from utils.run_folder import find_run

if TYPE_CHECKING:
    import argparse


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts an adapter and says what was written; returns the exit code."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--to", required=True, choices=("mlx", "peft"), help="the format to write")
    which = parser.add_mutually_exclusive_group()
    cli.add_run_argument(which)
    cli.add_base_arguments(parser, which)
    what = "folder to create (default: beside the adapter, with _mlx or _peft behind its name)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=what)
    options = cli.parse_base_arguments(parser, arguments, both=True)
    name, source = find_plain(options) if options.model else find_result(options)
    from utils.exporting import export_adapter

    export = export_adapter(name, source, options.to, options.out, "--adapter" if options.model else name)
    print("\n".join(export.describe(options.to)))
    return 0


def find_plain(options: argparse.Namespace) -> tuple[str, ModelSource]:
    """The adapter of --adapter, and the model of --model."""
    return options.adapter, find_model(ModelSection(name=options.model), "--model", with_weights=True)


def find_result(options: argparse.Namespace) -> tuple[str, ModelSource]:
    """The adapter of a run, and its base."""
    folder = find_run(options.run)
    loaded = folder.load_recipe(trusts_code=True)  # none of the model's code is run here
    folder.check_complete()
    if not folder.adapter.is_dir():
        fix = f"use {folder.model}: whole models need no export"
        raise RunError("this run trained all weights", where=str(folder.path), fix=fix, code="no-adapter")
    source = find_model(loaded.recipe.model, loaded.find_origin("model.name"), with_weights=True)
    folder.check_base(source)
    return str(folder.adapter), source


if __name__ == "__main__":
    cli.run(main)

"""Show rows as the model sees them, what of each is learned, and the training set in numbers.

    python scripts/preview_data.py --recipe recipes/smollm2_sql.yaml
    python scripts/preview_data.py --recipe recipes/llama_chat.yaml --set data.train=my.jsonl --rows 10
    python scripts/preview_data.py --recipe recipes/smollm2_sql.yaml --json

Every check of a run comes first, so what is printed is exactly what train.py would train on. No weights are loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config.recipe_io import load_recipe
from utils import cli
from utils.run_folder import OUTPUTS

PICTURES = (".png", ".jpg", ".pdf", ".svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints examples and statistics and draws the picture; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="examples to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="print for programs: text, input_ids and loss_mask")
    parser.add_argument("--picture", type=read_picture, metavar="FILE", help="default: outputs/previews/<recipe>.png")
    options = parser.parse_args(arguments)
    loaded = load_recipe(options.recipe, options.overrides)

    from utils import preview
    from utils.preflight import check_recipe

    preflight = check_recipe(loaded)
    shown = preflight.data.train[: max(options.rows, 0)]
    statistics = preview.collect_statistics(preflight)
    if options.json:
        rows = [preview.describe_example(example, preflight.tokenizer) for example in shown]
        problems = [problem.to_json() for problem in preflight.warnings]
        print(json.dumps({"ok": True, "problems": problems, "rows": rows, "statistics": statistics}, indent=2))
        return 0
    preview.print_warnings(preflight.warnings)
    for example in shown:
        preview.print_example(example, preflight.tokenizer)
        print()
    preview.print_statistics(statistics)
    picture = options.picture or OUTPUTS / "previews" / f"{loaded.name}.png"
    preview.plot_statistics(preflight, loaded.recipe.data.max_length, picture)
    print(f"\nPicture: {picture}")
    print(f"Next: {cli.show_train_command(options)}")
    return 0


def read_picture(text: str) -> Path:
    """A file whose ending says what kind of picture it is."""
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(PICTURES)}")
    return path


if __name__ == "__main__":
    cli.run(main)

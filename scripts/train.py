"""Train a model as a recipe says.

    python scripts/train.py --recipe recipes/smollm2_sql.yaml
    python scripts/train.py --recipe recipes/llama_chat.yaml --set training.epochs=1 --set data.train=my.jsonl

Everything is checked before weights are loaded. The run folder under outputs/ holds the resolved recipe, metrics, the log,
checkpoints and the adapter. Ctrl-C finishes the step and saves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config.recipe_io import load_recipe, locate_problems
from utils import cli
from utils.run_folder import check_run_target, create_run_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, loads, trains; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder to create (default: outputs/<recipe>/<time>)")
    options = parser.parse_args(arguments)
    loaded = load_recipe(options.recipe, options.overrides)
    check_run_target(options.run)

    # Imported behind the recipe check, so that a typo is answered before numpy and tokenizers are loaded.
    from utils.backends import load_backend
    from utils.preflight import check_recipe
    from utils.preview import print_first_example, print_warnings
    from utils.seed_manager import SeedManager
    from utils.tracking import check_tracking
    from utils.training_run import PreparedRun, choose_micro_batch_size, run_training

    check_tracking(loaded.recipe.tracking, loaded.find_origin("tracking.wandb"))
    preflight = check_recipe(loaded)
    print_warnings(preflight.warnings)
    print_first_example(preflight)
    loaded = preflight.loaded
    recipe = loaded.recipe
    source = preflight.find_weights()
    backend = load_backend(recipe.backend)
    SeedManager(recipe.seed, deterministic=recipe.deterministic).seed_everything()
    with locate_problems(loaded):
        model = backend.attach_lora(backend.load_model(source, recipe), recipe)
    loaded = choose_micro_batch_size(loaded, preflight, backend.describe_machine(model))
    folder = create_run_folder(loaded, options.run)
    state = run_training(PreparedRun(loaded, preflight, backend, model, folder))
    print(f"\nRun folder: {folder.path}")
    print(f"Next: python scripts/evaluate_run.py --run {folder.path}")
    return 0 if state.signal_number is None else 128 + state.signal_number


if __name__ == "__main__":
    cli.run(main)

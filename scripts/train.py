"""Train a model as a recipe says, or go on with a run that was ended.

    python scripts/train.py --recipe recipes/smollm2_sql.yaml
    python scripts/train.py --recipe recipes/llama_chat.yaml --set training.epochs=1 --set data.train=my.jsonl
    python scripts/train.py --resume
    python scripts/train.py --resume outputs/smollm2_sql/2026-11-21_12-00-00

Everything is checked before weights are loaded. The run folder under outputs/ holds the resolved recipe, metrics, the log,
checkpoints and the adapter. Ctrl-C, SIGTERM and SIGUSR1 finish the step and save; a second one stops at once.

--resume goes on with the latest run, or the named one, whatever ended it: a kill, a signal, a full disk. It takes the newest
checkpoint that is whole, and on a CPU the result is that of a run that never stopped, bit for bit. Recipe, rows and template
must be what they were: --recipe and --set need not be given, and are compared with the run's own recipe where they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from utils.allocator import restart_with_settings

    restart_with_settings()

from config.recipe_io import LoadedRecipe, load_recipe, locate_problems
from utils import cli
from utils.resume import Resumption, open_resumption
from utils.run_folder import LATEST, OUTPUTS, check_run_target, create_run_folder, find_run
from utils.run_lock import hold_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, loads, trains; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_recipe_arguments(parser, required=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, metavar="DIR", help="folder to create (default: outputs/<recipe>/<time>)")
    what = "go on with a run that was ended (default: the latest)"
    which.add_argument("--resume", nargs="?", type=Path, const=OUTPUTS / LATEST, metavar="RUN", help=what)
    cli.add_trust_argument(parser)
    options = parser.parse_args(arguments)
    if options.resume is None:
        if options.recipe is None:
            parser.error("name a recipe with --recipe, or go on with a run: --resume")
        loaded = load_recipe(options.recipe, options.overrides)
        check_run_target(options.run)
        return train(loaded, options.run)
    folder = find_run(None if options.resume == OUTPUTS / LATEST else options.resume)
    with hold_run(folder.path):
        named = options.recipe or (folder.recipe_file if options.overrides else None)
        asked = load_recipe(named, options.overrides) if named else None
        resumption = open_resumption(folder, asked, trusts_code=options.trusts_code)
        return train(resumption.loaded, None, resumption)


def train(loaded: LoadedRecipe, target: Path | None, resumption: Resumption | None = None) -> int:
    """Trains a recipe into a new folder, or the rest of a run; returns the exit code."""
    # Imported behind the recipe check, so that a typo is answered before numpy and tokenizers are loaded.
    from utils.backends import choose_backend, load_backend
    from utils.preflight import check_recipe
    from utils.preview import print_first_example, print_warnings
    from utils.seed_manager import SeedManager
    from utils.threads import keep_threads
    from utils.tracking import check_tracking
    from utils.training_run import PreparedRun, choose_micro_batch_size, run_training

    check_tracking(loaded.recipe.tracking, loaded.find_origin("tracking.wandb"))
    if resumption:
        resumption.check_rows()
    preflight = check_recipe(loaded)
    print_warnings(preflight.warnings)
    print_first_example(preflight)
    loaded = preflight.loaded
    source = preflight.find_weights()
    checkpoint = resumption.find_checkpoint(preflight) if resumption else None
    backend = load_backend(choose_backend(loaded.recipe, source.config))
    SeedManager(loaded.recipe.seed, deterministic=loaded.recipe.deterministic).seed_everything()
    with locate_problems(loaded), keep_threads(resumption.facts["threads"] if resumption else None):
        model = backend.attach_lora(backend.load_model(source, loaded.recipe), loaded.recipe)
    loaded = choose_micro_batch_size(loaded, preflight, backend.describe_machine(model))
    folder = resumption.folder if resumption else create_run_folder(loaded, target)
    state = run_training(PreparedRun(loaded, preflight, backend, model, folder, resumption, checkpoint))
    print(f"\nRun folder: {folder.path}")
    if state.signal_number is not None:
        print(f"Go on: {folder.resume_command}")
        return 128 + state.signal_number
    print(f"Next: python scripts/evaluate_run.py --run {folder.path}")
    return 0


if __name__ == "__main__":
    cli.run(main)

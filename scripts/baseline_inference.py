"""Answer a recipe's held-out prompts with the untouched model: what training has to beat.

    python scripts/baseline_inference.py --recipe recipes/smollm2_sql.yaml

Greedy answers are kept, so that scripts/evaluate_run.py does not have to generate them again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config.recipe_io import load_recipe, locate_problems
from config.recipe_rules import ON_ANSWERS
from utils import cli
from utils.exceptions import RecipeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints some answers and the scores; returns the exit code."""
    parser = cli.make_parser(__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument("--show", type=int, default=3, metavar="N", help="answers to print (default: 3)")
    options = parser.parse_args(arguments)
    loaded = load_recipe(options.recipe, options.overrides)
    if loaded.recipe.reward:
        message, fix = "a reward model writes no answers", "train it: scripts/evaluate_run.py measures before and after"
        raise RecipeError(message, where=loaded.find_origin("training.method"), fix=fix, code="no-answers")

    from utils.backends import choose_backend, load_backend
    from utils.inference import Responder, encode_prompts, make_settings
    from utils.metrics import TITLES, format_value, score_answers
    from utils.model_source import find_model
    from utils.preflight import check_recipe, select_conversations
    from utils.seed_manager import SeedManager

    preflight = check_recipe(loaded)
    examples = select_conversations(preflight)
    recipe = preflight.loaded.recipe
    source = find_model(recipe.model, loaded.find_origin("model.name"), with_weights=True)
    backend = load_backend(choose_backend(recipe, source.config))
    SeedManager(recipe.seed).seed_everything()
    with locate_problems(loaded):
        model = backend.load_model(source, recipe)
    prompts = encode_prompts(preflight.tokenizer, examples)
    settings = make_settings(preflight.tokenizer, recipe.generation)
    responder = Responder(backend, model, preflight.tokenizer, settings, recipe.evaluation.batch_size)
    answers = responder.answer_as_base(source, prompts)
    for example, answer in list(zip(examples, answers, strict=True))[: options.show]:
        title = "bad one:  " if example.label is False else "reference:"
        print(f"\n{example.where}\n{example.prompt[-1]['content']}\n  answer:    {answer}\n  {title} {example.answer}")
    print(f"\n{len(answers)} answers of the untouched {source.name}")
    for name in recipe.evaluation.metrics:
        if name in ON_ANSWERS:
            scores = score_answers(name, examples, answers)
            print(f"{TITLES[name]}: {format_value(name, sum(scores) / len(scores))}")
    print(f"Next: {cli.show_train_command(options)}")
    return 0


if __name__ == "__main__":
    cli.run(main)

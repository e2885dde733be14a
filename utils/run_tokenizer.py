"""The tokenizer of a run: with the recipe's template and mask policy before it, with what was saved with it afterwards."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from config.recipe_io import LoadedRecipe, locate_problems
from config.structured_config import Recipe
from utils.added_tokens import add_tokens, find_added_ids
from utils.chat_templates import ChatTemplate, find_template
from utils.exceptions import RunError
from utils.model_source import ModelSource
from utils.rule_checks import Facts
from utils.rules import apply_rules
from utils.run_folder import RunFolder
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_utils import TokenizerUtils


def open_tokenizer(loaded: LoadedRecipe, source: ModelSource, row_formats: Collection[str]) -> TokenizerUtils:
    """Loads the tokenizer and puts the recipe's template and mask policy around it."""
    data = loaded.recipe.data
    tokenizer = load_tokenizer(source.folder)
    apply_rules(loaded, Facts(loaded.recipe, source.family, has_chat_template=bool(tokenizer.chat_template)))
    if data.added_tokens:
        own = tokenizer.chat_template
        found = find_template(data.template, data.strategy, own, row_formats, loaded.find_origin("data.template"))
        add_tokens(tokenizer, data.added_tokens, loaded.find_origin("data.added_tokens"), template=found.source)
    with locate_problems(loaded):
        return TokenizerUtils(
            tokenizer,
            template=data.template,
            strategy=data.strategy,
            loss_on=choose_loss_on(loaded.recipe),
            system=data.system,
            row_formats=row_formats,
            keeps_ending=loaded.recipe.reward is not None,
        )


def open_run_tokenizer(loaded: LoadedRecipe, source: ModelSource, run: RunFolder) -> TokenizerUtils:
    """The tokenizer of a finished run, with the template that was saved beside its weights.

    Raises:
        RunError: the saved template is not the one that was trained with.
    """
    data, folder = loaded.recipe.data, run.adapter if run.adapter.is_dir() else run.model
    tokenizer = load_tokenizer(folder if (folder / "tokenizer.json").is_file() else source.folder)
    template = ChatTemplate(f"saved in {folder}", str(tokenizer.chat_template or ""))
    facts = run.read_facts()
    if find_added_ids(tokenizer, data.added_tokens):
        message = "the run's tokenizer lacks data.added_tokens"
        raise RunError(message, where=str(folder), fix="restore tokenizer.json, or train again", code="tokens-lost")
    if template.hash != facts.get("template_hash"):
        message = "the saved chat template is not the one that the run was trained with"
        fix = f"restore {folder / 'chat_template.jinja'}, or train again"
        raise RunError(message, where=str(folder), fix=fix, code="template-changed")
    if (strategy := facts.get("strategy")) not in ("chat", "standard"):
        message = f"run.json says strategy: {strategy!r}, which is none"
        raise RunError(message, where=str(run.run_file), fix="restore run.json, or train again", code="no-run")
    return TokenizerUtils(
        tokenizer,
        template=template,
        strategy=strategy,
        loss_on=choose_loss_on(loaded.recipe),
        system=data.system,
        keeps_ending=loaded.recipe.reward is not None,
    )


def choose_loss_on(recipe: Recipe) -> Literal["assistant", "last", "all"]:
    """What is learned of a row; of a pair it is the last answer, for there the two differ."""
    return "last" if recipe.training.learns_pairs else recipe.data.loss_on

"""Everything that can be known before weights are loaded: shared by validate.py and train.py.

The order is by cost: the recipe has been read; then the rows, the model's config, the tokenizer, every example, the steps.
What is wrong is raised as soon as it is known, so a typo never waits for a download.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from config.model_families import find_family, find_family_by_name
from config.recipe_io import LoadedRecipe, list_rule_problems, locate_problems
from config.recipe_rules import find_cadence_violations
from config.structured_config import Recipe
from utils.backends import check_engine, choose_backend
from utils.examples import Example
from utils.exceptions import DataError, Problem, RecipeError
from utils.logging import get_logger
from utils.machine import guess_device
from utils.mlx_support import check_mlx_installed, check_model_format
from utils.model_files import check_model_files
from utils.model_shape import find_positions, has_learned_positions
from utils.model_source import (
    EMBEDDED_MODELS,
    EMBEDDED_PREFIX,
    ModelSource,
    find_model,
    list_linear_modules,
    list_modules,
)
from utils.preflight_checks import check_metrics, check_prompts, check_secrets, guess_chat_template
from utils.prepared_data import PreparedData, describe_sources, hash_contents, iterate_held_out, prepare_data
from utils.resources import Resources, plan_resources, summarise_resources
from utils.row_checks import RowScan, scan_rows
from utils.rule_checks import Facts
from utils.rules import apply_rules
from utils.run_folder import RunFolder
from utils.run_tokenizer import open_run_tokenizer, open_tokenizer
from utils.schedules import count_warmup_steps
from utils.scratch import open_new_model, prepare_windows, scan_corpus, settle_recipe
from utils.small_data import adapt_to_small_data
from utils.tokenizer_utils import TokenizerUtils


@dataclass(frozen=True)
class RunPlan:
    """Numbers that follow from the recipe and the rows.

    Attributes:
        steps_per_epoch: optimizer steps that see every row once.
        total_steps: optimizer steps of the run.
        warmup_steps: of those, with a rising learning rate.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_every: int
    save_every: int


@dataclass(frozen=True)
class Preflight:
    """A recipe that has passed every check, with what the checks found.

    Attributes:
        loaded: the recipe.
        scan: what the rows are.
    """

    loaded: LoadedRecipe
    source: ModelSource
    tokenizer: TokenizerUtils
    scan: RowScan
    data: PreparedData
    plan: RunPlan
    resources: Resources
    warnings: tuple[Problem, ...]

    def read_evaluation_examples(self) -> list[Example]:
        """The held-out rows as text, for generation and metrics."""
        return [] if self.loaded.recipe.scratch else list(iterate_held_out(self.loaded, self.scan))

    def find_weights(self) -> ModelSource:
        """The model with its weights, downloaded where they are missing; those of a new model follow from its seed."""
        if self.source.seed is not None:
            return self.source
        return find_model(self.loaded.recipe.model, self.loaded.find_origin("model.name"), with_weights=True)


def check_recipe(loaded: LoadedRecipe, run: RunFolder | None = None) -> Preflight:
    """Runs the whole pre-flight.

    Args:
        run: a finished run whose template is to be used, whatever has become of the recipe's since.

    Raises:
        RecipeError, DataError, MachineError: what is wrong, with its place and fix.
    """
    loaded = settle_dtype(loaded)
    recipe = loaded.recipe
    if run is None:  # a finished run is measured without the engine that trained it
        check_secrets(loaded)
        check_engine(recipe.training.engine, loaded.find_origin("training.engine"))
    if choose_backend(recipe) == "mlx":
        check_mlx_installed(loaded.find_origin("backend"))
    if recipe.scratch is not None:
        return check_new_model(loaded, run)
    family = find_family_by_name(recipe.model.name)
    family = family or find_family(EMBEDDED_MODELS.get(recipe.model.name.removeprefix(EMBEDDED_PREFIX)))
    # A finished run is only measured here, so it does not matter whether this machine could train it.
    device = None if run else guess_device(choose_backend(recipe))
    apply_rules(loaded, Facts(recipe, family, device=device, has_chat_template=guess_chat_template(loaded, family)))
    scan = scan_rows(recipe.data, recipe.seed, loaded.find_origin)
    apply_rules(loaded, Facts(recipe, family, formats=scan.all_formats, first_rows=scan.first_rows))
    check_metrics(loaded, scan)
    hashes = describe_sources(loaded)
    if run is not None:
        run.check_data(hash_contents(hashes))
    source = find_checked_model(loaded)
    row_formats = {*scan.formats, *scan.features}
    tokenizer = open_run_tokenizer(loaded, source, run) if run else open_tokenizer(loaded, source, row_formats)
    data = prepare_data(loaded, scan, tokenizer, hashes)
    if run is None:
        loaded, scan, data = adapt_small_set(loaded, scan, data, tokenizer)
    return complete_preflight(loaded, source, tokenizer, scan, data, device)


def find_checked_model(loaded: LoadedRecipe) -> ModelSource:
    """The model's folder, without weights that would have to be downloaded, after all checks that its files allow."""
    recipe, where, adapter_where = loaded.recipe, loaded.find_origin("model.name"), loaded.find_origin("model.adapter")
    source = find_model(recipe.model, where, with_weights=False, adapter_where=adapter_where)
    check_model_files(loaded, source)
    with locate_problems(loaded):
        check_model_format(recipe, source, choose_backend(recipe, source.config), where)
    facts = Facts(
        recipe,
        source.family,
        model_type=source.model_type,
        modules=tuple(list_linear_modules(source)),
        whole_modules=tuple(list_modules(source)),
        is_reward=source.is_reward,
    )
    apply_rules(loaded, facts)
    return source


def settle_dtype(loaded: LoadedRecipe) -> LoadedRecipe:
    """Writes down that weights which are all trained are float32, so that every later script loads them as they are."""
    if loaded.recipe.lora is not None or loaded.recipe.model.dtype != "auto":
        return loaded
    return loaded.with_automatic_value("model.dtype", "float32", "all weights are trained: 16 bits lose small updates")


def check_new_model(loaded: LoadedRecipe, run: RunFolder | None) -> Preflight:
    """The pre-flight of a model that is trained from scratch: a corpus instead of rows, a config instead of files."""
    device = None if run else guess_device()
    apply_rules(loaded, Facts(loaded.recipe, device=device))
    loaded = settle_recipe(loaded)
    scan, hashes = scan_corpus(loaded), describe_sources(loaded)
    if run is not None:
        run.check_data(hash_contents(hashes))
    source = open_new_model(loaded, hashes)
    # A prompt stands for itself, as under format prompt_completion; no template is put around it.
    tokenizer = (
        open_run_tokenizer(loaded, source, run) if run else open_tokenizer(loaded, source, ("prompt_completion",))
    )
    data = prepare_windows(loaded, tokenizer, hashes)
    scan = replace(scan, train_rows=len(data.train), evaluation_rows=len(data.evaluation))  # windows, not documents
    return complete_preflight(loaded, source, tokenizer, scan, data, device)


def complete_preflight(
    loaded: LoadedRecipe,
    source: ModelSource,
    tokenizer: TokenizerUtils,
    scan: RowScan,
    data: PreparedData,
    device: str | None,
) -> Preflight:
    """Steps, resources and the rules over all that is known."""
    check_prompts(loaded, data)
    plan = plan_run(loaded.recipe, len(data.train))
    if violations := list(find_cadence_violations(loaded.recipe.training, plan.total_steps)):
        raise RecipeError.from_problems(list_rule_problems(violations, loaded.find_origin))
    loaded, resources = plan_resources(loaded, source, data, plan.total_steps, is_finished=device is None)
    facts = collect_rule_facts(loaded, source, data, resources, plan)
    has_template = bool(tokenizer.tokenizer.chat_template)
    facts = replace(facts, device=device, formats=scan.formats, has_chat_template=has_template)
    warnings = (*scan.warnings, *apply_rules(loaded, facts), *resources.problems)
    log_automatic_values(loaded)
    return Preflight(loaded, source, tokenizer, scan, data, plan, resources, warnings)


def adapt_small_set(
    loaded: LoadedRecipe, scan: RowScan, data: PreparedData, tokenizer: TokenizerUtils
) -> tuple[LoadedRecipe, RowScan, PreparedData]:
    """Applies `training.small_data`; when more rows are to be held out, the few rows are split and encoded once more."""
    adapted = adapt_to_small_data(loaded, data.counts["train"].examples, scan.train_rows)
    if adapted.recipe.data != loaded.recipe.data:
        scan = scan_rows(adapted.recipe.data, adapted.recipe.seed, adapted.find_origin)
        check_metrics(adapted, scan)
        data = prepare_data(adapted, scan, tokenizer, data.hashes)
    return adapted, scan, data


def log_automatic_values(loaded: LoadedRecipe) -> None:
    """Says what was filled in, and why: nothing is adapted in silence."""
    for key, text in list_automatic_values(loaded).items():
        get_logger().info("%s: %s", key, text)


def list_automatic_values(loaded: LoadedRecipe) -> dict[str, str]:
    """Dotted key → `value (reason)` of everything that an automatic rule has set."""
    values = loaded.recipe.model_dump(mode="json")
    found = {}
    for key, origin in loaded.origins.items():
        if origin.startswith("auto: "):
            section, _, name = key.rpartition(".")
            value = values[section][name] if section else values[name]
            found[key] = f"{value} ({origin.removeprefix('auto: ')})"
    return found


def collect_rule_facts(
    loaded: LoadedRecipe, source: ModelSource, data: PreparedData, resources: Resources, plan: RunPlan
) -> Facts:
    """Everything that the rules may look at."""
    evaluation, machine = data.evaluation, resources.machine
    return Facts(
        recipe=loaded.recipe,
        family=source.family,
        parameters=resources.shape.parameters if resources.shape else None,
        positions=find_positions(source.config),
        learned_positions=has_learned_positions(source.config),
        vocabulary=resources.shape.vocabulary if resources.shape else None,
        largest_id=max(data.train.largest_id, evaluation.largest_id),
        answers=data.train.answers,
        held_out_answers=evaluation.answers,
        held_out_rows=len(evaluation),
        # A new model's windows have no prompt, and generation goes on beyond its context.
        longest_prompt=None if loaded.recipe.scratch or not evaluation else int(evaluation.prompt_lengths.max()),
        steps=plan.total_steps,
        tokens_per_step=float(data.train.lengths.mean()) * min(loaded.recipe.training.batch_size, len(data.train)),
        device=machine.device,
        cores=machine.cores,
    )


def plan_run(recipe: Recipe, rows: int) -> RunPlan:
    """Derives steps and cadences from the number of training rows."""
    training = recipe.training
    steps_per_epoch = -(-rows // training.batch_size)
    total = training.max_steps or max(1, round(steps_per_epoch * training.epochs))
    eval_every = steps_per_epoch if training.eval_every == "epoch" else training.eval_every
    save_every = steps_per_epoch if training.save_every == "epoch" else training.save_every
    return RunPlan(steps_per_epoch, total, count_warmup_steps(total, training.warmup_ratio), eval_every, save_every)


def select_conversations(preflight: Preflight) -> list[Example]:
    """The held-out rows that have a prompt to answer.

    Raises:
        DataError: there are none.
    """
    found = [example for example in preflight.read_evaluation_examples() if example.text is None]
    if not found:
        fix = "set data.eval to a file with conversations, or data.eval_fraction above 0"
        where = preflight.loaded.find_origin("data.eval")
        raise DataError("there is no held-out row with a prompt to answer", where=where, fix=fix, code="no-eval")
    return found


def summarise_preflight(preflight: Preflight) -> dict[str, Any]:
    """What validate.py prints: the numbers that decide a run."""
    data, plan = preflight.data, preflight.plan
    lengths, supervised = data.train.lengths, data.train.supervised
    return {
        "model": preflight.source.name,
        "architecture": preflight.source.model_type,
        "strategy": preflight.tokenizer.strategy,
        "training_rows": len(data.train),
        "held_out_rows": len(data.evaluation),
        "tokens_per_epoch": int(lengths.sum()),
        "supervised_tokens_per_epoch": int(supervised.sum()),
        "longest_example": int(data.train.path_lengths.max()),
        "steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "warmup_steps": plan.warmup_steps,
        "evaluates_every": plan.eval_every,
        "saves_every": plan.save_every,
        "automatic_values": list_automatic_values(preflight.loaded),
        **summarise_resources(preflight.resources),
    }

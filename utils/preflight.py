"""Everything that can be known before weights are loaded: shared by validate.py and train.py.

The order is by cost: the recipe has been read; then the rows, the model's config, the tokenizer, every example, the steps.
What is wrong is raised as soon as it is known, so a typo never waits for a download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from config.model_families import find_family, find_family_by_name
from config.recipe_io import LoadedRecipe
from config.structured_config import Recipe, find_cadence_violations
from utils.data_formats import Example, FormatName, read_examples
from utils.data_loading import Row, load_rows, split_rows
from utils.exceptions import DataError, Problem, RecipeError
from utils.methods.sft import encode_examples
from utils.model_source import EMBEDDED_MODELS, EMBEDDED_PREFIX, ModelSource, find_model, list_linear_modules
from utils.schedules import count_warmup_steps
from utils.tokenizer_utils import EncodedExample, TokenizerUtils, load_tokenizer

FEW_ROWS = 10


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
class PreparedData:
    """Rows as examples and as tokens.

    Attributes:
        train: encoded training rows.
        evaluation: encoded held-out rows, possibly none.
        evaluation_examples: the same held-out rows before encoding, for generation and metrics.
    """

    train: list[EncodedExample]
    evaluation: list[EncodedExample]
    evaluation_examples: list[Example]


@dataclass(frozen=True)
class Preflight:
    """A recipe that has passed every check, with what the checks found.

    Attributes:
        row_format: format of the first training row; prompts typed later are rendered like it.
    """

    source: ModelSource
    tokenizer: TokenizerUtils
    data: PreparedData
    plan: RunPlan
    row_format: FormatName
    warnings: tuple[Problem, ...]


def check_recipe(loaded: LoadedRecipe) -> Preflight:
    """Runs the whole pre-flight.

    Raises:
        RecipeError, DataError, MachineError: what is wrong, with its place and fix.
    """
    recipe = loaded.recipe
    train, held_out = read_data(loaded)
    check_family(loaded)
    source = find_model(recipe.model, loaded.find_origin("model.name"), with_weights=False)
    check_lora_targets(loaded, list_linear_modules(source))
    tokenizer = open_tokenizer(loaded, source)
    held_out = held_out[: recipe.evaluation.max_examples]
    prepared = PreparedData(
        encode_examples(train, tokenizer, recipe.data, "training"),
        encode_examples(held_out, tokenizer, recipe.data, "held-out") if held_out else [],
        held_out,
    )
    plan = plan_run(recipe, len(prepared.train))
    if violations := list(find_cadence_violations(recipe.training, plan.total_steps)):
        places = [Problem("rule", v.message, loaded.find_origin(".".join(v.path)), v.fix) for v in violations]
        raise RecipeError.from_problems(places)
    return Preflight(source, tokenizer, prepared, plan, train[0].format, tuple(find_warnings(loaded, prepared)))


def read_data(loaded: LoadedRecipe) -> tuple[list[Example], list[Example]]:
    """Reads and checks the rows of both sets without a tokenizer.

    Returns:
        Training examples and held-out examples.
    """
    data = loaded.recipe.data
    train_paths = [data.train] if isinstance(data.train, str) else list(data.train)
    rows = load_rows(train_paths, data.columns)
    held_out: list[Row]
    if data.eval is not None:
        held_out = load_rows(data.eval, data.columns)
    else:
        rows, held_out = split_rows(rows, data.eval_fraction, loaded.recipe.seed)
    examples, held_out_examples = read_examples(rows, data.format), read_examples(held_out, data.format)
    check_strategy(loaded, examples)
    check_metrics(loaded, held_out_examples)
    return examples, held_out_examples


def check_strategy(loaded: LoadedRecipe, examples: Sequence[Example]) -> None:
    """strategy chat needs conversations."""
    raw = next((example for example in examples if example.text is not None), None)
    if loaded.recipe.data.strategy == "chat" and raw is not None:
        fix = f"set data.strategy: standard in {loaded.find_origin('data.strategy')}, or write the rows as messages"
        raise DataError(
            "a text row is no conversation, and strategy is chat", where=raw.where, fix=fix, code="strategy"
        )


def check_metrics(loaded: LoadedRecipe, held_out: Sequence[Example]) -> None:
    """Metrics on answers need rows with answers; execution accuracy needs a database in each row."""
    metrics = loaded.recipe.evaluation.metrics
    generated = [name for name in metrics if name in ("exact_match", "execution_accuracy")]
    for example in held_out:
        if generated and example.text is not None:
            fix = "remove it from evaluation.metrics"
            raise DataError(f"{generated[0]} needs answers, and this row is raw text", where=example.where, fix=fix)
        if "execution_accuracy" in metrics and not isinstance(example.fields.get("database"), str):
            fix = 'add "database": an SQL script that creates and fills the tables, or remove the metric'
            raise DataError("execution_accuracy needs a `database` in each held-out row", where=example.where, fix=fix)


def check_family(loaded: LoadedRecipe) -> None:
    """Refuses what the model's name alone rules out, before anything is downloaded."""
    recipe = loaded.recipe
    family = find_family_by_name(recipe.model.name)
    if family and not family.has_chat_template and recipe.data.strategy == "chat" and recipe.data.template == "auto":
        raise make_no_chat_error(loaded, family.name)
    if embedded := find_family(EMBEDDED_MODELS.get(recipe.model.name.removeprefix(EMBEDDED_PREFIX))):
        check_lora_targets(loaded, embedded.lora_targets)  # before the conversion that a first use would start


def make_no_chat_error(loaded: LoadedRecipe, model: str) -> RecipeError:
    """The way out for models that cannot chat."""
    fix = "set data.strategy: standard, name a template in data.template, or choose an instruction-tuned model"
    message = f"{model} has no chat template"
    return RecipeError(message, where=loaded.find_origin("data.strategy"), fix=fix, code="no-chat-template")


def open_tokenizer(loaded: LoadedRecipe, source: ModelSource) -> TokenizerUtils:
    """Loads the tokenizer and puts the recipe's template and mask policy around it."""
    data = loaded.recipe.data
    tokenizer = load_tokenizer(source.folder)
    if data.strategy == "chat" and data.template == "auto" and not tokenizer.chat_template:
        raise make_no_chat_error(loaded, loaded.recipe.model.name)
    return TokenizerUtils(
        tokenizer, template=data.template, strategy=data.strategy, loss_on=data.loss_on, system=data.system
    )


def check_lora_targets(loaded: LoadedRecipe, modules: Sequence[str]) -> None:
    """Each LoRA target must name one of the model's modules, where these are known without loading it."""
    lora = loaded.recipe.lora
    if lora is None or isinstance(lora.target_modules, str) or not modules:
        return
    fix = f"modules here: {', '.join(modules)}; or target_modules: all-linear"
    where = loaded.find_origin("lora.target_modules")
    problems = [
        Problem("lora-target", f"no module of {loaded.recipe.model.name} is called {target!r}", where, fix)
        for target in lora.target_modules
        if target.rsplit(".", 1)[-1] not in modules
    ]
    if problems:
        raise RecipeError.from_problems(problems)


def plan_run(recipe: Recipe, rows: int) -> RunPlan:
    """Derives steps and cadences from the number of training rows."""
    training = recipe.training
    steps_per_epoch = -(-rows // training.batch_size)
    total = training.max_steps or max(1, round(steps_per_epoch * training.epochs))
    eval_every = steps_per_epoch if training.eval_every == "epoch" else training.eval_every
    save_every = steps_per_epoch if training.save_every == "epoch" else training.save_every
    return RunPlan(steps_per_epoch, total, count_warmup_steps(total, training.warmup_ratio), eval_every, save_every)


def find_warnings(loaded: LoadedRecipe, data: PreparedData) -> list[Problem]:
    """What is allowed but rarely meant."""
    found: list[Problem] = []
    if len(data.train) < FEW_ROWS:
        text = f"only {len(data.train)} training rows"
        found.append(Problem("few-rows", text, loaded.find_origin("data.train"), "expect the model to repeat them"))
    if not data.evaluation:
        fix = "set data.eval or data.eval_fraction"
        found.append(Problem("no-eval", "no held-out rows, so nothing will show whether it got better", None, fix))
    return found


def select_conversations(loaded: LoadedRecipe, preflight: Preflight) -> list[Example]:
    """The held-out rows that have a prompt to answer.

    Raises:
        DataError: there are none.
    """
    found = [example for example in preflight.data.evaluation_examples if example.text is None]
    if not found:
        fix = "set data.eval to a file with conversations, or data.eval_fraction above 0"
        where = loaded.find_origin("data.eval")
        raise DataError("there is no held-out row with a prompt to answer", where=where, fix=fix, code="no-eval")
    return found


def summarise_preflight(preflight: Preflight) -> dict[str, Any]:
    """What validate.py prints: the numbers that decide a run."""
    data, plan = preflight.data, preflight.plan
    lengths = [len(example.input_ids) for example in data.train]
    supervised = sum(example.supervised_tokens for example in data.train)
    return {
        "model": preflight.source.name,
        "architecture": preflight.source.model_type,
        "strategy": preflight.tokenizer.strategy,
        "training_rows": len(data.train),
        "held_out_rows": len(data.evaluation),
        "tokens_per_epoch": sum(lengths),
        "supervised_tokens_per_epoch": supervised,
        "longest_example": max(lengths),
        "steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "warmup_steps": plan.warmup_steps,
        "evaluates_every": plan.eval_every,
        "saves_every": plan.save_every,
    }

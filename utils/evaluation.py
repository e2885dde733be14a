"""Measures the untouched and the trained model on the same held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from config.recipe_rules import ON_ANSWERS, PAIR_METRICS
from config.structured_config import MetricName, ModelSection, Recipe
from utils.backends import Backend, MachineFacts
from utils.batching import Batch, group_scored_rows, pad_rows
from utils.examples import Example
from utils.exceptions import DataError, TrainingError
from utils.flat_batches import count_own_tokens
from utils.inference import Responder, encode_prompts, make_settings
from utils.methods.preference import Scorer, count_answers
from utils.metrics import (
    LOWER_IS_BETTER,
    Comparison,
    compare_losses,
    compare_scores,
    score_answers,
    score_labels,
    score_preferences,
)
from utils.model_source import ModelSource, find_model
from utils.piece_encoder import EncodedExample
from utils.preflight import Preflight
from utils.progress import Progress
from utils.run_folder import RunFolder
from utils.workload import count_scored_rows

RowLosses = list[tuple[float, int]]


@dataclass(frozen=True)
class Evaluation:
    """What both models did.

    Attributes:
        comparisons: each metric before and after.
        base_answers, tuned_answers: generated answers, row by row; empty where no metric needs them.
        base_scores, tuned_scores: 0/1 of the first metric on generated answers, row by row.
        text: how both go on with the held-out text, for a new model that was trained on raw text.
    """

    comparisons: dict[MetricName, Comparison]
    base_answers: list[str]
    tuned_answers: list[str]
    base_scores: list[float]
    tuned_scores: list[float]
    text: TextSample | None = None


@dataclass(frozen=True)
class TextSample:
    """The beginning of the held-out text, and how the untouched and the trained model go on."""

    prompt: str
    base: str
    tuned: str


def evaluate_run(
    backend: Backend, preflight: Preflight, examples: Sequence[Example], source: ModelSource, folder: RunFolder
) -> Evaluation:
    """Scores base and trained model on the recipe's held-out rows.

    Args:
        examples: these rows as text.

    Raises:
        DataError: there are no held-out rows.
    """
    loaded, recipe = preflight.loaded, preflight.loaded.recipe
    if not preflight.data.evaluation:
        where = loaded.find_origin("data.eval_fraction")
        raise DataError("there are no held-out rows to evaluate on", where=where, fix="set data.eval", code="no-eval")
    base = backend.load_model(source, recipe)
    before = measure(backend, base, preflight, examples, source)
    base_text = continue_text(backend, base, preflight) if recipe.scratch else ("", "")
    tuned = load_trained_model(backend, base, recipe, folder)
    after = measure(backend, tuned, preflight, examples, None)
    comparisons: dict[MetricName, Comparison] = {}
    base_scores: list[float] = []
    tuned_scores: list[float] = []
    for name in recipe.evaluation.metrics:
        if name in LOWER_IS_BETTER:
            comparisons[name] = compare_losses(before.losses, after.losses, perplexity=name == "perplexity")
        elif name in PAIR_METRICS:
            tokens = count_answers(preflight.data.evaluation)
            if name == "label_accuracy":
                shares = [score_labels(side.pairs, tokens, before.pairs) for side in (before, after)]
            else:
                shares = [score_preferences(name, side.pairs, tokens, before.pairs) for side in (before, after)]
            comparisons[name] = compare_scores(*shares)
        else:
            scores = [score_answers(name, examples, side.answers) for side in (before, after)]
            comparisons[name] = compare_scores(*scores)
            if not base_scores:
                base_scores, tuned_scores = scores
    text = TextSample(*base_text, continue_text(backend, tuned, preflight)[1]) if recipe.scratch else None
    return Evaluation(comparisons, before.answers, after.answers, base_scores, tuned_scores, text)


def continue_text(backend: Backend, model: Any, preflight: Preflight) -> tuple[str, str]:
    """The beginning of the held-out text, a quarter of the context, and how a model goes on from there."""
    recipe, tokenizer = preflight.loaded.recipe, preflight.tokenizer
    window = (preflight.data.evaluation or preflight.data.train)[0].input_ids
    prompt = window[: max(1, (recipe.scratch.context if recipe.scratch else len(window)) // 4)]
    settings = make_settings(tokenizer, recipe.generation)
    (ids,) = backend.generate(model, [prompt], settings, batch_size=1)
    return tokenizer.decode(prompt.tolist()), tokenizer.decode(ids)


def load_trained_model(backend: Backend, base: Any, recipe: Recipe, folder: RunFolder) -> Any:
    """The run's model with its adapters folded in; after full fine-tuning, the run's own model.

    On a quantised base the adapter stays beside it, as in training: folded in, the sum would be rounded to a few values.
    """
    if folder.adapter.is_dir():
        adapted = backend.load_adapter(base, folder.adapter)
        # Also where the model's own files are quantised, of which the recipe says nothing.
        is_quantised = backend.describe_machine(adapted).quantization != "none"
        return adapted if is_quantised else backend.merge_adapter(adapted)
    whole = find_model(ModelSection(name=str(folder.model)), str(folder.path), with_weights=True)
    return backend.load_model(whole, recipe)


@dataclass(frozen=True)
class Measurement:
    """What one model did; each part is empty unless a metric needs it.

    Attributes:
        losses: sum of nats and learned tokens of each held-out row; of a pair, of its chosen answer. Rows whose answer is
            undesirable are left out.
        answers: generated answers, row by row.
        pairs: log-probability of both answers of each pair in nats, shape (pairs, 2).
    """

    losses: RowLosses
    answers: list[str]
    pairs: npt.NDArray[np.float64]


def measure(
    backend: Backend, model: Any, preflight: Preflight, examples: Sequence[Example], base_source: ModelSource | None
) -> Measurement:
    """What one model does on the held-out rows, as far as a metric needs it.

    Args:
        base_source: set for the untouched model, whose greedy answers are cached.
    """
    recipe = preflight.loaded.recipe
    metrics, size = recipe.evaluation.metrics, recipe.evaluation.batch_size
    who = "untouched" if base_source else "trained"
    losses: RowLosses = []
    pairs = np.zeros((0, 2))
    if recipe.training.learns_pairs:
        held_out = preflight.data.evaluation
        pairs = make_scorer(backend, model, preflight).score(held_out, f"Held-out pairs, {who} model")
        if recipe.reward is None:
            tokens = count_answers(held_out)[:, 0]
            is_there = tokens > 0
            losses = list(zip((-pairs[is_there, 0]).tolist(), tokens[is_there].tolist(), strict=True))
    elif any(name in LOWER_IS_BETTER for name in metrics):
        losses = measure_losses(backend, model, preflight, size, f"Held-out loss of the {who} model")
    answers: list[str] = []
    if any(name in ON_ANSWERS for name in metrics):
        prompts = encode_prompts(preflight.tokenizer, examples)
        settings = make_settings(preflight.tokenizer, recipe.generation)
        responder = Responder(backend, model, preflight.tokenizer, settings, size)
        if base_source:
            answers = responder.answer_as_base(base_source, prompts)
        else:
            answers = responder.answer(prompts, "Answers of the trained model")
    return Measurement(losses, answers, pairs)


def make_scorer(backend: Backend, model: Any, preflight: Preflight) -> Scorer:
    """The model as a scorer of pairs."""
    size, pad = count_scored_rows(preflight.loaded.recipe), preflight.tokenizer.tokenizer.pad_token_id
    return Scorer(backend, model, size, pad)


def measure_losses(backend: Backend, model: Any, preflight: Preflight, batch_size: int, title: str) -> RowLosses:
    """Sum of nats and supervised tokens of each held-out row, in an order that depends on the rows alone.

    Raises:
        TrainingError: the model gives a row a loss that is not finite.
    """
    pad = preflight.tokenizer.tokenizer.pad_token_id
    machine = backend.describe_machine(model)
    batches = make_evaluation_batches(preflight.data.evaluation, machine, batch_size, pad)
    with Progress(title, len(preflight.data.evaluation), "rows") as progress:
        losses = backend.evaluate(model, batches, progress.advance)
    places = [place for batch in batches for row in batch.places for place in row]
    for (nats, _), place in zip(losses, places, strict=True):
        if not math.isfinite(nats):
            fix = "set model.dtype: float32, lower training.learning_rate, or look at the row"
            message = "the model gives a held-out row a loss that is not finite"
            raise TrainingError(message, where=place, fix=fix, code="not-finite")
    return losses


def make_evaluation_batches(
    examples: Sequence[EncodedExample], machine: MachineFacts, batch_size: int, pad_token_id: int
) -> list[Batch]:
    """Batches of like length; a mean over all tokens does not care about the order.

    Args:
        batch_size: most rows of a batch.
    """
    lengths = count_own_tokens(examples, runs_flat=machine.runs_flat)
    groups = group_scored_rows(lengths, batch_size, machine.token_budget)
    return [pad_rows([examples[index] for index in group], pad_token_id) for group in groups]


def compute_mean_loss(losses: RowLosses) -> float:
    """Nats per supervised token."""
    return sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)

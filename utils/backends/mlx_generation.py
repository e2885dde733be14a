"""Prompts → answers on MLX: many at once by mlx-lm's batches, or one prompt token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.sample_utils import apply_top_k, apply_top_p, make_repetition_penalty

from config.structured_config import GenerationSection
from utils.answer_rows import limit_rows
from utils.backends import GenerationSettings, ignore
from utils.backends.mlx_model import MlxModel
from utils.batching import Batch, Ids
from utils.exceptions import RecipeError
from utils.mlx_support import find_row_limit
from utils.model_shape import find_positions
from utils.sliding_context import slide

EVERYTHING = 1 << 30  # tokens before the next one that a repetition penalty looks at
Processors = list[Callable[[mx.array, mx.array], mx.array]]


def make_sampler(generation: GenerationSection) -> Callable[[mx.array], mx.array]:
    """Log-probabilities of shape (rows, vocabulary) → a token for each row.

    The temperature comes first, then top-k, then top-p, as in transformers; mlx-lm's own order gives another distribution.
    """

    def choose(log_probs: mx.array) -> mx.array:
        if generation.temperature == 0:
            return mx.argmax(log_probs, axis=-1)
        scores = log_probs / generation.temperature
        if generation.top_k is not None and generation.top_k < scores.shape[-1]:
            scores = apply_top_k(scores, generation.top_k)
        if generation.top_p is not None and generation.top_p < 1:
            scores = apply_top_p(scores - mx.logsumexp(scores, axis=-1, keepdims=True), generation.top_p)
        return mx.random.categorical(scores)

    return choose


def make_processors(generation: GenerationSection) -> Processors:
    """What changes the logits before a token is chosen; the penalty looks at the prompt, too, as in transformers."""
    if generation.repetition_penalty == 1.0:
        return []
    return [make_repetition_penalty(generation.repetition_penalty, EVERYTHING)]


def generate(
    model: MlxModel,
    prompts: Sequence[Ids],
    settings: GenerationSettings,
    batch_size: int,
    on_answer: Callable[[int], None] = ignore,
) -> list[list[int]]:
    """New token ids of each prompt, in order, up to and without the stop token.

    Longest prompts come first: a batch that is too large for the memory fails at once. Rows that end make room for waiting
    prompts. Prompts whose answers could go beyond the last position slide, one by one.

    Args:
        batch_size: prompts that are answered at once, or fewer (`limit_rows`).
        on_answer: called with the number of its tokens whenever an answer is complete.
    """
    for prompt in prompts:
        check_reach(model, len(prompt), settings)
    model.network.eval()
    answers: dict[int, list[int]] = {}
    fitting = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True):
        if goes_beyond_context(model, len(prompts[index]), settings):
            answers[index] = list(slide_over(model, prompts[index].tolist(), settings))
            on_answer(len(answers[index]))
        else:
            fitting.append(index)
    if fitting:
        waiting = {index: prompts[index].tolist() for index in fitting}
        most = len(prompts[fitting[0]]) + settings.generation.max_new_tokens
        itemsize = 4 if model.dtype_name == "float32" else 2
        batch_size = limit_rows(model.source.config, batch_size, most, itemsize, model.device)
        answers |= answer_together(model, waiting, settings, batch_size, on_answer)
    return [answers[index] for index in range(len(prompts))]


def answer_together(
    model: MlxModel,
    prompts: dict[int, list[int]],
    settings: GenerationSettings,
    batch_size: int,
    on_answer: Callable[[int], None],
) -> dict[int, list[int]]:
    """Answers of prompts that fit, by their keys."""
    generator = BatchGenerator(
        model.network,
        max_tokens=settings.generation.max_new_tokens,
        stop_tokens=[[token] for token in settings.stop_ids],
        sampler=make_sampler(settings.generation),
        logits_processors=make_processors(settings.generation),
        completion_batch_size=batch_size,
        prefill_batch_size=min(batch_size, 8),
    )
    try:
        keys = dict(zip(generator.insert(list(prompts.values())), prompts, strict=True))
        answers: dict[int, list[int]] = {key: [] for key in prompts}
        while responses := generator.next_generated():
            for response in responses:
                answer = answers[keys[response.uid]]
                if response.token not in settings.stop_ids:
                    answer.append(response.token)
                if response.finish_reason is not None:
                    on_answer(len(answer))
    finally:
        generator.close()
    return answers


def check_reach(model: MlxModel, prompt_length: int, settings: GenerationSettings) -> None:
    """Refuses a prompt whose answer mlx-lm would compute otherwise than transformers.

    Raises:
        RecipeError: they reach beyond a sliding window, or beyond the original context under longrope.
    """
    limit, why = find_row_limit(model.model_type, model.source.config)
    most = settings.generation.max_new_tokens
    if limit is not None and prompt_length + most > limit:
        lengths = f"a prompt of {prompt_length} tokens and an answer of up to {most}"
        message = f"mlx-lm computes this {model.model_type} rightly up to {limit} tokens, not {lengths}: {why}"
        fix = f"lower generation.max_new_tokens to {max(1, limit - prompt_length)}, shorten the prompt, or set backend: torch"
        raise RecipeError(message, where="generation.max_new_tokens", fix=fix, code="mlx-length")


def goes_beyond_context(model: MlxModel, prompt_length: int, settings: GenerationSettings) -> bool:
    """True if prompt and answer together are longer than the model's positions."""
    positions = find_positions(model.source.config)
    return positions is not None and prompt_length + settings.generation.max_new_tokens > positions


def slide_over(model: MlxModel, ids: list[int], settings: GenerationSettings) -> Iterator[int]:
    """New token ids of a prompt, beyond the last position where that must be (`slide`)."""
    most, positions = settings.generation.max_new_tokens, find_positions(model.source.config)

    def answer(ids: list[int], most: int) -> Iterator[int]:
        return stream_once(model, ids, settings, most)

    if positions is None or not goes_beyond_context(model, len(ids), settings):
        return answer(ids, most)
    return slide(ids, most, positions, answer)


def stream(model: MlxModel, batch: Batch, settings: GenerationSettings) -> Iterator[int]:
    """New token ids of a single prompt, one by one as they are sampled."""
    check_reach(model, len(batch.input_ids[0]), settings)
    model.network.eval()
    return slide_over(model, batch.input_ids[0].tolist(), settings)


def stream_once(model: MlxModel, ids: list[int], settings: GenerationSettings, most: int) -> Iterator[int]:
    """New token ids of one prompt that fits, as they are sampled."""
    steps: Any = generate_step(
        mx.array(ids),
        model.network,
        max_tokens=most,
        sampler=make_sampler(settings.generation),
        logits_processors=make_processors(settings.generation),
    )
    for token, _ in steps:
        if token in settings.stop_ids:
            return
        yield int(token)

"""Prompts → answers on torch: many at once, or one prompt token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from utils.backends import GenerationSettings, ignore
from utils.backends.torch_decoding import decode, limit_batch, uses_slots
from utils.backends.torch_model import TorchModel
from utils.backends.torch_quantization import refuse_repacked
from utils.batching import Batch, Ids, pad_prompts_left
from utils.sliding_context import slide

Answer = Callable[[TorchModel, list[int], GenerationSettings], Iterator[int]]


def make_generation_inputs(model: TorchModel, batch: Batch, settings: GenerationSettings) -> dict[str, Any]:
    """Arguments of transformers' generate; the model's own generation config is never touched."""
    mask = np.ones_like(batch.loss_mask) if batch.attention_mask is None else batch.attention_mask
    device = model.accelerator.device
    return {
        "input_ids": torch.from_numpy(batch.input_ids).to(device),
        "attention_mask": torch.from_numpy(mask).long().to(device),
        "generation_config": settings.generation.to_generation_config(list(settings.stop_ids), settings.pad_id),
    }


def generate(
    model: TorchModel,
    prompts: Sequence[Ids],
    settings: GenerationSettings,
    batch_size: int,
    on_answer: Callable[[int], None] = ignore,
) -> list[list[int]]:
    """New token ids of each prompt, in order, up to and without the stop token.

    Longest prompts come first: a batch that is too large for the memory fails at once. Rows that end make room for waiting
    prompts (`Decoder`) on architectures of `SLOT_MODELS`; on others, whose cache is of another kind or for which no test shows
    that answers stay the same, batches go through transformers' generate. Prompts whose answers could go beyond the last
    position slide, one by one (`slide`). Greedy answers are those that each prompt has alone, up to rounding. Sampled ones
    follow torch's seed, and under the `Decoder` depend on no other prompt.

    Args:
        batch_size: prompts that are answered at once, or fewer (`limit_rows`).
        on_answer: called with the number of its tokens whenever an answer is complete.
    """
    model.network.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    long = [index for index in order if goes_beyond_context(model, len(prompts[index]), settings)]
    fitting = order[len(long) :]
    with torch.inference_mode():
        answers = {}
        for index in long:
            answers[index] = list(slide_over(model, prompts[index].tolist(), settings, answer_once))
            on_answer(len(answers[index]))
        if uses_slots(model.network):
            ids = {index: prompts[index].tolist() for index in fitting}
            answers |= decode(model, ids, settings, batch_size, on_answer)
        elif fitting:
            batch_size = limit_batch(model, settings, batch_size, len(prompts[fitting[0]]))
            for start in range(0, len(fitting), batch_size):
                group = fitting[start : start + batch_size]
                batch = pad_prompts_left([prompts[index] for index in group], settings.pad_id)
                for index, answer in zip(group, answer_batch(model, batch, settings), strict=True):
                    answers[index] = answer
                    on_answer(len(answer))
    refuse_repacked(model.network)
    return [answers[index] for index in range(len(prompts))]


def answer_batch(model: TorchModel, batch: Batch, settings: GenerationSettings) -> list[list[int]]:
    """New token ids of each row of a left-padded batch, by transformers' generate."""
    output: Any = model.network.generate(**make_generation_inputs(model, batch, settings))
    return [cut_at_stop(row, settings.stop_ids) for row in output[:, batch.input_ids.shape[1] :].tolist()]


def goes_beyond_context(model: TorchModel, prompt_length: int, settings: GenerationSettings) -> bool:
    """True if prompt and answer together are longer than the model's positions."""
    positions = getattr(model.network.config, "max_position_embeddings", None)
    return positions is not None and prompt_length + settings.generation.max_new_tokens > positions


def answer_once(model: TorchModel, ids: list[int], settings: GenerationSettings) -> Iterator[int]:
    """New token ids of one prompt that fits."""
    yield from answer_batch(model, make_prompt(ids, settings), settings)[0]


def make_prompt(ids: list[int], settings: GenerationSettings) -> Batch:
    """One prompt as a batch."""
    return pad_prompts_left([np.array(ids, dtype=np.int64)], settings.pad_id)


def slide_over(model: TorchModel, ids: list[int], settings: GenerationSettings, answer: Answer) -> Iterator[int]:
    """New token ids beyond the last position (`slide`).

    Args:
        answer: answers a prompt that fits.
    """

    def answer_part(ids: list[int], most: int) -> Iterator[int]:
        generation = settings.generation.model_copy(update={"max_new_tokens": most})
        return answer(model, ids, replace(settings, generation=generation))

    positions = model.network.config.max_position_embeddings
    return slide(ids, settings.generation.max_new_tokens, positions, answer_part)


def cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """What stands before the first stop token."""
    return ids[: next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))]


class QueueStreamer(BaseStreamer):  # type: ignore[misc]  # transformers ships no types
    """Hands each new token over to another thread; None marks the end."""

    def __init__(self) -> None:
        self.queue: Queue[int | BaseException | None] = Queue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by generate: first with the whole prompt, then with each token."""
        if self.prompt_seen:
            self.queue.put(int(value.flatten()[0]))
        self.prompt_seen = True

    def end(self) -> None:
        """Called by generate at the end."""
        self.queue.put(None)


class EndOnRequest(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """Ends generation after the present token, once another thread has asked for it."""

    def __init__(self) -> None:
        self.asked = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **others: Any) -> torch.Tensor:
        """Called by generate after each token; True for each row that is done, shape (rows,)."""
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


def stream(model: TorchModel, batch: Batch, settings: GenerationSettings) -> Iterator[int]:
    """New token ids of a single prompt, one by one as they are sampled."""
    ids = batch.input_ids[0].tolist()
    if goes_beyond_context(model, len(ids), settings):
        yield from slide_over(model, ids, settings, stream_once)
    else:
        yield from stream_once(model, ids, settings)


def stream_once(model: TorchModel, ids: list[int], settings: GenerationSettings) -> Iterator[int]:
    """New token ids of one prompt that fits, as they are sampled; closed early, it ends the thread that computes them."""
    model.network.eval()
    inputs = make_generation_inputs(model, make_prompt(ids, settings), settings)
    streamer, end = QueueStreamer(), EndOnRequest()

    def work() -> None:
        try:
            model.network.generate(**inputs, streamer=streamer, stopping_criteria=StoppingCriteriaList([end]))
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread, below
            streamer.queue.put(error)

    thread = Thread(target=work)
    try:
        thread.start()
        while (item := streamer.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item not in settings.stop_ids:
                yield item
    finally:
        end.asked.set()  # the reader may have gone: Ctrl-C, or an answer that nobody wants any more
        if thread.is_alive():
            thread.join()

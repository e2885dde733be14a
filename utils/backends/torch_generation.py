"""Prompts → answers on torch: whole batches side by side, or one prompt token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from utils.backends import GenerationSettings, ignore
from utils.backends.torch_model import TorchModel, run_side_by_side
from utils.batching import Batch


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
    model: TorchModel, batches: Sequence[Batch], settings: GenerationSettings, on_batch: Callable[[int], None] = ignore
) -> list[list[int]]:
    """New token ids of each row of left-padded batches, in order, up to and without the stop token."""

    def answer(batch: Batch) -> list[list[int]]:
        output = model.network.generate(**make_generation_inputs(model, batch, settings))
        return [cut_at_stop(row, settings.stop_ids) for row in output[:, batch.input_ids.shape[1] :].tolist()]

    if settings.generation.temperature > 0:
        # Workers would draw from one generator in whatever order they run: sampling keeps to one.
        model = replace(model, plan=replace(model.plan, workers=1))
    return [row for rows in run_side_by_side(model, answer, batches, on_batch) for row in rows]


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


def stream(model: TorchModel, batch: Batch, settings: GenerationSettings) -> Iterator[int]:
    """New token ids of a single prompt, one by one as they are sampled."""
    model.network.eval()
    streamer = QueueStreamer()

    def work() -> None:
        try:
            model.network.generate(**make_generation_inputs(model, batch, settings), streamer=streamer)
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread, below
            streamer.queue.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    while (item := streamer.queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        if item not in settings.stop_ids:
            yield item
    thread.join()

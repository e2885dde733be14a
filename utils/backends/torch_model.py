"""What all parts of the torch back end work on: a network with its machine, and work that runs side by side on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from utils.batching import Batch
from utils.device_manager import MachinePlan


@dataclass(frozen=True)
class TorchModel:
    """A network with the machine it lives on."""

    network: nn.Module
    plan: MachinePlan
    accelerator: Accelerator
    base_name: str


def run_side_by_side(
    model: TorchModel, work: Callable[[Batch], Any], batches: Sequence[Batch], on_batch: Callable[[int], None]
) -> list[Any]:
    """Runs gradient-free work on every batch, on as many workers as the machine has, and keeps the order."""
    model.network.eval()

    def work_without_gradients(batch: Batch) -> Any:
        with torch.inference_mode():
            return work(batch)

    results = []
    with ThreadPoolExecutor(model.plan.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for batch, result in zip(batches, pool.map(work_without_gradients, batches), strict=True):
                results.append(result)
                on_batch(len(batch.lengths))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for everything that is queued
            raise
    return results

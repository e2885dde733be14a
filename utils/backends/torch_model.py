"""What all parts of the torch back end work on: a network with its machine, and work that runs side by side on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from utils.backends.torch_quantization import refuse_repacked
from utils.batching import Batch
from utils.device_manager import MachinePlan


@dataclass(frozen=True)
class TorchModel:
    """A network with the machine it lives on.

    Attributes:
        base_name: what a saved adapter names as its base.
        quantization: how the frozen base is stored, as in the recipe.
        added_ids: tokens that the base does not have, and whose rows were made when it was loaded.
        is_reward: the network ends in one number, a reward model.
        runs_flat: forward passes for losses take flat batches.
        started_from: what PiSSA has taken out of the base, by name in a saved adapter; empty for all other variants.
    """

    network: nn.Module
    plan: MachinePlan
    accelerator: Accelerator
    base_name: str
    quantization: str = "none"
    added_ids: tuple[int, ...] = ()
    is_reward: bool = False
    runs_flat: bool = False
    started_from: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def base(self) -> Any:
        """transformers' model, with its adapters but without what peft puts around it."""
        network: Any = self.network
        return network.get_base_model() if isinstance(network, PeftModel) else network


def run_side_by_side(
    model: TorchModel, work: Callable[[Batch], Any], batches: Sequence[Batch], on_batch: Callable[[int], None]
) -> list[Any]:
    """Runs gradient-free work on every batch, on as many workers as the machine has, and keeps the order."""
    model.network.eval()

    def work_without_gradients(batch: Batch) -> Any:
        with torch.inference_mode():
            return work(batch)

    results = []
    pool = ThreadPoolExecutor(model.plan.workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for batch, result in zip(batches, pool.map(work_without_gradients, batches), strict=True):
            results.append(result)
            on_batch(len(batch.lengths))
    finally:
        # A signal must wait neither for what is queued nor for the batches that are being computed, which may take long.
        pool.shutdown(wait=False, cancel_futures=True)
    refuse_repacked(model.network)
    return results

"""What all rows of a step begin with, computed once for all of its forward passes (torch).

In most sets each row begins with the same system turn. Its keys and values are the same for every row, so one pass computes
them, all others read them, and one backward pass sends the sum of their gradients through it: the gradient of a step stays what
it is, for it is a sum over the rows (prefix sharing, arXiv 2410.20305, over a step in place of a pair).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from utils.backends.torch_attention import KeysValues, Sight
from utils.backends.torch_model import TorchModel, run_side_by_side
from utils.batching import Batch
from utils.flat_batches import FlatBatch, Ids, find_beginning, make_stretch

Gradients = Sequence[torch.Tensor | None]


class Beginning:
    """Keys and values of the first tokens of every row.

    Attributes:
        tokens: how many they are.
        seen: by attention module, keys and values as the other passes see them, each of shape (1, heads, tokens, width);
            leaves, so that a backward pass ends at them.
    """

    def __init__(self, model: TorchModel, ids: Ids) -> None:
        """Runs the forward pass, with gradients where torch has them enabled.

        Args:
            ids: the tokens, shape (tokens,).
        """
        self.tokens = len(ids)
        computed: dict[nn.Module, KeysValues] = {}
        flat = make_stretch(ids)
        model.base.base_model(**place_flat(model, flat, Sight(flat.spans, kept=computed)))
        self.seen = {
            module: tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in pair)
            for module, pair in computed.items()
        }
        self.outputs = [tensor for pair in computed.values() for tensor in pair if tensor.requires_grad]
        self.leaves = [tensor for pair in self.seen.values() for tensor in pair if tensor.requires_grad]
        self.sums: list[torch.Tensor | None] = [None] * len(self.leaves)

    def add(self, gradients: Gradients) -> None:
        """Adds what one pass gives for `leaves`."""
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                known = self.sums[index]
                # The first one may be a view of the gradient of a whole pass, which would be kept with it.
                self.sums[index] = gradient.clone() if known is None else known.add_(gradient)

    def differentiate(self, parameters: Sequence[nn.Parameter]) -> Gradients:
        """The part of the parameters' gradients that comes through the beginning; None where nothing does."""
        reached = [(output, slope) for output, slope in zip(self.outputs, self.sums, strict=True) if slope is not None]
        if not reached:
            return [None] * len(parameters)
        outputs, slopes = zip(*reached, strict=True)
        gradients: Gradients = torch.autograd.grad(outputs, parameters, slopes, allow_unused=True)
        return gradients


def compute_beginning(model: TorchModel, batches: Sequence[Batch]) -> Beginning | None:
    """The beginning of all rows of some batches, or None where they have none, or the model cannot be told."""
    ids = find_beginning(batches) if model.runs_flat else None
    return None if ids is None else Beginning(model, ids)


def score_side_by_side(
    model: TorchModel,
    score: Callable[[Batch, Beginning | None], Any],
    batches: Sequence[Batch],
    on_batch: Callable[[int], None],
) -> list[Any]:
    """`run_side_by_side`, with what all rows begin with computed beforehand."""
    model.network.eval()
    with torch.inference_mode():
        beginning = compute_beginning(model, batches)
    return run_side_by_side(model, lambda batch: score(batch, beginning), batches, on_batch)


def place_flat(model: TorchModel, flat: FlatBatch, sight: Sight) -> dict[str, Any]:
    """A flat batch on the model's device, as arguments of its forward pass."""
    device = model.accelerator.device
    return {
        "input_ids": torch.from_numpy(flat.input_ids)[None].to(device),
        "position_ids": torch.from_numpy(flat.position_ids)[None].to(device),
        "attention_mask": torch.empty(1, 1, 1, 1, device=device),  # of four dimensions, so that transformers makes none
        "sight": sight,
        "use_cache": False,
    }

"""What the machine allows: matrix products of torch, measured, and those that a work cannot do without.

    python benchmarks/speed_bound.py float32            # GFLOP/s on all cores: the fastest, and kept up for 10 s
    python benchmarks/speed_bound.py bfloat16 cuda      # of a GPU

Counted as needed, in multiplications and additions of matrix products:

- each real token passes the N weights of the layers forwards (2N) and, for what lies below, backwards (2N); trained weights
  need their own gradient besides (2N). A frozen base with adapters of n weights: 4N + 6n; all weights: 6N;
- each learned token passes the head of V x d weights both ways (4Vd; 6Vd where it is trained);
- causal attention over a row of L tokens: 2L²w a layer forwards, for the scores and the sums over values of half a square of
  width w, and twice that backwards;
- DPO: chosen and rejected answers share their prompt, and the reference needs one more pass forwards.

Not counted: norms, softmax, the optimizer, recomputation, padding, dequantisation.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

SIZES = (
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (512, 576, 1536),
    (512, 1536, 576),
    (2048, 576, 1536),
    (1024, 576, 49152),
)
LARGE = (8192, 8192, 8192)  # on a GPU, which is not busy with less
SECONDS = 1.5  # spent on each size
# About as long as a step: a core that is warm, or shares its power, is slower than in a single product.
KEPT_UP_SECONDS = 10


def measure_peak(dtype: str, device: str = "cpu") -> tuple[float, float]:
    """FLOP/s of matrix products on all cores, or a GPU, among them those of the embedded model's own shapes.

    Returns:
        Of the fastest single product, and of the size it has when that is kept up.
    """
    sizes = SIZES if device == "cpu" else (*SIZES, LARGE)
    fastest, size = max((max(multiply(size, SECONDS, dtype, device)), size) for size in sizes)
    return fastest, statistics.harmonic_mean(multiply(size, KEPT_UP_SECONDS, dtype, device))


def multiply(size: tuple[int, int, int], seconds: float, dtype: str, device: str) -> list[float]:
    """FLOP/s of one product after the other, for so long.

    Args:
        size: rows, inputs and outputs.
    """
    import torch

    rows, inputs, outputs = size
    x = torch.ones(rows, inputs, dtype=getattr(torch, dtype), device=device)
    weight = torch.ones(outputs, inputs, dtype=getattr(torch, dtype), device=device)
    torch.nn.functional.linear(x, weight)
    speeds = []
    ends = time.perf_counter() + seconds
    while (started := time.perf_counter()) < ends:
        torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        speeds.append(2.0 * rows * inputs * outputs / (time.perf_counter() - started))
    return speeds


class NeededWork:
    """Operations that a step needs, from the model's config.json.

    Args:
        model: folder of the model.
        r: rank of the adapters on all linear modules; None where all weights are trained.
    """

    def __init__(self, model: Path, r: int | None) -> None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or width // heads
        keys = head * config["num_key_value_heads"]
        queries, inner = head * heads, config["intermediate_size"]
        shapes = [
            (width, queries),
            (width, keys),
            (width, keys),
            (queries, width),
            *[(width, inner)] * 2,
            (inner, width),
        ]
        self.layers: int = config["num_hidden_layers"]
        self.weights = self.layers * sum(inputs * outputs for inputs, outputs in shapes)
        self.adapters = self.layers * sum((inputs + outputs) * r for inputs, outputs in shapes) if r else 0
        self.head: int = width * config["vocab_size"]
        self.queries = queries
        self.is_full = r is None

    def count(self, tokens: int, supervised: int, squares: int, *, reference: bool) -> float:
        """FLOPs of one step.

        Args:
            tokens: real ones, the prompt of a pair once.
            supervised: learned tokens.
            squares: sum of L² over the rows: twice the pairs of tokens of which one sees the other.
            reference: one more pass forwards, as DPO needs it.
        """
        passes = 3 if self.is_full else 2
        forward = 2.0 * self.weights * tokens + 2.0 * self.head * supervised
        attention = 2.0 * self.queries * self.layers * squares
        total: float = passes * forward + 6.0 * self.adapters * tokens + 3 * attention
        return total + (forward + attention if reference else 0.0)


if __name__ == "__main__":
    print(
        json.dumps(
            dict(zip(("gflops", "kept_up"), [speed / 1e9 for speed in measure_peak(*sys.argv[1:])], strict=True))
        )
    )

"""What DPO saves by computing a pair's prompt once and the reference beforehand: our step beside the naive one.

    python benchmarks/pairs.py [--rounds 3] [--rows-dir DIR]

Both take the same step of 8 pairs on the embedded model with LoRA of rank 16, one pair in a forward pass. The naive one
computes both conversations of a pair whole and padded, and the reference in each step, with the adapter switched off. Loss
and gradient norm of both are printed: they must agree. `--rows-dir` names the folder of the public rows (CONTRIBUTING.md);
without it the shipped pairs are used.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.speed_work import WORKS, PreparedWork, prepare_work  # noqa: E402
from config.recipe_io import load_recipe  # noqa: E402
from config.structured_config import DpoSection  # noqa: E402
from utils.backends import StepResult, load_backend  # noqa: E402
from utils.batching import pad_rows  # noqa: E402
from utils.logging import set_up_logging  # noqa: E402


def make_steps(prepared: PreparedWork) -> dict[str, Callable[[], StepResult]]:
    """Both steps, over one model at rate 0."""
    import torch

    load_backend("torch")  # which imports in the order that is quick
    from utils.backends import torch_backend
    from utils.backends.torch_preference import add_references
    from utils.backends.torch_step import TorchTrainStep

    recipe = load_recipe(prepared.folder / "recipe.yaml", []).recipe
    torch.manual_seed(recipe.seed)
    model = torch_backend.attach_lora(torch_backend.load_model(prepared.source, recipe), recipe)
    batches = [pad_rows([pair], 0) for pair in prepared.windows[0]]
    started = time.perf_counter()
    referenced = add_references(model, batches)  # a fresh adapter changes nothing, so this is the reference
    print(f"reference of these pairs, once: {time.perf_counter() - started:.1f} s")
    precomputed = recipe.model_copy(update={"dpo": DpoSection(reference="precomputed")})
    naive = TorchTrainStep(replace(model, runs_flat=False), recipe)
    shared = TorchTrainStep(model, precomputed)
    return {"naive": lambda: naive.step(batches, 0.0), "shared": lambda: shared.step(referenced, 0.0)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures both steps in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="steps of each that count (default: 3)")
    parser.add_argument("--rows-dir", type=Path, metavar="DIR", help="folder of the public rows")
    options = parser.parse_args(arguments)
    set_up_logging("WARNING")
    with tempfile.TemporaryDirectory(prefix="tunebook-pairs-") as name:
        steps = make_steps(prepare_work(WORKS["dpo"], 1, options.rows_dir, Path(name)))
    seconds: dict[str, list[float]] = {title: [] for title in steps}
    for _ in range(options.rounds + 1):
        for title, take in steps.items():
            started = time.perf_counter()
            result = take()
            seconds[title].append(time.perf_counter() - started)
            last = seconds[title][-1]
            print(
                f"{title}: {last:.1f} s, loss {result.loss:.6f}, gradient norm {result.gradient_norm:.5f}", flush=True
            )
    naive, shared = (statistics.median(times[1:]) for times in seconds.values())  # the first of each warms up
    print(f"naive {naive:.1f} s, shared {shared:.1f} s: {naive / shared:.2f} times as quick")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of a training pass goes: products, attention and the rest, each with its speed.

    python benchmarks/profile_pass.py [--work medium] [--rows-dir DIR]

One row of the work's first step, of middle length, goes forwards and backwards through the embedded model on one core, as a
worker of `scripts/train.py` computes it, once to warm up and then under torch's profiler. The peak is that of a large product
on the same core just before and after. The profiler itself takes a few percent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.speed_bound import multiply  # noqa: E402
from benchmarks.speed_work import LORA, WORKS, PreparedWork, prepare_work  # noqa: E402
from config.recipe_io import load_recipe  # noqa: E402
from utils.backends import load_backend  # noqa: E402
from utils.logging import set_up_logging  # noqa: E402

ADAPTERS, HEAD, LAYERS = "products of the adapters", "products of the head", "products of the layers"
ATTENTION, REST = "attention", "all else (norms, activations, positions, softmax, Python)"
CPU_WORKS = [name for name, work in WORKS.items() if not work.needs_gpu]


def main(arguments: Sequence[str] | None = None) -> int:
    """Profiles a pass and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=CPU_WORKS, default="medium", metavar="NAME", help=", ".join(CPU_WORKS))
    parser.add_argument("--rows-dir", type=Path, metavar="DIR", help="folder of the three files of public rows")
    options = parser.parse_args(arguments)
    set_up_logging("WARNING")
    with tempfile.TemporaryDirectory(prefix="tunebook-profile-") as folder:
        work = WORKS[options.work]
        prepared = prepare_work(work, 1, options.rows_dir, Path(folder))
        step, batch = make_pass(prepared)
        print("\n".join(format_table(options.work, profile(step, batch), batch.tokens)))
    return 0


def make_pass(prepared: PreparedWork) -> tuple[Any, Any]:
    """A training step of the torch back end, and one row of the work's first step, or one pair."""
    from utils.batching import make_micro_batches

    recipe, backend = load_recipe(prepared.folder / "recipe.yaml", []).recipe, load_backend("torch")
    step: Any = backend.make_step(backend.attach_lora(backend.load_model(prepared.source, recipe), recipe), recipe)
    batches = make_micro_batches(prepared.windows[0], 1, 0)
    (batch,) = step.objective.prepare([batches[len(batches) // 2]])
    return step, batch


def profile(step: Any, batch: Any) -> dict[str, list[float]]:
    """Seconds and FLOPs of each group of operations, and of the pass and the peak."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    torch.set_num_threads(1)
    step.model.network.train()
    step._differentiate(batch, 1)
    peak = measure_peak()
    with watch(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        step._differentiate(batch, 1)
        seconds = time.perf_counter() - started
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.key_averages(group_by_input_shape=True):
        name, flops = classify(event.key, event.input_shapes, step.model.base.config.vocab_size)
        groups[name][0] += event.self_cpu_time_total / 1e6
        groups[name][1] += flops * event.count
    groups["the whole pass"] = [seconds, sum(flops for _, flops in groups.values())]
    groups["peak"] = [1.0, max(peak, measure_peak())]
    return groups


def measure_peak() -> float:
    """FLOP/s of a large product on this core, kept up for a second."""
    return statistics.harmonic_mean(multiply((1024, 1024, 1024), 1, "float32", "cpu"))


def classify(name: str, shapes: Sequence[Sequence[int]], vocabulary: int) -> tuple[str, float]:
    """Group of an operation, and the FLOPs of one call."""
    from utils.backends import torch_head

    if "attention" in name:
        return ATTENTION, 0.0
    if name not in {"aten::mm", "aten::addmm", "aten::addmm_"}:
        return REST, 0.0
    (rows, inner), (_, columns) = shapes[:2] if name == "aten::mm" else shapes[1:3]
    flops = 2.0 * rows * inner * columns
    if LORA["r"] in {rows, inner, columns}:
        return ADAPTERS, flops
    return (HEAD if max(inner, columns) in {vocabulary, torch_head.BLOCK} else LAYERS), flops


def format_table(work: str, groups: dict[str, list[float]], tokens: int) -> list[str]:
    """One line for each group, the largest first."""
    peak, (seconds, _) = groups.pop("peak")[1], groups["the whole pass"]
    lines = [
        f"{work}: a row of {tokens} tokens, one core, {peak / 1e9:.0f} GFLOP/s in a large product",
        "",
        "| | seconds | share | GFLOP/s |",
        "|---|---|---|---|",
    ]
    for name, (spent, flops) in sorted(groups.items(), key=lambda item: -item[1][0]):
        speed = f"{flops / spent / 1e9:.0f}" if flops else ""
        lines.append(f"| {name} | {spent:.2f} | {100 * spent / seconds:.0f} % | {speed} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

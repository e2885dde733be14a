"""How far MLX and torch are apart on the same weights, rows and recipe: logits, gradients, losses and greedy texts.

    python benchmarks/parity.py [--only NAME] [--write]

One row for each architecture that the MLX back end supports, as a small random model, and one for the real embedded model.
Everything is in float32, on the CPU. The tests hold the same differences below limits (tests/backends/test_mlx_parity.py);
here they are measured. `--write` writes docs/results/parity.md; with `--only`, some of its rows anew.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config.structured_config import GenerationSection, ModelSection  # noqa: E402
from tests.backends.mlx_sides import (  # noqa: E402
    BACKENDS,
    Sides,
    collect_mlx_gradients,
    collect_torch_gradients,
    make_recipe,
    open_sides,
    save_tiny,
)
from tests.backends.test_families import make_batch  # noqa: E402
from tests.backends.test_mlx_parity import MODELS, PROMPTS  # noqa: E402
from utils.backends import GenerationSettings  # noqa: E402
from utils.batching import Batch, pad_rows, split_rows  # noqa: E402
from utils.mlx_names import MLX_MODEL_TYPES  # noqa: E402
from utils.model_source import DEFAULT_MODEL, find_model  # noqa: E402
from utils.tokenizer_files import load_tokenizer  # noqa: E402
from utils.tokenizer_utils import EncodedExample  # noqa: E402

RESULT = ROOT / "docs" / "results" / "parity.md"
STEPS, REAL_STEPS = 20, 3
REAL = "SmolLM2-135M-Instruct, real weights"
Ids = np.ndarray


@dataclass(frozen=True)
class Differences:
    """Of one model: `logits` absolute, `gradients` as a share of the largest one of each tensor, `losses` of each loss."""

    name: str
    parameters: int
    logits: float
    gradients: float
    losses: float
    steps: int
    texts: bool


def compare(name: str, sides: Sides, batch: Batch, prompts: list[Ids], steps: int) -> Differences:
    """Measures everything on one model; torch takes the rows of a step one by one, MLX together."""
    pairs = list(zip(BACKENDS, (sides.torch, sides.mlx), strict=True))
    ours, theirs = (backend.compute_logits(model, batch) for backend, model in pairs)
    settings = GenerationSettings(GenerationSection(max_new_tokens=12), (2,), 0)
    texts = [backend.generate(model, prompts, settings, 2) for backend, model in pairs]
    torch_step, mlx_step = sides.make_steps()
    expected = collect_torch_gradients(torch_step, split_rows([batch]))
    found = collect_mlx_gradients(mlx_step, [batch])
    assert expected.keys() == found.keys()
    sizes = {key: float(np.abs(value).max()) for key, value in expected.items()}
    apart = {key: float(np.abs(value - found[key]).max()) for key, value in expected.items()}
    gradients = max(apart[key] / size if size else apart[key] for key, size in sizes.items())  # A's is zero while B is
    losses = [
        (torch_step.step(split_rows([batch]), 1e-3).loss, mlx_step.step([batch], 1e-3).loss) for _ in range(steps)
    ]
    return Differences(
        name,
        BACKENDS[0].count_parameters(sides.torch)[1],
        float(np.abs(ours - theirs).max()),
        gradients,
        max(abs(one - other) / abs(one) for one, other in losses),
        steps,
        texts[0] == texts[1],
    )


def compare_family(name: str, folder: Path) -> Differences:
    """A small random model of an architecture."""
    recipe = make_recipe(folder, training={"method": "sft", "learning_rate": 1e-3, "weight_decay": 0.1})
    return compare(name, open_sides(save_tiny(folder, MODELS[name]), recipe), make_batch(), PROMPTS, STEPS)


def compare_real(folder: Path) -> Differences:
    """The embedded model on two shipped rows."""
    shutil.copytree(find_model(ModelSection(name=DEFAULT_MODEL), "benchmark", with_weights=True).folder, folder)
    sides = open_sides(folder, make_recipe(folder, lora={"r": 16, "alpha": 32}), moved=False)
    tokenizer = load_tokenizer(folder)
    lines = (ROOT / "data" / "text_to_sql" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    rows, prompts = [], []
    for line in lines:
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        prompts.append(np.array(tokenizer(question)["input_ids"]))
        ids = np.concatenate([prompts[-1], np.array(tokenizer(answer)["input_ids"])])
        rows.append(EncodedExample(ids, np.arange(len(ids)) >= len(prompts[-1]), "rows"))
    return compare(REAL, sides, pad_rows(rows, 0), prompts, REAL_STEPS)


def format_row(result: Differences) -> str:
    """One line of the table."""
    cells = (
        result.name,
        f"{result.parameters:,}",
        f"{result.logits:.1e}",
        f"{result.gradients:.1e}",
        f"{result.losses:.1e} ({result.steps} steps)",
        "yes" if result.texts else "no",
    )
    return f"| {' | '.join(cells)} |"


def read_rows(page: Path) -> dict[str, str]:
    """The lines of the table by the name of their model; none before the page was first written."""
    lines = page.read_text(encoding="utf-8").splitlines() if page.is_file() else []
    return {name: line for line in lines if (name := line.split(" | ")[0].removeprefix("| ")) in (*MODELS, REAL)}


def format_page(rows: list[str]) -> str:
    """The whole result as Markdown."""
    names = ("mlx", "mlx-lm", "torch", "transformers", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"""# MLX beside torch

`python benchmarks/parity.py --write` loads the same weights and the same LoRA adapters into both back ends, and compares them
in float32: the largest difference of a logit, that of a gradient on the first step (as a share of the largest gradient of its
tensor), that of a loss over the steps (as a share of the loss; AdamW, clipping at 1), and greedy texts of 12 tokens after
prompts of different lengths, in batches of two. Torch takes the rows of a step one by one, MLX together. All but the last row
are small random models of the architecture, with random A and B; the last one's adapters are fresh, with a B of zero. MLX ran
on its CPU build, not on Apple's GPU.

| model | parameters | logits | gradients | losses | same texts |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Machine: {platform.machine()}, {platform.system()}, Python {platform.python_version()}, {versions}.
"""


def main() -> None:
    """Measures, prints the table, and writes the page when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="the models whose name contains this")
    parser.add_argument("--write", action="store_true", help="write docs/results/parity.md")
    options = parser.parse_args()
    names = [*sorted(MLX_MODEL_TYPES), *sorted({*MODELS} - MLX_MODEL_TYPES), REAL]
    rows = read_rows(RESULT)
    for name in [name for name in names if not options.only or options.only in name]:
        with tempfile.TemporaryDirectory(prefix="tunebook-parity-") as place:
            folder = Path(place) / "model"
            rows[name] = format_row(compare_real(folder) if name == REAL else compare_family(name, folder))
        print(rows[name], flush=True)
        if options.write:
            RESULT.write_text(format_page([rows[name] for name in names if name in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()

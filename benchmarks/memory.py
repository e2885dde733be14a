"""How well the predicted peak memory of a run agrees with the measured one, over the shipped recipes.

    python benchmarks/memory.py [--only NAME] [--limit-gb N] [--write]

Builds a random-weight model of each recipe's real architecture in a temporary folder, trains it for three steps with the
recipe's own batch, adapter and rows, and reads both numbers from run.json. Models that are not on this machine are typed
below; where one is too large for the memory, it is built with fewer layers. They get the embedded model's tokenizer, so rows
have other lengths than on the real model. `--write` writes docs/results/memory.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory_cases import (  # noqa: E402
    CASES,
    CONFIGS,
    EMBEDDED_VOCABULARY,
    LAYERS_KEY,
    STORED,
    TOKENS,
    Case,
)
from config.recipe_io import load_recipe  # noqa: E402
from config.structured_config import ModelSection  # noqa: E402
from utils.machine import measure_memory  # noqa: E402
from utils.memory import show_bytes  # noqa: E402
from utils.model_shape import read_shape  # noqa: E402
from utils.model_source import DEFAULT_MODEL, find_model  # noqa: E402
from utils.threads import count_cores  # noqa: E402

RESULT = ROOT / "docs" / "results" / "memory.md"
STEPS = 3


@dataclass(frozen=True)
class Measurement:
    """Both numbers of one case, with what was left out to fit."""

    case: Case
    parameters: int
    predicted: dict[str, Any]
    measured: int
    note: str

    @property
    def error(self) -> float:
        """Predicted ÷ measured - 1."""
        return float(self.predicted["total"] / self.measured - 1)


def fit_config(config: dict[str, Any], limit: int) -> dict[str, Any]:
    """Halves the layers until loading fits: float32 weights beside a bfloat16 file, and half as much again for training."""
    fitted = dict(config)
    key = LAYERS_KEY.get(config["model_type"], "num_hidden_layers")
    while (shape := read_shape(fitted)) and shape.parameters * 9 > limit and fitted[key] > 1:
        fitted[key] //= 2
    return fitted


def build_model(case: Case, config: dict[str, Any], folder: Path) -> None:
    """Writes a random model with the embedded model's tokenizer."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {name: value for name, value in config.items() if name != "model_type"}
    dtype = STORED.get(case.recipe, "bfloat16")
    made = CONFIG_MAPPING[config["model_type"]](**TOKENS, **values)
    AutoModelForCausalLM.from_config(made, dtype=dtype).save_pretrained(folder)
    tokenizer = find_model(ModelSection(name=DEFAULT_MODEL), "benchmark", with_weights=True).folder
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if config["model_type"] != "gpt2" or name != "chat_template.jinja":  # GPT-2 has none
            shutil.copy2(tokenizer / name, folder)


def write_long_rows(folder: Path) -> Path:
    """Joins ten shipped conversations into each row: 300 to 700 tokens."""
    lines = (ROOT / "data" / "text_to_sql" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    path = folder / "long.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(rows), 10):
            messages = [message for row in rows[start : start + 10] for message in row]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_recipe(case: Case, folder: Path) -> Path:
    """The recipe's file, or a copy without its lora section."""
    path = ROOT / "recipes" / f"{case.recipe}.yaml"
    if not case.all_weights:
        return path
    kept, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        inside = line.startswith("lora:") or (inside and line.startswith(" "))
        kept += [] if inside else [line]
    copy = folder / f"{case.recipe}_all.yaml"
    copy.write_text("\n".join(kept).replace("2.0e-3", "3.0e-5") + "\n", encoding="utf-8")
    return copy


def measure(case: Case, limit: int) -> Measurement:
    """Builds the model, trains a few steps in a process of its own, and reads run.json."""
    with tempfile.TemporaryDirectory(prefix="tunebook-memory-") as name:
        folder, note = Path(name), ""
        recipe = write_recipe(case, folder)
        overrides = [*case.overrides]
        if config := CONFIGS.get(case.recipe):
            fitted = fit_config(config, limit)
            if fitted["vocab_size"] < EMBEDDED_VOCABULARY:  # else the embedded model's ids would lie outside of it
                fitted["vocab_size"] = EMBEDDED_VOCABULARY
                note = f"{EMBEDDED_VOCABULARY:,} tokens"
            if fitted != {**config, "vocab_size": fitted["vocab_size"]}:
                key = LAYERS_KEY.get(config["model_type"], "num_hidden_layers")
                note = ", ".join(filter(None, (note, f"{fitted[key]} of {config[key]} layers")))
            build_model(case, fitted, folder / "model")
            overrides.append(f"model.name={folder / 'model'}")
        if case.long_rows:
            overrides.append(f"data.train={write_long_rows(folder)}")
        loaded = load_recipe(recipe, overrides)
        rows = 64 if case.long_rows else 640
        overrides.append(f"training.epochs={STEPS * loaded.recipe.training.batch_size / rows:.6f}")
        arguments = [word for override in overrides for word in ("--set", override)]
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--recipe", str(recipe), *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*command, "--run", str(folder / "run")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{case.name}: {done.stderr.strip()[-2000:]}")
        facts = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
        return Measurement(case, facts["parameters"], facts["predicted_memory"], facts["peak_memory_bytes"], note)


def format_row(result: Measurement) -> str:
    """One line of the table."""
    cells = [
        result.case.name,
        f"{result.parameters / 1e6:,.0f} M" + (f" ({result.note})" if result.note else ""),
        show_bytes(result.predicted["total"]),
        show_bytes(result.measured),
        f"{100 * result.error:+.0f} %",
        result.predicted["phase"],
    ]
    return f"| {' | '.join(cells)} |"


def read_rows(page: Path) -> dict[str, str]:
    """The lines of the table by the name of their case; none before the page was first written."""
    lines = page.read_text(encoding="utf-8").splitlines() if page.is_file() else []
    names = {case.name for case in CASES}
    return {name: line for line in lines if (name := line.split(" | ")[0].removeprefix("| ")) in names}


def format_page(rows: Mapping[str, str]) -> str:
    """The whole result as Markdown."""
    errors = [abs(int(row.split(" | ")[4].removesuffix(" %"))) for row in rows.values()]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "mlx")
    )
    libc = " ".join(platform.libc_ver())
    lines = [
        "# Predicted and measured memory",
        "",
        "`python benchmarks/memory.py --write` trains a recipe of each shipped model for three steps, and compares what the",
        "pre-flight (`utils/memory.py`, `utils/mlx_memory.py`) predicts with the peak resident memory of the process; with",
        "`--only` it measures some of them anew. All but the embedded model have random weights of the real architecture, and",
        "the embedded model's tokenizer. No run here used a GPU, and those on MLX its CPU build.",
        "",
        "| recipe | parameters with adapters | predicted | measured | error | peak while |",
        "|---|---|---|---|---|---|",
        *(rows[case.name] for case in CASES if case.name in rows),
        "",
        f"Mean error {sum(errors) / len(errors):.0f} %, largest {max(errors)} %.",
        "",
        f"Machine: {platform.machine()}, {count_cores()} cores, {show_bytes(measure_memory()[0])} of memory, {libc}, "
        f"Python {platform.python_version()}, {versions}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="the cases whose name contains this")
    parser.add_argument(
        "--limit-gb", type=float, metavar="N", help="memory to stay below (default: half of what is free)"
    )
    parser.add_argument("--write", action="store_true", help="write docs/results/memory.md")
    options = parser.parse_args()
    limit = int(options.limit_gb * 1e9) if options.limit_gb else measure_memory()[1] // 2
    rows = read_rows(RESULT)
    for case in CASES:
        if not options.only or options.only in case.name:
            rows[case.name] = format_row(measure(case, limit))
            print(rows[case.name], flush=True)
            if options.write:
                RESULT.parent.mkdir(parents=True, exist_ok=True)
                RESULT.write_text(format_page(rows), encoding="utf-8")
    if options.write:
        print(f"Written: {RESULT}")


if __name__ == "__main__":
    main()

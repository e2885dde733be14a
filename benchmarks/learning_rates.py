"""A third, once and three times a recipe's learning rate, on the same rows and seeds: is the pinned one near the best?

    python benchmarks/learning_rates.py --recipe recipes/smollm2_sql.yaml [--set KEY=VALUE]… [--factors 0.33 1 3] [--write]

Each run is a whole `scripts/train.py` and, with `--evaluate`, a `scripts/evaluate_run.py` in a folder of its own, one after the
other. `--write` puts a table and a picture of the losses into docs/results/learning_rate_<recipe>.md and .png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config.recipe_io import load_recipe  # noqa: E402
from utils.report import open_figure, smooth  # noqa: E402

RESULTS = ROOT / "docs" / "results"
FACTORS = (1 / 3, 1.0, 3.0)
COLORS = ("#9ecae1", "#2171b5", "#d62728", "#7f7f7f", "#2ca02c")


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        rate: peak learning rate.
        facts: run.json.
        losses: training loss of each step.
        held_out: (step, held-out loss), in order.
        metrics: report.json's metrics; empty without `--evaluate`.
    """

    rate: float
    facts: dict[str, Any]
    losses: list[float]
    held_out: list[tuple[int, float]]
    metrics: dict[str, Any]


def run_script(name: str, *arguments: str) -> None:
    """Runs one of our scripts and stops with its message if it fails."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")


def train_once(recipe: Path, overrides: Sequence[str], rate: float, run: Path, *, evaluate: bool) -> Outcome:
    """Trains with one learning rate and reads what the run wrote."""
    words = [word for override in (*overrides, f"training.learning_rate={rate:.3g}") for word in ("--set", override)]
    run_script("train", "--recipe", str(recipe), *words, "--run", str(run))
    if evaluate:
        run_script("evaluate_run", "--run", str(run))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Outcome(
        rate,
        json.loads((run / "run.json").read_text(encoding="utf-8")),
        [row["loss"] for row in rows if row.get("loss") is not None],
        [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row],
        json.loads((run / "report.json").read_text(encoding="utf-8"))["metrics"] if evaluate else {},
    )


def draw(outcomes: Sequence[Outcome], target: Path) -> None:
    """Training losses, smoothed, and held-out losses of all runs."""
    figure, axes = open_figure(7, 4)
    for outcome, color in zip(outcomes, COLORS, strict=False):
        axes.plot(range(1, len(outcome.losses) + 1), smooth(outcome.losses), color=color, label=f"{outcome.rate:.2g}")
        if outcome.held_out:
            axes.plot(*zip(*outcome.held_out, strict=True), color=color, marker="o", linestyle="none")
    axes.set(xlabel="optimizer step", ylabel="loss (line: training, smoothed; point: held-out)")
    axes.legend(frameon=False, title="learning rate")
    figure.savefig(target, dpi=120)


def format_row(outcome: Outcome) -> str:
    """One line of the table."""
    loss = outcome.facts["eval_loss"]
    cells = [f"{outcome.rate:.2g}", f"{outcome.facts['train_loss']:.4f}", "–" if loss is None else f"{loss:.4f}"]
    for values in outcome.metrics.values():
        tuned = values["tuned"]
        cells.append(f"{tuned:.3f} ({values['low'] + values['base']:.3f} to {values['high'] + values['base']:.3f})")
    return f"| {' | '.join(cells)} |"


def format_page(command: str, recipe: Path, outcomes: Sequence[Outcome], picture: Path) -> str:
    """Table and picture as Markdown."""
    names = list(outcomes[0].metrics)
    head = ["learning rate", "training loss", "held-out loss", *names]
    scored = [outcome for outcome in outcomes if outcome.facts["eval_loss"] is not None]
    best = min(scored, key=lambda outcome: outcome.facts["eval_loss"]).rate if scored else math.nan
    facts = outcomes[0].facts
    brackets = " Brackets: 95 % interval of the difference to the untouched model, added to its value." if names else ""
    machine = f"{facts['device_name']}, {facts['dtype']}, torch {facts['versions']['torch']}"
    lines = [
        f"# Learning rate of `{recipe.name}`",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}: {machine}.",
        "Every line is a whole run with the same rows, order and seed.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(format_row(outcome) for outcome in outcomes),
        "",
        f"Lowest held-out loss: {best:.2g}.{brackets}",
        "",
        f"![losses]({picture.name})",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the sweep and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="of the recipe's learning rate")
    parser.add_argument("--evaluate", action="store_true", help="also measure the recipe's metrics before and after")
    parser.add_argument("--write", action="store_true", help="write docs/results/learning_rate_<recipe>.md and .png")
    options = parser.parse_args()
    pinned = load_recipe(options.recipe, options.overrides).recipe.training.learning_rate
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="tunebook-rates-") as folder:
        for number, factor in enumerate(sorted(options.factors)):
            run = Path(folder) / str(number)
            outcomes.append(
                train_once(options.recipe, options.overrides, factor * pinned, run, evaluate=options.evaluate)
            )
            print(format_row(outcomes[-1]), flush=True)
    if options.write:
        picture = RESULTS / f"learning_rate_{options.recipe.stem}.png"
        RESULTS.mkdir(parents=True, exist_ok=True)
        draw(outcomes, picture)
        command = " ".join(["python benchmarks/learning_rates.py", *sys.argv[1:]])
        picture.with_suffix(".md").write_text(format_page(command, options.recipe, outcomes, picture), encoding="utf-8")
        print(f"Written: {picture.with_suffix('.md')}")


if __name__ == "__main__":
    main()

"""Small sets: plain, adaptive and gentle values side by side, on the embedded model.

    python benchmarks/small_data.py [--wikisql FILE] [--gsm8k FILE] [--seeds 3] [--rows 40] [--minutes 25] [--write]

Every run goes through scripts/train.py with a recipe that sets nothing but the model, the rows and `training.small_data`. It is
then measured on rows of its own, which neither training nor the choice of the best checkpoint has seen. Finished runs are kept
in --out, so a study that was cut short goes on where it stopped. `--write` writes docs/results/small_data.md and its picture.

WikiSQL and GSM8K are not shipped: name files with rows {"text": "…Q: …\\nA: …"} and {"question": …, "answer": "… #### 42"}.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.rows import describe_machine  # noqa: E402
from benchmarks.small_sets import TEST_ROWS, SmallSet, draw, list_sets, read_lines  # noqa: E402
from config.recipe_io import load_recipe  # noqa: E402
from scripts.train import main as train  # noqa: E402
from utils.backends import load_backend  # noqa: E402
from utils.evaluation import load_trained_model, measure  # noqa: E402
from utils.logging import set_up_logging  # noqa: E402
from utils.metrics import score_answers  # noqa: E402
from utils.model_source import find_model  # noqa: E402
from utils.preflight import check_recipe  # noqa: E402
from utils.run_folder import RunFolder  # noqa: E402
from utils.threads import count_cores  # noqa: E402

RESULT = ROOT / "docs" / "results" / "small_data.md"
PICTURE = RESULT.with_suffix(".png")
ARMS = {"plain": "off", "adaptive": "auto", "gentle": "gentle"}
RESAMPLES = 5000
Floats = npt.NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is not done yet, prints the table, and writes it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikisql", type=Path, metavar="FILE")
    parser.add_argument("--gsm8k", type=Path, metavar="FILE")
    parser.add_argument("--rows", type=int, default=40, help="rows of a training set (default: 40)")
    parser.add_argument("--seeds", type=int, default=3, help="training sets of each task (default: 3)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after this long")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "small_data", metavar="DIR")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    set_up_logging("WARNING")
    sets = list_sets(options.wikisql, options.gsm8k, options.rows)
    options.out.mkdir(parents=True, exist_ok=True)
    run_missing(sets, options)
    results = [result for result in read_results(options.out) if result["rows"] == options.rows]
    sets = [each for each in sets if find_seeds(results, each.name)]
    lines = render(sets, results, options)
    print("\n".join(lines))
    if options.write:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        plot(sets, results)
        print(f"\nWrote {RESULT} and {PICTURE.name}")
    return 0


def run_missing(sets: Sequence[SmallSet], options: argparse.Namespace) -> None:
    """Trains and measures every pair of set and arm for one seed after the other."""
    started = time.monotonic()
    done = {(r["set"], r["arm"], r["seed"], r["rows"]) for r in read_results(options.out)}
    work = [(each, "untouched", 0) for each in sets]
    work += [(each, arm, seed) for seed in range(options.seeds) for each in sets for arm in ARMS]
    for each, arm, seed in work:
        if (each.name, arm, seed, options.rows) in done or time.monotonic() - started > 60 * options.minutes:
            continue
        result = run_arm(each, arm, seed, options)
        with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        loss, score = sum(result["nats"]) / sum(result["tokens"]), np.mean(result["scores"])
        print(
            f"{each.name}, {arm}, seed {seed}: loss {loss:.3f}, score {score:.3f}, {result['seconds']:.0f} s",
            flush=True,
        )


def run_arm(each: SmallSet, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training run and its measurement on the test rows."""
    started, folder = time.monotonic(), options.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    chosen = draw(each.pool, options.rows, seed)
    for name, rows in (("train", chosen), ("test", each.test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result: dict[str, Any] = {"set": each.name, "arm": arm, "seed": seed, "rows": options.rows}
    run = None
    if arm != "untouched":
        run = RunFolder(folder / "result")
        train(["--recipe", str(write_recipe(folder, each, seed, ARMS[arm])), "--run", str(run.path)])
        facts, recipe = run.read_facts(), run.load_recipe().recipe
        result |= {"steps": facts["steps"], "best_step": facts["best_step"]}
        result |= {key: recipe.training.model_dump()[key] for key in ("epochs", "batch_size", "learning_rate")}
    result |= measure_on_test_rows(folder, each, run)
    return {**result, "seconds": time.monotonic() - started}


def write_recipe(folder: Path, each: SmallSet, seed: int, small_data: str, *, is_test: bool = False) -> Path:
    """A recipe that leaves every value of section training to the defaults and the rules."""
    recipe: dict[str, Any] = {
        "seed": seed,
        "model": {"name": "embedded/smollm2-135m-instruct"},
        "data": {"train": str(folder / "train.jsonl"), "strategy": "standard", "template": "raw"},
        "lora": {},
        "training": {"method": "sft", "small_data": small_data},
    }
    if is_test:
        recipe["data"]["eval"] = str(folder / "test.jsonl")
        recipe |= {
            "generation": {"max_new_tokens": each.longest_answer},
            "evaluation": {"metrics": ["loss", each.metric]},
        }
    path = folder / ("test.yaml" if is_test else "recipe.yaml")
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def measure_on_test_rows(folder: Path, each: SmallSet, run: RunFolder | None) -> dict[str, Any]:
    """Nats, learned tokens and 0/1 of every test row, of the untouched model or of a run."""
    loaded = load_recipe(write_recipe(folder, each, 0, "off", is_test=True))
    preflight = check_recipe(loaded)
    backend = load_backend("torch")
    source = find_model(loaded.recipe.model, "benchmark", with_weights=True)
    model = backend.load_model(source, loaded.recipe)
    if run:
        model = load_trained_model(backend, model, loaded.recipe, run)
    examples = preflight.read_evaluation_examples()
    found = measure(backend, model, preflight, examples, None)
    return {
        "nats": [nats for nats, _ in found.losses],
        "tokens": [tokens for _, tokens in found.losses],
        "scores": score_answers(loaded.recipe.evaluation.metrics[1], examples, found.answers),
        "answers": found.answers[:3],
    }


def read_results(out: Path) -> list[dict[str, Any]]:
    """What is done."""
    path = out / "results.jsonl"
    return read_lines(path) if path.exists() else []


@dataclass(frozen=True)
class Measured:
    """One arm on one set, over seeds: arrays of shape (seeds, test rows)."""

    nats: Floats
    tokens: Floats
    scores: Floats
    first: dict[str, Any]


def find_seeds(results: Sequence[dict[str, Any]], name: str) -> set[int]:
    """Seeds for which every arm is done; none before the untouched model is measured."""
    done = {(result["arm"], result["seed"]) for result in results if result["set"] == name}
    seeds = {seed for _, seed in done if all((arm, seed) in done for arm in ARMS)}
    return seeds if ("untouched", 0) in done else set()


def collect(results: Sequence[dict[str, Any]], name: str, arm: str) -> Measured:
    """Joins the seeds of an arm."""
    seeds = {0} if arm == "untouched" else find_seeds(results, name)
    own = [r for r in results if (r["set"], r["arm"]) == (name, arm) and r["seed"] in seeds]
    own.sort(key=lambda result: int(result["seed"]))
    nats, tokens, scores = (np.array([r[key] for r in own], dtype=np.float64) for key in ("nats", "tokens", "scores"))
    return Measured(nats, tokens, scores, own[0])


def resample(measured: Measured) -> tuple[Floats, Floats]:
    """Loss and score of bootstrap samples over seeds and test rows; the same draws for every arm, so they can be subtracted."""
    generator = np.random.default_rng(0)
    seeds, rows = measured.nats.shape
    losses, scores = np.empty(RESAMPLES), np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        some = np.ix_(generator.integers(0, seeds, seeds), generator.integers(0, rows, rows))
        losses[index] = measured.nats[some].sum() / measured.tokens[some].sum()
        scores[index] = measured.scores[some].mean()
    return losses, scores


def show_interval(value: float, samples: Floats, form: str) -> str:
    """`0.52 (0.48 to 0.57)`."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def render_set(each: SmallSet, results: Sequence[dict[str, Any]]) -> list[str]:
    """The table of one set."""
    lines = [
        f"## {each.name}: {each.metric.replace('_', ' ')}, {len(find_seeds(results, each.name))} seeds",
        "",
        "| values | epochs | batch | rate | steps | held-out loss | loss minus plain | score, % | score minus plain, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = collect(results, each.name, "plain")
    plain_samples, plain_loss = resample(plain), plain.nats.sum() / plain.tokens.sum()
    for arm in ("untouched", *ARMS):
        found = collect(results, each.name, arm)
        loss, score = found.nats.sum() / found.tokens.sum(), found.scores.mean()
        losses, scores = resample(found)
        keys = ("epochs", "batch_size", "learning_rate", "steps")
        cells = [arm, *(f"{found.first[key]:g}" if key in found.first else "" for key in keys)]
        cells.append(show_interval(loss, losses, ".3f"))
        is_compared = arm in ("adaptive", "gentle")
        cells.append(show_interval(loss - plain_loss, losses - plain_samples[0], "+.3f") if is_compared else "")
        cells.append(show_interval(100 * score, 100 * scores, ".1f"))
        difference = 100 * (score - plain.scores.mean())
        cells.append(show_interval(difference, 100 * (scores - plain_samples[1]), "+.1f") if is_compared else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def render(sets: Sequence[SmallSet], results: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """The page."""
    command = (
        f"python benchmarks/small_data.py --wikisql FILE --gsm8k FILE --rows {options.rows} --seeds {options.seeds}"
    )
    lines = [
        "# Small data: adaptive, plain and gentle values",
        "",
        f"Written by `{command} --write` on {time.strftime('%Y-%m-%d')}: {describe_machine('torch', 'transformers', 'peft')}, "
        f"{count_cores()} cores, float32.",
        "",
        f"SmolLM2-135M-Instruct with LoRA learns each task from {options.rows} rows, drawn anew for each seed",
        "from the shortest rows of the file. The recipe sets nothing but model, rows and `training.small_data`: `off` (plain),",
        "`auto` (adaptive) or `gentle`. Every run holds out rows of its own and keeps its best checkpoint; the numbers below",
        f"are from {TEST_ROWS} other rows. In brackets: 95 % bootstrap intervals over seeds and rows; differences are paired.",
        "",
    ]
    for each in sets:
        lines += render_set(each, results)
    return [*lines, f"![Held-out loss and score of each set]({PICTURE.name})"]


def plot(sets: Sequence[SmallSet], results: Sequence[dict[str, Any]]) -> None:
    """Bars of loss and score with intervals, one group for each set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for number, arm in enumerate(("untouched", *ARMS)):
        for position, each in enumerate(sets):
            found = collect(results, each.name, arm)
            values = (found.nats.sum() / found.tokens.sum(), 100 * found.scores.mean())
            samples = resample(found)
            for axis, value, sample in zip(axes, values, (samples[0], 100 * samples[1]), strict=True):
                low, high = np.percentile(sample, [2.5, 97.5])
                axis.bar(
                    position + 0.2 * number,
                    value,
                    width=0.18,
                    color=f"C{number}",
                    yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    capsize=2,
                    label=arm if position == 0 else None,
                )
    for axis, title in zip(axes, ("held-out loss (nats per token)", "score (%)"), strict=True):
        axis.set(
            title=title, xticks=[position + 0.3 for position in range(len(sets))], xticklabels=[s.name for s in sets]
        )
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

"""What a run shows people at its end: a report in Markdown and JSON, and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config.structured_config import MetricName
from utils.atomic_files import write_text_atomically
from utils.evaluation import Evaluation, TextSample
from utils.examples import Example
from utils.logging import hide_in_values, hide_secrets
from utils.metrics import BINARY, TITLES, format_change, format_value, give_verdict
from utils.run_folder import RunFolder

BEFORE, AFTER = "#9aa5b1", "#1f77b4"


def write_report(
    folder: RunFolder, evaluation: Evaluation, examples: Sequence[Example], samples: int, recipe_name: str
) -> str:
    """Writes report.md, report.json and before_after.png, and returns the verdict.

    Args:
        samples: answers to show side by side.
    """
    first = choose_headline(evaluation)
    verdict = give_verdict(first, evaluation.comparisons[first])
    shown = choose_samples(evaluation, samples)
    document = {
        "verdict": verdict,
        "metrics": {name: comparison.to_json() for name, comparison in evaluation.comparisons.items()},
        "samples": [describe_sample(evaluation, examples, index) for index in shown],
        "text": asdict(evaluation.text) if evaluation.text else None,
    }
    text = json.dumps(hide_in_values(document), indent=2, ensure_ascii=False)
    write_text_atomically(folder.report_json, text + "\n")
    plot_comparison(evaluation, folder.path / "before_after.png")
    lines = [f"# Report: {recipe_name}", "", f"**{verdict}**", "", *format_table(evaluation), ""]
    lines += ["![before and after](before_after.png)", "", *format_levels(evaluation, examples)]
    if folder.metrics_file.exists():
        lines += ["## Training", "", "![loss](loss.png)", ""]
    if shown:
        lines += ["## Answers side by side", ""]
        lines += [line for index in shown for line in format_sample(evaluation, examples, index)]
    if evaluation.text:
        lines += format_text(evaluation.text)
    lines += ["Intervals are 95 %: Wilson for shares, a paired bootstrap over the held-out rows for differences."]
    write_text_atomically(folder.report_file, hide_secrets("\n".join(lines)) + "\n")
    return verdict


def choose_headline(evaluation: Evaluation) -> MetricName:
    """The metric of the verdict: one on answers where there is one, for that is what users see."""
    names = list(evaluation.comparisons)
    return next((name for name in names if name in BINARY), names[0])


def choose_samples(evaluation: Evaluation, count: int) -> list[int]:
    """Rows to show: spread over the set, failures of the trained model included where there are any."""
    rows = len(evaluation.tuned_answers)
    if not rows or not count:
        return []
    spread = [round(index * (rows - 1) / max(1, count - 1)) for index in range(count)]
    failures = [index for index, score in enumerate(evaluation.tuned_scores) if score == 0]
    if failures and not set(failures) & set(spread):
        spread[-1] = failures[0]
    return list(dict.fromkeys(spread))


def describe_sample(evaluation: Evaluation, examples: Sequence[Example], index: int) -> dict[str, Any]:
    """One row with both answers."""
    return {
        "where": examples[index].where,
        "prompt": examples[index].prompt[-1]["content"],
        "reference": examples[index].answer,
        "base": evaluation.base_answers[index],
        "tuned": evaluation.tuned_answers[index],
        "base_score": evaluation.base_scores[index],
        "tuned_score": evaluation.tuned_scores[index],
    }


def format_table(evaluation: Evaluation) -> list[str]:
    """The before/after table in Markdown."""
    lines = ["| metric | before | after | difference | 95 % interval |", "|---|---|---|---|---|"]
    for name, row in evaluation.comparisons.items():
        values = f"{format_value(name, row.base)} | {format_value(name, row.tuned)}"
        change = (
            f"{format_change(name, row.difference)} | {format_change(name, row.low)} to {format_change(name, row.high)}"
        )
        lines.append(f"| {TITLES[name]} | {values} | {change} |")
    return lines


def format_levels(evaluation: Evaluation, examples: Sequence[Example]) -> list[str]:
    """Scores by the rows' `level`, where they have one."""
    levels: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        if isinstance(level := example.fields.get("level"), int | str):
            levels.setdefault(level, []).append(index)
    if len(levels) < 2 or not evaluation.tuned_scores:
        return []
    lines = ["| level | rows | before | after |", "|---|---|---|---|"]
    for level, rows in sorted(levels.items(), key=lambda item: (str(type(item[0])), item[0])):
        shares = [
            sum(scores[row] for row in rows) / len(rows) for scores in (evaluation.base_scores, evaluation.tuned_scores)
        ]
        lines.append(f"| {level} | {len(rows)} | {100 * shares[0]:.0f} % | {100 * shares[1]:.0f} % |")
    return [*lines, ""]


def format_sample(evaluation: Evaluation, examples: Sequence[Example], index: int) -> list[str]:
    """One row with both answers in Markdown; indented blocks, so that no answer can break out of its box."""
    sample = describe_sample(evaluation, examples, index)
    marks = {0.0: "wrong", 1.0: "right"}
    lines = [
        f"**{sample['where']}**",
        "",
        *indent(sample["prompt"]),
        "",
        "reference:",
        "",
        *indent(sample["reference"]),
        "",
    ]
    for who in ("base", "tuned"):
        title = {"base": "before", "tuned": "after"}[who]
        lines += [f"{title} ({marks[sample[f'{who}_score']]}):", "", *indent(sample[who] or "(nothing)"), ""]
    return lines


def format_text(text: TextSample) -> list[str]:
    """How the held-out text goes on before and after training."""
    parts = {"beginning of the held-out text": text.prompt, "before": text.base, "after": text.tuned}
    found = [line for title, part in parts.items() for line in (f"{title}:", "", *indent(part or "(nothing)"), "")]
    return ["## Text before and after", "", *found]


def indent(text: str) -> list[str]:
    """Lines of a Markdown code block, at most 12 of them."""
    lines = text.splitlines()
    return [f"    {line}" for line in (lines if len(lines) <= 12 else [*lines[:12], "…"])]


def print_summary(evaluation: Evaluation, verdict: str) -> None:
    """The short before/after table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Before and after", title_justify="left")
    for column in ("metric", "before", "after", "difference", "95 % interval"):
        table.add_column(column, no_wrap=column != "metric")
    for name, row in evaluation.comparisons.items():
        interval = f"{format_change(name, row.low)} to {format_change(name, row.high)}"
        values = (format_value(name, row.base), format_value(name, row.tuned), format_change(name, row.difference))
        table.add_row(TITLES[name], *values, interval)
    console = Console()
    console.print(table)
    console.print(verdict, highlight=False)


def open_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_loss(folder: RunFolder) -> Path:
    """Draws training and held-out loss over the steps into loss.png."""
    rows = folder.read_metrics()
    steps = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure, axes = open_figure(7, 4)
    axes.plot(*zip(*steps, strict=True), color=BEFORE, linewidth=0.8, label="training loss, each step")
    axes.plot(
        [step for step, _ in steps], smooth([loss for _, loss in steps]), color=AFTER, label="training loss, smoothed"
    )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#d62728", marker="o", label="held-out loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token; of pairs, the method's)", ylim=(0, None))
    axes.legend(frameon=False)
    target = folder.path / "loss.png"
    figure.savefig(target, dpi=120)
    return target


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average with the start-up bias removed (Adam, arXiv 1412.6980, section 3)."""
    average, result = 0.0, []
    for index, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**index))
    return result


def plot_comparison(evaluation: Evaluation, target: Path) -> None:
    """Draws the headline metric before and after, with intervals."""
    name = choose_headline(evaluation)
    row = evaluation.comparisons[name]
    scale = 100 if name in BINARY else 1
    values = [row.base * scale, row.tuned * scale]
    lows, highs = [row.base_low * scale, row.tuned_low * scale], [row.base_high * scale, row.tuned_high * scale]
    # Rounding can put an interval's end a hair inside its value, and matplotlib refuses negative error bars.
    below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
    above = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
    figure, axes = open_figure(4.5, 4)
    bars = axes.bar(["before", "after"], values, yerr=[below, above], capsize=6, color=[BEFORE, AFTER])
    for bar, value, high in zip(bars, (row.base, row.tuned), highs, strict=True):
        axes.annotate(
            format_value(name, value),
            (bar.get_x() + bar.get_width() / 2, high),
            ha="center",
            va="bottom",
            xytext=(0, 3),
            textcoords="offset points",
        )
    axes.set(title=TITLES[name], ylim=(0, 108) if name in BINARY else (0, None))
    axes.set_ylabel("%" if name in BINARY else "")
    figure.savefig(target, dpi=120)

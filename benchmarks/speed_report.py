"""The speed benchmark as a page: a table and a bar for each side of each work, how it was measured, and what was tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import describe_machine
from benchmarks.speed_bound import KEPT_UP_SECONDS
from benchmarks.speed_results import FIRST_LOSS, MEAN_LOSS, Summary, WorkResult, summarise
from benchmarks.speed_sides import NOT_MEANT, OUR_SIDES, OURS, SIDES
from benchmarks.speed_work import WORKS
from utils.machine import measure_memory
from utils.threads import count_cores

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "speed.md"
PICTURE = RESULT.with_suffix(".png")
TRIED = ROOT / "benchmarks" / "speed_tried.md"
COLORS = {name: f"C{number}" for number, name in enumerate(SIDES)}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
HEAD = (
    "side",
    "real tokens/s",
    "Tunebook is",
    "of the bound",
    "of products kept up",
    "first step, s",
    "peak memory, GB",
    "mean loss (reference)",
    "gradient norm",
    "steps",
    "computes in",
    "others' load",
)


def format_work(result: WorkResult) -> list[str]:
    """The section of one work."""
    work = WORKS[result.work]
    summaries = [summarise(result, side) for side in result.list_sides()]
    ours = next((each for each in summaries if each.side == OURS and not each.faults), None)
    tokens, learned = sum(result.tokens) / len(result.tokens), sum(result.supervised) / len(result.supervised)
    lines = [
        f"## {work.name}: {work.title}",
        "",
        f"{result.date}, {result.source}, {say_sessions(result.sessions)}. {work.batch_size} "
        f"{'pairs' if work.method == 'dpo' else 'rows'} a step with {tokens:,.0f} real tokens on average, {learned:,.0f} of "
        f"them learned; {result.trainable:,} trainable parameters; learning rate {work.learning_rate:g}.",
        f"Bound: {sum(result.needed) / sum(result.tokens) / 1e9:.2f} GFLOP for each token at {result.peak_flops / 1e9:,.0f} "
        f"GFLOP/s, {show_bound(result):,.0f} tokens/s.{say_kept_up(result)}",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(format_row(result, each, ours) for each in summaries),
        "",
    ]
    lines += [f"- {SIDES[name].title}: {reason}." for name, reason in result.obstacles.items() if is_told(name, reason)]
    return [*lines, ""] if result.obstacles else lines


def say_sessions(count: int) -> str:
    """In how many sittings the runs were made."""
    return "one session" if count == 1 else f"{count} sessions"


def is_told(name: str, reason: str) -> bool:
    """Sides for which a work was never meant are left out."""
    return reason != NOT_MEANT and name in SIDES


def show_bound(result: WorkResult) -> float:
    """Tokens/s of a machine that does nothing but the needed products at the measured peak."""
    return sum(result.tokens) / sum(result.needed) * result.peak_flops


def say_kept_up(result: WorkResult) -> str:
    """What the products reach when they are kept up, as a sentence; nothing where that was not measured."""
    if not result.kept_up_flops:
        return ""
    speed, slowest, fastest = (choose(result.kept_up_flops) / 1e9 for choose in (statistics.median, min, max))
    return f" Kept up for {KEPT_UP_SECONDS} s, products reach {speed:,.0f} GFLOP/s ({slowest:,.0f} to {fastest:,.0f})."


def format_row(result: WorkResult, each: Summary, ours: Summary | None) -> str:
    """One line of a table."""
    title = SIDES[each.side].title
    if each.faults:
        return f"| {title} | **INVALID**: {'; '.join(each.faults)} |{' |' * (len(HEAD) - 2)}"
    spread = f" ({min(each.speeds):,.0f} to {max(each.speeds):,.0f})" if len(each.speeds) > 1 else ""
    ratio = "" if ours is None or each.side == OURS else f"{ours.speed / each.speed:.2f}×"
    cells = [
        title,
        f"{each.speed:,.0f}{spread}",
        ratio,
        f"{100 * each.bound:.0f} %",
        "" if math.isnan(each.kept_up) else f"{100 * each.kept_up:.0f} %",
        format_first(each),
        f"{each.peak_bytes / 1e9:.2f}",
        f"{each.loss:.4f} ({each.reference_loss:.4f})",
        f"{each.norm:.3f}",
        f"{each.steps} of {len(result.tokens)}",
        each.dtype,
        "" if math.isnan(each.foreign) else f"{100 * each.foreign:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def format_first(each: Summary) -> str:
    """Time to the first step; of Tunebook with an empty cache of tokens and with a filled one."""
    if each.side not in OUR_SIDES:
        return f"{each.first[True]:.1f}"
    names = {True: "cold", False: "warm"}
    return ", ".join(f"{names[cold]} {seconds:.1f}" for cold, seconds in each.first.items())


def describe_cores() -> str:
    """Cores, instructions that matter for matrices, and memory."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8").split() if path.exists() else []
    found = [name for name in INSTRUCTIONS if name in flags]
    return f"{count_cores()} cores ({', '.join(found) or 'instructions not known'}), {measure_memory()[0] / 1e9:.0f} GB"


def format_versions(results: Sequence[WorkResult]) -> list[str]:
    """The versions that each side ran with."""
    lines = []
    for name, side in SIDES.items():
        runs = [run for result in results for run in result.list_runs(name) if run.versions]
        if runs:
            versions = ", ".join(f"{package} {version}" for package, version in runs[-1].versions.items())
            lines.append(f"- {side.title}: {side.says}. {versions}.")
    return lines


def format_page(results: Sequence[WorkResult]) -> str:
    """The whole page."""
    lines = [
        "# Speed, side by side",
        "",
        f"Written by `python benchmarks/speed.py --write` (`make bench`). Machine: {describe_machine()}, {describe_cores()}.",
        "The model is SmolLM2-135M-Instruct, LoRA of rank 16 on all linear modules unless all weights are trained.",
        "",
        f"![Real tokens per second of each side, with the machine's bound]({PICTURE.name})",
        "",
        *(line for result in results for line in format_work(result)),
        "## How it was measured",
        "",
        *MEASURED,
        "",
        "## The sides",
        "",
        *format_versions(results),
        "",
        TRIED.read_text(encoding="utf-8").strip(),
    ]
    return "\n".join(lines) + "\n"


MEASURED = (
    "Every side loads the same model folder and trains on the same token ids and labels, in the same order: the rows of an",
    "optimizer step are the same everywhere, only their split into micro-batches is each side's own. The learning rate is",
    "constant, without warmup or weight decay; gradients are clipped at 1. The sides alternate within a round, each run in a",
    "new process; the table shows the median of the rounds, and in brackets the slowest and the fastest.",
    "",
    "- *Real tokens/s*: tokens of all steps but the first, padding not counted, divided by the time from the end of the first",
    "  step to the end of the last. A pair's prompt counts with both of its answers, whoever computes it once.",
    "- *First step*: from the start of the process to the end of the first step, with all files in the system's cache.",
    "  Tunebook reads text and checks every row; *cold* has to encode it, *warm* finds it encoded. Peers are given token ids",
    "  and encode nothing, or texts where they take nothing else (pairs).",
    "- *Peak memory*: resident, of the whole process from start to end; on a GPU, the most that torch's tensors took there.",
    "- *INVALID*: the tokens that a side saw or learned, or its trainable parameters, are not those of the work; a gradient",
    f"  norm is zero; its first loss is more than {100 * FIRST_LOSS:.0f} %, or its losses are on average more than "
    f"{100 * MEAN_LOSS:.0f} %, from the reference (TRL tuned; else Tunebook). In 16 bits beside a reference in 32,",
    "  only the first loss has to agree: what the steps then lose stands beside what the reference's lose.",
    "- *Mean loss*: over the side's own steps; in brackets that of the reference over the same steps. Adapters start from each",
    "  side's own random numbers.",
    "- *Others' load*: the most of the machine's processor time that anything else took during a run of the side. Above a few",
    "  percent, the numbers of that line are too low.",
    "- *Public rows*: the training splits of GSM8K and WikiSQL, and pairs of GSM8K's model solutions; CONTRIBUTING.md names",
    "  the files. Without them the command uses the shipped text-to-SQL rows.",
    "- *Bound*: matrix products that the work cannot do without, at the speed of the fastest one measured on all cores in the",
    "  format that Tunebook trained in (`benchmarks/speed_bound.py` says what is counted). Nothing goes on for long at the",
    f"  speed of a single product: *products kept up* are the same ones, one after the other for {KEPT_UP_SECONDS} s before",
    "  each round, and the column compares with their median.",
)


def open_grid(columns: int) -> tuple[Any, Any]:
    """Two rows of axes in the look of the report's plots; needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * columns + 1.5, 6), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot(results: Sequence[WorkResult]) -> None:
    """Bars of tokens/s for each work, relative to the bound's line, and below them the losses over tokens."""
    figure, axes = open_grid(len(results))
    for column, result in enumerate(results):
        top, bottom = axes[0][column], axes[1][column]
        summaries = (summarise(result, side) for side in result.list_sides())
        for position, each in enumerate(each for each in summaries if not each.faults):
            title = SIDES[each.side].title
            top.bar(position, each.speed, color=COLORS[each.side], label=title)
            losses = result.list_runs(each.side)[0].losses
            seen = [sum(result.tokens[: step + 1]) for step in range(len(losses))]
            bottom.plot(seen, losses, color=COLORS[each.side], label=title)
        top.axhline(show_bound(result), color="#7f7f7f", linestyle="--", linewidth=1, label="bound")
        top.set(title=result.work, xticks=[], ylabel="real tokens/s" if column == 0 else "")
        bottom.set(xlabel="real tokens", ylabel="training loss" if column == 0 else "")
    handles: dict[str, Any] = {}
    for each in axes.flat:
        handles |= dict(zip(*reversed(each.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(PICTURE, dpi=110)

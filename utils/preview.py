"""Shows people what the model is about to see: examples with what is learned marked, and the numbers of the whole set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from utils.exceptions import Problem, RunError
from utils.logging import hide_secrets, show_controls
from utils.methods.pairs import has_answers, split_pair
from utils.piece_encoder import EncodedExample
from utils.preflight import Preflight
from utils.tokenizer_utils import TokenizerUtils

GREEN, DIM, RESET = "\x1b[32;1m", "\x1b[2m", "\x1b[0m"
BARS = 10
BAR_WIDTH = 40


def print_first_example(preflight: Preflight) -> None:
    """Prints the first training example with its learned part highlighted: the quickest proof of the right signal."""
    print_example(preflight.data.train[0], preflight.tokenizer, "First example, ")


def print_example(example: EncodedExample, tokenizer: TokenizerUtils, title: str = "") -> None:
    """Prints one example with its learned part highlighted."""
    total = len(example.input_ids)
    answers = has_answers(example) if example.branch_starts else ()
    kind = "a pair of " if answers and all(answers) else ""
    print(f"{title}{example.where}: {kind}{total} tokens, {example.supervised_tokens} learned (marked):")
    if not answers:
        print(highlight(example, tokenizer, color=sys.stdout.isatty()))
        return
    names = ("chosen", "rejected") if all(answers) else ("desirable", "undesirable")
    for name, side, is_there in zip(names, split_pair(example), answers, strict=True):
        if is_there:
            print(f"{name}: {highlight(side, tokenizer, color=sys.stdout.isatty())}")


def highlight(example: EncodedExample, tokenizer: TokenizerUtils, *, color: bool) -> str:
    """Text of an example; what is learned is green on a terminal and between ⟦ ⟧ elsewhere."""
    start, end = (GREEN, RESET) if color else ("⟦", "⟧")
    before, after = (DIM, RESET) if color else ("", "")
    parts = []
    for learned, group in groupby(
        zip(example.input_ids, example.loss_mask, strict=True), key=lambda pair: bool(pair[1])
    ):
        text = show_controls(hide_secrets(tokenizer.tokenizer.decode([int(token) for token, _ in group])))
        parts.append(f"{start}{text}{end}" if learned else f"{before}{text}{after}")
    return "".join(parts)


def print_warnings(problems: Sequence[Problem]) -> None:
    """Prints what is allowed but rarely meant."""
    for problem in problems:
        print(show_controls(hide_secrets(f"warning: {problem}")), file=sys.stderr)


def describe_example(example: EncodedExample, tokenizer: TokenizerUtils) -> dict[str, Any]:
    """An example for programs: its place, text, token ids and 0/1 for each token that is learned."""
    ids = example.input_ids.tolist()
    branches: dict[str, Any] = {"branch_starts": list(example.branch_starts)} if example.branch_starts else {}
    if branches and not all(answers := has_answers(example)):
        branches["label"] = answers[0]
    return {
        "where": example.where,
        "text": tokenizer.tokenizer.decode(ids),
        "input_ids": ids,
        "loss_mask": example.loss_mask.astype(int).tolist(),
        **branches,
    }


def collect_statistics(preflight: Preflight) -> dict[str, Any]:
    """The training set in numbers; lengths are in tokens, of a pair those of its longer conversation."""
    data, scan = preflight.data, preflight.scan
    lengths, supervised = data.train.path_lengths, data.train.supervised
    tokens = int(data.train.lengths.sum())
    span = int(lengths.min()), int(lengths.max()) + 1
    counts, edges = np.histogram(lengths, bins=min(BARS, span[1] - span[0]), range=span)
    bounds = np.ceil(edges).astype(int).tolist()
    return {
        "rows": scan.train_rows - len(scan.held_out),
        "held_out_rows": scan.evaluation_rows,
        "formats": scan.formats,
        "duplicate_rows": scan.duplicates,
        "examples": len(data.train),
        "left_out": data.counts["train"].dropped,
        "cut": data.counts["train"].cut,
        "tokens": tokens,
        "length": {
            "shortest": int(lengths.min()),
            "median": int(np.median(lengths)),
            "mean": round(float(lengths.mean()), 1),
            "p95": int(np.quantile(lengths, 0.95)),
            "longest": int(lengths.max()),
        },
        **describe_answers(data.train.answers),
        "supervised_tokens": int(supervised.sum()),
        "supervised_share": round(float(supervised.sum() / tokens), 4),
        "histogram": [
            {"from": start, "below": end, "examples": count}
            for start, end, count in zip(bounds, bounds[1:], counts.tolist(), strict=False)
        ],
    }


def describe_answers(answers: tuple[int, int]) -> dict[str, int]:
    """Good and bad answers of rows with preferences or labels; nothing of others."""
    return dict(zip(("desirable_answers", "undesirable_answers"), answers, strict=True)) if any(answers) else {}


def print_statistics(statistics: dict[str, Any]) -> None:
    """The statistics as a table, with the lengths as bars."""
    for name, value in statistics.items():
        if name == "histogram":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        elif name == "supervised_share":
            value = f"{100 * value:.1f} %"
        elif isinstance(value, int):
            value = f"{value:,}"
        print(f"{name.replace('_', ' '):<18} {value}")
    most = max(bar["examples"] for bar in statistics["histogram"])
    print("\ntokens         examples")
    for bar in statistics["histogram"]:
        width = round(BAR_WIDTH * bar["examples"] / most)
        print(
            f"{bar['from']:>5} – {bar['below'] - 1:<5}  {bar['examples']:>8,} {'█' * width or ('▏' if bar['examples'] else '')}"
        )


def plot_statistics(preflight: Preflight, max_length: int, target: Path) -> None:
    """Draws how long the examples are and which share of each is learned.

    Raises:
        RunError: the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths, supervised = preflight.data.train.lengths, preflight.data.train.supervised
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    left.hist(preflight.data.train.path_lengths, bins=40, color="tab:blue")
    left.axvline(max_length, color="tab:red", linestyle="--", label=f"data.max_length {max_length}")
    left.set(title=f"{len(lengths):,} training examples", xlabel="tokens", ylabel="examples")
    left.legend()
    right.hist(100 * supervised / lengths, bins=40, range=(0, 100), color="tab:green")
    right.set(title="Learned share of each example", xlabel="% of its tokens", ylabel="examples")
    figure.tight_layout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=120)
    except OSError as error:
        fix = "name another file with --picture"
        raise RunError(f"the picture cannot be written: {error.strerror}", where=str(target), fix=fix) from error
    finally:
        pyplot.close(figure)

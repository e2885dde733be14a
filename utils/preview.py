"""Shows people what the model is about to see."""

from __future__ import annotations

import sys
from itertools import groupby

from utils.preflight import Preflight
from utils.tokenizer_utils import EncodedExample, TokenizerUtils

GREEN, DIM, RESET = "\x1b[32;1m", "\x1b[2m", "\x1b[0m"


def print_first_example(preflight: Preflight) -> None:
    """Prints the first training example with its learned part highlighted: the quickest proof of the right signal."""
    example = preflight.data.train[0]
    total = len(example.input_ids)
    print(f"First example, {example.where}: {total} tokens, {example.supervised_tokens} learned (marked):")
    print(highlight(example, preflight.tokenizer, color=sys.stdout.isatty()))


def highlight(example: EncodedExample, tokenizer: TokenizerUtils, *, color: bool) -> str:
    """Text of an example; what is learned is green on a terminal and between ⟦ ⟧ elsewhere."""
    start, end = (GREEN, RESET) if color else ("⟦", "⟧")
    before, after = (DIM, RESET) if color else ("", "")
    parts = []
    for learned, group in groupby(
        zip(example.input_ids, example.loss_mask, strict=True), key=lambda pair: bool(pair[1])
    ):
        text = tokenizer.tokenizer.decode([int(token) for token, _ in group])
        parts.append(f"{start}{text}{end}" if learned else f"{before}{text}{after}")
    return "".join(parts)


def print_warnings(preflight: Preflight) -> None:
    """Prints what is allowed but rarely meant."""
    for problem in preflight.warnings:
        print(f"warning: {problem}", file=sys.stderr)

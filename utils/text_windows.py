"""A stream of tokens → training windows and held-out windows that share no token.

A text is split before it is cut: the held-out tokens are one block at its end, and no window crosses the border. Cutting
first and holding out windows would put the overlap of neighbouring windows on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from utils.piece_encoder import EncodedExample

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Window:
    """One training example of a stream.

    Attributes:
        start: index of its first token in the stream.
        end: index behind its last token.
        learned_from: index in the stream of the first token that the window before did not learn.
    """

    start: int
    end: int
    learned_from: int


def split_tokens(tokens: Tokens, eval_fraction: float) -> tuple[Tokens, Tokens]:
    """Splits a stream into two contiguous blocks.

    Args:
        tokens: ids, shape (tokens,).
        eval_fraction: share of the second block; 0 leaves it empty.

    Returns:
        Training and held-out tokens; joined they are the stream.
    """
    held_out = round(len(tokens) * eval_fraction)
    border = len(tokens) - held_out
    return tokens[:border], tokens[border:]


def cut_windows(count: int, context: int, stride: int) -> Iterator[Window]:
    """Yields windows over a stream so that every token but the first is learned exactly once.

    Each window sees `context` tokens and learns those that the window before lacks, so with a stride below context - 1 a token
    is predicted from at least context - stride tokens before it (transformers' guide «Perplexity of fixed-length models»).
    The last window is moved to the left until it is full: no padding, and its tokens have more before them.

    Args:
        count: tokens of the stream.
        context: tokens of a window.
        stride: from one start to the next, below context.
    """
    learned_until = 1  # nothing stands before the first token
    start = 0
    while learned_until < count:
        end = min(start + context, count)
        yield Window(max(0, end - context), end, learned_until)
        learned_until = end
        start += stride


def make_examples(tokens: Tokens, context: int, stride: int, name: str) -> Iterator[EncodedExample]:
    """Yields the windows of a stream as examples.

    Args:
        name: what `where` calls the stream.
    """
    for window in cut_windows(len(tokens), context, stride):
        ids = tokens[window.start : window.end].astype(np.int64)
        mask = np.arange(window.start, window.end) >= window.learned_from
        yield EncodedExample(ids, mask, f"{name}, tokens {window.start} to {window.end - 1}", is_text=True)

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
        new_from: index in the stream of the first token that the window before lacks.
    """

    start: int
    end: int
    new_from: int


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
    """Yields windows over a stream; together their new tokens are every token but the first, exactly once.

    The last window is moved to the left until it is full: no padding, and its tokens have more before them.

    Args:
        count: tokens of the stream.
        context: tokens of a window.
        stride: from one start to the next, below context.
    """
    seen_until = 1  # nothing stands before the first token
    start = 0
    while seen_until < count:
        end = min(start + context, count)
        yield Window(max(0, end - context), end, seen_until)
        seen_until = end
        start += stride


def make_examples(tokens: Tokens, context: int, stride: int, *, held_out: bool) -> Iterator[EncodedExample]:
    """Yields the windows of a stream as examples.

    In training a window learns all of its tokens, the first ones with little before them too: a prompt is no longer than that.
    Held-out windows count only the tokens that the window before lacks. So none counts twice, and behind the first window each
    is predicted from at least context - stride tokens (transformers' guide «Perplexity of fixed-length models»).
    """
    name = "held-out text" if held_out else "training text"
    for window in cut_windows(len(tokens), context, stride):
        ids = tokens[window.start : window.end].astype(np.int64)
        mask = np.arange(window.start, window.end) >= (window.new_from if held_out else window.start + 1)
        yield EncodedExample(ids, mask, f"{name}, tokens {window.start} to {window.end - 1}", is_text=True)

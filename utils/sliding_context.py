"""Answers that go beyond the last position of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def slide(
    ids: list[int], most: int, positions: int, answer: Callable[[list[int], int], Iterator[int]]
) -> Iterator[int]:
    """New token ids beyond the last position: when the context is nearly full, its second half is the new prompt.

    Learned positions end there, and rotary ones were never trained beyond. A window that slides by one token would compute all
    of it anew for each token.

    Args:
        ids: the prompt.
        most: new tokens at most.
        positions: of the model.
        answer: answers a prompt that fits with so many tokens at most.
    """
    left = most
    while left > 0:
        ids = ids if len(ids) <= positions * 3 // 4 else ids[-(positions // 2) :]
        count = min(left, positions - len(ids))
        new = []
        for token in answer(ids, count):
            new.append(token)
            yield token
        if len(new) < count:
            return
        ids, left = ids + new, left - count

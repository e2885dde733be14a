"""Tokens that a recipe adds to a tokenizer: the same ids in every script, and none that it has already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.exceptions import RecipeError


def add_tokens(tokenizer: Any, tokens: Sequence[str], where: str, *, template: str = "") -> None:
    """Adds `data.added_tokens`, in their order.

    A token that the template writes becomes a control token: it may end a turn, no message may contain it, and it is left
    out of decoded answers. All others are plain words that answers may use.

    Args:
        tokenizer: of `load_tokenizer`; changed in place.
        where: `file:line` of data.added_tokens.
        template: Jinja source of the run's template.

    Raises:
        RecipeError: the tokenizer has some of them already.
    """
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        message = f"the tokenizer has {', '.join(repr(token) for token in known)} already"
        fix = "remove it from data.added_tokens: it is one token as it is"
        raise RecipeError(message, where=where, fix=fix, code="known-token")
    from tokenizers import AddedToken

    for token in tokens:
        # normalized: a lower-casing tokenizer would never find the token in a text again.
        tokenizer.add_tokens(AddedToken(token, normalized=False), special_tokens=token in template)


def find_added_ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids that `add_tokens` gives to those tokens that the tokenizer does not have; it is changed in place."""
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    add_tokens(tokenizer, missing, "data.added_tokens")
    return tuple(int(index) for index in tokenizer.convert_tokens_to_ids(missing)) if missing else ()

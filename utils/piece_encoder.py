"""Pieces of text → token ids and a mask, with a tokenizer alone: no template is known here.

A prompt and its answer are tokenised apart, so that no token straddles them: at inference the answer begins after the prompt's
last token, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

# A piece of text with whether it is learned.
Piece = tuple[str, bool]
Encoded = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class EncodedExample:
    """One example as the model sees it.

    Attributes:
        input_ids: int64 token ids, shape (length,).
        loss_mask: bool, shape (length,); True where the token is learned.
        where: `file:line` of its row.
        is_text: True for raw text, which may be cut at its end; an answer may not.
        branch_starts: of a pair, where its chosen and its rejected branch begin. The ids are the trunk (the prompt without
            its last token), then the two branches, each of which begins with a copy of the prompt's last token: what
            predicts an answer's first token stands right before it, and the prompt stands there once. Of a labelled row one
            branch has no token. None without branches.
        reference: of a pair, the untouched model's log-probability of each answer in nats; None where it is not known.
        mismatched: of a pair under KTO, its prompt with the answers of another row.
    """

    input_ids: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    where: str
    is_text: bool = False
    branch_starts: tuple[int, int] | None = None
    reference: tuple[float, float] | None = None
    mismatched: EncodedExample | None = None

    @property
    def path_length(self) -> int:
        """Tokens of the longest conversation in it: the whole of it, or trunk and longer branch of a pair."""
        if self.branch_starts is None:
            return len(self.input_ids)
        chosen, rejected = self.branch_starts
        return chosen + max(rejected - chosen, len(self.input_ids) - rejected)

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens; the first token has nothing before it, so it can never be predicted."""
        return int(self.loss_mask[1:].sum())


class PieceEncoder:
    """The tokenizer itself, without what it may do to whole texts: truncation, padding, control tokens of its own."""

    def __init__(self, backend: Any, control_tokens: Collection[str], bos_token_id: int | None) -> None:
        """Takes a `tokenizers.Tokenizer`, its control tokens and its begin-of-text token."""
        self._backend = backend
        self._control_tokens = control_tokens
        self._reset_backend()
        starts_with_bos = bos_token_id is not None and backend.encode("x").ids[:1] == [bos_token_id]
        self.bos = bos_token_id if starts_with_bos else None

    def write_json(self) -> str:
        """Everything that the tokenizer does, as tokenizer.json has it."""
        self._reset_backend()
        return str(self._backend.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, sequences: Sequence[Sequence[Piece]]) -> list[Encoded]:
        """Encodes sequences piece by piece.

        The template has written all control tokens, so none are added, but for the BOS where it forgot the one that its
        tokenizer adds.
        """
        self._reset_backend()
        texts = [text for pieces in sequences for text in self._list_texts(pieces)]
        found = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        result = []
        for pieces in sequences:
            ids: list[int] = []
            mask: list[bool] = []
            for position, (text, learned) in enumerate(pieces):
                piece = next(found).ids
                if self._adds_prefix and position:
                    piece = self._cut_anchor(piece, self._find_anchor(pieces[position - 1][0]), text)
                ids += piece
                mask += [learned] * len(piece)
            if self.bos is not None and ids[:1] != [self.bos]:
                ids, mask = [self.bos, *ids], [False, *mask]
            result.append((np.array(ids, dtype=np.int64), np.array(mask, dtype=np.bool_)))
        return result

    def _list_texts(self, pieces: Sequence[Piece]) -> Iterator[str]:
        """What the tokenizer is given: the pieces, behind an anchor where it would put a space before each."""
        for position, (text, _) in enumerate(pieces):
            yield self._find_anchor(pieces[position - 1][0]) + text if self._adds_prefix and position else text

    def _find_anchor(self, before: str) -> str:
        """What stands before a piece: the control token there, or a line break for any other text."""
        token = next((token for token in self._control_tokens if before.endswith(token)), None)
        return token or "\n"

    def _cut_anchor(self, ids: list[int], anchor: str, text: str) -> list[int]:
        """Token ids of a piece as they stand within a text."""
        start = self._backend.encode(anchor, add_special_tokens=False).ids
        if ids[: len(start)] == start:
            return ids[len(start) :]
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _reset_backend(self) -> None:
        """A tokenizer.json may ask for truncation or padding; here every token counts, and batches are padded later."""
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        self._backend.encode_special_tokens = False

    @cached_property
    def _adds_prefix(self) -> bool:
        """True for tokenizers that put a space before every text that they are given, such as Llama 2's."""
        line, both, letter = (self._backend.encode(text, add_special_tokens=False).ids for text in ("\n", "\na", "a"))
        return bool(both[: len(line)] == line and both[len(line) :] != letter)


def fit_length(encoded: EncodedExample, max_length: int, bos_token_id: int | None = None) -> EncodedExample | None:
    """Cuts a long example to `max_length` tokens without losing what is learned.

    Args:
        bos_token_id: stays in front when the example begins with it: models were hardly ever trained without.

    Returns:
        The example, with its prompt cut from the left; or None if its learned tokens alone are too long. Raw text is cut at
        its end instead. A pair loses the same tokens of its prompt for both answers.
    """
    length = encoded.path_length
    if length <= max_length:
        return encoded
    kept = int(bos_token_id is not None and int(encoded.input_ids[0]) == bos_token_id)
    if encoded.branch_starts is not None:
        return cut_trunk(encoded, length - max_length, kept)
    if encoded.is_text:
        return EncodedExample(
            encoded.input_ids[:max_length], encoded.loss_mask[:max_length], encoded.where, is_text=True
        )
    first = int(np.argmax(encoded.loss_mask[1:])) + 1
    cut = length - max_length
    if kept + cut >= first:  # the token before the first learned one must stay, for it is what predicts it
        return None
    removed = np.s_[kept : kept + cut]
    return EncodedExample(np.delete(encoded.input_ids, removed), np.delete(encoded.loss_mask, removed), encoded.where)


def cut_trunk(pair: EncodedExample, count: int, kept: int) -> EncodedExample | None:
    """A pair without `count` tokens of its prompt behind the first `kept`; None if the trunk has fewer: answers stay whole."""
    assert pair.branch_starts is not None
    chosen, rejected = pair.branch_starts
    if kept + count > chosen:
        return None
    removed = np.s_[kept : kept + count]
    ids, mask = np.delete(pair.input_ids, removed), np.delete(pair.loss_mask, removed)
    return replace(pair, input_ids=ids, loss_mask=mask, branch_starts=(chosen - count, rejected - count))

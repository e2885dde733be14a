"""Preference rows become pairs that hold each token of both conversations, the prompt once, and never lose an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.structured_config import DataSection
from utils.data_formats import read_preference
from utils.data_loading import Row
from utils.exceptions import DataError
from utils.methods.pairs import encode_pairs, join_pair, mismatch_pair, split_pair
from utils.methods.sft import EncodingCounts
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.row_checks import ProblemLog
from utils.token_cache import TokenWriter, read_tokens
from utils.tokenizer_utils import TokenizerUtils, load_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5, I believe."},
    {
        "prompt": [
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "Another one, please."},
        ],
        "chosen": "Blue.",
        "rejected": "Red, as I said.",
    },
]


@pytest.fixture(scope="module")
def tokenizer(embedded: ModelSource) -> TokenizerUtils:
    return TokenizerUtils(load_tokenizer(embedded.folder), loss_on="last")


def read(fields: dict[str, Any], line: int = 1) -> Any:
    return read_preference(Row(fields, f"rows.jsonl:{line}"))


def encode(
    tokenizer: TokenizerUtils, rows: list[dict[str, Any]], **data: Any
) -> tuple[list[EncodedExample], EncodingCounts]:
    counts, problems = EncodingCounts(), ProblemLog()
    examples = [read(fields, line) for line, fields in enumerate(rows, start=1)]
    pairs = encode_pairs(examples, tokenizer, DataSection(train="unused", **data), counts, problems)
    problems.raise_if_any()
    return pairs, counts


def test_both_conversations_of_a_pair_are_those_of_the_tokenizer(tokenizer: TokenizerUtils) -> None:
    pairs, counts = encode(tokenizer, ROWS)
    assert (counts.rows, counts.examples, counts.dropped, counts.cut) == (2, 2, 0, 0)
    for fields, pair in zip(ROWS, pairs, strict=True):
        prompt = (
            fields["prompt"] if isinstance(fields["prompt"], list) else [{"role": "user", "content": fields["prompt"]}]
        )
        for name, side in zip(("chosen", "rejected"), split_pair(pair), strict=True):
            asked = tokenizer.encode_prompt(prompt)
            whole = [*prompt, {"role": "assistant", "content": fields[name]}]
            text = tokenizer.tokenizer.apply_chat_template(whole, tokenize=False).rstrip("\n")
            assert tokenizer.tokenizer.decode(side.input_ids) == text
            np.testing.assert_array_equal(side.input_ids[: len(asked)], asked)
            np.testing.assert_array_equal(side.loss_mask, np.arange(len(side.input_ids)) >= len(asked))


def test_the_prompt_stands_there_once_and_each_branch_begins_with_its_last_token(tokenizer: TokenizerUtils) -> None:
    for fields, pair in zip(ROWS, encode(tokenizer, ROWS)[0], strict=True):
        assert pair.branch_starts is not None
        trunk, middle = pair.branch_starts
        chosen, rejected = split_pair(pair)
        assert len(pair.input_ids) == len(chosen.input_ids) + len(rejected.input_ids) - trunk, fields
        assert pair.path_length == max(len(chosen.input_ids), len(rejected.input_ids))
        assert pair.input_ids[trunk] == pair.input_ids[middle]
        assert not pair.loss_mask[[trunk, middle]].any()
        assert pair.loss_mask[trunk + 1 : middle].all()
        assert pair.loss_mask[middle + 1 :].all()
        assert pair.supervised_tokens == chosen.supervised_tokens + rejected.supervised_tokens


def test_answers_that_begin_alike_share_no_learned_token(tokenizer: TokenizerUtils) -> None:
    # A trunk of all common tokens would swallow the common beginning of the answers, and with it their log-probability.
    row = {"prompt": "Say it.", "chosen": "The sky is blue.", "rejected": "The sky is green."}
    ((pair,), _) = encode(tokenizer, [row])
    for side in split_pair(pair):
        assert tokenizer.decode(side.input_ids[side.loss_mask]).startswith("The sky is")


def test_prompts_that_differ_at_their_end_share_what_they_have_in_common() -> None:
    mask = np.array([False, False, False, True, True])
    pair = join_pair(
        EncodedExample(np.array([1, 2, 3, 4, 5]), mask, "x:1"), EncodedExample(np.array([1, 2, 9, 4, 5]), mask, "x:1")
    )
    assert pair is not None
    assert pair.branch_starts == (1, 5)
    assert [side.input_ids.tolist() for side in split_pair(pair)] == [[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]]


def test_a_pair_without_any_common_token_is_no_pair() -> None:
    mask = np.array([False, True])
    sides = [EncodedExample(np.array([first, 5]), mask, "x:1") for first in (1, 2)]
    assert join_pair(*sides) is None


@pytest.mark.parametrize("missing", [1, 7, 20])
def test_truncation_cuts_the_prompt_from_the_left_and_never_an_answer(tokenizer: TokenizerUtils, missing: int) -> None:
    ((whole,), _) = encode(tokenizer, ROWS[:1])
    limit = whole.path_length - missing
    ((cut,), counts) = encode(tokenizer, ROWS[:1], max_length=limit, overlong="truncate")
    assert (counts.cut, counts.dropped) == (1, 0)
    assert cut.path_length == limit
    for before, after in zip(split_pair(whole), split_pair(cut), strict=True):
        np.testing.assert_array_equal(after.input_ids, before.input_ids[missing:])
        np.testing.assert_array_equal(after.input_ids[after.loss_mask], before.input_ids[before.loss_mask])


def test_a_pair_whose_answer_would_be_cut_is_left_out_and_counted(tokenizer: TokenizerUtils) -> None:
    row = {"prompt": "Count.", "chosen": "1.", "rejected": " ".join(map(str, range(100)))}
    (pairs, counts) = encode(tokenizer, [*ROWS, row], max_length=90, overlong="truncate")
    assert len(pairs) == 2
    assert (counts.rows, counts.examples, counts.dropped, counts.dropped_places) == (3, 2, 1, ["rows.jsonl:3"])


def test_an_overlong_pair_is_refused_with_its_place_unless_the_recipe_says_otherwise(tokenizer: TokenizerUtils) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2.*tokens are more than max_length 50"):
        encode(tokenizer, ROWS, max_length=50)
    assert encode(tokenizer, ROWS, max_length=50, overlong="drop")[1].dropped == 1


def test_a_mismatched_pair_asks_one_prompt_and_gives_the_answers_of_another(tokenizer: TokenizerUtils) -> None:
    first, second = encode(tokenizer, ROWS)[0]
    for own, other, mixed in zip(
        split_pair(first), split_pair(second), split_pair(mismatch_pair(first, second)), strict=True
    ):
        prompt, answer = own.input_ids[~own.loss_mask], other.input_ids[other.loss_mask]
        np.testing.assert_array_equal(mixed.input_ids, np.concatenate([prompt, answer]))
        np.testing.assert_array_equal(mixed.input_ids[mixed.loss_mask], answer)


def test_pairs_and_single_answers_come_back_from_the_cache_as_they_went_in(
    tokenizer: TokenizerUtils, tmp_path: Path
) -> None:
    single = EncodedExample(np.array([5, 6, 7]), np.array([False, True, True]), "rows.jsonl:3")
    examples = [*encode(tokenizer, ROWS)[0], single]
    with TokenWriter(tmp_path / "train.arrow") as writer:
        writer.write(examples, 0)
    found = read_tokens(tmp_path / "train.arrow")
    for wrote, got in zip(examples, found, strict=True):
        assert got.branch_starts == wrote.branch_starts
        np.testing.assert_array_equal(got.input_ids, wrote.input_ids)
        np.testing.assert_array_equal(got.loss_mask, wrote.loss_mask)
    assert found.lengths.tolist() == [len(example.input_ids) for example in examples]

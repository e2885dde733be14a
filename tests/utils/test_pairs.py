"""Preference rows become pairs that hold each token of both conversations, the prompt once, and never lose an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.structured_config import DataSection
from utils.data_formats import read_example, read_preference
from utils.data_loading import Row
from utils.exceptions import DataError
from utils.methods.pairs import (
    choose_partners,
    encode_pairs,
    has_answers,
    have_one_prompt,
    join_pair,
    mark_answer,
    mismatch_pair,
    split_pair,
)
from utils.methods.sft import EncodingCounts
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.problem_log import ProblemLog
from utils.token_cache import TokenWriter, read_tokens
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_utils import TokenizerUtils

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
    examples = [read_example(Row(fields, f"rows.jsonl:{line}"), "auto") for line, fields in enumerate(rows, start=1)]
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
        split_pair(first), split_pair(second), split_pair(mismatch_pair(first, second, 999)), strict=True
    ):
        prompt, answer = own.input_ids[~own.loss_mask], other.input_ids[other.loss_mask]
        np.testing.assert_array_equal(mixed.input_ids, np.concatenate([prompt, answer]))
        np.testing.assert_array_equal(mixed.input_ids[mixed.loss_mask], answer)


def test_a_mismatched_pair_that_is_too_long_loses_the_beginning_of_its_prompt(tokenizer: TokenizerUtils) -> None:
    short, long = encode(tokenizer, ROWS)[0]
    whole = mismatch_pair(long, short, 999)
    limit = whole.path_length - 7
    cut = mismatch_pair(long, short, limit)
    assert cut.path_length == limit
    for mixed, before in zip(split_pair(cut), split_pair(whole), strict=True):
        np.testing.assert_array_equal(mixed.input_ids, np.delete(before.input_ids, np.s_[1:8]))
        assert mixed.loss_mask.sum() == before.loss_mask.sum()


def test_a_partner_has_another_prompt(tokenizer: TokenizerUtils) -> None:
    first, second = encode(tokenizer, ROWS)[0]
    third = encode(tokenizer, [{**ROWS[0], "prompt": "What is 3 + 3?"}])[0][0]
    # Copies, as a weighted mixture has them, and two answers to one question in a row.
    pairs = [first, first, second, third, third, third, first]
    assert choose_partners(pairs).tolist() == [5, 5, 1, 2, 2, 2, 5]
    assert not have_one_prompt(pairs)
    other = replace(first, input_ids=np.append(first.input_ids, 9), loss_mask=np.append(first.loss_mask, True))
    assert have_one_prompt([first, other])


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


LABELLED: list[dict[str, Any]] = [
    {"prompt": ROWS[0]["prompt"], "completion": ROWS[0]["chosen"], "label": True},
    {"prompt": ROWS[0]["prompt"], "completion": ROWS[0]["rejected"], "label": False},
    {"messages": [*ROWS[1]["prompt"], {"role": "assistant", "content": "Blue."}], "label": False},
]


def test_a_labelled_row_is_a_pair_without_the_other_answer(tokenizer: TokenizerUtils) -> None:
    (pair, *_), _ = encode(tokenizer, ROWS)
    rows, counts = encode(tokenizer, LABELLED)
    assert (counts.rows, counts.examples) == (3, 3)
    assert [has_answers(row) for row in rows] == [(True, False), (False, True), (False, True)]
    assert has_answers(pair) == (True, True)
    for side, row in enumerate(rows[:2]):
        whole = split_pair(pair)[side]
        np.testing.assert_array_equal(row.input_ids, whole.input_ids)
        np.testing.assert_array_equal(row.loss_mask, whole.loss_mask)
        np.testing.assert_array_equal(split_pair(row)[side].input_ids, whole.input_ids)
        assert row.path_length == len(row.input_ids)
        assert row.supervised_tokens == whole.supervised_tokens
        assert not split_pair(row)[1 - side].loss_mask.any()


def test_only_the_last_answer_of_a_labelled_conversation_is_learned(tokenizer: TokenizerUtils) -> None:
    row = encode(tokenizer, LABELLED)[0][2]
    assert tokenizer.decode(row.input_ids[row.loss_mask]).startswith("Blue.")
    assert row.branch_starts is not None
    assert row.branch_starts[0] == row.branch_starts[1] == int(np.argmax(row.loss_mask)) - 1


def test_labelled_rows_and_pairs_may_stand_in_any_order(tokenizer: TokenizerUtils) -> None:
    mixed = [LABELLED[2], ROWS[0], LABELLED[0], ROWS[1], LABELLED[1]]
    together = encode(tokenizer, mixed)[0]
    apart = [encode(tokenizer, [fields])[0][0] for fields in mixed]
    assert [row.where for row in together] == [f"rows.jsonl:{line}" for line in range(1, 6)]
    for one, other in zip(together, apart, strict=True):
        assert one.branch_starts == other.branch_starts
        np.testing.assert_array_equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("label", [True, False])
def test_truncation_cuts_the_prompt_of_a_labelled_row_and_never_its_answer(
    tokenizer: TokenizerUtils, label: bool
) -> None:
    fields = {**LABELLED[0], "label": label}
    ((whole,), _) = encode(tokenizer, [fields])
    ((cut,), counts) = encode(tokenizer, [fields], max_length=whole.path_length - 5, overlong="truncate")
    assert (counts.cut, len(cut.input_ids), has_answers(cut)) == (1, len(whole.input_ids) - 5, has_answers(whole))
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[5:])
    assert cut.supervised_tokens == whole.supervised_tokens
    long = {**fields, "completion": "It is four, as far as I know."}
    assert encode(tokenizer, [long], max_length=8, overlong="truncate")[1].dropped == 1


def test_a_labelled_answer_without_a_prompt_is_no_row() -> None:
    alone = EncodedExample(np.array([4, 5]), np.array([True, True]), "x:1")
    assert mark_answer(alone, is_desirable=True) is None


def test_the_answers_of_an_encoded_set_are_counted_on_either_side(tokenizer: TokenizerUtils, tmp_path: Path) -> None:
    examples = encode(tokenizer, [*ROWS, *LABELLED])[0]
    single = EncodedExample(np.array([5, 6, 7]), np.array([False, True, True]), "rows.jsonl:9")
    with TokenWriter(tmp_path / "train.arrow") as writer:
        writer.write([*examples, single], 0)
    found = read_tokens(tmp_path / "train.arrow")
    assert found.answers == (3, 4)
    assert found[:2].answers == (2, 2)
    assert found[5:].answers == (0, 0)
    assert [found[index].branch_starts for index in range(6)] == [*(one.branch_starts for one in examples), None]

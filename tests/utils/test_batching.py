"""Every example is seen once per epoch, in an order that repeats, and padding is neither learned nor counted."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from utils.batching import (
    count_answer_tokens,
    group_first_fit,
    group_scored_rows,
    iterate_windows,
    make_micro_batches,
    pack_row,
    pad_prompts_left,
    pad_rows,
    unroll_pairs,
)
from utils.piece_encoder import EncodedExample

PAD = 9


def make_examples(*lengths: int) -> list[EncodedExample]:
    """Example n holds tokens n * 100, n * 100 + 1 …; all of them are learned."""
    return [
        EncodedExample(np.arange(length) + 100 * number, np.ones(length, dtype=np.bool_), f"x:{number}")
        for number, length in enumerate(lengths, start=1)
    ]


def read_windows(count: int, batch_size: int, seed: int = 1, epoch: int = 0) -> list[list[int]]:
    return [window.tolist() for window in iterate_windows(count, batch_size, seed, epoch)]


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1), (7, 1)])
def test_an_epoch_sees_every_example_once(count: int, batch_size: int) -> None:
    windows = read_windows(count, batch_size)
    assert sorted(chain(*windows)) == list(range(count))
    assert all(len(window) == batch_size for window in windows[:-1])


def test_a_ragged_last_window_is_kept() -> None:
    assert [len(window) for window in read_windows(10, 4)] == [4, 4, 2]


def test_the_order_repeats_with_the_seed_and_changes_with_seed_and_epoch() -> None:
    assert read_windows(50, 8, seed=3, epoch=2) == read_windows(50, 8, seed=3, epoch=2)
    assert read_windows(50, 8, seed=3, epoch=2) != read_windows(50, 8, seed=4, epoch=2)
    assert read_windows(50, 8, seed=3, epoch=2) != read_windows(50, 8, seed=3, epoch=1)
    # A sum of seed and epoch would give the next epoch of one seed the order of the next seed.
    assert read_windows(50, 8, seed=3, epoch=2) != read_windows(50, 8, seed=4, epoch=1)


def test_the_order_does_not_depend_on_the_batch_size_or_on_numpys_global_state() -> None:
    np.random.seed(5)
    first = list(chain(*read_windows(20, 4)))
    np.random.seed(6)
    assert list(chain(*read_windows(20, 5))) == first


def test_rows_are_padded_on_the_right_to_the_longest() -> None:
    batch = pad_rows(make_examples(2, 4), PAD)
    assert batch.input_ids.tolist() == [[100, 101, PAD, PAD], [200, 201, 202, 203]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.loss_mask.tolist() == [[False, True, False, False], [False, True, True, True]]
    assert batch.position_ids is None
    assert batch.lengths.tolist() == [2, 4]


def test_without_padding_there_is_no_attention_mask() -> None:
    assert pad_rows(make_examples(3, 3), PAD).attention_mask is None


def test_padding_is_told_by_position_and_not_by_token_id() -> None:
    example = EncodedExample(np.array([5, PAD, 6, PAD]), np.array([False, True, True, True]), "x:1")
    batch = pad_rows([example, *make_examples(5)], PAD)
    assert batch.attention_mask is not None
    assert batch.attention_mask[0].tolist() == [True] * 4 + [False]
    assert batch.loss_mask[0].tolist() == [False, True, True, True, False]


def test_tokens_count_no_padding_and_supervised_tokens_no_first_column() -> None:
    batch = pad_rows(make_examples(2, 7, 3), PAD)
    assert batch.input_ids.size == 21
    assert batch.tokens == 12
    assert batch.supervised_tokens == 12 - 3


def test_prompts_are_padded_on_the_left() -> None:
    batch = pad_prompts_left([np.array([1, 2]), np.array([3, 4, 5])], PAD)
    assert batch.input_ids.tolist() == [[PAD, 1, 2], [3, 4, 5]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[False, True, True], [True] * 3]
    assert not batch.loss_mask.any()
    assert batch.tokens == 5
    assert pad_prompts_left([np.array([1, 2]), np.array([3, 4])], PAD).attention_mask is None


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_micro_batches_hold_every_example_of_the_step_once(micro_batch_size: int) -> None:
    examples = make_examples(5, 1, 9, 3, 3, 7, 2)
    batches = make_micro_batches(examples, micro_batch_size, PAD)
    rows = [
        row[:length].tolist() for batch in batches for row, length in zip(batch.input_ids, batch.lengths, strict=True)
    ]
    assert sorted(rows) == sorted(example.input_ids.tolist() for example in examples)
    assert [len(batch.lengths) for batch in batches[:-1]] == [micro_batch_size] * (len(batches) - 1)
    assert len(batches) == -(-len(examples) // micro_batch_size)


def test_rows_of_like_length_share_a_micro_batch() -> None:
    batches = make_micro_batches(make_examples(9, 2, 8, 1), 2, PAD)
    assert sorted(batch.lengths.tolist() for batch in batches) == [[2, 1], [9, 8]]


def test_no_split_of_a_step_changes_its_counts() -> None:
    examples = make_examples(5, 4, 9, 3, 3, 7, 2)
    splits = [make_micro_batches(examples, size, PAD) for size in (1, 2, 4, 7)]
    splits.append(make_micro_batches(examples, 1, PAD, pack_length=12))
    for batches in splits:
        assert sum(batch.tokens for batch in batches) == 33
        assert sum(batch.supervised_tokens for batch in batches) == 33 - 7


@pytest.mark.parametrize("pack_length", [None, 12])
def test_nothing_is_learned_in_column_0(pack_length: int | None) -> None:
    for batch in make_micro_batches(make_examples(5, 1, 9, 3, 3), 2, PAD, pack_length=pack_length):
        assert not batch.loss_mask[:, 0].any()


def test_packing_takes_the_first_row_with_room() -> None:
    groups = group_first_fit(make_examples(6, 5, 4, 3, 2), 10)
    assert [[len(example.input_ids) for example in group] for group in groups] == [[6, 4], [5, 3, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_no_token_and_fills_no_row_over_its_length(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 33, size=60)
    examples = make_examples(*lengths.tolist())
    batches = make_micro_batches(examples, 4, PAD, pack_length=32)
    assert all(batch.input_ids.shape[1] <= 32 for batch in batches)
    packed = np.sort(np.concatenate([batch.input_ids[0] for batch in batches]))
    assert packed.tolist() == np.sort(np.concatenate([example.input_ids for example in examples])).tolist()
    assert len(batches) < len(examples) / 1.5


def test_in_a_packed_row_positions_restart_and_no_first_token_is_learned() -> None:
    batch = pack_row(make_examples(3, 1, 2))
    assert batch.input_ids.tolist() == [[100, 101, 102, 200, 300, 301]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.loss_mask.tolist() == [[False, True, True, False, False, True]]
    assert batch.attention_mask is None
    assert batch.tokens == 6
    assert batch.supervised_tokens == 3


def test_packing_keeps_what_is_not_learned() -> None:
    example = EncodedExample(np.arange(4), np.array([False, False, True, False]), "x:1")
    assert pack_row([example, example]).loss_mask.tolist() == [[False, False, True, False] * 2]


def make_pair(trunk: int, chosen: int, rejected: int, first: int = 0) -> EncodedExample:
    """A pair whose branches begin with the prompt's last token and then hold this many learned ones."""
    ids = np.arange(first, first + trunk + chosen + rejected + 2)
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[: trunk + 1] = mask[trunk + chosen + 1] = False
    starts = (trunk, trunk + chosen + 1)
    ids[starts[1]] = ids[starts[0]]
    return EncodedExample(ids, mask, "x:1", branch_starts=starts, reference=(-1.0, -2.0))


def test_both_branches_of_a_pair_go_on_from_its_prompt_and_padding_belongs_to_none() -> None:
    batch = pad_rows([make_pair(3, 2, 1), make_pair(1, 1, 1)], PAD)
    assert batch.segments is not None
    assert batch.position_ids is not None
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 2, 2, -1, -1, -1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 2, 1, 2, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 0, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0, 0, 0]]
    assert count_answer_tokens(batch).tolist() == [[2, 1], [1, 1]]
    assert batch.reference is not None
    assert batch.reference.tolist() == [[-1.0, -2.0]] * 2
    assert batch.tokens == 13


def test_unrolled_pairs_are_their_two_conversations_with_their_learned_tokens_in_the_same_order() -> None:
    batch = pad_rows([make_pair(3, 2, 1), make_pair(1, 1, 1, first=50)], PAD)
    rows = unroll_pairs(batch)
    assert rows.lengths.tolist() == [6, 5, 3, 3]
    assert rows.input_ids[1, :5].tolist() == [0, 1, 2, 3, 7]
    assert rows.segments is None
    assert rows.input_ids[rows.loss_mask].tolist() == batch.input_ids[batch.loss_mask].tolist()


def test_pairs_of_like_length_share_a_micro_batch() -> None:
    pairs = [make_pair(1, 1, 1), make_pair(20, 3, 3), make_pair(2, 1, 1), make_pair(19, 3, 3)]
    batches = make_micro_batches(pairs, 2, PAD)
    assert [batch.lengths.tolist() for batch in batches] == [[28, 27], [6, 5]]


def test_scored_rows_share_a_pass_up_to_a_number_and_to_their_tokens_and_the_longest_come_first() -> None:
    lengths = [50, 700, 30, 400, 40, 3000, 510, 20]
    groups = group_scored_rows(lengths, 3, 256)  # 1,024 tokens a pass
    assert groups == [[5], [1], [6, 3], [0, 4, 2], [7]]
    assert group_scored_rows(lengths, 3, 1500) == [[5], [1, 6], [3, 0, 4], [2, 7]]
    assert group_scored_rows([], 3, 20) == []

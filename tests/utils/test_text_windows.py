"""Windows over a stream of tokens: nothing is learned twice, nothing is left out, nothing crosses the border."""

import numpy as np
import pytest

from utils.text_windows import cut_windows, make_examples, split_tokens

CASES = [(count, context, stride) for count in (1, 2, 7, 8, 9, 64, 101) for context in (8, 16) for stride in (1, 3, 7)]


@pytest.mark.parametrize(("count", "context", "stride"), CASES)
def test_every_held_out_token_but_the_first_counts_exactly_once(count: int, context: int, stride: int) -> None:
    tokens = np.arange(count, dtype=np.int32)
    counted = [
        int(token)
        for example in make_examples(tokens, context, stride, held_out=True)
        for token in example.input_ids[example.loss_mask]
    ]
    assert counted == list(range(1, count))


@pytest.mark.parametrize(("count", "context", "stride"), CASES)
def test_training_learns_all_of_a_window_and_with_the_default_stride_each_token_once(
    count: int, context: int, stride: int
) -> None:
    for example in make_examples(np.arange(count, dtype=np.int32), context, stride, held_out=False):
        assert example.loss_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)
    count = 3 * (context - 1) + 1
    train = make_examples(np.arange(count, dtype=np.int32), context, context - 1, held_out=False)
    assert [int(token) for one in train for token in one.input_ids[one.loss_mask]] == list(range(1, count))


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize(("count", "context", "stride"), CASES)
def test_the_first_token_of_a_window_is_never_learned(count: int, context: int, stride: int, held_out: bool) -> None:
    # Nothing would predict it: the batch drops it from the loss in silence.
    for example in make_examples(np.arange(count, dtype=np.int32), context, stride, held_out=held_out):
        assert not example.loss_mask[0]
        assert example.supervised_tokens == example.loss_mask.sum() > 0


def test_all_windows_are_full_where_the_text_is_long_enough() -> None:
    assert {window.end - window.start for window in cut_windows(101, 16, 7)} == {16}
    assert [(window.start, window.end) for window in cut_windows(5, 16, 7)] == [(0, 5)]


def test_a_smaller_stride_gives_each_token_more_before_it() -> None:
    for stride in (3, 7, 15):
        windows = list(cut_windows(200, 16, stride))
        assert min(window.new_from - window.start for window in windows[1:]) >= 16 - stride


def test_the_split_is_two_blocks_that_are_the_text() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    train, held_out = split_tokens(tokens, 0.1)
    assert len(held_out) == 100
    assert np.concatenate([train, held_out]).tolist() == tokens.tolist()
    assert len(split_tokens(tokens, 0.0)[1]) == 0


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_no_window_holds_tokens_of_both_sides(stride: int) -> None:
    # Cutting windows first and holding out some of them would leave overlapping tokens on both sides.
    train, held_out = split_tokens(np.arange(500, dtype=np.int32), 0.2)
    seen = {int(token) for example in make_examples(train, 16, stride, held_out=False) for token in example.input_ids}
    unseen = {
        int(token) for example in make_examples(held_out, 16, stride, held_out=True) for token in example.input_ids
    }
    assert seen == set(range(400))
    assert unseen == set(range(400, 500))

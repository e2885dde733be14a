"""Batches without padding: every learned token is predicted once, and the span of each token names exactly what it may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from utils.backends import MachineFacts
from utils.batching import Batch, pack_row, pad_rows
from utils.evaluation import make_evaluation_batches
from utils.flat_batches import (
    PASS_COST,
    SHORTEST_SHARED,
    FlatBatch,
    Span,
    count_common_start,
    count_own_tokens,
    flatten,
    pays_off,
)
from utils.piece_encoder import EncodedExample

SYSTEM = list(range(100, 112))


def make_row(start: int, length: int, learned: int, beginning: list[int] | None = None) -> EncodedExample:
    """Ids that count upwards behind a beginning; the last ones are learned."""
    ids = np.array([*(beginning or []), *range(start, start + length)], dtype=np.int64)
    return EncodedExample(ids, np.arange(len(ids)) >= len(ids) - learned, "rows:1")


def make_pair(start: int, beginning: list[int]) -> EncodedExample:
    """A stem, and two branches that begin with a copy of the prompt's last token."""
    trunk = [*beginning, start, start + 1]
    chosen, rejected = [start + 2, 500, 501], [start + 2, 600]
    ids = np.array([*trunk, *chosen, *rejected], dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    mask[len(trunk) + 1 : len(trunk) + 3] = mask[-1] = True
    return EncodedExample(ids, mask, "rows:1", branch_starts=(len(trunk), len(trunk) + 3))


def list_contexts(flat: FlatBatch) -> list[tuple[tuple[int, ...], int]]:
    """What each learned token is predicted from, and the token itself; positions must count the context."""
    contexts = []
    for source, target in zip(flat.sources.tolist(), flat.targets.tolist(), strict=True):
        (span,) = [span for span in flat.spans if span.start <= source < span.end]
        seen = [index for start, end in span.before for index in range(start, end)]
        seen += range(span.start, source + 1)
        assert flat.position_ids[seen].tolist() == list(range(len(seen)))
        contexts.append((tuple(flat.input_ids[seen].tolist()), target))
    return contexts


def expect_contexts(rows: list[EncodedExample]) -> list[tuple[tuple[int, ...], int]]:
    """The same, written down from the rows alone."""
    return [
        (tuple(row.input_ids[:index].tolist()), int(row.input_ids[index]))
        for row in rows
        for index in np.flatnonzero(row.loss_mask).tolist()
    ]


def test_a_pass_more_has_to_save_more_tokens_than_it_costs() -> None:
    assert pays_off(PASS_COST + 1, 2)  # computed once in place of twice
    assert not pays_off(PASS_COST, 2)
    assert not pays_off(10 * PASS_COST, 1)
    assert pays_off(SHORTEST_SHARED, 2 + PASS_COST // SHORTEST_SHARED)
    assert not pays_off(SHORTEST_SHARED - 1, 1000)


@pytest.mark.parametrize("beginning", [[], SYSTEM], ids=["nothing shared", "a shared system turn"])
def test_each_learned_token_is_predicted_from_its_own_row_alone(beginning: list[int]) -> None:
    rows = [make_row(1, 9, 4, beginning), make_row(30, 3, 1, beginning), make_row(60, 6, 5, beginning)]
    for batch in (pad_rows(rows, 0), pack_row(rows)):
        flat = flatten(batch)
        assert list_contexts(flat) == expect_contexts(rows)
        assert len(flat.input_ids) == 18 + len(beginning)


def test_spans_cover_all_tokens_once_and_in_order() -> None:
    flat = flatten(pad_rows([make_row(1, 9, 4, SYSTEM), make_row(30, 3, 1, SYSTEM)], 0))
    ends = [0, *(span.end for span in flat.spans)]
    assert [span.start for span in flat.spans] == ends[:-1]
    assert ends[-1] == len(flat.input_ids) == len(flat.position_ids)


def test_the_answers_of_a_pair_share_its_prompt_and_pairs_share_their_system_turn() -> None:
    pairs = [make_pair(1, SYSTEM), make_pair(40, SYSTEM)]
    flat = flatten(pad_rows(pairs, 0))
    expected = []
    for start in (1, 40):
        prompt = (*SYSTEM, start, start + 1, start + 2)
        expected += [(prompt, 500), ((*prompt, 500), 501), (prompt, 600)]
    assert list_contexts(flat) == expected
    assert len(flat.input_ids) == len(SYSTEM) + 2 * (2 + 3 + 2)


def test_a_missing_answer_of_a_labelled_row_has_no_span() -> None:
    ids = np.array([1, 2, 3, 7, 8], dtype=np.int64)
    mask = np.array([0, 0, 0, 0, 1], dtype=bool)
    flat = flatten(pad_rows([EncodedExample(ids, mask, "rows:1", branch_starts=(3, 3))], 0))
    assert list_contexts(flat) == [((1, 2, 3, 7), 8)]
    assert [(span.start, span.end) for span in flat.spans] == [(0, 3), (3, 5)]


def test_nothing_that_is_learned_is_shared() -> None:
    rows = [make_row(1, 6, 17, SYSTEM), make_row(1, 8, 19, SYSTEM)]  # the first learned token is the second one of all
    flat = flatten(pad_rows(rows, 0))
    assert list_contexts(flat) == expect_contexts(rows)
    assert all(not span.before for span in flat.spans)


def test_the_same_row_twice_is_learned_twice() -> None:
    rows = [make_row(1, 6, 2, SYSTEM)] * 2
    flat = flatten(pad_rows(rows, 0))
    assert list_contexts(flat) == expect_contexts(rows)
    assert len(flat.input_ids) < 2 * len(rows[0].input_ids)


def test_a_single_row_stays_as_it_is() -> None:
    batch: Batch = pad_rows([make_row(1, 9, 4)], 0)
    flat = flatten(batch)
    assert flat.input_ids.tolist() == batch.input_ids[0].tolist()
    assert len(flat.spans) == 1


@pytest.mark.parametrize("make", [lambda start: make_row(start, 30, 5, SYSTEM), lambda start: make_pair(start, SYSTEM)])
def test_what_a_whole_set_begins_with_is_what_its_passes_share(make: Callable[[int], EncodedExample]) -> None:
    rows = [make(100 * number) for number in range(1, 6)]
    flat = flatten(pad_rows(rows, 0))
    assert flat.spans[0] == Span(0, count(rows))
    assert count(rows) == len(SYSTEM)
    assert count([*rows, make_row(900, 30, 5)]) == 0
    assert count(rows[:1]) == 0


def test_a_large_set_is_asked_at_rows_spread_over_it() -> None:
    rows = [make_row(100 * number, 30, 5, SYSTEM) for number in range(1, 3001)]
    assert count(rows) == len(SYSTEM)
    assert count([*rows, make_row(900, 30, 5)]) == 0  # the last one is always among them
    rows[1] = make_row(1, len(SYSTEM), 2)  # nobody asks the second one, but it is too short to begin so
    assert count(rows) == 0


def test_held_out_rows_share_passes_by_what_each_has_behind_the_beginning() -> None:
    rows = [make_row(100 * number, 8, 5, SYSTEM) for number in range(1, 201)]
    assert set(count_own_tokens(rows, runs_flat=True)) == {8}
    assert set(count_own_tokens(rows, runs_flat=False)) == {20}
    facts = MachineFacts("cpu", "", "float32", 1, 256, 2, ())
    sizes = {
        runs_flat: {len(batch.lengths) for batch in make_evaluation_batches(rows, machine, 100, 0)}
        for runs_flat in (True, False)
        for machine in [replace(facts, runs_flat=runs_flat)]
    }
    assert sizes == {True: {100}, False: {51, 200 - 3 * 51}}  # of 1,024 tokens each


def count(rows: list[EncodedExample]) -> int:
    return count_common_start(rows, np.array([len(row.input_ids) for row in rows]))

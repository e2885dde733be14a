"""A step that does not fit into memory, for real: a process that may not take more, and what it makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.utils.test_flat_batches import SYSTEM, make_pair, make_row
from utils.batching import Batch, halve_batches, pad_rows
from utils.flat_batches import flatten
from utils.machine import count_usable_bytes, measure_memory

ROOT = Path(__file__).resolve().parents[2]


LIMITS = {"none": 0, "half": 80, "far too little": 10}  # megabytes


@pytest.fixture(scope="module")
def results(tiny_llama: Path) -> dict[str, dict[str, Any]]:
    """What becomes of two steps on 8 long rows under each limit."""
    command = [sys.executable, "tests/backends/out_of_memory_step.py", str(tiny_llama), *map(str, LIMITS.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(LIMITS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_step_that_does_not_fit_is_taken_in_smaller_passes_with_the_same_result(
    results: dict[str, dict[str, Any]],
) -> None:
    whole, cut = results["none"], results["half"]
    assert whole["halvings"] == 0
    assert 1 <= cut["halvings"] <= 3
    assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert cut["weights"] == pytest.approx(whole["weights"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_single_row_that_does_not_fit_is_an_error_with_the_line_to_change(results: dict[str, dict[str, Any]]) -> None:
    result = results["far too little"]
    assert result["halvings"] == 3
    for word in ("training.micro_batch_size", "data.max_length", "gradient_checkpointing"):
        assert word in result["error"]


@pytest.mark.parametrize(
    "batch",
    [
        pad_rows([make_row(1, 9, 4), make_row(30, 3, 1), make_row(60, 6, 5)], 0),
        pad_rows([make_row(1, 9, 4, SYSTEM), make_row(30, 3, 1, SYSTEM)], 0),
        pad_rows([make_pair(1, SYSTEM), make_pair(40, []), make_pair(70, [3])], 0),
    ],
    ids=["rows", "two rows", "pairs"],
)
def test_halves_hold_the_same_rows_with_less_padding(batch: Batch) -> None:
    halves = halve_batches([batch])
    assert [len(half.lengths) for half in halves] == [-(-len(batch.lengths) // 2), len(batch.lengths) // 2]
    assert sum(half.tokens for half in halves) == batch.tokens
    assert np.concatenate([flatten(half).targets for half in halves]).tolist() == flatten(batch).targets.tolist()
    for half in halves:
        assert half.input_ids.shape[1] == half.lengths.max()
        assert (half.attention_mask is None) == bool((half.lengths == half.lengths.max()).all())


def test_a_row_alone_is_not_cut() -> None:
    batch = pad_rows([make_row(1, 9, 4)], 0)
    (same,) = halve_batches([batch])
    assert same.input_ids.tolist() == batch.input_ids.tolist()


def test_a_process_may_fill_all_memory_and_swap() -> None:
    assert count_usable_bytes() >= measure_memory()[0] > 1 << 28

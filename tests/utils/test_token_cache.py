"""Encoded examples come back from disk as they went in, whole or not at all, also with several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.recipe_io import load_recipe
from utils.cache_entries import find_cache_entry, open_or_build, remove_unused
from utils.exceptions import DataError
from utils.piece_encoder import EncodedExample
from utils.prepared_data import mix, refuse_lost_sources
from utils.token_cache import EncodedSet, TokenWriter, read_tokens

ROOT = Path(__file__).resolve().parents[2]
NAME = "train.arrow"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))


def make_example(number: int, length: int) -> EncodedExample:
    ids = np.arange(number, number + length, dtype=np.int64)
    return EncodedExample(ids, ids % 3 == 0, f"rows.jsonl:{number + 1}", is_text=number % 2 == 0)


def write(path: Path, count: int = 25, chunk: int = 10) -> list[EncodedExample]:
    examples = [make_example(number, 1 + number % 7) for number in range(count)]
    with TokenWriter(path) as writer:
        for start in range(0, count, chunk):
            writer.write(examples[start : start + chunk], source=start // chunk)
    return examples


def build(folder: Path) -> dict[str, Any]:
    return {"train": len(write(folder / NAME))}


def test_examples_come_back_as_they_went_in(tmp_path: Path) -> None:
    examples = write(tmp_path / NAME)
    found = read_tokens(tmp_path / NAME)

    assert len(found) == len(examples)
    for wrote, read in zip(examples, found, strict=True):
        np.testing.assert_array_equal(read.input_ids, wrote.input_ids)
        np.testing.assert_array_equal(read.loss_mask, wrote.loss_mask)
        assert (read.where, read.is_text) == (wrote.where, wrote.is_text)
        assert read.input_ids.dtype == np.int64
        assert read.loss_mask.dtype == np.bool_
    assert found.lengths.tolist() == [len(example.input_ids) for example in examples]
    assert found.supervised.tolist() == [example.supervised_tokens for example in examples]
    assert found.sources.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert [example.where for example in found[3:5]] == ["rows.jsonl:4", "rows.jsonl:5"]


def test_an_empty_set_is_a_set(tmp_path: Path) -> None:
    write(tmp_path / NAME, count=0)
    found = read_tokens(tmp_path / NAME)

    assert len(found) == 0
    assert found.lengths.tolist() == []


def test_the_datasets_library_reads_the_file(tmp_path: Path) -> None:
    from datasets import Dataset

    examples = write(tmp_path / NAME)
    rows = Dataset.from_file(str(tmp_path / NAME))

    assert rows[7]["input_ids"] == examples[7].input_ids.tolist()
    assert rows[24]["where"] == "rows.jsonl:25"


def test_a_second_call_reads_what_the_first_one_built() -> None:
    folder, facts = open_or_build("key", [NAME], build)

    def fail(folder: Path) -> dict[str, Any]:
        raise AssertionError("built again")

    assert open_or_build("key", [NAME], fail) == (folder, facts)
    assert facts["train"] == 25


def test_another_key_never_reads_it() -> None:
    assert open_or_build("one", [NAME], build)[0] != open_or_build("two", [NAME], build)[0]


@pytest.mark.parametrize("damage", ["cut", "gone", "no facts", "facts are no JSON"])
def test_a_damaged_entry_is_built_anew(damage: str) -> None:
    folder, _ = open_or_build("key", [NAME], build)
    if damage == "cut":
        (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-10])
    elif damage == "gone":
        (folder / NAME).unlink()
    elif damage == "no facts":
        (folder / "facts.json").unlink()
    else:
        (folder / "facts.json").write_text("{")

    again, _ = open_or_build("key", [NAME], build)

    assert len(read_tokens(again / NAME)) == 25


def test_a_failing_build_leaves_nothing_behind() -> None:
    def fail(folder: Path) -> dict[str, Any]:
        write(folder / NAME)
        raise DataError("bad row")

    with pytest.raises(DataError):
        open_or_build("key", [NAME], fail)
    assert list(find_cache_entry("key").parent.iterdir()) == []


def test_an_entry_unused_for_a_month_is_removed_and_a_used_one_stays() -> None:
    old, _ = open_or_build("old", [NAME], build)
    new, _ = open_or_build("new", [NAME], build)
    os.utime(old, (time.time() - 40 * 86_400,) * 2)
    remove_unused(old.parent)

    assert not old.exists()
    assert new.exists()


def test_several_processes_may_build_one_entry_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from tests.utils.test_token_cache import *\n"
        "def slow(folder):\n    time.sleep(0.5); return build(folder)\n"
        "folder, facts = open_or_build('shared', [NAME], slow); print(len(read_tokens(folder / NAME)), facts['train'])"
    )
    command = [sys.executable, "-c", code, str(ROOT)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        out, error = worker.communicate(timeout=120)
        assert out.split() == ["25", "25"], error
    assert [path.name for path in find_cache_entry("shared").parent.iterdir()] == ["shared"]


def test_weights_decide_how_often_an_epoch_sees_a_row() -> None:
    sources = np.array([0] * 10 + [1] * 10 + [2] * 10)
    order = mix(sources, [1.0, 2.5, 0.5], seed=3)
    seen = np.bincount(order, minlength=30)

    assert seen[:10].tolist() == [1] * 10
    assert sorted(seen[10:20].tolist()) == [2] * 5 + [3] * 5
    assert sorted(seen[20:].tolist()) == [0] * 5 + [1] * 5
    assert order.tolist() == mix(sources, [1.0, 2.5, 0.5], seed=3).tolist()
    assert order.tolist() != mix(sources, [1.0, 2.5, 0.5], seed=4).tolist()


def test_an_order_picks_rows_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / NAME)
    tables = read_tokens(tmp_path / NAME).tables
    found = EncodedSet(tables, np.array([3, 3, 20]))

    assert [example.where for example in found] == ["rows.jsonl:4", "rows.jsonl:4", "rows.jsonl:21"]
    assert found.lengths.tolist() == [4, 4, 7]


def test_a_weight_that_leaves_no_row_of_a_source_is_refused(tmp_path: Path) -> None:
    # Alone it ended in a ValueError; among others the source was left out without a word.
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: x}\ndata: {train: x.jsonl}\ntraining: {method: sft}\n", encoding="utf-8")
    sources = np.array([0, 0, 1], dtype=np.int64)
    order = mix(sources, [1.0, 0.1], seed=1)
    with pytest.raises(DataError, match="leaves none of the 1 rows of source 2") as caught:
        refuse_lost_sources(load_recipe(path), [1.0, 0.1], sources, order)
    assert caught.value.problems[0].where == f"{path}:2"
    refuse_lost_sources(load_recipe(path), [1.0, 1.0], sources, mix(sources, [1.0, 1.0], seed=1))

"""The first pass: every problem of both sets is counted, copies never fall on both sides, and a leak stops the run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.structured_config import DataSection
from utils.data_formats import read_example
from utils.data_loading import SHOWN_PROBLEMS, Row
from utils.data_sources import find_sources
from utils.exceptions import DataError, Problem
from utils.fingerprints import fingerprint_example
from utils.problem_log import ProblemLog
from utils.row_checks import RowScan, iterate_examples, scan_rows
from utils.row_groups import sample_indices

ROOT = Path(__file__).resolve().parents[2]


def make_row(question: object, answer: object = "yes") -> dict[str, Any]:
    return {"question": f"Is it {question}?", "answer": f"{answer}"}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def scan(train: Any, evaluation: Any = None, seed: int = 42, **settings: Any) -> RowScan:
    return scan_rows(DataSection(train=train, eval=evaluation, **settings), seed, lambda key: f"recipe:{key}")


def fail(train: Any, evaluation: Any = None, **settings: Any) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        scan(train, evaluation, **settings)
    return caught.value.problems


def list_codes(found: RowScan) -> list[str]:
    assert all(problem.severity == "warning" for problem in found.warnings)
    return [problem.code for problem in found.warnings]


def test_good_rows_are_counted_by_format_and_by_source(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [make_row(n) for n in range(30)])
    second = write(tmp_path / "b.jsonl", [{"text": f"text {n}"} for n in range(10)])
    found = scan((first, second))
    assert (found.train_rows, found.evaluation_rows) == (40, 4)
    assert found.formats == {"question_answer": 30, "text": 10}
    assert found.source_rows == (30, 10)
    assert len(found.held_out) == 4
    assert found.warnings == ()
    assert found.duplicates == 0


def test_a_separate_set_holds_nothing_out(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [make_row(n) for n in range(30)])
    evaluation = write(tmp_path / "b.jsonl", [make_row(n) for n in range(30, 40)])
    found = scan(train, evaluation)
    assert (found.train_rows, found.evaluation_rows, found.held_out) == (30, 10, frozenset())


def test_all_problems_of_both_sets_are_counted_and_the_first_ones_shown_with_their_line(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [make_row(1), "{oops", {"question": "a", "answer": ""}, {"foo": 1}])
    evaluation = write(tmp_path / "b.jsonl", [make_row(2), *["{oops"] * 7])
    problems = fail(train, evaluation)
    assert [problem.where for problem in problems[:-1]] == [f"{train}:{n}" for n in (2, 3, 4)] + [
        f"{evaluation}:{n}" for n in (2, 3)
    ]
    assert len(problems) == SHOWN_PROBLEMS + 1
    assert "5 more rows" in problems[-1].message


def test_a_damaged_file_does_not_hide_the_problems_of_the_others(tmp_path: Path) -> None:
    empty = write(tmp_path / "a.jsonl", [])
    broken = write(tmp_path / "b.jsonl", ["{oops"])
    assert [problem.code for problem in fail((empty, broken))] == ["no-rows", "not-json"]


def test_missing_files_of_both_sets_are_said_at_once(tmp_path: Path) -> None:
    problems = fail(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert [problem.code for problem in problems] == ["no-file", "no-file"]


def test_copies_are_a_warning_with_their_number_and_places(tmp_path: Path) -> None:
    rows = [make_row(n) for n in range(20)]
    path = write(tmp_path / "a.jsonl", [*rows, "", rows[3], make_row("3 "), rows[0]])
    found = scan(path)
    (problem,) = found.warnings
    assert (problem.code, problem.where, problem.severity) == ("duplicate-rows", "recipe:data.train", "warning")
    assert "2 of 23 rows (8.7%)" in problem.message
    assert f"{path}:22 repeats {path}:4" in problem.message
    assert f"{path}:24 repeats {path}:1" in problem.message
    assert "--deduplicate" in (problem.fix or "")


def test_a_copy_in_another_file_and_another_format_is_found(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [make_row(n) for n in range(20)])
    turns = [{"role": "user", "content": " Is it  7?\n"}, {"role": "assistant", "content": "yes"}]
    second = write(tmp_path / "b.jsonl", [{"messages": turns}])
    found = scan((first, second))
    assert f"{second}:1 repeats {first}:8" in found.warnings[0].message
    assert found.duplicates == 1


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "no"},
        {"system": "Be brief."},
        {"tools": [{"name": "f"}]},
        {"context": "It is."},
    ],
)
def test_rows_that_differ_in_anything_learned_are_no_copies(change: dict[str, Any]) -> None:
    first, second = (
        fingerprint_example(read_example(Row(fields, "x:1"), "auto"))[1]
        for fields in (make_row(1), make_row(1) | change)
    )
    assert first != second


def test_pairs_that_differ_in_the_rejected_answer_are_no_copies() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in ("c", "d", "c")]
    prints = [fingerprint_example(read_example(Row(row, "x:1"), "auto"), with_prompt=True) for row in rows]
    assert prints[0] == prints[2] != prints[1]
    assert prints[0][0] == prints[1][0]


def test_two_labels_on_one_answer_are_no_copies_but_one_prompt() -> None:
    # --deduplicate would otherwise keep the first opinion and drop the other in silence.
    rows = [
        {"prompt": "a", "completion": "b", **label}
        for label in ({"label": True}, {"label": False}, {}, {"label": True})
    ]
    prints = [fingerprint_example(read_example(Row(row, "x:1"), "auto"), with_prompt=True) for row in rows]
    assert prints[0] == prints[3]
    assert len({whole for _, whole in prints}) == 3
    pair = read_example(Row({"prompt": "a", "chosen": "b", "rejected": "c"}, "x:1"), "auto")
    assert {prompt for prompt, _ in prints} == {fingerprint_example(pair, with_prompt=True)[0]}


def test_a_labelled_row_in_both_sets_stops_the_run(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}", "label": n % 2 == 0} for n in range(30)]
    train = write(tmp_path / "a.jsonl", rows[:20])
    evaluation = write(tmp_path / "b.jsonl", rows[19:])
    assert [problem.code for problem in fail(train, evaluation)] == ["leakage"]


def test_answers_to_one_prompt_that_are_judged_differently_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n // 2}.", "completion": f"{n}", "label": n % 2 == 0} for n in range(60)]
    found = scan(write(tmp_path / "a.jsonl", rows))
    assert {index ^ 1 for index in found.held_out} == found.held_out
    assert found.formats == {"labelled": 60}


def test_the_formats_of_both_sets_and_their_first_rows_are_known(tmp_path: Path) -> None:
    labelled = [{"prompt": f"Say {n}.", "completion": f"{n}", "label": True} for n in range(12)]
    train = write(tmp_path / "a.jsonl", [*labelled, {"prompt": "Say it.", "completion": "it"}])
    evaluation = write(tmp_path / "b.jsonl", [make_row(n) for n in range(5)])
    found = scan(train, evaluation)
    assert found.formats == {"labelled": 12, "prompt_completion": 1}
    assert found.all_formats == {"labelled": 12, "prompt_completion": 1, "question_answer": 5}
    places = {"labelled": f"{train}:1", "prompt_completion": f"{train}:13", "question_answer": f"{evaluation}:1"}
    assert found.first_rows == places


def test_calls_that_differ_in_their_arguments_are_no_copies() -> None:
    prints = set()
    for word in ("cheese", "bread"):
        call = {"name": "look_up", "arguments": {"word": word}}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        prints.add(fingerprint_example(read_example(Row({"messages": turns}, "x:1"), "auto"))[1])
    assert len(prints) == 2


@pytest.mark.parametrize("count", [2, 9, 30, 300])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.95])
def test_without_copies_the_held_out_rows_are_a_seeded_sample(tmp_path: Path, count: int, share: float) -> None:
    found = scan(write(tmp_path / "a.jsonl", [make_row(n) for n in range(count)]), seed=7, eval_fraction=share)
    size = min(max(1, round(count * share)), count - 1)  # at least one row, and never all
    assert found.held_out == set(random.Random(7).sample(range(count), size))
    assert found.evaluation_rows == size


def test_the_held_out_rows_of_an_old_run_are_found_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [make_row(n) for n in range(30)])
    assert scan(path, seed=42).held_out == {0, 3, 20}
    assert scan(path, seed=42, eval_fraction=0).held_out == frozenset()
    assert scan(write(tmp_path / "one.jsonl", [make_row(0)])).held_out == frozenset()


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_row_fall_on_the_same_side(tmp_path: Path, seed: int) -> None:
    rows = [make_row(n % 13) for n in range(60)]
    found = scan(write(tmp_path / "a.jsonl", rows), seed=seed, eval_fraction=0.3)
    held_out = {rows[index]["question"] for index in found.held_out}
    trained = {row["question"] for index, row in enumerate(rows) if index not in found.held_out}
    assert len(held_out) == 4
    assert not held_out & trained


def test_copies_of_one_row_cannot_be_split(tmp_path: Path) -> None:
    found = scan(write(tmp_path / "a.jsonl", [make_row(1)] * 20))
    assert (found.held_out, found.evaluation_rows) == (frozenset(), 0)


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (2, 1), (30, 3), (30, 29), (1000, 2), (5000, 500), (20_000, 9_000)]
)
def test_sampling_gives_what_the_standard_library_gives(size: int, count: int) -> None:
    for seed in range(3):
        assert list(sample_indices(size, count, seed)) == random.Random(seed).sample(range(size), count)


def test_a_held_out_row_that_is_trained_on_stops_the_run(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [make_row(n) for n in range(30)])
    evaluation = write(tmp_path / "b.jsonl", [make_row("new"), make_row(4), make_row("other"), make_row(2)])
    (problem,) = fail(train, evaluation)
    assert (problem.code, problem.where) == ("leakage", "recipe:data.eval")
    assert "2 of 4 rows" in problem.message
    assert f"{evaluation}:2 is {train}:5" in problem.message
    assert f"--in {train} --against {evaluation}" in (problem.fix or "")


def test_the_same_file_in_both_sets_is_said_in_one_line(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [make_row(n) for n in range(30)])
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for evaluation in (train, str(tmp_path / "link.jsonl")):
        (problem,) = fail((f"{tmp_path}/a*.jsonl",), evaluation)
        assert problem.code == "leakage"
        assert "both" in problem.message


def test_a_weight_in_the_held_out_set_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [make_row(1)])
    evaluation = write(tmp_path / "b.jsonl", [make_row(2)])
    (problem,) = fail(train, {"source": evaluation, "weight": 2.0})
    assert problem.code == "eval-weight"


@pytest.mark.parametrize(("shared", "others", "warns"), [(4, 0, False), (5, 10, True), (5, 45, False), (6, 45, True)])
def test_many_shared_prompts_are_a_warning(tmp_path: Path, shared: int, others: int, warns: bool) -> None:
    train = write(tmp_path / "a.jsonl", [make_row(n) for n in range(30)])
    rows = [make_row(n, "no") for n in range(shared)] + [make_row(f"new {n}") for n in range(others)]
    found = scan(train, write(tmp_path / "b.jsonl", rows))
    assert list_codes(found) == ["prompt-leakage"] * warns
    if warns:
        assert f"{shared} of {shared + others}" in found.warnings[0].message


@pytest.mark.parametrize(("count", "warns"), [(9, True), (10, False)])
def test_few_rows_are_a_warning(tmp_path: Path, count: int, warns: bool) -> None:
    path = write(tmp_path / "a.jsonl", [make_row(n) for n in range(count)])
    assert list_codes(scan(path, eval_fraction=0.0)) == ["few-rows"] * warns


def test_rows_that_use_tools_or_think_are_noticed(tmp_path: Path) -> None:
    rows: list[Any] = [make_row(n) for n in range(12)]
    assert scan(write(tmp_path / "a.jsonl", rows)).features == frozenset()
    thinking = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "c"}]
    rows += [{"messages": thinking}, make_row(99) | {"tools": [{"name": "f"}]}]
    assert scan(write(tmp_path / "b.jsonl", rows)).features == {"tools", "thinking"}


def test_the_second_pass_gives_the_examples_in_the_order_of_the_first(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{letter}.jsonl", [{"q": letter + str(n)} for n in range(3)]) for letter in "ab"]
    data = DataSection(train=names, columns={"q": "text"})
    examples = list(iterate_examples(find_sources(data.train, "x"), data))
    assert [example.text for example in examples] == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_a_row_that_went_bad_between_the_passes_is_refused(tmp_path: Path) -> None:
    data = DataSection(train=write(tmp_path / "a.jsonl", ["{oops"]))
    with pytest.raises(DataError):
        list(iterate_examples(find_sources(data.train, "x"), data))


def test_a_log_of_many_problems_keeps_the_first_ones() -> None:
    log = ProblemLog()
    for number in range(100_000):
        log.add(Problem("x", str(number)))
    assert len(log.first) == SHOWN_PROBLEMS
    with pytest.raises(DataError, match="99995 more"):
        log.raise_if_any()


MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from config.structured_config import DataSection
from utils.row_checks import scan_rows
scan_rows(DataSection(train=sys.argv[1]), 42, str)
assert "torch" not in sys.modules
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts what the parent process had")
def test_memory_hardly_grows_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (10_000, 100_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"text": "row {n} {"x" * 150}"}}\n' for n in range(count)), encoding="utf-8")
        command = [sys.executable, "-c", MEMORY_SCRIPT, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert (peaks[1] - peaks[0]) / 90_000 < 64, "bytes a row"


def test_a_renamed_column_may_be_empty_in_some_rows_and_absent_in_some_files(tmp_path: Path) -> None:
    # A CSV row with an empty cell was refused, and no recipe could say what would let it pass.
    (tmp_path / "a.csv").write_text("question,ctx,answer\nWho?,Ada wrote it.,Ada\nWhere?,,Oslo\n", encoding="utf-8")
    other = write(tmp_path / "b.jsonl", [{"question": "When?", "answer": "1907"}])
    data = DataSection(train=[str(tmp_path / "a.csv"), str(other)], eval_fraction=0, columns={"ctx": "context"})
    assert scan_rows(data, 42, str).train_rows == 3


def test_a_renamed_column_that_no_row_has_is_refused_before_all_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "Who?", "answer": "Ada"}] * (SHOWN_PROBLEMS + 2))
    with pytest.raises(DataError, match="columns names 'quest', which no row has") as caught:
        scan_rows(DataSection(train=str(path), columns={"quest": "question"}), 42, str)
    assert caught.value.problems[0].code == "missing-column"


def test_answers_to_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    # With many answers to each prompt, the held-out prompts were all trained on, and nothing said so.
    rows = [{"question": f"q {n // 5}", "answer": f"a {n}"} for n in range(200)]
    found = scan(write(tmp_path / "a.jsonl", rows), eval_fraction=0.2)
    held_out = {rows[index]["question"] for index in found.held_out}
    trained = {row["question"] for index, row in enumerate(rows) if index not in found.held_out}
    assert len(found.held_out) == 40
    assert not held_out & trained
    assert not [warning for warning in found.warnings if warning.code == "prompt-leakage"]


def test_few_prompts_over_many_rows_are_split_all_the_same_with_a_warning(tmp_path: Path) -> None:
    rows = [{"question": f"q {n % 4}", "answer": f"a {n}"} for n in range(200)]
    found = scan(write(tmp_path / "a.jsonl", rows), eval_fraction=0.2)
    assert len(found.held_out) == 40
    assert [warning.code for warning in found.warnings] == ["prompt-leakage"]

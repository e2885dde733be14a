"""scripts/prepare_data.py: any kind of file to any other, split, cleaned, whole or not at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunScript
from utils.data_formats import read_examples
from utils.data_loading import load_rows
from utils.data_preparation import Order, Prepared, format_prepared, prepare_rows
from utils.exceptions import DataError, RunError
from utils.fingerprints import fingerprint_example

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
MIXED: list[dict[str, Any]] = [
    {"question": "Who, exactly?", "answer": "\u00c5sa \u201cA\u201d,\r\nat last"},
    {"instruction": "Double.", "input": "2", "output": "4", "level": 3},
    {"prompt": "2 + 2 =", "completion": " 4", "level": 1},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "source": "a"},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "b"},
            {"role": "assistant", "content": "c", "reasoning_content": "d"},
        ],
        "tools": [TOOL],
    },
    {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
    {"text": "Once,\nupon a time"},
    {"prompt": "2 + 2?", "completion": "5", "label": False},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True},
]
NAMES = ("out.jsonl", "out.json", "out.csv", "out.parquet", "out.jsonl.gz", "out.json.gz", "out.csv.gz")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def make_rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"{n}?", "answer": "yes"} for n in range(count)]


def prepare(source: str, target: Path, **settings: Any) -> Prepared:
    return prepare_rows(Order((source,), target, **settings))


def list_prints(path: str | Path) -> list[bytes]:
    """What the rows teach, whatever their format."""
    return [fingerprint_example(example)[1] for example in read_examples(load_rows(str(path)))]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_all_formats_go_into_every_kind_of_file_and_come_back(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "a.jsonl", MIXED)
    prepared = prepare(source, tmp_path / name)
    assert prepared.written == {tmp_path / name: len(MIXED)}
    examples = read_examples(load_rows(str(tmp_path / name)))
    assert [(e.messages, e.rejected, e.text, e.tools, e.label) for e in examples] == [
        (e.messages, e.rejected, e.text, e.tools, e.label) for e in read_examples(load_rows(source))
    ]
    back = prepare(str(tmp_path / name), tmp_path / "back.jsonl")
    assert back.read == prepared.read
    assert list_prints(tmp_path / "back.jsonl") == list_prints(source)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.csv", "out.parquet"])
def test_equal_rows_give_equal_bytes(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "a.jsonl", MIXED)
    contents = []
    for folder in (tmp_path / "x", tmp_path / "y"):
        folder.mkdir()
        prepare(source, folder / name)
        contents.append((folder / name).read_bytes())
    assert contents[0] == contents[1]


def test_numbers_keep_their_type_in_parquet(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "level": 1, "share": 0.5, "good": True, "mixed": 1},
        {"text": "b", "mixed": "x", "tags": ["t"]},
    ]
    prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "out.parquet")
    first, second = load_rows(str(tmp_path / "out.parquet"))
    assert first.fields == {"text": "a", "level": 1, "share": 0.5, "good": True, "mixed": "1"}
    assert second.fields == {"text": "b", "mixed": "x", "tags": '["t"]'}


def test_copies_and_known_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = make_rows(10)
    source = write(tmp_path / "a.jsonl", [*rows, rows[2], {"prompt": "3?", "completion": " yes"}])
    known = write(tmp_path / "b.jsonl", [rows[2], rows[5], {"text": "other"}])
    prepared = prepare(source, tmp_path / "out.jsonl", deduplicate=True, against=(known,))
    assert (prepared.duplicates, prepared.known) == (2, 2)
    assert [row.fields for row in load_rows(str(tmp_path / "out.jsonl"))] == [
        row for number, row in enumerate(rows) if number not in (2, 5)
    ]


def test_a_split_writes_two_files_that_share_no_row(tmp_path: Path) -> None:
    rows = make_rows(50)
    prepared = prepare(write(tmp_path / "a.jsonl", rows + rows[:10]), tmp_path / "out.jsonl.gz", split=0.2)
    train, evaluation = (set(list_prints(path)) for path in prepared.written)
    assert [path.name for path in prepared.written] == ["out.jsonl.gz", "out_eval.jsonl.gz"]
    assert len(evaluation) == 10
    assert len(train) == 40
    assert not train & evaluation


def test_answers_to_one_question_stay_on_one_side_of_a_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"answer {k}"} for n in range(50) for k in range(2)]
    prepared = prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl", split=0.2)
    train, evaluation = ([row.fields["prompt"] for row in load_rows(str(path))] for path in prepared.written)
    assert (len(train), len(evaluation)) == (80, 20)
    assert not set(train) & set(evaluation)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.b.jsonl", "a.b_eval.jsonl"), ("a.csv.gz", "a_eval.csv.gz"), ("v1.2.json.gz", "v1.2_eval.json.gz")],
)
def test_the_second_file_is_named_after_the_first(name: str, expected: str) -> None:
    assert Order((), Path("x") / name).eval_target == Path("x") / expected


def test_rows_that_the_target_cannot_hold_are_counted_and_nothing_is_written(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", MIXED)
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out.jsonl", to="alpaca")
    assert [problem.where for problem in caught.value.problems] == [f"{source}:{line}" for line in (5, 6, 7, 8, 9)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_rows_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*make_rows(3), "{oops", {"text": ""}])
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out.csv")
    assert [problem.where for problem in caught.value.problems] == [f"{source}:4", f"{source}:5"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("name", ["out.xlsx", "out", "out.parquet.gz", "none/out.jsonl"])
def test_a_target_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError):
        prepare(write(tmp_path / "a.jsonl", MIXED), tmp_path / name)


@pytest.mark.parametrize("existing", ["out.jsonl", "out_eval.jsonl"])
def test_an_existing_file_is_never_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(RunError, match="exists"):
        prepare(write(tmp_path / "a.jsonl", make_rows(9)), tmp_path / "out.jsonl", split=0.5)
    assert (tmp_path / existing).read_text() == "mine"


def test_a_text_that_a_table_would_turn_into_messages_is_refused(tmp_path: Path) -> None:
    row = {"prompt": json.dumps([{"role": "user", "content": "a"}]), "completion": "b"}
    source = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match="cannot tell"):
        prepare(source, tmp_path / "out.csv")
    assert prepare(source, tmp_path / "out.jsonl").written


def test_nothing_left_to_write_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", make_rows(3))
    known = write(tmp_path / "b.jsonl", make_rows(3))
    with pytest.raises(DataError, match="no row is left"):
        prepare(source, tmp_path / "out.jsonl", against=(known,))
    with pytest.raises(DataError, match="nothing to split"):
        prepare(write(tmp_path / "c.jsonl", make_rows(1) * 3), tmp_path / "out.jsonl", split=0.5)
    assert not (tmp_path / "out.jsonl").exists()


def test_columns_that_another_format_reads_are_named_when_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "text": "c", "id": 1}] * 3)
    order = Order((source,), tmp_path / "out.jsonl", to="messages")
    lines = list(format_prepared(order, prepare_rows(order)))
    assert any("column text of 3 rows was left out" in line for line in lines)
    assert load_rows(str(order.target))[0].fields["id"] == 1


def test_what_is_wrong_with_columns_is_said_in_words_of_the_option(tmp_path: Path, run_script: RunScript) -> None:
    # The messages named data.columns, a key of recipes.
    write(tmp_path / "a.jsonl", [{"q": "a?", "reply": "b"}])
    done = run_script(
        "prepare_data",
        "--in",
        "a.jsonl",
        "--out",
        "b.jsonl",
        "--columns",
        "none=question",
        "--to",
        "messages",
        cwd=tmp_path,
    )
    assert done.returncode == 3
    assert "--columns names 'none', which no row has" in done.stderr
    write(tmp_path / "c.jsonl", [{"query": "a?", "solution": "b"}])
    done = run_script("prepare_data", "--in", "c.jsonl", "--out", "b.jsonl", cwd=tmp_path)
    assert "--columns query=question solution=answer, or" in done.stderr
    assert "data.columns" not in done.stderr


def test_the_script_converts_splits_and_says_what_comes_next(tmp_path: Path, run_script: RunScript) -> None:
    source = tmp_path / "a.jsonl.gz"
    source.write_bytes(gzip.compress("".join(f'{{"q": "{n}?", "a": "yes"}}\n' for n in range(20)).encode()))
    arguments = ("--columns", "q=question", "a=answer", "--to", "messages", "--split", "0.1", "--deduplicate")
    done = run_script("prepare_data", "--in", "a.jsonl.gz", "--out", "rows.jsonl", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "question_answer" in done.stdout
    assert "--set data.train=rows.jsonl --set data.eval=rows_eval.jsonl" in done.stdout.splitlines()[-1]
    assert len(load_rows(str(tmp_path / "rows.jsonl"))) == 18
    assert set(load_rows(str(tmp_path / "rows_eval.jsonl"))[0].fields) == {"messages"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--in", "none.jsonl", "--out", "b.jsonl"), 3),
        (("--in", "a.jsonl", "--out", "a.jsonl"), 5),
        (("--in", "a.jsonl", "--out", "b.jsonl", "--split", "2"), 2),
        (("--in", "a.jsonl", "--out", "b.jsonl", "--columns", "question"), 2),
        (("--in", "a.jsonl", "--out", "b.jsonl", "--to", "csv"), 2),
    ],
)
def test_bad_arguments_have_the_documented_exit_code_and_leave_nothing(
    tmp_path: Path, run_script: RunScript, arguments: tuple[str, ...], code: int
) -> None:
    write(tmp_path / "a.jsonl", make_rows(3))
    done = run_script("prepare_data", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_carriage_return_in_a_cell_is_read_back(tmp_path: Path) -> None:
    # Python's writer left it unquoted, and its reader then refused the file.
    source = write(tmp_path / "a.jsonl", [{"question": "one\rtwo", "answer": "b"}] * 2)
    order = Order((source,), tmp_path / "out.csv")
    prepare_rows(order)
    assert [row.fields["question"] for row in load_rows(str(order.target))] == ["one\rtwo"] * 2


@pytest.mark.parametrize("value", ["NaN", '"\\ud800"'])
def test_a_value_that_json_cannot_hold_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "a", "answer": "b", "note": {value}}}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare_rows(Order((str(path),), tmp_path / "out.jsonl"))
    assert caught.value.problems[0].where == f"{path}:1"
    assert not (tmp_path / "out.jsonl").exists()

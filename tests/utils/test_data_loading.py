"""Data files become rows that know their line, and whatever is wrong with a file is said at once, with its place."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from utils import file_lines
from utils.data_loading import (
    SHOWN_PROBLEMS,
    Row,
    iterate_batches,
    iterate_file,
    load_rows,
    read_text_lines,
    rename_row,
)
from utils.exceptions import DataError, Problem


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def fail(path: str | list[str]) -> DataError:
    with pytest.raises(DataError) as caught:
        load_rows(path)
    return caught.value


def test_jsonl_rows_come_in_order_and_know_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "två"}\n')
    assert load_rows(path) == [Row({"text": "one"}, f"{path}:1"), Row({"text": "två"}, f"{path}:2")]


def test_the_last_line_needs_no_line_break(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}')
    assert [row.fields["text"] for row in load_rows(path)] == ["one", "two"]


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"text": "one"}\n  \n\n{"text": "two"}\n\n')
    assert [row.where for row in load_rows(path)] == [f"{path}:2", f"{path}:5"]


def test_windows_line_ends_and_a_byte_order_mark_leave_no_trace(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert load_rows(path) == [Row({"text": "one"}, f"{path}:1"), Row({"text": "two"}, f"{path}:3")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_unicode_line_separator_inside_a_string_does_not_split_its_row(tmp_path: Path, separator: str) -> None:
    # str.splitlines breaks at these characters, which JSON allows unescaped inside a string.
    path = write(tmp_path / "a.jsonl", f'{{"text": "one{separator}more"}}\n{{"text": "two"}}\n')
    rows = load_rows(path)
    assert [row.fields["text"] for row in rows] == [f"one{separator}more", "two"]
    assert rows[1].where == f"{path}:2"


def test_the_rows_of_a_json_array_know_the_line_on_which_they_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n[\n  {"text": "one"},\n  {\n    "text": "two"\n  }, {"text": "three"}\n]\n')
    rows = load_rows(path)
    assert [row.fields["text"] for row in rows] == ["one", "two", "three"]
    assert [row.where for row in rows] == [f"{path}:3", f"{path}:4", f"{path}:6"]


def test_a_json_array_on_one_line_behind_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'\xef\xbb\xbf[{"text": "one"},{"text": "two"}]')
    assert [row.where for row in load_rows(path)] == [f"{path}:1", f"{path}:1"]


def test_a_json_array_that_breaks_off_is_refused_with_its_line(tmp_path: Path) -> None:
    error = fail(write(tmp_path / "a.json", '[\n{"text": "one"},\n{"text": "tw'))
    assert error.problems[0].code == "not-json"
    assert error.problems[0].where == f"{tmp_path}/a.json:3"


@pytest.mark.parametrize("content", ['[{"text": "one"},', '[{"text": "one"}', "["])
def test_a_json_array_without_its_closing_bracket_is_refused(tmp_path: Path, content: str) -> None:
    assert fail(write(tmp_path / "a.json", content)).problems[0].code == "not-json"


@pytest.mark.parametrize("tail", ['[{"text": "two"}]', '{"text": "two"}', "rubbish"])
def test_text_behind_a_json_array_is_refused(tmp_path: Path, tail: str) -> None:
    # Reading stopped at the first `]`, so the rows of a second, concatenated array were lost without a word.
    error = fail(write(tmp_path / "a.json", f'[{{"text": "one"}}]\n{tail}\n'))
    assert error.problems[0].where == f"{tmp_path}/a.json:2"


def test_elements_of_a_json_array_that_are_no_objects_are_refused_with_their_lines(tmp_path: Path) -> None:
    error = fail(write(tmp_path / "a.json", '[\n{"text": "one"},\n3,\n"x"\n]'))
    assert [problem.where for problem in error.problems] == [f"{tmp_path}/a.json:3", f"{tmp_path}/a.json:4"]


def test_several_files_are_read_one_behind_the_other(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    second = write(tmp_path / "b.json", '[{"text": "two"}]')
    assert [row.where for row in load_rows([first, second])] == [f"{first}:1", f"{second}:1"]


def test_all_bad_rows_are_counted_and_the_first_ones_shown(tmp_path: Path) -> None:
    bad = SHOWN_PROBLEMS + 4
    error = fail(write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + "{oops\n" * bad + "[1]\n"))
    shown = error.problems[:SHOWN_PROBLEMS]
    assert [problem.where for problem in shown] == [
        f"{tmp_path}/a.jsonl:{2 + index}" for index in range(SHOWN_PROBLEMS)
    ]
    assert len(error.problems) == SHOWN_PROBLEMS + 1
    assert f"{bad + 1 - SHOWN_PROBLEMS} more" in error.problems[-1].message


def test_bad_rows_of_all_files_are_reported_together(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, "{oops\n") for name in ("a.jsonl", "b.jsonl")]
    assert [problem.where for problem in fail(paths).problems] == [f"{path}:1" for path in paths]


@pytest.mark.parametrize("line", ["3", '"text"', "null", "true", '{"text": "a"} {"text": "b"}', "{'text': 'a'}"])
def test_a_line_that_is_not_one_json_object_is_refused(tmp_path: Path, line: str) -> None:
    error = fail(write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n{line}\n'))
    assert [problem.where for problem in error.problems] == [f"{tmp_path}/a.jsonl:2"]


def test_deep_nesting_is_a_bad_row_and_no_crash(tmp_path: Path) -> None:
    error = fail(write(tmp_path / "a.jsonl", '{"text": ' + "[" * 200_000 + "\n"))
    assert error.problems[0].code == "not-json"


def test_a_number_with_too_many_digits_is_a_bad_row_and_no_crash(tmp_path: Path) -> None:
    # Python refuses integers over 4300 digits with a plain ValueError, which was not caught.
    error = fail(write(tmp_path / "a.jsonl", '{"text": "a", "id": ' + "9" * 5000 + "}\n"))
    assert error.problems[0].where == f"{tmp_path}/a.jsonl:1"


def test_a_missing_file_gets_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    error = fail(str(tmp_path / "trian.jsonl"))
    assert error.problems[0].code == "no-file"
    assert error.problems[0].fix == f"did you mean {tmp_path}/train.jsonl?"


def test_a_missing_file_unlike_any_other_gets_a_list(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", "{}")
    write(tmp_path / "notes.txt", "")
    fix = fail(str(tmp_path / "zzz.json")).problems[0].fix or ""
    assert "rows.jsonl" in fix
    assert "notes.txt" not in fix


def test_a_file_in_a_missing_folder_names_the_folder(tmp_path: Path) -> None:
    fix = fail(str(tmp_path / "none" / "a.jsonl")).problems[0].fix or ""
    assert f"{tmp_path}/none does not exist" in fix


def test_a_folder_is_not_a_data_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    error = fail(str(folder))
    assert "folder" in error.problems[0].message
    assert error.problems[0].where == str(folder)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.txt", "rows", "rows.gz", "rows.parquet.gz", "rows.zip"])
def test_a_file_of_another_kind_is_refused_by_its_ending(tmp_path: Path, name: str) -> None:
    (problem,) = fail(write(tmp_path / name, '{"text": "a"}')).problems
    assert problem.code == "unknown-file"
    assert ".jsonl" in (problem.fix or "")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.json", "[ ]\n")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    error = fail(write(tmp_path / name, content))
    assert error.problems[0].code == "no-rows"
    assert error.problems[0].where == f"{tmp_path}/{name}"


def test_a_file_that_is_not_utf_8_is_refused_with_the_line_of_the_first_bad_byte(tmp_path: Path) -> None:
    error = fail(write(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": "caf\u00e9"}\n'.encode("latin-1")))
    assert error.problems[0].where == f"{tmp_path}/a.jsonl:2"
    assert error.problems[0].fix == "save it as UTF-8"


def test_a_data_error_exits_with_3(tmp_path: Path) -> None:
    assert fail(str(tmp_path / "none.jsonl")).exit_code == 3


def test_columns_are_renamed_and_the_others_kept() -> None:
    row = rename_row(
        Row({"question": "q", "answer": "a", "level": 1}, "x:1"), {"question": "prompt", "answer": "completion"}
    )
    assert row == Row({"prompt": "q", "completion": "a", "level": 1}, "x:1")


def test_two_columns_can_swap_their_names() -> None:
    row = rename_row(Row({"a": 1, "b": 2}, "x:1"), {"a": "b", "b": "a"})
    assert row == Row({"a": 2, "b": 1}, "x:1")


def test_renaming_onto_a_column_that_exists_is_refused() -> None:
    # One of the two values was thrown away without a word; which one depended on the order of the row's keys.
    found = rename_row(Row({"question": "q", "prompt": "p", "completion": "c"}, "x:1"), {"question": "prompt"})
    assert isinstance(found, Problem)
    assert (found.code, found.where) == ("column-collision", "x:1")


def test_batches_are_consecutive_and_the_last_may_be_smaller() -> None:
    assert list(iterate_batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]


def test_lines_of_a_prompt_file_are_read_without_the_empty_ones(tmp_path: Path) -> None:
    assert read_text_lines(Path(write(tmp_path / "p.txt", "one\n\n two\u2028 half\n"))) == ["one", " two\u2028 half"]


def test_windows_line_ends_and_a_byte_order_mark_do_not_get_into_prompts(tmp_path: Path) -> None:
    assert read_text_lines(Path(write(tmp_path / "p.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"))) == ["one", "two"]


@pytest.mark.parametrize("content", ["", "\n\n", b"caf\xe9"])
def test_a_prompt_file_that_is_empty_or_unreadable_is_refused(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(DataError):
        read_text_lines(Path(write(tmp_path / "p.txt", content)))


def test_a_row_is_what_json_says(tmp_path: Path) -> None:
    fields = {"messages": [{"role": "user", "content": 'a\nb\t"c" \U0001f3b5'}], "level": 1.5, "none": None}
    assert load_rows(write(tmp_path / "a.ndjson", json.dumps(fields)))[0].fields == fields


ROWS: list[dict[str, Any]] = [{"text": "one, two", "id": "1"}, {"text": 'tw\u00f6 "quoted"\nlines', "id": "2"}]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


KINDS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.json": write_json,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("is_gzip", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, is_gzip: bool) -> None:
    path = tmp_path / name
    KINDS[name](path, ROWS)
    if is_gzip:
        if name == "a.parquet":
            pytest.skip("Parquet is compressed inside")
        packed = tmp_path / f"{name}.GZ"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    rows = load_rows(str(path))
    assert [row.fields for row in rows] == ROWS
    assert all(row.where.startswith(f"{path}:") for row in rows)


def test_a_row_of_a_csv_file_knows_the_line_on_which_it_starts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,id\n"one\nmore\nlines",1\n\ntwo,2\n')
    assert load_rows(path) == [
        Row({"text": "one\nmore\nlines", "id": "1"}, f"{path}:2"),
        Row({"text": "two", "id": "2"}, f"{path}:6"),
    ]


def test_an_empty_cell_of_a_csv_file_is_absent(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufeffinstruction,input,output\r\nSing.,,La\r\n")
    assert load_rows(path)[0].fields == {"instruction": "Sing.", "output": "La"}


@pytest.mark.parametrize(
    ("cell", "value"),
    [("true", True), ("True", True), ("TRUE", True), ("false", False), ("FALSE", False), ("yes", "yes"), ("1", "1")],
)
def test_the_label_of_a_csv_file_is_true_or_false_as_programs_write_it(tmp_path: Path, cell: str, value: Any) -> None:
    path = write(tmp_path / "a.csv", f"prompt,completion,label\nTrue?,true,{cell}\n")
    assert load_rows(path)[0].fields == {"prompt": "True?", "completion": "true", "label": value}


@pytest.mark.parametrize("line", ["one", "one,2,3", 'one,"2"x', "one,\xff2"])
def test_a_bad_line_of_a_csv_file_is_refused_with_its_number_and_the_others_are_read(tmp_path: Path, line: str) -> None:
    content = f"text,id\nfine,1\n{line}\nfine,3\n".encode("latin-1")
    (problem,) = fail(write(tmp_path / "a.csv", content)).problems
    assert problem.where == f"{tmp_path}/a.csv:3"


def test_a_quote_that_never_ends_is_refused_where_it_starts(tmp_path: Path) -> None:
    # csv's default swallows the rest of the file into one cell without a word.
    (problem,) = fail(write(tmp_path / "a.csv", 'text,id\nfine,1\n"two,2\nthree,3\n')).problems
    assert (problem.code, problem.where) == ("not-csv", f"{tmp_path}/a.csv:3")


@pytest.mark.parametrize(
    ("content", "word"), [("text;id\na;1\n", "commas"), ("text\tid\na\t1\n", "commas"), ("a,a\n1,2\n", "'a'")]
)
def test_a_csv_header_that_cannot_be_meant_is_refused(tmp_path: Path, content: str, word: str) -> None:
    error = fail(write(tmp_path / "a.csv", content))
    assert error.problems[0].where == f"{tmp_path}/a.csv:1"
    assert word in str(error)


def test_lists_of_messages_in_tables_are_json_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    row = {"messages": json.dumps(messages), "prompt": json.dumps(messages[:1]), "completion": "[1] is a list"}
    write_csv(tmp_path / "a.csv", [row])
    fields = load_rows(str(tmp_path / "a.csv"))[0].fields
    assert fields == {"messages": messages, "prompt": messages[:1], "completion": "[1] is a list"}


def test_keys_that_parquet_adds_to_structs_are_absent(tmp_path: Path) -> None:
    # All structs of an Arrow column have the same keys: a user's message came back with tool_calls null.
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh", "tool_call_id": "1"}]
    write_parquet(tmp_path / "a.parquet", [{"messages": messages, "level": None}, {"messages": messages, "level": 1}])
    rows = load_rows(str(tmp_path / "a.parquet"))
    assert rows[0] == Row({"messages": messages}, f"{tmp_path}/a.parquet:1")
    assert rows[1].where == f"{tmp_path}/a.parquet:2"


def test_bad_bytes_in_a_parquet_file_are_a_data_error(tmp_path: Path) -> None:
    # Arrow reads them without a word, and decoding a cell raised a UnicodeDecodeError of its own.
    offsets, content = pyarrow.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pyarrow.py_buffer(b"\xc3\x28")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, content])
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert fail(str(tmp_path / "a.parquet")).problems[0].code == "unreadable"


def test_rows_of_many_parquet_batches_are_numbered_without_a_gap(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": str(number)} for number in range(1, 2501)])
    rows = load_rows(str(tmp_path / "a.parquet"))
    assert [row.where for row in rows] == [f"{tmp_path}/a.parquet:{row.fields['text']}" for row in rows]
    assert len(rows) == 2500


@pytest.mark.parametrize("cut", [10, 60])
def test_a_gzip_file_that_breaks_off_is_refused(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(("".join(json.dumps({"text": str(n)}) + "\n" for n in range(500))).encode())
    error = fail(write(tmp_path / "a.jsonl.gz", packed[:-cut]))
    assert error.problems[0].code == "unreadable"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_file_that_is_not_what_its_ending_says_is_refused(tmp_path: Path, name: str) -> None:
    assert fail(write(tmp_path / name, '{"text": "a"}\n')).problems[0].code == "unreadable"


def test_a_file_in_utf_16_is_refused_once(tmp_path: Path) -> None:
    (problem,) = fail(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\n'.encode("utf-16"))).problems
    assert "UTF-16" in problem.message


def test_one_json_object_over_several_lines_is_refused_once(tmp_path: Path) -> None:
    (problem,) = fail(write(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=2))).problems
    assert "array" in (problem.fix or "")


def test_bad_bytes_are_a_problem_of_their_line_alone(tmp_path: Path) -> None:
    error = fail(write(tmp_path / "a.jsonl", b'{"text": "\xff"}\n{"text": "fine"}\n{oops\n{"text": "\xfe"}\n'))
    assert [problem.where for problem in error.problems] == [f"{tmp_path}/a.jsonl:{line}" for line in (1, 3, 4)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_without_end_is_a_problem_and_not_all_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(file_lines, "LONGEST_LINE", 100)
    monkeypatch.setattr(file_lines, "CHUNK", 16)
    rows = (
        ["text", "fine", "x" * 200, "fine"] if name == "a.csv" else ['{"text": "fine"}', "x" * 200, '{"text": "fine"}']
    )
    (problem,) = fail(write(tmp_path / name, "\n".join(rows))).problems
    assert (problem.code, problem.where) == ("long-line", f"{tmp_path}/{name}:{len(rows) - 1}")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_rows_are_the_same_however_the_file_is_cut_into_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "\u00e5\u00e4\u00f6"}\r\n\n\n{"text": "\U0001f3b5"}\n{"text": "c"}')
    monkeypatch.setattr(file_lines, "CHUNK", max(chunk, 4))
    assert [(row.fields["text"], row.where[-1]) for row in load_rows(path)] == [
        ("\u00e5\u00e4\u00f6", "1"),
        ("\U0001f3b5", "4"),
        ("c", "5"),
    ]


def test_a_linked_file_is_read_like_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    assert load_rows(str(tmp_path / "link.jsonl"))[0].where == f"{tmp_path}/link.jsonl:1"


def test_rows_of_a_large_file_come_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, '{"text": "one"}\n' * 200_000 + "{oops\n")
    assert next(iterate_file(path)) == Row({"text": "one"}, f"{path}:1")

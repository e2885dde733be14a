"""Each row format becomes the same kind of example, and a row that does not fit is refused with its place and reason."""

from __future__ import annotations

from typing import Any

import pytest

from utils.data_formats import READERS, Example, FormatName, detect_format, read_example, read_examples
from utils.data_loading import SHOWN_PROBLEMS, Row
from utils.exceptions import DataError, Problem

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS: dict[FormatName, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "prompt_completion": {"prompt": "2 + 2 =", "completion": " 4"},
    "alpaca": {"instruction": "Translate.", "input": "cheese", "output": "fromage"},
    "text": {"text": "Once upon a time"},
}


def read(fields: dict[str, Any], name: FormatName | str = "auto") -> Example:
    return read_example(Row(fields, "rows.jsonl:7"), name)  # type: ignore[arg-type]


def fail(fields: dict[str, Any], name: FormatName | str = "auto") -> Problem:
    with pytest.raises(DataError) as caught:
        read(fields, name)
    (problem,) = caught.value.problems
    assert problem.where == "rows.jsonl:7"
    return problem


def test_every_format_has_a_row_here() -> None:
    assert set(ROWS) == set(READERS)


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_found_by_its_columns_and_read_like_the_named_one(name: FormatName) -> None:
    assert detect_format(Row(ROWS[name], "x:1")) == name
    example = read(ROWS[name])
    assert example.format == name
    assert example == read(ROWS[name], name)


@pytest.mark.parametrize("name", ROWS)
def test_an_example_keeps_its_whole_row_and_place(name: FormatName) -> None:
    fields = {**ROWS[name], "database": "CREATE TABLE t (a)", "level": 3}
    example = read(fields)
    assert example.fields == fields
    assert example.where == "rows.jsonl:7"


def test_messages_are_read_as_written() -> None:
    example = read({"messages": [SYSTEM, USER, ASSISTANT, USER, {"role": "assistant", "content": "\n  Bye \n"}]})
    assert example.messages == (SYSTEM, USER, ASSISTANT, USER, {"role": "assistant", "content": "\n  Bye \n"})
    assert example.prompt == (SYSTEM, USER, ASSISTANT, USER)
    assert example.answer == "\n  Bye \n"
    assert example.text is None


def test_prompt_and_completion_keep_the_space_between_them() -> None:
    assert read(ROWS["prompt_completion"]).messages == (
        {"role": "user", "content": "2 + 2 ="},
        {"role": "assistant", "content": " 4"},
    )


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    example = read({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]})
    assert example.messages == (SYSTEM, USER, ASSISTANT)
    assert example.format == "prompt_completion"


def test_a_message_list_with_a_text_completion_is_refused() -> None:
    assert fail({"prompt": [USER], "completion": "Hello!"}).code == "not-text"
    assert fail({"prompt": "Hi", "completion": [ASSISTANT]}).code == "not-text"


def test_text_is_kept_as_it_is() -> None:
    example = read({"text": "  Once\n"})
    assert example.text == "  Once\n"
    assert example.messages == ()


def test_alpaca_with_input_shows_the_templates_both_parts() -> None:
    user, assistant = read(ROWS["alpaca"]).messages
    assert user == {
        "role": "user",
        "content": "Translate.\n\ncheese",
        "instruction": "Translate.",
        "input": "cheese",
    }
    assert assistant == {"role": "assistant", "content": "fromage"}


@pytest.mark.parametrize("fields", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_is_the_instruction_alone(fields: dict[str, Any]) -> None:
    messages = read({"instruction": "Sing.", "output": "La", **fields}).messages
    assert messages == ({"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La"})


def test_alpaca_with_system_starts_with_it() -> None:
    messages = read({**ROWS["alpaca"], "system": "Be brief."}).messages
    assert messages[0] == SYSTEM
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize("system", ["", None])
def test_alpaca_with_an_empty_system_has_none(system: str | None) -> None:
    assert [message["role"] for message in read({**ROWS["alpaca"], "system": system}).messages] == ["user", "assistant"]


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}, True])
@pytest.mark.parametrize("column", ["instruction", "input", "output", "system"])
def test_alpaca_parts_that_are_not_text_are_refused(column: str, value: Any) -> None:
    assert fail({**ROWS["alpaca"], column: value}).code == "not-text"


@pytest.mark.parametrize("value", [0, [], {}, False])
@pytest.mark.parametrize("column", ["input", "system"])
def test_alpaca_parts_that_are_not_text_are_refused_even_if_they_are_falsy(column: str, value: Any) -> None:
    # `fields.get("input") or ""` dropped an input of 0 in silence, so «Double this number.» was learned without its number.
    assert fail({**ROWS["alpaca"], column: value}).code == "not-text"


def test_rows_of_different_formats_may_be_mixed() -> None:
    examples = read_examples([Row(fields, f"x:{index}") for index, fields in enumerate(ROWS.values(), 1)])
    assert [example.format for example in examples] == list(ROWS)


def test_messages_win_over_other_columns() -> None:
    assert read({**ROWS["text"], **ROWS["prompt_completion"], **ROWS["messages"]}).format == "messages"


def test_a_named_format_wins_over_detection() -> None:
    assert read({**ROWS["text"], **ROWS["messages"]}, "text").text == "Once upon a time"


@pytest.mark.parametrize("name", ROWS)
def test_a_named_format_asks_for_its_columns(name: FormatName) -> None:
    problem = fail({"foo": "a"}, name)
    assert problem.code == "missing-column"
    assert "foo" in (problem.fix or "")


def test_columns_of_no_known_format_are_refused_with_the_known_ones() -> None:
    problem = fail({"question": "a", "answer": "b"})
    assert problem.code == "unknown-format"
    assert "question, answer" in problem.message
    for name in READERS:
        assert name in (problem.fix or "")


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("prompt_completion", "prompt"),
        ("prompt_completion", "completion"),
        ("alpaca", "instruction"),
        ("alpaca", "output"),
        ("text", "text"),
    ],
)
def test_empty_text_is_refused(name: FormatName, column: str, text: str) -> None:
    problem = fail({**ROWS[name], column: text}, name)
    assert problem.code == "empty"
    assert column in problem.message


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}])
@pytest.mark.parametrize(("name", "column"), [("prompt_completion", "completion"), ("text", "text")])
def test_what_is_not_text_is_refused(name: FormatName, column: str, value: Any) -> None:
    assert fail({**ROWS[name], column: value}, name).code == "not-text"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        (None, "not-text"),
        (3, "not-text"),
        ([{"type": "text", "text": "a"}], "not-text"),
    ],
)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_message_without_text_is_refused_with_its_number(index: int, content: Any, code: str) -> None:
    messages = [SYSTEM, USER, ASSISTANT]
    messages[index] = {**messages[index], "content": content}
    problem = fail({"messages": messages})
    assert problem.code == code
    assert f"message {index + 1}" in problem.message


@pytest.mark.parametrize("role", ["human", "gpt", "tool", "", None, 3, ["user"], "User"])
def test_an_unknown_role_is_refused(role: Any) -> None:
    problem = fail({"messages": [{"role": role, "content": "a"}, ASSISTANT]})
    assert problem.code == "unknown-role"
    assert "system, user, assistant" in (problem.fix or "")


@pytest.mark.parametrize(
    "messages",
    [
        [ASSISTANT],
        [ASSISTANT, USER, ASSISTANT],
        [USER, USER, ASSISTANT],
        [USER, ASSISTANT, ASSISTANT],
        [SYSTEM, ASSISTANT],
        [SYSTEM, SYSTEM, USER, ASSISTANT],
        [USER, SYSTEM, ASSISTANT],
        [USER, ASSISTANT, SYSTEM, USER, ASSISTANT],
    ],
)
def test_messages_out_of_order_are_refused(messages: list[dict[str, str]]) -> None:
    assert fail({"messages": messages}).code == "role-order"


@pytest.mark.parametrize("messages", [[USER], [SYSTEM], [SYSTEM, USER], [USER, ASSISTANT, USER]])
def test_a_conversation_that_does_not_end_with_the_assistant_is_refused(messages: list[dict[str, str]]) -> None:
    assert fail({"messages": messages}).code == "no-answer"


@pytest.mark.parametrize(
    "value", [[], None, "Hi", {"role": "user"}, ["Hi"], [None], [{"role": "user"}], [{"content": "Hi"}]]
)
def test_what_is_not_a_list_of_messages_is_refused(value: Any) -> None:
    assert fail({"messages": value}).code == "not-messages"


def test_parts_of_a_message_that_would_be_lost_are_refused() -> None:
    # Only role and content were kept: an assistant's tool call vanished, and the model learned the answer without it.
    call = {"function": {"name": "look_up", "arguments": {}}}
    fail({"messages": [USER, {**ASSISTANT, "tool_calls": [call]}]})


def test_all_bad_rows_are_counted_and_the_first_ones_shown() -> None:
    rows = [Row({"text": ""}, f"x:{index}") for index in range(1, SHOWN_PROBLEMS + 4)]
    with pytest.raises(DataError) as caught:
        read_examples([Row({"text": "fine"}, "x:0"), *rows])
    problems = caught.value.problems
    assert [problem.where for problem in problems[:-1]] == [f"x:{index}" for index in range(1, SHOWN_PROBLEMS + 1)]
    assert "3 more" in problems[-1].message


def test_bad_rows_of_all_formats_are_reported_together() -> None:
    rows = [Row({"text": ""}, "x:1"), Row({"messages": [USER]}, "x:2"), Row({"foo": 1}, "x:3")]
    with pytest.raises(DataError) as caught:
        read_examples(rows)
    assert [problem.code for problem in caught.value.problems] == ["empty", "no-answer", "unknown-format"]

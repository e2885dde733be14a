"""Rows of one format become rows of another and come back unchanged; what a format cannot hold is refused, never lost."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from config.structured_config import FormatName
from utils.data_conversion import OPTIONAL_COLUMNS, WRITERS, clean_message, convert_example
from utils.data_formats import READERS, read_example
from utils.data_loading import Row
from utils.examples import Example
from utils.exceptions import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": " Hello!\n"}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "cheese"}}, "id": "a"}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
RESULT = {"role": "tool", "content": "fromage", "tool_call_id": "a", "name": "look_up"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER, ASSISTANT]},
    "system": {"messages": [SYSTEM, USER, ASSISTANT]},
    "several turns": {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
    "thinking": {"messages": [USER, {**ASSISTANT, "reasoning_content": "They greet."}]},
    "tools": {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ASSISTANT],
        "tools": [TOOL],
    },
    "text beside a call": {"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}]},
    "two calls, the last word": {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "b"}]}]
    },
}
SINGLE = ("alpaca", "question_answer")


def read(fields: dict[str, Any]) -> Example:
    return read_example(Row(fields, "rows.jsonl:7"), "auto")


def describe(example: Example) -> Any:
    return [clean_message(message) for message in example.messages], example.tools


def list_cases() -> list[tuple[str, FormatName]]:
    """Every conversation with every format that can hold it."""

    def fits(name: str, to: FormatName) -> bool:
        if to in SINGLE:
            return name in ("one turn", "system")
        return to != "sharegpt" or name != "text beside a call"

    return [(name, to) for name in CONVERSATIONS for to in WRITERS if fits(name, to)]


@pytest.mark.parametrize(("name", "to"), list_cases())
def test_a_conversation_goes_through_another_format_and_comes_back_unchanged(name: str, to: FormatName) -> None:
    example = read(CONVERSATIONS[name])
    there = read(convert_example(example, to))
    assert there.format == to
    assert describe(there) == describe(example)
    back = read(convert_example(there, "messages"))
    assert describe(back) == describe(example)


@pytest.mark.parametrize("to", SINGLE)
@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name not in ("one turn", "system")])
def test_formats_of_one_question_refuse_what_is_more(name: str, to: FormatName) -> None:
    with pytest.raises(DataError) as caught:
        convert_example(read(CONVERSATIONS[name]), to)
    assert caught.value.problems[0].code == "cannot-hold"
    assert caught.value.problems[0].where == "rows.jsonl:7"


OTHERS: dict[FormatName, dict[str, Any]] = {
    "alpaca": {"instruction": "Translate.", "input": "cheese", "output": "fromage", "system": "Be brief."},
    "question_answer": {"question": "Who?", "answer": "Ada.", "context": "Ada wrote it."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "bot", "value": "Hello!"}]},
    "prompt_completion": {"prompt": "2 + 2 =", "completion": " 4"},
}


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("name", OTHERS)
def test_every_format_of_one_question_becomes_every_other(name: FormatName, to: FormatName) -> None:
    example = read(OTHERS[name])
    assert describe(read(convert_example(example, to))) == describe(example)


def test_plain_rows_become_plain_rows() -> None:
    example = read(CONVERSATIONS["one turn"])
    assert convert_example(example, "prompt_completion") == {"prompt": "Hi", "completion": " Hello!\n"}
    assert convert_example(example, "alpaca") == {"instruction": "Hi", "output": " Hello!\n"}
    assert convert_example(example, "question_answer") == {"question": "Hi", "answer": " Hello!\n"}
    assert convert_example(example, "sharegpt") == {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " Hello!\n"}]
    }


def test_a_row_in_the_wanted_format_stays_as_it_is() -> None:
    fields = {**OTHERS["alpaca"], "text": "kept", "level": 3}
    assert convert_example(read(fields), "alpaca") == fields


def test_columns_that_no_format_reads_travel_along() -> None:
    fields = {**OTHERS["alpaca"], "database": "CREATE TABLE t (a)", "text": "of another format"}
    row = convert_example(read(fields), "messages")
    assert set(row) == {"messages", "database"}


PREFERENCE = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
LABELLED = {"prompt": "2 + 2?", "completion": "5", "label": False}


def test_a_labelled_row_stays_as_it_is() -> None:
    assert convert_example(read(LABELLED), "labelled") == LABELLED


@pytest.mark.parametrize(
    ("fields", "to", "word"),
    [
        *(({"text": "Once"}, to, "no turns") for to in get_args(FormatName) if to != "text"),
        *((PREFERENCE, to, "rejected") for to in get_args(FormatName) if to != "preference"),
        (LABELLED, "preference", "rejected"),
        *(
            (LABELLED, to, "its label would be lost")
            for to in get_args(FormatName)
            if to not in ("labelled", "preference")
        ),
        (CONVERSATIONS["one turn"], "labelled", "no label"),
        (CONVERSATIONS["one turn"], "preference", "rejected"),
        (CONVERSATIONS["one turn"], "text", "template"),
    ],
)
def test_what_would_be_lost_or_invented_is_refused(fields: dict[str, Any], to: FormatName, word: str) -> None:
    with pytest.raises(DataError, match=word):
        convert_example(read(fields), to)


def test_text_beside_a_tool_call_does_not_fit_into_sharegpt() -> None:
    calling = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
    with pytest.raises(DataError, match="beside a tool call"):
        convert_example(read({"messages": [USER, calling]}), "sharegpt")


def test_the_columns_of_every_format_are_known() -> None:
    assert set(OPTIONAL_COLUMNS) == set(READERS) == set(get_args(FormatName))

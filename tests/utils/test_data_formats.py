"""Each row format becomes the same kind of example, and a row that does not fit is refused with its place and reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from utils.data_formats import READERS, FormatName, detect_format, read_example, read_examples
from utils.data_loading import SHOWN_PROBLEMS, Row
from utils.examples import Example
from utils.exceptions import DataError, Problem

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS: dict[FormatName, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "preference": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "prompt_completion": {"prompt": "2 + 2 =", "completion": " 4"},
    "alpaca": {"instruction": "Translate.", "input": "cheese", "output": "fromage"},
    "question_answer": {"question": "Who wrote it?", "answer": "Ada."},
    "text": {"text": "Once upon a time"},
    "labelled": {"prompt": "2 + 2?", "completion": "5", "label": False},
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "cheese"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "fromage"}


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
    problem = fail({"frage": "a", "antwort": "b"})
    assert problem.code == "unknown-format"
    assert "frage, antwort" in problem.message
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


@pytest.mark.parametrize("role", ["human", "gpt", "function", "", None, 3, ["user"], "User"])
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
        [USER, RESULT, ASSISTANT],
        [USER, ASSISTANT, RESULT, ASSISTANT],
        [RESULT, ASSISTANT],
        [USER, CALLING, ASSISTANT],
        [USER, CALLING, USER, ASSISTANT],
        [USER, CALLING, RESULT, USER, ASSISTANT],
    ],
)
def test_messages_out_of_order_are_refused(messages: list[dict[str, str]]) -> None:
    assert fail({"messages": messages}).code == "role-order"


@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM], [SYSTEM, USER], [USER, ASSISTANT, USER], [USER, CALLING, RESULT]]
)
def test_a_conversation_that_does_not_end_with_the_assistant_is_refused(messages: list[dict[str, str]]) -> None:
    assert fail({"messages": messages}).code == "no-answer"


@pytest.mark.parametrize(
    "value", [[], None, "Hi", {"role": "user"}, ["Hi"], [None], [{"role": "user"}], [{"content": "Hi"}]]
)
def test_what_is_not_a_list_of_messages_is_refused(value: Any) -> None:
    assert fail({"messages": value}).code == "not-messages"


def test_parts_of_a_message_that_would_be_lost_are_refused() -> None:
    # Only role and content were kept: an assistant's tool call vanished, and the model learned the answer without it.
    assert read({"messages": [USER, CALLING, RESULT, ASSISTANT]}).messages == (USER, CALLING, RESULT, ASSISTANT)
    assert read({"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}]}).messages[-1]["tool_calls"] == [CALL]


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


def test_columns_under_their_usual_other_names_get_the_renaming_to_copy() -> None:
    fix = fail({"instruction": "a", "context": "b", "response": "c"}).fix or ""
    assert "data.columns: {response: output, context: input}" in fix


@pytest.mark.parametrize("name", ROWS)
def test_a_null_column_of_another_format_does_not_decide_the_format(name: FormatName) -> None:
    # Tables of mixed rows have every column in every row.
    empty = {column: None for fields in ROWS.values() for column in fields}
    assert read({**empty, **ROWS[name]}).format == name


def test_preference_is_found_before_prompt_and_messages() -> None:
    # Zephyr's set has prompt, messages, chosen and rejected in each row.
    assert read({**ROWS["messages"], **ROWS["preference"], "completion": "4"}).format == "preference"


ANSWERED = ("messages", "sharegpt", "alpaca", "prompt_completion", "question_answer")


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("name", ANSWERED)
def test_a_label_on_any_row_with_one_answer_makes_it_a_labelled_one(name: FormatName, label: bool) -> None:
    # A bad answer was learned like a good one: its label was a column like any other.
    fields = {**ROWS[name], "label": label}
    plain, example = read(ROWS[name]), read(fields)
    assert (example.format, example.label, example.fields) == ("labelled", label, fields)
    assert (example.messages, example.prompt, example.answer) == (plain.messages, plain.prompt, plain.answer)
    assert plain.label is None
    assert read(fields, "labelled") == example


def test_prompt_and_completion_of_a_labelled_row_may_be_lists_of_messages() -> None:
    example = read({"prompt": [SYSTEM, USER], "completion": [ASSISTANT], "label": True, "tools": [TOOL]})
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant"]
    assert (example.format, example.label, len(example.tools)) == ("labelled", True, 1)


@pytest.mark.parametrize("name", ["auto", "labelled"])
@pytest.mark.parametrize("label", [0, 1, 1.0, "true", "False", "yes", "", [True], "billing"])
def test_a_label_that_is_not_true_or_false_is_refused_with_the_ways_out(label: Any, name: str) -> None:
    problem = fail({**ROWS["messages"], "label": label}, name)
    assert problem.code == "label"
    assert str(label) in problem.message
    assert "without quotes" in (problem.fix or "")
    assert "data.columns" in (problem.fix or "")


def test_a_row_whose_label_is_null_has_none() -> None:
    assert read({**ROWS["messages"], "label": None}).format == "messages"


@pytest.mark.parametrize("name", [*ANSWERED, "preference"])
def test_a_named_format_that_would_not_look_at_a_label_refuses_it(name: FormatName) -> None:
    assert fail({**ROWS[name], "label": False}, name).code == "label"
    assert read({**ROWS[name], "label": "billing"}, name).format == name  # a column of the user's own


def test_raw_text_may_have_a_class_called_label() -> None:
    assert read({"text": "A fine film.", "label": 1}).format == "text"
    assert fail({"text": "A fine film.", "label": True}, "labelled").code == "label"


def test_a_label_without_an_answer_is_no_known_format() -> None:
    assert fail({"sentence": "A fine film.", "label": True}).code == "unknown-format"
    assert fail({"sentence": "A fine film.", "label": True}, "labelled").code == "unknown-format"


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        *(("human", "user"), ("user", "user"), ("gpt", "assistant"), ("assistant", "assistant")),
        *(("model", "assistant"), ("bot", "assistant"), ("chatgpt", "assistant")),
    ],
)
def test_every_name_of_a_sharegpt_role_is_known(speaker: str, role: str) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    turns[role == "assistant"]["from"] = speaker
    assert [message["role"] for message in read({"conversations": turns}).messages] == ["user", "assistant"]


def test_sharegpt_with_tools_becomes_the_same_conversation_as_messages() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "fromage"},
        {"from": "gpt", "value": "Hello!"},
    ]
    example = read({"conversations": turns, "tools": json.dumps([TOOL["function"]])})
    assert example.messages == (SYSTEM, USER, CALLING, RESULT, ASSISTANT)
    assert example.tools == (TOOL,)


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        ({"from": "narrator", "value": "a"}, "unknown-role"),
        ({"from": ["gpt"], "value": "a"}, "unknown-role"),
        ({"from": "gpt"}, "not-messages"),
        ("Hello", "not-messages"),
        ({"from": "gpt", "value": ""}, "empty"),
        ({"from": "gpt", "value": "a", "weight": 0}, "mask-key"),
        ({"from": "function_call", "value": "look_up(cheese)"}, "not-messages"),
        ({"from": "function_call", "value": "3"}, "tool-calls"),
    ],
)
def test_a_sharegpt_turn_that_cannot_be_read_is_refused(turn: Any, code: str) -> None:
    assert fail({"conversations": [{"from": "human", "value": "Hi"}, turn]}).code == code


@pytest.mark.parametrize("name", [name for name in ROWS if name != "text"])
def test_the_columns_system_and_tools_are_read_in_every_format_of_conversations(name: FormatName) -> None:
    example = read({**ROWS[name], "system": "Be brief.", "tools": [TOOL]})
    assert example.messages[0] == SYSTEM
    assert example.tools == (TOOL,)
    assert not example.rejected or example.rejected[0] == SYSTEM


def test_two_different_system_messages_are_refused() -> None:
    fields = {"messages": [SYSTEM, USER, ASSISTANT]}
    assert read({**fields, "system": "Be brief. "}).messages[0] == SYSTEM
    assert fail({**fields, "system": "Be long."}).code == "role-order"


def test_earlier_turns_of_an_alpaca_row_come_first() -> None:
    messages = read({**ROWS["alpaca"], "history": [["Hi", "Hello!"]], "system": "Be brief."}).messages
    assert messages[:3] == (SYSTEM, USER, ASSISTANT)
    assert messages[3]["content"] == "Translate.\n\ncheese"


@pytest.mark.parametrize("history", ["Hi", [["Hi"]], ["Hi", "Hello!"], {"a": 1}])
def test_a_history_that_is_no_list_of_pairs_is_refused(history: Any) -> None:
    assert fail({**ROWS["alpaca"], "history": history}).code == "not-messages"


def test_the_context_of_a_question_comes_before_it() -> None:
    user = read({**ROWS["question_answer"], "context": "Ada wrote it."}).messages[0]
    assert user["content"] == "Ada wrote it.\n\nWho wrote it?"
    assert fail({**ROWS["question_answer"], "context": ["a"]}).code == "not-text"


PAIR = ((USER, ASSISTANT), (USER, {"role": "assistant", "content": "Go away."}))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [PAIR[1][1]]},
        {"prompt": [USER], "chosen": "Hello!", "rejected": "Go away."},
        {"prompt": "Hi", "chosen": [ASSISTANT], "rejected": [PAIR[1][1]]},
        {"chosen": list(PAIR[0]), "rejected": list(PAIR[1])},
        {"prompt": "Hi", "chosen": list(PAIR[0]), "rejected": list(PAIR[1])},
        {"prompt": [USER], "chosen": list(PAIR[0]), "rejected": list(PAIR[1])},
    ],
)
def test_every_shape_of_a_preference_gives_the_same_two_conversations(fields: dict[str, Any]) -> None:
    example = read(fields)
    assert (example.messages, example.rejected) == PAIR


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "Hello!"}, "identical-pair"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": " Hello!\n"}, "identical-pair"),
        ({"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "Ho"}, ASSISTANT]}, "prompts-differ"),
        ({"prompt": "Ho", "chosen": list(PAIR[0]), "rejected": list(PAIR[1])}, "prompts-differ"),
        ({"chosen": "Hello!", "rejected": "Go away."}, "missing-column"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": ""}, "empty"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": None}, "not-text"),
        ({"prompt": [ASSISTANT], "chosen": "Hello!", "rejected": "Go away."}, "role-order"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [ASSISTANT]}, "prompts-differ"),
    ],
)
def test_a_preference_that_teaches_nothing_or_the_wrong_thing_is_refused(fields: dict[str, Any], code: str) -> None:
    assert fail(fields, "preference").code == code


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"name": "look_up", "arguments": '{"word": "cheese"}'},
        {"function": {"name": "look_up", "arguments": '{"word": "cheese"}'}},
    ],
)
def test_every_spelling_of_a_tool_call_becomes_the_same_call(call: dict[str, Any]) -> None:
    example = read({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert example.messages[1] == CALLING
    assert example.answer == ""


def test_an_old_function_call_becomes_a_tool_call() -> None:
    assert read({"messages": [USER, {"role": "assistant", "function_call": CALL["function"]}]}).messages[1] == CALLING


@pytest.mark.parametrize("calls", [None, [], "", "[]", "null"])
def test_no_calls_are_no_calls(calls: Any) -> None:
    # The JSON text of an empty list left an assistant turn with an empty list of calls behind.
    assert read({"messages": [USER, {**ASSISTANT, "tool_calls": calls}]}).messages == (USER, ASSISTANT)


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    call = {"name": "look_up", "arguments": arguments}
    messages = read({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}).messages
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    "calls",
    [3, ["look_up"], [{"arguments": {}}], [{"name": "f", "arguments": "x"}], [{"name": "f", "arguments": "[1]"}]],
)
def test_a_tool_call_that_cannot_be_read_is_refused(calls: Any) -> None:
    assert fail({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}]}).code == "tool-calls"


@pytest.mark.parametrize("tools", [3, {"name": "f"}, ["f"], [{"type": "function"}], [{"name": "f", "parameters": "x"}]])
def test_tools_that_cannot_be_read_are_refused(tools: Any) -> None:
    assert fail({**ROWS["messages"], "tools": tools}).code == "tools"


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    assert read({**ROWS["messages"], "tools": tools}).tools == ()


def test_a_tool_answers_a_call_that_was_made() -> None:
    calling = {**CALLING, "tool_calls": [{**CALL, "id": "a"}, {**CALL, "id": "b"}]}
    results = [{**RESULT, "tool_call_id": "b", "name": "look_up"}, {**RESULT, "tool_call_id": "a"}]
    assert read({"messages": [USER, calling, *results, ASSISTANT]}).messages[2:4] == tuple(results)
    assert fail({"messages": [USER, calling, {**RESULT, "tool_call_id": "c"}, ASSISTANT]}).code == "unknown-call"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_has_one_name(key: str) -> None:
    (_, answer) = read({"messages": [USER, {**ASSISTANT, key: "They greet."}]}).messages
    assert answer == {**ASSISTANT, "reasoning_content": "They greet."}
    assert fail({"messages": [{**USER, key: "They greet."}, ASSISTANT]}).code == "misplaced-key"
    assert read({"messages": [USER, {**ASSISTANT, key: ""}]}).messages == (USER, ASSISTANT)


def test_two_different_thoughts_are_refused() -> None:
    assert fail({"messages": [USER, {**ASSISTANT, "thinking": "a", "reasoning": "b"}]}).code == "reasoning"


@pytest.mark.parametrize("key", ["train", "weight", "loss", "mask", "loss_mask"])
@pytest.mark.parametrize("index", [0, 1])
def test_masks_of_other_tools_are_refused_instead_of_ignored(key: str, index: int) -> None:
    messages = [USER, ASSISTANT]
    messages[index] = {**messages[index], key: False}  # type: ignore[dict-item]
    problem = fail({"messages": messages})
    assert problem.code == "mask-key"
    assert "data.loss_on" in (problem.fix or "")


def test_developer_is_another_word_for_system() -> None:
    assert read({"messages": [{**SYSTEM, "role": "developer"}, USER, ASSISTANT]}).messages[0] == SYSTEM


@pytest.mark.parametrize("role", ["human", "gpt"])
def test_sharegpt_roles_among_messages_get_the_way_to_sharegpt(role: str) -> None:
    assert "conversations" in (fail({"messages": [{"role": role, "content": "a"}, ASSISTANT]}).fix or "")
    turns = [{"from": role, "value": "a"}]
    assert "ShareGPT" in (fail({"messages": turns}).fix or "")


def test_content_in_parts_gets_its_own_way_out() -> None:
    problem = fail({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ASSISTANT]})
    assert problem.fix == "write the content as one text"


@pytest.mark.parametrize("content", ["\ud83d", "a\udfffb"])
@pytest.mark.parametrize("name", ["text", "messages", "prompt_completion"])
def test_half_a_character_is_refused(name: FormatName, content: str) -> None:
    fields = json.loads(json.dumps(ROWS[name]))
    if name == "messages":
        fields["messages"][1]["content"] = content
    else:
        fields[list(fields)[-1]] = content
    assert fail(fields).code == "not-text"


def test_other_alphabets_are_read_as_written() -> None:
    messages = [{"role": "user", "content": "\u4f60\u597d \U0001f3b5"}, {"role": "assistant", "content": "\u00e5"}]
    assert read({"messages": messages}).messages == tuple(messages)


def test_lists_may_be_written_as_json_text_where_only_a_list_can_be_meant() -> None:
    fields = {"messages": json.dumps([USER, ASSISTANT]), "tools": json.dumps([TOOL])}
    assert read(fields).messages == (USER, ASSISTANT)
    assert read(fields).tools == (TOOL,)
    assert read({"prompt": "[1, 2]", "completion": "3"}).messages[0]["content"] == "[1, 2]"

"""Examples → rows of any format that can hold them. What a format has no place for is refused, never dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from config.structured_config import FormatName
from utils.data_formats import ONE_ANSWER, READERS
from utils.examples import Example
from utils.exceptions import DataError
from utils.messages import Message
from utils.row_writers import encode_json

# Columns besides the required ones that a format reads.
OPTIONAL_COLUMNS: dict[FormatName, tuple[str, ...]] = {
    "preference": ("prompt", "system", "tools"),
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "history", "system", "tools"),
    "prompt_completion": ("system", "tools"),
    "question_answer": ("context", "system", "tools"),
    "text": (),
    "labelled": (),
}
COLUMNS = {name: {*keys, *OPTIONAL_COLUMNS[name]} for name, (keys, _) in READERS.items()}
COLUMNS["labelled"] = COLUMNS["labelled"].union(*(COLUMNS[name] for name in ONE_ANSWER))
# A column that no format reads is the user's own, and travels along.
READ_COLUMNS = set().union(*COLUMNS.values())
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def convert_example(example: Example, to: FormatName) -> dict[str, Any]:
    """An example as a row of another format, with the columns that no format reads; the same format stays as written.

    Raises:
        DataError: the format has no place for something that the row says.
    """
    if example.format == to:
        return example.fields
    if example.text is not None:
        raise refuse(example, to, "raw text has no turns")
    if example.format == "preference" or to == "preference":
        reason = "the rejected answer would be lost" if to != "preference" else "there is no rejected answer"
        raise refuse(example, to, reason)
    if "labelled" in (example.format, to):
        raise refuse(example, to, "there is no label" if to == "labelled" else "its label would be lost")
    if to not in WRITERS:
        raise refuse(example, to, "a conversation becomes text with a template, and training does that")
    extra = {name: value for name, value in example.fields.items() if name not in READ_COLUMNS}
    return {**WRITERS[to](example), **extra}


def refuse(example: Example, to: FormatName, reason: str) -> DataError:
    """The complaint about a row that the new format cannot hold."""
    fix = "leave the row out, or choose a format that can hold it"
    text = f"cannot be written as {to}: {reason}"
    return DataError(text, where=example.where, fix=fix, code="cannot-hold")


def clean_message(message: Message) -> Message:
    """A message without the parts that only prompt templates read."""
    return {key: value for key, value in message.items() if key not in ("instruction", "input")}


def write_messages(example: Example) -> dict[str, Any]:
    """Gives `{"messages": […], "tools": […]}`; it holds every conversation."""
    row: dict[str, Any] = {"messages": [clean_message(message) for message in example.messages]}
    return {**row, "tools": list(example.tools)} if example.tools else row


def write_sharegpt(example: Example) -> dict[str, Any]:
    """Gives `{"conversations": [{"from": "human", "value": "Hi"}, …], "tools": "[…]"}`, tools as JSON text."""
    turns = []
    for message in example.messages:
        rest = {
            key: value for key, value in clean_message(message).items() if key not in ("role", "content", "tool_calls")
        }
        if "tool_calls" not in message:
            turns.append({"from": SHAREGPT_ROLES[message["role"]], "value": message["content"], **rest})
            continue
        if message["content"]:
            raise refuse(example, "sharegpt", "it has no place for text beside a tool call")
        calls = [{**call["function"], **({"id": call["id"]} if "id" in call else {})} for call in message["tool_calls"]]
        turns.append({"from": "function_call", "value": encode_json(calls[0] if len(calls) == 1 else calls), **rest})
    row: dict[str, Any] = {"conversations": turns}
    return {**row, "tools": encode_json(example.tools)} if example.tools else row


def take_single_turn(example: Example, to: FormatName) -> tuple[dict[str, Any], Message, str]:
    """Checks that a row is one question and one answer in text.

    Returns:
        The columns that hold its system message, the question and the answer.
    """
    system = {"system": example.messages[0]["content"]} if example.messages[0]["role"] == "system" else {}
    turns = example.messages[len(system) :]
    if example.tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        raise refuse(example, to, "it has no place for tools")
    if any("reasoning_content" in turn for turn in turns):
        raise refuse(example, to, "it has no place for thinking")
    if len(turns) > 2:
        raise refuse(example, to, f"it holds one question and one answer, and this row has {len(turns)} turns")
    return system, turns[0], turns[1]["content"]


def write_alpaca(example: Example) -> dict[str, Any]:
    """Gives `{"instruction": "…", "input": "…", "output": "…", "system": "…"}`."""
    system, user, answer = take_single_turn(example, "alpaca")
    given = {"input": user["input"]} if "input" in user else {}
    return {"instruction": user.get("instruction", user["content"]), **given, "output": answer, **system}


def write_prompt_completion(example: Example) -> dict[str, Any]:
    """Gives `{"prompt": "…", "completion": "…"}`; lists of messages where the row is more than one question and one answer."""
    messages = [clean_message(message) for message in example.messages]
    if len(messages) == 2 and not example.tools and messages[1].keys() == {"role", "content"}:
        return {"prompt": messages[0]["content"], "completion": messages[1]["content"]}
    row: dict[str, Any] = {"prompt": messages[:-1], "completion": messages[-1:]}
    return {**row, "tools": list(example.tools)} if example.tools else row


def write_question_answer(example: Example) -> dict[str, Any]:
    """Gives `{"question": "…", "answer": "…", "system": "…"}`; a context stays in front of its question."""
    system, user, answer = take_single_turn(example, "question_answer")
    return {"question": user["content"], "answer": answer, **system}


WRITERS: dict[FormatName, Callable[[Example], dict[str, Any]]] = {
    "messages": write_messages,
    "sharegpt": write_sharegpt,
    "alpaca": write_alpaca,
    "prompt_completion": write_prompt_completion,
    "question_answer": write_question_answer,
}

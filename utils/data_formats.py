"""Rows → examples: one function for each format, each with the row it reads in its docstring.

Every conversation becomes a tuple of messages `{"role": …, "content": …}`; raw text stays text. What a row holds besides
(a level, a database for execution accuracy) travels along in `fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from utils.data_loading import Row, raise_problems
from utils.exceptions import DataError, Problem

FormatName = Literal["messages", "prompt_completion", "alpaca", "text"]
Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One row, ready for the tokenizer.

    Attributes:
        format: the format that it was written in.
        messages: the conversation, ending with the assistant; empty for raw text.
        text: raw text, or None for a conversation.
        where: `file:line`.
        fields: the whole row, for metrics that need more than the text.
    """

    format: FormatName
    messages: tuple[Message, ...]
    text: str | None
    where: str
    fields: dict[str, Any]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What the model is asked: all messages but the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the model should say: the last assistant turn."""
        return self.messages[-1]["content"]


def read_messages(row: Row) -> Example:
    """Reads `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}`."""
    return Example("messages", check_messages(row.fields["messages"], row.where), None, row.where, row.fields)


def read_prompt_completion(row: Row) -> Example:
    """Reads `{"prompt": "2 + 2 =", "completion": " 4"}`; both may also be lists of messages."""
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = check_messages([*prompt, *completion], row.where)
    else:
        # A completion may start with the space that separates it from its prompt, so neither side is stripped.
        messages = (
            {"role": "user", "content": check_text(prompt, "prompt", row.where)},
            {"role": "assistant", "content": check_text(completion, "completion", row.where)},
        )
    return Example("prompt_completion", messages, None, row.where, row.fields)


def read_alpaca(row: Row) -> Example:
    """Reads `{"instruction": "Translate to French.", "input": "cheese", "output": "fromage"}`; `input` may be absent or ""."""
    instruction = check_text(row.fields["instruction"], "instruction", row.where)
    given = check_optional_text(row.fields.get("input"), "input", row.where)
    user = {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}
    if given:
        # Chat templates read `content` alone; the alpaca template shows instruction and input in sections of their own.
        user |= {"instruction": instruction, "input": given}
    answer = {"role": "assistant", "content": check_text(row.fields["output"], "output", row.where)}
    system = check_optional_text(row.fields.get("system"), "system", row.where)
    first = [{"role": "system", "content": system}] if system else []
    return Example("alpaca", (*first, user, answer), None, row.where, row.fields)


def read_text(row: Row) -> Example:
    """Reads `{"text": "Once upon a time …"}`: every token is learned."""
    return Example("text", (), check_text(row.fields["text"], "text", row.where), row.where, row.fields)


# Order matters for detection only: the first format whose keys are all there is taken.
READERS: dict[FormatName, tuple[tuple[str, ...], Callable[[Row], Example]]] = {
    "messages": (("messages",), read_messages),
    "prompt_completion": (("prompt", "completion"), read_prompt_completion),
    "alpaca": (("instruction", "output"), read_alpaca),
    "text": (("text",), read_text),
}


def read_examples(rows: Sequence[Row], format_name: FormatName | Literal["auto"] = "auto") -> list[Example]:
    """Reads all rows.

    Raises:
        DataError: rows that do not fit the format; all are counted and the first ones shown with file and line.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            examples.append(read_example(row, format_name))
        except DataError as error:
            problems += error.problems
    raise_problems(problems)
    return examples


def read_example(row: Row, format_name: FormatName | Literal["auto"]) -> Example:
    """Reads one row in the named format, or in the one that its keys say."""
    if format_name == "auto":
        format_name = detect_format(row)
    keys, reader = READERS[format_name]
    if missing := [key for key in keys if key not in row.fields]:
        fix = f"rename a column with data.columns; columns here: {', '.join(row.fields) or 'none'}"
        raise DataError(f"format {format_name} needs {missing[0]!r}", where=row.where, fix=fix, code="missing-column")
    return reader(row)


def detect_format(row: Row) -> FormatName:
    """The first format whose keys the row has."""
    for name, (keys, _) in READERS.items():
        if all(key in row.fields for key in keys):
            return name
    shapes = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in READERS.items())
    fix = f"rename with data.columns to one of {shapes}"
    message = f"no known format has the columns {', '.join(row.fields) or '(none)'}"
    raise DataError(message, where=row.where, fix=fix, code="unknown-format")


def check_text(value: Any, name: str, where: str) -> str:
    """Text with something in it."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, not {type(value).__name__}", where=where, code="not-text")
    if not value.strip():
        raise DataError(f"{name} is empty", where=where, fix="fill it in or remove the row", code="empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"{name} holds half of a character (a lone surrogate)"
        raise DataError(message, where=where, fix="write the text anew as UTF-8", code="not-text") from error
    return value


def check_optional_text(value: Any, name: str, where: str) -> str:
    """Text, or nothing where the key is absent, null or blank."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return check_text(value, name, where)


def check_messages(value: Any, where: str) -> tuple[Message, ...]:
    """A conversation: an optional system message, then user and assistant in turns, ending with the assistant."""
    if not isinstance(value, list) or not value:
        raise DataError("messages must be a list with at least one message", where=where, code="not-messages")
    messages = tuple(check_message(message, index, where) for index, message in enumerate(value))
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            text = f"turn {index + 1} is {message['role']}, and {expected} should come here"
            fix = "user and assistant take turns, the user first"
            raise DataError(text, where=where, fix=fix, code="role-order")
    if not turns or turns[-1]["role"] != "assistant":
        fix = "add the answer, or remove the row"
        raise DataError("the last message is not the assistant's", where=where, fix=fix, code="no-answer")
    return messages


def check_message(message: Any, index: int, where: str) -> Message:
    """One message with a known role and text content."""
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        fix = 'write {"role": "user", "content": "…"}'
        raise DataError(f"message {index + 1} lacks role or content", where=where, fix=fix, code="not-messages")
    if message["role"] not in ROLES:
        raise DataError(
            f"message {index + 1} has the unknown role {message['role']!r}",
            where=where,
            fix=f"roles are {', '.join(ROLES)}",
            code="unknown-role",
        )
    if unread := [key for key in ("tool_calls", "function_call") if message.get(key)]:
        fix = "remove it from the row"
        text = f"message {index + 1} has {unread[0]}, which this version cannot train on"
        raise DataError(text, where=where, fix=fix, code="tool-calls")
    return {"role": message["role"], "content": check_text(message["content"], f"message {index + 1}", where)}

"""A row as training sees it, whatever its format was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from config.structured_config import FormatName
from utils.data_loading import Row
from utils.exceptions import DataError
from utils.messages import (
    Message,
    check_optional_text,
    check_tools,
)


@dataclass(frozen=True)
class Example:
    """One row, ready for the tokenizer.

    Attributes:
        format: the format that it was written in.
        messages: the conversation, ending with the assistant; for preference prompt and chosen answer; empty for raw text.
            Of a labelled row it ends with its answer, be it desirable or not.
        text: raw text, or None for a conversation.
        where: `file:line`.
        fields: the whole row, for metrics that need more than the text.
        tools: function schemas in OpenAI's form.
        rejected: preference only: prompt and rejected answer.
        label: labelled only: whether the model should answer like this.
    """

    format: FormatName
    messages: tuple[Message, ...]
    text: str | None
    where: str
    fields: dict[str, Any]
    tools: tuple[dict[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What the model is asked: all messages but the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the model should say: the last assistant turn; under label false, what it should not say."""
        return str(self.messages[-1]["content"])


def make_example(name: FormatName, row: Row, messages: tuple[Message, ...]) -> Example:
    """An example of a conversation, with the row's `system` and `tools`."""
    fields = row.fields
    if type(fields.get("label")) is bool:
        fix = "remove it, set data.format: auto, or rename it with data.columns if it means something else"
        text = f"label says whether an answer is a good one, and format {name} does not look at it"
        raise DataError(text, where=row.where, fix=fix, code="label")
    if "system" in fields and (system := check_optional_text(fields["system"], "system", row.where)):
        if messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        elif messages[0]["content"].strip() != system.strip():
            text = "the column system and the system message differ"
            raise DataError(text, where=row.where, fix="keep one of the two", code="role-order")
    tools = check_tools(fields["tools"], row.where) if "tools" in fields else ()
    return Example(name, messages, None, row.where, fields, tools)

"""Checks of a rendered conversation against its row: nothing that the row says may be hidden, dropped or rewritten."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from utils.exceptions import DataError
from utils.messages import Message

OTHER = "set data.template to another template"
SHOW = "set data.template to one that shows it (docs/results/templates.md lists them), or leave it out of the rows"
THINK = re.compile(r"<think>\s*$")
THINK_TAGS = re.compile(r"</?think>")
CLOSE_THINK = "\n</think>\n\n"


def count_shared(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def close_thinking(prompt: str, whole: str, message: Message, index: int) -> str:
    """The answer to a generation prompt that opens a thinking block which the template never renders.

    DeepSeek-R1's prompt ends with `<think>`, and its template leaves all thinking out. What the model writes there is the
    thinking, or nothing, then `</think>` and the answer.

    Raises:
        DataError: the prompt and the rendered turn differ in another way.
    """
    opened = THINK.search(prompt)
    header = prompt[: opened.start()] if opened else ""
    if opened and whole.startswith(header) and not whole.startswith("<think>", len(header)):
        return find_reasoning(message) + CLOSE_THINK + whole[len(header) :].lstrip("\n")
    if opened or THINK_TAGS.search(whole[count_shared(prompt, whole) :]):
        text = f"the chat template's prompt decides whether turn {index + 1} thinks, and this turn does the opposite"
        fix = "give every assistant turn reasoning_content, or none, or set data.template to another template"
        raise DataError(text, fix=fix, code="template-thinking")
    text = f"the chat template changes the text before turn {index + 1} when it is answered"
    raise DataError(text, fix=OTHER, code="template-prefix")


def find_reasoning(message: Message) -> str:
    """The thinking of a turn, from its own field or from `<think>…</think>` in the content."""
    if reasoning := message.get("reasoning_content"):
        return str(reasoning).strip()
    before, closed, _ = str(message["content"]).partition("</think>")
    return before.rpartition("<think>")[2].strip() if closed else ""


def find_contents(answer: str, message: Message, index: int) -> int:
    """Checks that a rendered turn shows all that the row has, in order, and returns where the last of it ends."""
    pieces = [("thinking", str(message.get("reasoning_content") or ""))]
    content = message["content"].strip()
    if content in answer:
        pieces.append(("answer", content))
    else:  # a template may write the thinking block inside the content in its own way
        pieces += [("answer", piece) for piece in THINK_TAGS.split(content)]
    pieces += [("tool call", call["function"]["name"]) for call in message.get("tool_calls", ())]
    end = 0
    for what, piece in pieces:
        piece = piece.strip()
        start = answer.find(piece, end)
        if start < 0:
            text = f"the chat template hides or rewrites the {what} of turn {index + 1}"
            raise DataError(text, fix=OTHER if what == "answer" else SHOW, code="template-hides")
        end = start + len(piece)
    return end


def check_context(prompt: str, messages: Sequence[Message]) -> None:
    """Checks that a prompt shows what the system, the user and tools say: an answer to half a question teaches guessing."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        content = message["content"].strip()
        if content in prompt or (message["role"] == "tool" and content[:1] in ("{", "[")):
            continue  # some templates write the JSON of a tool in their own way
        parts = [message.get("instruction", content), message.get("input", "")]
        if message["role"] == "tool":
            parts = [json.dumps(content, ensure_ascii=False)[1:-1]]
        if not all(part.strip() in prompt for part in parts):
            text = f"the chat template leaves out or rewrites message {index + 1} ({message['role']})"
            raise DataError(text, fix=OTHER, code="template-hides")


def place(error: DataError, where: str) -> DataError:
    """The same error with the row that it is about."""
    problem = error.problems[0]
    return DataError(problem.message, where=where, fix=problem.fix, code=problem.code)


def iterate_texts(value: Any) -> Iterator[str]:
    """Every text inside a value, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iterate_texts(key)
            yield from iterate_texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iterate_texts(item)

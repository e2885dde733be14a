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
    for call in message.get("tool_calls", ()):
        check_leaves(answer, call["function"]["arguments"], f"the arguments of a tool call of turn {index + 1}")
    return end


def check_leaves(text: str, value: Any, what: str) -> None:
    """Checks that a rendered text shows every text and whole number of a JSON value, in whatever order and spelling.

    Raises:
        DataError: one of them is missing.
    """
    for leaf in iterate_leaves(value):
        spelled = str(leaf).strip()
        if spelled not in text and not any(
            json.dumps(spelled, ensure_ascii=plain)[1:-1] in text for plain in (False, True)
        ):
            message = f"the chat template leaves out {what}: {spelled[:60]!r} is missing"
            raise DataError(message, fix=SHOW, code="template-hides")


def iterate_leaves(value: Any) -> Iterator[str | int]:
    """Every text and whole number inside a JSON value; floats and truth values have many spellings."""
    if isinstance(value, dict):
        for item in value.values():
            yield from iterate_leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iterate_leaves(item)
    elif isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        yield value


def check_tools_shown(prompt: str, tools: Sequence[dict[str, Any]]) -> None:
    """Checks that a prompt names every tool: an answer that calls a tool the model was never told of teaches inventing.

    Raises:
        DataError: the template leaves the tools out.
    """
    for tool in tools:
        if tool.get("function", tool)["name"] not in prompt:
            text = f"the chat template does not show the tools of this row: {tool.get('function', tool)['name']!r} is missing"
            raise DataError(text, fix=SHOW, code="template-hides")


def check_context(prompt: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
    """Checks that a prompt shows what the system, the user and tools say: an answer to half a question teaches guessing."""
    check_tools_shown(prompt, tools)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        content = message["content"].strip()
        if content in prompt:
            continue
        if message["role"] == "tool" and content[:1] in (
            "{",
            "[",
        ):  # some templates write the JSON of a tool in their own way
            check_leaves(prompt, parse_json(content), f"the result in message {index + 1}")
            continue
        parts = [message.get("instruction", content), message.get("input", "")]
        if message["role"] == "tool":
            parts = [json.dumps(content, ensure_ascii=False)[1:-1]]
        if not all(part.strip() in prompt for part in parts):
            text = f"the chat template leaves out or rewrites message {index + 1} ({message['role']})"
            raise DataError(text, fix=OTHER, code="template-hides")


def parse_json(text: str) -> Any:
    """What a text says as JSON, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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

"""Rows → examples: one function for each format, each with the row it reads in its docstring.

Every conversation becomes a tuple of messages in one form, whatever the row's spelling; raw text stays text. What a row
holds besides (a level, a database for execution accuracy) travels along in `fields`. Each format of conversations also reads
the columns `system` (the system message) and `tools` (function schemas).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from config.structured_config import FormatName
from utils.data_loading import Row, raise_problems
from utils.examples import Example, make_example
from utils.exceptions import DataError, Problem
from utils.messages import (
    Message,
    check_messages,
    check_optional_text,
    check_order,
    check_text,
    check_turns,
    parse_list,
)

SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
# Columns of well-known data sets under other names; only used to suggest `data.columns`.
OTHER_NAMES = {
    **dict.fromkeys(("dialog", "dialogue", "chat"), "messages"),
    **dict.fromkeys(("query", "problem"), "question"),
    "conversation": "conversations",
    "response": "output",
    "context": "input",
    "solution": "answer",
    "target": "completion",
    **dict.fromkeys(("content", "document"), "text"),
}


def read_messages(row: Row) -> Example:
    """Reads `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}`."""
    return make_example("messages", row, check_messages(row.fields["messages"], row.where))


def read_sharegpt(row: Row) -> Example:
    """Reads `{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}`."""
    turns = parse_list(row.fields["conversations"], "conversations", row.where)
    if not isinstance(turns, list) or not turns:
        fix = 'write [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]'
        raise DataError("conversations must be a list of turns", where=row.where, fix=fix, code="not-messages")
    messages = [translate_turn(turn, index, row.where) for index, turn in enumerate(turns)]
    return make_example("sharegpt", row, check_messages(messages, row.where))


def translate_turn(turn: Any, index: int, where: str) -> Any:
    """A ShareGPT turn as a message; a turn that has role and content already is one."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        if isinstance(turn, dict) and "role" in turn:
            return turn
        fix = 'write {"from": "human", "value": "…"}'
        raise DataError(f"turn {index + 1} lacks from or value", where=where, fix=fix, code="not-messages")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker = turn["from"]
    if speaker == "function_call":
        return {**rest, "role": "assistant", "content": None, "tool_calls": turn["value"]}
    if not isinstance(speaker, str) or speaker not in SHAREGPT:
        fix = f"ShareGPT roles are {', '.join(SHAREGPT)}, function_call"
        raise DataError(f"turn {index + 1} is from {speaker!r}", where=where, fix=fix, code="unknown-role")
    return {**rest, "role": SHAREGPT[speaker], "content": turn["value"]}


def read_alpaca(row: Row) -> Example:
    """Reads `{"instruction": "Translate to French.", "input": "cheese", "output": "fromage"}`.

    `input` may be absent or "". `history` holds earlier turns: `[["Hi", "Hello!"], …]`.
    """
    fields, where = row.fields, row.where
    instruction = check_text(fields["instruction"], "instruction", where)
    given = check_optional_text(fields.get("input"), "input", where)
    user: Message = {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction}
    if given:
        # Chat templates read `content` alone; the alpaca template shows instruction and input in sections of their own.
        user |= {"instruction": instruction, "input": given}
    answer: Message = {"role": "assistant", "content": check_text(fields["output"], "output", where)}
    earlier = read_history(fields["history"], where) if fields.get("history") else []
    return make_example("alpaca", row, (*earlier, user, answer))


def read_history(value: Any, where: str) -> list[Message]:
    """Earlier turns of an alpaca row, as pairs of question and answer."""
    history = parse_list(value, "history", where)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        fix = 'write [["question", "answer"], …]'
        raise DataError("history must be a list of pairs", where=where, fix=fix, code="not-messages")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": check_text(text, f"history, turn {number}", where)}
        for number, pair in enumerate(history, start=1)
        for role, text in zip(roles, pair, strict=True)
    ]


def read_prompt_completion(row: Row) -> Example:
    """Reads `{"prompt": "2 + 2 =", "completion": " 4"}`; both may also be lists of messages."""
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return make_example("prompt_completion", row, check_messages([*prompt, *completion], row.where))
    # A completion may start with the space that separates it from its prompt, so neither side is stripped.
    user = {"role": "user", "content": check_text(prompt, "prompt", row.where)}
    answer = {"role": "assistant", "content": check_text(completion, "completion", row.where)}
    return make_example("prompt_completion", row, (user, answer))


def read_question_answer(row: Row) -> Example:
    """Reads `{"question": "Who wrote it?", "answer": "Ada."}`; a `context` is put before the question."""
    question = check_text(row.fields["question"], "question", row.where)
    if context := check_optional_text(row.fields.get("context"), "context", row.where):
        question = f"{context}\n\n{question}"
    answer = {"role": "assistant", "content": check_text(row.fields["answer"], "answer", row.where)}
    return make_example("question_answer", row, ({"role": "user", "content": question}, answer))


def read_text(row: Row) -> Example:
    """Reads `{"text": "Once upon a time …"}`: every token is learned."""
    return Example("text", (), check_text(row.fields["text"], "text", row.where), row.where, row.fields)


def read_preference(row: Row) -> Example:
    """Reads `{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}`, the three also as lists of messages.

    Without `prompt`, chosen and rejected are two whole conversations that differ in their last answer.
    """
    fields, where = row.fields, row.where
    prompt = fields.get("prompt")
    chosen, rejected = (make_side(prompt, fields[name], name, where) for name in ("chosen", "rejected"))
    if list(map(normalise, chosen[:-1])) != list(map(normalise, rejected[:-1])):
        text = "chosen and rejected answer different prompts"
        raise DataError(text, where=where, fix="they may differ in the last answer only", code="prompts-differ")
    if normalise(chosen[-1]) == normalise(rejected[-1]):
        fix = "remove the row: there is nothing to prefer"
        raise DataError("chosen and rejected are the same", where=where, fix=fix, code="identical-pair")
    example = make_example("preference", row, chosen)
    prompt_length = len(example.messages) - 1
    return Example(
        "preference",
        example.messages,
        None,
        where,
        fields,
        example.tools,
        (*example.messages[:prompt_length], rejected[-1]),
    )


def normalise(message: Message) -> Message:
    """A message in which white space does not count."""
    return {**message, "content": " ".join(message["content"].split())}


def make_side(prompt: Any, answer: Any, name: str, where: str) -> tuple[Message, ...]:
    """The conversation that ends with the chosen or the rejected answer."""
    if isinstance(answer, str) and prompt is None:
        fix = "add a column prompt, or write chosen and rejected as lists of messages"
        raise DataError(f"{name} is text, and there is no prompt", where=where, fix=fix, code="missing-column")
    asked: list[Any] = []
    if isinstance(prompt, list):
        asked = list(check_turns(prompt, where))
        check_order(asked, where)
    elif prompt is not None:
        asked = [{"role": "user", "content": check_text(prompt, "prompt", where)}]
    if not isinstance(answer, list):
        return check_messages([*asked, {"role": "assistant", "content": check_text(answer, name, where)}], where)
    turns = check_turns(answer, where)
    if turns[0]["role"] in ("assistant", "tool"):
        return check_messages([*asked, *turns], where)
    # A whole conversation beside a prompt, as many sets have it: the prompt must be a part of it.
    texts = [" ".join(turn["content"].split()) for turn in turns[:-1]]
    if any(" ".join(turn["content"].split()) not in texts for turn in asked):
        fix = "remove the column prompt, or the prompt's messages from chosen and rejected"
        raise DataError(f"{name} is a conversation with another prompt", where=where, fix=fix, code="prompts-differ")
    return check_messages(list(turns), where)


def read_labelled(row: Row) -> Example:
    """Reads `{"prompt": "2 + 2?", "completion": "5", "label": false}`: a conversation of any format with a label on its answer.

    true: the model should answer like this; false: it should not. TRL calls such rows unpaired preferences.
    """
    rest = Row({name: value for name, value in row.fields.items() if name != "label"}, row.where)
    name, label = detect_format(rest), row.fields["label"]
    if name not in ONE_ANSWER:
        fix = "remove the column label, or rename it with data.columns"
        raise DataError(f"label judges one answer, and {name} rows have none", where=row.where, fix=fix, code="label")
    if not isinstance(label, bool):
        fix = "write true or false without quotes; if it means something else, rename it with data.columns or set data.format"
        shown = f"label is {str(label)[:40]!r}" if isinstance(label, str) else f"label is {str(label)[:40]}"
        text = f"{shown}, and it must say true or false: whether the answer is a good one"
        raise DataError(text, where=row.where, fix=fix, code="label")
    return replace(READERS[name][1](rest), format="labelled", fields=row.fields, label=label)


# Conversations with one answer, which a label can judge.
ONE_ANSWER: tuple[FormatName, ...] = ("messages", "sharegpt", "alpaca", "prompt_completion", "question_answer")
# Order matters for detection only: the first format whose keys are all there is taken; with a label it is labelled.
READERS: dict[FormatName, tuple[tuple[str, ...], Callable[[Row], Example]]] = {
    "preference": (("chosen", "rejected"), read_preference),
    "messages": (("messages",), read_messages),
    "sharegpt": (("conversations",), read_sharegpt),
    "alpaca": (("instruction", "output"), read_alpaca),
    "prompt_completion": (("prompt", "completion"), read_prompt_completion),
    "question_answer": (("question", "answer"), read_question_answer),
    "text": (("text",), read_text),
    "labelled": (("label",), read_labelled),
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
        return READERS[detect_format(row)][1](row)
    keys, reader = READERS[format_name]
    if missing := [key for key in keys if key not in row.fields]:
        fix = f"rename a column with data.columns; columns here: {', '.join(row.fields) or 'none'}"
        raise DataError(f"format {format_name} needs {missing[0]!r}", where=row.where, fix=fix, code="missing-column")
    return reader(row)


def detect_format(row: Row) -> FormatName:
    """The first format whose keys the row has; a null counts as absent where another format has values."""
    fields = row.fields
    if None in fields.values():
        fields = {key: value for key, value in fields.items() if value is not None}
    found = find_format(tuple(fields)) or find_format(tuple(row.fields))
    if found is None:
        raise make_format_error(row)
    return found


@lru_cache(maxsize=1024)
def find_format(columns: tuple[str, ...]) -> FormatName | None:
    """The first format whose keys are among the columns; cached, for the rows of a file have the same ones."""
    known = (name for name, (keys, _) in READERS.items() if name != "labelled" and set(keys) <= set(columns))
    found = next(known, None)
    return "labelled" if found in ONE_ANSWER and "label" in columns else found


def make_format_error(row: Row) -> DataError:
    """The complaint about columns of no known format, with a renaming that would help."""
    shapes = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in READERS.items() if name != "labelled")
    renamed = {OTHER_NAMES.get(name, name) for name in row.fields}
    guesses = [keys for keys, _ in READERS.values() if renamed.issuperset(keys)]
    wanted = {*guesses[0], *(("input",) if "instruction" in guesses[0] else ())} if guesses else set()
    pairs = [f"{old}: {new}" for old, new in OTHER_NAMES.items() if old in row.fields and new in wanted]
    example = f"data.columns: {{{', '.join(pairs)}}}, or " if pairs else ""
    fix = f"{example}rename with data.columns to one of {shapes}; labelled: one answer + label"
    message = f"no known format has the columns {', '.join(row.fields) or '(none)'}"
    return DataError(message, where=row.where, fix=fix, code="unknown-format")

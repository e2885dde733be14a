"""Which part of a rendered conversation the assistant wrote, found by rendering it again and again.

For each assistant turn k, the conversation before it is rendered with a generation prompt: that is what inference sends. The
conversation up to and including it is rendered, too. What the second text has more is what the model must write, up to the
last control token in it. No marker strings are typed anywhere, and everything is checked: that the one text begins with the
other, that nothing of the turn is hidden, and that a control token ends it.

Reasoning templates drop the thinking of earlier turns, and some end the last turn differently. A turn that later text shows
in another way cannot be learned there: it gets a sequence of its own, in which its context is what inference will send.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from utils.chat_templates import ChatTemplate, TemplateRenderer
from utils.exceptions import DataError
from utils.messages import Message
from utils.turn_checks import OTHER, check_context, close_thinking, count_shared, find_contents

PROBE = "\u25b8probe\u25c2"
Segment = tuple[str, int | None]
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_probe",
        "description": "Gets it.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string", "description": "A name."}}},
    },
}
PROBE_CALL = {"type": "function", "id": "call00001", "function": {"name": "get_probe", "arguments": {"name": PROBE}}}


@dataclass(frozen=True)
class Turn:
    """One assistant turn as text.

    Attributes:
        index: its message.
        prompt: what inference sends to get it.
        answer: what the model must write, with the control token that ends it.
    """

    index: int
    prompt: str
    answer: str


class TurnFinder:
    """Finds the assistant's turns in what one template renders."""

    def __init__(self, renderer: TemplateRenderer, control_tokens: Collection[str]) -> None:
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self.renderer = renderer
        self.control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, prompt: bool = False) -> str:
        """The text of a conversation, its contents spelled as this template wants them."""
        if self._wants_parts:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        if any("tool_calls" in turn for turn in messages) and self._wants_text_arguments:
            messages = write_arguments(messages)
        return self.renderer.render(messages, tools, prompt=prompt)

    def find_turns(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, strict: bool) -> list[Turn]:
        """All assistant turns; with `strict` unset, those that cannot be learned are left out."""
        turns = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                turns.append(self.find_turn(messages, index, tools))
            except DataError:
                if strict:
                    raise
        return turns

    def find_turn(self, messages: Sequence[Message], index: int, tools: Sequence[dict[str, Any]] = ()) -> Turn:
        """The assistant turn at an index.

        Raises:
            DataError: the template hides or rewrites it, begins it otherwise than its generation prompt, or does not end it.
        """
        message = messages[index]
        prompt = self.render(messages[:index], tools, prompt=True)
        whole = self.render(messages[: index + 1], tools)
        if self._suffix and whole.endswith(self._suffix):
            whole = whole[: -len(self._suffix)]
        answer = whole[len(prompt) :] if whole.startswith(prompt) else close_thinking(prompt, whole, message, index)
        end = find_contents(answer, message, index)
        terminators = list(self.control_pattern.finditer(answer, end))
        if not terminators:
            text = (
                f"the chat template writes no control token that ends turn {index + 1}, so it could not learn to stop"
            )
            raise DataError(text, fix=OTHER, code="no-terminator")
        return Turn(index, prompt, answer[: terminators[-1].end()])

    def split_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[Segment]:
        """The prompt that inference sends, cut where an earlier answer begins or ends."""
        prompt = self.render(messages, tools, prompt=True)
        check_context(prompt, messages, tools)
        return split_context(prompt, self.find_turns(messages, tools, strict=False))

    def split_last(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[Segment]:
        """A conversation whose last turn alone must be learnable, as context and that turn."""
        last = self.find_turn(messages, len(messages) - 1, tools)
        check_context(last.prompt, messages[:-1], tools)
        earlier = self.find_turns(messages[:-1], tools, strict=False)
        return [*split_context(last.prompt, earlier), (last.answer, last.index)]

    def split_all(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[list[Segment]]:
        """The fewest sequences in which each assistant turn stands once as inference has it.

        Returns:
            Sequences of (text, index of the assistant's message or None for what is not learned there); the one that ends
            with the last turn comes last.
        """
        turns = self.find_turns(messages, tools, strict=True)
        check_context(turns[-1].prompt, messages[:-1], tools)
        missing = {turn.index for turn in turns}
        sequences: list[list[Segment]] = []
        for position in range(len(turns) - 1, -1, -1):
            turn = turns[position]
            if turn.index not in missing:
                continue
            segments = [*split_context(turn.prompt, turns[:position]), (turn.answer, turn.index)]
            learned = {index for _, index in segments} & missing
            sequences.append([(text, index if index in learned else None) for text, index in segments])
            missing -= learned
        return sequences[::-1]

    @cached_property
    def _suffix(self) -> str:
        """What a template writes behind a whole conversation, such as Phi-3's `<|endoftext|>`; no inference reaches it."""
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            whole = self.render(turn)
            longer = self.render([*turn, {"role": "user", "content": "b"}], prompt=True)
        except DataError:
            return ""
        shared = whole[: count_shared(whole, longer)]
        terminators = list(self.control_pattern.finditer(shared, max(shared.find(PROBE), 0)))
        suffix = whole[terminators[-1].end() :] if terminators and PROBE in shared else ""
        return suffix if self.control_pattern.search(suffix) else ""

    @cached_property
    def _wants_parts(self) -> bool:
        """True where a template shows text only as `[{"type": "text", "text": …}]`, as those of vision models do."""
        parts = [{"type": "text", "text": PROBE}]
        return not self._shows("user", PROBE) and self._shows("user", parts)

    def _shows(self, role: str, content: Any) -> bool:
        try:
            text = self.renderer.render([{"role": role, "content": content}])
        except DataError:
            return False
        return PROBE in text and "'type'" not in text  # the parts themselves, not Python's spelling of their list

    @cached_property
    def _wants_text_arguments(self) -> bool:
        """True where a template takes the arguments of a tool call as JSON text only, such as DeepSeek-V3's."""
        call: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
        ]
        shown = []
        for messages in (call, write_arguments(call)):
            try:
                shown.append(PROBE in self.renderer.render(messages, [PROBE_TOOL]))
            except DataError:
                shown.append(False)
        return shown == [False, True]


def write_arguments(messages: Sequence[Message]) -> list[Message]:
    """Tool calls with their arguments as JSON text."""
    changed = []
    for message in messages:
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
            calls = [
                {**call, "function": {**function, "arguments": text}}
                for call, function, text in zip(calls, functions, texts, strict=True)
            ]
            message = {**message, "tool_calls": calls}
        changed.append(message)
    return changed


def split_context(text: str, turns: Sequence[Turn]) -> list[Segment]:
    """Cuts a prompt into segments: each turn that it shows as inference wrote it, and what stands between."""
    segments: list[Segment] = []
    done = 0
    for turn in turns:
        start, end = len(turn.prompt), len(turn.prompt) + len(turn.answer)
        if start >= done and text.startswith(turn.prompt) and text.startswith(turn.answer, start):
            segments += [(text[done:start], None), (turn.answer, turn.index)]
            done = end
    return [*segments, (text[done:], None)]


def pin_thinking(
    template: ChatTemplate, special_tokens: Mapping[str, str], control_tokens: Collection[str], holds: Collection[str]
) -> ChatTemplate:
    """Gives the option `enable_thinking` of a template the value under which the rows can be learned, if its default cannot.

    The value becomes part of the template's text, and so of its hash, of what is saved with the run and of every later
    prompt. Whoever passes the option still decides.

    Args:
        template: the run's template.
        special_tokens: what else it sees.
        control_tokens: of the tokenizer.
        holds: formats of the rows, and `thinking` where some row has it; empty where nothing is trained.
    """
    if "enable_thinking" not in template.source or not holds:
        return template
    plain: Message = {"role": "assistant", "content": PROBE}
    thinking = {**plain, "reasoning_content": PROBE[1:-1] * 2}
    wanted = ([plain, thinking], [thinking]) if "thinking" in holds else ([plain],)
    for turns in wanted:
        for value in (None, "true", "false"):
            pinned = template
            if value is not None:
                head = (
                    f"{{%- if enable_thinking is not defined -%}}{{%- set enable_thinking = {value} -%}}{{%- endif -%}}"
                )
                pinned = ChatTemplate(template.name, head + template.source)
            finder = TurnFinder(TemplateRenderer(pinned, special_tokens), control_tokens)
            if all(can_learn(finder, turn) for turn in turns):
                return pinned
    return template


def can_learn(finder: TurnFinder, turn: Message) -> bool:
    """True where a template lets a turn be learned."""
    try:
        finder.find_turn([{"role": "user", "content": "a"}, turn], 1)
    except DataError:
        return False
    return True

"""What a conversation must be: roles in order, text in every turn, tool calls that can be read.

Rows come in many spellings. What leaves this module has one: `{"role", "content"}`, an assistant perhaps with
`reasoning_content` and `tool_calls`, a tool perhaps with `name` and `tool_call_id`. Nothing that a row says is left out in
silence: text, images and calls that cannot be read are refused; ids, dates and other notes of a message are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from utils.exceptions import DataError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = ("human", "gpt", "function_call", "observation")
# Who may speak behind whom. An assistant that calls tools is «calls»: its answer comes behind the tools'.
FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}
# Keys with which other tools choose single messages to learn. They would be ignored here, so they are refused.
MASK_KEYS = frozenset(("train", "weight", "loss", "mask", "loss_mask"))
# What a message says besides its text; a model that reads text alone would answer without it.
UNREAD_KEYS = frozenset(("images", "image", "audio", "audios", "video", "videos", "files", "attachments", "refusal"))
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def check_text(value: Any, name: str, where: str) -> str:
    """Text with something in it."""
    if not isinstance(value, str):
        raise make_text_error(value, name, where)
    if not value or value.isspace():
        raise DataError(f"{name} is empty", where=where, fix="fill it in or remove the row", code="empty")
    if not value.isascii():
        check_encoding(value, name, where)
    return value


def make_text_error(value: Any, name: str, where: str) -> DataError:
    """The complaint about a value that is no text, with the way out that its type suggests."""
    fix = "fill it in or remove the row" if value is None else f"write it as text: {str(value)[:40]!r}"
    if isinstance(value, list | dict):
        fix = "write the content as one text"
    kind = "null" if value is None else type(value).__name__
    return DataError(f"{name} must be text, not {kind}", where=where, fix=fix, code="not-text")


def check_encoding(value: str, name: str, where: str) -> None:
    """Refuses text that UTF-8 cannot hold."""
    if not is_encodable(value):
        message = f"{name} holds half of a character (a lone surrogate)"
        raise DataError(message, where=where, fix="write the text anew as UTF-8", code="not-text")


def check_optional_text(value: Any, name: str, where: str) -> str:
    """Text, or nothing where the key is absent, null or blank."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return check_text(value, name, where)


def check_messages(value: Any, where: str) -> tuple[Message, ...]:
    """A conversation in normal form: system first, user and assistant in turns, tools behind their calls, an answer last."""
    if type(value) is list and value and is_plain(value):
        return tuple(value)
    messages = check_turns(value, where)
    check_order(messages, where)
    if messages[-1]["role"] != "assistant":
        fix = "add the answer, or remove the row"
        raise DataError("the last message is not the assistant's", where=where, fix=fix, code="no-answer")
    return messages


def is_plain(messages: list[Any]) -> bool:
    """True for the common case, a conversation in normal form without tools or thinking: found in one quick loop."""
    before = ""
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return False
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or not content or content.isspace() or role not in FOLLOWERS[before]:
            return False
        if not content.isascii() and not is_encodable(content):
            return False
        before = role
    return before == "assistant"


def is_encodable(text: str) -> bool:
    """False for text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_turns(value: Any, where: str) -> tuple[Message, ...]:
    """Each message by itself, in any order."""
    value = parse_list(value, "messages", where)
    if not isinstance(value, list) or not value:
        fix = 'write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
        raise DataError("messages must be a list with at least one message", where=where, fix=fix, code="not-messages")
    return tuple([check_message(message, index, where) for index, message in enumerate(value)])


def check_message(message: Any, index: int, where: str) -> Message:
    """One message in normal form.

    Args:
        index: its place in the conversation, from 0.
    """
    name = f"message {index + 1}"
    if not isinstance(message, dict) or "role" not in message:
        raise make_shape_error(message, name, where)
    role = check_role(message["role"], name, where)
    if unread := sorted(key for key in MASK_KEYS.intersection(message) if message[key] is not None):
        fix = "remove it; data.loss_on says what is learned"
        text = f"{name} has {unread[0]!r}, which would be ignored"
        raise DataError(text, where=where, fix=fix, code="mask-key")
    if unread := sorted(key for key in UNREAD_KEYS.intersection(message) if message[key]):
        text = f"{name} has {unread[0]!r}, and only text is read here"
        raise DataError(text, where=where, fix="put it into the text, or remove the row", code="not-text")
    if role == "assistant":
        return check_assistant(message, name, where)
    if extra := [key for key in (*REASONING_KEYS, "tool_calls", "function_call") if message.get(key)]:
        text = f"{name} has {extra[0]}, and only the assistant's messages may"
        raise DataError(text, where=where, fix="move it, or remove it", code="misplaced-key")
    if "content" not in message:
        raise make_shape_error(message, name, where)
    checked = {"role": role, "content": check_text(message["content"], name, where)}
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if message.get(key):
            checked[key] = check_text(message[key], f"{key} of {name}", where)
    return checked


def make_shape_error(message: Any, name: str, where: str) -> DataError:
    """The complaint about what is no message."""
    fix = 'write {"role": "user", "content": "…"}'
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        fix = "these are ShareGPT turns: call the column conversations, with data.columns"
    return DataError(f"{name} lacks role or content", where=where, fix=fix, code="not-messages")


def check_role(role: Any, name: str, where: str) -> str:
    """One of the four roles; OpenAI's `developer` is what others call system."""
    if role == "developer":
        return "system"
    if isinstance(role, str) and role in ROLES:
        return role
    fix = f"roles are {', '.join(ROLES)}"
    if isinstance(role, str) and role in SHAREGPT_ROLES:
        fix += '; ShareGPT roles belong into a column conversations: [{"from": "human", "value": "…"}, …]'
    raise DataError(f"{name} has the unknown role {str(role)[:60]!r}", where=where, fix=fix, code="unknown-role")


def check_assistant(message: dict[str, Any], name: str, where: str) -> Message:
    """An assistant's turn: text, or calls, or both, perhaps with the thinking before it."""
    calls = parse_list(message.get("tool_calls"), f"tool_calls of {name}", where)
    if not calls and message.get("function_call"):
        # OpenAI's older spelling of a single call.
        calls = [parse_list(message["function_call"], f"function_call of {name}", where)]
    checked: Message = {"role": "assistant"}
    if calls:
        checked["content"] = check_optional_text(message.get("content"), name, where)
        checked["tool_calls"] = check_tool_calls(calls, name, where)
    elif "content" not in message:
        raise make_shape_error(message, name, where)
    else:
        checked["content"] = check_text(message["content"], name, where)
    thoughts = {
        check_text(message[key], f"{key} of {name}", where)
        for key in REASONING_KEYS
        if message.get(key) not in (None, "")
    }
    if len(thoughts) > 1:
        text = f"{name} has different texts in {', '.join(key for key in REASONING_KEYS if message.get(key))}"
        raise DataError(text, where=where, fix="keep one, reasoning_content", code="reasoning")
    if thoughts:
        checked["reasoning_content"] = thoughts.pop()
    return checked


def check_order(messages: Sequence[Message], where: str) -> None:
    """Who speaks when, and that each tool answers a call."""
    before = ""
    call_ids: set[str] = set()
    for index, message in enumerate(messages):
        role = message["role"]
        if role not in FOLLOWERS[before]:
            raise make_order_error(index, role, before, where)
        if len(message) > 2 and "tool_calls" in message:
            role = "calls"
            call_ids = {call["id"] for call in message["tool_calls"] if "id" in call}
        elif len(message) > 2 and role == "tool" and message.get("tool_call_id", "") not in {"", *call_ids}:
            text = f"message {index + 1} answers the call {message['tool_call_id']!r}, which was not made before it"
            fix = f"calls before it: {', '.join(sorted(call_ids)) or 'none with an id'}"
            raise DataError(text, where=where, fix=fix, code="unknown-call")
        before = role


def make_order_error(index: int, role: str, before: str, where: str) -> DataError:
    """The complaint about a message that cannot stand where it stands."""
    expected = FOLLOWERS[before]
    text = f"message {index + 1} is {role}, and {' or '.join(expected)} should come here"
    fix = "user and assistant take turns, the user first"
    if role == "system":
        fix = "the system message comes first, and there is one"
    elif role == "tool":
        fix = "a tool answers an assistant with tool_calls"
    elif before == "calls":
        fix = "behind tool_calls comes what the tool answered, role tool"
    return DataError(text, where=where, fix=fix, code="role-order")


def check_tool_calls(calls: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, `{"type": "function", "function": {"name", "arguments"}}`, their arguments as an object."""
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise make_call_error(f"tool_calls of {name} is no list", where)
    return [check_tool_call(call, f"call {index} of {name}", where) for index, call in enumerate(calls, start=1)]


def check_tool_call(call: Any, name: str, where: str) -> dict[str, Any]:
    """One call, written flat or wrapped."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise make_call_error(f"{name} names no function", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise make_call_error(f"the arguments of {name} are not JSON", where) from error
    if arguments is None or arguments == "" or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        raise make_call_error(f"the arguments of {name} are no object", where)
    check_encoding(json.dumps([function["name"], arguments], ensure_ascii=False), name, where)
    checked: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        checked["id"] = check_text(call["id"], f"id of {name}", where)
    return checked


def make_call_error(text: str, where: str) -> DataError:
    """The complaint about a call."""
    return DataError(text, where=where, fix='write {"name": "…", "arguments": {…}}', code="tool-calls")


def check_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Function schemas in OpenAI's form, `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    tools = parse_list(value, "tools", where)
    if not tools and not isinstance(tools, int):
        return ()
    if not isinstance(tools, list):
        raise make_tools_error("tools is no list", where)
    checked = []
    for index, tool in enumerate(tools, start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise make_tools_error(f"tool {index} names no function", where)
        if not isinstance(function.get("parameters", {}), dict | None):
            raise make_tools_error(f"the parameters of tool {index} are no JSON Schema object", where)
        check_encoding(json.dumps(function, ensure_ascii=False, default=str), f"tool {index}", where)
        checked.append({"type": "function", "function": {key: v for key, v in function.items() if key != "type"}})
    return tuple(checked)


def make_tools_error(text: str, where: str) -> DataError:
    """The complaint about the tools of a row."""
    fix = 'write [{"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}]'
    return DataError(text, where=where, fix=fix, code="tools")


def parse_list(value: Any, name: str, where: str) -> Any:
    """JSON text where a list belongs, as tables hold it; anything else as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        fix = "write a list, or a list as JSON text"
        raise DataError(f"{name} is text, but not JSON", where=where, fix=fix, code="not-messages") from error

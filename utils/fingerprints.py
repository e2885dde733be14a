"""Eight bytes for each conversation, equal where two rows teach the same: how copies and leaks are found."""

from __future__ import annotations

import json
from hashlib import blake2b

from utils.examples import Example
from utils.messages import Message

FINGERPRINT_BYTES = 8
SPACES = bytes.maketrans(b"\t\n\v\f\r", b"     ")


def fingerprint_example(example: Example, *, with_prompt: bool = False) -> tuple[bytes, bytes]:
    """8 bytes each for the prompt and for the whole of an example.

    White space does not count, and neither does the format: an alpaca row and the same conversation as messages are equal.

    Returns:
        Fingerprints of prompt (empty unless asked for) and whole.
    """
    if example.text is not None:
        whole = hash_text(example.text)
        return (whole if with_prompt else b""), whole
    turns = [
        f"{turn['role']} {turn['content']}" if len(turn) == 2 else describe_turn(turn) for turn in example.messages
    ]
    if example.tools:
        turns.insert(0, json.dumps(example.tools, sort_keys=True, default=str))
    prompt = hash_text(" \0 ".join(turns[:-1])) if with_prompt else b""
    if example.rejected:
        turns.append(describe_turn(example.rejected[-1]))
    if example.label is not None:  # two people who judge one answer differently are two rows
        turns.append(f"label {example.label}")
    return prompt, hash_text(" \0 ".join(turns))


def describe_turn(message: Message) -> str:
    """A message as text, with everything in it that could be learned."""
    parts = [f"{message['role']} {message['content']}"]
    parts += [json.dumps(message[key], sort_keys=True) for key in ("reasoning_content", "tool_calls") if key in message]
    return " \0 ".join(parts)


def hash_text(text: str) -> bytes:
    """Eight bytes of BLAKE2b of a text with its white space collapsed."""
    content = text.encode().translate(SPACES)
    while b"  " in content:  # several times quicker than split and join
        content = content.replace(b"  ", b" ")
    return blake2b(content.strip(), digest_size=FINGERPRINT_BYTES).digest()

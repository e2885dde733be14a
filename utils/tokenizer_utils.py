"""Messages → token ids and a loss mask, and messages → the prompt that inference sends. One class, so they cannot drift.

The mask comes from the template itself: the conversation is rendered once whole and once up to each assistant turn, and
what the longer text has more is the turn. No marker strings are typed anywhere. Every rendering is checked to be a prefix
of the whole; a template for which that fails is refused instead of being masked wrongly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from utils.data_formats import Example, Message
from utils.exceptions import DataError, ModelLoadingError, RecipeError

TEMPLATES = Path(__file__).parent / "templates"
PROBE = "\u25b8probe\u25c2"
LossOn = Literal["assistant", "last", "all"]
# Tokens that model makers reserve for padding, best first; eos is the last resort and harmless, because the loss mask goes
# by position and never by token id.
PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class EncodedExample:
    """One example as the model sees it.

    Attributes:
        input_ids: int64 token ids, shape (length,).
        loss_mask: bool, shape (length,); True where the token is learned.
        where: `file:line` of its row.
        is_text: True for raw text, which may be cut at its end; an answer may not.
    """

    input_ids: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    where: str
    is_text: bool = False

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens; the first token has nothing before it, so it can never be predicted."""
        return int(self.loss_mask[1:].sum())


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a model folder without importing a framework, and makes sure it can pad.

    Raises:
        ModelLoadingError: no tokenizer in the folder, or one that cannot be read.
    """
    # tokenizer.json is complete by itself; AutoTokenizer would import torch to read it.
    if not (folder / "tokenizer.json").exists():
        fix = "save the model's tokenizer there with save_pretrained"
        raise ModelLoadingError("there is no tokenizer.json", where=str(folder), fix=fix, code="no-tokenizer")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadingError(f"the tokenizer cannot be read: {error}", where=str(folder)) from error
    ensure_pad_token(tokenizer)
    return tokenizer


def ensure_pad_token(tokenizer: Any) -> None:
    """Gives a tokenizer without a pad token one, without adding to the vocabulary and without touching eos."""
    if tokenizer.pad_token_id is not None:
        return
    known = tokenizer.get_vocab()
    candidates = [token for token in PAD_CANDIDATES if token in known and token != tokenizer.eos_token]
    tokenizer.pad_token = candidates[0] if candidates else tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelLoadingError("the tokenizer has neither a pad nor an end-of-text token", code="no-tokenizer")


class TokenizerUtils:
    """A tokenizer together with the template and mask policy of one recipe."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str = "auto",
        strategy: Literal["auto", "chat", "standard"] = "auto",
        loss_on: LossOn = "assistant",
        system: str | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelLoadingError("the tokenizer has no end-of-text token", code="no-tokenizer")
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.system = system
        self.strategy = self._choose_strategy(strategy)
        self._template_name = template
        self._templates: dict[str, str] = {}
        vocabulary = tokenizer.added_tokens_decoder
        self._control_tokens = {index: token.content for index, token in vocabulary.items() if token.special}
        first = tokenizer("x").input_ids[:1]
        self._adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]

    def _choose_strategy(self, strategy: str) -> Literal["chat", "standard"]:
        """chat where asked for or, on auto, where the model has a template."""
        if strategy == "chat" and not self.tokenizer.chat_template:
            fix = "set data.strategy: standard, or choose an instruction-tuned model"
            raise RecipeError(
                "this model has no chat template", where="data.strategy", fix=fix, code="no-chat-template"
            )
        return "chat" if strategy == "chat" or (strategy == "auto" and self.tokenizer.chat_template) else "standard"

    def find_template(self, example_format: str = "messages") -> str:
        """The Jinja source that conversations of a format are rendered with."""
        name = self._template_name
        if example_format == "text":
            name = "raw"  # raw text was trained as it stands, whatever the model's template is
        if name == "auto":
            if self.strategy == "chat":
                return str(self.tokenizer.chat_template)
            name = "raw" if example_format == "prompt_completion" else "alpaca"
        if name not in self._templates:
            self._templates[name] = read_template(name)
        return self._templates[name]

    def hash_template(self, example_format: str = "messages") -> str:
        """SHA-256 of the template source: two runs with one hash saw the same prompts."""
        return hashlib.sha256(self.find_template(example_format).encode()).hexdigest()

    def render(self, messages: Sequence[Message], example_format: str = "messages", *, prompt: bool = False) -> str:
        """Renders a conversation in the sandbox of transformers.

        Args:
            messages: the conversation.
            example_format: format of the row, which picks the template under strategy standard.
            prompt: end with what makes the assistant speak.

        Raises:
            DataError: the template refuses these messages.
        """
        import jinja2

        messages = self._with_system(messages)
        source = self.find_template(example_format)
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=source, add_generation_prompt=prompt, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}", code="template") from error
        return str(text)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Puts the recipe's system message first where the row brings none."""
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def encode_prompt(self, messages: Sequence[Message], example_format: str = "messages") -> npt.NDArray[np.int64]:
        """Token ids that inference sends: exactly the beginning of what `encode_example` trains on.

        Args:
            messages: conversation that ends with the user.

        Returns:
            int64 ids, shape (length,).
        """
        self._refuse_control_tokens(messages, "the prompt")
        segments = self._split_turns(messages, example_format)
        tail = self.render(messages, example_format, prompt=True)
        done = sum(len(text) for text, _ in segments)
        return self._encode_segments([*segments, (tail[done:], False)])[0]

    def encode_example(self, example: Example) -> EncodedExample:
        """Encodes one example and its loss mask.

        Raises:
            DataError: control tokens inside a message, a template that hides or rewrites a turn, or nothing to learn.
        """
        if example.text is not None:
            self._refuse_control_tokens([{"content": example.text}], example.where)
            ids, mask = self._encode_segments([(example.text, True)])
            ids, mask = np.append(ids, self.tokenizer.eos_token_id), np.append(mask, True)
            return EncodedExample(ids, mask, example.where, is_text=True)
        self._refuse_control_tokens(example.messages, example.where)
        try:
            segments = self._split_turns(example.messages, example.format)
        except DataError as error:
            problem = error.problems[0]
            raise DataError(problem.message, where=example.where, fix=problem.fix, code=problem.code) from error
        encoded = EncodedExample(*self._encode_segments(self._apply_policy(segments)), example.where)
        if encoded.supervised_tokens == 0:
            raise DataError("no token of this row would be learned", where=example.where, code="no-signal")
        return encoded

    def _apply_policy(self, segments: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
        """Turns «is this the assistant» into «is this learned»."""
        if self.loss_on == "all":
            return [(text, True) for text, _ in segments]
        if self.loss_on == "last":
            last = max(index for index, (_, is_answer) in enumerate(segments) if is_answer)
            return [(text, index == last) for index, (text, _) in enumerate(segments)]
        return segments

    def _split_turns(self, messages: Sequence[Message], example_format: str) -> list[tuple[str, bool]]:
        """Splits the rendered conversation into (text, is it the assistant's) segments, in order.

        An assistant segment starts where a generation prompt ends and includes what ends the turn (`<|im_end|>`), but not
        the line break that some templates write after it: at inference, generation has stopped by then.
        """
        full = self.render(messages, example_format) if messages else ""
        segments: list[tuple[str, bool]] = []
        terminators: set[str] = set()
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], example_format, prompt=True)
            if not full.startswith(prompt) or len(prompt) < done:
                text = f"the chat template changes the text before turn {index + 1} when it is answered"
                raise DataError(text, fix="set data.template to another template", code="template-prefix")
            stop, terminator = self._find_answer_end(full, len(prompt), messages, index, example_format)
            segments += [(full[done : len(prompt)], False), (full[len(prompt) : stop], True)]
            terminators.add(terminator)
            done = stop
        if len(terminators) > 1:
            text = f"the chat template ends turns in different ways: {', '.join(sorted(terminators))}"
            raise DataError(text, fix="set data.template to another template", code="no-terminator")
        return segments

    def _find_answer_end(
        self, full: str, start: int, messages: Sequence[Message], index: int, example_format: str
    ) -> tuple[int, str]:
        """Where an assistant turn that starts at `start` ends, just behind a control token, and that token."""
        content = messages[index]["content"].strip()
        if not full[start:].lstrip().startswith(content):
            # The template writes something before the answer, such as an empty thinking block. Rendering another answer
            # shows how much; searching for the answer itself could find it inside what the template wrote.
            others = [*messages[:index], {"role": "assistant", "content": PROBE}, *messages[index + 1 :]]
            start = self.render(others, example_format).find(PROBE)
        start += len(full[start:]) - len(full[start:].lstrip())
        if not full[start:].startswith(content):
            text = f"the chat template hides or rewrites the answer of turn {index + 1}"
            raise DataError(text, fix="set data.template to another template", code="template-hides")
        after = start + len(content)
        found = [(full.find(token, after), token) for token in self._control_tokens.values()]
        ends = [(position + len(token), token) for position, token in found if position >= 0]
        if not ends:
            text = f"the chat template writes no token that ends turn {index + 1}, so the model could not learn to stop"
            raise DataError(text, fix="set data.template to another template", code="no-terminator")
        return min(ends)

    def _encode_segments(
        self, segments: Sequence[tuple[str, bool]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Encodes segment by segment, so that no token straddles a boundary between prompt and answer.

        The template has written all control tokens, so none are added, but for the BOS of raw text.
        """
        ids: list[int] = []
        mask: list[bool] = []
        for text, learned in segments:
            piece = self.tokenizer(text, add_special_tokens=False).input_ids if text else []
            ids += piece
            mask += [learned] * len(piece)
        bos = self.tokenizer.bos_token_id
        if self._adds_bos and ids[:1] != [bos]:
            ids, mask = [bos, *ids], [False, *mask]
        return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.bool_)

    def _refuse_control_tokens(self, messages: Sequence[Message], where: str) -> None:
        """A message that contains `<|im_end|>` could end its own turn: it is refused, in training and in inference.

        The contents are also looked at as one text: a template may write them without anything between.
        """
        contents = [message["content"] for message in messages]
        if self.system is not None:
            contents.insert(0, self.system)
        for text in (*contents, "".join(contents)):
            if found := next((token for token in self._control_tokens.values() if token in text), None):
                fix = "remove it, or write it in another way"
                raise DataError(f"the text holds the control token {found}", where=where, fix=fix, code="control-token")

    def find_stop_ids(self) -> list[int]:
        """Tokens that end an answer: eos and the one that the template writes after an assistant turn.

        The second is found by rendering, because for many families (`<end_of_turn>`, `<|eot_id|>`) it is not eos.
        """
        stops = {self.tokenizer.eos_token_id} - {None}
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        *_, (answer, _) = self._split_turns(probe, "messages")
        last = self.tokenizer(answer, add_special_tokens=False).input_ids[-1]
        if last in self._control_tokens:
            stops.add(last)
        return sorted(stops)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def read_template(name: str) -> str:
    """Reads a shipped template by name, or a `.jinja` file by path."""
    path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        fix = f"templates: auto, {shipped}, or the path of a .jinja file"
        raise RecipeError(f"there is no template {name!r}", where="data.template", fix=fix, code="no-template")
    return path.read_text(encoding="utf-8")


def fit_length(encoded: EncodedExample, max_length: int) -> EncodedExample | None:
    """Cuts a long example to `max_length` tokens without losing what is learned.

    Returns:
        The example, with its prompt cut from the left; or None if its learned tokens alone are too long. Raw text is cut at
        its end instead.
    """
    length = len(encoded.input_ids)
    if length <= max_length:
        return encoded
    if encoded.is_text:
        return EncodedExample(
            encoded.input_ids[:max_length], encoded.loss_mask[:max_length], encoded.where, is_text=True
        )
    first = int(np.argmax(encoded.loss_mask[1:])) + 1
    cut = length - max_length
    if cut >= first:  # the token before the first learned one must stay, for it is what predicts it
        return None
    return EncodedExample(encoded.input_ids[cut:], encoded.loss_mask[cut:], encoded.where)

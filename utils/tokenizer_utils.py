"""Messages → token ids and a loss mask, and messages → the prompt that inference sends. One class, so they cannot drift.

A run has one template (`chat_templates.py`), and `loss_masks.py` says which part of its text the assistant wrote. Here text
becomes tokens: piece by piece, so that no token straddles a prompt and its answer, and many rows in one call of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from utils.chat_templates import (
    TEMPLATES,
    ChatTemplate,
    TemplateRenderer,
    choose_strategy,
    list_shipped,
    resolve_template,
)
from utils.examples import Example
from utils.exceptions import DataError, ModelLoadingError, RecipeError
from utils.loss_masks import PROBE_CALL, PROBE_TOOL, TurnFinder, pin_thinking
from utils.messages import Message
from utils.piece_encoder import Encoded, Piece, PieceEncoder
from utils.piece_encoder import EncodedExample as EncodedExample
from utils.piece_encoder import fit_length as fit_length
from utils.turn_checks import iterate_texts, place

LossOn = Literal["assistant", "last", "all"]


def find_written_tokens(renderer: TemplateRenderer, tokenizer: Any) -> frozenset[str]:
    """Added tokens that a template writes around a message, whether they are marked as special or not.

    The tokenizers of DeepSeek-R1's distilled Qwen models hold `<｜User｜>` as an ordinary added token: in a message it would
    begin a turn all the same. Thinking tags stay out, for an answer may hold them.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} - {"<think>", "</think>"}
    texts = []
    for prompt in (False, True):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}][: 1 if prompt else 2]
        try:
            texts.append(renderer.render(messages, prompt=prompt))
        except DataError:
            continue  # a template that takes no such conversation; its special tokens are known anyway
    return frozenset(token for token in added if any(token in text for text in texts))


class TokenizerUtils:
    """A tokenizer together with the template and mask policy of one recipe."""

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate | str = "auto",
        *,
        strategy: Literal["auto", "chat", "standard"] = "auto",
        loss_on: LossOn = "assistant",
        system: str | None = None,
        row_formats: Collection[str] = (),
        keeps_ending: bool = False,
    ) -> None:
        """Puts a template around a tokenizer and checks that they fit.

        Args:
            tokenizer: of `load_tokenizer`.
            template: of `resolve_template`, or a name as in `data.template`.
            strategy: as in `data.strategy`.
            loss_on: as in `data.loss_on`.
            system: system message for conversations that bring none.
            row_formats: formats of the rows to train on; also `tools` and `thinking` where some row has them. Empty where
                nothing is trained, or where the template comes from a run.
            keeps_ending: examples end as the template ends a conversation, not with their last answer: a reward model is
                read at its last token, by us and by all other tools.

        Raises:
            RecipeError: no such template, or one whose control tokens this tokenizer lacks.
            ModelLoadingError: a tokenizer without end-of-text token, or a damaged template of the model.
        """
        if tokenizer.eos_token_id is None:
            raise ModelLoadingError("the tokenizer has no end-of-text token", code="no-tokenizer")
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.system = system
        self.keeps_ending = keeps_ending
        self.strategy = choose_strategy(strategy, own := tokenizer.chat_template)
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._control_tokens = frozenset({*added, *tokenizer.all_special_tokens})
        if isinstance(template, str):
            template = resolve_template(template, strategy=strategy, model_template=own, row_formats=row_formats)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._refuse_missing_tokens(template)
        self._control_tokens |= find_written_tokens(TemplateRenderer(template, special), tokenizer)
        self.template = pin_thinking(template, special, self._control_tokens, row_formats)
        self._finder = TurnFinder(TemplateRenderer(self.template, special), self._control_tokens)
        self._encoder = PieceEncoder(tokenizer.backend_tokenizer, self._control_tokens, tokenizer.bos_token_id)

    def _refuse_missing_tokens(self, template: ChatTemplate) -> None:
        """A control token that the tokenizer lacks would fall apart into letters, and no single token would end a turn."""
        missing = [token for token in template.control_tokens if token not in self._control_tokens]
        if not missing:
            return
        every = (
            ChatTemplate(name, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")) for name in list_shipped()
        )
        fitting = [shipped.name for shipped in every if self._control_tokens.issuperset(shipped.control_tokens)]
        message = f"template {template.name} needs {' '.join(missing)}, which this model's tokenizer does not have"
        fix = f"templates that work with this tokenizer: {', '.join(fitting)}"
        raise RecipeError(message, where="data.template", fix=fix, code="template-tokens")

    @property
    def begin_token_id(self) -> int | None:
        """The token that this tokenizer puts in front of every text, if it does."""
        return self._encoder.bos

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides an encoding: tokenizer, template, mask policy and system message."""
        parts = {
            "tokenizer": hashlib.sha256(self._encoder.write_json().encode()).hexdigest(),
            "special": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            "template": self.template.hash,
            "loss_on": self.loss_on,
            "system": self.system,
            "keeps_ending": self.keeps_ending,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, prompt: bool = False) -> str:
        """The text of a conversation, with the recipe's system message where it brings none.

        Args:
            messages: the conversation.
            tools: function schemas.
            prompt: end with what makes the assistant speak.

        Raises:
            DataError: the template refuses these messages.
        """
        return self._finder.render(self._with_system(messages), tools, prompt=prompt)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Puts the recipe's system message first where the row brings none."""
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> npt.NDArray[np.int64]:
        """Token ids that inference sends: exactly the beginning of what `encode_example` trains on.

        Args:
            messages: conversation that ends with the user or a tool.
            tools: function schemas.

        Returns:
            int64 ids, shape (length,).

        Raises:
            DataError: control tokens inside the messages, or a template that refuses them.
        """
        self._refuse_control_tokens(messages, tools)
        segments = self._finder.split_prompt(self._with_system(messages), tools)
        return self._encoder.encode_pieces([[(text, False) for text, _ in segments]])[0][0]

    def encode_example(self, example: Example) -> EncodedExample:
        """Encodes one example so that it ends with its last answer; see `encode_conversation` for all of it.

        `encode_prompt(example.prompt, example.tools)` is a prefix of its ids.

        Raises:
            DataError: control tokens inside a message, a template that hides or rewrites a turn, or nothing to learn.
        """
        return self.encode_conversation(example)[-1]

    def encode_conversation(self, example: Example) -> list[EncodedExample]:
        """Encodes one example into as many sequences as it takes to learn each turn once, as inference meets it.

        One sequence is enough unless the template shows an earlier turn in another way than when it was the last: most
        reasoning templates drop its thinking. Each such turn then has a sequence of its own. Under `loss_on: last` and
        `all`, there is only the one that ends with the last turn.

        Raises:
            DataError: as `encode_example`.
        """
        (result,) = self.encode_batch([example])
        if isinstance(result, DataError):
            raise result
        return result

    def encode_batch(self, examples: Sequence[Example]) -> list[list[EncodedExample] | DataError]:
        """Encodes many examples with one call of the tokenizer, which is several times quicker than one by one.

        Returns:
            For each example what `encode_conversation` gives, or the error that it raises.
        """
        plans: list[list[list[Piece]] | DataError] = []
        for example in examples:
            try:
                plans.append(self._plan(example))
            except DataError as error:
                plans.append(place(error, example.where))
        encoded = iter(
            self._encoder.encode_pieces([pieces for plan in plans if isinstance(plan, list) for pieces in plan])
        )
        return [
            plan if isinstance(plan, DataError) else self._collect(example, [next(encoded) for _ in plan])
            for example, plan in zip(examples, plans, strict=True)
        ]

    def _collect(self, example: Example, arrays: list[Encoded]) -> list[EncodedExample] | DataError:
        """Checks the sequences of one example."""
        is_text = example.text is not None
        encoded = [EncodedExample(ids, mask, example.where, is_text) for ids, mask in arrays]
        bos = self.tokenizer.bos_token_id
        for one in encoded:
            if bos is not None and one.input_ids[:2].tolist() == [bos, bos]:
                text = "the row would begin with two begin-of-text tokens"
                return DataError(text, where=example.where, fix="set data.template to another template", code="two-bos")
            if one.supervised_tokens == 0:
                return DataError("no token of this row would be learned", where=example.where, code="no-signal")
        return encoded

    def _plan(self, example: Example) -> list[list[Piece]]:
        """The sequences of an example as pieces of text."""
        if example.text is not None:
            self._refuse_control_tokens([{"role": "", "content": example.text}])
            return [[(example.text, True), (self.tokenizer.eos_token, True)]]
        self._refuse_control_tokens(example.messages, example.tools)
        messages = self._with_system(example.messages)
        if self.loss_on == "assistant":
            sequences = self._finder.split_all(messages, example.tools)
            return [[(text, index is not None) for text, index in segments] for segments in sequences]
        segments = self._finder.split_last(messages, example.tools)
        last = len(messages) - 1
        pieces = [(text, self.loss_on == "all" or index == last) for text, index in segments]
        return [[*pieces, (self._find_ending(messages, example, pieces), False)] if self.keeps_ending else pieces]

    def _find_ending(self, messages: Sequence[Message], example: Example, pieces: Sequence[Piece]) -> str:
        """What the template writes after the last answer of a conversation."""
        whole, known = self._finder.render(messages, example.tools), "".join(text for text, _ in pieces)
        if not whole.startswith(known):
            message = "the template shows the last answer in another way when it renders a whole conversation"
            fix = "set data.template to one that does not, such as chatml"
            raise DataError(message, where=example.where, fix=fix, code="other-ending")
        return whole[len(known) :]

    def _refuse_control_tokens(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
        """A message that contains `<|im_end|>` could end its own turn: it is refused, in training and in inference.

        All texts are looked at as one, and once more without white space at their ends: a template may trim them and write
        them without anything between.
        """
        texts = [self.system] if self.system is not None else []
        for message in messages:
            parts = [part for key, part in message.items() if key != "role"]
            texts += parts if len(parts) == 1 else iterate_texts(parts)
        texts += iterate_texts(list(tools))
        for joined in ("".join(texts), "".join([text.strip() for text in texts])):
            if found := self._finder.control_pattern.search(joined):
                fix = "remove it, or write it in another way"
                raise DataError(f"the text holds the control token {found[0]}", fix=fix, code="control-token")

    def save(self, folder: Path) -> None:
        """Writes the tokenizer with the template of this run, so that whoever loads the folder renders as it was trained."""
        own = self.tokenizer.chat_template
        self.tokenizer.chat_template = self.template.source
        self.tokenizer.save_pretrained(str(folder))
        self.tokenizer.chat_template = own

    def find_stop_ids(self) -> list[int]:
        """Tokens that end an answer: eos and those that the template writes after an answer or a tool call.

        They are found by rendering, because for many families (`<end_of_turn>`, `<|eot_id|>`, `<|call|>`) they are not eos.
        """
        stops = {self.tokenizer.eos_token_id}
        answer = {"role": "assistant", "content": "b"}
        call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
        for turn, tools in ((answer, ()), (call, (PROBE_TOOL,))):
            try:
                found = self._finder.find_turn([{"role": "user", "content": "a"}, turn], 1, tools)
            except DataError:
                continue  # a template that cannot be trained on can still be asked
            stops.add(self._encoder.encode(found.answer)[-1])
        return sorted(stops)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

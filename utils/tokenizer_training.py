"""A tokenizer for a new model, trained on its corpus through `tokenizers` and kept as JSON.

The whole corpus is read, held-out text included: the vocabulary says which tokens exist and nothing about how likely they are,
and a character that only the held-out part has would have no token there, so its loss would mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from config.structured_config import ScratchSection
from utils.exceptions import DataError, RunError
from utils.logging import get_logger

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SHOWN_CHARACTERS = 10


def train_tokenizer(scratch: ScratchSection, texts: Sequence[str]) -> Tokenizer:
    """Trains the tokenizer that the section asks for.

    Args:
        texts: all documents of the corpus, training and held-out.

    Raises:
        DataError: there is no text, or it holds one of the control tokens.
    """
    if not any(texts):
        raise DataError("there is no text to train a tokenizer on", where="data.train", code="no-rows")
    for token in (END_OF_TEXT, UNKNOWN):
        if any(token in text for text in texts):
            fix = "remove it, or write it in another way"
            raise DataError(f"the corpus holds the control token {token}", where="data.train", fix=fix)
    if scratch.tokenizer == "char":
        return make_character_tokenizer(texts)
    return train_byte_pairs(texts, scratch.vocab_size or 0)


def make_character_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Every character of the corpus is a token, in the order of Unicode, behind the two control tokens."""
    characters = sorted(set().union(*texts))
    vocabulary = {token: index for index, token in enumerate([END_OF_TEXT, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return tokenizer


def train_byte_pairs(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level byte pair encoding as GPT-2 has it (Radford et al. 2019, section 2.2): no text is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (got := tokenizer.get_vocab_size()) < vocab_size:
        get_logger().info("The corpus gives a vocabulary of %d tokens; scratch.vocab_size %d is more", got, vocab_size)
    return tokenizer


def check_trained(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that knows nothing but control tokens: it would turn every text into no token at all, in silence.

    Raises:
        RunError: it was not trained.
    """
    if tokenizer.token_to_id(END_OF_TEXT) is None or tokenizer.get_vocab_size() <= len((END_OF_TEXT, UNKNOWN)):
        fix = "train it on a corpus with train_tokenizer"
        raise RunError("the tokenizer is used before it was trained", fix=fix, code="untrained-tokenizer")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a trained tokenizer as transformers reads it: two JSON files.

    Raises:
        RunError: it was not trained.
    """
    check_trained(tokenizer)
    tokenizer.save(str(folder / TOKENIZER_FILES[0]))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(UNKNOWN) is not None:
        settings["unk_token"] = UNKNOWN
    (folder / TOKENIZER_FILES[1]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def refuse_unknown_characters(tokenizer: Any, text: str) -> None:
    """Refuses a prompt with characters that the tokenizer does not know, instead of showing the model something else.

    Args:
        tokenizer: of `load_tokenizer`.

    Raises:
        DataError: it names them.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    backend = tokenizer.backend_tokenizer
    if unknown not in backend.encode(text, add_special_tokens=False).ids:
        return
    characters = dict.fromkeys(text)
    missing = [one for one in characters if unknown in backend.encode(one, add_special_tokens=False).ids]
    shown = ", ".join(repr(one) for one in missing[:SHOWN_CHARACTERS]) or "something in this text"
    more = f" and {len(missing) - SHOWN_CHARACTERS} more" if len(missing) > SHOWN_CHARACTERS else ""
    fix = "write it without them, or train on a text that has them"
    raise DataError(f"this model's tokenizer does not know {shown}{more}", fix=fix, code="unknown-character")

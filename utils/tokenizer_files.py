"""The tokenizer of a model folder, loaded without a framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.exceptions import ModelLoadingError
from utils.piece_encoder import EncodedExample as EncodedExample
from utils.piece_encoder import fit_length as fit_length

# Tokens that model makers reserve for padding, best first; eos is the last resort and harmless, because the loss mask goes
# by position and never by token id.
PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


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
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers has no class of its own: what its Rust code finds is a bare Exception
        fix = "use another copy of the model's tokenizer.json and tokenizer_config.json"
        reason = " ".join(str(error).split())[:300]
        message = f"the tokenizer cannot be read: {reason}"
        raise ModelLoadingError(message, where=str(folder), fix=fix, code="bad-tokenizer") from error
    if not tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False):
        fix = "use another copy of the model's tokenizer.json"
        message = "the tokenizer has no vocabulary: every text would be empty"
        raise ModelLoadingError(message, where=str(folder), fix=fix, code="bad-tokenizer")
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

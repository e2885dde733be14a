"""Random models of a few thousand parameters, and the tokenizers that fit them: what the soak and the tests train.

Everything is real but the size: transformers' own Llama, and tokenizers of the library that all others use.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_llama_config(vocabulary: int, width: int, **changes: Any) -> LlamaConfig:
    """Two layers of a Llama whose key-value heads are shared and whose head is its embedding.

    Args:
        changes: of any key of the config.
    """
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(sizes | changes))


def save_llama(folder: Path, vocabulary: int, width: int, **changes: Any) -> None:
    """Writes a Llama with random weights, the same ones each time."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(make_llama_config(vocabulary, width, **changes)).save_pretrained(folder)


def build_tiny_model(folder: Path) -> Path:
    """A Llama of 6,000 parameters with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*SPECIAL, *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=SPECIAL[3:])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    save_llama(folder, len(fast), 16, max_position_embeddings=128, tie_word_embeddings=False)
    return folder


def shorten_tokenizer(source: Path, target: Path, count: int) -> None:
    """Copies the tokenizer of a model folder with its first `count` tokens only, which keep their ids.

    Byte-level BPE numbers control tokens, bytes and merges in this order, the commonest merges first: what is left is the same
    tokenizer, had its training ended there, and is read in a hundredth of the time.
    """
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {text: number for text, number in model["vocab"].items() if number < count}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target / name)

"""Prompts → answers with progress: the same ids that training saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.structured_config import GenerationSection
from utils.atomic_files import write_text_atomically
from utils.backends import Backend, GenerationSettings, MachineFacts
from utils.batching import Ids
from utils.cache_keys import describe_forward, hash_code
from utils.examples import Example
from utils.logging import get_logger
from utils.model_source import ModelSource, get_cache_folder
from utils.progress import Progress
from utils.tokenizer_utils import TokenizerUtils

# Whatever changes here or in the back end can change an answer of the untouched model, so one of older code is never read from
# the cache.
CODE = (
    "inference.py",
    "batching.py",
    "tokenizer_utils.py",
    "sliding_context.py",
    "../config/structured_config.py",
)


def make_settings(tokenizer: TokenizerUtils, generation: GenerationSection) -> GenerationSettings:
    """Generation settings with the stop tokens of this tokenizer's template."""
    return GenerationSettings(generation, tuple(tokenizer.find_stop_ids()), tokenizer.tokenizer.pad_token_id)


def encode_prompts(tokenizer: TokenizerUtils, examples: Sequence[Example]) -> list[Ids]:
    """Prompts of the examples: all turns but the last answer."""
    return [tokenizer.encode_prompt(example.prompt, example.tools) for example in examples]


@dataclass(frozen=True)
class Responder:
    """A loaded model with all that is needed to answer prompts."""

    backend: Backend
    model: Any
    tokenizer: TokenizerUtils
    settings: GenerationSettings
    batch_size: int

    def answer(self, prompts: Sequence[Ids], title: str) -> list[str]:
        """Answers every prompt, in order."""
        tokens = 0
        with Progress(title, len(prompts), "answers") as progress:

            def count(new: int) -> None:
                nonlocal tokens
                tokens += new
                progress.advance(1, f"{tokens / progress.seconds:.0f} tokens/s")

            generated = self.backend.generate(self.model, prompts, self.settings, self.batch_size, count)
        return [self.tokenizer.decode(ids).strip() for ids in generated]

    def answer_as_base(self, source: ModelSource, prompts: Sequence[Ids]) -> list[str]:
        """The untouched model's answers, read from the cache where the same question was asked before.

        Sampled answers are never cached: they are meant to differ.
        """
        machine, tokens = self.backend.describe_machine(self.model), len(self.tokenizer.tokenizer)
        path = find_baseline_file(source, prompts, self.settings, machine, tokens)
        greedy = self.settings.generation.temperature == 0
        if greedy and path.is_file():
            get_logger().info("Answers of the untouched model: read from %s", path)
            return list(json.loads(path.read_text(encoding="utf-8")))
        answers = self.answer(prompts, "Answers of the untouched model")
        if greedy:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, json.dumps(answers, ensure_ascii=False))
        return answers


def find_baseline_file(
    source: ModelSource, prompts: Sequence[Ids], settings: GenerationSettings, machine: MachineFacts, tokens: int
) -> Path:
    """Cache file for the untouched model's greedy answers: named by everything they depend on.

    Args:
        tokens: size of the tokenizer, added tokens included.
    """
    facts = {
        "model": [source.hash_weights(), source.hash_adapter(), source.config, tokens],
        "settings": [settings.generation.model_dump(), settings.stop_ids, settings.pad_id],
        "machine": [machine.device_name, machine.dtype, machine.quantization],
        "code": hash_code(CODE),
        "forward": describe_forward(machine.backend, machine.quantization),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for prompt in prompts:
        digest.update(prompt.tobytes() + b"|")
    return get_cache_folder() / "baselines" / f"{digest.hexdigest()[:32]}.json"

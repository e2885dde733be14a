"""Which keys contradict training from scratch: a new model has no weights and no chat template, and reads text, not rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from config.structured_config import DataSource, Recipe, ScratchSection

# What is broken: the key, a message and a fix, as `RuleViolation` of config/recipe_rules.py has them.
Broken = tuple[tuple[str, ...], str, str]
TEXT_SUFFIX = ".txt"


def find_scratch_violations(recipe: Recipe) -> Iterator[Broken]:
    """Yields every rule between `scratch` and the rest of the recipe that is broken."""
    scratch = recipe.scratch
    if recipe.model.init == "pretrained":
        if scratch is not None:
            message = "the section scratch does nothing under model.init: pretrained"
            yield ("scratch",), message, "set model.init: scratch, or remove the section"
        yield from find_text_files(recipe)
        return
    if scratch is None:
        fix = "add `scratch: {architecture: llama}`; docs/recipe_reference.md has the other keys"
        yield ("model", "init"), "init: scratch needs the section scratch, which says how large the model is", fix
        return
    yield from find_size_violations(scratch)
    yield from find_model_violations(recipe)
    yield from find_data_violations(recipe, scratch)


def find_size_violations(scratch: ScratchSection) -> Iterator[Broken]:
    """Yields sizes that make no model, windows with gaps between them, and a vocabulary that nobody asked for."""
    if scratch.width % scratch.heads:
        message = f"width {scratch.width} cannot be shared out among {scratch.heads} heads"
        yield ("scratch", "width"), message, f"set it to a multiple of {scratch.heads}"
    elif scratch.architecture == "llama" and scratch.width // scratch.heads % 2:
        message = f"llama turns pairs of numbers, and a head of {scratch.width // scratch.heads} has an odd one"
        yield ("scratch", "width"), message, f"set it to a multiple of {2 * scratch.heads}"
    if scratch.stride is not None and scratch.stride >= scratch.context:
        message = f"with stride {scratch.stride} and context {scratch.context} some tokens would never be learned"
        yield ("scratch", "stride"), message, f"set it to {scratch.context - 1} or less"
    if scratch.tokenizer == "char" and scratch.vocab_size is not None:
        message = "vocab_size does nothing under tokenizer: char, which has a token for each character of the corpus"
        yield ("scratch", "vocab_size"), message, "remove it, or set tokenizer: bpe"
    if scratch.tokenizer == "bpe" and scratch.vocab_size is None:
        yield ("scratch", "tokenizer"), "tokenizer: bpe needs vocab_size", "add vocab_size: 1024"


def find_model_violations(recipe: Recipe) -> Iterator[Broken]:
    """Yields what only existing weights can have."""
    model = recipe.model
    if recipe.lora is not None:
        message = "an adapter on random weights that stay frozen cannot learn a language"
        yield ("lora",), message, "remove the lora section: all weights are trained"
    if model.quantization != "none":
        yield ("model", "quantization"), "a new model has no weights to quantise", "set quantization: none"
    if model.adapter is not None:
        yield ("model", "adapter"), "a new model has no weights that an adapter could be folded into", "remove it"
    if model.revision is not None:
        yield ("model", "revision"), "a new model has no revision on a hub", "remove it"
    if model.trust_remote_code:
        yield ("model", "trust_remote_code"), "a new model brings no code", "remove it"


def find_data_violations(recipe: Recipe, scratch: ScratchSection) -> Iterator[Broken]:
    """Yields what is for conversations or for rows of their own length."""
    data = recipe.data
    if data.format not in ("auto", "text"):
        message = f"a new model learns from raw text, and format is {data.format}"
        yield ("data", "format"), message, 'write the rows as {"text": …}, and set format: text'
    if data.strategy == "chat":
        yield ("data", "strategy"), "a new model has no chat template", "set strategy: standard, or remove it"
    for key, value, usual in (
        ("template", data.template, "auto"),
        ("system", data.system, None),
        ("loss_on", data.loss_on, "assistant"),
        ("overlong", data.overlong, "error"),
    ):
        if value != usual:
            yield ("data", key), f"{key} does nothing here: every token of a text is learned, in windows", "remove it"
    if "max_length" in data.model_fields_set and data.max_length != scratch.context:
        message = f"windows have scratch.context tokens, {scratch.context}, and max_length is {data.max_length}"
        yield ("data", "max_length"), message, "remove max_length, and set scratch.context"
    for source in list_sources(recipe):
        if not isinstance(source, str) and source.weight != 1:
            message = f"{source.source} has a weight, and a corpus is read once"
            yield ("data", "train"), message, "remove the weight"
    if recipe.training.method != "sft":
        message = f"method {recipe.training.method} compares answers, and a new model learns from raw text"
        yield ("training", "method"), message, "set method: sft"
    if recipe.training.small_data == "gentle":
        message = "small_data looks at the number of rows, and a corpus is cut into windows"
        yield ("training", "small_data"), message, "remove it"
    if recipe.training.packing:
        yield ("training", "packing"), "windows are all of one length: there is nothing to pack", "set packing: false"
    for name in recipe.evaluation.metrics:
        if name not in ("loss", "perplexity"):
            message = f"{name} judges answers, and raw text has none"
            yield ("evaluation", "metrics"), message, "set metrics: [loss, perplexity]"


def find_text_files(recipe: Recipe) -> Iterator[Broken]:
    """Yields text files under a pretrained model, which learns from rows."""
    for source in list_sources(recipe):
        name = source if isinstance(source, str) else source.source
        if name.lower().endswith(TEXT_SUFFIX):
            message = f"{name} is one text without rows, which only a new model learns from"
            fix = 'write it as rows {"text": …} in a .jsonl file, or set model.init: scratch'
            yield ("data", "train"), message, fix


def list_sources(recipe: Recipe) -> list[str | DataSource]:
    """The entries of `data.train` and `data.eval`."""
    found: list[str | DataSource] = []
    for asked in (recipe.data.train, recipe.data.eval):
        if asked is not None:
            found += asked if isinstance(asked, tuple) else [asked]
    return found

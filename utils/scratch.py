"""A new model before it has weights: its corpus, its tokenizer, its config, and the windows that it learns from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from config.recipe_io import LoadedRecipe, locate_problems
from config.structured_config import DataSection, Recipe, ScratchSection
from utils.cache_entries import open_or_build
from utils.cache_keys import hash_code, hash_facts
from utils.data_sources import find_sources
from utils.exceptions import DataError
from utils.logging import get_logger
from utils.methods.sft import EncodingCounts
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.prepared_data import CHUNK, EVALUATION, TRAIN, PreparedData, SourceHashes, make_key
from utils.row_checks import RowScan, iterate_examples, scan_rows
from utils.text_windows import Tokens, make_examples, split_tokens
from utils.token_cache import TokenWriter, read_tokens
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_training import END_OF_TEXT, TOKENIZER_FILES, train_tokenizer, write_tokenizer
from utils.tokenizer_utils import TokenizerUtils

# Whatever changes here can change a token or a mask of a new model, beside the modules that `prepared_data.CODE` names.
CODE = ("scratch.py", "text_windows.py", "tokenizer_training.py")


@dataclass(frozen=True)
class Corpus:
    """All documents, in reading order.

    Attributes:
        train: of `data.train`; without `data.eval` a block at its end is held out, token by token.
        evaluation: of `data.eval`.
    """

    train: list[str]
    evaluation: list[str]


def get_scratch(recipe: Recipe) -> ScratchSection:
    """The section of a recipe that has one."""
    assert recipe.scratch is not None
    return recipe.scratch


def settle_recipe(loaded: LoadedRecipe) -> LoadedRecipe:
    """Writes down what follows from training from scratch: window length and stride."""
    scratch = get_scratch(loaded.recipe)
    if loaded.recipe.data.max_length != scratch.context:
        loaded = loaded.with_automatic_value("data.max_length", scratch.context, "windows have scratch.context tokens")
    if scratch.stride is None:
        reason = "windows share one token, so that each token is learned once an epoch"
        loaded = loaded.with_automatic_value("scratch.stride", scratch.context - 1, reason)
    return loaded


def scan_corpus(loaded: LoadedRecipe) -> RowScan:
    """Reads and checks all documents; nothing is held out by row, for the split is by token.

    Raises:
        DataError: as `scan_rows`, or a row that is no raw text.
    """
    data = loaded.recipe.data.model_copy(update={"eval_fraction": 0.0})
    scan = scan_rows(data, loaded.recipe.seed, loaded.find_origin)
    if others := sorted(set(scan.formats) - {"text"}):
        fix = 'write the rows as {"text": …}, or name a .txt file'
        message = f"a new model learns from raw text, and {scan.formats[others[0]]} rows are {others[0]}"
        raise DataError(message, where=loaded.find_origin("data.train"), fix=fix, code="not-text")
    return replace(scan, warnings=tuple(problem for problem in scan.warnings if problem.code != "few-rows"))


def read_corpus(loaded: LoadedRecipe) -> Corpus:
    """Reads the documents of both sets into memory."""
    data = loaded.recipe.data
    return Corpus(
        read_documents(loaded, data, "train"), read_documents(loaded, data, "eval") if data.eval is not None else []
    )


def read_documents(loaded: LoadedRecipe, data: DataSection, key: str) -> list[str]:
    """The texts of `data.train` or `data.eval`."""
    asked = data.train if key == "train" else data.eval
    sources = find_sources(asked, loaded.find_origin(f"data.{key}")) if asked is not None else []
    return [example.text or "" for example in iterate_examples(sources, data)]


def open_new_model(loaded: LoadedRecipe, hashes: SourceHashes) -> ModelSource:
    """Trains the tokenizer, or finds it in the cache, and derives the model's config.

    Args:
        hashes: of the corpus, by `describe_sources`.

    Raises:
        DataError: the corpus has no text.
    """
    recipe, scratch = loaded.recipe, get_scratch(loaded.recipe)
    facts = {
        "corpus": hashes,
        "columns": recipe.data.columns,
        "tokenizer": [scratch.tokenizer, scratch.vocab_size],
        "code": hash_code(CODE),
        "version": importlib.metadata.version("tokenizers"),
    }

    def build(folder: Path) -> dict[str, Any]:
        corpus = read_corpus(loaded)
        with locate_problems(loaded):
            write_tokenizer(train_tokenizer(scratch, [*corpus.train, *corpus.evaluation]), folder)
        return {}

    folder, _ = open_or_build(hash_facts(facts), TOKENIZER_FILES, build)
    tokenizer = load_tokenizer(folder).backend_tokenizer
    size = tokenizer.get_vocab_size()
    get_logger().info("Tokenizer: %s, %d tokens, trained on the whole corpus", scratch.tokenizer, size)
    config = scratch.to_model_config(size, tokenizer.token_to_id(END_OF_TEXT))
    return ModelSource(recipe.model.name, folder, config, seed=recipe.seed)


def prepare_windows(loaded: LoadedRecipe, tokenizer: TokenizerUtils, hashes: SourceHashes) -> PreparedData:
    """Encodes the corpus once, splits it by token and cuts both parts into windows; or finds them in the token cache.

    Raises:
        DataError: the corpus is shorter than one window.
    """
    recipe = loaded.recipe
    scratch = recipe.scratch.model_dump(mode="json") if recipe.scratch else None
    key = hash_facts({"rows": make_key(loaded, tokenizer, hashes), "scratch": scratch, "code": hash_code(CODE)})

    def build(folder: Path) -> dict[str, Any]:
        return write_windows(loaded, tokenizer, folder)

    folder, facts = open_or_build(key, (TRAIN, EVALUATION), build)
    counts = {name: EncodingCounts(**facts[name]) for name in ("train", "evaluation")}
    return PreparedData(read_tokens(folder / TRAIN), read_tokens(folder / EVALUATION), counts, key, hashes)


def write_windows(loaded: LoadedRecipe, tokenizer: TokenizerUtils, folder: Path) -> dict[str, Any]:
    """Writes the windows of both sets and counts them."""
    recipe, scratch = loaded.recipe, get_scratch(loaded.recipe)
    corpus = read_corpus(loaded)
    train, evaluation = encode_corpus(corpus, tokenizer, recipe.data.eval_fraction)
    if len(train) < scratch.context:
        fix = "lower scratch.context, or take a longer text"
        message = f"{len(train)} training tokens do not fill one window of {scratch.context}"
        raise DataError(message, where=loaded.find_origin("scratch.context"), fix=fix, code="short-corpus")
    stride = scratch.stride or scratch.context - 1
    facts = {}
    for name, file, tokens, documents, limit in (
        ("train", TRAIN, train, corpus.train, None),
        ("evaluation", EVALUATION, evaluation, corpus.evaluation, recipe.evaluation.max_examples),
    ):
        windows = islice(make_examples(tokens, scratch.context, stride, held_out=name == "evaluation"), limit)
        examples = write_examples(windows, folder / file)
        facts[name] = asdict(EncodingCounts(rows=len(documents), examples=examples))
    return facts


def write_examples(examples: Iterator[EncodedExample], path: Path) -> int:
    """Writes examples into one Arrow file and returns how many they were."""
    count = 0
    with TokenWriter(path) as writer:
        while chunk := list(islice(examples, CHUNK)):
            writer.write(chunk, 0)
            count += len(chunk)
    return count


def encode_corpus(corpus: Corpus, tokenizer: TokenizerUtils, eval_fraction: float) -> tuple[Tokens, Tokens]:
    """Token ids of the training and of the held-out part."""
    train = encode_documents(corpus.train, tokenizer)
    if corpus.evaluation:
        return train, encode_documents(corpus.evaluation, tokenizer)
    return split_tokens(train, eval_fraction)


def encode_documents(documents: list[str], tokenizer: TokenizerUtils) -> Tokens:
    """Token ids of documents behind each other, each ended by the end-of-text token; int32, shape (tokens,)."""
    backend, end = tokenizer.tokenizer.backend_tokenizer, tokenizer.tokenizer.eos_token_id
    parts = [np.zeros(0, dtype=np.int32)]
    for text in documents:
        ids = backend.encode(text, add_special_tokens=False).ids
        parts.append(np.array([*ids, end], dtype=np.int32))
    return np.concatenate(parts)

"""The two sets of a run as tokens: rows are read a second time, encoded in chunks and kept in the token cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.recipe_io import LoadedRecipe
from utils.cache_entries import open_or_build
from utils.cache_keys import hash_code
from utils.data_sources import RowSource, find_sources, hash_source
from utils.examples import Example
from utils.exceptions import DataError
from utils.logging import get_logger
from utils.methods.pairs import encode_pairs
from utils.methods.sft import EncodingCounts, encode_rows
from utils.problem_log import ProblemLog
from utils.progress import Progress
from utils.row_checks import RowScan, iterate_examples
from utils.token_cache import EncodedSet, TokenWriter, read_tokens
from utils.tokenizer_utils import TokenizerUtils

TRAIN, EVALUATION = "train.arrow", "evaluation.arrow"
# `train` and `eval` → (name, content hash) of each source in reading order; `eval` is None where data.eval names nothing.
SourceHashes = dict[str, list[tuple[str, str]] | None]
CHUNK = 1000
# Whatever changes here can change a token or a mask, so the cache of an older version is never read.
CODE = (
    "data_formats",
    "messages",
    "data_loading",
    "file_lines",
    "table_files",
    "fingerprints",
    "row_groups",
    "data_sources",
    "hub_datasets",
    "row_checks",
    "examples",
    "text_files",
    "chat_templates",
    "template_sandbox",
    "template_limits",
    "piece_encoder",
    "turn_checks",
    "loss_masks",
    "tokenizer_utils",
    "token_cache",
    "prepared_data",
    "methods/sft",
    "methods/pairs",
)


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run, checked and encoded.

    Attributes:
        train: encoded training rows, mixed by their weights.
        evaluation: encoded held-out rows, possibly none.
        counts: what became of the rows of each set, by name (`train`, `evaluation`).
        key: name of the entry in the token cache.
        hashes: of the rows as they were read.
    """

    train: EncodedSet
    evaluation: EncodedSet
    counts: dict[str, EncodingCounts]
    key: str
    hashes: SourceHashes


def prepare_data(loaded: LoadedRecipe, scan: RowScan, tokenizer: TokenizerUtils, hashes: SourceHashes) -> PreparedData:
    """Encodes both sets, or finds them in the token cache.

    Args:
        hashes: of the rows, by `describe_sources`.

    Raises:
        DataError: rows that cannot be encoded or are too long; or nothing is left to train on.
    """
    key = make_key(loaded, tokenizer, hashes)

    def build(folder: Path) -> dict[str, Any]:
        return write_sets(loaded, scan, tokenizer, folder)

    folder, facts = open_or_build(key, (TRAIN, EVALUATION), build)
    counts = {name: EncodingCounts(**facts[name]) for name in ("train", "evaluation")}
    report_counts(loaded, counts)
    train = read_tokens(folder / TRAIN)
    weights = [source.weight for source in find_sources(loaded.recipe.data.train, loaded.find_origin("data.train"))]
    order = mix(train.sources, weights, loaded.recipe.seed)
    refuse_lost_sources(loaded, weights, train.sources, order)
    train = EncodedSet(train.tables, order)
    return PreparedData(train, read_tokens(folder / EVALUATION), counts, key, hashes)


def write_sets(loaded: LoadedRecipe, scan: RowScan, tokenizer: TokenizerUtils, folder: Path) -> dict[str, Any]:
    """Writes both Arrow files; every row that cannot be encoded is counted before anything is raised."""
    problems = ProblemLog()
    facts: dict[str, Any] = {}
    encode = encode_pairs if loaded.recipe.training.learns_pairs else encode_rows
    sets = {
        "train": (TRAIN, scan.train_rows - len(scan.held_out)),
        "evaluation": (EVALUATION, scan.evaluation_rows),
    }
    for name, (file_name, rows) in sets.items():
        counts = EncodingCounts()
        held_out = name == "evaluation"
        title = f"Encoding {'held-out' if held_out else 'training'} rows"
        with TokenWriter(folder / file_name) as writer, Progress(title, rows, "rows") as progress:
            for source, chunk in iterate_chunks(loaded, scan, held_out=held_out):
                writer.write(encode(chunk, tokenizer, loaded.recipe.data, counts, problems), source)
                progress.advance(len(chunk))
        facts[name] = asdict(counts)
    problems.raise_if_any()
    return facts


def iterate_chunks(loaded: LoadedRecipe, scan: RowScan, *, held_out: bool) -> Iterator[tuple[int, list[Example]]]:
    """Yields (number of the source, at most CHUNK examples of it) of one set, in reading order."""
    left = loaded.recipe.evaluation.max_examples if held_out else None
    for number, examples in iterate_sets(loaded, scan, held_out=held_out):
        while chunk := list(islice(examples, CHUNK if left is None else min(CHUNK, left))):
            left = None if left is None else left - len(chunk)
            yield number, chunk


def iterate_sets(loaded: LoadedRecipe, scan: RowScan, *, held_out: bool) -> Iterator[tuple[int, Iterator[Example]]]:
    """Yields (number of the source, its examples) of one set."""
    data = loaded.recipe.data
    if held_out and data.eval is not None:
        for number, source in enumerate(find_sources(data.eval, loaded.find_origin("data.eval"))):
            yield number, iterate_examples([source], data)
        return
    position = 0

    def choose(examples: Iterator[Example]) -> Iterator[Example]:
        nonlocal position
        for example in examples:
            if (position in scan.held_out) == held_out:
                yield example
            position += 1

    for number, source in enumerate(find_sources(data.train, loaded.find_origin("data.train"))):
        yield number, choose(iterate_examples([source], data))


def iterate_held_out(loaded: LoadedRecipe, scan: RowScan) -> Iterator[Example]:
    """The held-out rows that an evaluation uses, before encoding."""
    every = (example for _, examples in iterate_sets(loaded, scan, held_out=True) for example in examples)
    return islice(every, loaded.recipe.evaluation.max_examples)


def mix(sources: npt.NDArray[np.int64], weights: Sequence[float], seed: int) -> npt.NDArray[np.int64]:
    """Which examples an epoch sees: each as often as the weight of its source says.

    Args:
        sources: number of the source of each example, shape (examples,).
        weights: by number; of 2.5, every example stands in the epoch twice and a seeded half of them once more.

    Returns:
        Sorted indices, int64.
    """
    chosen = []
    for number, weight in enumerate(weights):
        own = np.flatnonzero(sources == number)
        whole = int(weight)
        rest = np.random.default_rng([seed, number]).permutation(own)[: round((weight - whole) * len(own))]
        chosen += [np.repeat(own, whole), rest]
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *chosen]))


def refuse_lost_sources(
    loaded: LoadedRecipe, weights: Sequence[float], sources: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
) -> None:
    """Refuses a mixture in which the weight of a source leaves none of its rows.

    Raises:
        DataError: naming the first such source.
    """
    kept = set(sources[order].tolist())
    for number in sorted(set(sources.tolist()) - kept):
        rows = int((sources == number).sum())
        message = f"weight {weights[number]:g} leaves none of the {rows} rows of source {number + 1}"
        fix = f"raise it to {1 / rows:.2g} or more, or remove the source"
        raise DataError(message, where=loaded.find_origin("data.train"), fix=fix, code="no-rows")


def make_key(loaded: LoadedRecipe, tokenizer: TokenizerUtils, hashes: SourceHashes) -> str:
    """Name of the entry in the token cache: a hash over everything that a token or a mask depends on."""
    recipe = loaded.recipe
    facts = {
        "code": hash_code([f"{name}.py" for name in CODE]),
        "versions": [importlib.metadata.version(name) for name in ("tokenizers", "jinja2")],
        "tokenizer": tokenizer.hash,
        "data": hashes,
        "policy": recipe.data.model_dump(mode="json", exclude={"train", "eval"}),
        "pairs": recipe.training.learns_pairs,
        "seed": recipe.seed if recipe.data.eval is None else None,
        "held_out": recipe.evaluation.max_examples,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def describe_sources(loaded: LoadedRecipe) -> SourceHashes:
    """Name and content hash of each source; a run asks once, for that reads every file to its end."""
    data = loaded.recipe.data

    sources: dict[str, list[RowSource] | None] = {
        "train": find_sources(data.train, loaded.find_origin("data.train")),
        "eval": None if data.eval is None else find_sources(data.eval, loaded.find_origin("data.eval")),
    }
    return {
        key: None if found is None else [(source.name, hash_source(source)) for source in found]
        for key, found in sources.items()
    }


def hash_contents(sources: SourceHashes) -> dict[str, str | None]:
    """SHA-256 over the contents of `train` and `eval`, each in order, whatever the files are called."""
    return {
        key: None if found is None else hashlib.sha256("".join(each for _, each in found).encode()).hexdigest()
        for key, found in sources.items()
    }


def report_counts(loaded: LoadedRecipe, counts: dict[str, EncodingCounts]) -> None:
    """Logs what overlong rows cost; nothing is left out in silence.

    Raises:
        DataError: no training row is left.
    """
    limit = loaded.recipe.data.max_length
    for name, count in counts.items():
        if count.dropped:
            shown = ", ".join(count.dropped_places)
            message = "%d of %d %s rows left out, or turns of them, longer than %d tokens: %s"
            get_logger().warning(message, count.dropped, count.rows, name, limit, shown)
        if count.cut:
            get_logger().warning("%d %s rows cut to %d tokens; no answer was cut", count.cut, name, limit)
    if not counts["train"].examples:
        where = loaded.find_origin("data.max_length")
        raise DataError("no training row is short enough", where=where, fix="raise data.max_length", code="no-rows")

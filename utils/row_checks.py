"""The first pass over the rows of a run: every row checked, copies and leaks found, in a fixed memory per row.

Of each row only two fingerprints and its line stay in memory: 20 bytes.
"""

from __future__ import annotations

import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from config.structured_config import DataSection
from utils.data_formats import read_example
from utils.data_sources import RowSource, find_sources, find_unknown_columns, iterate_rows
from utils.examples import Example
from utils.exceptions import DataError, Problem
from utils.fingerprints import fingerprint_example
from utils.problem_log import ProblemLog
from utils.row_groups import RowGroups, choose_held_out, find_groups, find_shared, find_split_groups

FEW_ROWS = 10
FEW_SHARED_PROMPTS = 5
SHARED_PROMPTS = 0.1  # share of the held-out rows above which shared prompts are worth a warning
SHOWN_PAIRS = 3
MOST_NAMED = 8


@dataclass(frozen=True)
class RowScan:
    """What the first pass found.

    Attributes:
        train_rows: rows of `data.train`, held-out ones included.
        evaluation_rows: rows of `data.eval`, or held-out rows of `data.train`.
        formats: rows of `data.train` by format, held-out ones included.
        held_out: indices into the rows of `data.train` in reading order; empty when `data.eval` is given.
        warnings: what is allowed but rarely meant.
        source_rows: rows of each source of `data.train`, in order.
        duplicates: rows of `data.train` that repeat an earlier one.
        features: `tools` and `thinking`, where some row of `data.train` has them.
        evaluation_formats: rows of `data.eval` by format.
        first_rows: place of the first row of each format, in either set.
    """

    train_rows: int
    evaluation_rows: int
    formats: dict[str, int]
    held_out: frozenset[int]
    warnings: tuple[Problem, ...]
    source_rows: tuple[int, ...] = ()
    duplicates: int = 0
    features: frozenset[str] = frozenset()
    evaluation_formats: dict[str, int] = field(default_factory=dict)
    first_rows: dict[str, str] = field(default_factory=dict)

    @property
    def all_formats(self) -> dict[str, int]:
        """Rows of both sets by format."""
        return dict(Counter(self.formats) + Counter(self.evaluation_formats))


@dataclass
class ScannedSet:
    """One of the two sets, as fingerprints in reading order.

    Attributes:
        fingerprints: 8 bytes a row, of the whole conversation.
        prompts: 8 bytes a row, of the conversation without its answer.
        lines: 4 bytes a row.
        starts: index of each source's first row.
        first_rows: place of the first row of each format.
    """

    sources: Sequence[RowSource]
    fingerprints: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)
    lines: array[int] = field(default_factory=lambda: array("I"))
    starts: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    features: set[str] = field(default_factory=set)
    first_rows: dict[str, str] = field(default_factory=dict)

    def find_place(self, index: int) -> str:
        """`file:line` of a row."""
        number = max(number for number, start in enumerate(self.starts) if start <= index)
        return f"{self.sources[number].name}:{self.lines[index]}"


def scan_rows(data: DataSection, seed: int, find_origin: Callable[[str], str]) -> RowScan:
    """Reads all rows of both sets once and checks each by itself and against the others.

    Args:
        seed: of the held-out split.
        find_origin: key → its place in the recipe, for messages.

    Raises:
        DataError: everything that is wrong with both sets: all problems counted, the first ones shown.
    """
    log = ProblemLog()
    train_sources, evaluation_sources = find_both_sources(data, find_origin)
    unseen = set(data.columns)
    train = scan_set(train_sources, data, log, unseen)
    evaluation = scan_set(evaluation_sources, data, log, unseen)
    for problem in find_unknown_columns(unseen, train_sources):
        log.add(problem, first=True)
    log.raise_if_any()
    groups = find_groups(train.fingerprints)
    warnings = list(warn_duplicates(train, groups, find_origin("data.train")))
    held_out: frozenset[int] = frozenset()
    rows = len(train.lines)
    if data.eval is None:
        held_out = choose_held_out(find_split_groups(train.prompts, groups), data.eval_fraction, seed)
        warnings += warn_split_prompts(train, held_out, find_origin("data.eval_fraction"))
    else:
        check_leakage(train, evaluation, find_origin("data.eval"))
        warnings += warn_shared_prompts(train, evaluation, find_origin("data.eval"))
    if rows - len(held_out) < FEW_ROWS:
        text = f"only {rows - len(held_out)} training rows"
        fix = "expect the model to repeat them; add rows if there are more"
        warnings.append(Problem("few-rows", text, find_origin("data.train"), fix, "warning"))
    return RowScan(
        rows,
        len(evaluation.lines) or len(held_out),
        dict(train.formats),
        held_out,
        tuple(warnings),
        tuple(end - start for start, end in zip(train.starts, [*train.starts[1:], rows], strict=True)),
        groups.copies,
        frozenset(train.features),
        dict(evaluation.formats),
        evaluation.first_rows | train.first_rows,
    )


def find_both_sources(data: DataSection, find_origin: Callable[[str], str]) -> tuple[list[RowSource], list[RowSource]]:
    """The sources of both sets; what is wrong with either is raised together."""
    found: dict[str, list[RowSource]] = {"data.train": [], "data.eval": []}
    problems: list[Problem] = []
    for key, asked in (("data.train", data.train), ("data.eval", data.eval)):
        try:
            found[key] = find_sources(asked, find_origin(key)) if asked is not None else []
        except DataError as error:
            problems += error.problems
    train, evaluation = found.values()
    for source in evaluation:
        if source.weight != 1:
            fix = "remove the weight: held-out rows count once each"
            problems.append(Problem("eval-weight", f"{source.name} has a weight", find_origin("data.eval"), fix))
    problems += find_same_sources(train, evaluation, find_origin("data.eval"))
    if problems:
        raise DataError.from_problems(problems)
    return train, evaluation


def find_same_sources(train: Sequence[RowSource], evaluation: Sequence[RowSource], where: str) -> Iterator[Problem]:
    """Yields files that both sets name."""

    def identify(source: RowSource) -> Any:
        hub = source.hub
        return source.path.resolve() if source.path else hub and (hub.source, hub.subset, hub.split, hub.revision)

    known = {identify(source): source.name for source in train}
    for source in evaluation:
        if identify(source) in known:
            text = f"{source.name} is in both data.train and data.eval, so the test would be on known answers"
            fix = "name another file, or remove data.eval to hold out data.eval_fraction of the rows"
            yield Problem("leakage", text, where, fix)


def scan_set(sources: Sequence[RowSource], data: DataSection, log: ProblemLog, unseen: set[str]) -> ScannedSet:
    """Reads and checks the rows of a set; keeps what later checks need, and takes the columns it sees out of `unseen`."""
    scanned = ScannedSet(sources)
    columns, format_name = data.columns, data.format
    for source in sources:
        scanned.starts.append(len(scanned.lines))
        try:
            for row in iterate_rows(source, columns, unseen):
                if isinstance(row, Problem):
                    log.add(row)
                    continue
                try:
                    add_example(scanned, read_example(row, format_name))
                except DataError as error:
                    log.add(error.problems[0])
        except DataError as error:
            for problem in error.problems:
                log.add(problem)
    return scanned


def add_example(scanned: ScannedSet, example: Example) -> None:
    """Keeps the fingerprint and line of one row, and counts its format."""
    prompt, whole = fingerprint_example(example, with_prompt=True)
    scanned.fingerprints += whole
    scanned.prompts += prompt
    scanned.lines.append(int(example.where.rpartition(":")[2]))
    scanned.formats[example.format] += 1
    scanned.first_rows.setdefault(example.format, example.where)
    if example.tools:
        scanned.features.add("tools")
    for message in example.messages:
        if "</think>" in message["content"] or "reasoning_content" in message:
            scanned.features.add("thinking")


def warn_duplicates(train: ScannedSet, groups: RowGroups, where: str) -> Iterator[Problem]:
    """Yields a warning about rows that repeat earlier ones."""
    if not groups.copies:
        return
    pairs = "; ".join(
        f"{train.find_place(copy)} repeats {train.find_place(first)}" for copy, first in groups.list_pairs(SHOWN_PAIRS)
    )
    text = f"{groups.copies} of {groups.rows} rows ({groups.copies / groups.rows:.1%}) repeat earlier ones: {pairs}"
    fix = show_preparation(train.sources, "--deduplicate --out unique.jsonl", "remove the copies")
    yield Problem("duplicate-rows", text, where, fix, "warning")


def warn_split_prompts(train: ScannedSet, held_out: frozenset[int], where: str) -> Iterator[Problem]:
    """Yields a warning when many prompts of the split lie on both sides."""
    import numpy as np

    is_held_out = np.zeros(len(train.lines), dtype=np.bool_)
    is_held_out[list(held_out)] = True
    prompts = np.frombuffer(train.prompts, dtype="<u8")
    shared = find_shared(bytearray(prompts[is_held_out].tobytes()), bytearray(prompts[~is_held_out].tobytes()))
    if shared.count < FEW_SHARED_PROMPTS or shared.count <= len(held_out) * SHARED_PROMPTS:
        return
    text = f"{shared.count} of {len(held_out)} held-out rows have a prompt that is also trained on, with other answers"
    fix = "name held-out rows with other prompts in data.eval, if the model should be tested on new ones"
    yield Problem("prompt-leakage", text, where, fix, "warning")


def check_leakage(train: ScannedSet, evaluation: ScannedSet, where: str) -> None:
    """Refuses held-out rows that the model is trained on.

    Raises:
        DataError: with their number and the first ones' places in both sets.
    """
    shared = find_shared(evaluation.fingerprints, train.fingerprints)
    if not shared.count:
        return
    pairs = "; ".join(
        f"{evaluation.find_place(index)} is {train.find_place(first)}"
        for index, first in shared.list_pairs(SHOWN_PAIRS)
    )
    text = f"{shared.count} of {len(evaluation.lines)} rows of data.eval also stand in data.train: {pairs}"
    others = shlex.join([source.name for source in evaluation.sources])
    fix = "take these rows out of one of the two"
    if all(source.path for source in evaluation.sources):
        fix = show_preparation(train.sources, f"--against {others} --out unseen.jsonl", fix)
    raise DataError(text, where=where, fix=fix, code="leakage")


def show_preparation(sources: Sequence[RowSource], rest: str, otherwise: str) -> str:
    """A command that writes better rows; words where one command would lose weights, or where rows come from a hub."""
    if any(source.path is None or source.weight != 1 for source in sources) or len(sources) > MOST_NAMED:
        return otherwise
    names = shlex.join([source.name for source in sources])
    return f"python scripts/prepare_data.py --in {names} {rest}"


def warn_shared_prompts(train: ScannedSet, evaluation: ScannedSet, where: str) -> Iterator[Problem]:
    """Yields a warning when many held-out prompts are trained on with another answer."""
    shared = find_shared(evaluation.prompts, train.prompts)
    rows = len(evaluation.lines)
    if shared.count < FEW_SHARED_PROMPTS or shared.count <= rows * SHARED_PROMPTS:
        return
    index, first = next(iter(shared.list_pairs(1)))
    places = f"{evaluation.find_place(index)} asks what {train.find_place(first)} asks"
    text = f"{shared.count} of {rows} prompts of data.eval also stand in data.train, with other answers: {places}"
    fix = "hold out rows by prompt, if the model should be tested on new ones"
    yield Problem("prompt-leakage", text, where, fix, "warning")


def iterate_examples(sources: Sequence[RowSource], data: DataSection) -> Iterator[Example]:
    """Yields the examples of sources in reading order: the second pass, for encoding.

    Raises:
        DataError: a row is bad, as after an edit between the two passes.
    """
    for source in sources:
        for row in iterate_rows(source, data.columns):
            if isinstance(row, Problem):
                raise DataError.from_problems([row])
            yield read_example(row, data.format)

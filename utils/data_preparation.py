"""Preparing data files: read, convert, leave out, split, write, in two passes.

The first pass reads and checks every row, converts it, and keeps 8 bytes of it; what is wrong is said before anything is
written. The second writes. So a file larger than memory can be prepared, and a bad row never leaves half a file.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from config.structured_config import FormatName
from utils.data_conversion import COLUMNS, convert_example
from utils.data_formats import read_example
from utils.data_loading import find_kind
from utils.data_sources import RowSource, find_sources, find_unknown_columns, iterate_rows
from utils.examples import Example
from utils.exceptions import DataError, Problem
from utils.fingerprints import FINGERPRINT_BYTES, fingerprint_example
from utils.problem_log import ProblemLog
from utils.progress import Progress
from utils.row_groups import choose_held_out, find_groups, find_shared, find_split_groups
from utils.row_writers import Kind, RowWriter, check_target, encode_json, name_kind
from utils.table_files import MESSAGE_COLUMNS, parse_messages

TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Order:
    """What shall be done.

    Attributes:
        sources: files, globs or hub ids to read.
        target: file to write.
        to: format to write; None leaves each row as it is.
        format: format to read, or auto.
        columns: old name → new name, before reading.
        split: share of the rows that goes into a second file; 0 writes one.
        deduplicate: leave rows out that repeat an earlier one.
        against: files whose rows are left out.
        seed: of the split.
    """

    sources: Sequence[str]
    target: Path
    to: FormatName | None = None
    format: FormatName | Literal["auto"] = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    split: float = 0.0
    deduplicate: bool = False
    against: Sequence[str] = ()
    seed: int = 42

    @property
    def eval_target(self) -> Path:
        """The second file: `rows.jsonl.gz` → `rows_eval.jsonl.gz`."""
        ending = "".join(self.target.suffixes[-2:]) if self.target.suffix.lower() == ".gz" else self.target.suffix
        return self.target.with_name(f"{self.target.name.removesuffix(ending)}_eval{ending}")


@dataclass
class Prepared:
    """What was done.

    Attributes:
        read: rows by format.
        duplicates: rows left out because they repeat an earlier one.
        known: rows left out because they stand in `against` too.
        written: file → rows.
        left_out: column → rows that had it, and whose new format has no place for it.
        columns: name → type of the written columns.
        fingerprints, prompts: 8 bytes for each row that was read; of its prompt only where rows are split.
    """

    read: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    known: int = 0
    written: dict[Path, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    columns: dict[str, Kind] = field(default_factory=dict)
    fingerprints: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)


def prepare_rows(order: Order) -> Prepared:
    """Reads, checks, converts, leaves out, splits and writes.

    Raises:
        DataError: bad rows, or rows that the new format cannot hold; all are counted and the first ones shown.
        RunError: a target that exists or cannot be written.
    """
    targets = [order.target, *([order.eval_target] if order.split else [])]
    for target in targets:
        check_target(target)
    sources = find_sources(order.sources, "--in")
    against = find_sources(order.against, "--against") if order.against else []
    prepared, problems = Prepared(), ProblemLog()
    for _, row in iterate_prepared(order, sources, prepared, problems):
        note_columns(prepared.columns, row)
    known = bytearray()
    for example in iterate_read(order, against, problems):
        known += fingerprint_example(example)[1]
    problems.raise_if_any()
    places = place_rows(order, prepared, known)
    if 1 not in places:
        raise DataError("no row is left to write", where=str(order.target), fix="check --against", code="no-rows")
    if order.split and 2 not in places:
        raise DataError("there is nothing to split", where="--split", fix="give two different rows", code="no-rows")
    with ExitStack() as stack, Progress("Writing rows", len(places), "rows") as progress:
        writers = [stack.enter_context(RowWriter(target, prepared.columns)) for target in targets]
        again = Prepared()
        for index, row in iterate_prepared(order, sources, again, problems):
            if index < len(places) and places[index]:
                writers[places[index] - 1].write(row)
            progress.advance()
        problems.raise_if_any()
        if again.fingerprints != prepared.fingerprints:
            raise DataError("changed while it was read", where=sources[0].name, fix="start again", code="changed")
    prepared.written = {writer.target: writer.rows for writer in writers}
    return prepared


@contextmanager
def speak_of_options() -> Iterator[None]:
    """What reads rows speaks of the recipe's key data.columns; here it is an option, written as OLD=NEW."""
    try:
        yield
    except DataError as error:
        problems = [
            replace(problem, message=to_option(problem.message), fix=to_option(problem.fix))
            for problem in error.problems
        ]
        raise DataError.from_problems(problems) from error


def to_option(text: str | None) -> str:
    """`data.columns: {a: b, c: d}` → `--columns a=b c=d`."""
    pairs = re.compile(r"data\.columns: \{(.*?)\}")
    text = pairs.sub(lambda found: "--columns " + found[1].replace(": ", "=").replace(", ", " "), text or "")
    return text.replace("data.columns", "--columns")


def iterate_read(
    order: Order, sources: Sequence[RowSource], problems: ProblemLog, unseen: set[str] | None = None
) -> Iterator[Example]:
    """Yields the examples of sources; what is wrong goes into the log, and columns that are seen out of `unseen`."""
    for source in sources:
        for row in iterate_rows(source, order.columns, unseen):
            if isinstance(row, Problem):
                problems.add(row)
                continue
            try:
                yield read_example(row, order.format)
            except DataError as error:
                problems.add(error.problems[0])


def iterate_prepared(
    order: Order, sources: Sequence[RowSource], prepared: Prepared, problems: ProblemLog
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (index, row to write) for each row that can be written; counts into `prepared`."""
    is_table = find_kind(order.target) in TABLES
    unseen = set(order.columns)
    for index, example in enumerate(iterate_read(order, sources, problems, unseen)):
        prepared.read[example.format] += 1
        prompt, whole = fingerprint_example(example, with_prompt=order.split > 0)
        prepared.fingerprints += whole
        prepared.prompts += prompt
        try:
            row = convert_example(example, order.to) if order.to else example.fields
            if is_table:
                check_cells(row, example.where)
            encode_json(row).encode()
        except DataError as error:
            problems.add(error.problems[0])
        except (TypeError, ValueError) as error:
            problems.add(Problem("not-json", str(error), example.where, "leave the column out"))
        else:
            prepared.left_out.update(example.fields.keys() - row.keys() - COLUMNS[example.format])
            yield index, row
    for unknown in find_unknown_columns(unseen, sources):
        problems.add(unknown, first=True)


def check_cells(row: Mapping[str, Any], where: str) -> None:
    """A text that spells a list of messages would be read back as messages from a table."""
    for name in MESSAGE_COLUMNS:
        if isinstance(row.get(name), str) and not isinstance(parse_messages(row[name]), str):
            text = f"{name} is a text that a table cannot tell from a list of messages"
            raise DataError(text, where=where, fix="write .jsonl instead", code="cannot-hold")


def note_columns(columns: dict[str, Kind], row: Mapping[str, Any]) -> None:
    """Adds a row's columns; one whose values differ in type becomes text."""
    for name, value in row.items():
        if value is not None:
            kind = name_kind(value)
            columns[name] = kind if columns.get(name, kind) == kind else "text"


def place_rows(order: Order, prepared: Prepared, known: bytearray) -> bytearray:
    """Decides where each row goes.

    Returns:
        One byte a row: 0 nowhere, 1 the target, 2 the second file.
    """
    import numpy as np

    places = np.ones(len(prepared.fingerprints) // FINGERPRINT_BYTES, dtype=np.uint8)
    if order.deduplicate:
        is_copy = np.ones(len(places), dtype=np.bool_)
        is_copy[find_groups(prepared.fingerprints).find_firsts()] = False
        places[is_copy] = 0
        prepared.duplicates = int(is_copy.sum())
    shared = find_shared(prepared.fingerprints, known).indices
    prepared.known = int((places[shared] > 0).sum())
    places[shared] = 0
    if order.split:
        kept = np.flatnonzero(places)
        rows, prompts = (
            bytearray(np.frombuffer(content, dtype="<u8")[kept].tobytes())
            for content in (prepared.fingerprints, prepared.prompts)
        )
        held_out = choose_held_out(find_split_groups(prompts, find_groups(rows)), order.split, order.seed)
        places[kept[sorted(held_out)]] = 2
    return bytearray(places.tobytes())


def format_prepared(order: Order, prepared: Prepared) -> Iterator[str]:
    """Yields what was done, line by line, and the command that comes next."""
    rows = sum(prepared.read.values())
    lines = [("rows read", rows), *((f"  {name}", count) for name, count in prepared.read.most_common())]
    if order.deduplicate:
        lines.append(("repeat an earlier row", -prepared.duplicates))
    if order.against:
        lines.append(("also in --against", -prepared.known))
    lines += [(f"written to {path}", count) for path, count in prepared.written.items()]
    width = max(len(name) for name, _ in lines)
    yield from (f"{name:<{width}}  {count:>9,}" for name, count in lines)
    for name, count in prepared.left_out.most_common():
        yield f"The column {name} of {count} rows was left out: another format reads it."
    files = [f"data.train={order.target}", *([f"data.eval={order.eval_target}"] if order.split else [])]
    words = shlex.join([word for file in files for word in ("--set", file)])
    yield f"\nNext: python scripts/preview_data.py --recipe YOUR_RECIPE.yaml {words}"

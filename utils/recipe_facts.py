"""What a new recipe is made from: what can be known of a model and of rows before a recipe exists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from config.model_families import ModelFamily, guess_family, guess_parameters
from config.recipe_io import LoadedRecipe
from config.structured_config import DataSection, ModelSection
from utils.data_loading import find_kind
from utils.data_sources import find_sources
from utils.exceptions import ModelLoadingError, Problem, RecipeError
from utils.methods.preference import count_answers
from utils.model_shape import find_positions, measure_shape
from utils.model_source import ModelSource, find_model
from utils.prepared_data import describe_sources, iterate_held_out, prepare_data
from utils.row_checks import RowScan, iterate_examples, scan_rows
from utils.run_tokenizer import open_tokenizer
from utils.tokenizer_files import load_tokenizer

MODEL_OPTION, DATA_OPTION = "--model", "--data"
NOT_HERE = ("offline", "gated", "hub")  # codes of a hub model that exists, but whose files cannot be had now
CHATTING = re.compile(r"(?<![a-z])(instruct|it|chat|assistant|sft|dpo)(?![a-z])")
TRAIN, HELD_OUT = "train", ("eval", "validation", "valid", "dev", "test")
SEED = 42
BYTES_PER_TOKEN = 2.5  # prose has about 4, code and other scripts fewer: so a limit made from it is rarely too low
TOKENS_PER_TURN = 16  # what a template writes around a message, at most


@dataclass(frozen=True)
class ModelFacts:
    """A model as far as it is known.

    Attributes:
        name: as the recipe will say it.
        parameters: how many.
        origin: where that number comes from, in words.
        family: its row in the family table.
        source: its files; None where they are not on this machine.
        positions: longest sequence that it was made for, in tokens.
        can_chat: whether it has a chat template.
        missing: why its files are not here.
    """

    name: str
    parameters: int
    origin: str
    family: ModelFamily | None
    source: ModelSource | None = None
    positions: int | None = None
    can_chat: bool | None = None
    missing: Problem | None = None


@dataclass(frozen=True)
class RowFacts:
    """Rows as far as they are known.

    Attributes:
        train: as the recipe will say it.
        eval: held-out rows that lie beside them.
        scan: what the first pass found.
        longest: tokens of the longest row.
        longest_answer: tokens that are learned of a row, at most, and of a pair those of its longer answer; None where
            nothing could be counted.
        longest_prompt: of the held-out rows, in tokens; None where nothing could be counted.
        runnable: every held-out row brings the database that its answer is run on.
    """

    train: str
    eval: str | None
    scan: RowScan
    longest: int
    longest_answer: int | None = None
    longest_prompt: int | None = None
    runnable: bool = False

    @property
    def rows(self) -> int:
        """All rows of `train`."""
        return self.scan.train_rows

    @property
    def formats(self) -> set[str]:
        """Formats of the rows."""
        return set(self.scan.formats)

    @property
    def are_preferences(self) -> bool:
        """True if every row has a chosen and a rejected answer, or one answer and its label."""
        return bool(self.formats) and self.formats <= {"preference", "labelled"}

    @property
    def have_labels(self) -> bool:
        """True if some row has one answer and its label."""
        return "labelled" in self.formats

    @property
    def has_text(self) -> bool:
        """True if some row is raw text."""
        return "text" in self.formats


def inspect_model(name: str, parameters: int | None) -> ModelFacts:
    """Looks at a model's files, and at its name where they are not here.

    Args:
        parameters: what the user says; None to find out.

    Raises:
        RecipeError: no such model, or nothing tells its size.
        ModelLoadingError: its files are damaged.
    """
    source, missing = None, None
    try:
        source = find_model(ModelSection(name=name), MODEL_OPTION, with_weights=False)
    except ModelLoadingError as error:
        missing = error.problems[0]
        if missing.code not in NOT_HERE:
            raise
    shape = measure_shape(source) if source else None
    found = parameters or (shape.parameters if shape else guess_parameters(name))
    if not found:
        what = "its name" if missing else "its config.json"
        fix = "add --size with its number of parameters, such as --size 1.5B"
        fix += f"; or {missing.fix}" if missing and missing.fix else ""
        raise RecipeError(f"{what} does not tell how large {name} is", where=MODEL_OPTION, fix=fix, code="no-size")
    origin = "--size" if parameters else "its files" if shape else "its name"
    if source is None:
        family = guess_family(name)
        return ModelFacts(name, found, origin, family, can_chat=guess_chat(name, family), missing=missing)
    can_chat = bool(load_tokenizer(source.folder).chat_template)
    return ModelFacts(name, found, origin, source.family, source, find_positions(source.config), can_chat)


def guess_chat(name: str, family: ModelFamily | None) -> bool | None:
    """Whether a model can chat, by its name; None where that is open."""
    if family and not family.has_chat_template:
        return False
    return True if CHATTING.search(name.rsplit("/", 1)[-1].lower()) else None


def find_held_out_file(train: str) -> str | None:
    """The file of held-out rows beside one of training rows: `rows_eval.jsonl` as prepare_data.py writes it, or `eval.jsonl`
    beside `train.jsonl`, or `chat_eval.jsonl` beside `chat_train.jsonl`.
    """
    path = Path(train)
    if not path.is_file() or not find_kind(path):
        return None
    stem, dot, ending = path.name.partition(".")
    names = [f"{stem}_eval"]
    if stem == TRAIN or stem.endswith(f"_{TRAIN}"):
        names += [stem.removesuffix(TRAIN) + other for other in HELD_OUT]
    return next((str(found) for name in names if (found := path.with_name(f"{name}{dot}{ending}")).is_file()), None)


def find_origin(key: str) -> str:
    """The option that a key of a recipe that does not exist yet comes from."""
    return MODEL_OPTION if key.startswith("model") else DATA_OPTION


def inspect_rows(train: str) -> RowFacts:
    """Reads and checks every row, without a tokenizer.

    Raises:
        DataError: what is wrong with the rows.
    """
    held_out = find_held_out_file(train)
    data = DataSection(train=train, eval=held_out)
    scan = scan_rows(data, SEED, find_origin)
    longest = 0.0
    for example in iterate_examples(find_sources(train, DATA_OPTION), data):
        for turns in (example.messages, example.rejected):
            size = len((example.text or "").encode()) + sum(len(str(turn["content"]).encode()) for turn in turns)
            longest = max(longest, size / BYTES_PER_TOKEN + TOKENS_PER_TURN * (len(turns) + 2))
    return RowFacts(train, held_out, scan, round(longest))


def count_tokens(rows: RowFacts, draft: LoadedRecipe, source: ModelSource | None) -> RowFacts:
    """Replaces estimated lengths by counted ones where the tokenizer is here, and looks for databases.

    Args:
        draft: a recipe with the model, the rows and the strategy, whose limit no row exceeds.
    """
    runnable = all(isinstance(one.fields.get("database"), str) for one in iterate_held_out(draft, rows.scan))
    runnable = runnable and rows.scan.evaluation_rows > 0
    if source is None:
        return RowFacts(rows.train, rows.eval, rows.scan, rows.longest, runnable=runnable)
    tokenizer = open_tokenizer(draft, source, {*rows.scan.formats, *rows.scan.features})
    data = prepare_data(draft, rows.scan, tokenizer, describe_sources(draft))
    sets = [each for each in (data.train, data.evaluation) if len(each)]
    learns_pairs = draft.recipe.training.learns_pairs
    answers = [count_answers(each) if learns_pairs else each.supervised for each in sets]
    return RowFacts(
        rows.train,
        rows.eval,
        rows.scan,
        longest=max(int(each.path_lengths.max()) for each in sets),
        longest_answer=max(int(each.max()) for each in answers),
        longest_prompt=int(sets[-1].prompt_lengths.max()),
        runnable=runnable,
    )

"""The choices of a new recipe, each with its reason: from the tables, from what the model's files say, or from the rows.

Every function gives lines of a recipe; `recipe_writer.py` puts them into a file. Nothing here reads anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from config.model_families import find_learning_rate
from config.structured_config import Recipe, TrainingSection
from utils.exceptions import DataError
from utils.rule_checks import show_count

if TYPE_CHECKING:
    from utils.recipe_facts import ModelFacts, RowFacts

Profile = Literal["chat", "instruction", "code"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
# Methods of the schema that the table of learning rates knows.
METHODS: tuple[str, ...] = tuple(
    method
    for method in get_args(TrainingSection.model_fields["method"].annotation)
    if find_learning_rate(0, None, method, with_lora=True)
)
BACKENDS: tuple[str, ...] = get_args(Recipe.model_fields["backend"].annotation)
ROUND_TO = 64  # tokens
LONGEST_LIMIT = 4096  # tokens; beyond it attention and activations need a machine that the user should choose by hand
MAX_ANSWER = 1024
FEW_ROWS, SOME_ROWS, MANY_ROWS = 200, 1000, 50_000
HELD_OUT_ROWS, MOST_HELD_OUT = 5, 500


class Line(NamedTuple):
    """One line of a recipe: `key: value  # why`."""

    key: str
    value: Any
    why: str = ""


# What the section of a method says, and why.
METHOD_LINES = {
    **dict.fromkeys(("dpo", "kto"), Line("beta", 0.1, "the usual one: larger stays closer to the untouched model")),
    "orpo": Line("beta", 0.1, "the usual weight of the preference beside the likelihood of the chosen answer"),
    "reward": Line("center_coefficient", 0.01, "holds rewards around 0: differences alone leave their level open"),
}
METHOD_METRICS = {
    **dict.fromkeys(("dpo", "kto"), ("preference_accuracy", "reward_accuracy", "loss")),
    "orpo": ("preference_accuracy_per_token", "loss"),
    "reward": ("preference_accuracy",),
}


@dataclass(frozen=True)
class Plan:
    """What a recipe is written from.

    Attributes:
        path: the file to write.
        model, rows: what is known.
        profile: what kind of answers; decides sampling and metrics.
        method: as in `training.method`.
        backend: as in the recipe; `auto` is left out of it.
    """

    path: Path
    model: ModelFacts
    rows: RowFacts
    profile: Profile
    method: str
    backend: str = "auto"

    @property
    def learns_pairs(self) -> bool:
        """True for methods that compare a chosen with a rejected answer."""
        return self.method != "sft"

    @property
    def held_out_share(self) -> float:
        """Share of the rows to hold out: a tenth, more where a verdict needs more, but never above a fifth."""
        rows = self.rows.rows
        wanted = min(max(HELD_OUT_ROWS, rows / 10), MOST_HELD_OUT, rows / 5)
        return math.ceil(1000 * wanted / rows) / 1000

    @property
    def training_rows(self) -> int:
        """About how many rows are trained on."""
        rows = self.rows.rows
        return rows if self.rows.eval else max(1, rows - round(rows * self.held_out_share))


def choose_profile(rows: RowFacts) -> Profile:
    """The kind of answers that rows have, by their format."""
    if rows.runnable:
        return "code"
    return "chat" if rows.formats & {"messages", "sharegpt", "preference", "labelled"} else "instruction"


def choose_method(asked: str | None, rows: RowFacts) -> str:
    """The method that fits the rows.

    Raises:
        DataError: the rows do not fit what is asked for, or no method fits.
    """
    has_pairs = "preference" in rows.formats
    usual = "sft" if not rows.are_preferences else "kto" if rows.have_labels else "dpo"
    method = asked or (usual if usual in METHODS else "sft")
    if (has_pairs or rows.have_labels) and not rows.are_preferences:
        what = "a label" if rows.have_labels else "a chosen and a rejected answer"
        message = f"some rows have {what}, others have one answer"
        fix = "put them into two files"
    elif rows.have_labels and method != "kto":
        message = (
            f"the rows have one answer and a label that says whether it is good, and method {method} reads no label"
        )
        fix = "take --method kto"
    elif method == "sft" and has_pairs:
        methods = ", ".join(f"--method {name}" for name in METHODS if name != "sft")
        other = f"{methods}; or " if methods else ""
        message = "the rows have a chosen and a rejected answer, and method sft learns one answer"
        fix = f"{other}keep the chosen answers alone: write them as messages, or as prompt and completion"
    elif method != "sft" and not rows.are_preferences:
        message = f"method {method} learns from a chosen and a rejected answer, and the rows have one answer"
        fix = 'write rows as {"prompt": …, "chosen": …, "rejected": …}, or take --method sft'
    else:
        return method
    raise DataError(message, where=rows.train, fix=fix, code="preference-rows")


def choose_strategy(plan: Plan) -> tuple[str, str]:
    """`data.strategy` and its reason."""
    if plan.rows.formats == {"text"}:
        return "standard", "raw text has no turns"
    if plan.model.can_chat is False:
        return "standard", "this model has no chat template: a prompt template takes its place"
    if plan.model.can_chat is None:
        return "auto", "chat if the model has a chat template, which could not be looked at"
    if plan.rows.has_text:
        return "auto", "some rows are raw text, others conversations"
    return "chat", "the model's own chat template"


def iterate_sections(plan: Plan) -> Iterator[tuple[str, list[Line]]]:
    """Yields the sections of the recipe, in the order of the schema."""
    yield "model", [Line("name", plan.model.name)]
    yield "data", choose_data(plan)
    yield "lora", choose_lora(plan)
    yield "training", choose_training(plan)
    if plan.method in METHOD_LINES:
        yield plan.method, [METHOD_LINES[plan.method]]
    if plan.method != "reward":  # such a model writes no answers
        yield "generation", choose_generation(plan)
    yield "evaluation", [Line("metrics", choose_metrics(plan))]


def choose_data(plan: Plan) -> list[Line]:
    """The section `data`."""
    rows = plan.rows
    lines = [Line("train", rows.train, f"{rows.rows:,} rows: {describe_formats(rows)}")]
    if rows.eval:
        lines.append(Line("eval", rows.eval, f"{rows.scan.evaluation_rows:,} rows beside it, never trained on"))
    else:
        held_out = round(rows.rows * plan.held_out_share)
        lines.append(Line("eval_fraction", plan.held_out_share, f"about {held_out:,} rows show whether it gets better"))
    lines.append(Line("strategy", *choose_strategy(plan)))
    if not plan.learns_pairs and rows.formats != {"text"}:
        lines.append(Line("loss_on", "assistant", "every answer is learned, no question"))
    limit = min(plan.model.positions or LONGEST_LIMIT, LONGEST_LIMIT)
    wanted = -(-rows.longest // ROUND_TO) * ROUND_TO
    counted = f"has {rows.longest:,} tokens"
    if rows.longest_answer is None:
        counted = f"has about {rows.longest:,} tokens, estimated from its bytes"
    if rows.longest <= limit:
        return [*lines, Line("max_length", min(wanted, limit), f"the longest row {counted}")]
    end = "the model's last position" if limit == plan.model.positions else "more needs a large GPU"
    return [
        *lines,
        Line("max_length", limit, f"{end}; the longest row {counted}"),
        Line("overlong", "truncate", "a longer row loses the beginning of its prompt, or raw text its end"),
    ]


def describe_formats(rows: RowFacts) -> str:
    """`messages`, or `600 messages, 40 text`."""
    formats = rows.scan.formats
    return next(iter(formats)) if len(formats) == 1 else ", ".join(f"{n:,} {name}" for name, n in formats.items())


def choose_lora(plan: Plan) -> list[Line]:
    """The section `lora`."""
    many = plan.training_rows > MANY_ROWS
    rank = 32 if many else 16
    why = f"more than {MANY_ROWS:,} rows teach more than rank 16 holds" if many else f"enough below {MANY_ROWS:,} rows"
    lines = [Line("r", rank, why), Line("alpha", 2 * rank, "twice r, the scale that the learning rate is meant for")]
    if family := plan.model.family:
        return [*lines, Line("target_modules", list(family.lora_targets))]
    return [*lines, Line("target_modules", "all-linear", "the family table does not know this architecture")]


def choose_training(plan: Plan) -> list[Line]:
    """The section `training`: how long, in which steps, and how fast."""
    rows, model = plan.training_rows, plan.model
    epochs, batch, why = choose_length(rows, learns_pairs=plan.learns_pairs)
    batch = min(batch, rows)
    steps = -(-rows // batch)
    rate = find_learning_rate(model.parameters, model.family, plan.method, with_lora=True)
    family = f", {model.family.name}" if model.family else ""
    warmup = (
        "pairs: the first steps are the steepest"
        if plan.learns_pairs
        else "short: adapters start at zero, a warmup by itself"
    )
    return [
        Line("method", plan.method),
        Line("epochs", epochs, why),
        Line("batch_size", batch, f"about {steps:,} {'step' if steps == 1 else 'steps'} an epoch"),
        Line("learning_rate", rate, f"LoRA, {plan.method}, {show_count(model.parameters)} by {model.origin}{family}"),
        Line("lr_scheduler", "cosine"),
        Line("warmup_ratio", 0.1 if plan.learns_pairs else 0.03, warmup),
    ]


def choose_length(rows: int, *, learns_pairs: bool) -> tuple[int, int, str]:
    """Epochs, examples per step, and why (docs/design.md, section 7)."""
    if learns_pairs:
        few = rows < FEW_ROWS
        return (2, 8, "few rows: two passes") if few else (1, 16, "one pass: preferences are learned by heart quickly")
    if rows < FEW_ROWS:
        return 8, 4, f"fewer than {FEW_ROWS} rows need 8 to 10 passes"
    if rows < MANY_ROWS:
        return 3, 8 if rows < SOME_ROWS else 16, "usual for hundreds to thousands of rows"
    return 1, 16, f"more than {MANY_ROWS:,} rows: one pass has enough steps"


def choose_generation(plan: Plan) -> list[Line]:
    """The section `generation`."""
    lines = [choose_answer_length(plan)]
    if plan.rows.formats == {"text"}:
        return [*lines, Line("temperature", 0.8, "text may vary"), Line("top_p", 0.95, "leaves out the unlikely tail")]
    if plan.profile == "chat":
        return [*lines, Line("temperature", 0.7, "a conversation may vary"), Line("top_p", 0.9, "without the tail")]
    return [*lines, Line("temperature", 0, "one best answer: take the likeliest token")]


def choose_answer_length(plan: Plan) -> Line:
    """`generation.max_new_tokens`: the longest answer of the rows, within what the model has positions for."""
    rows = plan.rows
    if rows.longest_answer is None or rows.formats == {"text"}:
        length, why = {"chat": 256, "instruction": 256, "code": 512}[plan.profile], "an answer ends by itself before"
    else:
        length = min(-(-rows.longest_answer // ROUND_TO) * ROUND_TO, MAX_ANSWER)
        why = f"at most {rows.longest_answer:,} tokens of a row are learned"
    room = (plan.model.positions or math.inf) - (rows.longest_prompt or 0)
    if length > room:
        length, why = max(1, int(room)), "what the longest held-out prompt leaves of the model's positions"
    return Line("max_new_tokens", length, why)


def choose_metrics(plan: Plan) -> list[str]:
    """`evaluation.metrics`: about answers where answers can be judged."""
    rows = plan.rows
    if rows.have_labels:
        return ["label_accuracy", "loss"]
    if plan.learns_pairs:
        return list(METHOD_METRICS[plan.method])
    if rows.has_text or plan.profile == "chat":
        return ["loss", "perplexity"]
    if rows.runnable:
        return ["execution_accuracy", "exact_match", "loss"]
    is_short = rows.longest_answer is not None and rows.longest_answer <= ROUND_TO
    return ["exact_match", "loss"] if is_short else ["loss", "perplexity"]

"""The largest forward passes of a run, from the lengths of its examples: what memory has to hold at once.

The windows are those of training itself (`iterate_windows`, `make_micro_batches`), so the worst step is found and not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from config.structured_config import Recipe
from utils.batching import group_rows, group_scored_rows, iterate_windows
from utils.flat_batches import pays_off
from utils.machine import Machine
from utils.model_shape import ModelShape

Lengths = npt.NDArray[np.int64]
# A run of a million rows has tens of thousands of windows; their worst one is hardly longer than that of the first thousands.
MAX_WINDOWS = 5000
SAME_LENGTH = 0.95
WHOLE_BUDGETS = 2  # times the token budget of a pass on a CPU that trains all weights


@dataclass(frozen=True)
class ForwardPass:
    """One micro-batch.

    Attributes:
        rows: examples in it.
        length: tokens of the longest; the others are padded to it.
        supervised: tokens whose logits are computed.
        masked: an attention mask is passed, because rows are padded or packed.
    """

    rows: int
    length: int
    supervised: int
    masked: bool

    @property
    def tokens(self) -> int:
        """Positions that are computed, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Rows:
    """Sizes of a set's examples.

    Attributes:
        lengths, supervised: tokens and learned tokens of each, both of shape (examples,).
        shared: tokens that all of them begin with (`count_common_start`).
    """

    lengths: Lengths
    supervised: Lengths
    shared: int = 0


@dataclass(frozen=True)
class Workload:
    """What runs side by side when a run needs most memory.

    Attributes:
        training: micro-batches of the worst step that are computed at the same time.
        micro_batches: of a whole step.
        repeated: micro-batches that come later in the step are as long as these.
        evaluation: batches of held-out rows that are scored at the same time; none without held-out rows.
        beginning: tokens that all rows of a step begin with, computed once and kept while its passes run; 0 where each pass
            computes them.
    """

    training: tuple[ForwardPass, ...]
    micro_batches: int
    repeated: bool
    evaluation: tuple[ForwardPass, ...]
    beginning: int = 0


def find_token_budget(recipe: Recipe, device: str, token_budget: int) -> int:
    """Tokens of a training pass: more than the machine's on a CPU where all weights are trained.

    Each pass then writes a gradient as large as the model and adds it to the one before: fewer, longer passes are quicker.
    """
    return WHOLE_BUDGETS * token_budget if recipe.lora is None and device == "cpu" else token_budget


def choose_micro_batch_size(batch_size: int, row: int, workers: int, token_budget: int, shared: int = 0) -> int:
    """What `micro_batch_size: auto` becomes: every worker gets a share of the step, within a token budget for a forward pass.

    Args:
        row: tokens that a row of a forward pass takes (`find_usual_length`).
        shared: of them, those that all rows begin with, and that are computed once for many.
    """
    return max(1, min(-(-batch_size // workers), token_budget // (row - shared)))


def find_usual_length(lengths: Lengths, *, runs_flat: bool) -> int:
    """Tokens that a row takes: those of the longest, to which others would be padded; without padding those of the mean."""
    return int(np.ceil(lengths.mean()) if runs_flat else lengths.max())


def expect_flat(recipe: Recipe, shape: ModelShape, machine: Machine) -> bool:
    """True where the torch back end will compute no padding, as far as one can tell without the weights."""
    is_fused = not shape.anatomy.plain_attention
    return (
        machine.device == "cpu"
        and machine.backend == "torch"
        and is_fused
        and not recipe.reward
        and not draws_numbers(recipe, shape)
    )


def count_training_workers(recipe: Recipe, shape: ModelShape, machine: Machine) -> int:
    """Micro-batches side by side in training: one where random numbers are drawn, as the torch back end has it."""
    return 1 if draws_numbers(recipe, shape) else machine.workers


def draws_numbers(recipe: Recipe, shape: ModelShape) -> bool:
    """True if a training pass draws random numbers."""
    dropout = 0.0 if recipe.lora is None else recipe.lora.dropout
    return recipe.training.neftune_alpha is not None or shape.has_dropout or dropout > 0


def count_scored_rows(recipe: Recipe) -> int:
    """Held-out rows that are scored at once; a pair is one row with two answers."""
    size = recipe.evaluation.batch_size
    return max(1, size // 2) if recipe.training.learns_pairs else size


def assume_workload(recipe: Recipe, shape: ModelShape, machine: Machine) -> Workload:
    """The most that a recipe allows, before its rows are known: every example as long as `max_length`, all of it learned."""
    count = max(recipe.training.batch_size, recipe.evaluation.batch_size * machine.workers)
    lengths = np.full(count, recipe.data.max_length, dtype=np.int64)
    rows = Rows(lengths, lengths - 1)
    holds_out = recipe.data.eval is not None or recipe.data.eval_fraction > 0
    return plan_workload(recipe, shape, machine, rows, rows if holds_out else Rows(lengths[:0], lengths[:0]))


def plan_workload(recipe: Recipe, shape: ModelShape, machine: Machine, train: Rows, held_out: Rows) -> Workload:
    """Finds the worst step of a run and its worst evaluation batches.

    Args:
        held_out: possibly of no example.
    """
    training, is_flat = recipe.training, expect_flat(recipe, shape, machine)
    if recipe.reward:  # one number for an answer instead of logits over the vocabulary
        train, held_out = (replace(rows, supervised=np.zeros_like(rows.supervised)) for rows in (train, held_out))
    if not is_flat:
        train, held_out = replace(train, shared=0), replace(held_out, shared=0)
    if training.packing:
        train = replace(train, shared=0)
    workers, size = count_training_workers(recipe, shape, machine), training.micro_batch_size
    if not isinstance(size, int):
        row = find_usual_length(train.lengths, runs_flat=is_flat)
        budget = find_token_budget(recipe, machine.device, machine.token_budget)
        size = choose_micro_batch_size(training.batch_size, row, machine.workers, budget, train.shared)
    worst: tuple[float, Workload | None] = (-1.0, None)
    epochs, count = 1 if training.max_steps else max(1, round(training.epochs)), len(train.lengths)
    windows = (w for epoch in range(epochs) for w in iterate_windows(count, training.batch_size, recipe.seed, epoch))
    for window in islice(windows, min(training.max_steps or MAX_WINDOWS, MAX_WINDOWS)):
        rows, beginning = replace(train, lengths=train.lengths[window], supervised=train.supervised[window]), 0
        if training.packing:
            passes = pack_passes(rows, recipe.data.max_length)
        else:
            groups = group_rows(len(window), size, evenly=is_flat)
            beginning = rows.shared if pays_off(rows.shared, len(groups)) else 0
            order = np.argsort(-rows.lengths, kind="stable")
            passes = make_passes(rows, [order[group].tolist() for group in groups], beginning, is_flat=is_flat)
        if machine.backend == "mlx":
            passes = [see_as_plain_rows(item, recipe, train.lengths) for item in passes]
        cost = sum(weigh(item, shape) for item in passes[:workers])
        if cost > worst[0]:
            together = tuple(passes[:workers])
            worst = cost, Workload(together, len(passes), repeats_itself(passes, workers), (), beginning)
    if machine.backend == "mlx" and recipe.dpo is not None and recipe.dpo.reference == "precomputed":
        # The reference scores every pair before the first step.
        lengths = np.concatenate([train.lengths, held_out.lengths])
        supervised = np.concatenate([train.supervised, held_out.supervised])
        held_out = Rows(lengths, supervised)
    assert worst[1] is not None
    return replace(worst[1], evaluation=plan_scoring(recipe, machine, held_out, is_flat=is_flat))


def plan_scoring(recipe: Recipe, machine: Machine, rows: Rows, *, is_flat: bool) -> tuple[ForwardPass, ...]:
    """The largest passes without gradients that run side by side."""
    groups = group_scored_rows(rows.lengths - rows.shared, count_scored_rows(recipe), machine.token_budget)
    passes = make_passes(rows, groups, is_flat=is_flat)[: machine.workers]
    unrolls = machine.backend == "mlx" and recipe.training.learns_pairs
    return tuple(unroll_pass(item) if unrolls else item for item in passes)


def see_as_plain_rows(item: ForwardPass, recipe: Recipe, lengths: Lengths) -> ForwardPass:
    """A pass as MLX computes it: a pair as two rows, and each example of a packed row as a row of its own."""
    if recipe.training.learns_pairs:
        return unroll_pass(item)
    if recipe.training.packing:
        return replace(item, rows=int(np.ceil(item.tokens / lengths.mean())), length=int(lengths.max()))
    return item


def unroll_pass(item: ForwardPass) -> ForwardPass:
    """Pairs as two rows each, whose prompt is in both; the learned tokens are those of the two answers."""
    return replace(item, rows=2 * item.rows, length=item.length - item.supervised // (2 * item.rows))


def repeats_itself(passes: Sequence[ForwardPass], workers: int) -> bool:
    """True if more micro-batches are about as long as the longest than run side by side."""
    return sum(item.length >= SAME_LENGTH * passes[0].length for item in passes) > workers


def weigh(item: ForwardPass, shape: ModelShape) -> float:
    """Relative memory of a forward pass: residual stream, MLP and attention of every layer, and its logits."""
    token = shape.layers * (6 * shape.hidden + 2 * shape.query_width + 4 * shape.intermediate)
    return item.tokens * token + 3 * item.supervised * shape.vocabulary


def make_passes(rows: Rows, groups: Sequence[Sequence[int]], beginning: int = 0, *, is_flat: bool) -> list[ForwardPass]:
    """The passes of grouped examples, the largest first; without padding, a pass is one long row.

    Args:
        groups: indices into the rows; the first of each is its longest.
        beginning: tokens of each row that another pass computes; where there is none, a pass computes once what is shared.
    """
    passes = []
    for group in groups:
        once = len(group) * beginning or (len(group) - 1) * rows.shared
        longest, shortest = (int(rows.lengths[group[place]]) for place in (0, -1))
        item = ForwardPass(
            rows=1 if is_flat else len(group),
            length=int(rows.lengths[list(group)].sum()) - once if is_flat else longest,
            supervised=int(rows.supervised[list(group)].sum()),
            masked=not is_flat and longest != shortest,
        )
        passes.append(item)
    return sorted(passes, key=lambda item: item.tokens, reverse=True)


def pack_passes(rows: Rows, pack_length: int) -> list[ForwardPass]:
    """Packs examples into rows of at most `pack_length` tokens; in full rows the learned tokens are spread evenly."""
    total, learned = int(rows.lengths.sum()), int(rows.supervised.sum())
    count = max(1, -(-total // pack_length))
    row = ForwardPass(
        1, min(total, pack_length), min(learned, -(-learned // count)), masked=count > 1 or len(rows.lengths) > 1
    )
    return [row] * count

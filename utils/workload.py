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
class Workload:
    """What runs side by side when a run needs most memory.

    Attributes:
        training: micro-batches of the worst step that are computed at the same time.
        micro_batches: of a whole step.
        repeated: micro-batches that come later in the step are as long as these.
        evaluation: batches of held-out rows that are scored at the same time; none without held-out rows.
    """

    training: tuple[ForwardPass, ...]
    micro_batches: int
    repeated: bool
    evaluation: tuple[ForwardPass, ...]


def find_token_budget(recipe: Recipe, device: str, token_budget: int) -> int:
    """Tokens of a training pass: more than the machine's on a CPU where all weights are trained.

    Each pass then writes a gradient as large as the model and adds it to the one before: fewer, longer passes are quicker.
    """
    return WHOLE_BUDGETS * token_budget if recipe.lora is None and device == "cpu" else token_budget


def choose_micro_batch_size(batch_size: int, row: int, workers: int, token_budget: int, shared: int = 0) -> int:
    """What `micro_batch_size: auto` becomes: every worker gets a share of the step, within a token budget for a forward pass.

    What all rows begin with is computed once in a pass, so passes may be twice as long as that: each row more in one saves it.

    Args:
        row: tokens that a row of a forward pass takes (`find_usual_length`).
        shared: of them, those that all rows begin with and that a pass computes once.
    """
    room = max(token_budget, 2 * shared) - shared
    return max(1, min(-(-batch_size // workers), room // (row - shared)))


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
    nothing = np.zeros(0, dtype=np.int64)
    holds_out = recipe.data.eval is not None or recipe.data.eval_fraction > 0
    held_out = (lengths, lengths - 1) if holds_out else (nothing, nothing)
    return plan_workload(recipe, shape, machine, (lengths, lengths - 1), held_out)


def plan_workload(
    recipe: Recipe,
    shape: ModelShape,
    machine: Machine,
    train: tuple[Lengths, Lengths],
    held_out: tuple[Lengths, Lengths],
    shared: int = 0,
) -> Workload:
    """Finds the worst step of a run and its worst evaluation batches.

    Args:
        train: tokens and learned tokens of every training example, each of shape (examples,).
        held_out: the same of the held-out examples, possibly empty.
        shared: tokens that all training examples begin with (`count_common_start`).
    """
    if recipe.reward:  # one number for an answer instead of logits over the vocabulary
        train, held_out = (train[0], np.zeros_like(train[1])), (held_out[0], np.zeros_like(held_out[1]))
    lengths, supervised = train
    training = recipe.training
    workers = count_training_workers(recipe, shape, machine)
    size, is_flat = training.micro_batch_size, expect_flat(recipe, shape, machine)
    shared = shared if is_flat and not training.packing else 0
    if not isinstance(size, int):
        row = find_usual_length(lengths, runs_flat=is_flat)
        budget = find_token_budget(recipe, machine.device, machine.token_budget)
        size = choose_micro_batch_size(training.batch_size, row, machine.workers, budget, shared)
    worst: tuple[float, Workload | None] = (-1.0, None)
    epochs = 1 if training.max_steps else max(1, round(training.epochs))
    windows = (
        w for epoch in range(epochs) for w in iterate_windows(len(lengths), training.batch_size, recipe.seed, epoch)
    )
    for window in islice(windows, min(training.max_steps or MAX_WINDOWS, MAX_WINDOWS)):
        if training.packing:
            passes = pack_passes(lengths[window], supervised[window], recipe.data.max_length)
        else:
            passes = cut_passes(
                lengths[window], supervised[window], size, is_flat=is_flat, evenly=is_flat, shared=shared
            )
        if machine.backend == "mlx":
            passes = [see_as_plain_rows(item, recipe, lengths) for item in passes]
        cost = sum(weigh(item, shape) for item in passes[:workers])
        if cost > worst[0]:
            worst = cost, Workload(tuple(passes[:workers]), len(passes), repeats_itself(passes, workers), ())
    if machine.backend == "mlx" and recipe.dpo is not None and recipe.dpo.reference == "precomputed":
        # The reference scores every pair before the first step.
        held_out = np.concatenate([train[0], held_out[0]]), np.concatenate([train[1], held_out[1]])
    assert worst[1] is not None
    return replace(worst[1], evaluation=plan_scoring(recipe, machine, held_out, is_flat=is_flat))


def plan_scoring(
    recipe: Recipe, machine: Machine, rows: tuple[Lengths, Lengths], *, is_flat: bool
) -> tuple[ForwardPass, ...]:
    """The largest passes without gradients that run side by side.

    Args:
        rows: tokens and learned tokens of every example that is scored, each of shape (examples,).
    """
    groups = group_scored_rows(rows[0], count_scored_rows(recipe), machine.token_budget)
    passes = make_passes(*rows, groups, is_flat=is_flat)[: machine.workers]
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


def cut_passes(
    lengths: Lengths, supervised: Lengths, size: int, *, is_flat: bool = False, evenly: bool = False, shared: int = 0
) -> list[ForwardPass]:
    """Cuts examples into passes of `size` rows as `make_micro_batches` does, the largest first; without padding a pass is one
    long row."""
    order = np.argsort(-lengths, kind="stable")
    groups = [order[group].tolist() for group in group_rows(len(order), size, evenly=evenly)]
    return make_passes(lengths, supervised, groups, is_flat=is_flat, shared=shared)


def make_passes(
    lengths: Lengths, supervised: Lengths, groups: Sequence[Sequence[int]], *, is_flat: bool, shared: int = 0
) -> list[ForwardPass]:
    """The passes of grouped examples, the largest first; the first of each group is its longest."""
    passes = [
        ForwardPass(
            rows=1 if is_flat else len(group),
            length=int(lengths[list(group)].sum() - (len(group) - 1) * shared if is_flat else lengths[group[0]]),
            supervised=int(supervised[list(group)].sum()),
            masked=not is_flat and bool(lengths[group[0]] != lengths[group[-1]]),
        )
        for group in groups
    ]
    return sorted(passes, key=lambda item: item.tokens, reverse=True)


def pack_passes(lengths: Lengths, supervised: Lengths, pack_length: int) -> list[ForwardPass]:
    """Packs examples into rows of at most `pack_length` tokens; in full rows the learned tokens are spread evenly."""
    total, learned = int(lengths.sum()), int(supervised.sum())
    count = max(1, -(-total // pack_length))
    row = ForwardPass(
        1, min(total, pack_length), min(learned, -(-learned // count)), masked=count > 1 or len(lengths) > 1
    )
    return [row] * count

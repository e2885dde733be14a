"""The one door to the frameworks.

A back end is a module with the functions of `Backend`; nothing outside this folder imports a framework, and nothing in it
is imported before a recipe is known to be valid.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from config.mlx_rules import find_mlx_obstacles
from config.structured_config import GenerationSection, Recipe
from utils.batching import Batch
from utils.exceptions import MachineError
from utils.machine import is_apple_silicon
from utils.mlx_support import check_mlx_installed, find_model_problem, is_mlx_installed, is_stored_quantised
from utils.model_source import ModelSource

if TYPE_CHECKING:
    from utils.training_loop import LoopParts
    from utils.training_state import TrainingState

BackendName = Literal["torch", "mlx"]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured.

    Attributes:
        loss: mean negative log-likelihood of the step's supervised tokens, in nats; of pairs, or under KTO of answers, their
            mean loss.
        gradient_norm: L2 norm over all trainable tensors, before clipping.
        tokens: real tokens, padding not counted; of a pair the prompt counts once.
        supervised_tokens: tokens that are learned.
        pairs: pairs, or under KTO answers, that the loss is a mean over; 0 where it is a mean over the supervised tokens.
        numbers: what a method measures besides, by name: `margin`, `accuracy`, `chosen_reward`, `rejected_reward` of pairs,
            without those that the step has no answer for.
        answers: of pairs, chosen or desirable answers of the step, and rejected or undesirable ones.
        places: `file:line` of the step's rows.
        skipped: loss or gradient was not finite, so that the step was not taken: weights and optimizer are as they were.
        faulty: of a skipped step, `file:line` of the rows that give such numbers by themselves.
    """

    loss: float
    gradient_norm: float
    tokens: int
    supervised_tokens: int
    pairs: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    answers: tuple[int, int] = (0, 0)
    places: tuple[str, ...] = ()
    skipped: bool = False
    faulty: tuple[str, ...] = ()

    @property
    def terms(self) -> int:
        """What the loss is a mean over."""
        return self.pairs or self.supervised_tokens


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of pairs in nats, or a reward model's rewards, each of shape (pairs, 2), the chosen answers first.

    Attributes:
        policy: by the model in question.
        tokens: learned tokens of each answer; 0 where a labelled row has none.
        reference: by the reference; None for methods without one.
        mismatched, mismatched_reference, mismatched_tokens: under KTO, of the same prompts with the answers of other rows.
    """

    policy: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    reference: npt.NDArray[np.float64] | None = None
    mismatched: npt.NDArray[np.float64] | None = None
    mismatched_reference: npt.NDArray[np.float64] | None = None
    mismatched_tokens: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class MachineFacts:
    """What a model runs on.

    Attributes:
        device: `cuda`, `mps`, `metal` (MLX on Apple's GPU) or `cpu`.
        device_name: the hardware.
        dtype: number format of the frozen weights.
        memory_bytes: memory of the device in all.
        token_budget: tokens that one forward pass should hold when micro_batch_size is auto.
        workers: micro-batches that run side by side.
        reasons: what was chosen automatically, and why.
        quantization: how the frozen weights are stored, as in the recipe.
        runs_flat: forward passes compute no padding, so rows of any lengths may share one.
        threads: of each operation outside the workers.
        backend: `torch` or `mlx`.
    """

    device: str
    device_name: str
    dtype: str
    memory_bytes: int
    token_budget: int
    workers: int
    reasons: tuple[str, ...]
    quantization: str = "none"
    runs_flat: bool = False
    threads: int = 1
    backend: BackendName = "torch"


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer.

    Attributes:
        generation: the recipe's section.
        stop_ids: any of these ends an answer.
        pad_id: fills rows that ended before the others of their batch.
    """

    generation: GenerationSection
    stop_ids: tuple[int, ...]
    pad_id: int


def ignore(count: int) -> None:
    """The progress callback of callers that show none."""


class TrainStep(Protocol):
    """One optimizer with its state."""

    def rehearse(self, micro_batches: Sequence[Batch]) -> None:
        """Takes a step that changes nothing, to see whether it fits; raises OutOfMemory where it does not."""

    def save_state(self, folder: Path) -> None:
        """Writes optimizer.safetensors into a folder with saved weights: the optimizer's memory, and whatever of the trained
        tensors these weights do not hold bit for bit."""

    def load_state(self, folder: Path) -> None:
        """Puts weights and optimizer of a checkpoint back, in place and bit for bit; raises RunError where they do not fit."""

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Takes one optimizer step over all micro-batches; leaves it out (`skipped`) if loss or gradient is not finite."""

    def list_silent_tensors(self) -> list[str]:
        """Names of the tensors that should learn and whose gradient was zero, or absent, in every step so far."""


class Backend(Protocol):
    """What a framework must offer; its model type stays opaque to everybody else."""

    def load_model(self, source: ModelSource, recipe: Recipe) -> Any:
        """Looks at the machine and loads the base model on it, with the source's adapter folded in and the recipe's tokens
        added, ready to infer; under method reward with a head that gives one number."""

    def describe_machine(self, model: Any) -> MachineFacts:
        """What the model runs on, with the reason for each automatic choice."""

    def attach_lora(self, model: Any, recipe: Recipe) -> Any:
        """Adds fresh adapters, or makes all weights trainable, which must be float32, when the recipe has no lora section."""

    def load_adapter(self, model: Any, folder: Path) -> Any:
        """Adds saved adapters to a base model."""

    def save_weights(self, model: Any, folder: Path) -> None:
        """Writes what was trained: adapters in PEFT format, or the whole model when everything was."""

    def dequantize(self, model: Any) -> Any:
        """A quantised base in full precision: plain matrices of the values that its few bits stand for."""

    def merge_adapter(self, model: Any) -> Any:
        """Folds the adapters into the weights and returns the plain model."""

    def save_merged(self, model: Any, folder: Path, dtype_name: str) -> None:
        """Writes a plain model as safetensors with its config and generation config."""

    def count_parameters(self, model: Any) -> tuple[int, int]:
        """Trainable and all parameters."""

    def make_step(self, model: Any, recipe: Recipe) -> TrainStep:
        """Builds the optimizer."""

    def evaluate(
        self, model: Any, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
    ) -> list[tuple[float, int]]:
        """Sum of the negative log-likelihood in nats, and supervised tokens, of every row in order."""

    def score_pairs(
        self, model: Any, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
    ) -> npt.NDArray[np.float64]:
        """Log-probability of both answers of each pair in nats, or a reward model's rewards, in order, shape (pairs, 2)."""

    def score_rows(
        self, model: Any, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
    ) -> npt.NDArray[np.float64]:
        """A reward model's reward of each row, in order, shape (rows,)."""

    def compare_pairs(self, recipe: Recipe, scores: PairScores) -> dict[str, float]:
        """`loss`, `margin`, `accuracy`, `chosen_reward`, `rejected_reward`, each averaged as a training step does."""

    def compute_logits(self, model: Any, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits at every real position, shape (tokens, vocabulary); of a reward model the rewards there and 0, (tokens, 2)."""

    def generate(
        self,
        model: Any,
        prompts: Sequence[npt.NDArray[np.int64]],
        settings: GenerationSettings,
        batch_size: int,
        on_answer: Callable[[int], None] = ignore,
    ) -> list[list[int]]:
        """New token ids of each prompt, in order, up to and without the stop token; `on_answer` gets how many."""

    def stream(self, model: Any, batch: Batch, settings: GenerationSettings) -> Iterator[int]:
        """New token ids of a single prompt, one by one as they are sampled."""

    def measure_peak_memory(self, model: Any) -> int:
        """Peak bytes so far."""


def choose_backend(recipe: Recipe, config: Mapping[str, Any] | None = None) -> BackendName:
    """The back end that `backend: auto` means: MLX on Apple silicon, where it is there and has all that is asked for.

    Weights in MLX's own formats mean MLX wherever that is.

    Args:
        config: of the model; None where its files have not been looked at.
    """
    if recipe.backend != "auto":
        return recipe.backend
    if recipe.model.quantization == "int4" or (config is not None and is_stored_quantised(config)):
        return "mlx"
    if not is_apple_silicon() or not is_mlx_installed() or any(find_mlx_obstacles(recipe)):
        return "torch"
    return "torch" if config is not None and find_model_problem(recipe, config) else "mlx"


def load_backend(name: BackendName) -> Backend:
    """Imports a framework.

    Raises:
        MachineError: it is not installed.
    """
    if name == "mlx":
        check_mlx_installed("backend")
    importlib.import_module(f"utils.backends.{name}_start")
    return cast(Backend, importlib.import_module(f"utils.backends.{name}_backend"))


class TrainWithEngine(Protocol):
    """Another engine in the place of our training loop."""

    def __call__(self, model: Any, recipe: Recipe, tokenizer: Any, parts: LoopParts) -> TrainingState:
        """Runs all steps and leaves metrics and checkpoints in the run folder, as our loop does."""


def check_engine(engine: Literal["tunebook", "trl"], where: str) -> None:
    """Refuses an engine that is not installed, before anything is loaded.

    Raises:
        MachineError: TRL is missing.
    """
    if engine == "trl" and importlib.util.find_spec("trl") is None:
        fix = "run `make setup` (or `pip install trl==1.16.0`), or set engine: tunebook"
        raise MachineError("engine trl needs the package trl", where=where, fix=fix, code="no-trl")


def load_engine(engine: Literal["trl"]) -> TrainWithEngine:
    """Imports TRL's trainers."""
    return cast(TrainWithEngine, importlib.import_module(f"utils.backends.torch_{engine}").train)

"""How much memory a run will need at its peak, from config.json and the lengths of its examples: no weights, no framework.

The terms follow what the torch back end allocates; `utils/activations.py` counts what a forward pass leaves behind. What is not
a tensor of ours (libraries, gaps in the heap) was measured on Linux with glibc 2.36, and each constant says how.
`python benchmarks/memory.py` prints prediction and measurement side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from config.structured_config import Recipe
from utils.activations import BYTES, MASTER, count_activations, count_adapters, count_layer, count_whole_ends
from utils.exceptions import MachineError, Problem
from utils.machine import Machine, choose_dtype, count_logit_rows
from utils.model_shape import ModelShape
from utils.model_source import ModelSource
from utils.optimizer_memory import count_optimizer_bytes
from utils.workload import ForwardPass, Workload, expect_flat

# Python with torch, transformers, peft and accelerate imported, and a thousand rows: resident size before the model is loaded.
LIBRARIES = 430_000_000
# Kernels, thread pools and Python objects that the first step brings; measured as the growth that no tensor explains.
FIRST_STEP = 60_000_000
# bitsandbytes compiles kernels for a CPU when they are called first, which imports torch's compiler.
COMPILER = 120_000_000
# glibc keeps freed chunks (the back end asks it to), and the heap settles above what is alive, more so where equally long
# micro-batches follow each other. Fitted to `python benchmarks/memory.py` with the settings of utils/allocator.py.
HEAP_GROWTH, REPEATED_GROWTH = 1.25, 1.5
# With gradient checkpointing the input that each layer keeps lies between its freed tensors, and the gaps stay: on the embedded
# model the heap grew by 0.3 of what all layers together would have kept.
CHECKPOINT_GAPS = 0.3
# Copies of the logits at the start of the backward pass: log-probabilities, their gradient, and the gradient of the logits.
TRAINING_LOGITS = 12
EVALUATION_LOGITS = 8  # logits and log-probabilities in float32
# Of bitsandbytes' 4 bits with an 8-bit scale for each 64 weights; of MLX's with a scale and an offset of up to 4 bytes each.
QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.516, "fp4": 0.516, "int4": 0.625}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment when a run needs most; `peak_memory_bytes` of run.json is the same number, measured.

    Attributes:
        weights: the model, and while loading also the file it is read from.
        gradients: of the trained weights, for every micro-batch in flight.
        optimizer: what it remembers between steps, such as AdamW's two moments.
        activations: what the backward pass needs of the forward pass.
        logits: predictions over the vocabulary and their gradients.
        overhead: libraries, gaps in the heap, and what the heap keeps; nothing on CUDA, where only tensors count.
        phase: when it happens: `loading`, `training` or `evaluation`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    phase: str

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.__dict__[field.name] for field in fields(self) if field.name != "phase")

    def to_json(self) -> dict[str, Any]:
        """All parts and their sum, for `--json` and run.json."""
        return {**self.__dict__, "total": self.total}


@dataclass(frozen=True)
class Buffers:
    """Bytes that come and go while passes run side by side.

    Attributes:
        activations: tensors of the layers.
        logits: tensors of supervised tokens × vocabulary.
        gradients: what trained weights' gradients need beyond the activations that they replace.
        heap: all of it, with the gaps.
    """

    activations: int = 0
    logits: int = 0
    gradients: int = 0
    heap: int = 0


def estimate_memory(
    recipe: Recipe, shape: ModelShape, machine: Machine, workload: Workload, stored_bytes: int | None = None
) -> MemoryEstimate:
    """Predicts the peak of a training run: the largest of loading, training and evaluating.

    Args:
        stored_bytes: size of the safetensors files (`measure_stored_bytes`); None takes two bytes for each parameter.
    """
    size = MASTER if recipe.lora is None else BYTES[choose_dtype(recipe.model.dtype, machine)]
    base = count_weight_bytes(recipe, shape, size)
    adapters = MASTER * count_adapters(recipe.lora, shape)
    training = measure_training(recipe, shape, machine, workload, size)
    scoring = measure_scoring(shape, workload, size, limit_logit_rows(recipe, shape, machine))
    optimizer = count_optimizer_bytes(recipe, shape)
    on_cuda = machine.device == "cuda"
    fixed = 0 if on_cuda else LIBRARIES + FIRST_STEP + (0 if recipe.model.quantization == "none" else COMPILER)
    stored = 2 * shape.parameters if stored_bytes is None else stored_bytes
    # Files in the run's own format are used where they are mapped; others stay mapped until every tensor is converted.
    second = base + adapters if recipe.dpo and recipe.dpo.reference == "model" else 0
    copied = 0 if on_cuda or abs(stored - base) < base // 20 else stored

    def sum_up(phase: str, now: Buffers, resident: int) -> MemoryEstimate:
        parts = now.gradients, optimizer, now.activations, now.logits
        gaps = 0 if on_cuda else resident - now.gradients - now.activations - now.logits
        return MemoryEstimate(base + adapters + second, *parts, fixed + gaps, phase)

    phases = [
        sum_up("training", training, training.heap),
        # All threads share one heap, so held-out rows are scored in what the training has freed.
        sum_up("evaluation", scoring, max(training.heap, scoring.heap)),
        MemoryEstimate(base + copied, 0, 0, 0, 0, 0 if on_cuda else LIBRARIES, "loading"),
    ]
    return max(phases, key=lambda estimate: estimate.total)


def measure_training(recipe: Recipe, shape: ModelShape, machine: Machine, workload: Workload, size: int) -> Buffers:
    """What the micro-batches that run side by side hold when they hold most."""
    passes, embedding = workload.training, MASTER * shape.vocabulary * shape.hidden
    trained = MASTER * (count_adapters(recipe.lora, shape) or shape.parameters)
    activations = [count_activations(recipe, shape, item, size, machine.device) for item in passes]
    most_rows = limit_logit_rows(recipe, shape, machine)
    logits = [TRAINING_LOGITS * count_logits(item, shape, most_rows) for item in passes]
    # Gradients appear layer by layer while activations go, so a pass holds the larger of the two, not both.
    held = [a + b for a, b in zip(activations, logits, strict=True)]
    gradients = sum(max(0, trained - live) for live in held)
    gradients += trained if workload.micro_batches > len(passes) else 0  # the sum over the micro-batches before
    # The head and the input embedding each get a gradient, also where they share their weights.
    if recipe.lora is None and machine.device == "cpu":
        gradients += embedding * len(passes)
    beginning = ForwardPass(1, workload.beginning, 0, masked=False)
    activations.append(count_activations(recipe, shape, beginning, size, machine.device))
    live = sum(activations) + sum(logits) + gradients
    heap = int((REPEATED_GROWTH if workload.repeated else HEAP_GROWTH) * live)
    if recipe.training.gradient_checkpointing is True:
        layers = (item.tokens * count_layer(recipe, shape, item, size, machine.device) for item in passes)
        heap += int(CHECKPOINT_GAPS * shape.layers * sum(layers))
    return Buffers(sum(activations), sum(logits), gradients, heap)


def measure_scoring(shape: ModelShape, workload: Workload, size: int, most_rows: int | None) -> Buffers:
    """What the batches of held-out rows that are scored side by side hold: no layer keeps anything."""
    passes = workload.evaluation
    activations = sum(item.tokens * size * (4 * shape.hidden + 3 * shape.intermediate) for item in passes)
    logits = sum(EVALUATION_LOGITS * count_logits(item, shape, most_rows) for item in passes)
    return Buffers(activations, logits, 0, int(HEAP_GROWTH * (activations + logits)))


def limit_logit_rows(recipe: Recipe, shape: ModelShape, machine: Machine) -> int | None:
    """How many rows of logits are formed at once, or None for all of a pass: a head that is not frozen, or padded rows."""
    is_frozen = recipe.lora is not None and count_whole_ends(recipe.lora, shape) == 0
    if not is_frozen or not expect_flat(recipe, shape, machine):
        return None
    return count_logit_rows(shape.vocabulary, machine.device)


def count_logits(item: ForwardPass, shape: ModelShape, most_rows: int | None) -> int:
    """Logits of a pass that are alive at once."""
    rows = item.supervised if most_rows is None else min(item.supervised, most_rows)
    return rows * shape.vocabulary


def count_weight_bytes(recipe: Recipe, shape: ModelShape, size: int) -> int:
    """Bytes that the base model occupies; only the linear modules of the layers are quantised."""
    if recipe.model.quantization == "none":
        return size * shape.parameters
    rest = shape.parameters - shape.linear_parameters
    return size * rest + int(QUANTISED_BYTES[recipe.model.quantization] * shape.linear_parameters)


def measure_stored_bytes(source: ModelSource) -> int | None:
    """Bytes of the weight files on disk, or None before they are downloaded."""
    return sum(path.stat().st_size for path in source.list_weight_files()) or None


def check_memory(estimate: MemoryEstimate, machine: Machine, where: str) -> list[Problem]:
    """Compares the predicted peak with the machine's memory.

    Args:
        where: `file:line` of the key that is easiest to change, such as training.micro_batch_size.

    Returns:
        A warning if the peak does not fit into what is free now, else nothing.

    Raises:
        MachineError: the peak is above all memory there is.
    """
    place = "the GPU" if machine.device == "cuda" else "this machine"
    fix = (
        "lower training.micro_batch_size, evaluation.batch_size or data.max_length, set training.gradient_checkpointing: "
        "true or model.quantization: nf4, or take a smaller model"
    )
    needs = f"the run will need about {show_bytes(estimate.total)} ({estimate.phase})"
    if machine.total_bytes is not None and estimate.total > machine.total_bytes:
        message = f"{needs}, and {place} has {show_bytes(machine.total_bytes)}"
        raise MachineError(message, where=where, fix=fix, code="memory")
    if machine.available_bytes is not None and estimate.total > machine.available_bytes:
        message = f"{needs}, and {show_bytes(machine.available_bytes)} are free on {place} now"
        return [Problem("memory", message, where, f"end other programs, or {fix}", "warning")]
    return []


def show_bytes(count: int) -> str:
    """A number of bytes for people: `2.4 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

"""How much memory a run on MLX will need at its peak, from config.json and the lengths of its examples, without a framework.

The terms are what MLX's gradients keep of mlx-lm's models, counted with `mx.get_peak_memory` on MLX's CPU build over models
that differ in one size each. On Apple's GPU the tensors are the same ones, and `peak_memory_bytes` counts them alone; that
was tried on no Mac. On a CPU it is the resident size, with the libraries in it.
"""

from __future__ import annotations

from config.structured_config import Recipe
from utils.activations import BYTES, MASTER, count_adapters, list_adapted
from utils.machine import Machine, choose_dtype
from utils.memory import MemoryEstimate
from utils.model_shape import ModelShape
from utils.optimizer_memory import count_optimizer_bytes
from utils.workload import ForwardPass, Workload

# Python with mlx, mlx-lm, transformers and torch's BLAS imported: resident size before the model is loaded, on Linux.
LIBRARIES = 320_000_000
CHUNK = 8_388_608  # logits that are scored together: `CHUNK` of backends/mlx_losses.py
# Bytes of each logit while its loss and gradient are formed: five tensors in float32, and two where there is no gradient.
TRAINING_LOGITS, SCORING_LOGITS = 20, 8
# MLX lays out memory for about ten operations ahead: tensors of several chunks are there together.
CHUNKS_AHEAD = 14
# The step of the optimizer: for each trained number its gradient, the new weight beside the old one, and a square for the norm.
UPDATE = 10
GROUP = 64  # weights that share a scale and an offset: `GROUP_SIZES` of backends/mlx_model.py
BITS = {"int8": 8, "int4": 4}


def estimate_mlx_memory(
    recipe: Recipe, shape: ModelShape, machine: Machine, workload: Workload, stored: int | None = None
) -> MemoryEstimate:
    """Predicts the peak of a training run on MLX: the largest of a forward and backward pass, an update, and an evaluation.

    Args:
        stored: bytes of the files of a model that they hold in few bits; it stays so. None for any other model.
    """
    size = MASTER if recipe.lora is None else BYTES[choose_dtype(recipe.model.dtype, machine)]
    base = stored if stored is not None else count_base_bytes(recipe, shape, size)
    weights = base + MASTER * count_adapters(recipe.lora, shape)
    trained = count_adapters(recipe.lora, shape) or shape.parameters
    if recipe.lora is None and recipe.dpo and recipe.dpo.reference != "precomputed":
        weights += MASTER * trained  # the weights that training began with
    optimizer = count_optimizer_bytes(recipe, shape)
    overhead = 0 if machine.device == "metal" else LIBRARIES
    training, scored = workload.training[0], workload.evaluation[0] if workload.evaluation else None
    held = count_kept_bytes(recipe, shape, training, size)
    logits = count_logit_bytes(recipe, shape, training.supervised, TRAINING_LOGITS)
    # Gradients appear layer by layer while activations go; the sum over the micro-batches before is there beside them.
    gradients = max(0, MASTER * trained - held - logits)
    gradients += MASTER * trained if workload.micro_batches > 1 else 0
    phases = [
        MemoryEstimate(weights, gradients, optimizer, held, logits, overhead, "training"),
        MemoryEstimate(weights, UPDATE * trained, optimizer, 0, 0, overhead, "training"),
    ]
    if scored is not None:
        passing = CHUNKS_AHEAD // 2 * scored.tokens * size * max(shape.hidden, shape.intermediate)
        logits = count_logit_bytes(recipe, shape, scored.supervised, SCORING_LOGITS)
        phases.append(MemoryEstimate(weights, 0, optimizer, passing, logits, overhead, "evaluation"))
    return max(phases, key=lambda estimate: estimate.total)


def count_base_bytes(recipe: Recipe, shape: ModelShape, size: int) -> int:
    """Bytes that the base model occupies; only the linear modules of the layers are quantised."""
    if recipe.model.quantization == "none":
        return size * shape.parameters
    packed = BITS[recipe.model.quantization] / 8 + 2 * size / GROUP
    return size * (shape.parameters - shape.linear_parameters) + int(packed * shape.linear_parameters)


def count_logit_bytes(recipe: Recipe, shape: ModelShape, supervised: int, each: int) -> int:
    """Bytes of the logits of a pass and of what is formed from them; a head that is trained scores all tokens together.

    Args:
        each: bytes for each logit.
    """
    whole = each * supervised * shape.vocabulary
    return whole if recipe.lora is None else min(whole, MASTER * CHUNKS_AHEAD * max(CHUNK, shape.vocabulary))


def count_kept_bytes(recipe: Recipe, shape: ModelShape, item: ForwardPass, size: int) -> int:
    """Bytes that a micro-batch keeps for its backward pass, the logits left out.

    What the backward pass forms inside the layer where it begins comes to about another layer.
    """
    layer = count_layer(recipe, shape, item, size)
    if recipe.training.gradient_checkpointing is True:
        return item.tokens * (2 * shape.layers * size * shape.hidden + 2 * layer)
    return item.tokens * (shape.layers + 1) * layer


def count_layer(recipe: Recipe, shape: ModelShape, item: ForwardPass, size: int) -> int:
    """Bytes that a layer keeps for one token: MLX keeps padding, attention matrices and what is inside an activation."""
    anatomy = shape.anatomy
    norms = 2 * min(anatomy.norms, 2) * shape.hidden + (anatomy.norms - 2) * shape.hidden * (anatomy.norms > 2)
    attention = 2 * shape.query_width + 4 * shape.key_width + shape.heads * item.length
    if anatomy.head_norms:
        attention += shape.query_width + shape.key_width
    if shape.capped_scores:
        attention += 2 * shape.heads * item.length
    kept = size * (norms + attention + 5 * shape.intermediate)
    if recipe.lora is None:
        return kept + MASTER * 2 * shape.hidden
    adapted = list_adapted(recipe.lora, shape)
    inputs = sum(linear.inputs for linear in adapted)
    kept += MASTER * recipe.lora.r * len(adapted)
    if size < MASTER:
        kept += MASTER * inputs  # each adapter computes in float32, from its own copy
    if recipe.lora.dropout > 0:
        kept += (MASTER + 1) * inputs  # what dropout lets through, and which
    return kept

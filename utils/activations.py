"""What a forward pass leaves in memory for the backward pass, counted from a model's shape.

Every term is a tensor that autograd keeps. They were found with `torch.autograd.graph.saved_tensors_hooks`, and the tests count
them again on a small model of each family. Two facts are easily overlooked: DoRA on a 16-bit base keeps a float32 copy of
the input of every adapted module, and dropout on the attention (GPT-2) makes torch keep whole attention matrices on a CPU.
"""

from __future__ import annotations

from config.structured_config import LoraSection, Recipe
from utils.model_shape import Linear, ModelShape, is_target
from utils.workload import ForwardPass

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MASTER = 4  # trained weights and their gradients are float32


def list_adapted(lora: LoraSection, shape: ModelShape) -> list[Linear]:
    """The linear modules of a layer that carry an adapter."""
    targets = lora.target_modules
    return [linear for linear in shape.linears if isinstance(targets, str) or is_target(linear.name, targets)]


def count_adapters(lora: LoraSection | None, shape: ModelShape) -> int:
    """Trained parameters beside the base: rank × (inputs + outputs) of each module, a magnitude for each output with DoRA,
    and the embedding and the head where they are trained whole."""
    if lora is None:
        return 0
    each = (
        lora.r * (linear.inputs + linear.outputs) + (linear.outputs if lora.variant == "dora" else 0)
        for linear in list_adapted(lora, shape)
    )
    return shape.layers * sum(each) + count_whole_ends(lora, shape)


def count_whole_ends(lora: LoraSection, shape: ModelShape) -> int:
    """Parameters of embedding and head in `lora.modules_to_save`; smaller modules do not matter."""
    ends = {"embed_tokens", "wte", "lm_head"} & {name.rsplit(".", 1)[-1] for name in lora.modules_to_save}
    matrices = min(1, len(ends)) if shape.anatomy.tied else len(ends)
    return matrices * shape.vocabulary * shape.hidden


def count_activations(recipe: Recipe, shape: ModelShape, item: ForwardPass, size: int, device: str) -> int:
    """Bytes that one micro-batch keeps for its backward pass, the logits left out.

    Args:
        size: bytes of a number in the base model.
        device: `cuda`, `mps` or `cpu`.
    """
    layer = count_layer(recipe, shape, item, size, device)
    outside = MASTER * shape.hidden  # the last norm
    if recipe.training.gradient_checkpointing is True:
        # Each layer keeps its input only; one layer at a time is computed again.
        return item.tokens * (shape.layers * size * shape.hidden + layer + outside)
    return item.tokens * (shape.layers * layer + outside)


def count_layer(recipe: Recipe, shape: ModelShape, item: ForwardPass, size: int, device: str) -> int:
    """Bytes that one layer keeps for one token without gradient checkpointing."""
    return (
        count_norms(recipe, shape, size)
        + count_attention(shape, item, size, device)
        + size * shape.intermediate * count_mlp_tensors(recipe, shape)
        + count_linear_inputs(recipe, shape, size)
        + (2 * size * shape.hidden if shape.residual_dropout else 0)
    )


def keeps_less(recipe: Recipe, shape: ModelShape) -> bool:
    """True where a gated MLP keeps its two projections alone (backends/torch_gated.py)."""
    return shape.anatomy.gated and recipe.training.gradient_checkpointing is not True


def count_mlp_tensors(recipe: Recipe, shape: ModelShape) -> int:
    """Tensors of the MLP's inner width that a layer keeps, the input of its last module left out."""
    if not shape.anatomy.gated:
        return 4
    return 2 if keeps_less(recipe, shape) else 3


def count_norms(recipe: Recipe, shape: ModelShape, size: int) -> int:
    """Inputs of a layer's norms, for one token; RMS norms compute in float32, and keep their result when they are trained.

    Those that are formed again (backends/torch_norms.py) keep their input as it is, and a scale.
    """
    width = shape.anatomy.norms * shape.hidden
    if shape.anatomy.head_norms:
        width += shape.query_width + shape.key_width
    if shape.anatomy.norm == "layer":
        return size * width
    if has_frozen_norms(recipe, shape):
        return size * width + MASTER * shape.anatomy.norms
    return MASTER * width * (2 if recipe.lora is None else 1)


def has_frozen_norms(recipe: Recipe, shape: ModelShape) -> bool:
    """True where RMS norms are one operation, whose result the modules of `is_fused` form again."""
    is_plain = recipe.lora is not None and recipe.training.gradient_checkpointing is not True
    return is_plain and shape.anatomy.norm == "rms"


def keeps_matrices(shape: ModelShape, device: str) -> bool:
    """True where dropout on the attention forces torch to its plain implementation, which keeps length × length numbers."""
    return shape.attention_dropout and device != "cuda"


def count_attention(shape: ModelShape, item: ForwardPass, size: int, device: str) -> int:
    """Queries, keys, values and result of a layer's attention, for one token."""
    query, key = shape.query_width, shape.key_width
    if keeps_matrices(shape, device):
        return MASTER * 3 * (query + shape.heads * item.length)
    if shape.anatomy.plain_attention:
        matrices = MASTER + (size if size < MASTER else 0) + (size if shape.capped_scores else 0)
        return size * 3 * query + matrices * shape.heads * item.length
    mask = size * item.length if item.masked else 0
    statistics = MASTER * shape.heads
    if item.masked and key < query:
        key = query  # keys and values are repeated for each head when there is a mask
    elif len(shape.anatomy.attention) == 2:
        return (
            size * (3 * query + 3 * key) + mask + statistics
        )  # the values are a view that keeps the fused result alive
    return size * (2 * query + 2 * key) + mask + statistics


def count_linear_inputs(recipe: Recipe, shape: ModelShape, size: int) -> int:
    """Inputs of the trained modules of a layer, for one token, and what the adapters keep themselves."""
    if recipe.lora is None:
        return MASTER * sum(shape_inputs(recipe, shape, shape.linears))
    adapted = list_adapted(recipe.lora, shape)
    low_rank = MASTER * recipe.lora.r * len(adapted)
    every = MASTER * sum(linear.inputs for linear in adapted)
    if recipe.lora.dropout > 0:
        return low_rank + 2 * every  # each adapter keeps its own input and the noise
    if is_fused(recipe):
        return size * recipe.lora.r * len(adapted) + size * sum(shape_inputs(recipe, shape, adapted))
    if size == MASTER:
        return low_rank + MASTER * sum(shape_inputs(recipe, shape, adapted))
    return low_rank + every


def is_fused(recipe: Recipe) -> bool:
    """True where adapters are computed with their base as one operation (backends/torch_lora.py)."""
    lora = recipe.lora
    is_plain = lora is not None and lora.dropout == 0 and lora.variant != "dora"
    return is_plain and recipe.model.quantization == "none"


def shape_inputs(recipe: Recipe, shape: ModelShape, linears: list[Linear] | tuple[Linear, ...]) -> list[int]:
    """Widths of the different tensors that a layer's linear modules read and keep: modules side by side share theirs."""
    *inputs, output = shape.anatomy.attention
    *rising, falling = shape.anatomy.mlp
    names = {linear.name for linear in linears}
    is_parallel = shape.anatomy.norms == 1  # attention and MLP read the same norm
    has_one_input = len(inputs) == 1
    widths = []
    if not (is_fused(recipe) and has_frozen_norms(recipe, shape)):
        if names & set(inputs) or (is_parallel and names & set(rising)):
            widths.append(shape.hidden)
        if names & set(rising) and not is_parallel:
            widths.append(shape.hidden)
    # The result of the attention is kept already, except where its layout differs from what the projection reads.
    if output in names and (is_parallel or has_one_input):
        widths.append(shape.query_width)
    if falling in names and not keeps_less(recipe, shape):
        widths.append(shape.intermediate)
    return widths

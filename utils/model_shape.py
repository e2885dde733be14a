"""How large a model is, from its config.json alone: linear modules, widths and the number of parameters.

No weights and no framework: a recipe for a model of 70 billion parameters is judged in a millisecond. The table below holds
what config.json does not say, such as which projections are fused or have a bias. An architecture that is not in the table
has no shape, because a guess would look like knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from utils.anatomies import ANATOMIES, Anatomy
from utils.exceptions import ModelLoadingError
from utils.model_source import ModelSource, iterate_tensor_shapes

# Ends of keys that are a width, a count or a size of one layer.
WIDTHS = ("_size", "_dim", "_heads", "_embd", "_inner", "_positions", "_rank", "_experts")


@dataclass(frozen=True)
class Linear:
    """A weight matrix that stands in every layer: name, inputs × outputs, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide memory and time.

    Attributes:
        hidden: width of the residual stream.
        layers: how many.
        heads: attention heads.
        query_width: heads × head size.
        key_width: key heads × head size.
        intermediate: width inside the MLP.
        vocabulary: rows of the embedding.
        linears: the linear modules of one layer, the head left out.
        parameters: of the whole model, tied ones once.
        attention_dropout: dropout on the attention weights while training.
        residual_dropout: dropout behind attention and MLP while training.
        embedding_dropout: dropout behind the embedding while training.
        capped_scores: the attention scores pass through a tanh.
    """

    anatomy: Anatomy
    hidden: int
    layers: int
    heads: int
    query_width: int
    key_width: int
    intermediate: int
    vocabulary: int
    linears: tuple[Linear, ...]
    parameters: int
    attention_dropout: bool
    residual_dropout: bool
    embedding_dropout: bool
    capped_scores: bool

    @property
    def has_dropout(self) -> bool:
        """A training pass of the model itself draws random numbers."""
        return self.attention_dropout or self.residual_dropout or self.embedding_dropout

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear modules of all layers: what a quantisation makes smaller."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)


def is_target(name: str, targets: Collection[str]) -> bool:
    """True if a module of that last name is among the targets, which may be dotted."""
    return any(target.rsplit(".", 1)[-1] == name for target in targets)


def read_number(config: dict[str, Any], *names: str) -> int:
    """The first of several keys that holds a whole number, else 0."""
    return next((value for name in names if type(value := config.get(name)) is int), 0)


def find_positions(config: dict[str, Any]) -> int | None:
    """Longest sequence that the model was made for, in tokens."""
    return read_number(config, "max_position_embeddings", "n_positions") or None


def read_key_width(config: dict[str, Any]) -> int:
    """Key heads × head size; 0 for a config without its sizes."""
    heads = read_number(config, "num_attention_heads", "num_heads", "n_head")
    if not heads:
        return 0
    head_size = read_number(config, "head_dim") or read_number(config, "hidden_size", "n_embd") // heads
    return head_size * (read_number(config, "num_key_value_heads") or heads)


def has_learned_positions(config: dict[str, Any]) -> bool:
    """True where every position has an embedding of its own, so that a longer sequence cannot be computed."""
    anatomy = ANATOMIES.get(str(config.get("model_type")))
    return anatomy is not None and anatomy.learned_positions


def read_shape(config: dict[str, Any]) -> ModelShape | None:
    """Reads config.json; None for an architecture that the table lacks, or a config without its sizes."""
    anatomy = ANATOMIES.get(str(config.get("model_type")))
    hidden = read_number(config, "hidden_size", "n_embd")
    layers = read_number(config, "num_hidden_layers", "num_layers", "n_layer")
    heads = read_number(config, "num_attention_heads", "num_heads", "n_head")
    vocabulary = read_number(config, "vocab_size")
    if anatomy is None or not (hidden and layers and heads and vocabulary):
        return None
    head_size = read_number(config, "head_dim") or hidden // heads
    intermediate = read_number(config, "intermediate_size", "n_inner") or 4 * hidden
    shape = ModelShape(
        anatomy=anatomy,
        hidden=hidden,
        layers=layers,
        heads=heads,
        query_width=head_size * heads,
        key_width=read_key_width(config),
        intermediate=intermediate,
        vocabulary=vocabulary,
        linears=(),
        parameters=0,
        attention_dropout=has_rate(config, "attn_pdrop", "attention_dropout"),
        residual_dropout=has_rate(config, "resid_pdrop", "resid_dropout"),
        embedding_dropout=has_rate(config, "embd_pdrop", "embed_dropout"),
        capped_scores=bool(config.get("attn_logit_softcapping")),
    )
    shape = replace(shape, linears=tuple(list_linears(shape, config)))
    return replace(shape, parameters=count_parameters(shape, config))


def has_rate(config: dict[str, Any], *names: str) -> bool:
    """True if one of these dropout rates is above 0. GPT-2's configs may leave theirs out, and transformers drops a tenth."""
    default = 0.1 if config.get("model_type") == "gpt2" else 0.0
    own = [name for name in names if name.endswith("_pdrop") or name in config]
    rates = (config.get(name, default) for name in own)
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def silence(shape: ModelShape) -> ModelShape:
    """The shape of a model whose own dropout is off."""
    return replace(shape, attention_dropout=False, residual_dropout=False, embedding_dropout=False)


def list_linears(shape: ModelShape, config: dict[str, Any]) -> list[Linear]:
    """The linear modules of one layer, in the order of a forward pass."""
    anatomy, hidden, inner = shape.anatomy, shape.hidden, shape.intermediate
    *inputs, output = anatomy.attention
    widths = [shape.query_width, shape.key_width, shape.key_width]
    widths = [sum(widths)] if len(inputs) == 1 else widths
    sizes = [(name, hidden, width) for name, width in zip(inputs, widths, strict=True)]
    sizes.append((output, shape.query_width, hidden))
    *rising, falling = anatomy.mlp
    is_fused = anatomy.gated and len(rising) == 1
    sizes += [(name, hidden, inner * (2 if is_fused else 1)) for name in rising]
    sizes.append((falling, inner, hidden))
    return [Linear(*size, bias=has_bias(size[0], anatomy, config)) for size in sizes]


def has_bias(name: str, anatomy: Anatomy, config: dict[str, Any]) -> bool:
    """Whether a linear module has a bias, by the table or by a key of config.json."""
    key = "attention_bias" if name in anatomy.attention else "mlp_bias"
    return name in anatomy.biased or asks_for(key, anatomy, config)


def asks_for(key: str, anatomy: Anatomy, config: dict[str, Any]) -> bool:
    """Whether config.json switches on something that this architecture has."""
    return key in anatomy.optional and bool(config.get(key))


def count_parameters(shape: ModelShape, config: dict[str, Any]) -> int:
    """All parameters, tied matrices once."""
    anatomy = shape.anatomy
    per_value = 2 if anatomy.norm == "layer" else 1
    head_size = shape.query_width // shape.heads
    layer = sum(linear.parameters for linear in shape.linears) + anatomy.norms * per_value * shape.hidden
    layer += 2 * per_value * head_size if anatomy.head_norms or asks_for("qk_layernorm", anatomy, config) else 0
    embedding = shape.vocabulary * shape.hidden
    tied = config.get("tie_word_embeddings", anatomy.tied)
    head = (0 if tied else embedding) + (shape.vocabulary if anatomy.head_bias else 0)
    positions = (find_positions(config) or 0) * shape.hidden if anatomy.learned_positions else 0
    return shape.layers * layer + embedding + head + positions + per_value * shape.hidden


def measure_shape(source: ModelSource) -> ModelShape | None:
    """The shape of a model; where its weight files are on this disk, their headers decide the number of parameters.

    Headers that hold much less than config.json promises belong to a download that is not complete.
    """
    shape = read_shape(source.config)
    stored = sum(math.prod(sizes) for _, sizes in iterate_tensor_shapes(source))
    return replace(shape, parameters=stored) if shape and stored > 0.95 * shape.parameters else shape


def refuse_oversized(source: ModelSource) -> None:
    """Refuses a config.json that promises far more than the weight files hold, before anything of that size is made.

    Called where the files are complete. Quantised weights may stand packed, up to 16 parameters (of 2 bits) in a number.

    Raises:
        ModelLoadingError: more layers than tensors, or far more parameters than numbers.
    """
    config, shapes = source.config, [sizes for _, sizes in iterate_tensor_shapes(source)]
    stored = sum(math.prod(sizes) for sizes in shapes)
    if not shapes:
        return
    slack = 2 * (16 if source.is_packed else 1)
    layers = read_number(config, "num_hidden_layers", "num_layers", "n_layer")
    width = max((value for key, value in config.items() if key.endswith(WIDTHS) and type(value) is int), default=0)
    shape = read_shape(config)
    promised = max(shape.parameters if shape else 0, width)
    if layers > len(shapes) or promised > slack * stored:
        what = f"{layers:,} layers" if layers > len(shapes) else f"{promised:,} parameters"
        message = f"config.json promises {what}, and the weight files hold {len(shapes)} tensors of {stored:,} numbers"
        fix = "use another copy of the model: config.json and weights must belong together"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix, code="bad-config")

"""How many bytes the state of an optimizer takes, from a model's shape: no weights, no framework."""

from __future__ import annotations

from typing import NamedTuple

from config.structured_config import Recipe
from utils.activations import MASTER, count_adapters, list_adapted
from utils.model_shape import ModelShape

EIGHT_BITS = (
    1 + 4 / 256
)  # a byte for each number, and a float32 scale for each block of 256 (arXiv 2110.02861, section 2.1)
MIN_8BIT_SIZE = 4096  # bitsandbytes leaves smaller tensors in float32


class Matrix(NamedTuple):
    """Trained matrices of one size; `is_embedding` ones stay in 32 bits."""

    rows: int
    columns: int
    copies: int
    is_embedding: bool = False

    @property
    def numbers(self) -> int:
        """Of all copies."""
        return self.rows * self.columns * self.copies


def count_optimizer_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of what the optimizer remembers of every trained tensor between steps.

    AdamW keeps two moments in float32, in 8 bits with `adamw_8bit`; Adafactor keeps a sum for each row and each column of a
    matrix, and the whole second moment of a vector (arXiv 1804.04235, section 3).
    """
    trained = count_adapters(recipe.lora, shape) or shape.parameters
    if recipe.training.optimizer == "adamw":
        return 2 * MASTER * trained
    matrices = list_trained_matrices(recipe, shape)
    vectors = trained - sum(matrix.numbers for matrix in matrices)
    if recipe.training.optimizer == "adafactor":
        return MASTER * (vectors + sum(matrix.copies * (matrix.rows + matrix.columns) for matrix in matrices))
    wide = [m for m in matrices if m.is_embedding or m.rows * m.columns < MIN_8BIT_SIZE]
    in_float32 = vectors + sum(matrix.numbers for matrix in wide)
    return 2 * MASTER * in_float32 + int(2 * EIGHT_BITS * (trained - in_float32))


def list_trained_matrices(recipe: Recipe, shape: ModelShape) -> list[Matrix]:
    """The matrices among the trained tensors, biases, norms and DoRA's magnitudes left out."""
    if recipe.lora is not None:
        rank = recipe.lora.r
        adapted = list_adapted(recipe.lora, shape)
        down = [Matrix(rank, linear.inputs, shape.layers) for linear in adapted]
        return down + [Matrix(linear.outputs, rank, shape.layers) for linear in adapted]
    matrices = [Matrix(linear.outputs, linear.inputs, shape.layers) for linear in shape.linears]
    embedding = Matrix(shape.vocabulary, shape.hidden, 1, is_embedding=True)
    matrices.append(embedding)
    if shape.parameters - sum(matrix.numbers for matrix in matrices) >= embedding.numbers:
        matrices.append(embedding._replace(is_embedding=False))  # a head that is not tied to the embedding
    return matrices

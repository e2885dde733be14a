"""Which keys contradict `backend: mlx`: what it does not have is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from config.structured_config import Recipe

# What is broken: the key, a message and a fix, as `RuleViolation` of config/recipe_rules.py has them.
Broken = tuple[tuple[str, ...], str, str]
METHODS = ("sft", "dpo")
VARIANTS = ("lora", "rslora", "dora")


def find_backend_violations(recipe: Recipe) -> Iterator[Broken]:
    """Yields every key that the chosen back end does not honour; `auto` takes the one that honours them."""
    if recipe.backend == "mlx":
        yield from find_mlx_obstacles(recipe)
    if recipe.backend == "torch" and recipe.model.quantization == "int4":
        message = "int4 is MLX's format, and backend is torch"
        yield ("model", "quantization"), message, "set quantization: nf4, or backend: mlx"


def find_mlx_obstacles(recipe: Recipe) -> Iterator[Broken]:
    """Yields every key that only the torch back end honours."""
    training, model, lora, fix = recipe.training, recipe.model, recipe.lora, "or set backend: torch"
    if training.engine != "tunebook":
        yield ("training", "engine"), "TRL trains with torch", f"set engine: tunebook, {fix}"
    if training.method not in METHODS:
        message = f"backend mlx runs {' and '.join(METHODS)}, and method is {training.method}"
        yield ("training", "method"), message, "set backend: torch"
    if recipe.scratch is not None:
        yield ("scratch",), "backend mlx fine-tunes models that exist", "set backend: torch"
    if training.optimizer == "adamw_8bit":
        message = "adamw_8bit is for NVIDIA GPUs"
        yield ("training", "optimizer"), message, f"set optimizer: adamw or adafactor, {fix}"
    if model.quantization in ("nf4", "fp4"):
        message = f"{model.quantization} is bitsandbytes' format"
        yield ("model", "quantization"), message, f"set quantization: int4, {fix}"
    if model.trust_remote_code:
        message = "mlx-lm has its own architectures, and code that comes with a model is for torch"
        yield ("model", "trust_remote_code"), message, f"remove it, {fix}"
    if recipe.data.added_tokens:
        yield ("data", "added_tokens"), "backend mlx trains no rows of added tokens", f"remove them, {fix}"
    if lora is not None and lora.variant not in VARIANTS:
        message = f"backend mlx has {', '.join(VARIANTS)}, and variant is {lora.variant}"
        yield ("lora", "variant"), message, f"set variant: lora, {fix}"
    if lora is not None and lora.modules_to_save:
        yield ("lora", "modules_to_save"), "backend mlx trains adapters or all weights", f"remove it, {fix}"

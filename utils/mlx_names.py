"""Which architectures the MLX back end supports, and what mlx-lm calls their modules: names only, no framework.

`MLX_MODEL_TYPES`, `to_mlx_module`, `to_transformers_module`, `name_mlx_layers` and `HEADLESS_TYPES` are all there is. Names are
those of mlx-lm 0.32.2 and transformers 5.23; tests/utils/test_adapter_formats.py compares a model of each type on both sides.
"""

from __future__ import annotations

# `model_type` of config.json. mlx-lm knows more; these are those whose predictions a test compares with transformers'.
MLX_MODEL_TYPES: frozenset[str] = frozenset(
    ("gpt2", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text")
)
# Model type → the outermost module's name in transformers and in mlx-lm. All others have the same names on both sides.
OUTERMOST = {"gpt2": ("transformer", "model")}
# Types that compute the head with the embedding's matrix in mlx-lm, and have no module `lm_head`, whatever their config says.
# In gemma3_text and all other types the module is there unless the head is tied.
HEADLESS_TYPES: frozenset[str] = frozenset(("gpt2", "gemma", "gemma2"))


def to_mlx_module(model_type: str, name: str) -> str:
    """mlx-lm's name of a module (or of a tensor in it): `transformer.h.0.attn.c_attn` → `model.h.0.attn.c_attn` in GPT-2.

    Args:
        model_type: one of `MLX_MODEL_TYPES`.
        name: as transformers' `…ForCausalLM` names it.
    """
    ours, theirs = OUTERMOST.get(model_type, ("", ""))
    return swap_outermost(name, ours, theirs)


def to_transformers_module(model_type: str, name: str) -> str:
    """transformers' name of a module (or of a tensor in it): the inverse of `to_mlx_module`."""
    ours, theirs = OUTERMOST.get(model_type, ("", ""))
    return swap_outermost(name, theirs, ours)


def swap_outermost(name: str, old: str, new: str) -> str:
    """Renames the outermost module of a name; other names stay."""
    outermost, dot, rest = name.partition(".")
    return f"{new}{dot}{rest}" if outermost == old else name


def name_mlx_layers(model_type: str) -> str:
    """mlx-lm's name of the list of layers: names inside a layer, as in `lora_parameters.keys`, begin behind its number."""
    return "model.h" if model_type == "gpt2" else "model.layers"

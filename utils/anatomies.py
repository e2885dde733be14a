"""What each architecture does that its config.json does not say, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Anatomy:
    """What a `model_type` does that its config.json does not say.

    Attributes:
        attention: names of the projections: query, key, value and output, or the fused one and output.
        mlp: names of the matrices: gate, up and down, or the fused one and down, or the two of a plain MLP.
        gated: the MLP multiplies an activated gate with a second projection.
        norm: `rms` has a scale, `gemma` too, counted from one; `layer` has a scale and a shift.
        norms: norms in a layer, as wide as the layer.
        head_norms: queries and keys are normalised head by head.
        biased: names of linear modules that always have a bias.
        optional: keys of config.json that add biases or norms when they are true.
        tied: input embedding and output head share a matrix unless config.json says otherwise.
        head_bias: the output head has a bias.
        learned_positions: an embedding for each position, so that nothing lies beyond the last.
        plain_attention: transformers has no fused attention for it, so length × length matrices are kept.
    """

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    gated: bool = True
    norm: Literal["rms", "gemma", "layer"] = "rms"
    norms: int = 2
    head_norms: bool = False
    biased: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    tied: bool = False
    head_bias: bool = False
    learned_positions: bool = False
    plain_attention: bool = False


ANATOMIES: dict[str, Anatomy] = {
    "llama": Anatomy(optional=("attention_bias", "mlp_bias")),
    "mistral": Anatomy(),
    "qwen2": Anatomy(biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": Anatomy(head_norms=True, optional=("attention_bias",)),
    "gemma": Anatomy(norm="gemma", tied=True, optional=("attention_bias",)),
    "gemma2": Anatomy(norm="gemma", tied=True, norms=4, plain_attention=True, optional=("attention_bias",)),
    "gemma3_text": Anatomy(norm="gemma", tied=True, norms=4, head_norms=True, optional=("attention_bias",)),
    "phi3": Anatomy(("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    "phi": Anatomy(
        ("q_proj", "k_proj", "v_proj", "dense"),
        ("fc1", "fc2"),
        gated=False,
        norm="layer",
        norms=1,
        biased=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        optional=("qk_layernorm",),
        head_bias=True,
    ),
    "gpt2": Anatomy(
        ("c_attn", "c_proj"),
        ("c_fc", "c_proj"),
        gated=False,
        norm="layer",
        biased=("c_attn", "c_proj", "c_fc"),
        tied=True,
        learned_positions=True,
    ),
    "gpt_neo": Anatomy(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("c_fc", "c_proj"),
        gated=False,
        norm="layer",
        biased=("out_proj", "c_fc", "c_proj"),
        tied=True,
        learned_positions=True,
        plain_attention=True,
    ),
    "gptj": Anatomy(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc_in", "fc_out"),
        gated=False,
        norm="layer",
        norms=1,
        biased=("fc_in", "fc_out"),
        head_bias=True,
        plain_attention=True,
    ),
}

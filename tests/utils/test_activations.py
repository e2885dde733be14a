"""What a forward pass keeps, compared with what autograd keeps on small models of every family."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from config.structured_config import LoraSection, Recipe
from tests.utils.test_model_shape import MODEL_TYPES, build_empty, make_config
from utils.activations import count_activations, count_adapters
from utils.backends.torch_gated import keep_less
from utils.backends.torch_lora import FUSED_MODULES
from utils.backends.torch_norms import form_norms_again
from utils.model_shape import ModelShape, read_shape
from utils.workload import ForwardPass

ROWS, LENGTH, SUPERVISED, VOCABULARY = 2, 64, 8, 500
PLAIN = ("gpt_neo", "gptj", "gemma2")  # transformers has no fused attention for them


def make_recipe(lora: LoraSection | None, *, checkpointing: bool = False) -> Recipe:
    """A recipe of which only the method matters."""
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"train": "x.jsonl"},
            "lora": lora,
            "training": {"method": "sft", "gradient_checkpointing": checkpointing},
        }
    )


def read_known_shape(model_type: str) -> ModelShape:
    shape = read_shape(make_config(model_type).to_dict())
    assert shape is not None
    return shape


def count_saved_bytes(model_type: str, lora: LoraSection | None, dtype: torch.dtype, *, masked: bool) -> int:
    """Bytes of all storages that autograd saves in one forward pass, weights and logits left out.

    What the last module of a gated MLP saves has hooks of its own, and is seen by them alone: its result in the adapter's
    rank, which is nothing beside the rest.
    """
    torch.manual_seed(0)
    implementation = "eager" if model_type in PLAIN else "sdpa"
    config = make_config(model_type)
    network = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype)
    keep_less(network)
    form_norms_again(network)
    if lora:
        config = lora.to_peft_config()
        config._register_custom_module(FUSED_MODULES)
        network = get_peft_model(network, config)
    network.train()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    learned = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    learned[:, -SUPERVISED - 1 : -1] = True
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, -2:] = not masked
    extra = {"attention_mask": mask} if masked else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(input_ids=ids, logits_to_keep=learned, use_cache=False, **extra).logits
        functional.cross_entropy(logits.float(), ids[learned], reduction="none").sum()
    return sum(saved.values()) - 4 * ROWS * SUPERVISED * VOCABULARY


ALL_CASES = [
    *((model_type, dtype, True) for model_type in MODEL_TYPES for dtype in ("float32", "bfloat16", "all weights")),
    *((model_type, "float32", False) for model_type in ("llama", "phi3", "qwen3")),
]


@pytest.mark.parametrize(("model_type", "dtype", "masked"), ALL_CASES)
def test_a_forward_pass_keeps_what_is_predicted(model_type: str, dtype: str, masked: bool) -> None:
    lora = None if dtype == "all weights" else LoraSection()
    number = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    expected = count_saved_bytes(model_type, lora, number, masked=masked)
    item = ForwardPass(ROWS, LENGTH, ROWS * SUPERVISED, masked)
    got = count_activations(make_recipe(lora), read_known_shape(model_type), item, number.itemsize, "cpu")
    # Plain attention also keeps causal masks as large as a table of positions, which small models show and large ones do not.
    assert got == pytest.approx(expected, rel={"gpt_neo": 0.2, "gemma2": 0.08}.get(model_type, 0.06))


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("q_proj", "down_proj"), ("k_proj", "o_proj", "gate_proj")], ids="+".join
)
@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_on_some_modules_keep_the_inputs_of_these_alone(targets: tuple[str, ...], number: torch.dtype) -> None:
    lora = LoraSection(target_modules=targets, r=8)
    expected = count_saved_bytes("llama", lora, number, masked=False)
    item = ForwardPass(ROWS, LENGTH, ROWS * SUPERVISED, False)
    got = count_activations(make_recipe(lora), read_known_shape("llama"), item, number.itemsize, "cpu")
    assert got == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_adapters_have_as_many_parameters_as_peft_gives_them(model_type: str, variant: str) -> None:
    lora = LoraSection.model_validate({"r": 8, "variant": variant})
    network = get_peft_model(build_empty(make_config(model_type)), lora.to_peft_config())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert count_adapters(lora, read_known_shape(model_type)) == trained
    assert count_adapters(None, read_known_shape(model_type)) == 0


@pytest.mark.parametrize(("model_type", "names"), [("llama", ["embed_tokens", "lm_head"]), ("gpt2", ["lm_head"])])
def test_modules_that_are_trained_whole_are_counted(model_type: str, names: list[str]) -> None:
    shape = read_known_shape(model_type)
    whole = count_adapters(LoraSection.model_validate({"modules_to_save": names}), shape)
    assert whole - count_adapters(LoraSection(), shape) == len(names) * shape.vocabulary * shape.hidden


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    shape, item = read_known_shape("llama"), ForwardPass(ROWS, LENGTH, 16, False)
    whole = count_activations(make_recipe(LoraSection()), shape, item, 4, "cpu")
    less = count_activations(make_recipe(LoraSection(), checkpointing=True), shape, item, 4, "cpu")
    inputs = 4 * shape.hidden * shape.layers * item.tokens
    # The layer that is computed again keeps all of its MLP, which it otherwise forms anew: two tensors of the inner width more.
    # It keeps the results of its two norms besides.
    again = 2 * 4 * (shape.intermediate + shape.hidden) * item.tokens
    assert whole / shape.layers + again < less - inputs < whole / shape.layers * 1.1 + again


def test_dropout_on_attention_costs_matrices_on_a_cpu_only() -> None:
    recipe, shape = make_recipe(LoraSection()), read_known_shape("gpt2")
    short, long = (ForwardPass(1, length, 8, False) for length in (100, 200))
    on_cpu = [count_activations(recipe, shape, item, 4, "cpu") for item in (short, long)]
    on_cuda = [count_activations(recipe, shape, item, 4, "cuda") for item in (short, long)]
    assert on_cpu[1] > 2 * on_cpu[0]
    assert on_cuda[1] == 2 * on_cuda[0]
    assert on_cpu[0] - on_cuda[0] == pytest.approx(3 * 3 * 6 * 100 * 100 * 4, rel=0.2)  # layers, matrices, heads

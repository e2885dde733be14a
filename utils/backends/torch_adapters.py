"""Adapters on torch: fresh ones for training, beside modules and rows of tokens that are trained whole (peft)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from config.structured_config import LoraSection, Recipe
from utils.backends.torch_lora import FUSED_MODULES
from utils.backends.torch_model import TorchModel
from utils.backends.torch_rewards import HEAD, split_network
from utils.device_manager import MachinePlan
from utils.exceptions import RecipeError
from utils.logging import get_logger

ADAPTER = "default"  # peft's name of an adapter that has none


def attach_lora(model: TorchModel, recipe: Recipe) -> TorchModel:
    """Adds fresh adapters in float32, or makes all weights trainable when the recipe has no lora section.

    Raises:
        RecipeError: a target or module matches nothing; the ones that exist are named.
    """
    if recipe.lora is None:
        if model.plan.dtype != torch.float32:  # the trained weights are their own masters
            message = f"weights that are all trained cannot be {model.plan.dtype_name}: small updates would be lost"
            raise RecipeError(message, where="model.dtype", fix="load them as float32", code="dtype")
        for parameter in model.network.parameters():
            parameter.requires_grad_(True)
        return model
    check_targets(model.network, recipe)
    if model.is_reward and not split_network(model.network)[1].weight.any():
        get_logger().info("The reward head is new, and starts at zero")
    config = recipe.lora.to_peft_config("SEQ_CLS" if model.is_reward else "CAUSAL_LM")
    config.fan_in_fan_out = stands_transposed(model.network, config)
    if model.quantization == "none":
        config._register_custom_module(FUSED_MODULES)
    whole_modules = choose_whole_modules(model, config, recipe.lora)
    choose_token_rows(model, config)
    network = wrap_network(model.network, config)
    if config.ensure_weight_tying or model.is_reward:
        # peft strikes a tied head off the list, and at loading it takes an embedding called wte for one without a head. To
        # that of a reward model it adds names that are not there.
        config.modules_to_save = whole_modules
    # Loaded from a snapshot folder, peft would write that folder's path into the adapter.
    network.peft_config[ADAPTER].base_model_name_or_path = model.base_name
    train_whole_modules_in_float32(network, model.plan.dtype)
    plan = limit_workers(model.plan, network)
    trained = replace(model, network=network, plan=plan, started_from=copy_start(network, recipe.lora))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RecipeError("the adapters have no trainable parameter", where="lora.target_modules", code="lora-target")
    return trained


def wrap_network(network: nn.Module, config: LoraConfig) -> PeftModel:
    """Puts fresh adapters on a network.

    Raises:
        RecipeError: peft cannot build them: the experts of a mixture are one tensor, which takes neither dropout nor DoRA.
    """
    try:
        return cast(PeftModel, get_peft_model(cast(PreTrainedModel, network), config))
    except ValueError as error:
        fix = "leave the experts out of lora.target_modules, or set lora.dropout: 0 and lora.variant: lora"
        message = f"peft cannot build these adapters: {str(error).strip().splitlines()[0]}"
        raise RecipeError(message, where="lora", fix=fix, code="lora-target") from error


def limit_workers(plan: MachinePlan, network: nn.Module) -> MachinePlan:
    """One worker where an adapter stands on a bare tensor, such as the experts of a mixture.

    peft (ParamWrapper) puts the adapted tensor in its place for the time of a forward pass: passes side by side would take it
    away from each other.
    """
    if plan.workers == 1 or not any(isinstance(module, ParamWrapper) for module in network.modules()):
        return plan
    reason = "1 worker after all: adapters on experts cannot be computed side by side"
    return replace(plan, workers=1, reasons=(*plan.reasons, reason))


def check_targets(network: nn.Module, recipe: Recipe) -> None:
    """Each named target must exist: peft alone accepts a list of which one name matches."""
    if recipe.lora is None or isinstance(recipe.lora.target_modules, str):
        return
    names = {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if is_linear(module)}
    full_names = [name for name, module in network.named_modules() if is_linear(module)]
    for target in recipe.lora.target_modules:
        if target not in names and not any(name.endswith(f".{target}") for name in full_names):
            fix = f"modules here: {', '.join(sorted(names))}"
            raise RecipeError(
                f"no module is called {target!r}", where="lora.target_modules", fix=fix, code="lora-target"
            )


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, its quantised kin, and GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def stands_transposed(network: nn.Module, config: LoraConfig) -> bool:
    """True where the targets are GPT-2's Conv1D, whose matrix is inputs × outputs; left to itself, peft finds out and warns."""
    targets = config.target_modules
    names = [name for name, module in network.named_modules() if type(module).__name__ == "Conv1D"]
    return any(targets == "all-linear" or name.rsplit(".", 1)[-1] in (targets or ()) for name in names)


def find_ends(network: nn.Module) -> tuple[str, str, bool]:
    """Full names of the input embedding and the output head, and whether they share one matrix; a reward model's head, which
    has no vocabulary, has the name ""."""
    whole: Any = network
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    names = {id(module): name for name, module in whole.named_modules()}
    return names[id(embedding)], names.get(id(head), ""), head is not None and embedding.weight is head.weight


def choose_whole_modules(model: TorchModel, config: LoraConfig, lora: LoraSection) -> list[str]:
    """Writes full names of `lora.modules_to_save` into peft's configuration.

    peft compares ends of names (`norm` would also be `input_layernorm`), and it unties an embedding from its head in silence
    when only one of them is trained: here both are then trained as the one matrix that they are.

    Returns:
        The full names.

    Raises:
        RecipeError: no module of that name, or one whose weights are quantised.
    """
    modules = dict(model.network.named_modules())
    chosen: list[str] = []
    # A reward model's head is new, so an adapter on it would stand on nothing.
    for wanted in dict.fromkeys((*lora.modules_to_save, *([HEAD] if model.is_reward else []))):
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        weights = [weight for name in found for weight in modules[name].parameters()]
        if not weights or not all(weight.is_floating_point() for weight in weights):
            message = f"{wanted!r} is quantised" if weights else f"no module with weights is called {wanted!r}"
            names = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if list_own(module)})
            fix = f"modules here: {', '.join(names)}"
            raise RecipeError(message, where="lora.modules_to_save", fix=fix, code="unknown-module")
        chosen += found
    embedding, head, tied = find_ends(model.network) if chosen else ("", "", False)
    if tied and {embedding, head} & {*chosen}:
        chosen = sorted({*chosen, embedding, head})
        config.ensure_weight_tying, config.modules_to_tie = True, None
        get_logger().info("lora.modules_to_save: %s and %s share one matrix and are trained as one", embedding, head)
    if chosen:
        config.modules_to_save = [*chosen]
        if isinstance(lora.target_modules, str):
            config.exclude_modules = {*chosen}
    return chosen


def list_own(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of the module itself, without those of modules inside it."""
    return list(module.parameters(recurse=False))


def choose_token_rows(model: TorchModel, config: LoraConfig) -> None:
    """Lets peft train the rows of the added tokens, in the embedding and in the head, unless these are trained whole.

    Raises:
        RecipeError: the head has a bias, which peft's row training would leave out of every prediction.
    """
    if not model.added_ids:
        return
    embedding, head, tied = find_ends(model.network)
    whole: Any = model.network
    ends = [name for name in ([embedding] if tied else [embedding, head]) if name not in (config.modules_to_save or ())]
    if whole.get_output_embeddings().bias is not None and (tied or head in ends):
        message = "the output head of this model has a bias, and single rows of such a head cannot be trained"
        fix = f"set lora.modules_to_save: [{embedding.rsplit('.', 1)[-1]}, {head.rsplit('.', 1)[-1]}]"
        raise RecipeError(message, where="data.added_tokens", fix=fix, code="head-bias")
    if ends:
        config.trainable_token_indices = {name: list(model.added_ids) for name in ends}


def train_whole_modules_in_float32(network: nn.Module, dtype: torch.dtype) -> None:
    """Makes the trained copies of whole modules float32 masters, and casts what goes in and out of them.

    peft leaves these copies in the base's format, in which small updates are lost; its adapters it casts by itself.
    """

    def cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    def cast_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, torch.Tensor) else output

    for wrapper in network.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        trained = wrapper.modules_to_save[ADAPTER].float()
        if dtype != torch.float32:
            trained.register_forward_pre_hook(cast_inputs)
            trained.register_forward_hook(cast_output)


def copy_start(network: PeftModel, lora: LoraSection) -> Mapping[str, torch.Tensor]:
    """The adapter that PiSSA has taken out of the base, by its names in a saved adapter; empty for all other variants."""
    if lora.variant != "pissa":
        return {}
    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items() if is_factor(name)}


def is_factor(name: str) -> bool:
    """True for A and B of an adapter."""
    return ".lora_A." in name or ".lora_B." in name

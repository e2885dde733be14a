"""One tiny model on both back ends, from the same files and with the same adapters: what the tests of MLX compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from config.structured_config import Recipe
from utils.backends import Backend, load_backend, torch_backend
from utils.backends.torch_model import TorchModel
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch
from utils.mlx_names import to_transformers_module
from utils.model_source import ModelSource, read_config

mlx_backend: Backend = load_backend("mlx")

from utils.backends import mlx_adapters  # noqa: E402 - behind what must be so before MLX is imported
from utils.backends.mlx_model import MlxModel  # noqa: E402
from utils.backends.mlx_step import MlxTrainStep  # noqa: E402

BACKENDS = cast(tuple[ModuleType, ModuleType], (torch_backend, mlx_backend))
SGD: dict[str, Any] = {"method": "sft", "learning_rate": 1e-3}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sides:
    """A tiny model, trainable on both back ends."""

    recipe: Recipe
    source: ModelSource
    torch: TorchModel
    mlx: MlxModel

    def make_steps(self) -> tuple[TorchTrainStep, MlxTrainStep]:
        """An optimizer on each side."""
        return torch_backend.make_step(self.torch, self.recipe), cast(Any, mlx_backend.make_step(self.mlx, self.recipe))


def save_tiny(folder: Path, config: PretrainedConfig) -> Path:
    """A random model in transformers' layout."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # they start at zero, and a lost one would not be seen
            nn.init.normal_(parameter, std=0.5)
    network.save_pretrained(folder)
    return folder


def open_source(folder: Path) -> ModelSource:
    """The folder as a source, with what its config.json says."""
    return ModelSource(str(folder), folder, read_config(folder, str(folder)))


def make_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe in float32 on one thread: how many share an operation decides how it is rounded."""
    sections = {"lora": {"r": 4, "alpha": 8}, "training": SGD, **sections}
    model = {"name": str(folder), "dtype": "float32", **sections.pop("model", {})}
    return Recipe(model=model, data={"train": "unused", "max_length": 64}, deterministic=True, **sections)


def open_sides(folder: Path, recipe: Recipe, *, moved: bool = True) -> Sides:
    """Loads both, with the same adapters.

    Args:
        moved: B is random, as after some training: at B = 0 half of the gradients are zero.
    """
    source = open_source(folder)
    torch.manual_seed(1)
    ours = torch_backend.attach_lora(torch_backend.load_model(source, recipe), recipe)
    theirs = cast(MlxModel, mlx_backend.attach_lora(mlx_backend.load_model(source, recipe), recipe))
    if recipe.lora is not None:
        for name, parameter in ours.network.named_parameters():
            if moved and "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        torch_backend.save_weights(ours, folder / "started")
        parts = dict(mlx_adapters.iterate_parts(theirs, folder / "started"))
        mlx_adapters.fill_adapters(theirs, parts, folder)
    return Sides(recipe, source, ours, theirs)


def collect_torch_gradients(step: TorchTrainStep, batches: list[Batch]) -> Arrays:
    """Gradient of every trained tensor by its name in files."""
    count = sum(batch.supervised_tokens for batch in batches)
    network: Any = step.model.network
    network.train()
    step._accumulate(batches, count)
    found = {
        name.replace(".default", "")
        .removeprefix("base_model.model.")
        .replace("vector.weight", "vector"): parameter.grad.numpy().copy()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    step.optimizer.zero_grad()
    network.eval()
    return found


def collect_mlx_gradients(step: MlxTrainStep, batches: list[Batch]) -> Arrays:
    """The same of MLX, in transformers' shapes."""
    step.network.train()
    _, gradients = step._accumulate(batches, sum(batch.supervised_tokens for batch in batches))
    step.network.eval()
    return rename_tensors(step.model, dict(tree_flatten(gradients)))


def rename_tensors(model: MlxModel, tensors: dict[str, mx.array]) -> Arrays:
    """Tensors of MLX's network under the names and in the shapes of files."""
    found = {}
    parts = {ours: (theirs, is_turned) for ours, theirs, is_turned in mlx_adapters.PARTS}
    for name, value in tensors.items():
        owner, _, last = name.rpartition(".")
        theirs, is_turned = parts.get(last, (last, False))
        if last == "weight" and model.model_type == "gpt2" and owner.endswith(("c_attn", "c_proj", "c_fc")):
            is_turned = True
        name = to_transformers_module(model.model_type, f"{owner}.{theirs}")
        found[name] = np.array(value.T if is_turned else value)
    return found


def assert_same_gradients(ours: Arrays, theirs: Arrays, tolerance: float = 1e-4) -> None:
    """Every tensor on both sides, as different as rounding makes it: measured by the largest number of the tensor."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        size = np.abs(gradient).max()
        assert size > 0, name
        assert np.abs(gradient - theirs[name]).max() <= tolerance * size + 1e-6, name

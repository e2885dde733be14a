"""The torch back end: models and adapters from transformers and peft, devices through accelerate, the step is ours."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from config.structured_config import Recipe
from utils.backends import GenerationSettings, MachineFacts, StepResult, ignore
from utils.batching import Batch
from utils.device_manager import DeviceManager, MachinePlan
from utils.device_manager import measure_peak_memory as measure_process_peak
from utils.exceptions import AdapterError, MachineError, ModelLoadingError, RecipeError, TrainingError
from utils.logging import get_logger
from utils.model_source import ModelSource

TOKEN_BUDGETS = {"cpu": 512, "mps": 2048, "cuda": 16_384}


@dataclass(frozen=True)
class TorchModel:
    """A network with the machine it lives on."""

    network: nn.Module
    plan: MachinePlan
    accelerator: Accelerator
    base_name: str


def load_model(source: ModelSource, recipe: Recipe) -> TorchModel:
    """Looks at the machine and loads the base model on it, ready to infer.

    Raises:
        MachineError: the dtype, quantisation or number of processes cannot work here.
        ModelLoadingError: the files do not make a model.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "this version trains in one process, and WORLD_SIZE asks for more"
        raise MachineError(message, fix="start the script with python, without a launcher", code="processes")
    plan = DeviceManager().plan(recipe.model.dtype)
    get_logger().info("Device: %s (%s), %s", plan.device, plan.device_name, "; ".join(plan.reasons))
    transformers_logging.disable_progress_bar()
    accelerator = Accelerator(cpu=plan.device == "cpu")
    quantization = recipe.model.to_quantization_config(plan.dtype_name)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=plan.dtype,
            attn_implementation="sdpa",
            trust_remote_code=recipe.model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            quantization_config=quantization,
        )
    except ImportError as error:
        raise MachineError(str(error).strip().splitlines()[0], where="model", fix="run `make setup`") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        message = f"the model cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise ModelLoadingError(message, where=str(source.folder)) from error
    if quantization is None:
        network.to(accelerator.device)
    elif recipe.model.quantization != "int8":
        keep_quantised_weights_differentiable(network)
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return TorchModel(network, plan, accelerator, source.public_name)


def keep_quantised_weights_differentiable(network: nn.Module) -> None:
    """Forbids bitsandbytes' in-place repacking for AVX512-BF16, after which gradients vanish without an error.

    bitsandbytes 0.50.2, nn/modules.py: Linear4bit.forward repacks when it sees no gradient, as in an evaluation, and the
    packed kernel has no backward.
    """
    from bitsandbytes.nn import Linear4bit

    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def describe_machine(model: TorchModel) -> MachineFacts:
    """What the model runs on, with the reason for each automatic choice."""
    plan = model.plan
    return MachineFacts(
        device=plan.device,
        device_name=plan.device_name,
        dtype=plan.dtype_name,
        memory_bytes=plan.memory_bytes,
        token_budget=TOKEN_BUDGETS[plan.device],
        workers=plan.workers,
        reasons=plan.reasons,
    )


def attach_lora(model: TorchModel, recipe: Recipe) -> TorchModel:
    """Adds fresh adapters in float32, or makes all weights trainable when the recipe has no lora section.

    Raises:
        RecipeError: a target matches no module; the ones that exist are named.
    """
    if recipe.lora is None:
        network = model.network.float()  # the trained weights are their own masters: bfloat16 would lose small updates
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return replace(model, network=network)
    check_targets(model.network, recipe)
    network = get_peft_model(model.network, recipe.lora.to_peft_config())
    # Loaded from a snapshot folder, peft would write that folder's path into the adapter.
    network.peft_config["default"].base_model_name_or_path = model.base_name
    trained = replace(model, network=network)
    if count_parameters(trained)[0] == 0:
        raise RecipeError("the adapters have no trainable parameter", where="lora.target_modules", code="lora-target")
    return trained


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


def load_adapter(model: TorchModel, folder: Path) -> TorchModel:
    """Adds saved adapters to a base model, frozen.

    Raises:
        AdapterError: no adapter there, or one that was made for another model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        fix = "name a run folder that finished training"
        raise AdapterError("there is no adapter", where=str(folder), fix=fix, code="no-adapter")
    try:
        network = PeftModel.from_pretrained(model.network, str(folder), torch_device=str(model.accelerator.device))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        message = f"the adapter does not fit this model: {str(error).strip().splitlines()[0]}"
        raise AdapterError(message, where=str(folder), code="adapter-mismatch") from error
    network.eval()
    return replace(model, network=network)


def save_weights(model: TorchModel, folder: Path) -> None:
    """Writes what was trained: adapters in PEFT format, or the whole model when everything was."""
    if isinstance(model.network, PeftModel):
        # "auto" would ask the hub whether the vocabulary was resized; it never is.
        model.network.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.network.save_pretrained(str(folder))


def merge_adapter(model: TorchModel) -> TorchModel:
    """Folds the adapters into the weights and returns the plain model."""
    if not isinstance(model.network, PeftModel):
        return model
    return replace(model, network=model.network.merge_and_unload(safe_merge=True))


def save_merged(model: TorchModel, folder: Path, dtype_name: str) -> None:
    """Writes a plain model as safetensors with its config and generation config."""
    model.network.to(getattr(torch, dtype_name)).save_pretrained(str(folder))


def count_parameters(model: TorchModel) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.network.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def compute_token_losses(model: TorchModel, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every supervised token, in row order.

    The head runs only at the positions whose next token is supervised: with short answers that is most of its cost saved.

    Returns:
        float32 nats, shape (supervised_tokens,).
    """
    device = model.accelerator.device
    loss_mask = torch.from_numpy(batch.loss_mask)
    predicts_next = torch.zeros_like(loss_mask)
    predicts_next[:, :-1] = loss_mask[:, 1:]
    input_ids = torch.from_numpy(batch.input_ids)
    extra = {}
    if batch.attention_mask is not None:
        extra["attention_mask"] = torch.from_numpy(batch.attention_mask).to(device)
    if batch.position_ids is not None:
        # transformers builds the block-diagonal mask from restarting positions only when no attention mask is passed.
        extra["position_ids"] = torch.from_numpy(batch.position_ids).to(device)
    logits = model.network(
        input_ids=input_ids.to(device), logits_to_keep=predicts_next.to(device), use_cache=False, **extra
    ).logits
    targets = input_ids[loss_mask].to(device)
    return functional.cross_entropy(logits.float(), targets, reduction="none")


class NeftuneNoise:
    """NEFTune (arXiv 2310.05914, section 2): uniform noise on the embeddings, scaled by alpha / sqrt(length x width).

    The length is that of the row's real tokens; the usual implementations take the padded one.
    """

    def __init__(self, network: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths = torch.ones(1)
        network.get_input_embeddings().register_forward_hook(self.add_noise)

    def add_noise(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook; does nothing in evaluation."""
        if not module.training:
            return output
        scale = self.alpha / torch.sqrt(self.lengths.to(output) * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[:, None, None]


class TorchTrainStep:
    """AdamW over the trainable tensors, fed by micro-batches that run side by side on a CPU."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        self.model = model
        self.training = recipe.training
        self.parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
        # Decay acts on matrices only: pulling biases and norms towards 0 has no regularising meaning.
        matrices = [parameter for parameter in self.parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.parameters if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
        self.optimizer = model.accelerator.prepare(optimizer)
        if self.training.gradient_checkpointing:
            model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.noise = None
        if self.training.neftune_alpha is not None:
            self.noise = NeftuneNoise(model.network, self.training.neftune_alpha)
        self.workers = 1 if self.noise or draws_random_numbers(model.network) else model.plan.workers
        # Each worker computes on one thread of its own; see DeviceManager.
        self.pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Takes one optimizer step.

        The loss is the sum over all supervised tokens of the step divided by their number, so the result does not depend
        on how the step was cut into micro-batches.

        Raises:
            TrainingError: loss or gradient is not finite; the weights are as they were before the step.
        """
        self.model.network.train()
        supervised = sum(batch.supervised_tokens for batch in micro_batches)
        if supervised == 0:
            raise TrainingError("a step has no supervised token", fix="run scripts/validate.py on the recipe")
        loss = self._accumulate(micro_batches, supervised)
        limit = self.training.max_grad_norm or math.inf
        norm = float(self.model.accelerator.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            fix = "lower training.learning_rate, or set model.dtype: float32"
            raise TrainingError(f"loss {loss} with gradient norm {norm}", fix=fix, code="not-finite")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss, norm, sum(batch.tokens for batch in micro_batches), supervised)

    def _accumulate(self, micro_batches: Sequence[Batch], supervised: int) -> float:
        """Adds up gradients and loss over the micro-batches, always in their order, whoever finishes first."""
        if self.workers == 1:
            total = 0.0
            for batch in micro_batches:
                if self.noise:
                    self.noise.lengths = torch.from_numpy(batch.lengths)
                loss = compute_token_losses(self.model, batch).sum() / supervised
                self.model.accelerator.backward(loss)
                total += float(loss.detach())
            return total

        def differentiate(batch: Batch) -> tuple[float, tuple[torch.Tensor, ...]]:
            loss = compute_token_losses(self.model, batch).sum() / supervised
            return float(loss.detach()), torch.autograd.grad(loss, self.parameters)

        total = 0.0
        for loss, gradients in self.pool.map(differentiate, micro_batches):
            total += loss
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total


def draws_random_numbers(network: nn.Module) -> bool:
    """True if a training forward pass depends on a generator, whose order parallel workers would not keep."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


def make_step(model: TorchModel, recipe: Recipe) -> TorchTrainStep:
    """Builds the optimizer."""
    return TorchTrainStep(model, recipe)


def run_side_by_side(
    model: TorchModel, work: Callable[[Batch], Any], batches: Sequence[Batch], on_batch: Callable[[int], None]
) -> list[Any]:
    """Runs gradient-free work on every batch, on as many workers as the machine has, and keeps the order."""
    model.network.eval()

    def work_without_gradients(batch: Batch) -> Any:
        with torch.inference_mode():
            return work(batch)

    results = []
    with ThreadPoolExecutor(model.plan.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for batch, result in zip(batches, pool.map(work_without_gradients, batches), strict=True):
                results.append(result)
                on_batch(len(batch.lengths))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for everything that is queued
            raise
    return results


def evaluate(
    model: TorchModel, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
) -> list[tuple[float, int]]:
    """Sum of the negative log-likelihood in nats, and supervised tokens, of every row in order."""

    def score(batch: Batch) -> list[tuple[float, int]]:
        losses = compute_token_losses(model, batch).double().cpu()
        counts = batch.loss_mask.sum(axis=1)
        return [(float(part.sum()), len(part)) for part in torch.split(losses, counts.tolist())]

    return [row for rows in run_side_by_side(model, score, batches, on_batch) for row in rows]


def compute_logits(model: TorchModel, batch: Batch) -> npt.NDArray[np.float32]:
    """Logits at every real position, shape (tokens, vocabulary)."""
    device = model.accelerator.device
    real = np.ones_like(batch.loss_mask) if batch.attention_mask is None else batch.attention_mask
    mask = torch.from_numpy(real)
    model.network.eval()
    with torch.inference_mode():
        ids = torch.from_numpy(batch.input_ids).to(device)
        logits = model.network(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits
        return logits[mask.to(device)].float().cpu().numpy()  # type: ignore[no-any-return]


def make_generation_inputs(model: TorchModel, batch: Batch, settings: GenerationSettings) -> dict[str, Any]:
    """Arguments of transformers' generate; the model's own generation config is never touched."""
    mask = np.ones_like(batch.loss_mask) if batch.attention_mask is None else batch.attention_mask
    device = model.accelerator.device
    return {
        "input_ids": torch.from_numpy(batch.input_ids).to(device),
        "attention_mask": torch.from_numpy(mask).long().to(device),
        "generation_config": settings.generation.to_generation_config(list(settings.stop_ids), settings.pad_id),
    }


def generate(
    model: TorchModel, batches: Sequence[Batch], settings: GenerationSettings, on_batch: Callable[[int], None] = ignore
) -> list[list[int]]:
    """New token ids of each row of left-padded batches, in order, up to and without the stop token."""

    def answer(batch: Batch) -> list[list[int]]:
        output = model.network.generate(**make_generation_inputs(model, batch, settings))
        return [cut_at_stop(row, settings.stop_ids) for row in output[:, batch.input_ids.shape[1] :].tolist()]

    if settings.generation.temperature > 0:
        # Workers would draw from one generator in whatever order they run: sampling keeps to one.
        model = replace(model, plan=replace(model.plan, workers=1))
    return [row for rows in run_side_by_side(model, answer, batches, on_batch) for row in rows]


def cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """What stands before the first stop token."""
    return ids[: next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))]


class QueueStreamer(BaseStreamer):  # type: ignore[misc]  # transformers ships no types
    """Hands each new token over to another thread; None marks the end."""

    def __init__(self) -> None:
        self.queue: Queue[int | BaseException | None] = Queue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by generate: first with the whole prompt, then with each token."""
        if self.prompt_seen:
            self.queue.put(int(value.flatten()[0]))
        self.prompt_seen = True

    def end(self) -> None:
        """Called by generate at the end."""
        self.queue.put(None)


def stream(model: TorchModel, batch: Batch, settings: GenerationSettings) -> Iterator[int]:
    """New token ids of a single prompt, one by one as they are sampled."""
    model.network.eval()
    streamer = QueueStreamer()

    def work() -> None:
        try:
            model.network.generate(**make_generation_inputs(model, batch, settings), streamer=streamer)
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread, below
            streamer.queue.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    while (item := streamer.queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        if item not in settings.stop_ids:
            yield item
    thread.join()


def measure_peak_memory(model: TorchModel) -> int:
    """Peak bytes so far: device memory on CUDA, resident memory elsewhere."""
    return measure_process_peak(model.plan.device)

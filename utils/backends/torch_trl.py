"""TRL's trainers in the place of our loop: the same tokens, masks, order, learning rate and optimizer, their losses and steps.

What TRL computes: padding, the loss, its division by what the step learns, gradient accumulation, clipping. What stays ours:
everything before the batch, the optimizer and its groups, and what a step leaves in the run folder. Nothing of transformers'
own checkpoints is written: they hold pickles.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PrinterCallback
from trl import DPOConfig, SFTConfig

from config.structured_config import DpoSection, Recipe
from utils.backends.torch_model import TorchModel
from utils.backends.torch_preference import PairObjective
from utils.backends.torch_step import TorchTrainStep
from utils.backends.torch_trl_batches import LabelCollator, PairCollator, WindowLoader
from utils.backends.torch_trl_trainers import FedDpoTrainer, FedSftTrainer, RecipeSchedule, StepRecorder, find_step
from utils.exceptions import RecipeError
from utils.progress import Progress
from utils.training_loop import LoopParts, finish_run
from utils.training_state import TrainingState

FedTrainer = FedSftTrainer | FedDpoTrainer


def train(model: TorchModel, recipe: Recipe, tokenizer: Any, parts: LoopParts) -> TrainingState:
    """Runs all steps on TRL's trainer, or until early stopping or a signal; what was trained until then is saved.

    Args:
        tokenizer: of the transformers library; TRL reads its special tokens alone.

    Raises:
        RecipeError: TRL cannot train this model with these adapters.
        TrainingError: a loss or gradient that is not finite, before the weights change; here the first one ends the run.
    """
    state = TrainingState()
    with state.signals.listen():
        with Progress("Training", parts.plan.total_steps, "steps") as progress:
            trainer = build_trainer(model, recipe, tokenizer, StepRecorder(model, parts, state, progress))
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(trainer.recorder)
            trainer.train()
        finish_run(parts, state)
    return state


def build_trainer(model: TorchModel, recipe: Recipe, tokenizer: Any, recorder: StepRecorder) -> FedTrainer:
    """Builds TRL's trainer around our network, optimizer, order and rate.

    Raises:
        RecipeError: TRL refuses the model or its adapters.
    """
    parts = recorder.parts
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained] if recipe.model.quantization != "none" else []
    # The step has already put what the recipe asks for on the network, such as gradient checkpointing.
    step = find_step(parts)
    optimizer = step.optimizer.optimizer
    own = {
        "model": model.network,
        "processing_class": tokenizer,
        "optimizers": (optimizer, RecipeSchedule(optimizer, parts)),
    }
    arguments = make_arguments(model, recipe, parts)
    try:
        if recipe.dpo is None:
            trainer = build_sft_trainer(recorder, arguments, own)
        else:
            trainer = build_dpo_trainer(recorder, arguments, own, recipe.dpo, step)
    except ValueError as error:
        message = f"TRL cannot train this: {str(error).strip().splitlines()[0]}"
        raise RecipeError(message, where="training.engine", fix="set engine: tunebook", code="engine") from error
    # TRL rounds the adapters over a quantised base to bfloat16, where small updates are lost; ours stay in float32.
    for parameter, value in zip(trained, kept, strict=False):
        parameter.data = value
    return trainer


def build_sft_trainer(recorder: StepRecorder, arguments: dict[str, Any], own: dict[str, Any]) -> FedSftTrainer:
    """TRL's trainer of supervised fine-tuning."""
    batches = recorder.parts.batches
    loader = WindowLoader(batches, LabelCollator(batches.examples, batches.pad_token_id))
    skip = {"skip_prepare_dataset": True}
    return FedSftTrainer(loader, recorder, args=SFTConfig(**arguments, dataset_kwargs=skip), **own)


def build_dpo_trainer(
    recorder: StepRecorder, arguments: dict[str, Any], own: dict[str, Any], dpo: DpoSection, step: TorchTrainStep
) -> FedDpoTrainer:
    """TRL's trainer of direct preference optimisation, with the reference that the recipe names."""
    batches, precomputed = recorder.parts.batches, dpo.reference == "precomputed"
    loader = WindowLoader(batches, PairCollator(batches.examples, batches.pad_token_id, with_reference=precomputed))
    # The second copy of the model that `reference: model` asks for has been made for our own step.
    frozen = step.objective.frozen if isinstance(step.objective, PairObjective) else None
    settings = DPOConfig(
        **arguments, beta=dpo.beta, loss_type=[dpo.loss], precompute_ref_log_probs=precomputed, disable_dropout=False
    )
    trainer = FedDpoTrainer(loader, recorder, args=settings, ref_model=frozen.network if frozen else None, **own)
    network = own["model"]
    if isinstance(network, PeftModel) and "ref" in network.peft_config:
        network.delete_adapter(
            "ref"
        )  # a copy of the fresh adapters, which change nothing and would be saved beside ours
    return trainer


def make_arguments(model: TorchModel, recipe: Recipe, parts: LoopParts) -> dict[str, Any]:
    """The recipe in transformers' words; everything that writes, evaluates, shuffles or reports is off."""
    batches, training = parts.batches, recipe.training
    return {
        "output_dir": str(parts.folder.path),
        "max_steps": parts.plan.total_steps,
        "per_device_train_batch_size": batches.micro_batch_size,
        "gradient_accumulation_steps": -(-batches.batch_size // batches.micro_batch_size),
        "max_grad_norm": training.max_grad_norm or 0.0,
        "learning_rate": training.learning_rate,
        "seed": recipe.seed,
        "use_cpu": model.plan.device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "router_aux_loss_coef": 0.0,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "log_level": "error",
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "push_to_hub": False,
    }

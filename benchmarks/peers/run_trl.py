"""TRL in its own environment: `python run_trl.py JOB RESULT`; as it comes, in float32, tuned, or with Liger (`setting`).

As it comes: SFTTrainer or DPOTrainer with their own defaults; the job sets what makes it the same work. Tuned: what an
expert sets: no autocast, no checkpointing, rows of like length together, 2 of them in a micro-batch on a CPU and all of a
step's on a GPU, and the allocator kept from returning big buffers. Where bfloat16 is native, the frozen base is loaded in it;
elsewhere all is float32. Liger: the same with the kernels of liger-kernel, on a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import peer_job
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

MICRO_BATCH = 2  # on a CPU
TUNED = ("tuned", "liger")


class StepClock(TrainerCallback):  # type: ignore[misc]  # a class of a library that is not type-checked
    """Notes when a step ends, and what the trainer logs about it."""

    def __init__(self, recorder: peer_job.Recorder) -> None:
        self.recorder = recorder

    def on_step_end(self, *arguments: Any, **_: Any) -> None:
        """The weights have moved."""
        self.recorder.end_step()

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """One report a step; the last one sums up the run."""
        if "loss" in logs:
            self.recorder.report(logs["loss"], logs["grad_norm"])


class CountingSft(SFTTrainer):  # type: ignore[misc]  # a class of a library that is not type-checked
    """Counts the tokens of each micro-batch that it trains on."""

    recorder: peer_job.Recorder

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Counts, then trains."""
        labels = inputs["labels"][:, 1:]
        self.recorder.count(int(inputs["attention_mask"].sum()), int((labels != -100).sum()))
        return super().training_step(model, inputs, num_items_in_batch)


class CountingDpo(DPOTrainer):  # type: ignore[misc]  # a class of a library that is not type-checked
    """The same for pairs: every prompt is counted with both of its answers."""

    recorder: peer_job.Recorder

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Counts, then trains."""
        self.recorder.count(int(inputs["attention_mask"].sum()), int(inputs["completion_mask"].sum()))
        return super().training_step(model, inputs, num_items_in_batch)


def choose_dtype(job: dict[str, Any]) -> str:
    """Format of the loaded weights; TRL's own default is float32 under bfloat16 autocast."""
    is_full = job["r"] is None
    is_native = peer_job.computes_bfloat16_natively()
    return "bfloat16" if job["setting"] in TUNED and is_native and not is_full else "float32"


def make_settings(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """TRL's arguments: what makes it the same work, and when tuned what an expert adds."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "seed": job["seed"],
        "use_cpu": peer_job.find_gpu() is None,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    if job["setting"] != "plain":
        trains_all = job["setting"] in TUNED and job["r"] is None
        # Weights that are all trained stay in float32, and their products are in bfloat16 where that is native.
        settings["bf16"] = trains_all and peer_job.computes_bfloat16_natively()
    if job["setting"] in TUNED:
        rows = MICRO_BATCH if peer_job.find_gpu() is None else job["batch_size"]
        settings |= {
            "gradient_checkpointing": False,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": job["batch_size"] // rows,
            "use_liger_kernel": job["setting"] == "liger",
        }
    return settings


def describe_loading(job: dict[str, Any]) -> dict[str, Any]:
    """How TRL's trainers load the model."""
    if job["quantization"] != "nf4":
        return {"dtype": choose_dtype(job)}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, choose_dtype(job)),
        bnb_4bit_use_double_quant=True,
    )
    return {"dtype": choose_dtype(job), "quantization_config": quantization}


def train(job: dict[str, Any], loaded: tuple[Any, Any] | None, dtype: str, packages: Sequence[str]) -> None:
    """Trains, and writes down what happened.

    Args:
        loaded: model and tokenizer; None lets TRL load them.
        dtype: format of the weights.
        packages: those whose versions matter.
    """
    recorder, rows = peer_job.Recorder(), peer_job.read_rows(job)
    if job["setting"] in TUNED:
        peer_job.keep_freed_pages()
        rows = peer_job.sort_windows(rows, job["batch_size"])
    kind, config = (CountingSft, SFTConfig) if job["method"] == "sft" else (CountingDpo, DPOConfig)
    own: dict[str, Any] = {"callbacks": [StepClock(recorder)], "train_dataset": Dataset.from_list(rows)}
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(job, folder)
        if loaded is None:
            if job["r"] is not None:
                own["peft_config"] = LoraConfig(
                    r=job["r"], lora_alpha=job["alpha"], target_modules="all-linear", lora_dropout=0.0
                )
            settings["model_init_kwargs"] = describe_loading(job)
            trainer = kind(job["model"], args=config(**settings), **own)
        else:
            settings["bf16"] = True  # Unsloth's adapters are in float32, and it computes under autocast
            trainer = kind(loaded[0], args=config(**settings), processing_class=loaded[1], **own)
        trainer.recorder = recorder
        if loaded is None and dtype == "bfloat16" and job["quantization"] == "none":
            trainer.model.to(torch.bfloat16)  # peft keeps adapters in float32; an expert has both in one format
        trainer.train()
        trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    recorder.write(trainable, f"{dtype}{', bfloat16 autocast' if trainer.args.bf16 else ''}", packages)


if __name__ == "__main__":
    asked = peer_job.read_job()
    liger = ("liger-kernel",) if asked["setting"] == "liger" else ()
    train(asked, None, choose_dtype(asked), ("torch", "transformers", "peft", "trl", *liger))

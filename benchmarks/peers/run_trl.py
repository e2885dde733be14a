"""TRL in its own environment: `python run_trl.py JOB RESULT`; as it comes, in float32, or tuned (`setting` of the job).

As it comes: SFTTrainer or DPOTrainer with their own defaults; the job sets what makes it the same work. Tuned: what an
expert sets on a CPU: no autocast, no checkpointing, micro-batches of 2 rows of like length, and the allocator kept from
returning big buffers. Where the CPU has native bfloat16, the frozen base is loaded in it; elsewhere all is float32.
"""

from __future__ import annotations

import tempfile
from typing import Any

import peer_job
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

MICRO_BATCH = 2


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
    return (
        "bfloat16" if job["setting"] == "tuned" and peer_job.computes_bfloat16_natively() and not is_full else "float32"
    )


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
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "model_init_kwargs": {"dtype": choose_dtype(job)},
    }
    if job["setting"] != "plain":
        settings["bf16"] = False
    if job["setting"] == "tuned":
        settings |= {
            "gradient_checkpointing": False,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": job["batch_size"] // MICRO_BATCH,
        }
    return settings


def main() -> None:
    """Trains, and writes down what happened."""
    job, recorder = peer_job.read_job(), peer_job.Recorder()
    rows = peer_job.read_rows(job)
    if job["setting"] == "tuned":
        peer_job.keep_freed_pages()
        rows = peer_job.sort_windows(rows, job["batch_size"])
    own: dict[str, Any] = {"callbacks": [StepClock(recorder)]}
    if job["r"] is not None:
        own["peft_config"] = LoraConfig(
            r=job["r"], lora_alpha=job["alpha"], target_modules="all-linear", lora_dropout=0.0
        )
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(job, folder)
        if job["quantization"] == "nf4":
            settings["model_init_kwargs"]["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float32,
                bnb_4bit_use_double_quant=True,
            )
        is_sft = job["method"] == "sft"
        kind, config = (CountingSft, SFTConfig) if is_sft else (CountingDpo, DPOConfig)
        trainer = kind(job["model"], args=config(**settings), train_dataset=Dataset.from_list(rows), **own)
        trainer.recorder = recorder
        if choose_dtype(job) == "bfloat16":
            trainer.model.to(torch.bfloat16)  # peft keeps adapters in float32; an expert has both in one format
        trainer.train()
        trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    dtype = f"{choose_dtype(job)}{', bfloat16 autocast' if trainer.args.bf16 else ''}"
    recorder.write(trainable, dtype, ("torch", "transformers", "peft", "trl"))


if __name__ == "__main__":
    main()

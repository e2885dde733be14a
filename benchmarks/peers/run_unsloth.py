"""Unsloth in its own environment, on a GPU: `python run_unsloth.py JOB RESULT`.

The work of run_trl.py, tuned, on the model that Unsloth loads and adapts. Unsloth has to be imported first: it replaces parts
of transformers, peft and trl.
"""

from __future__ import annotations

from typing import Any

from unsloth import FastLanguageModel  # isort: skip

import peer_job
import run_trl
import torch

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_LENGTH = 2048


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer, with adapters where the job has a rank."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job["model"],
        max_seq_length=MAX_LENGTH,
        dtype=torch.bfloat16,
        load_in_4bit=job["quantization"] == "nf4",
        full_finetuning=job["r"] is None,
        local_files_only=True,
    )
    if job["r"] is not None:
        model = FastLanguageModel.get_peft_model(
            model,
            r=job["r"],
            lora_alpha=job["alpha"],
            lora_dropout=0.0,
            bias="none",
            target_modules=list(TARGETS),
            use_gradient_checkpointing=False,
            random_state=job["seed"],
        )
    return model, tokenizer


if __name__ == "__main__":
    job = peer_job.read_job()
    run_trl.train(job, load(job), "bfloat16", ("torch", "transformers", "peft", "trl", "unsloth"))

"""LitGPT in its own environment: `python run_litgpt.py JOB RESULT`, and before the first run `… JOB RESULT --prepare`.

Runs `litgpt finetune_lora` on rows of its own data module. `--prepare` converts the model folder into LitGPT's format once;
this is not timed. The tool has no constant rate and no clipping: both are put in from here, and its merge at the end is left
out. Its default precision, bf16-mixed, is replaced by 32-true where the CPU has no native bfloat16. A micro-batch holds all
rows of a step, because the tool averages over micro-batches and not over tokens.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import peer_job
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

NAME = "SmolLM2-135M-Instruct"
RECORDER = peer_job.Recorder()
NEVER = 10**9
compute_loss_as_before = lora.chunked_cross_entropy


class JobRows(DataModule):  # type: ignore[misc]  # a class of a library that is not type-checked
    """The rows of the job in their order; the first of them serves as the validation set that the tool asks for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__()
        self.prompt_style = None
        self.rows = [
            {
                "input_ids": torch.tensor(row["input_ids"]),
                "labels": torch.tensor(row["labels"]),
                "token_counts": {"raw": 0, "raw_plus_prompt_template": len(row["input_ids"])},
            }
            for row in rows
        ]
        self.batch_size = 1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        """Takes the micro-batch size."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """All rows, not shuffled."""
        return DataLoader(self.rows, batch_size=self.batch_size, collate_fn=get_sft_collate_fn(ignore_index=-100))

    def val_dataloader(self) -> DataLoader[Any]:
        """One row."""
        return DataLoader(self.rows[:1], collate_fn=get_sft_collate_fn(ignore_index=-100))


def compute_loss(logits: Any, targets: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """The tool's loss; in training, a step's is written down."""
    loss: torch.Tensor = compute_loss_as_before(logits, targets, *arguments, **named)
    if loss.requires_grad:
        RECORDER.losses.append(float(loss.detach()))
        RECORDER.count(0, int((targets != -100).sum()))
    return loss


def clip(optimizer: torch.optim.Optimizer, arguments: Any, named: Any) -> None:
    """Clips at 1, as all sides do, and writes the norm down."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    RECORDER.gradient_norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))


def convert(model: str, folder: Path) -> None:
    """Converts the model folder, unless that is done."""
    if (folder / "lit_model.pth").exists():
        return
    shutil.copytree(model, folder, dirs_exist_ok=True)
    convert_hf_checkpoint(folder, model_name=NAME)


def put_in(rows: list[dict[str, Any]], batch_size: int) -> dict[str, int]:
    """Makes the tool count, clip and keep its rate; returns where the number of trainable parameters will stand."""
    lengths = [len(row["input_ids"]) for row in rows]
    found: dict[str, int] = {}
    mark_as_before = lora.mark_only_lora_as_trainable

    def mark(model: Any, *arguments: Any) -> None:
        mark_as_before(model, *arguments)
        found["trainable"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def end_step(*_: Any) -> None:
        start = len(RECORDER.ends) * batch_size
        RECORDER.count(sum(lengths[start : start + batch_size]), 0)
        RECORDER.end_step()

    register_optimizer_step_pre_hook(clip)
    register_optimizer_step_post_hook(end_step)
    lora.mark_only_lora_as_trainable = mark
    lora.chunked_cross_entropy = compute_loss
    lora.get_lr_scheduler = lambda optimizer, **_: LambdaLR(optimizer, lambda step: 1.0)
    lora.merge_lora = lora.save_prompt_style = lora.save_hyperparameters = lambda *_, **__: None
    return found


def main() -> None:
    """Trains, and writes down what happened."""
    job = peer_job.read_job()
    checkpoint = Path(sys.prefix) / "checkpoints" / "model" / NAME
    if "--prepare" in sys.argv:
        convert(job["model"], checkpoint)
        return
    size, adapted = job["batch_size"], ("query", "key", "value", "projection", "mlp")
    rows = peer_job.read_rows(job)[: job["steps"] * size]
    found = put_in(rows, size)
    precision = "bf16-mixed" if peer_job.computes_bfloat16_natively() else "32-true"
    cadence = {
        "save_interval": NEVER,
        "log_interval": 1,
        "lr_warmup_steps": 0,
        "epochs": 1000,
        "max_steps": job["steps"],
    }
    with tempfile.TemporaryDirectory() as folder:
        lora.setup(
            checkpoint_dir=checkpoint,
            out_dir=Path(folder),
            precision=precision,
            lora_r=job["r"],
            lora_alpha=int(job["alpha"]),
            lora_dropout=0.0,
            **{f"lora_{name}": True for name in adapted},
            data=JobRows(rows),
            train=TrainArgs(global_batch_size=size, micro_batch_size=size, **cadence),
            eval=EvalArgs(interval=NEVER, max_new_tokens=1, max_iters=1, final_validation=False),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": job["learning_rate"], "weight_decay": 0.0},
            },
            seed=job["seed"],
        )
    RECORDER.write(found["trainable"], precision, ("torch", "lightning", "litgpt"))


if __name__ == "__main__":
    main()

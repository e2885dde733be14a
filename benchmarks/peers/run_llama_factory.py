"""LLaMA-Factory in its own environment: `python run_llama_factory.py JOB RESULT`, and before the first run `… --prepare`.

Runs the function behind `llamafactory-cli train` on tokenised rows, with the tool's own defaults: gradient checkpointing on,
padding to a multiple of 8. The job sets what makes it the same work; a micro-batch holds all rows of a step. The tool
computes in the format of the model's files: where bfloat16 is not native, `--prepare` copies them in float32 before.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import peer_job

if find_spec("torchaudio") is None:
    # The tool imports it at the top for audio alone, and its published builds do not load beside a torch without CUDA.
    sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))

from datasets import Dataset, DatasetDict
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

RECORDER = peer_job.Recorder()
SEEN: dict[str, Any] = {}
train_as_before = CustomSeq2SeqTrainer.training_step


class StepClock(TrainerCallback):  # type: ignore[misc]  # a class of a library that is not type-checked
    """Notes when a step ends, what the trainer logs about it, and which parameters it trains."""

    def on_train_begin(self, arguments: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Looks at the model."""
        SEEN["trainable"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        SEEN["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")

    def on_step_end(self, *arguments: Any, **_: Any) -> None:
        """The weights have moved."""
        RECORDER.end_step()

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """One report a step; the last one sums up the run."""
        if "loss" in logs:
            RECORDER.report(logs["loss"], logs["grad_norm"])


def count_and_train(trainer: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
    """Counts the tokens of a micro-batch before it is trained on."""
    RECORDER.count(int(inputs["attention_mask"].sum()), int((inputs["labels"][:, 1:] != -100).sum()))
    return train_as_before(trainer, model, inputs, *arguments, **named)


def find_model(job: dict[str, Any]) -> Path:
    """The folder that the tool loads."""
    return Path(job["model"]) if peer_job.computes_bfloat16_natively() else Path(sys.prefix) / "checkpoints" / "float32"


def prepare(job: dict[str, Any], folder: Path) -> None:
    """Copies the model in float32, which loses nothing, unless that is done or not needed."""
    if not folder.exists():
        AutoTokenizer.from_pretrained(job["model"]).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32").save_pretrained(folder)


def make_arguments(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """The tool's own words for the job."""
    arguments: dict[str, Any] = {
        "model_name_or_path": str(find_model(job)),
        "stage": "sft",
        "do_train": True,
        "dataset": "rows",  # asked for, and not read where tokenised rows are there
        "tokenized_path": f"{folder}/rows",
        "template": "chatml",  # asked for, and not used on tokenised rows
        "cutoff_len": 2048,
        "output_dir": f"{folder}/output",
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "disable_shuffling": True,
        "seed": job["seed"],
        "use_cpu": peer_job.find_gpu() is None,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "finetuning_type": "full",
    }
    if job["r"] is not None:
        lora = {"lora_rank": job["r"], "lora_alpha": int(job["alpha"]), "lora_target": "all", "lora_dropout": 0.0}
        arguments |= {"finetuning_type": "lora", **lora}
    return arguments


def main() -> None:
    """Trains, and writes down what happened."""
    job = peer_job.read_job()
    if "--prepare" in sys.argv:
        prepare(job, find_model(job))
        return
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in peer_job.read_rows(job)]
    CustomSeq2SeqTrainer.training_step = count_and_train
    with tempfile.TemporaryDirectory() as folder:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(Path(folder) / "rows"))
        run_exp(make_arguments(job, folder), [StepClock()])
    packages = ("torch", "transformers", "peft", "llamafactory")
    RECORDER.write(SEEN["trainable"], SEEN["dtype"], packages)


if __name__ == "__main__":
    main()

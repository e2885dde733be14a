"""mlx-lm in its own environment: `python run_mlx_lm.py JOB RESULT`.

Runs `mlx_lm.tuner.train`, the function behind `mlx_lm.lora`, with adapters on all linear modules of all layers. Put in from
here: the order of the rows (its own sorts all of them by length), clipping at 1, bias correction in Adam, float32 weights on
a CPU, and lengths without the one pad that its mask learns in each padded row. Its padding to 32 k + 1 tokens stays. With the
setting `unchanged`, its mask and its Adam are its own: only the order of the rows and the number format are put in.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
import peer_job
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

PAD_TO = 32
RECORDER = peer_job.Recorder()


class ClippingAdamW(mlx.optimizers.AdamW):  # type: ignore[misc]  # a class of a library that is not type-checked
    """AdamW that clips, where it is told to, and keeps the norm."""

    limit = 1.0

    def update(self, model: Any, gradients: Any) -> None:
        """Clips and moves the weights."""
        gradients, norm = mlx.optimizers.clip_grad_norm(gradients, self.limit)
        self.state["norm"] = norm
        super().update(model, gradients)


class StepClock(TrainingCallback):  # type: ignore[misc]  # a class of a library that is not type-checked
    """Notes each step."""

    def __init__(self, optimizer: ClippingAdamW, tokens: list[int]) -> None:
        self.optimizer, self.tokens, self.trained = optimizer, tokens, 0

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """The weights have moved."""
        learned = int(train_info["trained_tokens"])
        RECORDER.count(self.tokens[len(RECORDER.ends)], learned - self.trained)
        self.trained = learned
        RECORDER.end_step()
        RECORDER.report(train_info["train_loss"], float(self.optimizer.state["norm"]))


def iterate_in_order(dataset: list[Any], batch_size: int, *_: Any, **__: Any) -> Iterator[tuple[mx.array, mx.array]]:
    """Batches of rows in their order, padded as the tool pads, each with its range of learned tokens."""
    for start in range(0, len(dataset), batch_size):
        rows = dataset[start : start + batch_size]
        longest = max(len(ids) for ids, _, _ in rows)
        batch = np.zeros((len(rows), 1 + PAD_TO * -(-longest // PAD_TO)), np.int32)
        for row, (ids, _, _) in zip(batch, rows, strict=True):
            row[: len(ids)] = ids
        yield mx.array(batch), mx.array([(offset, end) for ids, offset, end in rows])


def main() -> None:
    """Trains, and writes down what happened."""
    job = peer_job.read_job()
    rows = peer_job.read_rows(job)[: job["steps"] * job["batch_size"]]
    # Position i of the tool's mask stands for token i, and its first learned token is the one at the offset. Its own range ends
    # one behind the last token, where a padded row has a pad.
    is_changed = job["setting"] != "unchanged"
    starts = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    ends = [len(row["input_ids"]) - is_changed for row in rows]
    dataset = [(row["input_ids"], *span) for row, *span in zip(rows, starts, ends, strict=True)]
    windows = [dataset[start : start + job["batch_size"]] for start in range(0, len(dataset), job["batch_size"])]
    mx.random.seed(job["seed"])
    model, _ = load(job["model"])
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": job["r"], "scale": job["alpha"] / job["r"], "dropout": 0.0})
    if not mx.metal.is_available():
        model.set_dtype(mx.float32)
    optimizer = ClippingAdamW(job["learning_rate"], weight_decay=0.0, bias_correction=is_changed)
    optimizer.limit = 1.0 if is_changed else math.inf
    optimizer.state["norm"] = mx.array(0.0)
    clock = StepClock(optimizer, [sum(len(ids) for ids, _, _ in window) for window in windows])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=job["batch_size"],
            iters=job["steps"],
            steps_per_report=1,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        train(model, optimizer, dataset, args=arguments, iterate_batches=iterate_in_order, training_callback=clock)
    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    RECORDER.write(trainable, str(model.model.embed_tokens.weight.dtype).split(".")[-1], ("mlx", "mlx-lm"))


if __name__ == "__main__":
    main()

"""Numbers that go wrong in a real run of a tiny model: planted faults, and what the run makes of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from config.structured_config import Recipe, TrackingSection
from utils.backends import torch_backend
from utils.backends.torch_model import TorchModel
from utils.backends.torch_preference import estimate_reference_point
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, make_micro_batches, pad_rows
from utils.exceptions import TrainingError
from utils.logging import NAME
from utils.methods.pairs import join_pair
from utils.methods.sft import SftBatches
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.preflight import plan_run
from utils.run_folder import RunFolder
from utils.run_watch import RunWatch
from utils.schedules import compute_learning_rate
from utils.tracking import Tracker
from utils.training_loop import LoopParts, train

PAD, VOCABULARY = 2, 300
BAD_TOKEN = 299  # its embedding is infinite: whatever row holds it has neither loss nor gradient
FAULTY = 5  # the row that holds it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose head is not its embedding, so that one token can be broken without the others."""
    path = tmp_path_factory.mktemp("faults") / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **shape, **ids))
    with torch.no_grad():
        network.model.embed_tokens.weight[BAD_TOKEN] = math.inf
    network.save_pretrained(path)
    return path


def make_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """Steps of 4 rows in passes of 2."""
    training = {"batch_size": 4, "learning_rate": 1e-2, **sections.pop("training", {})}
    return Recipe(
        model={"name": str(folder), "dtype": "float32"},
        data={"train": "unused"},
        lora={"r": 4},
        training={"method": "sft", **training},
        **sections,
    )


def load(recipe: Recipe) -> TorchModel:
    """The model with fresh adapters."""
    torch.manual_seed(1)
    source = ModelSource(recipe.model.name, Path(recipe.model.name), {})
    model: TorchModel = torch_backend.attach_lora(torch_backend.load_model(source, recipe), recipe)
    return model


def make_examples(count: int = 12, faulty: Sequence[int] = (FAULTY,)) -> list[EncodedExample]:
    """Random rows of uneven length, the planted ones with the broken token in their prompt."""
    random = np.random.default_rng(0)
    examples = []
    for index in range(count):
        ids = random.integers(5, 290, 8 + index)
        if index in faulty:
            ids[1] = BAD_TOKEN
        examples.append(EncodedExample(ids, np.arange(8 + index) >= 5, f"rows.jsonl:{index + 1}"))
    return examples


def make_parts(
    model: TorchModel, recipe: Recipe, examples: Sequence[EncodedExample], target: Path, *, watched: bool = False
) -> LoopParts:
    """Loop parts as training_run.py wires them."""
    target.mkdir()
    step, plan = torch_backend.make_step(model, recipe), plan_run(recipe, len(examples))
    probe = [pad_rows(examples[:1], PAD)]

    def measure() -> Any:
        return np.array(torch_backend.evaluate(model, probe))

    return LoopParts(
        step=step,
        batches=SftBatches(examples, recipe.training.batch_size, 2, PAD, None, recipe.seed),
        plan=plan,
        training=recipe.training,
        evaluate=None,
        save_weights=lambda folder: torch_backend.save_weights(model, folder),
        folder=RunFolder(target),
        tracker=Tracker(TrackingSection(), target, {}),
        watch=RunWatch(step, plan.total_steps, measure) if watched else None,
    )


def copy_trainable(model: TorchModel) -> dict[str, torch.Tensor]:
    """What is trained, as it is now."""
    return {name: p.detach().clone() for name, p in model.network.named_parameters() if p.requires_grad}


def assert_same(model: TorchModel, kept: dict[str, torch.Tensor]) -> None:
    """Not a bit differs."""
    now = copy_trainable(model)
    assert [name for name in now if not torch.equal(now[name], kept[name])] == []


def test_a_step_with_a_broken_row_changes_no_weight_and_no_moment_and_names_the_row(folder: Path) -> None:
    recipe = make_recipe(folder)
    model, examples = load(recipe), make_examples()
    step = torch_backend.make_step(model, recipe)
    assert not step.step([pad_rows(examples[:4], PAD)], 1e-2).skipped
    weights = copy_trainable(model)
    moments = {key: value.clone() for key, value in enumerate_moments(step)}
    random = torch.get_rng_state()
    result = step.step([pad_rows(examples[4:6], PAD), pad_rows(examples[6:8], PAD)], 1e-2)
    assert result.skipped
    assert result.faulty == ("rows.jsonl:6",)
    assert result.places == tuple(f"rows.jsonl:{number}" for number in (5, 6, 7, 8))
    assert_same(model, weights)
    assert all(torch.equal(value, moments[key]) for key, value in enumerate_moments(step))
    assert torch.equal(torch.get_rng_state(), random)
    assert not step.step([pad_rows(examples[8:], PAD)], 1e-2).skipped


def enumerate_moments(step: TorchTrainStep) -> list[tuple[tuple[int, str], torch.Tensor]]:
    """Everything that the optimizer remembers, with a name."""
    states = step.optimizer.state_dict()["state"]
    return [((number, name), value) for number, state in states.items() for name, value in state.items()]


def test_packed_rows_and_pairs_are_named_too(folder: Path) -> None:
    recipe = make_recipe(folder, training={"packing": True})
    rows = make_micro_batches(make_examples(), 1, PAD, pack_length=64)
    result = torch_backend.make_step(load(recipe), recipe).step(rows, 1e-2)
    (packed,) = [row.places[0] for row in rows if BAD_TOKEN in row.input_ids]
    assert result.faulty == packed
    assert len(packed) > 1
    assert "rows.jsonl:6" in packed

    recipe = make_recipe(folder, training={"method": "dpo"}, dpo={"reference": "adapter_off"})
    random, pairs = np.random.default_rng(3), list[EncodedExample]()
    for example in make_examples():
        ids = np.concatenate([example.input_ids[:5], random.integers(5, 290, 3)])
        pair = join_pair(example, EncodedExample(ids, np.arange(8) >= 5, example.where))
        assert pair is not None
        pairs.append(pair)
    result = torch_backend.make_step(load(recipe), recipe).step([pad_rows(pairs[4:8], PAD)], 1e-2)
    assert result.faulty == ("rows.jsonl:6",)


def test_a_run_goes_on_after_a_broken_row_as_if_its_steps_had_not_been(folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(folder, training={"max_steps": 9, "save_every": 9})
    model = load(recipe)
    parts = make_parts(model, recipe, make_examples(), tmp_path / "run")
    state = train(parts)
    text = parts.folder.metrics_file.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    rows = parts.folder.read_metrics()
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert (len(rows), len(skipped), state.step, state.skips_in_a_row) == (9, 3, 9, 0)  # once in each of three epochs
    assert all(row["loss"] is None and row["grad_norm"] is None for row in rows if row.get("skipped"))
    written = [json.loads(line) for line in parts.folder.skipped_file.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in written] == skipped
    assert all(row["faulty_rows"] == ["rows.jsonl:6"] and len(row["rows"]) == 4 for row in written)
    assert parts.folder.count_skipped_steps() == 3
    kept = copy_trainable(model)
    # The same steps by hand, at the same rates, without those three.
    model = load(recipe)
    by_hand = make_parts(model, recipe, make_examples(), tmp_path / "by_hand")
    for number, micro_batches in enumerate(
        (batches for epoch in range(3) for batches in by_hand.batches.iterate_epoch(epoch)), start=1
    ):
        rate = compute_learning_rate(
            number, 9, peak=1e-2, scheduler=recipe.training.lr_scheduler, warmup_steps=by_hand.plan.warmup_steps
        )
        if number not in skipped:
            by_hand.step.step(micro_batches, rate)
    assert_same(model, kept)


class Spoiled(SftBatches):
    """Batches of which some are replaced by broken ones, at steps counted from 1."""

    broken = (2, 3, 5, 6, 7)

    def iterate_epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """One step an epoch."""
        rows = make_examples(2, (0, 1)) if epoch + 1 in self.broken else self.examples
        yield self.cut(rows)


def test_three_broken_steps_in_a_row_end_the_run_with_what_was_learned_before_on_disk(
    folder: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(folder, training={"max_steps": 9, "save_every": 9, "batch_size": 2})
    model, examples, saved = load(recipe), make_examples(2, ()), list[dict[str, torch.Tensor]]()
    parts = replace(
        make_parts(model, recipe, examples, tmp_path / "run"),
        batches=Spoiled(examples, 2, 2, PAD, None, recipe.seed),
        save_weights=lambda target: saved.append(copy_trainable(model)),
    )
    with pytest.raises(TrainingError, match=r"step 7: 3 step\(s\) in a row .*skipped.jsonl") as caught:
        train(parts)
    assert caught.value.exit_code == 5
    assert len(saved) == 1
    assert_same(model, saved[0])
    assert [row["step"] for row in parts.folder.read_metrics()] == list(range(1, 8))


def test_a_run_of_nothing_but_broken_steps_is_no_finished_run(folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(folder, training={"max_steps": 2, "batch_size": 2})
    parts = make_parts(load(recipe), recipe, make_examples(2, (0, 1)), tmp_path / "run")
    with pytest.raises(TrainingError, match="step 2: "):
        train(parts)


def watch_run(parts: LoopParts, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of a run."""
    logger = logging.getLogger(NAME)
    logger.addHandler(caplog.handler)
    try:
        caplog.clear()
        train(parts)
    finally:
        logger.removeHandler(caplog.handler)
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def freeze_one(model: TorchModel) -> None:
    """A tensor of an adapter is frozen by mistake."""
    next(
        p for name, p in model.network.named_parameters() if "layers.1.self_attn.v_proj.lora_B" in name
    ).requires_grad = False


def add_unused(model: TorchModel) -> None:
    """A tensor that is trained, and that no loss depends on."""
    model.network.register_parameter("forgotten", nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (freeze_one, ["2 tensor(s)", "layers.1.self_attn.v_proj.lora_A", "layers.1.self_attn.v_proj.lora_B"]),
        (add_unused, ["1 tensor(s)", "forgotten"]),
    ],
)
def test_a_tensor_that_never_learns_is_named_while_the_run_is_young(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[TorchModel], None],
    names: list[str],
) -> None:
    recipe = make_recipe(folder, training={"max_steps": 20, "batch_size": 2})
    model = load(recipe)
    spoil(model)
    (said,) = watch_run(make_parts(model, recipe, make_examples(12, ()), tmp_path / "run", watched=True), caplog)
    assert said.startswith("Step 20: ")
    assert all(name in said for name in names)
    assert "have had no gradient in 20 steps" in said


def test_training_without_an_effect_is_said_and_training_with_one_is_not(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate, expected in ((1e-14, ["Step 20: training has no effect yet"]), (1e-6, [])):
        recipe = make_recipe(folder, training={"max_steps": 20, "batch_size": 2, "learning_rate": rate})
        model = load(recipe)
        parts = make_parts(model, recipe, make_examples(12, ()), tmp_path / f"{rate}", watched=True)
        said = watch_run(parts, caplog)
        assert [text[: len(start)] for text, start in zip(said, expected, strict=True)] == expected


def test_a_loss_that_jumps_is_flagged_in_the_log_and_in_the_metrics(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(folder, training={"max_steps": 26, "batch_size": 2})
    model = load(recipe)
    parts = make_parts(model, recipe, make_examples(2, ()), tmp_path / "run")

    head = model.network.get_output_embeddings().weight

    class StruckBatches(SftBatches):
        def iterate_epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
            if epoch == 24:
                with torch.no_grad():
                    head.mul_(-20.0)
            yield from super().iterate_epoch(epoch, start)

    struck = StruckBatches(parts.batches.examples, 2, 2, PAD, None, recipe.seed)
    said = watch_run(replace(parts, batches=struck), caplog)
    spikes = [row["step"] for row in parts.folder.read_metrics() if row.get("spike")]
    assert spikes[0] == 25
    assert said[0].startswith("Step 25: loss ")
    assert "is a spike" in said[0]
    assert said[0].endswith("its rows: rows.jsonl:2, rows.jsonl:1")


def test_a_reference_point_that_is_not_finite_is_not_taken_for_zero() -> None:
    # max(0.0, nan) is 0.0, and so was KTO's reference point.
    tokens = np.ones((1, 2), dtype=np.int64)
    for value in (math.nan, -math.inf, math.inf):
        assert math.isnan(estimate_reference_point(np.array([[value, 0.0]]), np.zeros((1, 2)), tokens))

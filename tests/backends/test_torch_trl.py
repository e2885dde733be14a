"""Engine trl: TRL's trainer takes our steps, leaves our run folder, and refuses what it would do otherwise."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from config.recipe_rules import RecipeRuleError
from config.structured_config import DpoSection, LoraSection, Recipe, TrackingSection, TrainingSection
from utils.backends import check_engine, load_engine, torch_backend
from utils.backends.torch_model import TorchModel
from utils.batching import pad_rows
from utils.checkpoint import NOT_PUBLISHED
from utils.exceptions import MachineError, RecipeError, TrainingError
from utils.methods.pairs import join_pair
from utils.methods.sft import SftBatches
from utils.model_source import ModelSource
from utils.preflight import plan_run
from utils.run_folder import RunFolder
from utils.seed_manager import SeedManager
from utils.stop_signals import Interrupted, SignalExit
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_utils import EncodedExample
from utils.tracking import Tracker
from utils.training_loop import HeldOut, LoopParts, TrainingState
from utils.training_loop import train as train_with_our_loop

pytestmark = pytest.mark.slow
PAD = 2
LENGTHS = [(40, 30), (12, 2), (25, 24), (7, 3), (33, 1), (18, 9), (50, 20), (9, 8), (21, 20), (14, 5), (30, 7)]


def make_values(folder: Path | str, **sections: dict[str, Any] | None) -> dict[str, Any]:
    """A recipe for a model folder: 11 rows in steps of 4, in micro-batches of 3, so that steps and epochs end raggedly."""
    values: dict[str, Any] = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"train": "unused"},
        "lora": {"r": 4, "alpha": 8.0},
        "training": {"method": "sft", "batch_size": 4, "micro_batch_size": 3, "max_steps": 6, "learning_rate": 1e-2},
    }
    for name, given in sections.items():
        values[name] = None if given is None else {**(values.get(name) or {}), **given}
    return values


def make_examples() -> list[EncodedExample]:
    """Random examples of uneven length, with the learned tokens at their end."""
    random = np.random.default_rng(0)
    return [
        EncodedExample(random.integers(5, 300, length), np.arange(length) >= length - learned, f"rows:{index}")
        for index, (length, learned) in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with 300 tokens only: TRL scores all of them at every position."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.vocab_size = 300
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_pairs(model: TorchModel) -> list[EncodedExample]:
    """Random pairs of uneven length with the model's own log-probabilities; a token behind each answer is not learned."""
    random = np.random.default_rng(1)
    pairs = []
    for index, (length, learned) in enumerate(LENGTHS):
        prompt = random.integers(5, 300, length)
        sides = []
        for count in (learned, int(random.integers(2, 20))):
            ids = np.concatenate([prompt, random.integers(5, 300, count + 1)])
            mask = (np.arange(len(ids)) >= length) & (np.arange(len(ids)) < length + count)
            sides.append(EncodedExample(ids, mask, f"rows:{index}"))
        pair = join_pair(*sides)
        assert pair is not None
        chosen, rejected = torch_backend.score_pairs(model, [pad_rows([pair], PAD)])[0].tolist()
        pairs.append(replace(pair, reference=(chosen, rejected)))
    return pairs


@dataclass
class Outcome:
    """What a run left behind."""

    state: TrainingState
    folder: RunFolder
    model: TorchModel
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl that are steps."""
        return [row for row in self.folder.read_metrics() if "loss" in row]


def prepare(values: dict[str, Any], folder: Path, evaluate: Callable[[], HeldOut] | None = None) -> tuple[Any, ...]:
    """Model, recipe, tokenizer and loop parts of a run, as training_run.py wires them."""
    recipe = Recipe(**values)
    SeedManager(recipe.seed).seed_everything()
    source = ModelSource(recipe.model.name, Path(recipe.model.name), {})
    model = torch_backend.attach_lora(torch_backend.load_model(source, recipe), recipe)
    examples, training = make_pairs(model) if recipe.training.learns_pairs else make_examples(), recipe.training
    assert isinstance(training.micro_batch_size, int)
    folder.mkdir()
    parts = LoopParts(
        step=torch_backend.make_step(model, recipe),
        batches=SftBatches(examples, training.batch_size, training.micro_batch_size, PAD, None, recipe.seed),
        plan=plan_run(recipe, len(examples)),
        training=training,
        evaluate=evaluate,
        save_weights=lambda target: torch_backend.save_weights(model, target),
        folder=RunFolder(folder),
        tracker=Tracker(TrackingSection(), folder, {}),
    )
    return model, recipe, load_tokenizer(source.folder), parts


def run(values: dict[str, Any], folder: Path, engine: str, evaluate: Callable[[], HeldOut] | None = None) -> Outcome:
    """Trains on one of the engines."""
    model, recipe, tokenizer, parts = prepare(values, folder, evaluate)
    state = load_engine("trl")(model, recipe, tokenizer, parts) if engine == "trl" else train_with_our_loop(parts)
    weights = {name: p.detach().clone() for name, p in model.network.named_parameters() if p.requires_grad}
    return Outcome(state, parts.folder, model, weights)


CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "weight decay, no clipping, linear": {
        "training": {"weight_decay": 0.1, "max_grad_norm": None, "lr_scheduler": "linear", "warmup_ratio": 0.3}
    },
    "tight clipping, one row at a time": {"training": {"max_grad_norm": 0.01, "micro_batch_size": 1}},
    "dropout, rank-stabilised": {"lora": {"dropout": 0.2, "variant": "rslora"}},
    "DoRA, recomputed activations": {"lora": {"variant": "dora"}, "training": {"gradient_checkpointing": True}},
    "Adafactor, LoRA+, WSD": {
        "lora": {"plus_ratio": 4.0},
        "training": {"optimizer": "adafactor", "lr_scheduler": "wsd", "learning_rate": 1e-3},
    },
    "PiSSA, norms trained whole": {
        "lora": {"variant": "pissa", "modules_to_save": ["norm"]},
        "training": {"learning_rate": 1e-3},
    },
    "embedding trained whole, tied to the head": {
        "lora": {"modules_to_save": ["embed_tokens"]},
        "training": {"learning_rate": 1e-3},
    },
    "all weights": {"lora": None, "training": {"learning_rate": 1e-3, "weight_decay": 0.1}},
}


@pytest.mark.parametrize("case", CASES)
def test_trl_takes_the_steps_of_our_loop(case: str, tiny: Path, tmp_path: Path) -> None:
    values = make_values(tiny, **CASES[case])
    ours = run(values, tmp_path / "ours", "tunebook")
    theirs = run(values, tmp_path / "theirs", "trl")
    assert len(ours.steps) == len(theirs.steps) == 6
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert mine.keys() == other.keys()
        for key in ("step", "epoch", "tokens", "supervised_tokens"):
            assert mine[key] == other[key], (key, mine, other)
        for key in ("loss", "learning_rate", "grad_norm"):
            assert other[key] == pytest.approx(mine[key], rel=1e-4), (key, mine, other)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in ours.weights.items():
        torch.testing.assert_close(theirs.weights[name], weight, rtol=1e-2, atol=1e-4)
    assert (theirs.state.step, theirs.state.tokens) == (6, ours.state.tokens)
    assert theirs.state.loss_sum == pytest.approx(ours.state.loss_sum, rel=1e-4)


PAIRS: dict[str, dict[str, Any]] = {
    "precomputed": {"dpo": {"beta": 0.5}},
    "precomputed, all weights": {"lora": None, "training": {"learning_rate": 1e-3}},
    "adapters off, IPO": {"dpo": {"reference": "adapter_off", "loss": "ipo"}},
    "second model, hinge, all weights": {
        "dpo": {"reference": "model", "loss": "hinge"},
        "lora": None,
        "training": {"learning_rate": 1e-3, "gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize("case", PAIRS)
def test_trl_takes_the_steps_of_our_loop_on_pairs(case: str, tiny: Path, tmp_path: Path) -> None:
    values = make_values(tiny, **PAIRS[case])
    values["training"]["method"] = "dpo"
    ours = run(values, tmp_path / "ours", "tunebook")
    theirs = run(values, tmp_path / "theirs", "trl")
    assert len(ours.steps) == len(theirs.steps) == 6
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert mine.keys() == other.keys() >= {"margin", "accuracy", "chosen_reward", "rejected_reward"}
        for key in ("step", "tokens", "supervised_tokens"):
            assert mine[key] == other[key], (key, mine, other)
        for key in ("loss", "learning_rate", "grad_norm"):
            assert other[key] == pytest.approx(mine[key], rel=1e-4), (key, mine, other)
        for key in ("margin", "chosen_reward", "rejected_reward"):
            assert other[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-4), (key, mine, other)
        assert mine["step"] == 1 or other["accuracy"] == pytest.approx(
            mine["accuracy"]
        )  # in the first step every pair is a tie
    assert abs(ours.steps[-1]["margin"]) > 1e-3
    for name, weight in ours.weights.items():
        torch.testing.assert_close(theirs.weights[name], weight, rtol=1e-2, atol=1e-4)
    names = [{str(path.relative_to(o.folder.path)) for path in o.folder.path.rglob("*")} for o in (ours, theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapters", "all weights"])
def test_trl_leaves_the_files_and_settings_of_our_loop(lora: dict[str, Any] | None, tiny: Path, tmp_path: Path) -> None:
    # transformers' trainer rewrites special tokens and use_cache in the model's configuration, which is saved with it.
    values = make_values(tiny, lora=lora, training={"save_every": 2, "max_steps": 5})
    folders = [run(values, tmp_path / engine, engine).folder.path for engine in ("tunebook", "trl")]
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in folders]
    assert names[0] == names[1]
    assert {"checkpoints/step-4", "checkpoints/step-5", "metrics.jsonl"} <= names[1]
    settings = {name for name in names[0] if "step-5/" in name and name.endswith(".json")}
    for name in sorted(settings - {f"checkpoints/step-5/{each}" for each in NOT_PUBLISHED}):
        ours, theirs = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in folders)
        assert ours == theirs, name
    assert not [name for name in names[1] if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_a_signal_ends_trl_after_its_step_and_a_second_one_at_once(tiny: Path, tmp_path: Path) -> None:
    values = make_values(tiny, training={"eval_every": 2})

    def interrupt() -> HeldOut:
        signal.raise_signal(signal.SIGINT)
        return HeldOut(1.0)

    stopped = run(values, tmp_path / "once", "trl", interrupt)
    assert (stopped.state.step, stopped.state.signal_number) == (2, signal.SIGINT)
    assert (stopped.folder.path / "checkpoints" / "step-2" / "adapter_model.safetensors").is_file()

    def interrupt_twice() -> HeldOut:
        with pytest.raises(Interrupted):
            interrupt()
        return interrupt()

    with pytest.raises(SignalExit):
        run(values, tmp_path / "twice", "trl", interrupt_twice)


def test_trl_stops_early_and_keeps_the_best_checkpoint(tiny: Path, tmp_path: Path) -> None:
    values = make_values(
        tiny, training={"eval_every": 1, "early_stopping_patience": 2, "save_every": 1, "keep_checkpoints": 1}
    )
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    done = run(values, tmp_path / "run", "trl", lambda: HeldOut(next(losses)))
    assert (done.state.step, done.state.best_step) == (4, 2)
    assert "no better held-out loss" in str(done.state.stop_reason)
    assert {path.name for path in (done.folder.path / "checkpoints").iterdir()} == {"latest", "step-2", "step-4"}


def test_trl_stops_on_numbers_that_are_not_finite_before_the_weights_change(tiny: Path, tmp_path: Path) -> None:
    # transformers replaces a loss that is not finite by the last good one, and takes the step.
    model, recipe, tokenizer, parts = prepare(make_values(tiny), tmp_path / "run")
    named = dict(model.network.named_parameters())
    broken = next(parameter for name, parameter in named.items() if "lora_B" in name)
    nn.init.constant_(broken, math.inf)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    with pytest.raises(TrainingError, match=r"step 1: a loss or gradient is not finite") as caught:
        load_engine("trl")(model, recipe, tokenizer, parts)
    assert caught.value.problems[0].code == "not-finite"
    assert all(torch.equal(parameter, before[name]) for name, parameter in named.items())


def test_trl_keeps_the_adapters_of_a_quantised_base_in_float32(tiny: Path, tmp_path: Path) -> None:
    # TRL 1.16 rounds them to bfloat16, where an update below a 256th of a weight is lost.
    values = make_values(tiny, model={"quantization": "nf4"}, training={"max_steps": 3})
    ours = run(values, tmp_path / "ours", "tunebook")
    theirs = run(values, tmp_path / "theirs", "trl")
    assert {weight.dtype for weight in theirs.weights.values()} == {torch.float32}
    losses = [[row["loss"] for row in outcome.steps] for outcome in (ours, theirs)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_trl_sends_nothing_to_its_makers(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import base_trainer

    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **facts: sent.append(facts))
    monkeypatch.delenv("CI", raising=False)
    run(make_values(tiny, training={"max_steps": 1}), tmp_path / "run", "trl")
    assert sent == []


def test_a_missing_trl_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MachineError, match=r"recipes/x.yaml:9: engine trl needs the package trl Fix: .*make setup"):
        check_engine("trl", "recipes/x.yaml:9")
    check_engine("tunebook", "recipes/x.yaml:9")


def test_a_model_that_trl_refuses_is_refused_with_its_reason(tiny: Path, tmp_path: Path) -> None:
    # What no rule over the recipe alone can know, such as a head under another name: TRL itself looks at the modules.
    values = make_values(tiny, lora={"target_modules": ["q_proj", "lm_head"]})
    model, recipe, tokenizer, parts = prepare(values, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"TRL cannot train this: .*lm_head"):
        load_engine("trl")(model, recipe, tokenizer, parts)


# Every key of training and lora is decided here: done by TRL as by our loop (the runs above and below compare them), or refused.
HONOURED = {
    *("training.optimizer", "training.small_data", "lora.plus_ratio", "lora.modules_to_save"),
    *("training.method", "training.engine", "training.epochs", "training.max_steps", "training.batch_size"),
    *("training.micro_batch_size", "training.learning_rate", "training.lr_scheduler", "training.warmup_ratio"),
    *("training.weight_decay", "training.max_grad_norm", "training.gradient_checkpointing", "training.eval_every"),
    *("training.save_every", "training.keep_checkpoints", "training.early_stopping_patience"),
    *(
        "dpo.beta",
        "dpo.loss",
        "dpo.reference",
        "training.early_stopping_threshold",
        "lora.r",
        "lora.alpha",
        "lora.dropout",
        "lora.variant",
    ),
}
REFUSED: dict[str, dict[str, Any]] = {
    "training.packing": {"training": {"packing": True, "micro_batch_size": "auto"}},
    "training.neftune_alpha": {"training": {"neftune_alpha": 5.0}},
    "lora.target_modules": {"lora": {"target_modules": ["q_proj", "lm_head"]}},
    "data.added_tokens": {"data": {"added_tokens": ["<sql>"]}},
    "dpo.label_smoothing": {"training": {"method": "dpo"}, "dpo": {"label_smoothing": 0.1}},
}


def test_every_key_is_either_honoured_or_refused_under_trl() -> None:
    keys = {f"training.{name}" for name in TrainingSection.model_fields}
    keys |= {f"lora.{name}" for name in LoraSection.model_fields} | {f"dpo.{name}" for name in DpoSection.model_fields}
    assert keys - HONOURED - set(REFUSED) == set()
    assert not HONOURED & set(REFUSED)


@pytest.mark.parametrize("key", REFUSED)
def test_what_trl_would_do_otherwise_is_refused_with_a_way_out(key: str) -> None:
    Recipe(**make_values("m", **REFUSED[key]))
    values = make_values("m", **REFUSED[key])
    values["training"]["engine"] = "trl"
    with pytest.raises(ValidationError) as caught:
        Recipe(**values)
    cause = caught.value.errors()[0]["ctx"]["error"]
    assert isinstance(cause, RecipeRuleError)
    assert [".".join(violation.path) for violation in cause.violations] == [key]
    assert "TRL" in cause.violations[0].message
    assert "engine: tunebook" in cause.violations[0].fix


def test_pissa_on_pairs_is_refused_under_trl() -> None:
    # For the reference TRL adds a second adapter like the first, and a second PiSSA takes its product out of the base again.
    values = make_values("m", lora={"variant": "pissa"}, training={"method": "dpo"})
    Recipe(**values)
    with pytest.raises(ValidationError, match="second adapter for the reference"):
        Recipe(**make_values("m", lora={"variant": "pissa"}, training={"method": "dpo", "engine": "trl"}))


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_a_copied_reference_on_a_quantised_base_is_refused_under_trl(quantization: str) -> None:
    # TRL would copy the quantised network, and ended with an AttributeError.
    sections = {"lora": {}, "model": {"name": "m", "quantization": quantization}, "dpo": {"reference": "model"}}
    Recipe(**make_values("m", **sections, training={"method": "dpo"}))
    with pytest.raises(ValidationError, match=f"cannot copy {quantization} weights"):
        Recipe(**make_values("m", **sections, training={"method": "dpo", "engine": "trl"}))


@pytest.mark.parametrize("method", ["kto", "orpo"])
def test_methods_that_are_not_run_on_trl_are_refused(method: str) -> None:
    with pytest.raises(ValidationError, match=f"method is {method}"):
        Recipe(**make_values("m", training={"method": method, "engine": "trl"}))


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe on files, for the scripts."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"SELECT {i}"}]}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.25},
        "lora": {"r": 4},
        "training": {"method": "sft", "batch_size": 4, "learning_rate": 1e-2, "max_steps": 3, "eval_every": 3},
        "generation": {"max_new_tokens": 4},
        "evaluation": {"samples": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_run_on_trl_is_a_run_like_any_other(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a script replaces the first entry
    from scripts import evaluate_run, infer, merge, train

    recipe, facts, losses = write_recipe(tmp_path, tiny_llama), {}, {}
    for engine in ("tunebook", "trl"):
        target = tmp_path / engine
        options = ["--recipe", str(recipe), "--run", str(target), "--set", f"training.engine={engine}"]
        assert train.main(options) == 0
        facts[engine] = json.loads((target / "run.json").read_text(encoding="utf-8"))
        losses[engine] = [row.get("loss", row.get("eval_loss")) for row in RunFolder(target).read_metrics()]
    assert facts["trl"].keys() == facts["tunebook"].keys()
    assert (facts["trl"]["status"], facts["trl"]["engine"]) == ("finished", "trl")
    assert facts["trl"]["versions"]["trl"] == "1.16.0"
    for key in ("steps", "tokens", "supervised_tokens", "best_step", "data_hash", "template_hash"):
        assert facts["trl"][key] == facts["tunebook"][key], key
    np.testing.assert_allclose(losses["trl"], losses["tunebook"], rtol=1e-4)
    capsys.readouterr()
    run_option = ["--run", str(tmp_path / "trl")]
    assert not evaluate_run.main(run_option)
    assert (tmp_path / "trl" / "report.json").is_file()
    assert not infer.main([*run_option, "--prompt", "Say 3"])
    assert not merge.main([*run_option, "--out", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors").is_file()

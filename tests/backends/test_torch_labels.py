"""KTO on rows with one labelled answer: TRL's own trainer as the oracle, and a mixture with pairs that depends on nothing it should not."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from config.structured_config import DataSection, Recipe
from tests.backends.test_torch_preference import (
    PAD,
    SHAPES,
    SHARING,
    UNROLLED,
    compute_log_prob,
    differentiate,
    load,
    make_pairs,
    make_recipe,
    save_models,
)
from utils.backends import Backend, torch_backend
from utils.backends.torch_losses import PairTerms, compute_kto_losses, compute_pair_log_probs, compute_token_losses
from utils.backends.torch_preference import PairObjective, score_pairs
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, count_answer_tokens, make_micro_batches, pad_rows, unroll_pairs
from utils.data_formats import read_example
from utils.data_loading import Row
from utils.methods.pairs import encode_pairs, has_answers, mark_answer, split_pair
from utils.methods.preference import (
    MismatchedPairs,
    ReferencedPairs,
    Scorer,
    measure_held_out,
)
from utils.methods.sft import EncodingCounts
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.problem_log import ProblemLog
from utils.run_watch import PreferenceWatch, compute_first_loss
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_utils import TokenizerUtils

# Of each of the pairs of SHAPES what is kept: both answers, the desirable or the undesirable one. The fourth prompt is one token.
KEPT = (None, False, True, False, True)
WEIGHTS = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each architecture."""
    return save_models(tmp_path_factory.mktemp("models"))


def take_apart(pair: EncodedExample, label: bool | None) -> EncodedExample:
    """A pair as a labelled row that has one of its answers; None leaves both."""
    if label is None:
        return pair
    row = mark_answer(split_pair(pair)[0 if label else 1], is_desirable=label)
    assert row is not None
    return row


def make_mixture(kept: tuple[bool | None, ...] = KEPT, seed: int = 0) -> list[EncodedExample]:
    """Pairs and labelled rows."""
    return [take_apart(pair, label) for pair, label in zip(make_pairs(SHAPES, seed), kept, strict=True)]


def add_references(folder: Path, recipe: Recipe, rows: list[EncodedExample]) -> ReferencedPairs:
    """Rows with what the untouched model gives to their own and to mismatched answers."""
    scorer = Scorer(cast(Backend, torch_backend), load(folder, recipe, moved=False), 2, PAD)
    return ReferencedPairs(rows, scorer.score(rows, "Own"), scorer.score(MismatchedPairs(rows), "Mismatched"))


@pytest.mark.parametrize("name", SHARING | UNROLLED)
def test_a_labelled_answer_has_the_log_probability_of_a_plain_row_and_a_missing_one_has_none(
    folders: dict[str, Path],
    name: str,
) -> None:
    model = load(folders[name], make_recipe(folders[name], "kto"))
    rows = make_mixture()
    batch = pad_rows(rows, PAD)
    ours = compute_pair_log_probs(model, batch)
    gradients = torch.autograd.grad(ours.sum(), [p for p in model.network.parameters() if p.requires_grad])
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    for row, found, tokens in zip(rows, ours, count_answer_tokens(batch).tolist(), strict=True):
        for side, value, is_there, count in zip(split_pair(row), found, has_answers(row), tokens, strict=True):
            assert (count > 0) == is_there
            with torch.no_grad():
                expected = compute_log_prob(model.network, side) if is_there else torch.tensor(0.0)
            torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-5)
    assert batch.answers == (3, 3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_labelled_rows_in_a_tree_are_those_in_plain_rows(folders: dict[str, Path], name: str) -> None:
    model = load(folders[name], make_recipe(folders[name], "kto"))
    tree = pad_rows(make_mixture(), PAD)
    plain = unroll_pairs(tree)
    assert len(plain.lengths) == 6  # a missing answer makes no row
    assert plain.lengths.min() > 0
    assert plain.supervised_tokens == tree.supervised_tokens
    torch.testing.assert_close(
        compute_token_losses(model, tree), compute_token_losses(model, plain), rtol=1e-5, atol=1e-5
    )


def test_the_answers_of_another_row_follow_a_prompt_as_many_as_there_are(folders: dict[str, Path]) -> None:
    rows = make_mixture()
    mismatched = MismatchedPairs(rows)
    for index, row in enumerate(rows):
        other = rows[index - 1]
        assert has_answers(mismatched[index]) == has_answers(other)
        (prompt, *_) = [
            side.input_ids[~side.loss_mask]
            for side, there in zip(split_pair(row), has_answers(row), strict=True)
            if there
        ]
        for mixed, own, there in zip(split_pair(mismatched[index]), split_pair(other), has_answers(other), strict=True):
            if there:
                answer = own.input_ids[own.loss_mask]
                # The longest ones have lost the beginning of their prompt, but for its first token.
                expected = np.concatenate([prompt, answer])[1 - len(mixed.input_ids) :]
                np.testing.assert_array_equal(mixed.input_ids[1:], expected)
                assert mixed.input_ids[0] == prompt[0]
                np.testing.assert_array_equal(mixed.input_ids[mixed.loss_mask], answer)


def test_the_reference_point_is_a_mean_over_the_mismatched_answers_that_there_are(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto", **WEIGHTS)
    rows = add_references(folder, recipe, make_mixture(seed=3))
    model = load(folder, recipe)
    objective = TorchTrainStep(model, recipe).objective
    assert isinstance(objective, PairObjective)
    objective.prepare(make_micro_batches(rows, 2, PAD))
    ratios = []
    with torch.no_grad():
        for row in rows:
            assert row.mismatched is not None
            assert row.mismatched.reference is not None
            for side, there, known in zip(
                split_pair(row.mismatched), has_answers(row.mismatched), row.mismatched.reference, strict=True
            ):
                if there:
                    ratios.append(float(compute_log_prob(model.network, side)) - known)
    assert len(ratios) == 6
    assert objective.reference_point == pytest.approx(max(0.0, sum(ratios) / 6), abs=1e-5)


LABELLED = [
    {"prompt": "What is two and two?", "completion": " It is four.", "label": True},
    {"prompt": "Name a colour:", "completion": " Seven", "label": False},
    {"prompt": "Who wrote Emma?", "completion": " Jane Austen wrote it, in 1815.", "label": True},
    {"prompt": "Say hello.", "completion": " No.", "label": False},
    {"prompt": "Count to three.", "completion": " One, two, three.", "label": True},
    {"prompt": "The capital of France is", "completion": " Paris", "label": True},
    {"prompt": "Write a long word, please.", "completion": " Word", "label": False},
]


@pytest.fixture(scope="module")
def moved_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with the same tokenizer and other weights."""
    folder = tmp_path_factory.mktemp("moved") / "model"
    shutil.copytree(tiny_llama, folder)
    network = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return folder


def run_trl(
    rows: list[dict[str, Any]], base: Path, trained: Path, output: Path
) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss, gradients and reference point of TRL 1.16's own KTOTrainer, on the rows as text, in one batch."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    networks = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (trained, base)]
    settings = KTOConfig(
        output_dir=str(output),
        per_device_train_batch_size=len(rows),
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        **WEIGHTS,
    )
    trainer = KTOTrainer(
        networks[0],
        networks[1],
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
    )
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in networks[0].named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, trainer._metrics["train"]["kl"][-1]


@pytest.mark.parametrize("labels", ["as they are", "all desirable"])
@pytest.mark.parametrize("is_clamped", [False, True])
def test_loss_and_gradients_of_labelled_rows_are_those_of_trl(
    tiny_llama: Path, moved_llama: Path, tmp_path: Path, labels: str, is_clamped: bool
) -> None:
    # TRL mismatches the answers of one micro-batch by the one before (the paper takes the next), clamps its mean at 0 and
    # averages over the micro-batch: with the whole set in one micro-batch both do the same, from the rows' text on.
    fields = [{**row, "label": True} if labels == "all desirable" else row for row in LABELLED]
    # The moved model finds these answers less likely than the tiny one does, so the estimate of one is below 0.
    untouched, trained = (tiny_llama, moved_llama) if is_clamped else (moved_llama, tiny_llama)
    expected, gradients, point = run_trl(fields, untouched, trained, tmp_path)
    assert (point == 0.0) == is_clamped
    tokenizer = TokenizerUtils(load_tokenizer(tiny_llama), template="raw", strategy="standard", loss_on="last")
    problems = ProblemLog()
    examples = [read_example(Row(row, f"rows.jsonl:{line}"), "auto") for line, row in enumerate(fields, start=1)]
    rows = encode_pairs(examples, tokenizer, DataSection(train="unused"), EncodingCounts(), problems)
    problems.raise_if_any()
    recipe = make_recipe(trained, "kto", with_lora=False, **WEIGHTS)
    base, model = (
        torch_backend.attach_lora(torch_backend.load_model(ModelSource("x", folder, {}), recipe), recipe)
        for folder in (untouched, trained)
    )
    scorer = Scorer(cast(Backend, torch_backend), base, 3, PAD)
    known = ReferencedPairs(rows, scorer.score(rows, "Own"), scorer.score(MismatchedPairs(rows), "Mismatched"))
    for size in (7, 2):
        batches = make_micro_batches(list(known), size, PAD)
        loss, ours = differentiate(model, recipe, batches)
        objective = TorchTrainStep(model, recipe).objective
        assert isinstance(objective, PairObjective)
        objective.prepare(batches)
        assert objective.reference_point == pytest.approx(point, abs=1e-4)
        assert loss == pytest.approx(expected, abs=1e-5)
        assert set(gradients) <= set(ours)
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


def test_a_pair_is_worth_as_much_as_its_two_answers_in_rows_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-20 * torch.rand(4, 2, generator=generator).double() for _ in range(2))
    tokens = torch.randint(1, 9, (4, 2), generator=generator).double()
    kto = make_recipe("x", "kto", **WEIGHTS).kto
    assert kto is not None
    together = compute_kto_losses(PairTerms(policy, tokens, reference), kto, 0.3)
    single = torch.zeros(2, 4, 2).double()
    single[0, :, 0], single[1, :, 1] = 1, 1
    apart = [compute_kto_losses(PairTerms(policy * one, tokens * one, reference * one), kto, 0.3) for one in single]
    torch.testing.assert_close(apart[0] + apart[1], together)
    assert all(float(side.min()) > 0 for side in apart)


@pytest.mark.parametrize(("micro_batch_size", "workers"), [(1, 1), (2, 1), (3, 2), (1, 2)])
def test_a_step_of_pairs_and_labelled_rows_does_not_depend_on_how_it_is_cut(
    folders: dict[str, Path],
    micro_batch_size: int,
    workers: int,
) -> None:
    # With means over micro-batches an answer that stands in a small one would weigh more.
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto", **WEIGHTS)
    rows = list(add_references(folder, recipe, make_mixture()))
    whole = differentiate(load(folder, recipe), recipe, [pad_rows(rows, PAD)])
    batches = make_micro_batches(rows, micro_batch_size, PAD)
    cut = differentiate(load(folder, recipe, workers=workers), recipe, batches)
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    for name, gradient in whole[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(cut[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_is_a_mean_over_answers_and_rewards_over_those_that_there_are(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto", **WEIGHTS)
    rows = list(add_references(folder, recipe, make_mixture()))
    model = load(folder, recipe)
    step = TorchTrainStep(model, recipe)
    batches = make_micro_batches(rows, 2, PAD)
    result = step.step(batches, 0.0)
    assert isinstance(step.objective, PairObjective)
    point, beta = step.objective.reference_point, WEIGHTS["beta"]
    ratios: tuple[list[float], list[float]] = ([], [])
    for row, scores in zip(rows, score_pairs(model, [pad_rows([row], PAD) for row in rows]), strict=True):
        assert row.reference is not None
        for side, there, score, known in zip(ratios, has_answers(row), scores, row.reference, strict=True):
            if there:
                side.append(float(score) - known)
    good, bad = ratios
    losses = [1.5 / (1 + math.exp(beta * (ratio - point))) for ratio in good]
    losses += [0.7 / (1 + math.exp(beta * (point - ratio))) for ratio in bad]
    assert (len(good), len(bad)) == result.answers == (3, 3)
    assert (result.pairs, result.terms) == (6, 6)
    assert result.loss == pytest.approx(sum(losses) / 6, rel=1e-5)
    chosen, rejected = beta * sum(good) / 3, beta * sum(bad) / 3
    first, second = rows[0].reference or (0.0, 0.0)
    own = score_pairs(model, [pad_rows([rows[0]], PAD)])[0]
    right = [own[0] - first > own[1] - second, *(ratio > 0 for ratio in good[1:]), *(ratio < 0 for ratio in bad[1:])]
    assert result.numbers == pytest.approx(
        {"margin": chosen - rejected, "accuracy": sum(right) / 5, "chosen_reward": chosen, "rejected_reward": rejected},
        rel=1e-4,
        abs=1e-6,
    )
    assert result.tokens == sum(len(row.input_ids) for row in rows)
    assert result.supervised_tokens == sum(row.supervised_tokens for row in rows)


@pytest.mark.parametrize("label", [True, False])
def test_a_step_whose_labels_are_all_the_same_has_numbers_for_what_it_holds(
    folders: dict[str, Path], label: bool
) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto")
    rows = add_references(folder, recipe, make_mixture((label,) * 5))
    result = TorchTrainStep(load(folder, recipe), recipe).step(make_micro_batches(rows, 2, PAD), 1e-3)
    assert set(result.numbers) == {"accuracy", "chosen_reward" if label else "rejected_reward"}
    assert all(math.isfinite(value) for value in (result.loss, result.gradient_norm, *result.numbers.values()))
    assert result.answers == ((5, 0) if label else (0, 5))


@pytest.mark.parametrize("kept", [KEPT, (True, True, False, True, True), (False,) * 5])
def test_the_held_out_loss_is_that_of_a_step(folders: dict[str, Path], kept: tuple[bool | None, ...]) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto", **WEIGHTS)
    rows = add_references(folder, recipe, make_mixture(kept))
    model = load(folder, recipe)
    measured = measure_held_out(recipe, Scorer(cast(Backend, torch_backend), model, 2, PAD), rows)
    result = TorchTrainStep(model, recipe).step([pad_rows(list(rows), PAD)], 0.0)
    assert measured.pop("loss") == pytest.approx(result.loss, rel=1e-5)
    assert measured == pytest.approx(result.numbers, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kept", [KEPT, (True, True, False, True, True), (False,) * 5])
def test_the_first_loss_depends_on_the_labels_of_the_step_and_a_wrong_reference_is_said(
    folders: dict[str, Path],
    kept: tuple[bool | None, ...],
) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto", **WEIGHTS)
    rows = list(add_references(folder, recipe, make_mixture(kept)))
    fresh, moved = (
        TorchTrainStep(load(folder, recipe, moved=moved), recipe).step([pad_rows(rows, PAD)], 0.0)
        for moved in (False, True)
    )
    good = sum(label is not False for label in kept)
    bad = sum(label is not True for label in kept)
    expected = (1.5 * good + 0.7 * bad) / (2 * (good + bad))
    assert fresh.loss == pytest.approx(expected, abs=1e-6)
    assert compute_first_loss(recipe, fresh.answers) == pytest.approx(expected)
    assert PreferenceWatch(recipe, "float32").find_warning(1, fresh) is None
    assert "the reference is another one" in (PreferenceWatch(recipe, "float32").find_warning(1, moved) or "")


def test_answers_of_one_label_that_never_move_are_said_and_those_that_move_are_not(folders: dict[str, Path]) -> None:
    recipe = make_recipe("x", "kto")
    rows = add_references(folders["llama"], recipe, make_mixture((False,) * 5))
    step = TorchTrainStep(load(folders["llama"], recipe, moved=False), recipe)
    for rate, said in ((0.0, 1), (5e-3, 0)):
        watch = PreferenceWatch(recipe, "float32")
        found = [watch.find_warning(number, step.step([pad_rows(list(rows), PAD)], rate)) for number in range(1, 21)]
        assert sum("nothing is learned yet" in (text or "") for text in found) == said


def test_training_raises_desirable_answers_and_lowers_undesirable_ones(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto")
    rows = list(add_references(folder, recipe, make_mixture()))
    model = load(folder, recipe, moved=False)
    batches: list[Batch] = make_micro_batches(rows, 2, PAD)
    alone = [pad_rows([row], PAD) for row in rows]
    before = score_pairs(model, alone)
    step = TorchTrainStep(model, recipe)
    results = [step.step(batches, 5e-3) for _ in range(25)]
    gains = score_pairs(model, alone) - before
    there = np.array([has_answers(row) for row in rows])
    assert results[-1].loss < results[0].loss
    assert (gains[there[:, 0], 0] > 0).all()
    assert (gains[there[:, 1], 1] < 0).all()
    assert results[-1].numbers["accuracy"] == 1.0
    assert (gains[~there] == 0).all()

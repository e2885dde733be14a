"""Learning from pairs on torch, against its oracles: transformers' logits, TRL's losses, and the same pairs as plain rows."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from config.structured_config import Recipe
from utils.backends import Backend, MachineFacts, PairScores, StepResult, torch_backend
from utils.backends.torch_losses import (
    TREE_MODELS,
    PairTerms,
    build_tree_mask,
    compute_hinge_losses,
    compute_ipo_losses,
    compute_kto_losses,
    compute_orpo_losses,
    compute_pair_log_probs,
    compute_sigmoid_losses,
    log_one_minus_exp,
    shares_prompts,
)
from utils.backends.torch_model import TorchModel
from utils.backends.torch_preference import compute_pair_losses, estimate_reference_point, score_pairs
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, count_answer_tokens, make_micro_batches, pad_rows, unroll_pairs
from utils.exceptions import TrainingError
from utils.methods.pairs import join_pair, mismatch_pair, split_pair
from utils.methods.preference import ReferenceCache, Scorer
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.run_watch import PreferenceWatch

PAD, VOCABULARY = 2, 300
LN_2 = math.log(2)
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SHAPE: dict[str, Any] = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SHARING: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "phi": PhiConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "phi3": Phi3Config(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
}
UNROLLED: dict[str, PreTrainedConfig] = {
    "gemma3_text": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=8),
    "phi3 with a window": Phi3Config(**SHAPE, sliding_window=8),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each architecture."""
    return save_models(tmp_path_factory.mktemp("models"))


def save_models(root: Path) -> dict[str, Path]:
    """Writes a tiny random model of each architecture."""
    for name, config in (SHARING | UNROLLED).items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in SHARING | UNROLLED}


def make_recipe(folder: Path | str, method: str = "dpo", *, with_lora: bool = True, **section: Any) -> Recipe:
    """A recipe for pairs in float32, so that comparisons can be exact."""
    return Recipe(
        model={"name": str(folder), "dtype": "float32"},
        data={"train": "unused"},
        lora={"r": 4, "alpha": 8} if with_lora else None,
        training={"method": method},
        **{method: section},
    )


@functools.cache
def open_base(folder: Path) -> TorchModel:
    """The untouched model, loaded once: each load measures the machine."""
    return torch_backend.load_model(ModelSource(str(folder), folder, {}), make_recipe(folder))


def load(folder: Path, recipe: Recipe, *, workers: int = 1, moved: bool = True) -> TorchModel:
    """A model with fresh adapters; `moved` makes it differ from its base, as after some training."""
    base = open_base(folder)
    torch.manual_seed(1)
    model = torch_backend.attach_lora(replace(base, network=copy.deepcopy(base.network)), recipe)
    for name, parameter in model.network.named_parameters():
        if moved and "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return replace(model, plan=replace(model.plan, workers=workers))


def make_pairs(shapes: list[tuple[int, int, int]], seed: int = 0) -> list[EncodedExample]:
    """Random pairs of (prompt, chosen, rejected) tokens."""
    random = np.random.default_rng(seed)
    pairs = []
    for number, (prompt, *answers) in enumerate(shapes):
        asked = random.integers(5, VOCABULARY, prompt)
        sides = [
            EncodedExample(
                np.concatenate([asked, random.integers(5, VOCABULARY, length)]),
                np.arange(prompt + length) >= prompt,
                f"rows:{number}",
            )
            for length in answers
        ]
        pair = join_pair(*sides)
        assert pair is not None
        pairs.append(pair)
    return pairs


SHAPES = [(12, 5, 9), (3, 14, 2), (20, 1, 1), (1, 6, 4), (8, 3, 11)]


def add_reference(folder: Path, recipe: Recipe, pairs: list[EncodedExample]) -> list[EncodedExample]:
    """Pairs with the log-probabilities of the untouched model, and mismatched answers with theirs for KTO."""
    model = load(folder, recipe, moved=False)

    def score(examples: list[EncodedExample]) -> list[EncodedExample]:
        scores = score_pairs(model, [pad_rows([example], PAD) for example in examples])
        return [replace(e, reference=tuple(row)) for e, row in zip(examples, scores.tolist(), strict=True)]

    mismatched = score([mismatch_pair(pair, pairs[index - 1], 999) for index, pair in enumerate(pairs)])
    known = score(pairs)
    if recipe.kto is None:
        return known
    return [replace(pair, mismatched=other) for pair, other in zip(known, mismatched, strict=True)]


def differentiate(model: TorchModel, recipe: Recipe, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, before clipping and update."""
    step = TorchTrainStep(model, recipe)
    prepared = step.objective.prepare(batches)
    model.network.train()
    loss = step._accumulate(prepared, step.objective.count(prepared))
    named = {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad()
    return loss, named


def compute_log_prob(network: Any, conversation: EncodedExample) -> torch.Tensor:
    """Log-probability of the learned tokens of one plain row, straight from transformers' logits."""
    ids = torch.from_numpy(conversation.input_ids)[None]
    log_probs = network(input_ids=ids).logits[0, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, ids[0, 1:, None])[:, 0]
    return picked[torch.from_numpy(conversation.loss_mask[1:])].sum()


@pytest.mark.parametrize("name", SHARING | UNROLLED)
def test_log_probabilities_are_those_of_transformers_logits_on_plain_rows(folders: dict[str, Path], name: str) -> None:
    recipe = make_recipe(folders[name])
    model = load(folders[name], recipe)
    pairs = make_pairs(SHAPES)
    with torch.no_grad():
        ours = compute_pair_log_probs(model, pad_rows(pairs, PAD))
        theirs = [[compute_log_prob(model.network, side) for side in split_pair(pair)] for pair in pairs]
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-5)


def test_every_architecture_that_shares_prompts_is_proven_here() -> None:
    assert set(SHARING) == set(TREE_MODELS)


def test_scores_return_in_the_order_of_the_pairs_whatever_shares_a_forward_pass(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], make_recipe(folders["llama"]))
    pairs = make_pairs(SHAPES)
    alone = score_pairs(model, [pad_rows([pair], PAD) for pair in pairs])
    for batch_size in (1, 2, 5):
        scorer = Scorer(cast(Backend, torch_backend), model, batch_size, PAD)
        np.testing.assert_allclose(scorer.score(pairs, "Scores"), alone, rtol=1e-5)


def test_a_cache_that_is_emptied_while_the_reference_is_computed_loses_no_minutes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Scoring took two minutes, and then the folder for its result was gone.
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path))
    recipe = make_recipe(folders["llama"])
    pairs = make_pairs(SHAPES)

    class EmptyingScorer(Scorer):
        def score(self, pairs: Any, title: str) -> Any:
            shutil.rmtree(tmp_path / "tokens")
            return super().score(pairs, title)

    model = load(folders["llama"], recipe)
    source = ModelSource(str(folders["llama"]), folders["llama"], {})
    cache = ReferenceCache(source, recipe, "rows", MachineFacts("cpu", "a cpu", "float32", 1, 512, 1, ()))
    kept = cache.open(EmptyingScorer(cast(Backend, torch_backend), model, 2, PAD), pairs, "training")
    expected = score_pairs(model, make_micro_batches(pairs, 1, PAD))
    np.testing.assert_allclose(np.sort(kept.ravel()), np.sort(expected.ravel()), rtol=1e-5)


def test_an_answer_without_a_finite_log_probability_is_refused_with_its_row(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], make_recipe(folders["llama"]))
    with torch.no_grad():
        next(p for name, p in model.network.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"rows:0.*not finite"):
        Scorer(cast(Backend, torch_backend), model, 2, PAD).score(make_pairs(SHAPES), "Scores")


def pad(model: TorchModel) -> TorchModel:
    """The model as accelerators run it: rows with padding, and transformers' own attention."""
    network: Any = model.network
    network.get_base_model().set_attn_implementation("sdpa")
    return replace(model, runs_flat=False)


@pytest.mark.parametrize(
    ("name", "is_flat"), [*((name, False) for name in SHARING), *((name, True) for name in (*SHARING, *UNROLLED))]
)
def test_a_shared_prompt_gives_the_log_probabilities_and_gradients_of_two_plain_rows(
    folders: dict[str, Path], name: str, is_flat: bool
) -> None:
    recipe = make_recipe(folders[name])
    model = load(folders[name], recipe)
    if not is_flat:
        model = pad(model)
        assert shares_prompts(model.network)
    tree = pad_rows(make_pairs(SHAPES), PAD)
    rows = unroll_pairs(tree)
    assert tree.tokens < rows.tokens
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, 2 * len(SHAPES)).view(-1, 2)

    shared = compute_pair_log_probs(model, tree)
    losses = torch_backend.compute_token_losses(replace(model, runs_flat=False), rows)
    plain = -torch.stack([part.sum() for part in losses.split(rows.loss_mask.sum(axis=1).tolist())]).view(-1, 2)
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((each * weights).sum(), parameters) for each in (shared, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNROLLED)
def test_a_model_with_a_window_sees_two_plain_rows(folders: dict[str, Path], name: str) -> None:
    # Windows of 8 tokens count columns: in a shared row the rejected answer would see less of its prompt.
    model = pad(load(folders[name], make_recipe(folders[name])))
    assert not shares_prompts(model.network)
    lengths = []
    handle = model.network.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: lengths.append(tuple(inputs[0].shape))
    )
    (pair,) = make_pairs([(12, 5, 9)])
    compute_pair_log_probs(model, pad_rows([pair], PAD))
    handle.remove()
    assert lengths == [(2, 21)]


def test_a_token_sees_the_prompt_and_its_own_answer_only() -> None:
    segments = torch.tensor([[0, 1, 1, 2, 2, -1]], dtype=torch.int8)
    mask = build_tree_mask(segments)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]


def test_changing_one_answer_moves_no_log_probability_of_the_other(folders: dict[str, Path]) -> None:
    recipe = make_recipe(folders["llama"])
    model = load(folders["llama"], recipe)
    (pair,) = make_pairs([(10, 6, 6)])
    assert pair.branch_starts is not None
    scores = []
    for side in (1, 2):
        ids = pair.input_ids.copy()
        ids[(pair.branch_starts[0] if side == 1 else pair.branch_starts[1]) + 2] += 1
        scores.append(score_pairs(model, [pad_rows([replace(pair, input_ids=ids)], PAD)])[0])
    before = score_pairs(model, [pad_rows([pair], PAD)])[0]
    assert [scores[0][0] != before[0], scores[0][1] == before[1]] == [True, True]
    assert [scores[1][0] == before[0], scores[1][1] != before[1]] == [True, True]


def make_terms(seed: int = 0) -> PairTerms:
    """Log-probabilities of eight pairs as a trained model and its reference might give them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, (8, 2), generator=generator).double()
    policy = (-3 * torch.rand(8, 2, generator=generator).double() * tokens).requires_grad_()
    return PairTerms(policy, tokens, policy.detach() + torch.randn(8, 2, generator=generator).double())


class Outputs(dict[str, Any]):
    """What TRL's fused head returns: token log-probabilities."""

    __getattr__ = dict.__getitem__


class GivenModel:
    """Stands where TRL's trainers expect a model and returns given log-probabilities: the formula is all that is compared."""

    training = True

    def __init__(self, terms: PairTerms) -> None:
        """Spreads the log-probability of each answer evenly over its tokens, one answer a row, the chosen ones first."""
        counts = terms.tokens.T.reshape(-1, 1)
        positions = torch.arange(int(counts.max()) + 1)
        self.completion_mask = ((positions >= 1) & (positions <= counts)).long()
        self.log_probs = (terms.policy.T.reshape(-1, 1) / counts) * self.completion_mask[:, 1:]

    def __call__(self, **inputs: Any) -> Outputs:
        zeros = torch.zeros_like(self.log_probs)
        return Outputs(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def make_trainer(model: GivenModel, **settings: Any) -> Any:
    """What the loss functions of TRL's trainers read of their trainer."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    return SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def run_trl_dpo(terms: PairTerms, loss_type: str, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """TRL 1.16's own `DPOTrainer._compute_loss`."""
    from trl import DPOTrainer

    assert terms.reference is not None
    model = GivenModel(terms)
    trainer = make_trainer(
        model,
        beta=beta,
        label_smoothing=label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros_like(model.completion_mask),
        "attention_mask": torch.ones_like(model.completion_mask),
        "completion_mask": model.completion_mask,
        "ref_chosen_logps": terms.reference[:, 0],
        "ref_rejected_logps": terms.reference[:, 1],
    }
    loss: torch.Tensor = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss


def run_trl_kto(terms: PairTerms, divergences: torch.Tensor, **settings: Any) -> torch.Tensor:
    """TRL 1.16's own `KTOTrainer._compute_loss`.

    Args:
        divergences: log-ratio of each mismatched answer, before TRL's mean and clamp.
    """
    from trl import KTOTrainer

    assert terms.reference is not None
    model = GivenModel(terms)
    trainer = make_trainer(
        model,
        loss_type="kto",
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: divergences + batch["ref_KL_logps"],
        **settings,
    )
    pairs = len(terms.policy)
    inputs = {
        "input_ids": torch.zeros_like(model.completion_mask),
        "attention_mask": torch.ones_like(model.completion_mask),
        "completion_mask": model.completion_mask,
        "label": torch.arange(2 * pairs) < pairs,
        "ref_logps": terms.reference.T.reshape(-1),
        "ref_KL_logps": torch.full_like(divergences, -7.0),
    }
    loss: torch.Tensor = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("loss", "function"),
    [("sigmoid", compute_sigmoid_losses), ("ipo", compute_ipo_losses), ("hinge", compute_hinge_losses)],
)
def test_dpo_losses_and_their_gradients_equal_those_of_trl(loss: str, function: Any, beta: float) -> None:
    terms = make_terms()
    section = make_recipe("x", loss=loss, beta=beta).dpo
    ours = function(terms, section).mean()
    theirs = run_trl_dpo(terms, loss, beta)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    gradients = [torch.autograd.grad(each, terms.policy)[0] for each in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_label_smoothing_is_a_mixture_of_both_directions() -> None:
    terms = make_terms()
    assert terms.reference is not None
    swapped = PairTerms(terms.policy.flip(1), terms.tokens.flip(1), terms.reference.flip(1))
    smooth, plain = (make_recipe("x", label_smoothing=share).dpo for share in (0.2, 0.0))
    assert smooth is not None
    assert plain is not None
    expected = 0.8 * compute_sigmoid_losses(terms, plain) + 0.2 * compute_sigmoid_losses(swapped, plain)
    torch.testing.assert_close(compute_sigmoid_losses(terms, smooth), expected)
    # TRL's `aot` on one pair is the same formula; on several it sorts, so the oracle is asked pair by pair.
    for row in range(len(terms.policy)):
        one = PairTerms(terms.policy[row : row + 1], terms.tokens[row : row + 1], terms.reference[row : row + 1])
        theirs = run_trl_dpo(one, "aot", 0.1, label_smoothing=0.2)
        torch.testing.assert_close(compute_sigmoid_losses(one, smooth)[0], theirs)


def test_orpo_equals_trls_odds_ratio_beside_the_mean_likelihood() -> None:
    from trl.experimental.orpo import ORPOTrainer

    terms = make_terms()
    means = terms.policy / terms.tokens
    trainer: Any = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    ratios, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])
    orpo = make_recipe("x", "orpo", beta=0.3).orpo
    assert orpo is not None
    ours = compute_orpo_losses(terms, orpo)
    torch.testing.assert_close(ours.float(), (-means[:, 0]).float() - ratios, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(each.sum(), terms.policy, retain_graph=True)[0] for each in (ours, -means[:, 0] - ratios)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [-1e-6, -0.1, -0.6931, -0.6932, -5.0, -80.0])
def test_log_one_minus_exp_is_exact_near_zero_and_far_from_it(value: float) -> None:
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    result = log_one_minus_exp(x)
    expected = math.log(-math.expm1(value))
    assert float(result.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-30)
    result.backward()
    assert x.grad is not None
    assert float(x.grad) == pytest.approx(-math.exp(value) / -math.expm1(value), rel=1e-6)


@pytest.mark.parametrize("shift", [0.9, -5.0])
def test_kto_losses_and_their_gradients_equal_those_of_trl(shift: float) -> None:
    # At -5 the estimated divergence is negative, and both clamp it.
    terms = make_terms()
    kto = make_recipe("x", "kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.7).kto
    assert kto is not None
    divergences = torch.randn(16, generator=torch.Generator().manual_seed(5)).double() + shift
    reference = np.zeros((8, 2))
    point = estimate_reference_point(divergences.view(8, 2).numpy(), reference, np.ones((8, 2), dtype=np.int64))
    ours = compute_kto_losses(terms, kto, point).sum() / 16
    theirs = run_trl_kto(terms, divergences, beta=0.2, desirable_weight=1.5, undesirable_weight=0.7)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    gradients = [torch.autograd.grad(each, terms.policy)[0] for each in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_swapping_chosen_and_rejected_flips_the_sign_of_the_margin(folders: dict[str, Path], method: str) -> None:
    recipe = make_recipe(folders["llama"], method)
    model = load(folders["llama"], recipe)
    pairs = add_reference(folders["llama"], recipe, make_pairs(SHAPES))

    def swap(pair: EncodedExample) -> EncodedExample:
        swapped = join_pair(*reversed(split_pair(pair)))
        assert swapped is not None
        return replace(swapped, reference=pair.reference and pair.reference[::-1], mismatched=pair.mismatched)

    margins = []
    for each in (pairs, [swap(pair) for pair in pairs]):
        step = TorchTrainStep(model, recipe)
        margins.append(step.step([pad_rows(each, PAD)], 0.0).numbers["margin"])
    assert abs(margins[0]) > 1e-4
    assert margins[0] == pytest.approx(-margins[1], rel=1e-4)


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
@pytest.mark.parametrize(("micro_batch_size", "workers"), [(1, 1), (2, 1), (3, 2), (1, 2)])
def test_a_step_does_not_depend_on_how_it_is_cut(
    folders: dict[str, Path], method: str, micro_batch_size: int, workers: int
) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, method)
    pairs = add_reference(folder, recipe, make_pairs(SHAPES))
    whole = differentiate(load(folder, recipe), recipe, [pad_rows(pairs, PAD)])
    cut = differentiate(load(folder, recipe, workers=workers), recipe, make_micro_batches(pairs, micro_batch_size, PAD))
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    for name, gradient in whole[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(cut[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_the_number_of_workers_changes_no_bit(folders: dict[str, Path], method: str) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, method)
    batches = make_micro_batches(add_reference(folder, recipe, make_pairs(SHAPES)), 1, PAD)
    models = [load(folder, recipe, workers=workers) for workers in (1, 2, 2)]
    torch.set_num_threads(1)
    results = [differentiate(model, recipe, batches) for model in models]
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(gradients[name], gradient) for name, gradient in results[0][1].items())


@pytest.mark.parametrize("reference", ["precomputed", "adapter_off", "model"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_first_dpo_loss_is_ln_2_and_margins_move_afterwards(
    folders: dict[str, Path], name: str, reference: str
) -> None:
    # GPT-2 brings a dropout of 0.1: with it, policy and reference would differ from the start.
    recipe = make_recipe(folders[name], reference=reference)
    pairs = make_pairs(SHAPES)
    if reference == "precomputed":
        pairs = add_reference(folders[name], recipe, pairs)
    step = TorchTrainStep(load(folders[name], recipe, workers=2, moved=False), recipe)
    results = [step.step(make_micro_batches(pairs, 2, PAD), 5e-3) for _ in range(8)]
    assert results[0].loss == pytest.approx(LN_2, abs=5e-7)
    assert results[0].numbers["margin"] == pytest.approx(0.0, abs=1e-6)
    assert results[-1].loss < LN_2 - 0.01
    assert results[-1].numbers["margin"] > 0.02
    assert results[-1].numbers["accuracy"] > 0.5
    assert results[-1].pairs == len(pairs)


@pytest.mark.parametrize("reference", ["precomputed", "model"])
def test_full_fine_tuning_starts_at_ln_2_and_keeps_its_reference(folders: dict[str, Path], reference: str) -> None:
    recipe = make_recipe(folders["llama"], with_lora=False, reference=reference)
    pairs = make_pairs(SHAPES)
    if reference == "precomputed":
        pairs = add_reference(folders["llama"], recipe, pairs)
    step = TorchTrainStep(load(folders["llama"], recipe), recipe)
    losses = [step.step([pad_rows(pairs, PAD)], 1e-3).loss for _ in range(4)]
    assert losses[0] == pytest.approx(LN_2, abs=5e-7)
    assert losses[-1] < losses[0] - 0.01


def test_every_way_to_a_reference_gives_the_same_losses(folders: dict[str, Path]) -> None:
    folder = folders["qwen2"]
    losses = []
    for reference in ("precomputed", "adapter_off", "model"):
        recipe = make_recipe(folder, reference=reference)
        pairs = make_pairs(SHAPES)
        if reference == "precomputed":
            pairs = add_reference(folder, recipe, pairs)
        step = TorchTrainStep(load(folder, recipe, moved=False), recipe)
        losses.append([step.step([pad_rows(pairs, PAD)], 5e-3).loss for _ in range(4)])
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], atol=1e-5)


def test_switching_the_adapters_off_for_a_reference_leaves_them_on_and_trainable(folders: dict[str, Path]) -> None:
    recipe = make_recipe(folders["llama"], reference="adapter_off")
    model = load(folders["llama"], recipe)
    trainable = [name for name, p in model.network.named_parameters() if p.requires_grad]
    batch = pad_rows(make_pairs(SHAPES), PAD)
    before = score_pairs(model, [batch])
    step = TorchTrainStep(model, recipe)
    (prepared,) = step.objective.prepare([batch])
    assert [name for name, p in model.network.named_parameters() if p.requires_grad] == trainable
    np.testing.assert_array_equal(score_pairs(model, [batch]), before)
    assert prepared.reference is not None
    untouched = score_pairs(load(folders["llama"], recipe, moved=False), [batch])
    np.testing.assert_allclose(prepared.reference, untouched, atol=1e-5)
    assert np.abs(prepared.reference - before).max() > 1e-2


def test_kto_subtracts_the_reference_point_of_the_whole_step(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, "kto")
    model = load(folder, recipe)
    pairs = add_reference(folder, recipe, make_pairs(SHAPES, seed=3))
    step = TorchTrainStep(model, recipe)
    step.objective.prepare(make_micro_batches(pairs, 2, PAD))
    ratios = []
    with torch.no_grad():
        for index, pair in enumerate(pairs):
            assert pair.mismatched is not None
            prompts = [side.input_ids[~side.loss_mask] for side in split_pair(pair)]
            answers = [side.input_ids[side.loss_mask] for side in split_pair(pairs[index - 1])]
            for prompt, answer, known in zip(prompts, answers, pair.mismatched.reference or (), strict=True):
                ids = np.concatenate([prompt, answer])
                row = EncodedExample(ids, np.arange(len(ids)) >= len(prompt), "x")
                ratios.append(float(compute_log_prob(model.network, row)) - known)
    expected = max(0.0, sum(ratios) / len(ratios))
    assert step.objective.reference_point == pytest.approx(expected, abs=1e-5)  # type: ignore[attr-defined]


def test_a_measured_loss_is_that_of_the_step(folders: dict[str, Path]) -> None:
    for method in ("dpo", "kto", "orpo"):
        recipe = make_recipe(folders["llama"], method)
        model = load(folders["llama"], recipe)
        pairs = add_reference(folders["llama"], recipe, make_pairs(SHAPES))
        batch = pad_rows(pairs, PAD)
        mismatched = batch.mismatched
        scores = PairScores(
            policy=score_pairs(model, [batch]),
            tokens=np.array([(5, 9), (14, 2), (1, 1), (6, 4), (3, 11)]),
            reference=batch.reference,
            mismatched=score_pairs(model, [mismatched]) if mismatched else None,
            mismatched_reference=mismatched.reference if mismatched else None,
            mismatched_tokens=count_answer_tokens(mismatched) if mismatched else None,
        )
        measured = torch_backend.compare_pairs(recipe, scores)
        result = TorchTrainStep(model, recipe).step([batch], 0.0)
        assert measured.pop("loss") == pytest.approx(result.loss, rel=1e-5)
        assert measured == pytest.approx(result.numbers, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "section"),
    [
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.1}),
        ("dpo", {"loss": "hinge"}),
        ("dpo", {"loss": "ipo", "beta": 0.3}),
        ("kto", {"desirable_weight": 1.5}),
    ],
)
def test_a_reference_that_is_another_model_is_said_after_the_first_step(
    folders: dict[str, Path], method: str, section: dict[str, Any]
) -> None:
    recipe = make_recipe(folders["llama"], method, **section)
    pairs = add_reference(folders["llama"], recipe, make_pairs(SHAPES))
    moved = TorchTrainStep(load(folders["llama"], recipe), recipe).step([pad_rows(pairs, PAD)], 0.0)
    fresh = TorchTrainStep(load(folders["llama"], recipe, moved=False), recipe).step([pad_rows(pairs, PAD)], 0.0)
    assert "the reference is another one" in (PreferenceWatch(recipe, "float32").find_warning(1, moved) or "")
    assert PreferenceWatch(recipe, "float32").find_warning(1, fresh) is None


def test_a_quantised_base_may_round_the_first_loss_where_the_rest_is_float32() -> None:
    # int8 products are rounded to 8 bits in a float32 run too, and the run was said to have another reference.
    plain, quantised = make_recipe("x"), make_recipe("x")
    quantised = quantised.model_copy(
        update={"model": quantised.model.model_copy(update={"quantization": "int8"})},
    )
    result = StepResult(0.693065, 0.1, 10, 5, 2, {"margin": 1e-3})
    assert PreferenceWatch(quantised, "float32").find_warning(1, result) is None
    assert PreferenceWatch(plain, "float32").find_warning(1, result) is not None


def test_margins_that_never_move_are_said_after_twenty_steps() -> None:
    recipe = make_recipe("x")
    results = {
        "stuck": StepResult(LN_2, 0.1, 10, 5, 2, {"margin": 1e-7}),
        "learning": StepResult(0.6, 0.1, 10, 5, 2, {"margin": 0.2}),
    }
    for name, result in results.items():
        watch = PreferenceWatch(recipe, "float32")
        said = [watch.find_warning(step, result) for step in range(2, 30)]
        assert [index + 2 for index, text in enumerate(said) if text] == ([21] if name == "stuck" else [])


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_each_method_raises_the_chosen_answer_over_the_rejected_one(folders: dict[str, Path], method: str) -> None:
    folder = folders["llama"]
    recipe = make_recipe(folder, method)
    pairs = add_reference(folder, recipe, make_pairs(SHAPES))
    model = load(folder, recipe, moved=False)
    batches = make_micro_batches(pairs, 2, PAD)
    before = score_pairs(model, batches)
    step = TorchTrainStep(model, recipe)
    losses = [step.step(batches, 5e-3).loss for _ in range(15)]
    after = score_pairs(model, batches)
    gains = (after - before)[:, 0] - (after - before)[:, 1]
    assert losses[-1] < losses[0]
    assert (gains > 0).all()


def test_only_the_losses_of_the_recipes_method_are_computed() -> None:
    terms = make_terms()
    results = [
        compute_pair_losses(make_recipe("x", method, **section), terms, 0.0).detach().mean()
        for method, section in (
            ("dpo", {}),
            ("dpo", {"loss": "ipo"}),
            ("dpo", {"loss": "hinge"}),
            ("kto", {}),
            ("orpo", {}),
        )
    ]
    assert len({round(float(each), 6) for each in results}) == 5

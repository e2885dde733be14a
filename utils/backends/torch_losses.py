"""Batches → losses on torch: one forward pass, the head only where a token is learned; and what methods make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from config.structured_config import DpoSection, KtoSection, OrpoSection, RewardSection
from utils.backends.torch_attention import Sight
from utils.backends.torch_beginning import Beginning, place_flat
from utils.backends.torch_head import compute_losses, find_head
from utils.backends.torch_model import TorchModel
from utils.batching import Batch, count_answer_tokens, unroll_pairs
from utils.flat_batches import flatten

# Architectures that take positions and a mask for each row as they are given (tests/backends/test_torch_preference.py).
TREE_MODELS = ("gpt2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")


@dataclass(frozen=True)
class PairTerms:
    """What every loss over pairs is made of; each has the shape (pairs, 2), the chosen answers first.

    Attributes:
        policy: the trained model's log-probability of an answer, the sum over its tokens, in nats; or the reward that a
            reward model gives it.
        tokens: of the answer; an answer of none is missing, as a labelled row lacks one, and its log-probabilities are 0.
        reference: the reference's log-probability; None where the method needs none.
    """

    policy: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor | None

    @property
    def ratios(self) -> torch.Tensor:
        """log policy / reference of each answer."""
        assert self.reference is not None
        return self.policy - self.reference


def compute_token_losses(model: TorchModel, batch: Batch, beginning: Beginning | None = None) -> torch.Tensor:
    """Negative log-likelihood of every supervised token, in row order.

    The head runs only at the positions whose next token is supervised: with short answers that is most of its cost saved.

    Of a pair these are the tokens of its chosen and then those of its rejected answer; the prompt that they share is computed
    once where the model allows it (`shares_prompts`).

    Args:
        beginning: what every row begins with, if that has been computed already.

    Returns:
        float32 nats, shape (supervised_tokens,).
    """
    if model.runs_flat:
        return compute_flat_losses(model, batch, beginning)
    seen, inputs = place_batch(model, batch)
    loss_mask = torch.from_numpy(seen.loss_mask).to(model.accelerator.device)
    predicts_next = torch.zeros_like(loss_mask)
    predicts_next[:, :-1] = loss_mask[:, 1:]
    logits = model.network(**inputs, logits_to_keep=predicts_next, use_cache=False).logits
    return functional.cross_entropy(logits.float(), inputs["input_ids"][loss_mask], reduction="none")


def compute_flat_losses(model: TorchModel, batch: Batch, beginning: Beginning | None) -> torch.Tensor:
    """What `compute_token_losses` returns, without computing padding, nor twice what the rows begin with together."""
    flat = flatten(batch, beginning.tokens if beginning else 0)
    inputs = place_flat(model, flat, Sight(flat.spans, first=beginning.seen if beginning else None))
    sources, targets = (torch.from_numpy(ids).to(model.accelerator.device) for ids in (flat.sources, flat.targets))
    whole = model.base
    head = find_head(whole)
    if head is None:
        logits = model.network(**inputs, logits_to_keep=sources).logits[0]
        return functional.cross_entropy(logits.float(), targets, reduction="none")
    hidden = whole.base_model(**inputs).last_hidden_state[0, sources]
    return compute_losses(hidden, targets, head)


def place_batch(model: TorchModel, batch: Batch) -> tuple[Batch, dict[str, torch.Tensor]]:
    """A batch on the model's device: tokens, and whatever mask and positions it needs.

    Returns:
        The batch that the model sees, in which pairs may have become plain rows (`unroll_pairs`), and its tensors.
    """
    device = model.accelerator.device
    if batch.segments is not None and not shares_prompts(model.network):
        batch = unroll_pairs(batch)
    inputs = {"input_ids": torch.from_numpy(batch.input_ids).to(device)}
    if batch.segments is not None:
        inputs["attention_mask"] = build_tree_mask(torch.from_numpy(batch.segments).to(device))
    elif batch.attention_mask is not None:
        inputs["attention_mask"] = torch.from_numpy(batch.attention_mask).to(device)
    if batch.position_ids is not None:
        # transformers builds the block-diagonal mask from restarting positions only when no attention mask is passed.
        inputs["position_ids"] = torch.from_numpy(batch.position_ids).to(device)
    return batch, inputs


def shares_prompts(network: nn.Module) -> bool:
    """True where one row can hold a pair: full attention that honours a mask of its own and positions that restart.

    A window counts back over columns, of which the other answer takes some, so such models see two plain rows instead.
    """
    settings = network.config.to_dict()
    layers = set(settings.get("layer_types") or ["full_attention"])
    has_window = settings.get("sliding_window") is not None and settings.get("use_sliding_window", True)
    attention = network.config._attn_implementation
    is_known = settings.get("model_type") in TREE_MODELS and attention == "sdpa"
    return is_known and layers == {"full_attention"} and not has_window


def build_tree_mask(segments: torch.Tensor) -> torch.Tensor:
    """Which tokens see which: those before them in the trunk and in their own branch (arXiv 2410.20305, section 3).

    Args:
        segments: as in `Batch`, shape (rows, length).

    Returns:
        bool, shape (rows, 1, length, length). Padding sees itself, for a row of nothing would have no softmax.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    return torch.tril((key == 0) | (key == query))[:, None]


def compute_pair_log_probs(model: TorchModel, batch: Batch, beginning: Beginning | None = None) -> torch.Tensor:
    """Log-probability of both answers of each pair: the sum over their tokens, in nats, float32, shape (pairs, 2).

    Of an answer that is missing it is 0, without gradient.
    """
    parts = compute_token_losses(model, batch, beginning).split(count_answer_tokens(batch).reshape(-1).tolist())
    return -torch.stack([part.sum() for part in parts]).view(-1, 2)


def compute_sigmoid_losses(pairs: PairTerms, dpo: DpoSection) -> torch.Tensor:
    """DPO: -log sigmoid of the reward margin (arXiv 2305.18290, equation 7), shape (pairs,).

    With label smoothing e, a pair counts with 1 - e as it is and with e the other way round (conservative DPO, Mitchell 2023).
    """
    chosen, rejected = pairs.ratios.unbind(1)
    margin = dpo.beta * (chosen - rejected)
    agree, disagree = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    return -(1 - dpo.label_smoothing) * agree - dpo.label_smoothing * disagree


def compute_hinge_losses(pairs: PairTerms, dpo: DpoSection) -> torch.Tensor:
    """SLiC: what the reward margin lacks to 1 (arXiv 2305.10425, equation 1; with DPO's rewards arXiv 2309.06657), (pairs,)."""
    chosen, rejected = pairs.ratios.unbind(1)
    return functional.relu(1 - dpo.beta * (chosen - rejected))


def compute_ipo_losses(pairs: PairTerms, dpo: DpoSection) -> torch.Tensor:
    """IPO: squared distance of the margin to 1 / (2 beta) (arXiv 2310.12036, equation 17), shape (pairs,).

    Log-ratios are means over an answer's tokens, as the authors confirmed to TRL: sums would punish long answers.
    """
    chosen, rejected = (pairs.ratios / pairs.tokens).unbind(1)
    return (chosen - rejected - 1 / (2 * dpo.beta)).square()


def compute_kto_losses(pairs: PairTerms, kto: KtoSection, reference_point: float) -> torch.Tensor:
    """KTO (arXiv 2402.01306, equation 8), shape (pairs,): the sum over the answers of each row, for a mean over all answers.

    TRL's `KTOTrainer` has the same formula. It averages over each micro-batch, and its micro-batches over the step, so that
    an answer's weight depends on how the step was cut; here it does not.

    Args:
        reference_point: z0, the clamped estimate of the divergence from the reference over the step, without gradient.
    """
    is_there = (pairs.tokens > 0).to(pairs.policy)
    good, bad = (is_there * is_there.new_tensor([kto.desirable_weight, kto.undesirable_weight])).unbind(1)
    chosen, rejected = pairs.ratios.unbind(1)
    gain = 1 - torch.sigmoid(kto.beta * (chosen - reference_point))
    loss = 1 - torch.sigmoid(kto.beta * (reference_point - rejected))
    return good * gain + bad * loss


def compute_orpo_losses(pairs: PairTerms, orpo: OrpoSection) -> torch.Tensor:
    """ORPO: likelihood of the chosen answer plus the odds ratio (arXiv 2403.07691, equations 3 to 7), shape (pairs,).

    Probabilities are those of the geometric mean over an answer's tokens, so that odds of long answers stay finite.
    """
    chosen, rejected = (pairs.policy / pairs.tokens).unbind(1)
    log_odds = (chosen - rejected) - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
    return -chosen - orpo.beta * functional.logsigmoid(log_odds)


def compute_reward_losses(pairs: PairTerms, reward: RewardSection) -> torch.Tensor:
    """A reward model's loss: -log sigmoid of the difference of both rewards (arXiv 2203.02155, equation 1), shape (pairs,).

    With a weight c, c times the squared sum of the two is added (arXiv 2312.09244, equation 2): differences alone would leave
    the level of all rewards open.
    """
    chosen, rejected = pairs.policy.unbind(1)
    return reward.center_coefficient * (chosen + rejected).square() - functional.logsigmoid(chosen - rejected)


def log_one_minus_exp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of -log 2 (Maechler 2012).

    An answer of probability 1 is kept a hair below it: its odds would be infinite.
    """
    values = values.clamp(max=-1e-7)
    near = torch.log(-torch.expm1(values.clamp(min=-1.0)))
    far = torch.log1p(-torch.exp(values))
    return torch.where(values > -0.6931472, near, far)

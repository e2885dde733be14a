"""Many prompts → answers: rows that end leave the batch, and waiting prompts take their places.

A step computes one new token for every running row. Prompts are read in groups, all but their last token, without the head;
that token is the row's input of the next step, so that a new row's first token costs no pass of its own. What all prompts
begin with, such as a system turn or worked examples, is read, kept, and at every step attended to once for all rows. A row sees
nothing else but its own columns, so no row disturbs another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

from config.model_families import PACKING_MODELS
from utils.answer_rows import limit_rows
from utils.backends import GenerationSettings, torch_attention
from utils.backends.torch_attention import KeysValues, RowSight, Sight
from utils.backends.torch_cache import SlotCache
from utils.backends.torch_head import find_head
from utils.backends.torch_model import TorchModel
from utils.backends.torch_sampling import choose_tokens, draw_seed, make_generator, make_processors
from utils.flat_batches import Span
from utils.machine import TOKEN_BUDGETS

# Architectures for which tests/backends/test_torch_decoding.py shows that answers are those of transformers' generate.
# GPT-Neo's local layers count columns back from the last one of the batch, where only the longest row stands here.
SLOT_MODELS = PACKING_MODELS - {"gpt_neo"}
ADMITTED_SHARE = 8  # new prompts come in when an eighth of the rows has ended: a pass over a single prompt is slow
FIRST_ANSWERS = 64  # columns for answers that a cache has at first


@dataclass
class Row:
    """A prompt with its answer so far.

    Attributes:
        index: which prompt it is.
        ids: prompt and answer.
        prompt_length: tokens of the prompt.
        generator: draws its tokens; None takes the likeliest.
    """

    index: int
    ids: list[int]
    prompt_length: int = field(init=False)
    generator: np.random.Generator | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def new(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.prompt_length


def uses_slots(network: nn.Module) -> bool:
    """True if a `Decoder` answers for this network: its architecture is proven, and no position changes with its neighbours."""
    config: Any = network.config
    rope = config.to_dict().get("rope_parameters") or {}
    # These stretch all positions of a batch by its longest row.
    stretches = any(kind in str(rope) for kind in ("'dynamic'", "'longrope'"))
    return config.model_type in SLOT_MODELS and not stretches and find_windows(network) is not None


def find_windows(network: nn.Module) -> dict[str, int | None] | None:
    """Sliding window of each kind of layer, None for full attention; None if the cache holds anything else."""
    config: Any = network.config
    kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    windows = {kind: option.get("sliding_window") for kind, option in zip(kinds, options, strict=True)}
    return windows if windows.keys() <= {"full_attention", "sliding_attention"} else None


def decode(
    model: TorchModel,
    prompts: Mapping[int, list[int]],
    settings: GenerationSettings,
    batch_size: int,
    on_answer: Callable[[int], None],
) -> dict[int, list[int]]:
    """New token ids of each prompt by its number.

    Args:
        prompts: by number, longest first.
    """
    if not prompts:
        return {}
    seed = draw_seed(settings.generation)
    waiting = deque(Row(index, list(ids), make_generator(seed, index)) for index, ids in prompts.items())
    answers: dict[int, list[int]] = {}

    def keep(row: Row) -> None:
        answers[row.index] = row.ids[row.prompt_length :]
        on_answer(row.new)

    with torch_attention.use(model.base) as is_used:
        decoder = Decoder(model, settings, batch_size, list(prompts.values()))
        decoder.read_shared(apart=is_used)
        decoder.answer(waiting, keep)
    return answers


def count_shared(prompts: Sequence[list[int]]) -> int:
    """Tokens that are read once for all prompts: those that all begin with, but for the last token of any."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in the order of a dictionary, these differ first
    differs = (one != other for one, other in zip(first, last, strict=False))
    common = next((index for index, found in enumerate(differs) if found), min(len(first), len(last)))
    return max(0, min(common, min(map(len, prompts)) - 1))


def limit_batch(model: TorchModel, settings: GenerationSettings, batch_size: int, longest: int) -> int:
    """Prompts at once, by the memory that is free (`limit_rows`).

    Args:
        longest: tokens of the longest prompt, without those that all begin with where they are kept once.
    """
    network: Any = model.network
    config, tokens = (
        network.config.get_text_config(decoder=True).to_dict(),
        longest + settings.generation.max_new_tokens,
    )
    return limit_rows(config, batch_size, tokens, model.plan.dtype.itemsize, model.plan.device)


class Decoder:
    """Answers rows from a queue with a cache of its own.

    Args:
        slots: rows at once, or fewer (`limit_batch`).
        prompts: all that are answered.
    """

    def __init__(
        self, model: TorchModel, settings: GenerationSettings, slots: int, prompts: Sequence[list[int]]
    ) -> None:
        self.network = model.base
        self.head = find_head(self.network)
        self.device, self.settings = model.accelerator.device, settings
        self.read_tokens = TOKEN_BUDGETS[model.plan.device]
        self.windows = find_windows(self.network) or {}
        self.processors = make_processors(settings.generation)
        self.names_layers = hasattr(self.network.config.get_text_config(decoder=True), "layer_types")
        layers = self.network.config.get_text_config(decoder=True).num_hidden_layers
        self.shared = prompts[0][: count_shared(prompts)]
        longest = max(map(len, prompts)) - len(self.shared)
        self.slots = min(limit_batch(model, settings, slots, longest), len(prompts))
        most = longest + settings.generation.max_new_tokens
        self.cache = SlotCache(layers, self.slots, longest + FIRST_ANSWERS, most)
        self.seen: dict[nn.Module, KeysValues] = {}
        self.rows: list[Row] = []

    def read_shared(self, *, apart: bool) -> None:
        """Reads what all prompts begin with, once.

        Args:
            apart: whether the network's attention is `torch_attention.attend`. Where it keeps nothing, because the
                architecture does not hand down what it is told, every row reads these columns as if they were its own.
        """
        if self.shared:
            self.cache.read_shared(len(self.shared))
            sight = Sight((Span(0, len(self.shared)),), kept=self.seen)
            self.read([self.shared], 0, **({"sight": sight} if apart else {}))

    def answer(self, waiting: deque[Row], on_answer: Callable[[Row], None]) -> None:
        """Answers all rows of a queue."""
        while True:
            free = self.slots - len(self.rows)
            if waiting and (not self.rows or free * ADMITTED_SHARE >= self.slots):
                self.admit(waiting, free)
            if not self.rows:
                return
            self.step(on_answer)

    def admit(self, waiting: deque[Row], free: int) -> None:
        """Takes rows from the queue into free slots and reads their prompts, group by group."""
        new: list[Row] = []
        while waiting and len(new) < free:
            new.append(waiting.popleft())
        group: list[list[int]] = []
        for row in new:
            unread = row.ids[len(self.shared) : -1]
            longest = max(len(unread), *map(len, group)) if group else len(unread)
            if group and longest * (len(group) + 1) > self.read_tokens:
                self.read_group(group)
                group = []
            group.append(unread)
            self.rows.append(row)
        self.read_group(group)

    def read_group(self, group: Sequence[Sequence[int]]) -> None:
        """Reads the prompts of the newest rows, behind what all begin with and without their last token."""
        if any(group):
            self.cache.read_prompts(len(self.rows) - len(group), len(self.shared) + max(map(len, group)))
            self.read(group, len(self.shared))

    def read(self, prompts: Sequence[Sequence[int]], start: int, **others: Any) -> None:
        """One forward pass without the head; what pads on the right is seen by no token that counts, and overwritten later.

        Args:
            start: column of the first tokens.
            others: for the network.
        """
        length = max(map(len, prompts))
        ids = np.full((len(prompts), length), self.settings.pad_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        positions = torch.arange(start, start + length, device=self.device).expand(len(prompts), -1)
        inputs = {"input_ids": torch.from_numpy(ids).to(self.device), "position_ids": positions}
        self.network.base_model(**inputs, past_key_values=self.cache, use_cache=True, **others)

    def step(self, on_answer: Callable[[Row], None]) -> None:
        """One new token for every row; those that end make room."""
        rows = self.rows
        columns = [len(row.ids) - 1 for row in rows]
        positions = torch.tensor(columns, device=self.device)
        width = max(columns) + 1
        self.cache.read_tokens(positions, width, apart=bool(self.seen))
        inputs = {
            "input_ids": torch.tensor([row.ids[-1:] for row in rows], device=self.device),
            "position_ids": positions[:, None],
            "attention_mask": self.make_masks(positions, width),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if self.seen:
            inputs["sight"] = RowSight(self.seen, is_hidden=any(self.windows.values()))
        if self.head is None:
            logits = self.network(**inputs).logits[:, -1]
        else:
            logits = self.head.compute(self.network.base_model(**inputs).last_hidden_state[:, -1])
        generators = [row.generator for row in rows if row.generator is not None]
        tokens = choose_tokens(logits, [row.ids for row in rows], generators, self.processors)
        for slot in reversed(range(len(rows))):  # from the last on, so that the row that fills a gap is done already
            row, token = rows[slot], tokens[slot]
            ends = token in self.settings.stop_ids
            if not ends:
                row.ids.append(token)
            if ends or row.new == self.settings.generation.max_new_tokens:
                self.free(slot)
                on_answer(row)

    def free(self, slot: int) -> None:
        """Takes a row out; the last one moves into its place."""
        last = self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last
            self.cache.move(len(self.rows), slot, len(last.ids))

    def make_masks(self, positions: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """What each row's one token sees: its own columns, in a sliding layer the last of them, shape (rows, 1, 1, width).

        As transformers has it, a dictionary where the kinds of layers have names, true for what is seen, or added to the scores
        where the attention is not fused.
        """
        columns = torch.arange(width, device=self.device)
        masks = {}
        for kind, window in self.windows.items():
            mask = columns <= positions[:, None]
            if window is not None:
                mask &= columns > positions[:, None] - window
            mask = mask[:, None, None, :]
            if self.network.config._attn_implementation == "eager":
                lowest = torch.finfo(self.network.dtype).min
                mask = torch.zeros(mask.shape, dtype=self.network.dtype, device=self.device).masked_fill_(~mask, lowest)
            masks[kind] = mask
        return masks if self.names_layers else next(iter(masks.values()))

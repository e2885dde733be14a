"""What the rules look at, and one function for each thing that can be wrong: it returns it in words, or None.

What is not known yet is None in `Facts`, and a check that needs it says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from config.model_families import PACKING_MODELS, ModelFamily, find_learning_rate
from config.recipe_rules import PAIR_METRICS
from config.structured_config import Recipe

TOO_FAR = 5.0  # a learning rate this many times above or below the table is rarely meant
FEW_STEPS, FEW_HELD_OUT = 20, 5
LONG_STEP_S = 120.0
CORE_FLOPS = 3.0e10  # operations in a second; the demo reaches 3.6e10 on each of two cores
SCRATCH_LEARNING_RATE = 1e-3  # small new models; nanoGPT takes it for its character model


@dataclass(frozen=True)
class Facts:
    """All that the rules may look at; None and empty mean «not known yet».

    Attributes:
        recipe: the valid recipe.
        family: the model's row in the family table.
        model_type: the architecture's name in transformers.
        modules: names of the linear modules that an adapter can attach to.
        whole_modules: names of the modules that can be trained whole.
        is_reward: the model ends in one number instead of a vocabulary.
        has_chat_template: whether the tokenizer brings a chat template; before it can be looked at, whether its family does.
        parameters: of the model.
        positions: longest sequence that the model was made for, in tokens.
        learned_positions: nothing lies beyond the last position.
        vocabulary: rows of the model's embedding.
        largest_id: of all tokens in both sets.
        formats: rows by format.
        first_rows: place of the first row of each format.
        answers: training answers that are chosen or desirable, and rejected or undesirable; (0, 0) without preferences.
        held_out_answers: the same of the rows that are never trained on.
        held_out_rows: rows that are never trained on.
        longest_prompt: tokens of the longest held-out prompt.
        steps: optimizer steps of the run.
        tokens_per_step: training tokens of an optimizer step on average.
        device: `cuda`, `mps` or `cpu`.
        cores: CPU cores that the run may use.
    """

    recipe: Recipe
    family: ModelFamily | None = None
    model_type: str | None = None
    modules: tuple[str, ...] = ()
    whole_modules: tuple[str, ...] = ()
    is_reward: bool = False
    has_chat_template: bool | None = None
    parameters: int | None = None
    positions: int | None = None
    learned_positions: bool = False
    vocabulary: int | None = None
    largest_id: int | None = None
    formats: Mapping[str, int] = field(default_factory=dict)
    first_rows: Mapping[str, str] = field(default_factory=dict)
    answers: tuple[int, int] | None = None
    held_out_answers: tuple[int, int] = (0, 0)
    held_out_rows: int | None = None
    longest_prompt: int | None = None
    steps: int | None = None
    tokens_per_step: float | None = None
    device: str | None = None
    cores: int = 1

    @property
    def holds_out_labels(self) -> bool:
        """True if some held-out row has one answer and its label."""
        return self.recipe.training.learns_pairs and sum(self.held_out_answers) < 2 * (self.held_out_rows or 0)


def find_no_chat_template(facts: Facts) -> str | None:
    """Strategy chat on a model that cannot chat."""
    data = facts.recipe.data
    if data.strategy != "chat" or data.template != "auto" or facts.has_chat_template is not False:
        return None
    return f"{facts.family.name if facts.family else facts.recipe.model.name} has no chat template"


def list_missing_targets(facts: Facts) -> list[str]:
    """LoRA targets that no module of the model is called."""
    lora = facts.recipe.lora
    modules = facts.modules or (facts.family.lora_targets if facts.family else ())
    if lora is None or isinstance(lora.target_modules, str) or not modules:
        return []
    return [target for target in lora.target_modules if target.rsplit(".", 1)[-1] not in modules]


def find_lora_target(facts: Facts) -> str | None:
    """A LoRA target that does not exist."""
    missing = list_missing_targets(facts)
    names = ", ".join(repr(name) for name in missing)
    return f"no module of {facts.recipe.model.name} is called {names}" if missing else None


def find_unknown_module(facts: Facts) -> str | None:
    """A module to train whole that does not exist."""
    lora = facts.recipe.lora
    asked = lora.modules_to_save if lora and facts.whole_modules else ()
    missing = [name for name in asked if name.rsplit(".", 1)[-1] not in facts.whole_modules]
    names = ", ".join(repr(name) for name in missing)
    return f"no module of {facts.recipe.model.name} is called {names}" if missing else None


def list_modules(facts: Facts) -> str:
    """The right targets."""
    modules = facts.modules or (facts.family.lora_targets if facts.family else ())
    return f"modules here: {', '.join(modules)}; or target_modules: all-linear"


def find_preference_rows(facts: Facts) -> str | None:
    """Pairs of answers under a method that learns one."""
    count = facts.formats.get("preference", 0)
    if facts.recipe.training.learns_pairs or (not count and facts.recipe.data.format != "preference"):
        return None
    rows = f"{count} rows hold" if count else "format preference means rows with"
    return f"{rows} a chosen and a rejected answer, and method sft learns one answer"


def find_no_pairs(facts: Facts) -> str | None:
    """Rows with one answer, of which nothing is known, under a method that learns from better and worse."""
    method = facts.recipe.training.method
    known = {"preference", "labelled"}
    single = {name: count for name, count in facts.formats.items() if name not in known}
    if not facts.recipe.training.learns_pairs or not single:
        return None
    first = next((f", the first in {facts.first_rows[name]}" for name in single if name in facts.first_rows), "")
    needs = "a label, or a chosen and a rejected one" if method == "kto" else "a chosen and a rejected one in each"
    return f"{sum(single.values())} rows have one answer{first}, and method {method} needs {needs}"


def show_pair_rows(facts: Facts) -> str:
    """What a row must look like."""
    pair = '{"prompt": …, "chosen": …, "rejected": …}'
    if facts.recipe.kto is not None:
        return (
            f'write each row as {{"prompt": …, "completion": …, "label": true}} or as {pair}, or leave the others out'
        )
    return f"write each row as {pair}, or set training.method: sft"


def find_no_preference_metric(facts: Facts) -> str | None:
    """A report that would not say whether the preference was learned."""
    recipe = facts.recipe
    if not recipe.training.learns_pairs or set(recipe.evaluation.metrics) & set(PAIR_METRICS):
        return None
    return "no metric of the report looks at the pairs or labels"


def name_preference_metrics(facts: Facts) -> str:
    """The metrics that fit rows and method: ORPO's schema refuses those that compare with the untouched model."""
    if facts.holds_out_labels:
        return "label_accuracy"
    return "preference_accuracy_per_token" if facts.recipe.orpo else "preference_accuracy and reward_accuracy"


def find_reward_model(facts: Facts) -> str | None:
    """A model without a vocabulary under a method that predicts tokens."""
    method = facts.recipe.training.method
    if not facts.is_reward or method == "reward":
        return None
    return f"{facts.recipe.model.name} is a reward model: it predicts no tokens, and method {method} needs them"


def find_raw_text(facts: Facts) -> str | None:
    """Raw text under strategy chat."""
    count = facts.formats.get("text", 0)
    if facts.recipe.data.strategy != "chat" or not count:
        return None
    return f"{count} rows are raw text and no conversations, and strategy is chat"


def find_leaking_pack(facts: Facts) -> str | None:
    """Packing on an architecture that does not keep the examples of a row apart, or that nobody has tried."""
    if not facts.recipe.training.packing or facts.model_type is None or facts.model_type in PACKING_MODELS:
        return None
    return f"nobody has shown that {facts.model_type} keeps the examples of a packed row apart, as packing needs"


def find_beyond_positions(facts: Facts) -> str | None:
    """max_length beyond what the model was made for."""
    length, positions = facts.recipe.data.max_length, facts.positions
    if positions is None or length <= positions:
        return None
    return f"max_length {length} lies beyond the model's {positions} positions"


def find_answer_beyond_positions(facts: Facts) -> str | None:
    """Prompt and answer together beyond what the model was made for."""
    new, prompt = facts.recipe.generation.max_new_tokens, facts.longest_prompt
    if facts.recipe.reward or facts.positions is None or prompt is None or prompt + new <= facts.positions:
        return None
    return f"the longest prompt ({prompt} tokens) and max_new_tokens {new} lie beyond the model's {facts.positions} positions"


def find_foreign_tokenizer(facts: Facts) -> str | None:
    """Token ids that the model has no embedding for."""
    if facts.vocabulary is None or facts.largest_id is None:
        return None
    if facts.largest_id < facts.vocabulary + len(
        facts.recipe.data.added_tokens
    ):  # these get rows when the model is loaded
        return None
    return f"the tokenizer gives the id {facts.largest_id}, and the model has embeddings for {facts.vocabulary} tokens"


def find_far_learning_rate(facts: Facts) -> str | None:
    """A learning rate far from the table."""
    usual, rate = find_usual_rate(facts), facts.recipe.training.learning_rate
    if facts.parameters is None or usual is None:
        return None
    ratio = rate / usual
    if 1 / TOO_FAR * 0.999 <= ratio <= TOO_FAR * 1.001:
        return None
    method = "all weights" if facts.recipe.lora is None else "LoRA"
    size = show_count(facts.parameters)
    far = f"{ratio:.0f} times above" if ratio > 1 else f"{1 / ratio:.0f} times below"
    return f"learning_rate {rate:g} is {far} the usual {usual:g} for {method} on {size} parameters"


def find_usual_rate(facts: Facts) -> float | None:
    """The table's learning rate, if it has one for this method."""
    recipe = facts.recipe
    if recipe.scratch is not None:
        return SCRATCH_LEARNING_RATE
    with_lora = recipe.lora is not None
    return find_learning_rate(facts.parameters or 0, facts.family, recipe.training.method, with_lora=with_lora)


def show_count(parameters: int) -> str:
    """`135M`, `1.2B`."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def find_far_alpha(facts: Facts) -> str | None:
    """alpha outside r to 4 r."""
    lora = facts.recipe.lora
    if lora is None or lora.r <= lora.alpha <= 4 * lora.r:
        return None
    return f"alpha {lora.alpha:g} is {lora.alpha / lora.r:g} times r; 1 to 4 times is usual"


def find_long_step(facts: Facts) -> str | None:
    """A batch whose optimizer step takes minutes on a CPU."""
    tokens = facts.tokens_per_step
    if facts.device != "cpu" or facts.parameters is None or tokens is None:
        return None
    # Two operations for a parameter and token forwards and four backwards, two of which LoRA spares (arXiv 2001.08361).
    seconds = (6 if facts.recipe.lora is None else 4) * facts.parameters * tokens / (CORE_FLOPS * facts.cores)
    if seconds < LONG_STEP_S:
        return None
    return f"a step of {tokens:.0f} tokens may take {seconds / 60:.0f} minutes on this CPU"


def find_8bit_elsewhere(facts: Facts) -> str | None:
    """8-bit moments without an NVIDIA GPU: bitsandbytes then unpacks the whole state at every step, and nothing is saved."""
    if facts.device in (None, "cuda") or facts.recipe.training.optimizer != "adamw_8bit":
        return None
    return f"optimizer adamw_8bit needs an NVIDIA GPU, and this run would be on {facts.device}"


def find_few_steps(facts: Facts) -> str | None:
    """A run that ends before it has learned."""
    if facts.steps is None or facts.steps >= FEW_STEPS:
        return None
    return f"only {facts.steps} optimizer steps"


def find_few_held_out(facts: Facts) -> str | None:
    """Too few held-out rows for a verdict."""
    count = facts.held_out_rows
    return f"only {count} held-out rows" if count is not None and 0 < count < FEW_HELD_OUT else None


def find_no_held_out(facts: Facts) -> str | None:
    """Nothing to measure on."""
    data, evaluation = facts.recipe.data, facts.recipe.evaluation
    by_recipe = data.eval is None and data.eval_fraction == 0
    if facts.held_out_rows == 0 or (facts.held_out_rows is None and by_recipe):
        message = "no held-out rows, so nothing will show whether it got better"
        if facts.recipe.training.early_stopping_patience is not None:
            return f"{message}, and early stopping cannot act"
        return f"{message}, by evaluation.metrics either" if "metrics" in evaluation.model_fields_set else message
    return None

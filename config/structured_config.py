"""What a recipe may say: the pydantic schema, and nothing else.

Every key of every recipe is declared here once, with its type, bounds, default and meaning. Nothing in this file looks at
the machine or at a file: a recipe that is well-formed here may still not be runnable on this computer, and that is for
`utils/preflight.py` to say. Models are frozen: what was read is what ran.

The `to_*` methods are the only place where our names are translated into those of peft and transformers; they import the
library when called, so that reading a recipe stays free of frameworks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from config.recipe_rules import REWARD_METRICS, RecipeRuleError, find_rule_violations

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig

Strings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
FormatName = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text", "preference", "labelled"
]
MetricName = Literal[
    "loss",
    "perplexity",
    "exact_match",
    "execution_accuracy",
    "preference_accuracy",
    "preference_accuracy_per_token",
    "reward_accuracy",
    "label_accuracy",
]
# Methods that learn from pairs of answers; each has a section of its name.
PAIR_METHODS = ("dpo", "kto", "orpo", "reward")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are immutable, `"3"` is not 3."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """Which model, and in which numbers it is loaded."""

    name: Annotated[str, Field(min_length=1)]
    """Hub id (`meta-llama/Llama-3.2-1B-Instruct`), local folder, or `embedded/<name>` for the model shipped with Tunebook.
    Under `init: scratch`, what the new model is called."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """pretrained: weights that exist. scratch: random weights and a tokenizer of their own, as the section `scratch` says."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null takes its main branch."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the frozen weights; auto takes bfloat16 where a probe finds that the machine computes it quickly.
    Without a `lora` section all weights are trained, in float32."""
    quantization: Literal["none", "int8", "int4", "nf4", "fp4"] = "none"
    """Store the frozen base in 8 or 4 bits; needs a `lora` section. On torch these are bitsandbytes' int8, nf4 and fp4; on MLX
    int8 and int4, with a scale and an offset for each 64 weights."""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """Folder of a finished LoRA adapter, in the format of PEFT or of mlx-lm, or of the run that trained it: it is folded into
    the base when the model is loaded, so that this run starts from, and is compared with, what that run has learned."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only this line can switch it on."""

    def to_quantization_config(self, compute_dtype: str) -> BitsAndBytesConfig | None:
        """Builds the bitsandbytes settings of `quantization`.

        Args:
            compute_dtype: name of the dtype that the dequantised matrices are multiplied in, such as `bfloat16`.

        Returns:
            None when the model is not quantised.
        """
        if self.quantization == "none":
            return None
        from transformers import BitsAndBytesConfig

        if self.quantization == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quantization,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_use_double_quant=True,
        )


class ScratchSection(Section):
    """A new model for raw text: its size, its windows, and its tokenizer, which is trained on the corpus of `data`."""

    architecture: Literal["llama", "gpt2"] = "llama"
    """llama: rotary positions, RMS norms, gated MLP. gpt2: learned positions, layer norms. Both share embedding and head."""
    layers: Annotated[int, Field(ge=1, le=128)] = 4
    """Transformer blocks."""
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    """Attention heads of each layer; `width` is shared out among them."""
    width: Annotated[int, Field(ge=8, le=16_384)] = 128
    """Size of the vector that stands for a token."""
    context: Annotated[int, Field(ge=8, le=131_072)] = 128
    """Longest text in tokens that the model sees at once, and so the length of a training window."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens from the start of one window to the next, below context; held-out windows count only the tokens that are new.
    Null takes context - 1: windows share one token, so that each token is learned once an epoch."""
    tokenizer: Literal["char", "bpe"] = "char"
    """char: every character of the corpus is a token. bpe: byte-level byte pair encoding with `vocab_size` tokens."""
    vocab_size: Annotated[int, Field(ge=260, le=262_144)] | None = None
    """Tokens of a bpe vocabulary; char has as many as the corpus has characters."""

    def to_model_config(self, vocab_size: int, end_of_text_id: int) -> dict[str, Any]:
        """The new model's config.json, as transformers reads it.

        Args:
            vocab_size: tokens of the trained tokenizer.
            end_of_text_id: the token between two documents.
        """
        shared = {
            "model_type": self.architecture,
            "vocab_size": vocab_size,
            "bos_token_id": end_of_text_id,
            "eos_token_id": end_of_text_id,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "dtype": "float32",
        }
        if self.architecture == "gpt2":
            sizes = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads, "n_positions": self.context}
            # A new model on a small corpus sees each text a few times: dropout would also cost the second CPU worker.
            return {**shared, **sizes, **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)}
        return {
            **shared,
            "hidden_size": self.width,
            # Two thirds of 4 x width, because the gated MLP has three matrices instead of two (arXiv 2302.13971, section 2.2).
            "intermediate_size": -(-8 * self.width // 3 // 16) * 16,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.context,
        }


class DataSource(Section):
    """One file, glob or hub dataset of a mixture: `{source: data/chat.jsonl, weight: 2}`."""

    source: Annotated[str, Field(min_length=1)]
    """File, glob, or hub dataset id (`HuggingFaceH4/ultrachat_200k`)."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """How often an epoch sees each of its training rows: 2 twice, 0.5 a seeded half of them."""
    split: Annotated[str, Field(min_length=1)] = "train"
    """Split of a hub dataset."""
    subset: Annotated[str, Field(min_length=1)] | None = None
    """Subset (configuration) of a hub dataset."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Branch, tag or commit of a hub dataset; null takes its main branch."""
    streaming: bool = False
    """Read a hub dataset over the network row by row instead of downloading it first: for sets larger than the disk."""


def name_shape(value: Any) -> str:
    """Which of the shapes of `data.train` a value has, so that only the errors of that shape are reported."""
    if isinstance(value, (list, tuple)):
        return "list"
    return "section" if isinstance(value, (dict, DataSource)) else "text"


Text = Annotated[str, Field(min_length=1), Tag("text")]
SourceSection = Annotated[DataSource, Tag("section")]
Source = Annotated[Text | SourceSection, Discriminator(name_shape)]
Sources = Annotated[tuple[Source, ...], Field(strict=False, min_length=1), Tag("list")]
SourceOrList = Annotated[Text | SourceSection | Sources, Discriminator(name_shape)]


class DataSection(Section):
    """Which rows are read, and how a row becomes tokens and a loss mask."""

    train: SourceOrList
    """Training rows: a file (JSON, JSONL, CSV or Parquet, also .gz), a glob, a hub dataset id, a section
    `{source: …, weight: …}`, or a list of these. Under `init: scratch` also `.txt` files, each of them one document."""
    eval: SourceOrList | None = None
    """Held-out rows, named like `train`; null holds out `eval_fraction` of the training rows."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the training rows held out when `eval` is null; 0 trains on everything and evaluates nothing."""
    format: Literal["auto"] | FormatName = "auto"
    """Shape of the rows; auto recognises each row by its keys."""
    columns: dict[str, str] = {}
    """Renames columns before reading: `{question: prompt, answer: completion}`."""
    strategy: Literal["auto", "chat", "standard"] = "auto"
    """chat: the model's chat template. standard: a prompt template or raw text. auto: chat where the model has a template."""
    template: Annotated[str, Field(min_length=1)] = "auto"
    """auto, a shipped template (alpaca, chatml, gemma, llama2, llama3, mistral, phi, qwen, raw, vicuna, zephyr), the path
    of a `.jinja` file, or Jinja text."""
    added_tokens: Names = ()
    """Tokens that the tokenizer does not have yet: each becomes one id with an embedding of its own, and with a `lora` section
    only these new rows are trained."""
    system: str | None = None
    """System message for rows that bring none; null leaves it to the chat template."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are learned: every assistant turn, the last one, or the whole conversation."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Longest example in tokens."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to a longer one: refuse the run, leave the row out, or cut its prompt from the left (never the answer)."""


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685). Leave the section out to train all weights."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0.0, le=4096.0)] = 32.0
    """Scale of the update: alpha / r (lora, dora) or alpha / sqrt(r) (rslora)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of the adapters."""
    target_modules: Literal["all-linear"] | Strings = "all-linear"
    """Names of the modules that get an adapter, or all linear ones but the head."""
    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """lora, rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353) or PiSSA (arXiv 2404.02948), which starts from the largest
    singular values and is saved as a plain adapter of twice the rank."""
    modules_to_save: Names = ()
    """Names of modules that are trained whole and saved with the adapter, such as `embed_tokens`, `lm_head` or `norm`."""
    plus_ratio: Annotated[float, Field(ge=1.0, le=256.0)] | None = None
    """LoRA+ (arXiv 2402.12354): the B matrices learn this many times faster than the A matrices; null trains both alike."""

    def to_peft_config(self, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM") -> LoraConfig:
        """Builds the peft adapter configuration.

        Args:
            task: CAUSAL_LM for a language model, SEQ_CLS for a reward model.
        """
        from peft import LoraConfig

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            task_type=task,
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            # The fast decomposition of the paper's appendix: exact for training, because the rest of W is W minus the product.
            init_lora_weights="pissa_niter_16" if self.variant == "pissa" else True,
            modules_to_save=list(self.modules_to_save) or None,
        )


class TrainingSection(Section):
    """How the model is trained."""

    method: Literal["sft", "dpo", "kto", "orpo", "reward"]
    """sft: supervised fine-tuning on the tokens that `data.loss_on` names. dpo, kto, orpo: learning from pairs of a chosen
    and a rejected answer, kto also from single answers with a label; each is set in the section of its name, and learns the
    last answer of a conversation. reward: a model that scores answers instead of writing them, from the same pairs."""
    engine: Literal["tunebook", "trl"] = "tunebook"
    """Who takes the steps: Tunebook's own loop, or TRL's trainer on the same tokens, masks and order, for comparison."""
    epochs: Annotated[float, Field(gt=0.0, le=1000.0)] = 3.0
    """Passes over the training rows; fractions are allowed. Leave it out when `max_steps` is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of `epochs`."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Examples per optimizer step, over all devices: gradient accumulation is derived from it."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65_536)] = "auto"
    """Examples per forward pass: changes speed and memory, never the result."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 4.0e-4
    """Peak learning rate. LoRA wants about ten times that of full fine-tuning."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw: fused AdamW. adamw_8bit: its two moments in 8 bits (bitsandbytes; NVIDIA GPUs only), a quarter of their memory.
    adafactor: factored second moments and no first ones (arXiv 1804.04235), at the learning rate of the recipe."""
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after the warmup; wsd (arXiv 2404.06395) stays at the peak and falls in the last 20 % of
    the steps."""
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    """Share of the steps in which the learning rate rises from 0; at least 5 steps where the run has 50 or more."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradients are scaled down to this norm; null never clips."""
    neftune_alpha: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    """Uniform noise on the embeddings in training (arXiv 2310.05914); useful values are 5 to 15."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: only where the run is
    predicted not to fit into the memory that is free."""
    packing: bool = False
    """Put several examples into one row, each blind to the others, instead of padding."""
    eval_every: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    """Steps between evaluations on held-out rows; the last step always evaluates."""
    save_every: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    """Steps between checkpoints; the last step always saves."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations without a better loss; null never stops early."""
    early_stopping_threshold: Annotated[float, Field(ge=0.0)] = 0.0
    """How much lower a loss must be to count as better."""
    small_data: Literal["auto", "gentle", "off"] = "auto"
    """Under 200 training examples, fill keys that the recipe leaves out: auto takes more epochs, smaller batches and more
    held-out rows, which wins on real small sets (docs/results/small_data.md); gentle takes older, milder numbers; off changes
    nothing."""

    @property
    def learns_pairs(self) -> bool:
        """True for methods whose rows hold a chosen and a rejected answer, or under kto one of the two."""
        return self.method in PAIR_METHODS

    @property
    def silences_dropout(self) -> bool:
        """True for methods that compare log-probabilities: the model's own dropout would be noise between the two."""
        return self.learns_pairs and self.method != "reward"


class DpoSection(Section):
    """Direct preference optimisation (arXiv 2305.18290), for `training.method: dpo`."""

    beta: Annotated[float, Field(gt=0.0, le=100.0)] = 0.1
    """How closely the model is held to the reference: larger moves it less."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: the paper's. ipo: a squared distance to a fixed margin (arXiv 2310.12036). hinge: SLiC's (arXiv 2305.10425)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the pairs whose answers may be the wrong way round (conservative DPO); sigmoid only."""
    reference: Literal["precomputed", "adapter_off", "model"] = "precomputed"
    """Where the untouched model's log-probabilities come from: computed once before the first step and kept on disk; in each
    step with the adapters switched off; or in each step from a second copy of the model in memory."""


class KtoSection(Section):
    """Kahneman-Tversky optimisation (arXiv 2402.01306), for `training.method: kto`: each answer is desirable or undesirable by
    itself. A row has one answer and its `label`; or it is a pair, of which the chosen answer is desirable and the rejected
    one undesirable."""

    beta: Annotated[float, Field(gt=0.0, le=100.0)] = 0.1
    """How closely the model is held to the reference: larger moves it less."""
    desirable_weight: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Weight of the desirable answers. This weight times their number should be 1 to 4/3 times the same of the others."""
    undesirable_weight: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Weight of the undesirable answers."""


class OrpoSection(Section):
    """Odds ratio preference optimisation (arXiv 2403.07691), for `training.method: orpo`: it needs no reference model."""

    beta: Annotated[float, Field(gt=0.0, le=100.0)] = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen answer; the paper's lambda."""


class RewardSection(Section):
    """A reward model (arXiv 1706.03741; in the form of arXiv 2203.02155), for `training.method: reward`."""

    center_coefficient: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Weight of the squared sum of a pair's two rewards, which keeps rewards around 0 (arXiv 2312.09244, equation 2); useful
    values are about 0.01."""


class GenerationSection(Section):
    """How answers are sampled in inference and evaluation."""

    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = 256
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """0 takes the likeliest token each time (greedy)."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Sample from the smallest set of tokens that holds this probability."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Sample from this many likeliest tokens."""
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Above 1, tokens that occurred already become less likely (arXiv 1909.05858)."""

    def to_generation_config(self, stop_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        """Builds the transformers settings; sampling keys are set only when sampling, so nothing warns.

        Args:
            stop_token_ids: any of these ends an answer.
            pad_token_id: fills rows that ended before the others of their batch.
        """
        from transformers import GenerationConfig

        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # transformers' own default of top_k = 50 would cut the distribution behind the user's back.
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0}
            sampling["top_k"] = self.top_k or 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            eos_token_id=stop_token_ids,
            pad_token_id=pad_token_id,
            **sampling,
        )


class EvaluationSection(Section):
    """What the before/after report measures."""

    metrics: Annotated[tuple[MetricName, ...], Field(strict=False, min_length=1)] = ("loss", "perplexity")
    """loss and perplexity on the reference answers (the chosen or desirable ones); exact_match and execution_accuracy on
    generated ones. Of pairs: preference_accuracy, the share in which the model finds the chosen answer likelier;
    preference_accuracy_per_token, the same by the mean over an answer's tokens, so that length plays no part;
    reward_accuracy, the share in which training raised the chosen answer's log-probability more than the rejected one's.
    Of answers with a label, and of pairs: label_accuracy, the share of the answers that training moved the right way,
    desirable ones up and undesirable ones down. Method reward has preference_accuracy alone, the share in which the chosen
    answer is scored higher."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Held-out rows to use, the first ones; null uses all."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Prompts that are answered, or examples that are scored, at once; fewer where their memory is short."""
    samples: Annotated[int, Field(ge=0, le=100)] = 5
    """Answers shown side by side in the report."""


class TrackingSection(Section):
    """Experiment trackers, all off unless asked for."""

    wandb: bool = False
    """Log to Weights & Biases (key from WANDB_API_KEY in the environment or `.env`)."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    project: Annotated[str, Field(min_length=1)] = "tunebook"
    """Project name for wandb."""


class Recipe(Section):
    """A whole recipe."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seeds the data order, adapter initialisation, dropout and sampling."""
    deterministic: bool = False
    """Let CUDA choose only kernels that repeat their results, which is slower; on a CPU, compute each operation on one
    thread: how many share it decides how sums are rounded, and is otherwise chosen by timing."""
    backend: Literal["auto", "torch", "mlx"] = "auto"
    """auto takes MLX on Apple silicon where it is installed and has all that the recipe asks for, else torch: CUDA, then MPS,
    then the CPU."""
    model: ModelSection
    data: DataSection
    scratch: ScratchSection | None = None
    lora: LoraSection | None = None
    training: TrainingSection
    dpo: DpoSection | None = None
    kto: KtoSection | None = None
    orpo: OrpoSection | None = None
    reward: RewardSection | None = None
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def add_method_section(cls, values: Any) -> Any:
        """A method's section may be left out; its defaults then stand in the recipe like any others.

        A reward model has a metric of its own by default, because it predicts no tokens.
        """
        training = values.get("training") if isinstance(values, dict) else None
        method = training.get("method") if isinstance(training, dict) else None
        if method in PAIR_METHODS and method not in values:
            values = {**values, method: {}}
        if method == "reward" and isinstance(evaluation := values.get("evaluation", {}), dict):
            return {**values, "evaluation": {"metrics": list(REWARD_METRICS), **evaluation}}
        return values

    @model_validator(mode="after")
    def check_rules(self) -> Recipe:
        """Reports every pair of keys that contradict each other."""
        violations = list(find_rule_violations(self))
        if violations:
            raise RecipeRuleError(violations)
        return self

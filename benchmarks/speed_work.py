"""The works of the speed benchmark: rows, their tokens, the recipe for Tunebook and the job for a peer.

With `--rows-dir` the rows are read from three files there, which are not shipped: `wikisql_train.jsonl` ({"text"}: columns,
question and query), `gsm8k_train.jsonl` ({"question", "answer"}) and `gsm8k_preference.jsonl` ({"prompt", "chosen",
"rejected"}). Without it, the shipped text-to-SQL rows are used for everything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.speed_models import SEED, build_model, find_base
from config.recipe_io import load_recipe
from utils.batching import iterate_windows
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.preflight import check_recipe

SHIPPED = Path(__file__).resolve().parent.parent / "data" / "text_to_sql"
LORA = {"r": 16, "alpha": 32.0}
IGNORED = -100  # the label of a token that is not learned, in every peer
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What every side does.

    Attributes:
        rows: which rows; `long` ones are conversations joined up to `join_tokens`.
        join_tokens: turns are joined until a row would be longer; 0 keeps each conversation by itself.
        steps: optimizer steps of a run unless the command says otherwise.
        learning_rate: constant, without warmup.
        architecture: of the random model that is trained (`ARCHITECTURES`); None for the embedded model.
    """

    name: str
    title: str
    rows: Literal["wikisql", "gsm8k", "preference"]
    join_tokens: int = 0
    batch_size: int = 8
    steps: int = 5
    learning_rate: float = 4.0e-4
    method: Literal["sft", "dpo"] = "sft"
    is_full: bool = False
    quantization: Literal["none", "nf4"] = "none"
    architecture: str | None = None

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA is trained rather than all weights."""
        return not self.is_full

    @property
    def needs_gpu(self) -> bool:
        """Whether it is too large for a CPU."""
        return self.architecture == "qwen2"


WORKS = {
    work.name: work
    for work in (
        Work("small", "WikiSQL on a small random model, LoRA", "wikisql", steps=5, architecture="llama"),
        Work("short", "WikiSQL, LoRA", "wikisql", steps=10),
        Work("medium", "GSM8K chat, LoRA", "gsm8k", steps=5),
        Work("long", "GSM8K joined to 2,000 tokens, LoRA", "gsm8k", join_tokens=2000, batch_size=2, steps=3),
        Work("dpo", "GSM8K pairs, DPO with LoRA", "preference", steps=3, learning_rate=1.0e-5, method="dpo"),
        Work("full", "GSM8K chat, all weights", "gsm8k", steps=4, learning_rate=3.0e-5, is_full=True),
        Work("nf4", "GSM8K chat, LoRA over nf4", "gsm8k", steps=3, quantization="nf4"),
        Work("gpu", "GSM8K chat on Qwen2.5-0.5B's sizes, LoRA", "gsm8k", batch_size=16, steps=20, architecture="qwen2"),
    )
}


@dataclass(frozen=True)
class PreparedWork:
    """A work with its files, and what each step of it must see.

    Attributes:
        folder: holds rows.jsonl (as Tunebook reads them), peer_rows.jsonl (in the order of training) and recipe.yaml.
        source: the model; its folder is what every side loads.
        windows: the examples of each optimizer step.
    """

    work: Work
    folder: Path
    source: ModelSource
    steps: int
    windows: list[list[EncodedExample]]

    def count_tokens(self, *, by_row: bool) -> list[int]:
        """Real tokens of each step.

        Args:
            by_row: count a pair's prompt with both of its answers, as peers compute it; else once, as Tunebook does.
        """
        return [
            sum(sum(measure_rows(each)) if by_row else len(each.input_ids) for each in window)
            for window in self.windows
        ]

    def count_supervised(self) -> list[int]:
        """Learned tokens of each step."""
        return [sum(int(each.loss_mask[1:].sum()) for each in window) for window in self.windows]

    def count_squares(self) -> list[int]:
        """Sum of L² over the rows of each step; tokens of a pair's shared prompt see each other once."""
        return [sum(measure_square(each) for each in window) for window in self.windows]

    def write_job(self, folder: Path, *, setting: str, steps: int) -> Path:
        """The job of a peer, as peers/peer_job.py describes it."""
        work = self.work
        job = {
            "model": str(self.source.folder),
            "rows": str(self.folder / "peer_rows.jsonl"),
            "method": work.method,
            "batch_size": work.batch_size,
            "steps": steps,
            "learning_rate": work.learning_rate,
            "r": LORA["r"] if work.has_adapters else None,
            "alpha": LORA["alpha"] if work.has_adapters else None,
            "quantization": work.quantization,
            "seed": SEED,
            "setting": setting,
        }
        path = folder / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        return path


def measure_rows(example: EncodedExample) -> list[int]:
    """Tokens of the plain rows that an example stands for: one, or the two conversations of a pair."""
    if example.branch_starts is None:
        return [len(example.input_ids)]
    # Trunk and branches: each branch begins with a copy of the prompt's last token.
    chosen, rejected = example.branch_starts
    return [rejected, chosen + len(example.input_ids) - rejected]


def measure_square(example: EncodedExample) -> int:
    """L² of a row; of a pair, the squares of both conversations less that of their prompt."""
    prompt = 0 if example.branch_starts is None else example.branch_starts[0]
    return sum(length**2 for length in measure_rows(example)) - prompt**2


def prepare_work(work: Work, steps: int | None, rows_dir: Path | None, folder: Path) -> PreparedWork:
    """Writes rows and recipe, encodes the rows as Tunebook does, and writes them for the peers in the order of training."""
    source = find_base() if work.architecture is None else build_model(work.architecture, folder / "model")
    count = steps or work.steps
    rows = read_rows(work, rows_dir, source.folder, count * work.batch_size)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(work, source.folder, folder / "rows.jsonl"), indent=1), encoding="utf-8")
    preflight = check_recipe(load_recipe(recipe, []))
    examples = preflight.data.train
    windows = [
        [examples[int(i)] for i in window] for window in iterate_windows(len(examples), work.batch_size, SEED, 0)
    ]
    tokenizer = preflight.tokenizer.tokenizer
    with (folder / "peer_rows.jsonl").open("w", encoding="utf-8") as file:
        for window in windows:
            for example in window:
                file.write(json.dumps(convert_example(example, tokenizer)) + "\n")
    return PreparedWork(work, folder, source, count, windows)


def make_recipe(work: Work, model: Path, rows: Path) -> dict[str, Any]:
    """What Tunebook trains: the rows once, everything else as it comes."""
    recipe: dict[str, Any] = {
        "seed": SEED,
        "model": {"name": str(model), "quantization": work.quantization},
        "data": {"train": str(rows), "eval_fraction": 0.0, "max_length": 2048},
        "training": {
            "method": work.method,
            "epochs": 1,
            "batch_size": work.batch_size,
            "learning_rate": work.learning_rate,
            "lr_scheduler": "constant",
            "warmup_ratio": 0.0,
            "small_data": "off",
        },
    }
    if work.has_adapters:
        recipe["lora"] = LORA
    if work.method == "dpo":
        recipe["dpo"] = {"reference": "adapter_off"}  # the reference in every step, as in the peers
    return recipe


def convert_example(example: EncodedExample, tokenizer: Any) -> Row:
    """An example for the peers: ids and labels, or the texts of a pair."""
    ids = example.input_ids
    if example.branch_starts is None:
        mask = example.loss_mask.copy()
        mask[0] = False
        return {"input_ids": ids.tolist(), "labels": [int(i) if m else IGNORED for i, m in zip(ids, mask, strict=True)]}
    chosen, rejected = example.branch_starts
    parts = {"prompt": ids[: chosen + 1], "chosen": ids[chosen + 1 : rejected], "rejected": ids[rejected + 1 :]}
    return {name: tokenizer.decode(part).removesuffix(tokenizer.eos_token) for name, part in parts.items()}


def read_rows(work: Work, rows_dir: Path | None, model: Path, count: int) -> list[Row]:
    """The first rows of a set, in the shape that the recipe reads.

    Raises:
        SystemExit: the set has too few.
    """
    if work.rows == "preference":
        rows = read_pairs(rows_dir)
    else:
        join_tokens = work.join_tokens
        if rows_dir is None and work.rows != "wikisql":
            join_tokens = join_tokens or 200  # shipped conversations are short ones
        rows = read_conversations(work, rows_dir)
        rows = join_conversations(rows, join_tokens, model) if join_tokens else rows
    if len(rows) < count:
        raise SystemExit(f"{work.name}: {len(rows)} rows, and {count} are needed; lower --steps")
    return rows[:count]


def read_pairs(rows_dir: Path | None) -> list[Row]:
    """Pairs of a right and a wrong answer; each prompt once."""
    path = rows_dir / "gsm8k_preference.jsonl" if rows_dir else SHIPPED / "preference.jsonl"
    return list({json.dumps(row["prompt"]): row for row in read_lines(path)}.values())


def read_conversations(work: Work, rows_dir: Path | None) -> list[Row]:
    """Conversations of one question and one answer."""
    if rows_dir is None:
        return [{"messages": row["messages"]} for row in read_lines(SHIPPED / "train.jsonl")]
    if work.rows == "gsm8k":
        pairs = [(row["question"], row["answer"]) for row in read_lines(rows_dir / "gsm8k_train.jsonl")]
    else:
        texts = [row["text"] for row in read_lines(rows_dir / "wikisql_train.jsonl")]
        pairs = [(question, answer) for question, _, answer in (text.partition("\nA: ") for text in texts)]
    return [make_conversation(question.strip(), answer.strip()) for question, answer in pairs]


def make_conversation(question: str, answer: str) -> Row:
    """Two turns in `messages`."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def join_conversations(rows: Sequence[Row], tokens: int, model: Path) -> list[Row]:
    """Puts conversations behind each other while they fit into so many tokens; a bare tokenizer counts, with 6 a turn."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    joined: list[Row] = []
    room = 0
    for row in rows:
        size = sum(len(tokenizer.encode(message["content"]).ids) + 6 for message in row["messages"])
        if size > room:
            joined.append({"messages": []})
            room = tokens - 30  # the template's own system message
        joined[-1]["messages"] += row["messages"]
        room -= size
    return joined[:-1]  # the last one may be short


def read_lines(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

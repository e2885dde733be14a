"""How fast many prompts are answered, beside transformers' `pipeline("text-generation")` at its best batch size.

    python benchmarks/inference.py [--rows FILE] [--name NAME] [--count 200] [--shots 5] [--rounds 1] [--keep FILE] [--write]

The embedded model answers the same prompts greedily on both sides: same stop token, same dtype (float32), same longest answer.
The pipeline gets the conversations as a user has them, at every batch size of `--sizes`; those below 64 answer the first
`--few` prompts only, because the speed of full batches does not depend on their number. Ours is the back end's `generate`, as
in evaluation, at every `evaluation.batch_size` of `--ours`. With `--shots` every prompt comes behind the same worked examples,
as in the usual few-shot evaluation. Each measurement is a process of its own, the two sides take turns, and the fastest round
counts. `--keep` names a JSONL file of measurements: what stands in it is not measured again, and with `--only` a long
comparison can be made piece by piece. `--write` writes docs/results/inference_NAME.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = (1, 4, 8, 16, 32, 64)
SMALL = 64  # the pipeline below this size answers a few prompts only
Measurement = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is not known yet, prints the table, and writes it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=Path, default=ROOT / "data/text_to_sql/eval.jsonl", help="JSONL rows with a prompt"
    )
    parser.add_argument("--name", default="text_to_sql", help="of the page (default: text_to_sql)")
    parser.add_argument("--count", type=int, default=200, help="prompts, the first ones (default: 200)")
    parser.add_argument("--few", type=int, default=64, help=f"prompts at sizes below {SMALL} (default: 64)")
    parser.add_argument(
        "--shots", type=int, default=0, help="worked examples before each prompt, the file's first rows"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="batch sizes of the pipeline")
    parser.add_argument("--ours", type=int, nargs="+", default=(64,), help="our evaluation.batch_size")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="JSONL file of measurements, read and appended to")
    parser.add_argument("--only", help="measure this one alone, such as pipeline-64 or ours-64")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args(arguments)
    if options.run:
        print(json.dumps(run_one(options, options.run)))
        return 0
    found = measure_all(options)
    if options.only:
        return 0
    lines = format_page(options, found)
    print("\n".join(lines))
    if options.write:
        path = ROOT / "docs" / "results" / f"inference_{options.name}.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\nWrote {path}")
    return 0


def measure_all(options: argparse.Namespace) -> list[Measurement]:
    """Each work once a round, in turns; those in the kept file are taken from there."""
    found: list[Measurement] = []
    if options.keep and options.keep.is_file():
        found = [json.loads(line) for line in options.keep.read_text(encoding="utf-8").splitlines()]
    works = [f"ours-{size}" for size in options.ours] + [f"pipeline-{size}" for size in options.sizes]
    for turn in range(options.rounds):
        for work in works:
            known = sum(one["work"] == work for one in found)
            if known > turn or options.only not in (None, work):
                continue
            words = ["--rows", options.rows, "--count", options.count, "--few", options.few]
            words += ["--shots", options.shots, "--max-new-tokens", options.max_new_tokens, "--run", work]
            command = [sys.executable, str(Path(__file__)), *map(str, words)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print({key: value for key, value in found[-1].items() if key != "answers"}, file=sys.stderr)
            if options.keep:
                with options.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    return found


def read_chats(path: Path, count: int, shots: int = 0) -> list[list[dict[str, str]]]:
    """The first prompts, behind as many worked examples; those are the file's first rows, and no prompts."""
    lines = path.read_text(encoding="utf-8").splitlines()[: shots + count]
    turns = [read_turns(json.loads(line)) for line in lines]
    examples = [turn for pair in turns[:shots] for turn in pair]
    return [[*examples, question] for question, _ in turns[shots:]]


def read_turns(row: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Question and answer of `messages`, `prompt` or `question` rows; a `text` row's answer stands behind `A:`."""
    if "messages" in row:
        return row["messages"][0], row["messages"][-1]
    text, _, rest = row.get("text", "").rpartition("\nA:")
    question = row.get("prompt") or row.get("question") or text
    answer = row.get("completion") or row.get("answer") or rest.strip()
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def run_one(options: argparse.Namespace, work: str) -> Measurement:
    """Loads the model, answers, and says how long the answering took."""
    side, _, size = work.partition("-")
    count = options.few if side == "pipeline" and int(size) < SMALL else options.count
    chats = read_chats(options.rows, count, options.shots)
    answer = answer_ours if side == "ours" else answer_pipeline
    answers, seconds, tokenizer = answer(chats, int(size), options.max_new_tokens)

    from utils.device_manager import measure_peak_memory

    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers)
    peak = measure_peak_memory("cpu")
    return {"work": work, "seconds": seconds, "tokens": tokens, "peak": peak, "prompts": len(chats), "answers": answers}


def answer_ours(chats: list[list[dict[str, str]]], size: int, longest: int) -> tuple[list[str], float, Any]:
    """Answers, seconds, and the tokenizer; prompts are encoded and answers decoded within the time."""
    from config.structured_config import GenerationSection
    from utils.model_source import DEFAULT_MODEL
    from utils.session import load_plain

    generation = GenerationSection(max_new_tokens=longest)
    loaded = load_plain(DEFAULT_MODEL, generation)
    responder = loaded.open_session().responder
    started = time.perf_counter()
    prompts = [loaded.tokenizer.encode_prompt(chat) for chat in chats]
    ids = loaded.backend.generate(loaded.model, prompts, responder.settings, size)
    answers = [loaded.tokenizer.decode(new) for new in ids]
    return answers, time.perf_counter() - started, loaded.tokenizer.tokenizer


def answer_pipeline(chats: list[list[dict[str, str]]], size: int, longest: int) -> tuple[list[str], float, Any]:
    """The same by transformers' pipeline, with the threads that torch takes by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    from config.structured_config import ModelSection
    from utils.model_source import DEFAULT_MODEL, find_model

    folder = find_model(ModelSection(name=DEFAULT_MODEL), "benchmark", with_weights=True).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    started = time.perf_counter()
    found = answer(chats, batch_size=size, max_new_tokens=longest, do_sample=False, return_full_text=False)
    texts = [one[0]["generated_text"] for one in found]
    return texts, time.perf_counter() - started, tokenizer


def format_page(options: argparse.Namespace, found: Sequence[Measurement]) -> list[str]:
    """Table and verdict as Markdown; of several rounds the fastest counts."""
    best: dict[str, Measurement] = {}
    for one in found:
        if one["work"] not in best or one["seconds"] < best[one["work"]]["seconds"]:
            best[one["work"]] = one
    theirs = [one for one in best.values() if one["work"].startswith("pipeline")]
    peer = max(theirs, key=find_speed)
    reference = max(theirs, key=lambda one: (one["prompts"], find_speed(one)))
    ordered = sorted(best.values(), key=lambda one: (one["work"].split("-")[0], int(one["work"].split("-")[1])))
    table = [
        "| | at once | prompts | seconds | new tokens | tokens/s | × best pipeline here | peak GB | same answers |",
        "|---|" * 9,
    ]
    table[1] = "|" + "---|" * 9
    for one in ordered:
        side, _, size = one["work"].partition("-")
        pairs = list(zip(one["answers"], reference["answers"], strict=False))
        same = f"{sum(mine.strip() == theirs.strip() for mine, theirs in pairs)} of {len(pairs)}"
        speed = find_speed(one)
        cells = [
            "Tunebook" if side == "ours" else "pipeline",
            size,
            one["prompts"],
            f"{one['seconds']:.1f}",
            one["tokens"],
        ]
        cells += [f"{speed:.1f}", f"{speed / find_speed(peer):.2f}", f"{one['peak'] / 1e9:.2f}", same]
        table.append(f"| {' | '.join(map(str, cells))} |")
    rounds = max(sum(one["work"] == work for one in found) for work in best)
    sizes = " ".join(map(str, options.sizes))
    rows = options.rows.resolve()
    shown = rows.relative_to(ROOT) if rows.is_relative_to(ROOT) else rows.name
    command = f"python benchmarks/inference.py --rows {shown} --name {options.name} --count {options.count} --few "
    command += (
        f"{options.few} --shots {options.shots} --max-new-tokens {options.max_new_tokens} --sizes {sizes} "
        f"--ours {' '.join(map(str, options.ours))} --rounds {options.rounds} --write"
    )
    which = f"the first {options.count} prompts of the file"
    if options.shots:
        which = f"{options.count} prompts behind the file's first {options.shots} rows as worked examples"
    return [
        f"# Answers to many prompts: `{options.name}`",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}: {describe_machine()}.",
        "",
        *table,
        "",
        f"The embedded SmolLM2-135M-Instruct in float32, {which}, greedy, at most {options.max_new_tokens} new tokens.",
        "Each line is one process; seconds are those of answering, without loading the model. The fastest of "
        f"{rounds} round(s) counts.",
        "New tokens are those of the answers' text: padding and what is computed behind a row's end never count.",
        f"Same answers: compared with `{reference['work']}`. Rows of other batches are rounded otherwise, so that two nearly",
        "equal tokens may change places.",
    ]


def find_speed(one: Measurement) -> float:
    """New tokens a second."""
    return float(one["tokens"] / one["seconds"])


def describe_machine() -> str:
    """Processor, cores and versions."""
    from benchmarks.rows import describe_machine as describe
    from utils.threads import count_cores

    return f"{count_cores()} cores, {describe('torch', 'transformers')}"


if __name__ == "__main__":
    sys.exit(main())

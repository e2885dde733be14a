"""Ask a trained model: one prompt, a file of prompts, or a conversation.

    python scripts/infer.py --prompt "books(title, author, price)\nHow many books are there?"
    python scripts/infer.py --prompts data/text_to_sql/eval.jsonl --out answers.jsonl
    python scripts/infer.py
    python scripts/infer.py --model embedded/smollm2-135m-instruct --prompt "What is the capital of France?"
    python scripts/infer.py --model embedded/smollm2-135m-instruct --adapter my_adapter --prompt "Hello"

Without --run or --model the latest run answers. Without a prompt a conversation starts: /reset forgets it, /exit ends it. An
adapter may be in the format of PEFT or of mlx-lm; if a chat template lies beside it, that is what prompts are rendered with.
In --prompt, \\n is a line break. A reward model (method: reward) scores the answers of --prompts instead of writing some.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from utils import cli
from utils.exceptions import RunError
from utils.run_folder import find_run

if TYPE_CHECKING:
    from utils.session import LoadedModel


def main(arguments: Sequence[str] | None = None) -> int:
    """Opens the model and answers; returns the exit code."""
    parser = cli.make_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    cli.add_run_argument(which)
    cli.add_base_arguments(parser, which)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer is streamed")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="rows (prompt or messages), or one prompt a line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --prompts: write JSONL here instead of printing")
    cli.add_override_argument(parser, "override a value of the run's recipe, such as generation.temperature=0.7")
    cli.add_trust_argument(parser)
    options = cli.parse_base_arguments(parser, arguments, both=False)
    if options.out and not options.prompts:
        parser.error("--out needs --prompts")
    folder = None if options.model else find_run(options.run)
    if folder:
        cli.check_run_overrides(options.overrides)
    generation = None if folder else cli.read_generation(options.overrides)
    loaded = folder.load_recipe(options.overrides, trusts_code=options.trusts_code) if folder else None

    from utils.session import judges_answers, load_plain, load_run, read_prompts

    def load() -> LoadedModel:
        return load_run(folder, loaded) if folder and loaded else load_plain(options.model, generation, options.adapter)

    if loaded.recipe.reward if loaded else judges_answers(options.model):
        cli.write_lines(score(options.prompts, options.model or str(folder and folder.path), load), options.out)
        return 0
    conversations = read_prompts(options.prompts) if options.prompts else []
    session = load().open_session()
    if options.prompt is not None:
        cli.print_stream(session.stream([{"role": "user", "content": options.prompt.replace("\\n", "\n")}]))
    elif options.prompts:
        rows = zip(conversations, session.answer(conversations), strict=True)
        lines = [json.dumps({"messages": turns, "answer": answer}, ensure_ascii=False) for turns, answer in rows]
        cli.write_lines(lines, options.out)
    else:
        cli.hold_conversation(session.stream)
    return 0


def score(prompts: Path | None, where: str, load: Callable[[], LoadedModel]) -> list[str]:
    """A reward model's rewards of the answers in a file, as lines of JSON; the file is read before the model."""
    from utils.scoring import read_answers

    if prompts is None:
        message = "a reward model scores answers, and writes none"
        fix = "name rows that hold answers with --prompts: messages, prompt and completion, or chosen and rejected"
        raise RunError(message, where=where, fix=fix, code="no-answers")
    answers = read_answers(prompts)
    rewards = zip(answers, load().open_judge().score(answers), strict=True)
    return [json.dumps({"messages": row.messages, "reward": found}, ensure_ascii=False) for row, found in rewards]


if __name__ == "__main__":
    cli.run(main)

"""What every script shares: arguments, exit codes, and errors that are one clear line."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

from config.structured_config import GenerationSection
from utils.exceptions import RecipeError, RunError, TunebookError
from utils.logging import hide_in_values, hide_secrets, set_up_logging, show_bug, show_controls
from utils.stop_signals import NUMBERS, SignalExit, end_script, received

STARTED = time.time()  # seconds since the epoch; scripts import this module first, so it is the run's beginning
# How a finished run answers; everything else is what was trained.
ANSWERING = ("generation", "evaluation.batch_size", "model.dtype", "data.system", "seed", "backend")
INTERRUPTED = 128 + signal.SIGINT


class Parser(argparse.ArgumentParser):
    """argparse's parser, which quotes what was typed: a token may be among it."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the error, and ends the script with code 2."""
        super().error(hide_secrets(message))


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the module's docstring as written, commands included."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_recipe_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds `--recipe` and `--set`, the same in every script that reads a recipe."""
    parser.add_argument("--recipe", required=required, type=Path, metavar="FILE", help="the YAML recipe, see recipes/")
    add_override_argument(parser, "override one value, such as training.epochs=1; may be repeated")


def add_override_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds `--set`."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=text)


def read_name(text: str) -> str:
    """A name of a model or of data; an empty one is most often a shell variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def show_train_command(options: argparse.Namespace) -> str:
    """The command that trains what was just looked at, overrides included, ready to be copied."""
    words = ["python", "scripts/train.py", "--recipe", str(options.recipe)]
    for override in options.overrides:
        words += ["--set", override]
    return hide_secrets(shlex.join(words))


def add_run_argument(parser: argparse._ActionsContainer) -> None:
    """Adds `--run`, the run folder to read."""
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder under outputs/ (default: the latest run)")


def add_base_arguments(parser: argparse._ActionsContainer, which: argparse._ActionsContainer) -> None:
    """Adds `--model` beside `--run`, and `--adapter`, in either format."""
    text = "a model that is no run: folder, hub id or embedded/<name>"
    which.add_argument("--model", type=read_name, metavar="NAME", help=text)
    text = "with --model: an adapter on it, in the format of PEFT or mlx-lm, or the run that trained one"
    parser.add_argument("--adapter", type=read_name, metavar="DIR", help=text)


def parse_base_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, both: bool
) -> argparse.Namespace:
    """Parses, and sees to it that an adapter has the model that it stands on.

    Args:
        both: a model is of no use here without an adapter.
    """
    options = parser.parse_args(arguments)
    if options.adapter and not options.model:
        parser.error("--adapter needs --model: the base that it was trained on")
    if both and options.model and not options.adapter:
        parser.error("--model needs --adapter")
    return options


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust-remote-code` to scripts that open a run: its recipe alone cannot switch code on."""
    text = "let Python code run that comes with the run's model, where its recipe asks for that"
    parser.add_argument("--trust-remote-code", action="store_true", dest="trusts_code", help=text)


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Runs a script: loads `.env`, prints errors as lines with a fix, and exits with the documented code."""
    for number in NUMBERS:
        if number != signal.SIGINT:  # Python's own handler: a conversation goes on when an answer is interrupted
            signal.signal(number, end_script)
    sys.excepthook = show_bug
    try:
        load_environment()
        set_up_logging()
        code = main(None) or 0
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = INTERRUPTED
    except SignalExit as error:
        code = say_stopped(error.number)
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say, and Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if received:  # a library has replaced our exception by one of its own
            code = say_stopped(received[-1])
        elif isinstance(error, TunebookError):
            report_error(error, as_json="--json" in sys.argv)
            code = error.exit_code
        else:
            raise
    if code > 128:  # ended by a signal: threads that still compute an answer or a batch are not waited for
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def say_stopped(number: int) -> int:
    """Says which signal has ended the script, and gives its exit code."""
    print(f"\nStopped by {signal.Signals(number).name}.", file=sys.stderr)
    return 128 + number


def load_environment() -> None:
    """Reads `.env` of the working directory; what the environment already sets wins."""
    if Path(".env").is_file():
        from dotenv import load_dotenv

        load_dotenv(".env")


def report_error(error: TunebookError, *, as_json: bool) -> None:
    """Prints the problems: JSON for programs on stdout, lines for people on stderr."""
    if as_json:
        answer = {"ok": False, "problems": [problem.to_json() for problem in error.problems]}
        print(json.dumps(hide_in_values(answer), indent=2))
        return
    for problem in error.problems:
        print(show_controls(hide_secrets(f"error: {problem}")), file=sys.stderr)


def check_run_overrides(overrides: Sequence[str]) -> None:
    """Refuses to change what a finished run was trained with: it would be ignored, or another model would answer.

    Raises:
        RecipeError: a key that does not say how to answer.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in ANSWERING and not key.startswith("generation."):
            message = "this is part of what was trained, and cannot be changed afterwards"
            fix = f"leave it out; what can be set here: generation.…, {', '.join(ANSWERING)}"
            raise RecipeError(message, where=f"--set {key}", fix=fix, code="override")


def read_generation(overrides: Sequence[str]) -> GenerationSection:
    """Generation settings from `--set generation.…` alone, for models without a recipe.

    Raises:
        RecipeError: another key, a bad value, or settings that would be ignored.
    """
    from config.recipe_io import apply_override, list_rule_problems, load_values
    from config.recipe_rules import find_generation_violations
    from config.yaml_reader import YamlDocument

    document = YamlDocument({}, {(): 1})
    for override in overrides:
        if not override.startswith("generation."):
            raise RecipeError(f"--set {override}: a plain model has generation settings only", fix="--set generation.…")
        apply_override(document, override)
    generation = load_values(GenerationSection, document, "generation")
    if violations := list(find_generation_violations(generation)):
        raise RecipeError.from_problems(list_rule_problems(violations, lambda key: f"--set {key}"))
    return generation


def print_stream(pieces: Generator[str, None, None]) -> None:
    """Prints text as it arrives; Ctrl-C ends what makes it."""
    with closing(pieces):
        for piece in pieces:
            print(show_piece(piece), end="", flush=True)
    print()


def show_piece(piece: str) -> str:
    """A piece of an answer; on a terminal, a model must not command it."""
    return show_controls(piece) if sys.stdout.isatty() else piece


def write_lines(lines: Sequence[str], target: Path | None) -> None:
    """Prints lines, or writes them to a file in one step."""
    if target is None:
        print("\n".join(lines))
        return
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(target), fix="name another file") from error
    print(f"{len(lines)} answers in {target}")


def hold_conversation(stream: Callable[[list[dict[str, str]]], Iterable[str]]) -> None:
    """Reads prompts from the terminal until /exit or the end of input; Ctrl-C stops only the answer."""
    messages: list[dict[str, str]] = []
    print("Type a message; /reset forgets the conversation, /exit ends it.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            messages = []
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text.replace("\\n", "\n")})
        pieces: list[str] = []
        try:
            for piece in stream(messages):
                pieces.append(piece)
                print(show_piece(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except TunebookError as error:
            report_error(error, as_json=False)
            messages.pop()
            continue
        print()
        messages.append({"role": "assistant", "content": "".join(pieces).strip() or "(nothing)"})

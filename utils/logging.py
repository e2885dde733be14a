"""One place that decides what is printed: rich lines on a terminal, plain lines in a file, third parties kept quiet."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.exceptions import MachineError

NAME = "tunebook"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
QUIET = (
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "urllib3",
    "matplotlib",
    "wandb",
    "bitsandbytes",  # says at each 8-bit product that float32 is cast
    "filelock",
)
# What keeps libraries from reporting to their makers. They read it when they are imported, so it is set before that; Tunebook
# itself reports nothing to anybody. What the environment says already is left as it is.
TELEMETRY_OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # transformers, datasets, peft and trl send theirs through huggingface_hub
    "DO_NOT_TRACK": "1",  # the convention that several tools follow, huggingface_hub among them
    "WANDB_ERROR_REPORTING": "false",  # crash reports and usage metrics; the runs themselves go out only where a recipe asks
}
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)", re.IGNORECASE)
# Tokens of Hugging Face, OpenAI and Anthropic, Weights & Biases, GitHub, GitLab, Slack, AWS and Google; what follows «Bearer».
SECRET_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v\d_[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{30,})\b|(?<=\bBearer )[A-Za-z0-9._~+/-]{16,}"
)
CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"<>]+(?=@)")  # of an address: `user:password` between `//` and `@`
HIDDEN = "[hidden]"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks: some of them command a terminal


class SecretFormatter(logging.Formatter):
    """Hides secrets in the finished text, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging for every line."""
        return show_controls(hide_secrets(super().format(record)))


def hide_secrets(text: str) -> str:
    """Text without the values of environment variables named like secrets, token-shaped words, and credentials in addresses."""
    for value in list_secrets():
        text = text.replace(value, HIDDEN)
    return CREDENTIALS.sub(HIDDEN, SECRET_SHAPE.sub(HIDDEN, text))


def show_controls(text: str) -> str:
    """Text in which control characters are written out: in a row or a template, they could command a reader's terminal."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def list_secrets() -> list[str]:
    """Values of environment variables named like secrets, also as JSON, Python and YAML write them; the longest first.

    A short secret may be the beginning of a longer one. `.env` has been read into the environment by then.
    """
    values = {value for name, value in os.environ.items() if len(value) >= 8 and SECRET_NAME.search(name)}
    written = {
        form for value in values for form in (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value))
    }
    written |= {f"'{value.replace(chr(39), chr(39) * 2)}'" for value in values}
    return sorted(values | {form[1:-1] for form in written}, key=len, reverse=True)


def hide_in_values(value: Any) -> Any:
    """A copy of nested JSON values in which every text has its secrets hidden."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {key: hide_in_values(item) for key, item in value.items()}
    return [hide_in_values(item) for item in value] if isinstance(value, list | tuple) else value


def show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of a fault of ours as Python does, secrets hidden: `sys.excepthook` of every script."""
    print(hide_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def get_logger() -> logging.Logger:
    """The project's logger."""
    return logging.getLogger(NAME)


def set_up_logging(level: str = "INFO") -> None:
    """Prepares terminal output and silences libraries; safe to call twice.

    Args:
        level: DEBUG, INFO, WARNING or ERROR; TUNEBOOK_LOG_LEVEL overrides it.

    Raises:
        MachineError: the environment names a level that does not exist.
    """
    # Progress bars and advice of libraries would interleave with ours; their warnings still reach the log file.
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logger = get_logger()
    level = (os.environ.get("TUNEBOOK_LOG_LEVEL") or level).upper()
    if level not in LEVELS:
        fix = f"set it to one of {', '.join(LEVELS)}"
        raise MachineError(f"{level} is no log level", where="TUNEBOOK_LOG_LEVEL", fix=fix, code="environment")
    logger.setLevel(level)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(make_terminal_handler())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def make_terminal_handler() -> logging.Handler:
    """Rich on a terminal, plain `time level message` lines everywhere else."""
    handler: logging.Handler
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
        handler.setFormatter(SecretFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(SecretFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: that is said once on the terminal, and never ends what is logged about."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging where a line cannot be written."""
        if not self.has_failed:
            self.has_failed = True
            print(f"warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        """Closes the file, whatever has become of lines that found no room."""
        with suppress(OSError):
            super().close()


def add_log_file(path: Path) -> logging.Handler:
    """Copies every line, with date and level, into a plain file; warnings of libraries go there too."""
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(SecretFormatter("%(asctime)s %(levelname)s %(message)s"))
    get_logger().addHandler(handler)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(handler)
    logging.getLogger("py.warnings").propagate = False
    return handler


def remove_log_file(handler: logging.Handler) -> None:
    """Ends what `add_log_file` began: lines and warnings of a later run in this process are none of that file's."""
    get_logger().removeHandler(handler)
    logging.getLogger("py.warnings").removeHandler(handler)
    logging.captureWarnings(False)
    handler.close()

"""Lines in a log file carry date and level, and no secret gets into them."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.logging import HIDDEN, NAME, add_log_file, get_logger, hide_in_values, hide_secrets, remove_log_file

ROOT = Path(__file__).resolve().parents[2]
SECRET = "correct-horse-battery"


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """A log file behind the project's logger, which is put back as it was."""
    logger, captured = get_logger(), logging.getLogger("py.warnings")
    before, handlers = (logger.level, captured.propagate), logger.handlers[:]
    logger.setLevel("INFO")
    # A filter changes the record itself, so a terminal handler set up by another test would hide the secrets first.
    logger.handlers.clear()
    handler = add_log_file(tmp_path / "log.txt")
    yield tmp_path / "log.txt"
    logger.removeHandler(handler)
    captured.removeHandler(handler)
    logging.captureWarnings(False)
    handler.close()
    logger.handlers[:] = handlers
    logger.setLevel(before[0])
    captured.propagate = before[1]


def test_lines_are_plain_with_date_and_level(log_file: Path) -> None:
    get_logger().info("Step %d: loss %.2f, 50 %% done", 3, 1.5)
    get_logger().warning("Größe 🎵")
    get_logger().debug("not asked for")
    first, second = log_file.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO Step 3: loss 1\.50, 50 % done", first)
    assert second.endswith(" WARNING Größe 🎵")


def test_a_closed_file_gets_nothing_of_a_later_run(log_file: Path, tmp_path: Path) -> None:
    # The handler for warnings stayed, so a warning of the second run stood in the log.txt of the first as well.
    earlier = tmp_path / "earlier.txt"
    remove_log_file(add_log_file(earlier))
    later = add_log_file(tmp_path / "later.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of the later run", UserWarning, stacklevel=1)
    get_logger().warning("and a line")
    remove_log_file(later)
    assert earlier.read_text() == ""
    assert "of the later run" in (tmp_path / "later.txt").read_text()


def test_warnings_of_libraries_reach_the_file(log_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("something is odd", UserWarning, stacklevel=1)
    assert "UserWarning: something is odd" in log_file.read_text()


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "MY_API_KEY", "wandb_api_key", "DB_PASSWORD", "CLIENT_SECRET_2", "AWS_CREDENTIALS"]
)
def test_the_value_of_a_secret_variable_is_hidden_in_the_file(
    log_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, SECRET)
    get_logger().info("in the text: %s", f"https://user:{SECRET}@host/")
    get_logger().warning("as it is: " + SECRET)
    text = log_file.read_text()
    assert SECRET not in text
    assert f"https://{HIDDEN}@host/" in text


@pytest.mark.parametrize(
    "token",
    [
        *("hf_" + "aB3" * 10, "sk-" + "aB3" * 10, "sk-proj-" + "a_B-3" * 8, "sk-ant-api03-" + "aB-3" * 8),
        *("wandb_v1_" + "aB3" * 10, "ghp_" + "aB3" * 12, "github_pat_" + "aB3" * 12, "glpat-" + "aB3" * 7),
        *("xoxb-" + "123-" * 5 + "aB3", "AKIA" + "A1B2" * 4, "AIza" + "aB3" * 12),
    ],
)
def test_what_looks_like_a_token_is_hidden_without_any_variable(log_file: Path, token: str) -> None:
    get_logger().info("Login with %s failed (%s)", token, {"token": token})
    text = log_file.read_text()
    assert token not in text
    assert text.count(HIDDEN) == 2


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub",
        "task-specific",
        "step-100",
        "sha 0123abcd",
        "a" * 39 + "g",
        "b" * 64,
        "0123456789abcdef" * 2 + "01234567",
        "loss 0.1234567",
    ],
)
def test_plain_words_and_numbers_are_not_hidden(text: str) -> None:
    assert hide_secrets(text) == text


def test_short_and_harmless_variables_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("MY_FOLDER", "/some/long/folder")
    assert hide_secrets("false /some/long/folder") == "false /some/long/folder"


def test_a_secret_that_begins_like_another_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # Values were replaced in the order of the environment: the shorter one first, so the longer one's end was printed.
    monkeypatch.setenv("A_TOKEN", "correct-horse")
    monkeypatch.setenv("B_TOKEN", "correct-horse-battery-staple")
    assert hide_secrets("x correct-horse-battery-staple y") == f"x {HIDDEN} y"


def test_a_secret_in_a_traceback_is_hidden(log_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The filter looked at the message only; the handler then adds the traceback, which quotes the error.
    monkeypatch.setenv("HF_TOKEN", SECRET)
    try:
        raise ValueError(f"401 for https://user:{SECRET}@host/")
    except ValueError:
        get_logger().exception("The request failed")
    text = log_file.read_text()
    assert "The request failed" in text
    assert SECRET not in text


def test_the_terminal_gets_plain_lines_without_secrets_and_once_each() -> None:
    code = (
        "from utils.logging import get_logger, set_up_logging\n"
        "set_up_logging(); set_up_logging()\n"
        "get_logger().info('Hello %s', 'correct-horse-battery')\n"
        "get_logger().debug('quiet')\n"
    )
    environment = {**os.environ, "HF_TOKEN": SECRET}
    environment.pop("TUNEBOOK_LOG_LEVEL", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO Hello \[hidden\]\n", done.stderr)


def test_the_level_can_be_set_in_the_environment() -> None:
    code = "from utils.logging import get_logger, set_up_logging\nset_up_logging()\nget_logger().debug('fine detail')\n"
    environment = {**os.environ, "TUNEBOOK_LOG_LEVEL": "debug"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=True)
    assert "DEBUG fine detail" in done.stderr


def test_the_logger_has_the_projects_name() -> None:
    assert get_logger().name == NAME == "tunebook"


def test_what_bitsandbytes_says_at_every_8_bit_product_is_not_shown() -> None:
    assert not logging.getLogger("bitsandbytes.autograd._functions").isEnabledFor(logging.WARNING)


def test_credentials_in_an_address_and_behind_bearer_are_hidden() -> None:
    assert hide_secrets("GET https://me:pass@host/x failed") == f"GET https://{HIDDEN}@host/x failed"
    assert hide_secrets("postgres://u@host and a@b.c") == f"postgres://{HIDDEN}@host and a@b.c"
    assert hide_secrets("https://host/x?mail=a@b") == "https://host/x?mail=a@b"
    assert hide_secrets("Authorization: Bearer abcdefghij0123456789") == f"Authorization: Bearer {HIDDEN}"


def test_a_secret_is_hidden_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "p\\a\"s's\nwörd"
    monkeypatch.setenv("MY_PASSWORD", secret)
    for written in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        assert "rd" not in hide_secrets(f"<{written}>")
    nested = {"a": [secret, {"b": (secret, 3)}], "c": None}
    assert hide_in_values(nested) == {"a": [HIDDEN, {"b": [HIDDEN, 3]}], "c": None}


def test_a_bug_of_ours_prints_its_traceback_without_secrets() -> None:
    code = (
        "import sys\nsys.path.insert(0, '.')\nfrom utils import cli\n"
        "def main(arguments):\n    raise KeyError('the token is canary-in-a-token')\n"
        "cli.run(main)\n"
    )
    environment = {**os.environ, "HF_TOKEN": "canary-in-a-token"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"KeyError: 'the token is {HIDDEN}'" in done.stderr
    assert "canary" not in done.stderr + done.stdout


def test_control_characters_are_written_out_and_tabs_and_lines_stay(log_file: Path) -> None:
    get_logger().info("a\x1b[2Jb\tc\nd\x07\x9be")
    assert "a\\x1b[2Jb\tc\nd\\x07\\x9be" in log_file.read_text()

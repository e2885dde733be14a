"""What the documents tell people to type and to open exists."""

import functools
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from config.recipe_io import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
FENCE = re.compile(r"^\s*```[^\n]*\n(.*?)^\s*```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
IMAGE = re.compile(r"(?:src|href)=\"([^\"]+)\"")
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
RECIPE_PATH = re.compile(r"\brecipes/[\w.-]+\.yaml\b")
PYTHONS = ("python", "python3", ".venv/bin/python")
EVERY_DOCUMENT = pytest.mark.parametrize("name", DOCUMENTS)


def read_document(name: str) -> str:
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return path.read_text(encoding="utf-8")


def list_commands(name: str) -> list[list[str]]:
    """Words of every line in a fenced block that calls make or python, continued lines joined and comments cut."""
    found = []
    for block in FENCE.findall(read_document(name)):
        for line in block.replace("\\\n", " ").splitlines():
            parts = re.split(r"\s(?:&&|;|\|)\s", line.strip().removeprefix("$ "))
            starts = ("make ", *(f"{python} " for python in PYTHONS))
            found += [shlex.split(part, comments=True) for part in parts if part.startswith(starts)]
    return found


@functools.lru_cache
def read_help(script: Path) -> str:
    """What `--help` of a script prints."""
    return subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout


def check_make(words: list[str]) -> None:
    """The targets and variables of a make line exist, and what RECIPE and ARGS hold is valid."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(TARGET.findall(makefile))
    for word in words[1:]:
        variable, equals, value = word.partition("=")
        if not equals:
            assert word in targets, f"make {word}"
            continue
        assert re.search(rf"^{variable} *\??=", makefile, re.MULTILINE), f"the Makefile has no {variable}"
        if variable == "ARGS":
            script = find_script(makefile, next(part for part in words[1:] if "=" not in part))
            check_options(script, shlex.split(value))


def find_script(makefile: str, target: str) -> Path:
    """The script that a make target runs."""
    found = re.search(rf"^{target}:[^\n]*\n\t@?\$\(PY\) ((?:scripts|benchmarks)/\w+\.py)", makefile, re.MULTILINE)
    assert found, f"make {target} runs no script"
    return ROOT / found[1]


def check_options(script: Path, words: list[str]) -> None:
    """Every option exists; a recipe that the repository ships must load with the line's overrides."""
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", read_help(script)), f"{script.name} {option}"
    pairs = list(itertools.pairwise(words))
    recipe = next((value for option, value in pairs if option == "--recipe"), None)
    if recipe is not None and (ROOT / recipe).is_file():
        load_recipe(ROOT / recipe, [value for option, value in pairs if option == "--set"])


@EVERY_DOCUMENT
def test_every_command_that_is_shown_exists(name: str) -> None:
    commands = list_commands(name)
    assert commands, f"{name} shows no command"
    for words in commands:
        if words[0] == "make":
            check_make(words)
        elif words[1] == "-m":
            assert words[2] in ("pytest", "venv", "pip", "ruff", "mypy"), words
        elif words[1].endswith(".py"):
            script = ROOT / words[1]
            assert script.is_file(), f"{words[1]} does not exist"
            check_options(script, words[2:])


@EVERY_DOCUMENT
def test_every_recipe_that_is_named_exists(name: str) -> None:
    examples = {"recipes/my.yaml", "recipes/mine.yaml", "recipes/my_task.yaml"}  # the reader makes these
    named = set(RECIPE_PATH.findall(read_document(name))) - examples
    assert {path for path in named if not (ROOT / path).is_file()} == set()


@EVERY_DOCUMENT
def test_every_link_to_a_file_leads_somewhere(name: str) -> None:
    text = read_document(name)
    targets = {link.partition("#")[0] for link in [*LINK.findall(text), *IMAGE.findall(text)]}
    relative = {target for target in targets if target and "://" not in target and not target.startswith("mailto:")}
    assert {target for target in relative if not (ROOT / target).exists()} == set()


@EVERY_DOCUMENT
def test_every_link_within_the_page_leads_to_a_heading(name: str) -> None:
    text = read_document(name)
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {link[1:] for link in LINK.findall(text) if link.startswith("#")} <= anchors


def test_every_make_target_says_what_it_does_and_is_declared() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    declared = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert declared
    assert set(TARGET.findall(makefile)) == set(declared[1].split())
    for target in declared[1].split():
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), f"make {target} has no description"


def test_every_make_target_that_runs_a_script_names_one_that_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = re.findall(r"\$\(PY\) ([\w/]+\.py)", makefile)
    assert scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []

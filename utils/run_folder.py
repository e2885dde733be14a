"""The run folder: everything that a run leaves behind, complete enough to repeat it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from config.recipe_io import LoadedRecipe, format_resolved, load_recipe
from utils.atomic_files import explain_disk_errors, flush, write_text_atomically
from utils.exceptions import RunError
from utils.json_lines import append_line, read_lines
from utils.logging import get_logger, hide_in_values, hide_secrets
from utils.model_safety import check_run_links
from utils.model_source import ModelSource

OUTPUTS = Path("outputs")
LATEST = "latest"
PACKAGES = ("transformers", "numpy", "tokenizers", "safetensors", "pydantic")
BACKEND_PACKAGES = {"torch": ("torch", "peft", "accelerate"), "mlx": ("mlx", "mlx-lm")}


class RunFolder:
    """Paths and small writers of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.run_file = path / "run.json"
        self.metrics_file = path / "metrics.jsonl"
        self.skipped_file = path / "skipped.jsonl"
        self.line_files = (self.metrics_file, self.skipped_file)
        self.log_file = path / "log.txt"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.report_file = path / "report.md"
        self.report_json = path / "report.json"

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Writes run.json in one piece."""
        write_text_atomically(self.run_file, json.dumps(hide_in_values(facts), indent=2, allow_nan=False) + "\n")

    def read_facts(self) -> dict[str, Any]:
        """Reads run.json."""
        try:
            facts = json.loads(self.run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"run.json cannot be read: {error}", where=str(self.path), code="no-run") from error
        if not isinstance(facts, dict):
            raise RunError("run.json is not a JSON object", where=str(self.path), code="no-run")
        return facts

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl; closing the file hands it to the system at once."""
        append_line(self.metrics_file, row)

    def append_skipped(self, row: dict[str, Any]) -> None:
        """Adds a step that was not taken to skipped.jsonl."""
        append_line(self.skipped_file, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl.

        Raises:
            RunError: a row holds something other than finite numbers, marks and nulls.
        """
        rows = read_lines(self.metrics_file)
        for number, row in enumerate(rows, start=1):
            if odd := next((name for name, value in row.items() if not is_metric(value)), None):
                fix = "restore the file from a copy: the run wrote something else"
                message = f"{odd} is no finite number"
                raise RunError(message, where=f"{self.metrics_file}:{number}", fix=fix, code="no-run")
        return rows

    def count_skipped_steps(self) -> int:
        """Steps that were not taken so far."""
        return len(read_lines(self.skipped_file))

    @property
    def resume_command(self) -> str:
        """What continues this run."""
        return shlex.join(["python", "scripts/train.py", "--resume", str(self.path)])

    def measure_lines(self) -> dict[str, int]:
        """Bytes of each of `line_files`, once all of them are on the disk."""
        sizes = {}
        for path in self.line_files:
            if path.exists():
                flush(path)
                sizes[path.name] = path.stat().st_size
        return sizes

    def cut_lines(self, sizes: Any) -> None:
        """Takes back the lines that were written after `measure_lines`: their steps run again."""
        for path in self.line_files:
            size = sizes.get(path.name, 0) if isinstance(sizes, dict) else 0
            found = path.stat().st_size if path.exists() else 0
            if isinstance(size, int) and 0 <= size < found:
                os.truncate(path, size)
            elif size != found:  # the weights are whole, so the run goes on
                get_logger().warning("%s lacks lines that it had at the checkpoint", path)

    def load_recipe(self, overrides: Sequence[str] = (), *, trusts_code: bool = False) -> LoadedRecipe:
        """The resolved recipe of this run.

        Args:
            trusts_code: the user's own word that code of the model may run. The recipe of a run cannot give it: a run folder is
                handed about, and whoever wrote it chose both the model and this line.

        Raises:
            RunError: the recipe trusts code, and the user has not said so.
        """
        loaded = load_recipe(self.recipe_file, overrides)
        if loaded.recipe.model.trust_remote_code and not trusts_code:
            message = f"this run loads {loaded.recipe.model.name} with Python code that comes with it"
            fix = "if you know that code, add --trust-remote-code"
            raise RunError(message, where=loaded.find_origin("model.trust_remote_code"), fix=fix, code="trust")
        return loaded

    def check_base(self, source: ModelSource) -> None:
        """Refuses a base that is not the one that the run was trained on; a run of an older version may not know.

        Args:
            source: the base with its weights, and with the adapter that is folded into it.

        Raises:
            RunError: other weights, or another adapter.
        """
        facts = self.read_facts()
        for key, recipe_key, found in (
            ("model_hash", "model.name", source.hash_weights()),
            ("adapter_hash", "model.adapter", source.hash_adapter()),
        ):
            if facts.get(key, found) != found:
                message = f"{recipe_key} no longer holds the weights that this run was trained on"
                where = str(source.adapter if key == "adapter_hash" else source.folder)
                fix = f"put them back, name their place in {self.recipe_file}, or train again"
                raise RunError(message, where=where, fix=fix, code="base-changed")

    def check_data(self, contents: Mapping[str, str | None]) -> None:
        """Refuses held-out rows that are not the run's own; a run of an older version may not know.

        Without `data.eval` they are drawn from the training rows, and drawn anew from other rows they would be rows that were
        trained on. A file of `data.eval` is what the best weights were chosen by; beside it, training rows may change.

        Args:
            contents: hash of all rows that `data.train` (`train`) and `data.eval` (`eval`) name; None where it names none.

        Raises:
            RunError: other rows.
        """
        drawn = contents["eval"] is None
        name, key, found = (
            ("train", "data_hash", contents["train"]) if drawn else ("eval", "eval_hash", contents["eval"])
        )
        if self.read_facts().get(key, found) == found:
            return
        message = f"the rows of data.{name} have changed since the run"
        if drawn:
            message += ": held-out rows drawn from them now may be rows that it was trained on"
        fix = "restore the files, or train again"
        raise RunError(message, where=str(self.path), fix=fix, code="data-changed")

    def check_complete(self) -> None:
        """Refuses a run that left no weights behind, or an adapter that must not be read: its base takes long to load.

        Raises:
            RunError: it failed or is still running.
            AdapterError: the adapter is damaged, a pickle, or chooses code.
        """
        if self.adapter.is_dir():
            from utils.adapter_source import check_files, read_adapter_config

            check_files(self.adapter, str(self.adapter))
            read_adapter_config(self.adapter, str(self.adapter))
        elif not self.model.is_dir():
            status = self.read_facts().get("status", "unknown")
            fix = "choose another run with --run, or train again"
            raise RunError(
                f"this run has no trained weights (status: {status})", where=str(self.path), fix=fix, code="no-run"
            )


def is_metric(value: Any) -> bool:
    """True for what a row of metrics.jsonl may hold; `append_metrics` writes nothing else."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def create_run_folder(loaded: LoadedRecipe, asked: Path | None) -> RunFolder:
    """Creates the folder of a new run and writes the resolved recipe into it.

    Args:
        asked: the folder named with --run, which must not exist; None makes outputs/<recipe>/<time>.

    Raises:
        RunError: the folder exists already or cannot be created.
    """
    path = asked or choose_run_path(loaded.name)
    try:
        path.mkdir(parents=True, exist_ok=False)
    except FileExistsError as error:
        fix = "name a folder that does not exist yet; a run never overwrites another"
        raise RunError("the run folder exists already", where=str(path), fix=fix, code="run-exists") from error
    except OSError as error:
        message = f"the run folder cannot be created: {error.strerror}"
        raise RunError(message, where=str(path), fix="name another folder with --run", code="disk") from error
    folder = RunFolder(path)
    with explain_disk_errors(path, "free disk space, or name another folder with --run"):
        write_text_atomically(folder.recipe_file, hide_secrets(format_resolved(loaded)))
    return folder


def choose_run_path(name: str) -> Path:
    """outputs/<recipe>/<time>, with a number behind it for a second run in the same second."""
    first = path = OUTPUTS / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}_{number}")
    return path


def check_run_target(asked: Path | None) -> None:
    """Refuses an existing --run folder before any work is done."""
    if asked is not None and asked.exists():
        fix = "name a folder that does not exist yet; a run never overwrites another"
        raise RunError("the run folder exists already", where=str(asked), fix=fix, code="run-exists")


def mark_latest(folder: RunFolder) -> None:
    """Makes this run the one that scripts take when none is named."""
    OUTPUTS.mkdir(exist_ok=True)
    write_text_atomically(OUTPUTS / LATEST, f"{folder.path.resolve()}\n")


def find_run(asked: Path | None) -> RunFolder:
    """The named run, or the latest one that trained something.

    Raises:
        RunError: there is none, or the folder holds no run.
    """
    pointer = OUTPUTS / LATEST
    if asked is None and not pointer.is_file():
        fix = "train first: python scripts/train.py --recipe recipes/smollm2_sql.yaml"
        raise RunError("there is no run yet", where=str(OUTPUTS), fix=fix, code="no-run")
    path = asked or Path(pointer.read_text(encoding="utf-8", errors="replace").strip())
    folder = RunFolder(path)
    try:
        is_run = folder.recipe_file.is_file() and folder.run_file.is_file()
    except OSError as error:
        message, fix = f"the run folder cannot be read: {error.strerror}", "make it readable, or copy it elsewhere"
        raise RunError(message, where=str(path), fix=fix, code="disk") from error
    if not is_run and asked is None:
        fix = f"name another with --run (`ls {OUTPUTS}`), or train again"
        raise RunError("the latest run is not there", where=str(path), fix=fix, code="no-run")
    if not is_run:
        fix = "name a folder that train.py made, or leave --run out for the latest one"
        raise RunError("this is not a run folder", where=str(path), fix=fix, code="no-run")
    check_run_links(path)
    return folder


def collect_versions(engine: str = "tunebook", backend: str = "torch") -> dict[str, str]:
    """Python, platform and the packages that can change a result: those of the back end, and TRL where it is the engine."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (*BACKEND_PACKAGES[backend], *PACKAGES, *(() if engine == "tunebook" else (engine,))):
        versions[name] = importlib.metadata.version(name)
    return versions


def find_git_state() -> dict[str, Any] | None:
    """Commit and whether files were changed since, or None outside a checkout."""
    try:
        commit = run_git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(run_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def run_git(*arguments: str) -> str:
    """Output of a git command in the project's folder."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)  # noqa: S607
    return done.stdout.strip()

"""One run of a side of the speed benchmark, in a new process, and what is written down of it.

From outside come its start and its peak memory; from its own files the rest. Tunebook writes a row of metrics.jsonl at the end
of each step, and the time at which that row appears is the step's end.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.speed_process import Attempt, Execution, execute, find_last_words, watch_lines
from benchmarks.speed_sides import Side
from benchmarks.speed_work import PreparedWork
from utils.allocator import SETTINGS, TUNABLES

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
ENVIRONMENTS = ROOT / ".bench"
INSTALLED = ".installed"
LIBRARIES = {"torch": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx-lm", "transformers")}


@dataclass(frozen=True)
class Measurement:
    """One run of one side, as plain numbers.

    Attributes:
        cold: whether Tunebook had to encode the rows; peers always do what they do.
        started: seconds since the epoch, before the process was made.
        ends: when each step ended, on the same clock.
        tokens: real ones that the side saw in each step, by its own count; `supervised` those that it learned.
        norms: gradient norm of each step before clipping; None where the side keeps none.
        foreign: share of the machine's processor time that others took meanwhile; None where the system does not say.
        error: last words of a run that failed; the rest is then empty.
    """

    side: str
    work: str
    round: int
    cold: bool
    started: float
    ends: list[float]
    tokens: list[int]
    supervised: list[int]
    losses: list[float]
    norms: list[float | None]
    trainable: int
    peak_bytes: int
    dtype: str
    versions: dict[str, str]
    foreign: float | None = None
    error: str | None = None


def prepare_environment(name: str) -> str | None:
    """Makes a peer's environment under .bench/ once; returns why it cannot be made, or None."""
    folder, requirements = ENVIRONMENTS / name, PEERS / f"requirements_{name}.txt"
    wanted = requirements.read_text(encoding="utf-8")
    stamp = folder / INSTALLED
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return None
    print(f"Installing {folder.relative_to(ROOT)} …", flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    options = ["--no-deps"] if wanted.startswith("# pip: --no-deps") else []
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, *options, "-r", str(requirements)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return find_last_words(done.stderr)
    stamp.write_text(wanted, encoding="utf-8")
    return None


def run_side(side: Side, prepared: PreparedWork, attempt: Attempt) -> Measurement:
    """Runs a side once."""
    return (run_tunebook if side.script is None else run_peer)(side, prepared, attempt)


def run_tunebook(side: Side, prepared: PreparedWork, attempt: Attempt) -> Measurement:
    """`scripts/train.py` on the recipe of the work."""
    number, cache, folder = attempt.number, attempt.cache, attempt.folder
    cold, run = not (cache / "filled").exists(), folder / "run"
    recipe = prepared.folder / "recipe.yaml"
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--recipe", str(recipe), "--run", str(run)]
    command += [word for override in side.overrides for word in ("--set", override)]
    ends: list[float] = []
    watch = watch_lines(run / "metrics.jsonl", ends)
    done = execute(command, {"TUNEBOOK_CACHE": str(cache)}, attempt, watch)
    if done.error:
        return make_failure(side, prepared, number, done)
    (cache / "filled").touch()
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {
        "step_ends": ends,
        "tokens": [row["tokens"] for row in rows],
        "supervised_tokens": [row["supervised_tokens"] for row in rows],
        "losses": [math.nan if row["loss"] is None else row["loss"] for row in rows],
        "gradient_norms": [math.nan if row["grad_norm"] is None else row["grad_norm"] for row in rows],
        "trainable_parameters": facts["trainable_parameters"],
        "dtype": facts["dtype"],
        "versions": {name: facts["versions"][name] for name in LIBRARIES[facts["backend"]]},
        "device_bytes": facts["peak_memory_bytes"] if facts["device"] == "cuda" else None,
    }
    return replace(make_measurement(side, prepared, number, done, result), cold=cold)


def run_peer(side: Side, prepared: PreparedWork, attempt: Attempt) -> Measurement:
    """A peer's script on the job of the work."""
    number, folder = attempt.number, attempt.folder
    steps = side.limit_steps(prepared.steps)
    job, target = prepared.write_job(folder, setting=side.setting, steps=steps), folder / "result.json"
    python = ENVIRONMENTS / str(side.environment) / "bin" / "python"
    command = [str(python), str(PEERS / str(side.script)), str(job), str(target)]
    variables = {TUNABLES: SETTINGS} if side.setting == "tuned" else {}
    if side.prepares and number == 0:
        done = execute([*command, "--prepare"], {}, attempt, lambda: None)
        if done.error:
            return make_failure(side, prepared, number, done)
    done = execute(command, variables, attempt, lambda: None)
    if done.error:
        return make_failure(side, prepared, number, done)
    return make_measurement(side, prepared, number, done, json.loads(target.read_text(encoding="utf-8")))


def make_measurement(
    side: Side, prepared: PreparedWork, number: int, done: Execution, result: dict[str, Any]
) -> Measurement:
    """A cold run that has ended well.

    Args:
        result: what a peer's script writes (`benchmarks/peers/peer_job.py`).
    """
    return Measurement(
        side=side.name,
        work=prepared.work.name,
        round=number,
        cold=True,
        started=done.started,
        ends=result["step_ends"],
        tokens=result["tokens"],
        supervised=result["supervised_tokens"],
        losses=result["losses"],
        norms=result["gradient_norms"],
        trainable=result["trainable_parameters"],
        peak_bytes=result["device_bytes"] or done.peak_bytes,
        foreign=done.foreign,
        dtype=result["dtype"],
        versions=result["versions"],
    )


def make_failure(side: Side, prepared: PreparedWork, number: int, done: Execution) -> Measurement:
    """A run that ended with an error."""
    name = prepared.work.name
    return Measurement(side.name, name, number, False, done.started, [], [], [], [], [], 0, 0, "", {}, error=done.error)

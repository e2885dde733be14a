"""The sides of the speed benchmark: Tunebook as users run it, and each peer in an environment of its own.

A side is a command in a new process. From outside come its start and its peak memory; from its own files the rest. Tunebook
writes a row of metrics.jsonl at the end of each step, and the time at which that row appears is the step's end.
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
from benchmarks.speed_work import PreparedWork
from utils.allocator import SETTINGS, TUNABLES
from utils.machine import inspect_machine

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
ENVIRONMENTS = ROOT / ".bench"
INSTALLED = ".installed"
OURS, OURS_ON_MLX = OUR_SIDES = ("tunebook", "tunebook_mlx")
SHORTEST = "short"
LIBRARIES = {"torch": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx-lm", "transformers")}
NOT_MEANT = "not a work of this side"


@dataclass(frozen=True)
class Side:
    """Who does the work.

    Attributes:
        script: in peers/, None for Tunebook.
        environment: folder in .bench/, and `requirements_<environment>.txt` in peers/; None for Tunebook's own.
        setting: what the job says to the script: plain, float32, tuned or liger.
        works: names of the works that it can do; empty for all.
        needs: `cuda` where it does not run without.
        insists_on_bfloat16: where that is not native each step takes minutes, so there it takes two of the shortest work.
        overrides: what Tunebook's recipe gets beside the work's own.
        prepares: whether the script has something to do once before its first run, which is not timed.
        says: how it is set, for the page.
    """

    name: str
    title: str
    script: str | None = None
    environment: str | None = None
    setting: str = "plain"
    works: tuple[str, ...] = ()
    needs: str | None = None
    insists_on_bfloat16: bool = False
    overrides: tuple[str, ...] = ()
    prepares: bool = False
    says: str = ""

    def find_obstacle(self, work: str) -> str | None:
        """Why it does not do a work here, in words; None if it does."""
        if self.needs == "cuda" and inspect_machine().device != "cuda":
            return "needs an NVIDIA GPU"
        if self.crawls_here() and work != SHORTEST:
            return f"bfloat16 is not native here and a step takes minutes; measured on {SHORTEST} alone"
        if self.setting == "float32" and inspect_machine().quick_bfloat16:
            return NOT_MEANT
        return NOT_MEANT if self.works and work not in self.works else None

    def crawls_here(self) -> bool:
        """Whether this machine would emulate what the side computes in."""
        return self.insists_on_bfloat16 and not inspect_machine().quick_bfloat16

    def limit_steps(self, steps: int) -> int:
        """Steps that it takes on this machine; at least two, because the first is not counted."""
        return min(steps, 2) if self.crawls_here() else steps


ADAPTER_WORKS = ("short", "medium", "long")
GPU_WORKS = (*ADAPTER_WORKS, "dpo", "full", "nf4", "gpu")
MLX_WORKS = ("small", "short", "medium")
SIDES = {
    side.name: side
    for side in (
        Side(
            OURS,
            "Tunebook",
            says="`scripts/train.py` with a recipe that names rows, batch, rate and rank, nothing else",
        ),
        Side(
            "trl",
            "TRL as it comes",
            "run_trl.py",
            "trl",
            insists_on_bfloat16=True,
            says="its trainers' own defaults: gradient checkpointing, bfloat16 autocast, one batch of all rows",
        ),
        Side(
            "trl_float32",
            "TRL in float32",
            "run_trl.py",
            "trl",
            setting="float32",
            says="as it comes, with `bf16=False`: what a user changes first where bfloat16 is not native",
        ),
        Side(
            "trl_tuned",
            "TRL tuned",
            "run_trl.py",
            "trl",
            setting="tuned",
            says="no checkpointing, no autocast, rows of like length in micro-batches (of 2 on a CPU), Tunebook's allocator "
            "settings; base and adapters in bfloat16 where that is native",
        ),
        Side(
            "llama_factory",
            "LLaMA-Factory",
            "run_llama_factory.py",
            "llama_factory",
            works=(*ADAPTER_WORKS, "full", "gpu"),
            prepares=True,
            says="its own defaults: gradient checkpointing, one batch of all rows, padding to a multiple of 8; model files "
            "copied in float32 beforehand where bfloat16 is not native, because it computes in their format",
        ),
        Side(
            "litgpt",
            "LitGPT",
            "run_litgpt.py",
            "litgpt",
            works=ADAPTER_WORKS,
            prepares=True,
            says="`finetune_lora` with one batch of all rows, float32 where bfloat16 is not native; model converted beforehand",
        ),
        Side(
            "mlx_lm",
            "mlx-lm",
            "run_mlx_lm.py",
            "mlx_lm",
            works=MLX_WORKS,
            says="adapters in all layers, no pad learned, float32 on a CPU; its mask knows one answer in a row, not several",
        ),
        Side(
            "mlx_lm_plain",
            "mlx-lm as it comes",
            "run_mlx_lm.py",
            "mlx_lm",
            setting="unchanged",
            works=MLX_WORKS,
            says="its own mask, which learns a pad in each padded row, and Adam without bias correction or clipping",
        ),
        Side(
            OURS_ON_MLX,
            "Tunebook on MLX",
            works=MLX_WORKS,
            overrides=("backend=mlx",),
            says="the same recipe with `backend: mlx`; on Linux with torch's matrix products",
        ),
        Side(
            "liger",
            "TRL tuned, with Liger",
            "run_trl.py",
            "trl_liger",
            setting="liger",
            works=GPU_WORKS,
            needs="cuda",
            says="as TRL tuned, with `use_liger_kernel`",
        ),
        Side(
            "unsloth",
            "Unsloth",
            "run_unsloth.py",
            "unsloth",
            setting="tuned",
            works=GPU_WORKS,
            needs="cuda",
            says="its `FastLanguageModel` under TRL's trainers, no checkpointing, all rows of a step at once",
        ),
    )
}


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

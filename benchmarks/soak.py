"""Ends real runs at random moments, lets them go on, and compares the final weights with those of runs that never stopped.

    python benchmarks/soak.py --kills 200 --seed 0 [--write]

Each run is `scripts/train.py` on a tiny model, in a forked process, so that a kill takes about a second and not ten. Two
thirds of the signals are SIGKILL, the others SIGTERM; each comes at a random moment between the start of a process and the time
that a whole run takes. Exit code 1 if a byte of the weights or a row of metrics.jsonl differs. `--write` writes
docs/results/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import describe_machine  # noqa: E402
from benchmarks.tiny_runs import (  # noqa: E402
    count_different_bytes,
    read_metrics,
    start_training,
    wait,
    warm_up,
    write_tiny_recipe,
)
from utils.logging import get_logger, set_up_logging  # noqa: E402
from utils.progress import Progress  # noqa: E402
from utils.threads import count_cores  # noqa: E402

PAGE = ROOT / "docs" / "results" / "soak.md"
STEPS: dict[str, Any] = {"training.max_steps": 16, "training.save_every": 3, "training.eval_every": 4}
CASES: dict[str, dict[str, Any]] = {
    "adapters, bfloat16": {"model.dtype": "bfloat16"},
    "all weights": {"lora": None},
    "preference pairs": {"data.train": "pairs", "training.method": "dpo"},
    # One thread inside an operation: how many are quicker is timed otherwise, and decides the rounding.
    "dropout and noise": {"lora.dropout": 0.2, "training.neftune_alpha": 5.0, "deterministic": True},
}
GOING_ON = re.compile(r"Going on after step (\d+)")


@dataclass
class Counts:
    """What was done to the runs of a case, and what came of it."""

    runs: int = 0
    sigkills: int = 0
    sigterms: int = 0
    resumes: int = 0
    lost_steps: int = 0
    different_bytes: int = 0
    different_rows: int = 0

    @property
    def kills(self) -> int:
        """Signals of both kinds."""
        return self.sigkills + self.sigterms

    def add(self, other: Counts) -> None:
        """Adds the counts of another case."""
        for name, value in other.__dict__.items():
            self.__dict__[name] += value

    def __str__(self) -> str:
        signals = f"{self.kills} kills ({self.sigkills} SIGKILL, {self.sigterms} SIGTERM), {self.resumes} resumes"
        rows = f", {self.different_rows} differing rows" if self.different_rows else ""
        return f"{signals}, {self.lost_steps} lost steps, {self.different_bytes} differing bytes{rows}"


@dataclass
class Soak:
    """The runs of one case.

    Attributes:
        seconds: that a whole run takes.
    """

    name: str
    recipe: Path
    random: random.Random
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)

    @property
    def whole(self) -> Path:
        """The run that never stopped."""
        return self.recipe.parent / "whole"

    @property
    def run(self) -> Path:
        """The run that is killed."""
        return self.recipe.parent / "killed"

    @property
    def log(self) -> Path:
        """Output of the process that runs."""
        return self.recipe.parent / "process.log"

    def start(self) -> int:
        """Starts a run, or lets it go on where it can: its folder is complete."""
        self.log.unlink(missing_ok=True)
        if (self.run / "run.json").is_file():
            self.counts.resumes += 1
            return start_training(["--resume", str(self.run)], self.log)
        shutil.rmtree(self.run, ignore_errors=True)
        return start_training(["--recipe", str(self.recipe), "--run", str(self.run)], self.log)

    def has_finished(self) -> bool:
        """True once run.json says so."""
        path = self.run / "run.json"
        return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8"))["status"] == "finished")

    def count_steps(self) -> int:
        """Steps that metrics.jsonl knows; a line that a kill has cut counts for none."""
        path = self.run / "metrics.jsonl"
        return path.read_text(encoding="utf-8").count('"loss"') if path.is_file() else 0

    def train_whole(self) -> None:
        """Trains the run to compare with."""
        started = time.monotonic()
        self.expect(wait(start_training(["--recipe", str(self.recipe), "--run", str(self.whole)], self.log)), 0)
        self.seconds = time.monotonic() - started

    def kill_once(self) -> bool:
        """Starts a process and ends it at a random moment, unless it has finished by then.

        Returns:
            True if it was ended.
        """
        before = self.count_steps()
        child = self.start()
        number = signal.SIGKILL if self.random.random() < 2 / 3 else signal.SIGTERM
        end = time.monotonic() + self.random.uniform(0, self.seconds)
        code: int | None = None
        while code is None and time.monotonic() < end:
            time.sleep(0.002)
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
        is_ended = code is None
        if code is None:
            os.kill(child, number)
            code = wait(child)
        self.expect(code, 0, *((-number, 128 + number) if is_ended else ()))
        text = self.log.read_text(encoding="utf-8") if self.log.is_file() else ""
        if found := GOING_ON.search(text):
            self.counts.lost_steps += before - int(found[1])
        if is_ended:
            self.counts.sigkills += number == signal.SIGKILL
            self.counts.sigterms += number == signal.SIGTERM
        if self.has_finished():  # a signal may also come after the last word of run.json
            self.compare()
        return is_ended

    def finish(self) -> None:
        """Lets the last run end by itself."""
        self.expect(wait(self.start()), 0)
        self.compare()

    def compare(self) -> None:
        """Compares a run that has ended with the one that never stopped, and clears it away."""
        self.counts.runs += 1
        self.counts.different_bytes += count_different_bytes(self.whole, self.run)
        one, other = read_metrics(self.whole), read_metrics(self.run)
        self.counts.different_rows += sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
        shutil.rmtree(self.run)

    def expect(self, code: int, *allowed: int) -> None:
        """Ends the soak with the log of a process that ended otherwise than it may."""
        if code not in allowed:
            sys.exit(f"{self.name}: exit code {code} instead of {allowed}\n{self.log.read_text(encoding='utf-8')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills, compares, and says what came of it in its last line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="signals in all (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals (default: 0)")
    parser.add_argument("--write", action="store_true", help="write docs/results/soak.md")
    options = parser.parse_args(arguments)
    set_up_logging()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNEBOOK_CACHE"] = f"{folder}/cache"
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.chdir(folder)  # outputs/latest is written below the working directory
        soaks, seconds = soak(Path(folder), options.kills, options.seed)
    total = Counts()
    for each in soaks:
        total.add(each.counts)
    lines = format_page(soaks, total, seconds, f"--kills {options.kills} --seed {options.seed}")
    if options.write:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 1 if total.different_bytes or total.different_rows else 0


def soak(folder: Path, kills: int, seed: int) -> tuple[list[Soak], float]:
    """Kills runs of all cases in turn.

    Returns:
        The cases, and the seconds that it took.
    """
    started = time.monotonic()
    model, chance = warm_up(folder), random.Random(seed)  # noqa: S311 - moments, not secrets
    cases = list(CASES.items())[: max(1, kills // 5)]  # few kills are worth no reference of each case
    recipes = [
        write_tiny_recipe(folder / str(number), model, {**STEPS, **changes})
        for number, (_, changes) in enumerate(cases)
    ]
    soaks = [Soak(name, recipe, chance) for (name, _), recipe in zip(cases, recipes, strict=True)]
    with Progress("Kills", kills, "kills") as progress:
        for each in soaks:
            each.train_whole()
        done = 0
        while done < kills:
            if soaks[done % len(soaks)].kill_once():
                done += 1
                progress.advance()
        for each in soaks:
            if each.run.exists():
                each.finish()
    get_logger().info("All runs have ended")
    return soaks, time.monotonic() - started


def format_page(soaks: Sequence[Soak], total: Counts, seconds: float, options: str) -> list[str]:
    """The page, whose last line says it all."""
    rows = [
        (each.name, each.counts.runs, each.counts.kills, each.counts.lost_steps, each.counts.different_bytes)
        for each in soaks
    ]
    return [
        "# Killed at random moments",
        "",
        f"Written by `python benchmarks/soak.py {options} --write` on {time.strftime('%Y-%m-%d')}, in",
        f"{seconds / 60:.0f} minutes: {count_cores()} cores, {describe_machine('torch', 'transformers')}.",
        "",
        "Runs of a tiny model through `scripts/train.py` get SIGKILL or SIGTERM at random moments, go on with",
        "`--resume`, and are compared with a run that never stopped: every byte of the published weights, every row",
        "of `metrics.jsonl`. A lost step is one that was taken again, because it came after the last checkpoint, which",
        "is saved every third step.",
        "",
        "| runs of | ended runs | kills | lost steps | differing bytes |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
        str(total),
    ]


if __name__ == "__main__":
    sys.exit(main())

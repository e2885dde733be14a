"""The same work on Tunebook and on its peers in one run, alternating, each in its own environment; and the machine's bound.

    python benchmarks/speed.py [--work NAME…] [--peers NAME…] [--rounds 2] [--steps N] [--rows-dir DIR] [--write]

Each side trains the same model folder on the same tokens, in the same order, in steps of the same rows, at the same rate. A
side whose token counts, trainable parameters, gradient norms or losses are not those of the same work is INVALID and has no
speed. Results are kept in .bench/results.json, one session a work; `--write` puts those of all works into
docs/results/speed.md and .png. Without --rows-dir the shipped rows are used; see speed_work.py.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.speed_process import Attempt, hold_lock  # noqa: E402
from benchmarks.speed_report import PICTURE, RESULT, format_page, format_work, plot  # noqa: E402
from benchmarks.speed_results import WorkResult, load_results, save_results, start_result, take_up  # noqa: E402
from benchmarks.speed_runs import ENVIRONMENTS, Measurement, prepare_environment, run_side  # noqa: E402
from benchmarks.speed_sides import OURS, SIDES, Side  # noqa: E402
from benchmarks.speed_work import WORKS, Work, prepare_work  # noqa: E402
from utils.logging import set_up_logging  # noqa: E402
from utils.machine import choose_dtype, inspect_machine  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table for each work, and writes the page when asked."""
    peers = [name for name in SIDES if name != OURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="*", choices=WORKS, default=list(WORKS), metavar="NAME", help=", ".join(WORKS))
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, metavar="NAME", help=", ".join(peers))
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side (default: 2)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default: each work's own)")
    parser.add_argument("--minutes", type=float, default=15, help="the longest that a run may take (default: 15)")
    parser.add_argument("--rows-dir", type=Path, metavar="DIR", help="folder of the three files of public rows")
    parser.add_argument(
        "--lock", type=Path, metavar="FILE", help="hold this lock in each run, where others measure too"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the runs of earlier sessions with the same rows and steps"
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)} and its picture")
    options = parser.parse_args(arguments)
    set_up_logging("WARNING")
    sides = [SIDES[name] for name in (OURS, *options.peers)]
    with hold_lock(options.lock):
        obstacles = find_obstacles(sides)
    path = ENVIRONMENTS / "results.json"
    results = {result.work: result for result in load_results(path)}
    for name in options.work:
        if WORKS[name].needs_gpu and inspect_machine().device != "cuda":
            print(f"{name}: needs an NVIDIA GPU", flush=True)
            continue
        earlier = results.get(name) if options.add else None
        for result in measure_work(WORKS[name], sides, obstacles, options, earlier):
            results[name] = result
            save_results(
                list(results.values()), path
            )  # after each run, so that a session that is ended early is not lost
            print(describe_run(result, result.runs[-1]), flush=True)
        print("\n".join(format_work(results[name])), flush=True)
    if options.write:
        write_page(load_results(path))  # in the order of the works
    return 0


def write_page(results: list[WorkResult]) -> None:
    """The page and its picture, of all works."""
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(format_page(results), encoding="utf-8")
    plot(results)
    print(f"Written: {RESULT.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}")


def find_obstacles(sides: Sequence[Side]) -> dict[str, str]:
    """Makes the environments, and says which cannot be made and why."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    found = {}
    for side in sides:
        works = [name for name in WORKS if side.find_obstacle(name) is None]
        if side.environment and works and (error := prepare_environment(side.environment)):
            found[side.name] = f"could not be installed: {error}"
    return found


def measure_work(
    work: Work,
    sides: Sequence[Side],
    broken: dict[str, str],
    options: argparse.Namespace,
    earlier: WorkResult | None,
) -> Iterator[WorkResult]:
    """Runs every side in every round, one after the other, and yields what is known after each run."""
    with tempfile.TemporaryDirectory(prefix="tunebook-speed-") as name:
        folder = Path(name)
        cache = folder / "cache"
        cache.mkdir()
        prepared = prepare_work(work, options.steps, options.rows_dir, folder)
        result = start_result(
            prepared, "public rows" if options.rows_dir else "shipped rows", time.strftime("%Y-%m-%d")
        )
        take_up(result, earlier)
        for side in sides:
            if reason := broken.get(side.name) or side.find_obstacle(work.name):
                result.obstacles[side.name] = reason
        for number in range(options.rounds):
            with hold_lock(options.lock):
                add_bound(result, work)
            for side in sides:
                if side.name not in result.obstacles and not any(run.error for run in result.list_runs(side.name)):
                    place = tempfile.TemporaryDirectory(prefix="tunebook-speed-")
                    with hold_lock(options.lock), place as own:
                        attempt = Attempt(number, Path(own), cache, 60 * options.minutes)
                        result.runs.append(run_side(side, prepared, attempt))
                    yield result


def describe_run(result: WorkResult, run: Measurement) -> str:
    """One line on the terminal."""
    if run.error:
        return f"{result.work}, {run.side}: {run.error}"
    seconds = run.ends[-1] - run.ends[0]
    speed = sum(result.tokens[1 : len(run.ends)]) / seconds if seconds else math.nan
    first, peak = run.ends[0] - run.started, run.peak_bytes / 1e9
    return f"{result.work}, {run.side}: {speed:.0f} tokens/s, first step after {first:.1f} s, {peak:.2f} GB"


def add_bound(result: WorkResult, work: Work) -> None:
    """Measures matrix products in the format that Tunebook trains in here, in a process of its own."""
    dtype = "float32" if work.is_full else choose_dtype("auto", inspect_machine())
    device = "cuda" if inspect_machine().device == "cuda" else "cpu"
    command = [sys.executable, str(ROOT / "benchmarks" / "speed_bound.py"), dtype, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    speeds = json.loads(done.stdout)
    known = 0.0 if math.isnan(result.peak_flops) else result.peak_flops
    result.peak_flops = max(known, speeds["gflops"] * 1e9)  # a busy neighbour can only make it look slower
    result.kept_up_flops.append(speeds["kept_up"] * 1e9)


if __name__ == "__main__":
    sys.exit(main())

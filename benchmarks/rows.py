"""How fast rows are checked, and in how much memory, beside `datasets`.

    python benchmarks/rows.py [--rows 1000000] [--write]

Makes JSONL conversations of about 200 bytes in a temporary folder (seeded), runs the first pass of the pre-flight on 100,000
and on N of them, each in a fresh process, and lets `datasets` load the same files. `--write` writes docs/results/rows.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "rows.md"
FEW = 100_000
WORDS = (
    "the",
    "capital",
    "of",
    "country",
    "named",
    "after",
    "people",
    "who",
    "lived",
    "by",
    "its",
    "river",
    "was",
    "sea",
)
# Each work is timed without the import of its library: what is compared is the reading.
SCAN = """
from config.structured_config import DataSection
from utils.row_checks import scan_rows
import numpy
work = lambda: scan_rows(DataSection(train=sys.argv[1]), 42, str)
"""
LOAD = """
import datasets
datasets.disable_progress_bars()
work = lambda: datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
"""
MEASURE = """
import json, re, sys, time
def read_memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
{setup}
before, cpu, start = read_memory("VmRSS"), time.process_time(), time.perf_counter()
work()
seconds = time.perf_counter() - start
result = {{"seconds": seconds, "cpu": time.process_time() - cpu, "before": before, "peak": read_memory("VmHWM")}}
print(json.dumps(result))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and writes it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help=f"more than {FEW} (default: 1000000)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if options.rows <= FEW:
        parser.error(f"--rows must be more than {FEW}")
    with tempfile.TemporaryDirectory() as folder:
        lines = list(measure_all(Path(folder), options.rows))
    print("\n".join(lines))
    if options.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\nWrote {RESULT}")
    return 0


def measure_all(folder: Path, rows: int) -> list[str]:
    """Measures both works on both files; returns the page."""
    paths = {count: write_rows(folder / f"{count}.jsonl", count) for count in (FEW, rows)}
    table = [
        "| work | rows | rows/s | MB/s | processor s | peak MB | of that the import |",
        "|---|---|---|---|---|---|---|",
    ]
    growth = []
    for name, setup in (
        ("`scan_rows`: read, check, fingerprint, split", SCAN),
        ("`datasets.load_dataset`: read", LOAD),
    ):
        found = {count: measure(setup, path, folder) for count, path in paths.items()}
        for count, result in found.items():
            speed = count / result["seconds"]
            megabytes = paths[count].stat().st_size / 1e6 / result["seconds"]
            cells = (name, f"{count:,}", f"{speed:,.0f}", f"{megabytes:.0f}", f"{result['cpu']:.1f}")
            table.append(f"| {' | '.join(cells)} | {result['peak'] / 1e6:.0f} | {result['before'] / 1e6:.0f} |")
        growth.append(f"{(found[rows]['peak'] - found[FEW]['peak']) / (rows - FEW):.0f}")
    size = paths[rows].stat().st_size / rows
    return [
        "# Rows: speed and memory of the first pass",
        "",
        f"Written by `python benchmarks/rows.py --rows {rows} --write` on {time.strftime('%Y-%m-%d')}: "
        f"{describe_machine('datasets')}.",
        "",
        *table,
        "",
        f"Bytes of memory for each further row of {size:.0f} bytes: {growth[0]} for `scan_rows`, {growth[1]} for `datasets`.",
        "",
        "The rows are seeded two-turn conversations in `messages`. Each line is one fresh process, in which the libraries",
        "were imported before the clock started. Peak is the process's VmHWM. `scan_rows` checks every row, finds copies and",
        "chooses the held-out rows; `datasets` writes the rows into an Arrow cache on the disk, which it maps into memory",
        "afterwards, and checks none of this.",
    ]


def write_rows(path: Path, count: int) -> Path:
    """Writes seeded conversations of about 200 bytes, no two alike."""
    generator = random.Random(count)  # noqa: S311 - rows of a benchmark
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = (" ".join(generator.choices(WORDS, k=12)) for _ in range(2))
            turns = [{"role": "user", "content": f"{question} {number}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def measure(setup: str, path: Path, folder: Path) -> dict[str, float]:
    """Runs a work on a file in a fresh process.

    Returns:
        seconds, cpu (seconds), before and peak (bytes of memory).
    """
    command = [sys.executable, "-c", MEASURE.format(setup=setup), str(path), str(folder / f"cache-{path.stem}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def describe_machine(*packages: str) -> str:
    """Processor, Python, and the versions of the packages that a result depends on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([cpu, f"Python {platform.python_version()}", *versions])


if __name__ == "__main__":
    sys.exit(main())

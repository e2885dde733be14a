"""The soak kills real runs and finds no differing byte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


def test_runs_that_are_killed_at_random_moments_end_with_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--kills", "5", "--seed", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(
        r"5 kills \((\d) SIGKILL, (\d) SIGTERM\), \d+ resumes, \d+ lost steps, 0 differing bytes", last
    )
    assert found, last
    assert int(found[1]) + int(found[2]) == 5

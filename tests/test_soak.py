"""The soak kills real runs and finds no differing byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ScriptServer

pytestmark = pytest.mark.slow


def test_runs_that_are_killed_at_random_moments_end_with_the_same_bytes(
    tmp_path: Path, script_server: ScriptServer
) -> None:
    done = script_server.run("benchmarks.soak", "--kills", 5, "--seed", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(
        r"5 kills \((\d) SIGKILL, (\d) SIGTERM\), \d+ resumes, \d+ lost steps, 0 differing bytes", last
    )
    assert found, last
    assert int(found[1]) + int(found[2]) == 5

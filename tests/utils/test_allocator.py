"""The allocator's settings, in real processes: glibc reads them once, before a program begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.allocator import SETTINGS, TUNABLES, runs_on_glibc

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = f"""\
import os, sys
from pathlib import Path
print("begun")
sys.path.insert(0, {str(ROOT)!r})
{{before}}
from utils.allocator import restart_with_settings
restart_with_settings()
begun_with = dict(entry.split("=", 1) for entry in Path("/proc/self/environ").read_text().split("\\0") if "=" in entry)
print(os.getpid(), sys.argv[1:], sys.dont_write_bytecode, begun_with.get("{TUNABLES}"), os.environ.get("{TUNABLES}"))
"""
# Every Python process imports it first.
SHIM = f"""\
import os
with open(os.environ["STARTS"], "a") as file:
    file.write(os.environ.get("{TUNABLES}", "nothing") + "\\n")
"""
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
TRAINING = ("train.py", "reproduce.py")
pytestmark = pytest.mark.skipif(not runs_on_glibc(), reason="another C library")


def run(folder: Path, before: str = "", **environment: str) -> tuple[int, list[str]]:
    """Runs the script with two arguments; its process and its lines."""
    path = folder / "script.py"
    path.write_text(SCRIPT.format(before=before), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name != TUNABLES}
    command = [sys.executable, "-u", "-B", str(path), "--two words", ""]
    with subprocess.Popen(command, env={**kept, **environment}, stdout=subprocess.PIPE, text=True) as process:
        text = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    return process.pid, text.splitlines()


def test_a_script_begins_anew_once_in_the_same_process_with_its_arguments_and_options(tmp_path: Path) -> None:
    pid, lines = run(tmp_path)
    # The settings were there when it began, and are gone for the programs that it starts.
    assert lines == ["begun", "begun", f"{pid} ['--two words', ''] True {SETTINGS} None"]


def test_a_program_that_runs_the_script_within_itself_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(before=""), encoding="utf-8")
    driver = f"import runpy, sys\nfor sys.argv in 2 * [[{str(path)!r}, 'a']]: runpy.run_path({str(path)!r}, run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    command = [sys.executable, "-B", "-c", driver]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert [line.split(" ", 1)[1] for line in done.stdout.splitlines()[1::2]] == 2 * ["['a'] True None None"]


def test_settings_of_the_user_win(tmp_path: Path) -> None:
    pid, lines = run(tmp_path, **{TUNABLES: "glibc.malloc.mxfast=0"})
    assert lines == ["begun", f"{pid} ['--two words', ''] True glibc.malloc.mxfast=0 glibc.malloc.mxfast=0"]


def test_a_debugger_keeps_its_program(tmp_path: Path) -> None:
    pid, lines = run(tmp_path, before="sys.settrace(lambda *_: None)")
    assert lines == ["begun", f"{pid} ['--two words', ''] True None None"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_that_train_begin_anew_and_no_other(tmp_path: Path, name: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHIM, encoding="utf-8")
    kept = {variable: value for variable, value in os.environ.items() if variable != TUNABLES}
    environment = {**kept, "PYTHONPATH": str(tmp_path), "STARTS": str(tmp_path / "starts.txt")}
    command = [sys.executable, str(ROOT / "scripts" / name), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "--help" in done.stdout
    starts = (tmp_path / "starts.txt").read_text(encoding="utf-8").splitlines()
    assert starts == (["nothing", SETTINGS] if name in TRAINING else ["nothing"])


def test_a_system_that_lets_no_program_begin_anew_runs_the_script(tmp_path: Path) -> None:
    _, lines = run(tmp_path, before="sys.executable = '/nowhere/python'")
    assert [line.endswith("True None None") for line in lines] == [False, True]

"""What is known of the machine without a framework, on this machine and on made-up control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.exceptions import MachineError
from utils.machine import (
    Machine,
    choose_dtype,
    guess_device,
    inspect_machine,
    iterate_cgroup_limits,
    measure_memory,
    read_mebibytes,
)
from utils.threads import keep_threads

ROOT = Path(__file__).resolve().parents[2]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_machine_is_known_without_a_framework_and_quickly() -> None:
    code = (
        "import sys, time; started = time.perf_counter()\n"
        "from utils.machine import inspect_machine; inspect_machine()\n"
        "print(time.perf_counter() - started, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "TUNEBOOK_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds, loaded = done.stdout.split(" ", 1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 1


def test_the_guess_is_what_the_torch_back_end_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.device_manager import DeviceManager

    monkeypatch.delenv("TUNEBOOK_DEVICE", raising=False)
    machine = inspect_machine()
    assert machine.device == DeviceManager.find_device()
    if machine.device == "cpu":
        assert machine.workers == DeviceManager().plan("float32").workers
        assert machine.total_bytes is not None
        assert machine.total_bytes <= DeviceManager.measure_memory("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_device_that_is_asked_for_is_taken(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOK_DEVICE", device)
    assert guess_device() == device


def test_a_device_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOK_DEVICE", "tpu")
    with pytest.raises(MachineError, match="'tpu' is no device") as caught:
        guess_device()
    assert caught.value.problems[0].where == "TUNEBOOK_DEVICE"


def test_a_run_that_is_repeated_gets_the_threads_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    # How many threads are quickest is a matter of the neighbours: two runs of one recipe differed in their last bits.
    import torch

    from utils.device_manager import DeviceManager

    monkeypatch.setenv("TUNEBOOK_DEVICE", "cpu")
    monkeypatch.delenv("TUNEBOOK_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            with keep_threads(count):
                plan = DeviceManager().plan("float32")
            assert (plan.threads, torch.get_num_threads()) == (count, count)
            assert f"{count} thread(s) for each operation: TUNEBOOK_THREADS" in plan.reasons
        with keep_threads(None):
            assert DeviceManager().plan("float32").threads in (1, inspect_machine().workers)
        monkeypatch.setenv("TUNEBOOK_THREADS", "none")
        with pytest.raises(MachineError, match="'none' is no number of threads"):
            DeviceManager().plan("float32")
    finally:
        torch.set_num_threads(before)


class MadeUpClock:
    """Time that passes half as fast on two threads, once a neighbour has let go of the second core."""

    def __init__(self, busy_calls: int) -> None:
        self.busy_calls, self.calls, self.now = busy_calls, 0, 0.0

    def perf_counter(self) -> float:
        import torch

        self.calls += 1
        self.now += 0.5 if self.calls > self.busy_calls and torch.get_num_threads() == 2 else 1.0
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("busy_calls", "gains"), [(0, True), (40, True), (10**9, False)])
def test_a_neighbour_of_a_moment_does_not_take_a_thread_from_the_whole_run(
    busy_calls: int, gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from utils import device_manager

    before = torch.get_num_threads()
    monkeypatch.setattr(device_manager, "time", MadeUpClock(busy_calls))
    try:
        assert device_manager.DeviceManager.gains_from_threads(2) == gains
        assert not device_manager.DeviceManager.gains_from_threads(1)
    finally:
        torch.set_num_threads(before)


@linux_only
def test_free_memory_is_not_more_than_all_memory() -> None:
    total, available = measure_memory()
    assert 0 < available <= total


@linux_only
def test_the_peak_of_a_process_is_not_that_of_the_program_which_started_it() -> None:
    # A run that was started from a large process, such as pytest or a notebook, recorded that one's memory as its own.
    ballast = b"x" * 300_000_000
    code = (
        "from utils.machine import measure_peak_resident as peak; print(peak()); x = b'x' * 50_000_000; print(peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 5_000_000 < before < len(ballast) / 2
    assert after - before == pytest.approx(50_000_000, rel=0.2)


def write_group(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n", encoding="utf-8")


def test_the_limits_of_control_groups_of_both_versions_are_read_up_to_the_root(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:memory:/box/job\n4:cpu:/box\n0::/slice/unit\n", encoding="utf-8")
    old, new = {"memory__limit_in_bytes": 2**63 - 4096, "memory__usage_in_bytes": 10}, {"memory__max": "max"}
    write_group(tmp_path / "memory", **old)
    write_group(tmp_path / "memory" / "box", memory__limit_in_bytes=4000, memory__usage_in_bytes=1000)
    stat = "cache 900\ntotal_inactive_file 300"
    write_group(tmp_path / "memory" / "box" / "job", memory__limit_in_bytes=3000, memory__usage_in_bytes=700)
    write_group(tmp_path / "memory" / "box", memory__stat=stat)
    write_group(tmp_path / "slice" / "unit", **new)
    write_group(tmp_path / "slice", memory__max=5000, memory__current=2000, memory__stat="inactive_file 500")
    assert list(iterate_cgroup_limits(tmp_path, own)) == [
        (3000, 700),
        (4000, 700),
        (2**63 - 4096, 10),
        (5000, 1500),
    ]


def test_without_control_groups_there_are_no_limits(tmp_path: Path) -> None:
    assert list(iterate_cgroup_limits(tmp_path, tmp_path / "absent")) == []


def test_bfloat16_is_chosen_only_where_it_is_quick() -> None:
    slow = Machine("cpu", 2, 2, 512, None, None, quick_bfloat16=False)
    quick = Machine("cpu", 2, 2, 512, None, None, quick_bfloat16=True)
    assert choose_dtype("auto", slow) == "float32"
    assert choose_dtype("auto", quick) == "bfloat16"
    assert choose_dtype("bfloat16", slow) == "bfloat16"


def test_memory_that_a_gpu_does_not_state_is_unknown() -> None:
    assert read_mebibytes("81559") == 81559 << 20
    assert read_mebibytes("[N/A]") is None
    assert read_mebibytes(None) is None

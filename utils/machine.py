"""What is known of this machine before a framework is imported: device, cores, memory, and what a run would choose.

The torch back end measures the same things with torch (`utils/device_manager.py`), and its word is final. Here they are read
from the system in a few milliseconds, so that a recipe that cannot run is refused before gigabytes are loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from utils.exceptions import MachineError
from utils.threads import count_cores, count_workers

DeviceName = Literal["cuda", "mps", "metal", "cpu"]
DEVICES: tuple[DeviceName, ...] = ("cuda", "mps", "metal", "cpu")
# Tokens that one forward pass should hold when micro_batch_size is auto.
TOKEN_BUDGETS = {"cpu": 256, "mps": 2048, "metal": 2048, "cuda": 16_384}
# Logits, numbers of rows x vocabulary, that the head of a training pass forms at once: on a CPU they are a large part of what
# the workers hold side by side. The floor keeps reading the head's weights cheaper than using them.
LOGIT_BUDGETS = {"cpu": 2_097_152, "mps": 8_388_608, "cuda": 8_388_608}
FEWEST_LOGIT_ROWS = 40
METAL_SHARE = 0.75  # Metal recommends to use about three quarters of Apple's shared memory


@dataclass(frozen=True)
class Machine:
    """The machine that a run would use.

    Attributes:
        device: `cuda`, `mps` (Apple's GPU through torch), `metal` (the same through MLX) or `cpu`.
        cores: CPU cores that this process may run on.
        workers: micro-batches that run side by side; 1 on accelerators.
        token_budget: tokens of a forward pass when `micro_batch_size` is auto.
        total_bytes: memory of the device in all, or None where it cannot be read.
        available_bytes: memory of the device that is free now, or None.
        quick_bfloat16: the device computes bfloat16 natively, so `dtype: auto` takes it.
        backend: `torch` or `mlx`.
    """

    device: DeviceName
    cores: int
    workers: int
    token_budget: int
    total_bytes: int | None
    available_bytes: int | None
    quick_bfloat16: bool
    backend: str = "torch"


def inspect_machine(backend: str = "torch") -> Machine:
    """Looks at the machine without a framework.

    Args:
        backend: `torch` or `mlx`, which decides what of the machine is used.

    Raises:
        MachineError: TUNEBOOK_DEVICE names no device.
    """
    device = guess_device(backend)
    cores = count_cores()
    total, available = measure_device_memory(device)
    return Machine(
        device=device,
        cores=cores,
        workers=count_workers() if device == "cpu" and backend == "torch" else 1,
        token_budget=TOKEN_BUDGETS[device],
        total_bytes=total,
        available_bytes=available,
        quick_bfloat16=device == "metal" or (backend == "torch" and guess_quick_bfloat16(device)),
        backend=backend,
    )


def count_logit_rows(vocabulary: int, device: str) -> int:
    """Rows of logits that are formed at once where the head is frozen and rows are not padded."""
    return max(FEWEST_LOGIT_ROWS, LOGIT_BUDGETS[device] // vocabulary)


def choose_dtype(asked: str, machine: Machine) -> str:
    """The number format of the frozen weights that `model.dtype` leads to on this machine."""
    if asked != "auto":
        return asked
    return "bfloat16" if machine.quick_bfloat16 else "float32"


def guess_device(backend: str = "torch") -> DeviceName:
    """CUDA where an NVIDIA driver is loaded, Apple's GPU on Apple silicon, else the CPU; TUNEBOOK_DEVICE overrides it.

    Raises:
        MachineError: TUNEBOOK_DEVICE names no device.
    """
    if asked := os.environ.get("TUNEBOOK_DEVICE"):
        for device in DEVICES:
            if asked == device:
                return choose_mlx_device(asked) if backend == "mlx" else device
        fix = f"set it to one of {', '.join(DEVICES)}, or leave it out"
        raise MachineError(f"{asked!r} is no device", where="TUNEBOOK_DEVICE", fix=fix, code="environment")
    if backend == "mlx":
        return choose_mlx_device("metal")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if not hidden and not is_cpu_build() and (Path("/proc/driver/nvidia/version").exists() or query_gpu("name")):
        return "cuda"
    return "mps" if is_apple_silicon() else "cpu"


def choose_mlx_device(asked: str) -> DeviceName:
    """Apple's GPU where there is one and the CPU is not asked for."""
    return "metal" if is_apple_silicon() and asked != "cpu" else "cpu"


def is_apple_silicon() -> bool:
    """True on a Mac whose GPU MLX drives."""
    return sys.platform == "darwin" and os.uname().machine == "arm64"


def is_cpu_build() -> bool:
    """True if the installed torch was built without CUDA: it would not see a GPU that is there."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


@lru_cache
def query_gpu(name: str) -> str | None:
    """One value of the first GPU from NVIDIA's own tool, or None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={name}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    row = int(index) if index.isdigit() and int(index) < len(lines) else 0
    return lines[row].strip() or None if lines else None


def measure_device_memory(device: str) -> tuple[int | None, int | None]:
    """Bytes of the device in all and free now; None where the system does not say."""
    if device == "cuda":
        total, free = (read_mebibytes(query_gpu(name)) for name in ("memory.total", "memory.free"))
        return total, free
    total_bytes, available = measure_memory()
    if device in ("mps", "metal"):
        return int(total_bytes * METAL_SHARE), None
    return total_bytes, available


def read_mebibytes(text: str | None) -> int | None:
    """Bytes behind NVIDIA's `81559`; None for `[N/A]`."""
    return int(text) << 20 if text and text.isdigit() else None


def measure_memory() -> tuple[int, int]:
    """Bytes of memory that this process may use in all and now: the machine's, or less where a container limits it."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = read_available_memory() or total
    for limit, used in iterate_cgroup_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def count_usable_bytes() -> int:
    """Bytes that a process can fill at most: all memory that this one may use, and the swap space."""
    return measure_memory()[0] + (read_meminfo("SwapTotal") or 0)


def read_available_memory() -> int | None:
    """Bytes that programs can still get without swapping; None where the system does not say."""
    return read_meminfo("MemAvailable")


def measure_peak_resident() -> int:
    """Bytes of resident memory that this process has held at most.

    Linux's ru_maxrss is not that number: it goes on from the peak of the program that started this one, as a notebook.
    """
    if own := read_meminfo("VmHWM", Path("/proc/self/status")):
        return own
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # bytes on macOS, kilobytes elsewhere


def read_meminfo(name: str, path: Path = Path("/proc/meminfo")) -> int | None:
    """A line of /proc/meminfo, or of a process's status, in bytes; None where the system does not say."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def iterate_cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Yields (limit, used without caches) in bytes of this process's control groups, version 1 and 2, up to the root.

    Args:
        root: where control groups are mounted.
        own: the file that names those of this process.
    """
    try:
        entries = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers not in ("", "memory"):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = base / path.strip("/")
        for level in (folder, *folder.parents):
            limit, used = (read_whole_number(level / name) for name in names)
            if limit is not None:
                yield limit, max(0, (used or 0) - read_inactive_file(level))
            if level == base:
                break


def read_whole_number(path: Path) -> int | None:
    """A file that holds one number; None for `max` and for a file that is not there."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def read_inactive_file(folder: Path) -> int:
    """Cached file bytes of a control group, which the system gives up when memory is asked for."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def guess_quick_bfloat16(device: DeviceName) -> bool:
    """Whether the device multiplies bfloat16 natively: Ampere or newer on CUDA, AVX512-BF16 or AMX on a CPU."""
    if device == "cuda":
        capability = query_gpu("compute_cap")
        return capability is None or float(capability) >= 8.0
    if device == "mps":
        return False  # DeviceManager says why
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags

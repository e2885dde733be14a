"""Chooses the device, the number format and the threads of a torch run, by looking at this machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch.nn import functional

from utils.allocator import keep_freed_pages
from utils.exceptions import MachineError
from utils.machine import count_usable_bytes, measure_peak_resident
from utils.threads import count_workers, read_asked_threads

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
THREAD_TRIES, THREAD_PAUSE = 5, 0.03  # seconds
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class MachinePlan:
    """What a run uses of this machine, with the reason for each automatic choice.

    Attributes:
        device: `cuda`, `mps` or `cpu`.
        device_name: the hardware, as a person calls it.
        dtype: number format of the frozen weights.
        memory_bytes: memory of the device in all.
        workers: micro-batches that run side by side, one thread each; 1 on accelerators.
        reasons: what was chosen automatically, and why.
        threads: of each operation outside the workers. Sums over large tensors depend on it in their last bits, so a run that
            is to be repeated bit for bit needs the same number.
    """

    device: str
    device_name: str
    dtype: torch.dtype
    memory_bytes: int
    workers: int
    reasons: tuple[str, ...]
    threads: int = 1

    @property
    def dtype_name(self) -> str:
        """`bfloat16` rather than `torch.bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


class DeviceManager:
    """Looks at the machine once; every answer is measured or asked for, none is assumed."""

    def plan(self, dtype: DtypeName = "auto") -> MachinePlan:
        """Picks CUDA, then MPS, then the CPU, and a dtype that the device computes quickly.

        Raises:
            MachineError: the recipe insists on a dtype that this device cannot train in.
        """
        device = self.find_device()
        if dtype == "float16" and device == "cpu":
            fix = "set model.dtype to auto, bfloat16 or float32"
            raise MachineError("float16 is not usable on a CPU", where="model.dtype", fix=fix, code="dtype")
        reasons: list[str] = []
        if dtype == "auto":
            quick = self.computes_bfloat16_quickly(device)
            dtype = "bfloat16" if quick else "float32"
            reasons.append(
                f"dtype {dtype}: {'bfloat16 is native here' if quick else 'bfloat16 is slower than float32 here'}"
            )
        workers = 1
        if device == "cpu":
            workers = count_workers()
            reasons.append(f"{workers} worker(s): one single-threaded micro-batch for each CPU core")
            reasons.append(self.choose_threads(workers))
            keep_freed_pages()
            self.limit_memory()
        memory = self.measure_memory(device)
        name, threads = self.name_device(device), torch.get_num_threads()
        return MachinePlan(device, name, DTYPES[dtype], memory, workers, tuple(reasons), threads)

    def choose_threads(self, most: int) -> str:
        """Sets the threads of each operation: TUNEBOOK_THREADS, or one where more are not quicker.

        Returns:
            The number with its reason.

        Raises:
            MachineError: TUNEBOOK_THREADS is no number of threads.
        """
        if asked := read_asked_threads():
            torch.set_num_threads(asked)
            return f"{asked} thread(s) for each operation: TUNEBOOK_THREADS"
        if self.gains_from_threads(most):
            torch.set_num_threads(most)
            return f"{most} threads for each operation: quicker than one here"
        # Hyper-threads that share a core, or a busy neighbour: threads then only wait for each other.
        torch.set_num_threads(1)
        return "1 thread for each operation: more are not quicker here"

    @staticmethod
    def find_device() -> str:
        """The best device that torch can use here; TUNEBOOK_DEVICE overrides it."""
        usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        here = [device for device, works in usable.items() if works]
        if asked := os.environ.get("TUNEBOOK_DEVICE"):
            if asked not in here:
                fix = f"set it to one of {', '.join(here)}, or leave it out"
                raise MachineError(
                    f"{asked!r} cannot be used here", where="TUNEBOOK_DEVICE", fix=fix, code="environment"
                )
            return asked
        return here[0]

    @staticmethod
    def name_device(device: str) -> str:
        """The hardware's name."""
        if device == "cuda":
            return str(torch.cuda.get_device_name())
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"

    @staticmethod
    def measure_memory(device: str) -> int:
        """Bytes of the device: CUDA's own, what Metal recommends to use, or the machine's."""
        if device == "cuda":
            return int(torch.cuda.mem_get_info()[1])
        if device == "mps":
            return int(torch.mps.recommended_max_memory())
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @staticmethod
    @lru_cache(maxsize=1)
    def computes_bfloat16_quickly(device: str) -> bool:
        """Times a small matrix product: without native support, torch falls back to a loop up to 100 times slower."""
        if device == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        if device == "mps":
            return False  # works on recent systems, but losses drift; float32 is the safe choice until measured

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a busy neighbour slows several threads far more than one

        def measure(dtype: torch.dtype) -> float:
            x, weight = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
            return measure_seconds(lambda: functional.linear(x, weight))

        quick = measure(torch.bfloat16) < measure(torch.float32)
        torch.set_num_threads(threads)
        return quick

    @staticmethod
    def gains_from_threads(threads: int) -> bool:
        """Times a matrix product with an activation behind it, on one thread and on all.

        Several times, with pauses: another process on one of the cores at that moment can hide the gain but never make it up,
        and one thread too few would halve the speed of a whole run.
        """
        x, weight = torch.ones(128, 512), torch.ones(512, 512)

        def measure(count: int) -> float:
            torch.set_num_threads(count)
            return measure_seconds(lambda: functional.silu(functional.linear(x, weight)))

        for _ in range(THREAD_TRIES if threads > 1 else 0):
            if measure(threads) < measure(1) * 0.8:
                return True
            time.sleep(THREAD_PAUSE)
        return False

    @staticmethod
    def limit_memory() -> None:
        """Makes an allocation beyond all memory there is fail, so that a run can react; otherwise Linux kills the process."""
        if sys.platform != "linux":
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = count_usable_bytes()
        if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def measure_seconds(work: Callable[[], object]) -> float:
    """Shortest of several runs: other processes can only make a run longer."""
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def measure_peak_memory(device: str) -> int:
    """Peak bytes of this process: device memory on CUDA, resident memory elsewhere."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return measure_peak_resident()

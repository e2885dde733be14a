"""Imported before the MLX back end: what must be so before MLX and mlx-lm are loaded.

On Linux the package `mlx[cpu]` brings the reference BLAS, which multiplies matrices at about a hundredth of what a processor
can. torch is there anyway, with a quick BLAS inside: loaded first and for all to see, its `sgemm_` is the one that MLX's
library calls.

mlx-lm, while it is imported, sets the number of open files to 2,048 now and 4,096 at most. That fails where a lower limit is
set, and it lowers a higher one for everything that the process does later. Here the limits stay what they are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import sys
from pathlib import Path

from utils.threads import read_asked_threads


def lend_blas() -> None:
    """Loads torch's library before MLX's, so that its BLAS takes the place of the slow one; without torch nothing changes."""
    found = importlib.util.find_spec("torch")
    if sys.platform != "linux" or "mlx.core" in sys.modules or found is None or found.origin is None:
        return
    library = Path(found.origin).parent / "lib" / "libtorch_cpu.so"
    if library.is_file():
        # As many threads at all times: how many share a product decides how its sums are rounded.
        os.environ.setdefault("MKL_DYNAMIC", "FALSE")
        import torch as torch  # its libraries find each other only in its own order

        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def settle_threads(wanted: int | None) -> int:
    """Threads that share a product of the lent BLAS: TUNEBOOK_THREADS, what is wanted, or torch's own choice.

    Raises:
        MachineError: TUNEBOOK_THREADS is no number of threads.
    """
    asked, torch = read_asked_threads() or wanted, sys.modules.get("torch")
    if torch is None:
        return 1
    if asked:
        torch.set_num_threads(asked)
    return int(torch.get_num_threads())


def keep_limits(which: int, limits: tuple[int, int]) -> None:
    """Takes the arguments of `resource.setrlimit`, and leaves the limit alone."""


lend_blas()
original = resource.setrlimit
resource.setrlimit = keep_limits
try:
    import mlx_lm.utils as mlx_utils  # noqa: F401 - imported for what happens meanwhile
finally:
    resource.setrlimit = original

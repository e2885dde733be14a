"""Seeds every random number generator of a run."""

from __future__ import annotations

import os
import random
import sys

import numpy as np


class SeedManager:
    """Seeds python, numpy and whichever frameworks this process has loaded."""

    def __init__(self, seed: int, *, deterministic: bool = False) -> None:
        self.seed = seed
        self.deterministic = deterministic

    def seed_everything(self) -> list[str]:
        """Seeds all generators; call it after the back end is loaded and before adapters are initialised.

        Only frameworks that are already imported are seeded: nothing else in the run can draw from the others, and
        importing torch to seed it would cost two seconds.

        Returns:
            Names of what was seeded.
        """
        if self.deterministic:
            self.make_deterministic()
        random.seed(self.seed)
        np.random.seed(self.seed)
        seeded = ["python", "numpy"]
        if torch := sys.modules.get("torch"):
            torch.manual_seed(self.seed)  # covers CUDA and MPS as well
            seeded.append("torch")
        if mlx := sys.modules.get("mlx.core"):
            mlx.random.seed(self.seed)
            seeded.append("mlx")
        return seeded

    def make_deterministic(self) -> None:
        """Lets the frameworks choose only kernels that repeat their results; slower on CUDA, free on the CPU."""
        # cuBLAS reads it when its first handle is made, so it must be set before any CUDA work.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if torch := sys.modules.get("torch"):
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False

"""Seeds every random number generator of a run, and takes their states down for a checkpoint."""

from __future__ import annotations

import base64
import os
import random
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from utils.exceptions import RunError


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


def capture_generators() -> dict[str, Any]:
    """States of all generators that `SeedManager` seeds, as JSON values."""
    _, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": [encode(np.array(words, dtype="<u4")), gauss],
        "numpy": [encode(np.asarray(keys, dtype="<u4")), *rest],
    }
    if mlx := sys.modules.get("mlx.core"):
        states["mlx"] = encode(np.array(mlx.random.state[0]))
    if torch := sys.modules.get("torch"):
        states["torch"] = encode(torch.get_rng_state().numpy())
        if torch.cuda.is_available():
            states["cuda"] = [encode(state.numpy()) for state in torch.cuda.get_rng_state_all()]
        if torch.backends.mps.is_available():
            states["mps"] = encode(torch.mps.get_rng_state().numpy())
    return states


def restore_generators(states: Any) -> None:
    """Puts back what `capture_generators` gave; generators of devices that this machine lacks are left out.

    Raises:
        RunError: something else.
    """
    try:
        words, gauss = states["python"]
        random.setstate((3, tuple(decode(words, "<u4").tolist()), gauss))
        keys, *rest = states["numpy"]
        np.random.set_state(("MT19937", decode(keys, "<u4"), *rest))
        # A run on torch may have been saved where nobody had imported MLX.
        if (mlx := sys.modules.get("mlx.core")) and "mlx" in states:
            high, low = decode(states["mlx"], "<u4").tolist()
            mlx.random.seed(high << 32 | low)  # its state takes no assignment, and is the two halves of the seed
        if torch := sys.modules.get("torch"):
            torch.set_rng_state(torch.from_numpy(decode(states["torch"], "u1")))
            if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([torch.from_numpy(decode(state, "u1")) for state in states["cuda"]])
            if torch.backends.mps.is_available() and "mps" in states:
                torch.mps.set_rng_state(torch.from_numpy(decode(states["mps"], "u1")))
    except (LookupError, OverflowError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        message, fix = f"the states of the random numbers are damaged: {error}", "restore state.json from a copy"
        raise RunError(message, where="state.json", fix=fix, code="checkpoint-mismatch") from error


def encode(numbers: npt.NDArray[Any]) -> str:
    """Numbers as text."""
    return base64.b64encode(numbers.tobytes()).decode()


def decode(text: str, dtype: str) -> npt.NDArray[Any]:
    """What `encode` was given."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype).copy()

"""Run by test_out_of_memory.py: two steps under each memory limit, in a process of its own, printed as a line of JSON.

    python tests/backends/out_of_memory_step.py MODEL_FOLDER MEGABYTES…

MEGABYTES is what a process may take beyond the loaded model; 0 for no limit.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config.structured_config import Recipe
from tests.backends.test_torch_backend import PAD, load_trainable, make_examples, make_recipe
from utils.backends.torch_model import TorchModel
from utils.backends.torch_step import TorchTrainStep
from utils.batching import make_micro_batches
from utils.exceptions import OutOfMemory
from utils.training_loop import TrainingState, take_fitting

TOKENS = 1000  # of a row


def read_data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


def main() -> None:
    """Loads the model once, and takes the steps in a fork for each limit."""
    folder = Path(sys.argv[1])
    recipe = make_recipe(folder)
    model = load_trainable(folder, recipe)
    for megabytes in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            print(json.dumps(take_steps(model, recipe, int(megabytes))), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def take_steps(model: TorchModel, recipe: Recipe, megabytes: int) -> dict[str, Any]:
    """Two steps on 8 long rows, all in one forward pass at first."""
    step = TorchTrainStep(model, recipe)
    # Threads that are started later have stacks that count too.
    step.step(make_micro_batches(make_examples([(8, 4)] * 4, seed=9), 1, PAD), 0.0)
    step.optimizer.state.clear()
    if megabytes:
        most = read_data_bytes() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    state, losses = TrainingState(), []
    batches = make_micro_batches(make_examples([(TOKENS, 10)] * 8), 8, PAD)
    try:
        take_fitting(state, batches, step.rehearse)
        losses += [take_fitting(state, batches, lambda chosen: step.step(chosen, 1e-2)).loss for _ in range(2)]
    except OutOfMemory as error:
        return {"error": str(error), "halvings": state.halvings}
    named = model.network.named_parameters()
    sums = {name: float(p.double().square().sum()) for name, p in named if p.requires_grad}
    return {"halvings": state.halvings, "losses": losses, "weights": sums}


if __name__ == "__main__":
    main()

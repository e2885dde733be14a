"""Run by test_out_of_memory.py in a process of its own: two steps under a memory limit, printed as JSON.

    python tests/backends/out_of_memory_step.py MODEL_FOLDER MEGABYTES

MEGABYTES is what the process may take beyond the loaded model; 0 for no limit.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.backends.test_torch_backend import PAD, load_trainable, make_examples, make_recipe
from utils.backends.torch_step import TorchTrainStep
from utils.batching import make_micro_batches
from utils.exceptions import OutOfMemory
from utils.training_loop import TrainingState, take_fitting


def read_data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


def main() -> None:
    """Takes the steps."""
    folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
    recipe = make_recipe(folder)
    model = load_trainable(folder, recipe)
    step = TorchTrainStep(model, recipe)
    # Threads that are started later have stacks that count too.
    step.step(make_micro_batches(make_examples([(8, 4)] * 4, seed=9), 1, PAD), 0.0)
    step.optimizer.state.clear()
    if megabytes:
        most = read_data_bytes() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    state, losses = TrainingState(), []
    batches = make_micro_batches(make_examples([(1900, 10)] * 8), 8, PAD)
    try:
        take_fitting(state, batches, step.rehearse)
        losses += [take_fitting(state, batches, lambda chosen: step.step(chosen, 1e-2)).loss for _ in range(2)]
    except OutOfMemory as error:
        print(json.dumps({"error": str(error), "halvings": state.halvings}))
        return
    named = model.network.named_parameters()
    sums = {name: float(p.double().square().sum()) for name, p in named if p.requires_grad}
    print(json.dumps({"halvings": state.halvings, "losses": losses, "weights": sums}))


if __name__ == "__main__":
    main()

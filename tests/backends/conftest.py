"""Starts torch as `load_backend` does, before the tests import parts of the back end themselves: two seconds quicker."""

import utils.backends.torch_start  # noqa: F401

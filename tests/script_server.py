"""Runs the project's scripts in forks of one process that has imported everything: a second instead of six.

    python tests/script_server.py

Requests come in as lines of JSON; the number of the process and then its exit code go out. A fork is a process of its own, with
its own working directory, environment, streams and exit code. Of the server it has what was read at an import: settings such as
HF_HOME, and the time at which a run's clock starts.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("evaluate_run", "infer", "merge", "reproduce", "train", "validate")
# Beside what the scripts import at their top: what they import later, and what transformers loads for the models of the tests.
OTHERS = (
    "benchmarks.tiny_runs",
    "matplotlib.figure",
    "utils.evaluation",
    "utils.preview",
    "utils.report",
    "utils.session",
    "utils.training_run",
)
MODELS = ("llama.modeling_llama", "gpt2.modeling_gpt2", "auto.modeling_auto", "auto.tokenization_auto")


def import_everything() -> None:
    """Imports what the scripts need, and computes nothing: threads do not survive a fork."""
    sys.path[0] = str(ROOT)
    for name in ("torch", "mlx"):
        importlib.import_module("utils.backends").load_backend(name)
    for name in (
        *(f"transformers.models.{name}" for name in MODELS),
        *OTHERS,
        *(f"scripts.{name}" for name in SCRIPTS),
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the forks leave it alone


def become_script(request: dict[str, Any]) -> NoReturn:
    """The child: runs a script as the interpreter would.

    Args:
        request: `name` of a script or module, its `arguments`, `cwd`, `environment` (None unsets a variable), files for `stdin`,
            `stdout` and `stderr`, and `limits` for `prepare`.
    """
    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    try:
        streams = ((request["stdin"], os.O_RDONLY), *((request[name], os.O_WRONLY) for name in ("stdout", "stderr")))
        for number, (path, mode) in enumerate(streams):
            os.dup2(os.open(path, mode), number)
        os.chdir(request["cwd"])
        for name, value in request["environment"].items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        module = request["name"] if "." in request["name"] else f"scripts.{request['name']}"
        sys.argv = [str(ROOT / f"{module.replace('.', '/')}.py"), *request["arguments"]]
        script, cli = (importlib.import_module(name) for name in (module, "utils.cli"))

        def main(arguments: Sequence[str] | None) -> int | None:
            prepare(request["limits"])
            return script.main(arguments)

        cli.run(main)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what the interpreter does at its end, which a fork of another program does not reach
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if not request["limits"].get("to_the_end"):
        os._exit(code)
    sys.exit(code)


def prepare(limits: dict[str, Any]) -> None:
    """Sets what a test wants of this process beside its arguments.

    Args:
        limits: `moment`, when it gets a signal (`benchmarks.tiny_runs.Moment`); `size` in bytes, of each file that it writes;
            `user`, who it is; `one_core`, on which there is one thread whatever else the machine is doing; `to_the_end`, to
            end it as the interpreter does, half a second later.
    """
    if limits.get("one_core"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    if limits.get("size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["size"], limits["size"]))
    if limits.get("user"):
        os.setuid(limits["user"])
    if limits.get("moment"):
        importlib.import_module("benchmarks.tiny_runs").Moment(**limits["moment"]).arm()


def main() -> None:
    """Answers requests until there are none."""
    import_everything()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become_script(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

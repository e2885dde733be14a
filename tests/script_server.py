"""Runs the project's scripts in forks of one process that has imported the frameworks: a second instead of six.

    python tests/script_server.py

Requests come in and exit codes go out, one line each. A fork is a process of its own, with its own working directory, environment,
streams and exit code, and imports our modules itself. What is read when a framework is imported, such as HF_HOME, is the server's.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Beside what the back end imports: what transformers loads for the models that the tests train.
MODELS = ("llama.modeling_llama", "gpt2.modeling_gpt2", "auto.modeling_auto", "auto.tokenization_auto")
OURS = ("benchmarks", "config", "scripts", "utils")


def import_frameworks() -> None:
    """Imports what the scripts import later, and forgets our own modules: a fork starts its clocks and settings itself."""
    importlib.import_module("utils.backends.torch_backend")
    for name in MODELS:
        importlib.import_module(f"transformers.models.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]


def become_script(request: dict[str, Any]) -> None:
    """The child: runs the script as the interpreter would, and never returns."""
    code = 1
    try:
        streams = ((request["stdin"], os.O_RDONLY), *((request[name], os.O_WRONLY) for name in ("stdout", "stderr")))
        for number, (path, mode) in enumerate(streams):
            os.dup2(os.open(path, mode), number)
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        sys.argv = [str(ROOT / "scripts" / f"{request['name']}.py"), *request["arguments"]]
        sys.path[0] = str(ROOT / "scripts")
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:  # noqa: BLE001 - what the interpreter does at its end, which a fork of another program does not reach
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Answers requests until there are none."""
    sys.path[0] = str(ROOT)
    import_frameworks()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become_script(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

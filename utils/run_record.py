"""run.json and log.txt of a run while it lasts, true whatever ends it."""

from __future__ import annotations

import logging
import signal
from typing import Any

from utils.exceptions import TunebookError
from utils.logging import NAME, add_log_file, get_logger, hide_secrets, remove_log_file
from utils.run_folder import RunFolder
from utils.stop_signals import SignalExit


class RunRecord:
    """Keeps run.json and log.txt true while a run lasts, and at its end, whatever ended it."""

    def __init__(self, folder: RunFolder, facts: dict[str, Any]) -> None:
        """Takes what is known before the first step; `results` are added to it when the run ends by itself."""
        self.folder, self.facts = folder, facts
        self.results: dict[str, Any] = {}

    def __enter__(self) -> RunRecord:
        self.folder.write_facts(self.facts)
        self.log = add_log_file(self.folder.log_file)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            results = self.results if error is None else self.describe_failure(error)
            self.folder.write_facts({**self.facts, **results})
        except OSError as problem:
            if error is None:
                raise
            get_logger().warning("run.json cannot be written: %s", problem)  # what ended the run is more important
        finally:
            remove_log_file(self.log)

    def describe_failure(self, error: BaseException) -> dict[str, Any]:
        """What run.json says of a run that did not end by itself."""
        status = "stopped" if isinstance(error, KeyboardInterrupt | SignalExit) else "failed"
        skipped = self.folder.count_skipped_steps()
        return {"status": status, "error": self.log_error(error), "skipped_steps": skipped}

    def log_error(self, error: BaseException) -> str:
        """Writes what ended the run into its log alone, for the terminal shows it anyway; a fault of ours with its traceback.

        Returns:
            The error in words.
        """
        text, trace = f"{type(error).__name__}: {error}", None
        if isinstance(error, TunebookError):
            text = str(error)
        elif isinstance(error, KeyboardInterrupt):
            text = "interrupted"
        elif isinstance(error, SignalExit):
            text = f"stopped by {signal.Signals(error.number).name}"
        elif isinstance(error, SystemExit):
            text = f"ended with exit code {error.code}"
        else:
            trace = (type(error), error, error.__traceback__)
        self.log.handle(get_logger().makeRecord(NAME, logging.ERROR, __file__, 0, text, (), trace))
        return hide_secrets(text)

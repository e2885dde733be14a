"""Every error that a user can act on, and the exit code that says whose turn it is.

The root is `TunebookError`. Its five children answer «what do I change?»: the recipe (2), the data (3), the machine (4),
the run or run folder (5). Whatever else is raised is our own bug: full traceback, exit 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where it is, and what to do about it.

    Attributes:
        code: short stable name for scripts and tests, such as `unknown-key`.
        message: what is wrong, in one sentence.
        where: `file:line`, or None where the problem has no place.
        fix: what to change, in one sentence, or None where the message says it.
        severity: an error stops the run; a warning is allowed but rarely meant.
    """

    code: str
    message: str
    where: str | None = None
    fix: str | None = None
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.message}" + (f" Fix: {self.fix}" if self.fix else "")

    def to_json(self) -> dict[str, str | None]:
        """The shape that every script prints under `--json`."""
        return asdict(self)


class TunebookError(Exception):
    """Root of all errors that name a fix. Holds one or more problems, all reported at once."""

    exit_code = 1
    code = "error"

    def __init__(
        self, message: str, *, where: str | None = None, fix: str | None = None, code: str | None = None
    ) -> None:
        self.problems: tuple[Problem, ...] = (Problem(code or self.code, message, where, fix),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> TunebookError:
        """Builds one error out of several problems; its text is one line for each."""
        error = cls(problems[0].message, where=problems[0].where, fix=problems[0].fix, code=problems[0].code)
        error.problems = tuple(problems)
        error.args = ("\n".join(str(problem) for problem in problems),)
        return error


class RecipeError(TunebookError):
    """The recipe says something impossible: edit the YAML."""

    exit_code = 2
    code = "recipe"


class DataError(TunebookError):
    """A data file is missing, unreadable or holds a bad row: fix `file:line`."""

    exit_code = 3
    code = "data"


class MachineError(TunebookError):
    """The recipe is fine but cannot run here: other machine, install or memory."""

    exit_code = 4
    code = "machine"


class OutOfMemory(MachineError):
    """The memory of this machine does not hold what a step needs; gradients are gone, weights are as they were."""

    code = "memory"


class ModelLoadingError(MachineError):
    """The model's files are absent, incomplete or not loadable here."""

    code = "model-loading"


class RunError(TunebookError):
    """This run or run folder cannot go on."""

    exit_code = 5
    code = "run"


class TrainingError(RunError):
    """Training had to stop: a loss or gradient that is not finite, or nothing to train."""

    code = "training"


class AdapterError(RunError):
    """An adapter does not fit its base model, or does not survive a merge."""

    code = "adapter"

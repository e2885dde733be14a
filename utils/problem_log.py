"""Problems of many rows, counted, of which the first are shown."""

from __future__ import annotations

from utils.data_loading import SHOWN_PROBLEMS
from utils.exceptions import DataError, Problem


class ProblemLog:
    """Counts all problems and keeps the first ones."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def add(self, problem: Problem, *, first: bool = False) -> None:
        """Counts one more; with `first` it explains the others and is shown before them."""
        self.count += 1
        if first:
            self.first = [problem, *self.first][:SHOWN_PROBLEMS]
        elif len(self.first) < SHOWN_PROBLEMS:
            self.first.append(problem)

    def raise_if_any(self) -> None:
        """Raises one DataError that shows the first problems and counts the rest."""
        if not self.count:
            return
        shown = list(self.first)
        if self.count > len(shown):
            shown.append(Problem("more", f"… and {self.count - len(shown)} more rows with problems"))
        raise DataError.from_problems(shown)

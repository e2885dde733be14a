"""Files with a JSON object on each line, one for each step of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.exceptions import RunError


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Adds one line of strict JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows of a file that `append_line` wrote; none where there is no file. Half a last line, left by a kill, is no row.

    Raises:
        RunError: a line is no JSON object with a step.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot be read: {error}", where=str(path), code="no-run") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            fix = "restore the file from a copy: the run wrote something else"
            message = "is no JSON object with a step"
            raise RunError(message, where=f"{path}:{number}", fix=fix, code="no-run")
        rows.append(row)
    return rows

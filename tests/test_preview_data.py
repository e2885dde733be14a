"""What preview_data.py shows is what train.py trains on."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished, RunScript
from utils.model_source import ModelSource
from utils.tokenizer_files import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "1!"}]},
    {"conversations": [{"from": "human", "value": "Say 2"}, {"from": "gpt", "value": "2!"}]},
    {"instruction": "Say it", "input": "3", "output": "3!"},
    {"prompt": "Say 4", "completion": "4!"},
    {"question": "Say 5", "answer": "5!"},
    {"text": "Six."},
    *({"prompt": f"Count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(7, 27)),
]


@pytest.fixture
def recipe(tmp_path: Path, embedded: ModelSource) -> Path:
    """A recipe of rows in six formats in one file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    body = {
        "model": {"name": "embedded/smollm2-135m-instruct"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.0},
        "lora": {"r": 8},
        "training": {"method": "sft"},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


Preview = Callable[..., Finished]


@pytest.fixture
def preview(recipe: Path, tmp_path: Path, run_script: RunScript) -> Preview:
    """`preview("--rows", "1")` shows the rows of that recipe."""
    return functools.partial(run_script, "preview_data", "--recipe", recipe, cwd=tmp_path)


def test_json_rows_hold_text_ids_and_a_mask_of_the_answer(preview: Preview, embedded: ModelSource) -> None:
    done = preview("--rows", "6", "--json")
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(embedded.folder)
    rows = json.loads(done.stdout)["rows"]
    learned = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["loss_mask"])
        assert set(row["loss_mask"]) <= {0, 1}
        assert tokenizer.decode(row["input_ids"]) == row["text"]
        ids = [token for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask]
        learned.append(tokenizer.decode(ids))

    assert learned[:5] == [f"{number}!<|im_end|>" for number in range(1, 6)]
    assert learned[5].startswith("Six.")
    assert [row["where"].rpartition(":")[2] for row in rows] == [str(line) for line in range(1, 7)]


def test_statistics_add_up(preview: Preview) -> None:
    answer = json.loads(preview("--rows", "100", "--json").stdout)
    statistics, rows = answer["statistics"], answer["rows"]
    lengths = [len(row["input_ids"]) for row in rows]

    assert len(rows) == statistics["examples"] == statistics["rows"] == len(ROWS)
    assert statistics["formats"] == {
        "messages": 1,
        "sharegpt": 1,
        "alpaca": 1,
        "prompt_completion": 21,
        "question_answer": 1,
        "text": 1,
    }
    assert statistics["tokens"] == sum(lengths)
    assert statistics["supervised_tokens"] == sum(sum(row["loss_mask"][1:]) for row in rows)
    assert (statistics["length"]["shortest"], statistics["length"]["longest"]) == (min(lengths), max(lengths))
    assert sum(bar["examples"] for bar in statistics["histogram"]) == len(rows)
    for bar in statistics["histogram"]:
        assert bar["examples"] == sum(bar["from"] <= length < bar["below"] for length in lengths)


def test_people_see_marks_a_table_and_a_picture(preview: Preview, tmp_path: Path) -> None:
    picture = tmp_path / "lengths.png"
    done = preview("--rows", "1", "--picture", str(picture))

    assert done.returncode == 0, done.stderr
    assert "⟦1!<|im_end|>⟧" in done.stdout
    assert "supervised share" in done.stdout
    assert "█" in done.stdout
    assert "Next: python scripts/train.py" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_an_error_with_a_fix(preview: Preview, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = preview("--picture", str(tmp_path / "file" / "x.png"))

    assert done.returncode == 5
    assert "--picture" in done.stderr
    assert "Traceback" not in done.stderr


def test_left_out_rows_and_copies_are_counted(preview: Preview, tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0], {"prompt": "Long", "completion": "word " * 300}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = preview("--json", "--set", "data.max_length=128", "--set", "data.overlong=drop")
    answer = json.loads(done.stdout)

    assert answer["statistics"]["left_out"] == 1
    assert answer["statistics"]["duplicate_rows"] == 1
    assert answer["statistics"]["examples"] == len(ROWS) + 1
    assert "duplicate-rows" in [problem["code"] for problem in answer["problems"]]
    assert "rows.jsonl:28" in done.stderr


def test_a_bad_row_is_reported_without_a_framework(recipe: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "Hi", "completion": 3}\n')
    command = [sys.executable, "-X", "importtime", "scripts/preview_data.py", "--recipe", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}

    assert done.returncode == 3
    assert "rows.jsonl:27: completion must be text" in done.stderr
    assert "utils.preflight" in imported
    assert not imported & {"torch", "transformers", "datasets", "pandas", "pyarrow"}

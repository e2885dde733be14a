"""Some 300 broken recipes, rows, folders, adapters and runs, given to the real scripts: the documented code and words, and nothing else.

No case may end in a traceback, take a second, hang, change a file, or leave one behind.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
CASES = [
    {"run": ["validate", "--recipe", "recipe.yaml"], **case, "name": f"{path.stem}: {case['name']}"}
    for path in sorted((HERE / "cases").glob("*.yaml"))
    for case in yaml.safe_load(path.read_text(encoding="utf-8"))
]
GOOD = [
    {"name": "good: validate", "run": ["validate", "--recipe", "recipe.yaml"]},
    {"name": "good: infer", "run": ["infer", "--run", "run", "--prompt", "a", "--set", "generation.max_new_tokens=1"]},
    {"name": "good: merge", "run": ["merge", "--run", "run"]},
    {
        "name": "good: adapter",
        "run": ["train", "--recipe", "recipe.yaml", "--set", "model.adapter=adapter", "--run", "b"],
    },
    {"name": "good: mlx adapter", "run": ["merge", "--model", "model", "--adapter", "mlx_adapter", "--out", "merged"]},
    {"name": "good: export", "run": ["export", "--to", "mlx", "--run", "run"]},
    {"name": "good: export back", "run": ["export", "--to", "peft", "--model", "model", "--adapter", "mlx_adapter"]},
]
SECONDS = 1.0  # of processor time; a case that loads weights or waits for a limit names its own


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every case ended in, by its name."""
    folder = tmp_path_factory.mktemp("bad_inputs")
    (folder / "cases.json").write_text(json.dumps([*GOOD, *CASES]), encoding="utf-8")
    command = [sys.executable, str(HERE / "case_server.py"), str(folder / "cases.json"), str(folder / "cases")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "cases" / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["", *(case["name"] for case in GOOD)], ids=lambda name: name or "good: train")
def test_what_the_cases_are_made_from_is_good(results: dict[str, Any], name: str) -> None:
    assert results[name]["code"] == 0, results[name]["stderr"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_bad_input_is_refused_with_its_code_and_words_and_without_a_trace(
    results: dict[str, Any], case: dict[str, Any]
) -> None:
    found = results[case["name"]]
    assert found["code"] == case["code"], found["stderr"]
    for words in case["words"]:
        assert words in found["stderr"]
    assert "Traceback" not in found["stderr"] + found["stdout"]
    assert "\x1b" not in found["stderr"] + found["stdout"], "a terminal would obey this"
    assert found["changed"] == case.get("changed", []), "a file was changed, or left behind"
    assert not [secret for secret in case.get("hidden", ()) if secret in found["stderr"] + found["stdout"]]
    assert [path for path in found["cached"] if "/." in path.rpartition("/cache/")[2]] == [], "half of a cache entry"
    assert found["seconds"] < case.get("seconds", SECONDS)


def test_the_page_on_security_names_cases_and_tests_that_exist() -> None:
    root = HERE.parents[1]
    page = (root / "docs" / "security.md").read_text(encoding="utf-8").partition("## Known attacks")[2]
    sources = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").rglob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", page) if f"def {name}(" not in sources] == []
    names = {case["name"].partition(": ")[2] for case in CASES}
    quoted = re.findall(r"\*([^*|]+)\*", page)
    assert len(quoted) > 20
    unknown = [one for one in quoted if not any(all(part in name for part in one.split("…")) for name in names)]
    assert unknown == []


def test_there_are_cases_for_every_code_and_no_two_of_one_name() -> None:
    assert {case["code"] for case in CASES} == {0, 2, 3, 4, 5}
    assert len({case["name"] for case in CASES}) == len(CASES) >= 150

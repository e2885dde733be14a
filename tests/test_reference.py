"""The committed recipe reference is what the script writes."""

import json
import subprocess
import sys
from pathlib import Path

from config.recipe_errors import iterate_schema_keys
from config.structured_config import DataSource, Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE, SCHEMA = ROOT / "docs" / "recipe_reference.md", ROOT / "docs" / "recipe.schema.json"


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/write_reference.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_committed_files_are_what_the_script_writes(tmp_path: Path) -> None:
    written = run_script("--out", str(tmp_path))

    assert written.returncode == 0, written.stderr
    for path in (PAGE, SCHEMA):
        assert path.read_text(encoding="utf-8") == (tmp_path / path.name).read_text(encoding="utf-8"), (
            f"{path.name} is stale: run python scripts/write_reference.py"
        )


def test_check_fails_on_a_stale_file_and_leaves_it_alone(tmp_path: Path) -> None:
    run_script("--out", str(tmp_path))
    fresh = run_script("--check", "--out", str(tmp_path))
    page = tmp_path / PAGE.name
    page.write_text("old", encoding="utf-8")
    stale = run_script("--check", "--out", str(tmp_path))

    assert fresh.returncode == 0
    assert stale.returncode == 1
    assert str(page) in stale.stdout
    assert page.read_text(encoding="utf-8") == "old"


def test_every_key_of_the_schema_stands_under_its_section() -> None:
    section, listed = "", set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## `"):
            section = line.split("`")[1] + "."
            listed.add(section.rstrip("."))
        elif line.startswith("| `"):
            listed.add(section + line.split("`")[1])
            assert "| |" not in line, f"no meaning: {line}"

    sources = {f"DataSource.{key}" for key in ("", *DataSource.model_fields)}
    assert listed == set(iterate_schema_keys(Recipe)) | {name.rstrip(".") for name in sources}


def test_the_design_names_every_section_and_every_key_of_the_top_level() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = design[design.index("| section | says |") :].split("\n\n")[0]
    assert {name for name in Recipe.model_fields if f"`{name}`" not in table} == set()


def test_json_schema_refuses_unknown_keys_everywhere() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))

    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))

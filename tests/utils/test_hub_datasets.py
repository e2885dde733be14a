"""Rows of hub datasets: from a download, from the library's cache, as a stream, or refused with a way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.structured_config import DataSource
from tests.utils.test_downloads import COMMIT, Hub, hub, make_environment  # noqa: F401 - `hub` is a fixture
from utils.hub_datasets import explain_hub_error, iterate_undecoded

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"question": "a", "answer": "b", "level": 1}, {"question": "c", "answer": "d", "level": None}]
READ = [{"question": "a", "answer": "b", "level": 1}, {"question": "c", "answer": "d"}]  # a null is a column less
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
- config_name: small
  data_files: small.jsonl
- config_name: mixed
  data_files: mixed-*
- config_name: absolute
  data_files: SECRET
- config_name: above
  data_files: ../../../../secret.jsonl
- config_name: web
  data_files: http://127.0.0.1:9/secret.jsonl
---
"""
FILES = {
    "main/train-0.jsonl": LINES.splitlines(keepends=True)[0],
    "main/train-1.jsonl": LINES.splitlines(keepends=True)[1],
    "small.jsonl": LINES,
    "mixed-0.jsonl": '{"question": "a", "answer": "b", "level": null}\n',
    "mixed-1.jsonl": '{"question": "a", "answer": "b", "level": {"of": "school"}}\n',
}


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("Dataset 'org/name' is a gated dataset on the Hub. Visit …", "hub-gated", "HF_TOKEN"),
        ("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)", "hub-offline", "org/name"),
        ("Unknown split \"tset\". Should be one of ['train', 'test'].", "hub-split", "train, test"),
        ("BuilderConfig 'xx' not found. Available: ['en', 'fr']", "hub-subset", "en, fr"),
        (
            "Couldn't find cache for org/name for config 'xx'\nAvailable configs in the cache: ['en']",
            "hub-subset",
            "en",
        ),
        ("Config name is missing.\nPlease pick one among the available configs: ['en', 'fr']", "hub-subset", "en, fr"),
        ("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed.", "no-file", "HF_TOKEN"),
        ("Dataset scripts are no longer supported, but found name.py", "hub-script", "parquet"),
    ],
)
def test_what_the_hub_refuses_becomes_a_line_with_a_way_out(text: str, code: str, words: str) -> None:
    (problem,) = explain_hub_error(DataSource(source="org/name", split="tset"), ValueError(text)).problems
    assert (problem.code, problem.where) == (code, "org/name[tset]")
    assert words in (problem.fix or "")


DRIVER = """
import json, sys
from config.structured_config import DataSource
from utils.data_sources import find_sources, hash_source, iterate_rows
from utils.exceptions import DataError
asked = json.loads(sys.argv[1])
for section in asked:
    (source,) = find_sources(DataSource(**section), "recipe.yaml:4")
    try:
        print(json.dumps([[row.fields, row.where] for row in iterate_rows(source, {})] + [hash_source(source)]))
    except DataError as error:
        print(json.dumps({**error.problems[0].to_json(), "library": "datasets" in sys.modules}))
# A stream is a dataset of torch, so the library imports it there.
assert "torch" not in sys.modules or any(section.get("streaming") for section in asked)
"""


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_offline(home: Path, *asked: dict[str, Any]) -> list[Any]:
    """Reads hub datasets in a process of its own, because the library looks at the environment when imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    output = run([sys.executable, "-c", DRIVER, json.dumps(asked)], environment)
    return [json.loads(line) for line in output.splitlines()]


def download(hub: Hub, home: Path, *options: str, **words: str) -> None:  # noqa: F811
    """The command that our message names; words of the card are replaced."""
    card = CARD
    for word, text in words.items():
        card = card.replace(word, text)
    hub.models["org/name"] = {name: text.encode() for name, text in {**FILES, "README.md": card}.items()}
    command = [str(Path(sys.executable).parent / "hf"), "download", "org/name", "--repo-type", "dataset", *options]
    run(command, make_environment(hub, home))


def prepare(home: Path) -> Path:
    """The library's cache of `org/name`, made as it makes one: a local folder is loaded, and its cache renamed.

    Returns:
        The folder that is named by the commit.
    """
    folder = home / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(LINES, encoding="utf-8")
    code = f"import datasets; datasets.load_dataset({str(folder)!r})"
    run([sys.executable, "-c", code], {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)})
    shutil.move(home / "datasets" / "name", home / "datasets" / "org___name")
    (prepared,) = [path for path in (home / "datasets" / "org___name").glob("*/*/*") if path.is_dir()]
    return prepared.rename(prepared.with_name(COMMIT))


def test_without_network_a_dataset_is_read_from_the_librarys_cache_or_refused(tmp_path: Path) -> None:
    prepare(tmp_path)
    read, pinned, other, wrong_split, uncached = read_offline(
        tmp_path,
        {"source": "org/name"},
        {"source": "org/name", "revision": COMMIT},
        {"source": "org/name", "revision": "f" * 40},
        {"source": "org/name", "split": "tset"},
        {"source": "org/other"},
    )
    assert read[:2] == [[READ[0], "org/name[train]:1"], [READ[1], "org/name[train]:2"]]
    assert len(read[2]) == 64
    assert pinned == read
    # The library reads the last commit that it prepared, whatever the recipe pins.
    assert (other["code"], other["where"]) == ("hub-commit", "org/name[train]")
    assert f"--revision {'f' * 40}" in other["fix"]
    assert (wrong_split["code"], wrong_split["where"]) == ("hub-split", "org/name[tset]")
    assert "train" in wrong_split["fix"]
    assert uncached["code"] == "hub-offline"


def test_the_command_of_the_message_makes_a_dataset_readable_without_network(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    asked = {"source": "org/name", "subset": "main"}
    (refused,) = read_offline(tmp_path, asked)
    assert (refused["code"], refused["library"]) == ("hub-offline", False)  # its import alone takes a second
    assert refused["fix"].endswith("hf download org/name --repo-type dataset")
    download(hub, tmp_path)
    rows, streamed, small, pinned, mixed, mixed_stream, no_subset, no_split, no_revision = read_offline(
        tmp_path,
        asked,
        {**asked, "streaming": True},
        {**asked, "subset": "small"},
        {**asked, "revision": COMMIT},
        {**asked, "subset": "mixed"},
        {**asked, "subset": "mixed", "streaming": True},
        {"source": "org/name"},
        {**asked, "split": "tset"},
        {**asked, "revision": "f" * 40},
    )
    assert rows[:2] == [[READ[0], "org/name[train]:1"], [READ[1], "org/name[train]:2"]]
    assert len(rows[2]) == 64
    assert streamed == pinned == rows
    assert small[:2] == rows[:2]
    assert small[2] != rows[2]
    for found in (mixed, mixed_stream):
        assert found["code"] == "hub"
        assert "cast" in found["message"]
    assert (no_subset["code"], no_subset["fix"]) == (
        "hub-subset",
        "set subset to one of main, small, mixed, absolute, above, web",
    )
    assert (no_split["code"], no_split["fix"]) == ("hub-split", "set split to one of train")
    assert no_revision["code"] == "hub-offline"
    # With a network it is not asked: this address has no server.
    environment = make_environment("http://127.0.0.1:9", tmp_path)
    (unasked,) = run([sys.executable, "-c", DRIVER, json.dumps([asked])], environment).splitlines()
    assert json.loads(unasked) == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_the_card_of_a_dataset_chooses_no_file_of_this_machine(hub: Hub, tmp_path: Path, streaming: bool) -> None:  # noqa: F811
    # datasets opens whatever path or address a card names.
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"text": "secret"}\n', encoding="utf-8")
    download(hub, tmp_path, SECRET=str(secret))
    asked = [{"source": "org/name", "subset": name, "streaming": streaming} for name in ("absolute", "above", "web")]
    absolute, above, web = read_offline(tmp_path, *asked)
    for found in (absolute, above):
        assert found["code"] == "hub-outside"
        assert "secret.jsonl" in found["message"]
    assert web["code"] in ("hub", "hub-outside")


def test_a_part_of_a_download_is_never_taken_for_the_whole(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    download(hub, tmp_path, "--exclude", "main/train-1.jsonl")
    (broken,) = read_offline(tmp_path, {"source": "org/name", "subset": "main"})
    assert broken["code"] == "hub-offline"
    download(hub, tmp_path)
    (whole,) = read_offline(tmp_path, {"source": "org/name", "subset": "main"})
    assert len(whole) == 3


def test_what_a_row_of_a_hub_dataset_names_is_never_opened(tmp_path: Path) -> None:
    # datasets decodes an image by opening the path or address that its row holds, whoever wrote it (as CVE-2025-61784).
    from datasets import Dataset, Features, Image, Value

    here = {"bytes": None, "path": str(tmp_path / "secret.png")}
    there = {"bytes": None, "path": "http://127.0.0.1:9/x.png"}
    features = Features({"picture": Image(), "text": Value("string")})
    dataset = Dataset.from_dict({"picture": [here, there], "text": ["a", "b"]}, features=features)
    with pytest.raises(FileNotFoundError):
        dataset[0]
    rows = list(iterate_undecoded(dataset))
    assert rows == [{"picture": here, "text": "a"}, {"picture": there, "text": "b"}]
    assert list(iterate_undecoded(dataset.to_iterable_dataset())) == rows

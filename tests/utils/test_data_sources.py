"""What a recipe names becomes files and hub datasets, and what cannot be had is said in one line with a way out."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from config.structured_config import DataSource
from utils.data_loading import Row
from utils.data_sources import RowSource, explain_hub_error, find_sources, hash_source, iterate_rows, iterate_undecoded
from utils.exceptions import DataError, Problem

ROOT = Path(__file__).resolve().parents[2]
PLACE = "recipe.yaml:4"


def write(path: Path, count: int = 1) -> str:
    path.write_text('{"text": "a"}\n' * count, encoding="utf-8")
    return str(path)


def fail(asked: Any) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        find_sources(asked, PLACE)
    return caught.value.problems


def test_a_file_is_one_source(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl")
    assert find_sources(name, PLACE) == [RowSource(name, 1.0, Path(name))]


def test_a_list_keeps_its_order_and_its_weights(tmp_path: Path) -> None:
    b, a = write(tmp_path / "b.jsonl"), write(tmp_path / "a.jsonl")
    found = find_sources((b, DataSource(source=a, weight=0.5)), PLACE)
    assert [(source.name, source.weight) for source in found] == [(b, 1.0), (a, 0.5)]


def test_a_glob_gives_its_files_in_order_with_the_weight_of_the_entry(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{number}.jsonl") for number in (10, 2, 1)]
    (tmp_path / "notes.txt").write_text("no rows")
    (tmp_path / "folder.jsonl").mkdir()
    found = find_sources(DataSource(source=f"{tmp_path}/*", weight=2), PLACE)
    assert [(source.name, source.weight) for source in found] == [(name, 2.0) for name in sorted(names)]


def test_a_glob_reaches_into_folders(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    name = write(tmp_path / "x" / "y" / "a.jsonl")
    assert [source.name for source in find_sources(f"{tmp_path}/**/*.jsonl", PLACE)] == [name]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    name = write(tmp_path / "a[1].jsonl")
    write(tmp_path / "a1.jsonl")
    assert [source.name for source in find_sources(name, PLACE)] == [name]


@pytest.mark.parametrize("pattern", ["*.jsonl", "*"])
def test_a_glob_without_a_data_file_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "notes.txt").write_text("no rows")
    (problem,) = fail(f"{tmp_path}/{pattern}")
    assert (problem.code, problem.where) == ("no-file", PLACE)


def test_a_missing_file_is_no_hub_id_where_its_folder_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl")
    assert fail("data/trian")[0].code == "no-file"
    assert "data/train.jsonl" in (fail("data/trian.jsonl")[0].fix or "")
    assert fail("elsewhere/train.jsonl")[0].code == "no-file"


def test_a_hub_id_is_a_source_that_knows_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (plain,) = find_sources("org/name", PLACE)
    assert (plain.name, plain.path) == ("org/name[train]", None)
    (source,) = find_sources(DataSource(source="org/na.me-2", split="test", subset="en"), PLACE)
    assert source.name == "org/na.me-2[test]"
    assert source.hub is not None
    assert source.hub.subset == "en"


def test_a_folder_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    (problem,) = fail(str(tmp_path))
    assert "train.jsonl" in (problem.fix or "")
    assert f"{tmp_path}/*.jsonl" in (problem.fix or "")


def test_settings_of_hub_datasets_beside_a_file_are_refused_instead_of_ignored(tmp_path: Path) -> None:
    (problem,) = fail(DataSource(source=write(tmp_path / "a.jsonl"), split="test"))
    assert "split" in problem.message


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for asked in ((name, name), (name, f"{tmp_path}/a*.jsonl"), (name, f"{tmp_path}/link.jsonl")):
        (problem,) = fail(asked)
        assert problem.code == "repeated-source"
        assert "weight" in (problem.fix or "")


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    assert len(fail((f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"))) == 2


def test_rows_are_renamed_while_they_are_read_and_bad_ones_are_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "a"}\n{oops\n{"p": "b"}\n', encoding="utf-8")
    (source,) = find_sources(str(path), PLACE)
    unseen = {"q", "r"}
    first, broken, lacking = iterate_rows(source, {"q": "text", "r": "answer"}, unseen)
    assert first == Row({"text": "a"}, f"{path}:1")
    assert isinstance(broken, Problem)
    assert broken.code == "not-json"
    assert lacking == Row({"p": "b"}, f"{path}:3")
    assert unseen == {"r"}


def test_a_hash_follows_the_bytes_and_not_the_name(tmp_path: Path) -> None:
    hashes = []
    for name, count in (("a.jsonl", 1), ("b.jsonl", 1), ("c.jsonl", 2)):
        (source,) = find_sources(write(tmp_path / name, count), PLACE)
        hashes.append(hash_source(source))
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 64


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
    source = RowSource("org/name[tset]", hub=DataSource(source="org/name", split="tset"))
    (problem,) = explain_hub_error(source, ValueError(text)).problems
    assert (problem.code, problem.where) == (code, "org/name[tset]")
    assert words in (problem.fix or "")


HUB_SCRIPT = """
import json, sys
from config.structured_config import DataSource
from utils.data_sources import find_sources, hash_source, iterate_rows, iterate_undecoded
from utils.exceptions import DataError
for name, split in (argument.split(":") for argument in sys.argv[1:]):
    (source,) = find_sources(DataSource(source=name, split=split), "recipe.yaml:4")
    try:
        print(json.dumps([[row.fields, row.where] for row in iterate_rows(source, {})] + [hash_source(source)]))
    except DataError as error:
        print(json.dumps(error.problems[0].to_json()))
assert "torch" not in sys.modules
"""


def run_offline(cache: Path, *arguments: str) -> list[Any]:
    """Reads hub datasets in a process of its own, because the library looks at the environment when imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, *arguments],
        cwd=cache,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_without_network_a_hub_dataset_is_read_from_the_cache_or_refused(tmp_path: Path) -> None:
    # The library's cache of `org/name`, made as it makes one: a local folder is loaded, and its cache renamed.
    folder = tmp_path / "name"
    folder.mkdir()
    rows = [{"question": "a", "answer": "b", "level": None}, {"question": "c", "answer": "d", "level": 2}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cache = tmp_path / "cache"
    cache.mkdir()
    code = f"import datasets; datasets.load_dataset({str(folder)!r})"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120, check=True)
    shutil.move(cache / "datasets" / "name", cache / "datasets" / "org___name")
    read, wrong_split, uncached = run_offline(cache, "org/name:train", "org/name:tset", "org/other:train")
    assert read[:2] == [
        [{"question": "a", "answer": "b"}, "org/name[train]:1"],
        [{"question": "c", "answer": "d", "level": 2}, "org/name[train]:2"],
    ]
    assert len(read[2]) == 64
    assert (wrong_split["code"], wrong_split["where"]) == ("hub-split", "org/name[tset]")
    assert "train" in wrong_split["fix"]
    assert uncached["code"] == "hub-offline"
    assert "HF_HUB_OFFLINE" in uncached["fix"]


def test_a_gzipped_file_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (source,) = find_sources(str(path), PLACE)
    assert list(iterate_rows(source, {})) == [Row({"text": "a"}, f"{path}:1")]


def test_a_pipe_and_a_name_that_is_too_long_are_refused_without_a_traceback(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="a pipe or a device"):
        find_sources(str(tmp_path / "pipe.jsonl"), PLACE)
    with pytest.raises(DataError, match="cannot be looked up"):
        find_sources("a" * 300, PLACE)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_two_columns_with_one_name_are_refused(tmp_path: Path, name: str) -> None:
    # The later one won in silence, and its answer was learned.
    if name == "a.csv":
        (tmp_path / name).write_text("question,answer, answer\nq,right,wrong\n", encoding="utf-8")
    else:
        arrays = [pyarrow.array([text]) for text in ("q", "right", "wrong")]
        parquet.write_table(pyarrow.Table.from_arrays(arrays, ["question", "answer", "answer"]), tmp_path / name)
    (source,) = find_sources(str(tmp_path / name), PLACE)
    with pytest.raises(DataError, match="two columns are called 'answer'"):
        list(iterate_rows(source, {}))


def test_a_split_of_a_hub_dataset_may_be_named_as_places_of_rows_are_written() -> None:
    (short,) = find_sources("lab/sums[test]", PLACE)
    (long,) = find_sources(DataSource(source="lab/sums", split="test"), PLACE)
    assert short.name == long.name == "lab/sums[test]"
    assert short.hub is not None
    assert (short.hub.source, short.hub.split) == ("lab/sums", "test")


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


def test_an_address_is_no_data_file() -> None:
    with pytest.raises(DataError, match="is an address") as caught:
        find_sources(["https://example.com/rows.jsonl", "s3://bucket/*.jsonl"], "r.yaml:3")
    assert [problem.code for problem in caught.value.problems] == ["address", "address"]

"""What a recipe names becomes files and hub datasets, and what cannot be had is said in one line with a way out."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from config.structured_config import DataSource
from utils.data_loading import Row
from utils.data_sources import RowSource, find_sources, hash_source, iterate_rows
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


def test_an_address_is_no_data_file() -> None:
    with pytest.raises(DataError, match="is an address") as caught:
        find_sources(["https://example.com/rows.jsonl", "s3://bucket/*.jsonl"], "r.yaml:3")
    assert [problem.code for problem in caught.value.problems] == ["address", "address"]

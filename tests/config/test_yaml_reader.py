"""The YAML reader knows every line, reads numbers as people write them, and loses nothing in silence."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.yaml_reader import MAX_BYTES, parse_yaml, read_yaml
from utils.exceptions import RecipeError


def read_value(text: str) -> Any:
    return parse_yaml(f"value: {text}", "x.yaml").values["value"]


def find_error(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "x.yaml")
    return caught.value


def test_every_key_knows_its_line_whatever_stands_between() -> None:
    text = "# header\n\nseed: 1\nmodel:\n\n  # why\n  name: a\n  dtype: auto\ndata: {train: x,\n  eval: y}\n"
    assert parse_yaml(text, "x.yaml").lines == {
        (): 1,
        ("seed",): 3,
        ("model",): 4,
        ("model", "name"): 7,
        ("model", "dtype"): 8,
        ("data",): 9,
        ("data", "train"): 9,
        ("data", "eval"): 10,
    }


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2e-4", 2e-4),
        ("4.0e-4", 4e-4),
        ("4.0E-4", 4e-4),
        ("1E5", 1e5),
        ("-3e2", -300.0),
        ("+1e+2", 100.0),
        (".5e1", 5.0),
        ("0.03", 0.03),
        (".5", 0.5),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text: str, number: float) -> None:
    # PyYAML follows YAML 1.1 and reads 2e-4 as the text "2e-4".
    value = read_value(text)
    assert type(value) is float
    assert value == number


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "On", "YES", "y", "n", "e4", "1e", "2e-4x", "1.2.3"])
def test_words_stay_words(word: str) -> None:
    # PyYAML reads on, yes and no as booleans: `packing: on` became true and a column called `no` became false.
    assert read_value(word) == word


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("null", None), ("~", None), ("7", 7)])
def test_plain_constants_are_read_as_what_they_are(text: str, value: object) -> None:
    assert read_value(text) is value or (read_value(text) == value and type(read_value(text)) is type(value))


@pytest.mark.parametrize("text", ["010", "1:30", "1:30:00"])
def test_a_number_is_never_read_in_base_eight_or_sixty(text: str) -> None:
    # YAML 1.1 reads 010 as 8 and 1:30 as 90: neither is what a person wrote, so it must stay a word or be 10.
    assert read_value(text) in (text, 10)


def test_quoted_numbers_stay_text() -> None:
    assert read_value('"3"') == "3"
    assert read_value("'2e-4'") == "2e-4"


def test_the_reader_leaves_pyyaml_itself_as_it_was() -> None:
    assert yaml.safe_load("a: yes\nb: 2e-4") == {"a": True, "b": "2e-4"}


def test_a_repeated_key_is_an_error_that_names_both_lines() -> None:
    # PyYAML keeps the last of two equal keys, so half of a recipe could vanish.
    error = find_error("model:\n  name: a\ntraining:\n  epochs: 1\n  batch_size: 2\n  epochs: 3\n")
    assert [problem.code for problem in error.problems] == ["duplicate-key"]
    assert error.problems[0].where == "x.yaml:6"
    assert "training.epochs" in error.problems[0].message
    assert "line 4" in error.problems[0].message


def test_all_repeated_keys_are_reported_at_once() -> None:
    error = find_error("seed: 1\nseed: 2\nlora:\n  r: 1\n  r: 2\nlora: {}\n")
    assert [problem.where for problem in error.problems] == ["x.yaml:2", "x.yaml:5", "x.yaml:6"]


def test_the_same_key_in_two_sections_is_no_repetition() -> None:
    assert parse_yaml("a: {batch_size: 1}\nb: {batch_size: 2}", "x").values == {
        "a": {"batch_size": 1},
        "b": {"batch_size": 2},
    }


@pytest.mark.parametrize("text", ["1: a", "null: a", "true: a", "2e-4: a", "? [a, b]\n: c", "a: {3: b}"])
def test_keys_that_are_not_words_are_refused_with_their_line(text: str) -> None:
    error = find_error(text)
    assert error.problems[0].where is not None
    assert error.problems[0].where.startswith("x.yaml:1")
    assert "plain word" in error.problems[0].message


def test_merge_keys_are_refused() -> None:
    error = find_error("base: &base\n  r: 1\nlora:\n  <<: *base\n")
    assert any(problem.where == "x.yaml:4" for problem in error.problems)


def test_aliases_are_refused_as_the_reader_promises() -> None:
    # read_yaml documents that a recipe which uses aliases is refused: a value would have two places.
    find_error("model:\n  name: &x a\ndata:\n  train: *x\n")


def test_aliases_within_aliases_cannot_make_the_reader_work_forever(tmp_path: Path) -> None:
    # Nine lines of nested aliases expand to 9**9 nodes: whoever walks them one by one never comes back.
    lines = ["a0: &a0 {k0: 1}"]
    for level in range(1, 10):
        parts = ", ".join(f"k{index}: *a{level - 1}" for index in range(9))
        lines.append(f"a{level}: &a{level} {{{parts}}}")
    (tmp_path / "bomb.yaml").write_text("\n".join(lines), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from config.yaml_reader import read_yaml\n"
        "from utils.exceptions import RecipeError\n"
        "try:\n    read_yaml(Path(sys.argv[1]))\nexcept RecipeError:\n    sys.exit(7)\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.yaml")]
    try:
        done = subprocess.run(command, cwd=root, timeout=5, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail("reading nine lines of aliases took more than five seconds")
    assert done.returncode == 7


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "3"])
def test_a_document_that_is_no_mapping_is_refused(text: str) -> None:
    assert "mapping" in find_error(text).problems[0].message


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_document_is_refused(text: str) -> None:
    assert "empty" in str(find_error(text)) or "mapping" in str(find_error(text))


def test_two_documents_in_one_file_are_refused() -> None:
    find_error("seed: 1\n---\nseed: 2\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: [1, 2\nc: 3\n", 3), ("a: 1\n\tb: 2\n", 2), ("a: b: c\n", 1), ("a: 'x\n", 2)],
)
def test_broken_yaml_is_an_error_with_its_line(text: str, line: int) -> None:
    error = find_error(text)
    assert error.problems[0].where == f"x.yaml:{line}"
    assert "not valid YAML" in error.problems[0].message


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.getcwd []", "a: !!python/name:os.system ''", "a: !x 1"])
def test_tags_that_would_build_objects_are_refused(text: str) -> None:
    find_error(text)


def test_a_document_that_is_nested_too_deeply_is_an_error_and_no_crash() -> None:
    find_error("a: " + "[" * 5000 + "]" * 5000)


def test_control_characters_are_an_error() -> None:
    find_error("a: \x00\n")


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read_yaml(path).values == {"seed": 1}


def test_windows_line_ends_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "crlf.yaml"
    path.write_bytes(b"seed: 1\r\nmodel:\r\n  name: a\r\n")
    assert read_yaml(path).lines[("model", "name")] == 3


def test_text_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("seed: 1\nname: café\n".encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    assert caught.value.problems[0].where == f"{path}:2"


def test_a_missing_file_names_the_recipes_beside_it(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("seed: 1", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_yaml(tmp_path / "reel.yaml")
    assert "real.yaml" in str(caught.value.problems[0].fix)


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a file"):
        read_yaml(tmp_path)


def test_a_file_that_is_far_too_large_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("a: " + "x" * MAX_BYTES, encoding="utf-8")
    with pytest.raises(RecipeError, match="larger"):
        read_yaml(path)

"""The corpus of a new model: rules of its recipe, tokens without leakage, and the cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.recipe_io import LoadedRecipe, format_resolved, load_recipe
from utils.exceptions import DataError, RecipeError
from utils.preflight import Preflight, check_recipe, summarise_preflight
from utils.preview import collect_statistics
from utils.token_cache import EncodedSet

TEXT = "".join(f"Line {number} of the tale: the cat sat on mat {number * 7}.\n" for number in range(60))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe for a tiny new model, with the sections' keys laid over it."""
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name": "tale", "init": "scratch"},
        "data": {"train": str(folder / "corpus.txt")},
        "scratch": {"layers": 1, "heads": 2, "width": 16, "context": 32},
        "training": {"method": "sft", "epochs": 1, "learning_rate": 1e-3},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "tale.yaml"
    path.write_text(json.dumps({key: value for key, value in recipe.items() if value is not None}), encoding="utf-8")
    return path


def load(folder: Path, **sections: Any) -> LoadedRecipe:
    return load_recipe(write_recipe(folder, **sections))


def check(folder: Path, **sections: Any) -> Preflight:
    return check_recipe(load(folder, **sections))


def join(examples: EncodedSet) -> list[int]:
    """The stream that windows were cut from, put together by the places that they name."""
    stream: dict[int, int] = {}
    for example in examples:
        first = int(example.where.split()[-3])
        stream |= {first + index: int(token) for index, token in enumerate(example.input_ids)}
    assert sorted(stream) == list(range(len(stream)))
    return [stream[index] for index in range(len(stream))]


def find_problem(folder: Path, **sections: Any) -> tuple[str, str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, **sections)
    (problem,) = caught.value.problems
    assert problem.fix
    return problem.where or "", problem.message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"scratch": None}, "needs the section scratch"),
        ({"model": {"init": "pretrained"}, "data": {"train": "x.jsonl"}}, "scratch does nothing"),
        ({"model": {"init": "pretrained"}, "scratch": None}, "one text without rows"),
        ({"lora": {"r": 8}}, "adapter on random weights"),
        ({"model": {"quantization": "nf4"}, "lora": None}, "quantise"),
        ({"model": {"dtype": "bfloat16"}}, "float32"),
        ({"model": {"adapter": "run"}}, "no weights that an adapter"),
        ({"model": {"revision": "main"}}, "no revision"),
        ({"model": {"trust_remote_code": True}}, "no code"),
        ({"scratch": {"heads": 3}}, "cannot be shared out among 3 heads"),
        ({"scratch": {"heads": 16}}, "odd"),
        ({"scratch": {"stride": 32}}, "never be learned"),
        ({"scratch": {"vocab_size": 300}}, "does nothing under tokenizer: char"),
        ({"scratch": {"tokenizer": "bpe"}}, "needs vocab_size"),
        ({"data": {"format": "messages"}}, "raw text"),
        ({"data": {"strategy": "chat"}}, "no chat template"),
        ({"data": {"template": "chatml"}}, "template does nothing"),
        ({"data": {"system": "Hi"}}, "system does nothing"),
        ({"data": {"loss_on": "last"}}, "loss_on does nothing"),
        ({"data": {"overlong": "truncate"}}, "overlong does nothing"),
        ({"data": {"max_length": 64}}, "windows have scratch.context tokens"),
        ({"data": {"train": {"source": "x.txt", "weight": 2.0}}}, "read once"),
        ({"training": {"packing": True}}, "nothing to pack"),
        ({"training": {"method": "orpo"}}, "compares answers"),
        ({"training": {"small_data": "gentle"}}, "cut into windows"),
        ({"evaluation": {"metrics": ["loss", "exact_match"]}}, "raw text has none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_new_model_cannot_have_is_refused_with_a_way_out(
    tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    if "quantization" in sections.get("model", {}):  # this one also breaks the rule that a frozen base needs an adapter
        with pytest.raises(RecipeError, match=words):
            load(tmp_path, **sections)
        return
    where, message = find_problem(tmp_path, **sections)
    assert words in message
    assert where.startswith(str(tmp_path / "tale.yaml"))


def test_gpt2_may_have_heads_of_an_odd_width(tmp_path: Path) -> None:
    load(tmp_path, scratch={"architecture": "gpt2", "heads": 16})


def test_training_and_held_out_tokens_are_two_blocks_that_make_the_text(tmp_path: Path) -> None:
    preflight = check(tmp_path, data={"eval_fraction": 0.2})
    train, held_out = join(preflight.data.train), join(preflight.data.evaluation)
    assert len(held_out) == round(0.2 * (len(TEXT) + 1))
    tokenizer = preflight.tokenizer.tokenizer
    assert tokenizer.decode(train + held_out, skip_special_tokens=True) == TEXT
    assert held_out[-1] == tokenizer.eos_token_id


def test_held_out_text_of_its_own_file_is_in_the_vocabulary_and_not_in_training(tmp_path: Path) -> None:
    (tmp_path / "later.txt").write_text("Zürich & Quebec @ noon. " * 4, encoding="utf-8")
    preflight = check(tmp_path, data={"eval": str(tmp_path / "later.txt")})
    tokenizer = preflight.tokenizer.tokenizer
    assert tokenizer.decode(join(preflight.data.train), skip_special_tokens=True) == TEXT
    assert tokenizer.decode(join(preflight.data.evaluation), skip_special_tokens=True).startswith("Zürich & Quebec @")
    assert tokenizer.unk_token_id not in join(preflight.data.evaluation)


def test_rows_are_documents_with_an_end_between_them(tmp_path: Path) -> None:
    rows = [{"text": TEXT[:300]}, {"text": TEXT[300:700]}, {"text": TEXT[700:]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preflight = check(tmp_path, data={"train": str(tmp_path / "rows.jsonl"), "eval_fraction": 0})
    ids, end = join(preflight.data.train), preflight.tokenizer.tokenizer.eos_token_id
    assert np.flatnonzero(np.array(ids) == end).tolist() == [300, 701, len(TEXT) + 2]


def test_several_text_files_and_a_glob_of_them_are_read_in_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", TEXT[:400]), ("a.txt", TEXT[400:])):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(text.replace("\n", "\r\n").encode())
    preflight = check(tmp_path, data={"train": str(tmp_path / "texts" / "*.txt"), "eval_fraction": 0})
    text = preflight.tokenizer.tokenizer.decode(join(preflight.data.train), skip_special_tokens=True)
    assert text == TEXT[400:] + TEXT[:400]


def test_rows_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2, encoding="utf-8")
    with pytest.raises(DataError, match="raw text"):
        check(tmp_path, data={"train": str(tmp_path / "rows.jsonl")})


@pytest.mark.parametrize(("content", "words"), [("", "no text"), (" \n", "no text"), ("short", "do not fill")])
def test_a_corpus_without_a_window_of_text_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "corpus.txt").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        check_recipe(load_recipe(path))


def test_what_follows_from_the_recipe_is_written_down_with_its_reason(tmp_path: Path) -> None:
    preflight = check(tmp_path)
    loaded = preflight.loaded
    assert loaded.recipe.data.max_length == 32
    assert loaded.recipe.scratch is not None
    assert loaded.recipe.scratch.stride == 31
    assert loaded.recipe.model.dtype == "float32"
    for key in ("data.max_length", "scratch.stride", "model.dtype"):
        assert loaded.origins[key].startswith("auto: ")
    path = tmp_path / "resolved.yaml"
    path.write_text(format_resolved(loaded), encoding="utf-8")
    assert load_recipe(path).recipe == loaded.recipe


def test_the_cache_follows_text_stride_and_tokenizer(tmp_path: Path) -> None:
    first = check(tmp_path).data.key
    assert check(tmp_path).data.key == first
    assert check(tmp_path, training={"learning_rate": 3e-3}).data.key == first
    changed = [check(tmp_path, scratch={"stride": 9}).data.key]
    changed.append(check(tmp_path, scratch={"tokenizer": "bpe", "vocab_size": 300}).data.key)
    path = write_recipe(tmp_path)
    (tmp_path / "corpus.txt").write_text(TEXT + "Q", encoding="utf-8")
    changed.append(check_recipe(load_recipe(path)).data.key)
    assert len({first, *changed}) == 4


def test_validate_shows_windows_steps_and_predicted_memory_of_the_new_model(tmp_path: Path) -> None:
    preflight = check(tmp_path)
    facts = summarise_preflight(preflight)
    assert facts["architecture"] == "llama"
    assert facts["longest_example"] == 32
    assert facts["tokens_per_epoch"] == 32 * facts["training_rows"]
    assert facts["predicted_memory"].endswith(")")
    assert "download" not in facts
    statistics = collect_statistics(preflight)
    assert (statistics["rows"], statistics["held_out_rows"]) == (facts["training_rows"], facts["held_out_rows"])
    assert preflight.find_weights() is preflight.source


def test_two_seeds_and_two_sizes_are_different_models_to_the_run_folder(tmp_path: Path) -> None:
    hashes = [
        check(tmp_path, **sections).source.hash_weights()
        for sections in ({}, {"seed": 7}, {"scratch": {"layers": 2}}, {})
    ]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]


def test_the_shipped_corpus_is_the_file_that_its_readme_describes() -> None:
    import hashlib

    folder = Path(__file__).resolve().parents[2] / "data" / "pride_and_prejudice"
    content = (folder / "corpus.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() in (folder / "README.md").read_text(encoding="utf-8")
    assert len(content) == 684_768
    assert not {"Q", "X"} & set(content.decode("ascii"))

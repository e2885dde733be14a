"""Tokenizers that are trained on a corpus: what they know, how they are kept, and what they refuse."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from config.structured_config import ScratchSection
from utils.exceptions import DataError, RunError
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_training import END_OF_TEXT, UNKNOWN, refuse_unknown_characters, train_tokenizer, write_tokenizer

TEXT = "The cat sat.\n\nOn the mat, naïve\tcat 🐈!\n"
CHAR = ScratchSection()
BPE = ScratchSection(tokenizer="bpe", vocab_size=300)


def test_every_character_of_the_corpus_is_a_token_and_nothing_else_but_two_control_tokens() -> None:
    vocabulary = train_tokenizer(CHAR, [TEXT]).get_vocab()
    assert set(vocabulary) == set(TEXT) | {END_OF_TEXT, UNKNOWN}
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_the_vocabulary_covers_every_document() -> None:
    # The second text may be the held-out one: without its characters, its loss would be that of the unknown token.
    tokenizer = train_tokenizer(CHAR, ["abc", "xyz"])
    assert tokenizer.token_to_id(UNKNOWN) not in tokenizer.encode("axbycz").ids


@pytest.mark.parametrize("scratch", [CHAR, BPE], ids=["char", "bpe"])
def test_decoding_gives_the_text_back_to_the_last_byte_after_a_reload(scratch: ScratchSection, tmp_path: Path) -> None:
    write_tokenizer(train_tokenizer(scratch, [TEXT]), tmp_path)
    loaded = load_tokenizer(tmp_path)
    ids = loaded.backend_tokenizer.encode(TEXT).ids
    assert loaded.decode(ids) == TEXT
    assert loaded.eos_token == END_OF_TEXT
    assert loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True) == TEXT


def test_a_character_is_one_token() -> None:
    assert len(train_tokenizer(CHAR, [TEXT]).encode(TEXT).ids) == len(TEXT)


def test_byte_pairs_merge_what_is_frequent_and_know_every_text() -> None:
    tokenizer = train_tokenizer(BPE, ["the cat and the dog " * 50])
    assert len(tokenizer.encode(" the").ids) == 1
    assert tokenizer.decode(tokenizer.encode("Ünknown 🐈").ids) == "Ünknown 🐈"
    assert tokenizer.get_vocab_size() <= 300


def test_two_trainings_on_one_text_give_the_same_tokenizer() -> None:
    for scratch in (CHAR, BPE):
        assert train_tokenizer(scratch, [TEXT]).to_str() == train_tokenizer(scratch, [TEXT]).to_str()


def test_only_json_is_written(tmp_path: Path) -> None:
    write_tokenizer(train_tokenizer(CHAR, [TEXT]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in tmp_path.iterdir():
        json.loads(path.read_text(encoding="utf-8"))


def test_transformers_loads_the_folder_with_its_own_classes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(train_tokenizer(CHAR, [TEXT]), tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded("the cat\n").input_ids) == "the cat\n"
    assert (loaded.eos_token, loaded.unk_token) == (END_OF_TEXT, UNKNOWN)


@pytest.mark.parametrize("empty", [models.BPE(), models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN)])
def test_a_tokenizer_cannot_be_used_before_it_was_trained(empty: object, tmp_path: Path) -> None:
    # An untrained BPE model turns every text into no token at all, without an error.
    assert not Tokenizer(models.BPE()).encode("text").ids
    with pytest.raises(RunError, match="before it was trained"):
        write_tokenizer(Tokenizer(empty), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_makes_no_tokenizer(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(CHAR, texts)


@pytest.mark.parametrize("scratch", [CHAR, BPE], ids=["char", "bpe"])
def test_a_corpus_with_a_control_token_is_refused(scratch: ScratchSection) -> None:
    with pytest.raises(DataError, match="endoftext"):
        train_tokenizer(scratch, ["fine", f"not {END_OF_TEXT} fine"])


def test_a_prompt_with_an_unknown_character_is_refused_with_its_name(tmp_path: Path) -> None:
    write_tokenizer(train_tokenizer(CHAR, ["abc \n"]), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    refuse_unknown_characters(tokenizer, "a cab\n")
    with pytest.raises(DataError) as caught:
        refuse_unknown_characters(tokenizer, "a cäb, Zab")
    assert caught.value.problems[0].code == "unknown-character"
    assert "'ä', ',', 'Z'" in caught.value.problems[0].message


def test_a_byte_level_tokenizer_refuses_nothing(tmp_path: Path) -> None:
    write_tokenizer(train_tokenizer(BPE, [TEXT]), tmp_path)
    refuse_unknown_characters(load_tokenizer(tmp_path), "ж 漢 🐈 \x00")

"""The committed notes are what their generator writes, and every answer can be read from its note."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "data" / "notes"
FILES = sorted(path.name for path in FOLDER.glob("*.jsonl"))


def read_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def collect_names(name: str) -> set[str]:
    """E-mail addresses: they hold first and last name of the person that a row is about."""
    text = (FOLDER / name).read_text(encoding="utf-8").replace("(", " ").replace(")", " ").replace(",", " ")
    return {word.strip('."') for word in text.split() if "@" in word}


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "generate.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert len(FILES) == 4
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("kind", ["instructions", "chat"])
def test_no_person_stands_in_both_splits(kind: str) -> None:
    train, held_out = (collect_names(f"{kind}_{split}.jsonl") for split in ("train", "eval"))
    assert len(train) > 50
    assert len(held_out) > 15
    assert not train & held_out
    lasts = [{name.partition("@")[2] for name in names} for names in (train, held_out)]
    assert not lasts[0] & lasts[1]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("instructions")])
def test_every_answer_follows_from_its_note(name: str) -> None:
    rows = read_rows(name)
    assert len(rows) == (160 if "train" in name else 40)
    for row in rows:
        note, answer = row["input"], row["output"]
        if "@" in answer:
            assert answer in note
        elif answer.startswith("{"):
            person = json.loads(answer)
            assert person["name"] in note or all(part in note for part in person["name"].split())
            assert person["city"] in note
            assert f"{datetime.fromisoformat(person['born']):%Y}" in note
        elif answer.startswith("- "):
            interests = answer.removeprefix("- ").split("\n- ")
            assert f"{interests[0]}, {interests[1]} and {interests[2]}" in note
        elif answer[0].isdigit():
            born = datetime.fromisoformat(answer)
            assert f" {born.day} " in note.replace("(", " ")
            assert str(born.year) in note
        elif ", " in answer:
            interests = answer.split(", ")
            assert interests == sorted(interests)
            assert all(interest in note for interest in interests)
        else:
            assert len(answer) == 4
            assert all(letter in note for letter in (answer[0], answer[2]))


def test_a_conversation_shows_its_note_once_and_asks_two_or_three_things() -> None:
    for row in read_rows("chat_train.jsonl"):
        roles = [message["role"] for message in row["messages"]]
        assert roles in (["user", "assistant"] * 2, ["user", "assistant"] * 3)
        assert "@" in row["messages"][0]["content"]
        assert not any("@" in message["content"] for message in row["messages"][2::2])

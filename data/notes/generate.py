"""Writes the notes sample set, the same bytes every time.

    python data/notes/generate.py
    python data/notes/generate.py --out /tmp/notes --seed 8

A row of `instructions_train.jsonl`::

    {"instruction": "Give the date as YYYY-MM-DD.", "input": "Mara Lind from Oslo, …", "output": "2001-03-03"}

A row of `chat_train.jsonl` asks two or three things about one note, each in a turn of its own::

    {"messages": [{"role": "user", "content": "Mara Lind from Oslo, …\\n\\nWhat is the e-mail address?"},
                  {"role": "assistant", "content": "mara@lind.example"},
                  {"role": "user", "content": "And the initials?"}, {"role": "assistant", "content": "M.L."}]}
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = {"train": 160, "eval": 40}
SEED = 7


@dataclass(frozen=True)
class Note:
    """What a note says about a person."""

    first: str
    last: str
    city: str
    born: datetime.date
    interests: tuple[str, str, str]
    text: str

    @property
    def email(self) -> str:
        """The address in the note; `.example` belongs to nobody (RFC 2606)."""
        return f"{self.first.lower()}@{self.last.lower()}.example"


@dataclass(frozen=True)
class Material:
    """What one split is made of; the two splits share no name, city and sentence."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    cities: tuple[str, ...]
    notes: tuple[str, ...]
    openings: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One thing to find out: how to ask for it alone, how to ask in a conversation, and the one right answer."""

    instructions: tuple[str, ...]
    questions: tuple[str, ...]
    answer: Callable[[Note], str]


def split_words(text: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(text.split())


# Written out, because `%B` follows the machine's language.
MONTHS = split_words("January February March April May June July August September October November December")
INTERESTS = split_words(
    "chess tea maps rowing opera stamps baking judo poetry sailing jazz robots birds pottery tennis films climbing coffee"
)
MATERIAL = {
    "train": Material(
        split_words(
            "Mara Ivo Lena Otto Nina Karl Ruth Hugo Elsa Paul Vera Finn Dora Lars Anna Emil Olga Theo Ines Kurt"
        ),
        split_words(
            "Lind Moser Hale Brandt Novak Reyes Falk Ito Sand Weber Kovac Lund Pires Dahl Stone Berg Roth Vega"
        ),
        split_words("Oslo Rome Lima Cairo Bergen Porto Delhi Quito Dublin Vienna Lagos Osaka"),
        (
            "{first} {last} from {city}, born on {born}, likes {interests}. Write to {email}.",
            "{first} {last} lives in {city} and can be reached at {email}. Born on {born}; enjoys {interests}.",
            "New member: {first} {last}, {email}. Date of birth: {born}. City: {city}. Interests: {interests}.",
            "Spoke to {first} {last} ({email}) today. Home town {city}, birthday {born}, fond of {interests}.",
        ),
        ("Here is a note:", "I wrote this down:", "Please read this.", "This came in today:"),
    ),
    "eval": Material(
        split_words("Greta Milo Sara Jonas Alma Felix Petra Anton"),
        split_words("Keller Ross Amado Nyman Quist Hara Toft Bauer"),
        split_words("Madrid Turin Accra Kyoto Malmo Bern"),
        (
            "{first} {last}, born on {born}, is from {city}. Likes {interests}. Mail: {email}.",
            "For the list: {first} {last} of {city}, {email}, birthday {born}, interested in {interests}.",
        ),
        ("Look at this note:", "Someone left this:"),
    ),
}


def write_object(note: Note) -> str:
    """The person as JSON, keys in the order that the instruction names them."""
    return json.dumps({"name": f"{note.first} {note.last}", "city": note.city, "born": note.born.isoformat()})


TASKS = (
    Task(
        ("Extract the e-mail address.", "Which e-mail address does the note give? Answer with the address alone."),
        ("What is the e-mail address?", "Which address can I write to?"),
        lambda note: note.email,
    ),
    Task(
        ("Give the date of birth as YYYY-MM-DD.", "Write the birthday in the form YYYY-MM-DD."),
        ("When is the birthday, as YYYY-MM-DD?", "Give me the date of birth as YYYY-MM-DD."),
        lambda note: note.born.isoformat(),
    ),
    Task(
        ("List the interests, one a line, each after a dash.", "Write the interests as a list with dashes."),
        ("List the interests.", "What are the interests? A list, please."),
        lambda note: "\n".join(f"- {interest}" for interest in note.interests),
    ),
    Task(
        ("Sort the interests from A to Z, with commas between them.", "Name the interests in alphabetical order."),
        ("Sort the interests from A to Z.", "The interests in alphabetical order, please."),
        lambda note: ", ".join(sorted(note.interests)),
    ),
    Task(
        ("Give the person's initials.", "Write the initials of the person, with dots."),
        ("What are the initials?", "And the initials?"),
        lambda note: f"{note.first[0]}.{note.last[0]}.",
    ),
    Task(
        ("Write name, city and date of birth as JSON.", "Turn the note into JSON with the keys name, city and born."),
        ("Give me name, city and date of birth as JSON.", "Write name, city and born as JSON."),
        write_object,
    ),
)


def draw_note(material: Material, rng: random.Random) -> Note:
    """One note; the day is at most 28, so that every month has it."""
    first, last, city = (rng.choice(names) for names in (material.first, material.last, material.cities))
    born = datetime.date(rng.randint(1950, 2005), rng.randint(1, 12), rng.randint(1, 28))
    one, two, three = rng.sample(INTERESTS, 3)
    note = Note(first, last, city, born, (one, two, three), "")
    text = rng.choice(material.notes).format(
        first=first,
        last=last,
        city=city,
        born=f"{born.day} {MONTHS[born.month - 1]} {born.year}",
        interests=f"{one}, {two} and {three}",
        email=note.email,
    )
    return Note(first, last, city, born, note.interests, text)


def iterate_instructions(split: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields rows with one task each, all tasks equally often."""
    for number in range(ROWS[split]):
        note, task = draw_note(MATERIAL[split], rng), TASKS[number % len(TASKS)]
        yield {"instruction": rng.choice(task.instructions), "input": note.text, "output": task.answer(note)}


def iterate_chats(split: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields conversations of two or three tasks about one note."""
    for _ in range(ROWS[split]):
        note = draw_note(MATERIAL[split], rng)
        messages = []
        for turn, task in enumerate(rng.sample(TASKS, rng.choice((2, 2, 3)))):
            question = rng.choice(task.questions)
            opening = f"{rng.choice(MATERIAL[split].openings)} {note.text}\n\n" if turn == 0 else ""
            messages.append({"role": "user", "content": opening + question})
            messages.append({"role": "assistant", "content": task.answer(note)})
        yield {"messages": messages}


def main() -> None:
    """Writes the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="folder to write to (default: this one)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of all choices (default: {SEED})")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, iterate_rows in (("instructions", iterate_instructions), ("chat", iterate_chats)):
        for split in ROWS:
            rng = random.Random(f"{options.seed} {name} {split}")  # noqa: S311 - a sample set, nothing secret
            lines = [json.dumps(row, ensure_ascii=False) for row in iterate_rows(split, rng)]
            (options.out / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

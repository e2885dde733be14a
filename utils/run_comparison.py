"""What differs between two runs: read from their folders alone, without a framework, also of runs that failed or are old."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from config.yaml_reader import read_yaml
from utils.exceptions import RunError
from utils.run_folder import RunFolder

INPUTS = ("data_hash", "eval_hash", "model_hash", "adapter_hash", "template_hash")
MACHINE = ("device", "device_name", "dtype", "threads")
RESULTS = (
    *("status", "stop_reason", "steps", "skipped_steps", "halvings", "tokens", "supervised_tokens"),
    *("train_loss", "eval_loss", "best_step", "best_eval_loss", "trainable_parameters"),
)
# What two runs of the same recipe never share.
SPEED = ("tokens_per_second", "time_to_first_step_s", "peak_memory_bytes", "seconds")
ABSENT = "—"
SHOWN_LENGTH = 60
HASH_LENGTH = 12


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same; None where a run does not have it."""

    name: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.name}: {show(self.name, self.first)} → {show(self.name, self.second)}"


@dataclass(frozen=True)
class LossComparison:
    """The training losses of the steps that both runs have.

    Attributes:
        common: steps that both have.
        parted_at: the first of them whose losses differ, None where all bits are the same.
        largest: the largest difference, in nats.
        largest_at: its step.
    """

    common: int
    parted_at: int | None = None
    largest: float = 0.0
    largest_at: int | None = None

    def __str__(self) -> str:
        if not self.common:
            return "no step that both runs have"
        if self.parted_at is None:
            return f"the same bit for bit in all {self.common} common steps"
        return f"part at step {self.parted_at}; largest difference {self.largest:.4g} at step {self.largest_at}"


@dataclass(frozen=True)
class RunComparison:
    """Everything that differs between two runs, by subject."""

    recipe: list[Difference]
    inputs: list[Difference]
    environment: list[Difference]
    results: list[Difference]
    report: list[Difference]
    speed: list[Difference]
    losses: LossComparison

    @property
    def is_same(self) -> bool:
        """True if nothing differs but speed and memory, and there are losses to tell."""
        differs = any((self.recipe, self.inputs, self.environment, self.results, self.report))
        return not differs and self.losses.common > 0 and self.losses.parted_at is None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"same": self.is_same, **asdict(self)}

    def format(self) -> list[str]:
        """A short table, and a sentence at its end."""
        sections = {
            "recipe": self.recipe,
            "data, model, template": self.inputs,
            "machine and versions": self.environment,
            "results": self.results,
            "report": self.report,
            "speed": self.speed,
        }
        lines = []
        for title, differences in sections.items():
            width = max((len(each.name) for each in differences), default=0)
            lines += [f"{title}: {'' if differences else 'the same'}".rstrip()]
            for each in differences:
                first, second = show(each.name, each.first), show(each.name, each.second)
                lines.append(f"  {each.name:<{width}}  {first} → {second}")
        lines.append(f"losses: {self.losses}")
        if self.is_same:
            lines.append("The runs are the same but for speed and memory.")
        return lines


def compare_runs(first: RunFolder, second: RunFolder) -> RunComparison:
    """Compares two run folders.

    Raises:
        RunError: run.json or metrics.jsonl of one cannot be read.
        RecipeError: recipe.yaml of one is no YAML.
    """
    facts = first.read_facts(), second.read_facts()
    return RunComparison(
        recipe=compare_values(*(dict(flatten(read_yaml(run.recipe_file).values)) for run in (first, second))),
        inputs=find_input_differences(*facts),
        environment=find_environment_differences(*facts),
        results=compare_values(*facts, names=RESULTS),
        report=compare_values(*(read_report(run) for run in (first, second))),
        speed=compare_values(*facts, names=SPEED),
        losses=compare_losses(*(read_losses(run) for run in (first, second))),
    )


def compare_values(
    first: Mapping[str, Any], second: Mapping[str, Any], *, names: tuple[str, ...] | None = None
) -> list[Difference]:
    """What two flat mappings do not share, in their order; a key that is absent is the same as null."""
    chosen = names or tuple(dict.fromkeys([*first, *second]))
    return [
        Difference(name, first.get(name), second.get(name)) for name in chosen if first.get(name) != second.get(name)
    ]


def find_input_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Hashes of rows, weights and template that both know and that differ; an older run may not have them."""
    shared = tuple(name for name in INPUTS if name in first and name in second)
    return compare_values(first, second, names=shared) if shared else []


def find_environment_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Device, number format, versions and code that both know and that differ."""
    sides = []
    for facts in (first, second):
        values = {name: facts[name] for name in MACHINE if facts.get(name) is not None}
        if isinstance(versions := facts.get("versions"), dict):
            values |= {f"versions.{name}": value for name, value in versions.items()}
        if isinstance(git := facts.get("git"), dict):
            values |= {"git": f"{git.get('commit', '')[:HASH_LENGTH]}{' with changes' if git.get('dirty') else ''}"}
        sides.append(values)
    shared = tuple(name for name in sides[0] if name in sides[1])
    return compare_values(*sides, names=shared) if shared else []


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys with their values; lists stay whole."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_report(run: RunFolder) -> dict[str, str]:
    """The metrics of report.json after training, each with its interval; empty where the run was not evaluated."""
    try:
        document = json.loads(run.report_json.read_text(encoding="utf-8"))
        metrics = document["metrics"].items()
        return {
            name: f"{row['tuned']:.4g} (difference {row['difference']:+.4g}, {row['low']:+.4g} to {row['high']:+.4g})"
            for name, row in metrics
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "run scripts/evaluate_run.py on it again"
        raise RunError("report.json cannot be read", where=str(run.report_json), fix=fix, code="no-run") from error


def read_losses(run: RunFolder) -> dict[int, float | None]:
    """Training loss by step; None of a step that was skipped. Of a step that a resumed run took again, the last."""
    return {row["step"]: row["loss"] for row in run.read_metrics() if "loss" in row}


def compare_losses(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> LossComparison:
    """Where the losses of two runs part."""
    common = sorted(first.keys() & second.keys())
    parted = [step for step in common if first[step] != second[step]]
    if not parted:
        return LossComparison(len(common))
    distances = {step: abs((first[step] or 0.0) - (second[step] or 0.0)) for step in parted}
    largest = max(parted, key=lambda step: distances[step])
    return LossComparison(len(common), parted[0], distances[largest], largest)


def show(name: str, value: Any) -> str:
    """A value in a few characters."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if name.endswith("_hash"):
        return text[:HASH_LENGTH]
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 1]}…"

"""What the runs of a work add up to: speeds, start-up, memory, and whether a side did the same work at all."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed_bound import NeededWork
from benchmarks.speed_runs import Measurement
from benchmarks.speed_sides import OUR_SIDES, OURS, SIDES
from benchmarks.speed_work import LORA, WORKS, PreparedWork
from utils.model_source import ModelSource, iterate_tensor_shapes

FIRST_LOSS = 0.01  # nothing is trained yet, so only rounding may differ
MEAN_LOSS = 0.03  # adapters start from other random numbers, and later losses differ by a little
REFERENCE = "trl_tuned"  # an independent implementation, in float32 where bfloat16 is not native


@dataclass
class WorkResult:
    """All runs of a work, of one session or of several with the same steps and rows.

    Attributes:
        tokens: real tokens of each step, a pair's prompt counted with both answers: the measure of every side's speed.
        own_tokens: the same as Tunebook counts them, a pair's prompt once.
        supervised: learned tokens of each step.
        needed: FLOPs that each step cannot do without.
        trainable: parameters that have to be trained.
        peak_flops: FLOP/s of the fastest matrix product, in the format that Tunebook trained in.
        kept_up_flops: FLOP/s of products that are kept up, one number for each round.
        obstacles: side → why it is not here.
        source: where the rows are from.
    """

    work: str
    date: str
    source: str
    tokens: list[int]
    own_tokens: list[int]
    supervised: list[int]
    needed: list[float]
    trainable: int
    peak_flops: float = math.nan
    kept_up_flops: list[float] = field(default_factory=list)
    sessions: int = 1
    runs: list[Measurement] = field(default_factory=list)
    obstacles: dict[str, str] = field(default_factory=dict)

    def list_runs(self, side: str) -> list[Measurement]:
        """The runs of a side in their order."""
        return [run for run in self.runs if run.side == side]

    def list_sides(self) -> list[str]:
        """Sides that were run, Tunebook first."""
        return [name for name in SIDES if self.list_runs(name)]


def take_up(result: WorkResult, earlier: WorkResult | None) -> None:
    """Puts the good runs of an earlier session before those to come, if the work is the same to the token."""
    if earlier and (earlier.tokens, earlier.supervised) == (result.tokens, result.supervised):
        result.runs += [run for run in earlier.runs if not run.error]
        result.obstacles |= earlier.obstacles
        result.sessions += earlier.sessions
        result.peak_flops = earlier.peak_flops
        result.kept_up_flops += earlier.kept_up_flops


def start_result(prepared: PreparedWork, source: str, date: str) -> WorkResult:
    """The result of a work before its first run."""
    work = prepared.work
    needed = NeededWork(prepared.source.folder, int(LORA["r"]) if work.has_adapters else None)
    steps = zip(prepared.count_tokens(by_row=False), prepared.count_supervised(), prepared.count_squares(), strict=True)
    return WorkResult(
        work=work.name,
        date=date,
        source=source,
        tokens=prepared.count_tokens(by_row=True),
        own_tokens=prepared.count_tokens(by_row=False),
        supervised=prepared.count_supervised(),
        needed=[needed.count(*step, reference=work.method == "dpo") for step in steps],
        trainable=needed.adapters or count_parameters(prepared.source),
    )


def count_parameters(model: ModelSource) -> int:
    """Parameters in a model's safetensors files; a head that is tied to the embedding is not stored twice."""
    return sum(math.prod(shape) for _, shape in iterate_tensor_shapes(model))


def find_faults(result: WorkResult, run: Measurement) -> list[str]:
    """Why a run is not the same work: each in words, none if it is."""
    if run.error:
        return [f"stopped: {run.error}"]
    steps, faults = len(run.ends), []
    expected = result.own_tokens if run.side in OUR_SIDES else result.tokens
    if run.tokens != expected[:steps]:
        faults.append(f"saw {sum(run.tokens)} tokens and not {sum(expected[:steps])}")
    if run.supervised != result.supervised[:steps]:
        faults.append(f"learned {sum(run.supervised)} tokens and not {sum(result.supervised[:steps])}")
    if run.trainable != result.trainable:
        faults.append(f"trained {run.trainable:,} parameters and not {result.trainable:,}")
    if steps < 2 or len(run.losses) != steps or not all(map(math.isfinite, run.losses)):
        return [*faults, f"{len(run.losses)} finite losses of {steps} steps"]
    if any(norm is None or norm <= 0 for norm in run.norms):
        faults.append("a gradient is zero, or its norm is not known")
    return [*faults, *compare_losses(result, run)]


def compare_losses(result: WorkResult, run: Measurement) -> list[str]:
    """Whether a run's losses are those of the reference side, over the steps that both took.

    In another number format only the first one has to be: the steps that come of it are that format's own, and the page shows
    what they lose beside the reference.
    """
    references = [each for name in (REFERENCE, OURS) for each in result.list_runs(name) if not each.error]
    if not references or references[0] is run:
        return []
    pairs = np.array(list(zip(run.losses, references[0].losses, strict=False)))
    first = abs(pairs[0, 0] / pairs[0, 1] - 1)
    mean = float(np.abs(pairs[:, 0] - pairs[:, 1]).mean() / pairs[:, 1].mean())
    title = SIDES[references[0].side].title
    faults = [f"its first loss is {100 * first:.1f} % from that of {title}"] if first > FIRST_LOSS else []
    if mean > MEAN_LOSS and computes_in_16_bits(run.dtype) == computes_in_16_bits(references[0].dtype):
        faults.append(f"its losses are {100 * mean:.1f} % from those of {title}")
    return faults


def computes_in_16_bits(dtype: str) -> bool:
    """Whether a side's own words for its number format mean bfloat16, or autocast to it."""
    return "bfloat16" in dtype or "bf16" in dtype


@dataclass(frozen=True)
class Summary:
    """The valid runs of a side in one work.

    Attributes:
        speeds: real tokens/s of each run, over all steps but the first.
        bound: share of the fastest possible time.
        kept_up: share of the time that products would take which are kept up; nan where they were not measured.
        first: seconds from the start of the process to the end of the first step, by whether the token cache was empty.
        foreign: largest share of the machine's processor time that others took in a run.
        faults: why the side has no numbers.
    """

    side: str
    speeds: list[float]
    bound: float
    kept_up: float
    first: dict[bool, float]
    peak_bytes: int
    loss: float
    reference_loss: float
    norm: float
    steps: int
    dtype: str
    foreign: float
    faults: list[str]

    @property
    def speed(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.speeds)


def summarise(result: WorkResult, side: str) -> Summary:
    """Adds up the runs of a side; one faulty run makes all of them invalid."""
    runs = result.list_runs(side)
    faults = list(dict.fromkeys(fault for run in runs for fault in find_faults(result, run)))
    if faults:
        return Summary(side, [], math.nan, math.nan, {}, 0, math.nan, math.nan, math.nan, 0, "", math.nan, faults)
    steps = len(runs[0].ends)
    seconds = [run.ends[-1] - run.ends[0] for run in runs]
    first = {cold: [run.ends[0] - run.started for run in runs if run.cold == cold] for cold in (True, False)}
    references = [each for name in (REFERENCE, OURS) for each in result.list_runs(name) if not each.error]
    needed = sum(result.needed[1:steps]) / statistics.median(seconds)  # FLOP/s
    return Summary(
        side=side,
        speeds=[sum(result.tokens[1:steps]) / each for each in seconds],
        bound=needed / result.peak_flops,
        kept_up=needed / statistics.median(result.kept_up_flops or [math.nan]),
        first={cold: statistics.median(times) for cold, times in first.items() if times},
        peak_bytes=max(run.peak_bytes for run in runs),
        loss=statistics.fmean(runs[0].losses),
        reference_loss=statistics.fmean(references[0].losses[:steps]),
        norm=statistics.fmean(norm for norm in runs[0].norms if norm is not None),
        steps=steps,
        dtype=runs[0].dtype,
        foreign=max((run.foreign for run in runs if run.foreign is not None), default=math.nan),
        faults=[],
    )


def save_results(results: Sequence[WorkResult], path: Path) -> None:
    """Writes all results as JSON, the works in their order."""
    ordered = sorted(results, key=lambda result: list(WORKS).index(result.work))
    path.write_text(json.dumps([asdict(result) for result in ordered], indent=1), encoding="utf-8")


def load_results(path: Path) -> list[WorkResult]:
    """What earlier sessions measured; nothing before the first."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [WorkResult(**{**each, "runs": [Measurement(**run) for run in each["runs"]]}) for each in found]

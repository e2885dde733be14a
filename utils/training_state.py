"""How far a run is: what the loop counts, what run.json reports, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from utils.cli import STARTED
from utils.stop_signals import StopSignals


@dataclass
class TrainingState:
    """How far the run is; the numbers end in run.json, and all of them in every checkpoint.

    Attributes:
        loss_sum, loss_terms: the mean training loss is their quotient.
        seconds: spent in steps alone.
        earlier_s: wall time of earlier processes of the run.
        evaluated_at, saved_at: the last step that was.
        halvings: how often the rows of a forward pass were halved for want of memory.
        skips_in_a_row: steps up to now that were not taken, since the last one that was.
        recent_losses: of the last steps that were taken, the newest last.
        stop_reason: why early stopping ended the run, or None.
        signals: that end this process; no part of a checkpoint.
    """

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True)
    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0
    loss_terms: int = 0
    last_loss: float = math.nan
    seconds: float = 0.0
    earlier_s: float = 0.0
    time_to_first_step_s: float = math.nan
    eval_loss: float | None = None
    best_loss: float = math.inf
    best_step: int | None = None
    evaluations_without_gain: int = 0
    evaluated_at: int = 0
    saved_at: int = 0
    halvings: int = 0
    skips_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    stop_reason: str | None = None
    signals: StopSignals = field(default_factory=StopSignals)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over the time spent in steps alone."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def elapsed_s(self) -> float:
        """Wall time of all processes of the run, loading included."""
        return self.earlier_s + time.time() - STARTED

    @property
    def mean_loss(self) -> float | None:
        """Over all that was learned; None where no step was taken."""
        return self.loss_sum / self.loss_terms if self.loss_terms else None

    @property
    def signal_number(self) -> int | None:
        """Of the signal that ends this process."""
        return self.signals.number

    @property
    def must_stop(self) -> bool:
        """No further step is taken: early stopping, or a signal."""
        return self.stop_reason is not None or self.signal_number is not None

    def to_json(self) -> dict[str, Any]:
        """All numbers; None for those that are not finite, which JSON does not have."""
        kept = {name: value for name, value in self.__dict__.items() if name != "signals"}
        return {name: None if is_endless(value) else value for name, value in kept.items()}

    @classmethod
    def from_json(cls, values: Any) -> TrainingState:
        """What `to_json` gave.

        Raises:
            ValueError: something else.
        """
        if not isinstance(values, dict) or "signals" in values or values.keys() - cls().__dict__.keys():
            raise ValueError("it does not describe a training run")
        try:
            given = {name: value for name, value in values.items() if value is not None}
            return TypeAdapter(cls).validate_json(json.dumps(given), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def is_endless(value: Any) -> bool:
    """True for NaN and the infinities."""
    return isinstance(value, float) and not math.isfinite(value)

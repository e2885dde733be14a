"""What the config of a plain adapter says: rank, scale, dropout. What mlx-lm's format cannot hold is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from utils.adapter_changes import match_pattern
from utils.adapter_reader import KNOWN_KEYS
from utils.exceptions import AdapterError

MAX_SCALE = 1e9  # far above any that trains; sums with the base stay finite
MERGE_FIX = "merge it into its base (scripts/merge.py): a merged folder loads everywhere"
COPY_FIX = "use another copy of the adapter"


@dataclass(frozen=True)
class AdapterSettings:
    """What all modules of a plain adapter have in common.

    Attributes:
        scale: B·A is multiplied by it.
        dropout: on the input of A while training.
    """

    rank: int
    scale: float
    dropout: float
    is_dora: bool


def check_peft_config(config: Mapping[str, Any], where: str) -> None:
    """Refuses settings of PEFT with which an adapter is more than low-rank factors on linear modules."""
    unknown = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    unknown += [key for key in ("modules_to_save", "trainable_token_indices", "target_parameters") if config.get(key)]
    unknown += ["bias"] if config.get("bias", "none") != "none" else []
    if unknown:
        message = f"adapter_config.json sets {unknown[0]}: {config[unknown[0]]!r}, which mlx-lm's format cannot hold"
        raise refuse(message, where)


def find_common_scale(config: Mapping[str, Any], modules: Iterable[str], where: str) -> tuple[int, float]:
    """The rank and scale that all modules have: alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732).

    Raises:
        AdapterError: rank_pattern or alpha_pattern give modules different ones.
    """
    found: dict[tuple[int, float], str] = {}
    for name in modules:
        rank = match_pattern(config.get("rank_pattern") or {}, name, config["r"])
        alpha = match_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        scale = read_scale(alpha, where) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found.setdefault((rank, scale), name)
    if len(found) > 1:
        (one, other), names = list(found)[:2], list(found.values())
        message = (
            f"{names[0]} has rank {one[0]} and scale {one[1]:g}, {names[1]} has {other[0]} and {other[1]:g} "
            "(rank_pattern, alpha_pattern), and mlx-lm's format holds one of each"
        )
        raise refuse(message, where)
    return next(iter(found))


def read_scale(value: Any, where: str) -> float:
    """A scale or an alpha.

    Raises:
        AdapterError: no number, or one beyond all reason.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_SCALE:
        raise refuse(f"adapter_config.json says {value!r} where the scale should stand", where, COPY_FIX)
    return float(value)


def read_dropout(value: Any, where: str) -> float:
    """A dropout; 0 where none is named.

    Raises:
        AdapterError: no share of 1.
    """
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise refuse(f"adapter_config.json says the dropout {value!r}", where, COPY_FIX)
    return float(value)


def is_list_of_names(value: Any) -> bool:
    """True for a list of text."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def refuse(message: str, where: str, fix: str = MERGE_FIX) -> AdapterError:
    """The error for an adapter that the other format cannot hold, or that is none."""
    return AdapterError(f"the adapter cannot be converted: {message}", where=where, fix=fix, code="adapter-format")

"""What a LoRA adapter changes in a base model, tensor by tensor, in words that need no framework."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.tensor_files import COPY_BYTES, Shape, StoredTensor

TIED = re.compile(r"(lm_head|embed_out)\.weight")  # heads that may be the embedding's matrix
HEAD = "score."  # of a reward model


class NeedsFramework(Exception):
    """Only peft can merge this; the text says why."""


@dataclass(frozen=True)
class LowRank:
    """W + scale · B·A, and under DoRA its rows (outputs) brought to the length of the magnitude (arXiv 2402.09353, eq. 5).

    Attributes:
        a: rank × inputs; of experts (experts · rank) × inputs.
        b: outputs × rank; of experts outputs × (rank · experts), the rank varying slowest, as peft's ParamWrapper has it.
        transposed: the base stores inputs × outputs.
        experts: matrices that lie one behind the other in the base's tensor.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool
    magnitude: StoredTensor | None = None
    experts: int = 1


@dataclass(frozen=True)
class Replacement:
    """The whole tensor is the adapter's; it may have more rows than the base's when tokens were added."""

    tensor: StoredTensor


@dataclass(frozen=True)
class TokenRows:
    """Rows of these indices are the adapter's."""

    indices: tuple[int, ...]
    tensor: StoredTensor


Change = LowRank | Replacement | TokenRows


@dataclass(frozen=True)
class BaseTensors:
    """The base's tensors by their names in its files.

    Attributes:
        model_type: transformers' name of the architecture.
        rows: of embedding and head once all tokens are added; 0 where none are.
        is_reward: the merged model ends in a reward head, which the base may not have.
    """

    tensors: Mapping[str, StoredTensor]
    model_type: str
    rows: int = 0
    is_reward: bool = False

    def find(self, name: str) -> StoredTensor | None:
        """The tensor of a name in the model; files may leave the outermost module out (`wte` for `transformer.wte`)."""
        return self.tensors.get(name) or self.tensors.get(name.partition(".")[2])

    def name_in_model(self, modules: Iterable[str]) -> dict[str, StoredTensor]:
        """The tensors by their names in the model.

        Args:
            modules: names of some of its modules, which show the outermost one where the files leave it out.
        """
        known = {name.rpartition(".")[0] for name in self.tensors}
        known |= {name.rpartition(".")[0] for name in known}  # experts' tensors are called by the parameter alone
        missing = next(
            (module for module in modules if module not in known and not TIED.fullmatch(f"{module}.weight")), ""
        )
        outer = f"{missing.partition('.')[0]}." if missing else ""
        return {
            name if name.startswith(("lm_head.", "embed_out.", HEAD)) else outer + name: one
            for name, one in self.tensors.items()
        }


def is_saved_whole(config: Mapping[str, Any], name: str) -> bool:
    """True for a tensor of a module that `modules_to_save` names, or of one inside it.

    peft compares ends of names, so that `norm` is also `input_layernorm`.
    """
    parts = name.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(module.endswith(str(wanted)) for wanted in config.get("modules_to_save") or () for module in modules)


def list_targets(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Full names of the modules that an adapter's configuration adapts, as far as the files show them.

    Args:
        tensors: by their names in the model.

    Raises:
        NeedsFramework: the configuration chooses them by a rule of peft's.
    """
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    if targets == "all-linear":
        raise NeedsFramework("adapter_config.json chooses its modules by a rule of peft's")
    bare = [str(one) for one in config.get("target_parameters") or ()]
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        is_matrix = last == "weight" and len(tensor.shape) == 2
        is_bare = any(f".{name}".endswith(f".{one}") for one in bare)
        if is_bare or (is_matrix and is_named(targets, module) and not is_named(excluded, module)):
            yield module


def is_named(targets: Any, module: str) -> bool:
    """Whether peft would take a module for one of the targets: a regular expression, or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)


def match_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, as peft's `get_pattern_key` finds it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def list_tensors(change: Change) -> tuple[StoredTensor, ...]:
    """The adapter's tensors behind a change."""
    if isinstance(change, LowRank):
        return (change.a, change.b, *((change.magnitude,) if change.magnitude else ()))
    return (change.tensor,)


def show(shape: Shape) -> str:
    """A shape in words."""
    return " × ".join(map(str, shape))


def have_equal_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Compares two tensors of one size, part by part."""
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        return all(
            first.read(min(COPY_BYTES, one.size - done)) == second.read(min(COPY_BYTES, one.size - done))
            for done in range(0, one.size, COPY_BYTES)
        )


def list_renamed_types() -> frozenset[str]:
    """Architectures whose files transformers may rename or put together, read from its table without importing it.

    Empty where the package has no such table.
    """
    package = importlib.util.find_spec("transformers")
    path = Path(package.origin).parent / "conversion_mapping.py" if package and package.origin else Path()
    return frozenset(re.findall(r'"(\w+)": [\["]', path.read_text(encoding="utf-8"))) if path.is_file() else frozenset()

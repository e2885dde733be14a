"""Reads a LoRA adapter from its two files without a framework: which tensor of the base it changes, and how.

Every tensor of the adapter is used exactly once, every place that its configuration names has its tensors, and all shapes are
compared with the base before a number is read. What peft can do and this module cannot is told apart from what is wrong: the
first is `NeedsFramework`, the second an AdapterError.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from utils.adapter_changes import (
    HEAD,
    TIED,
    BaseTensors,
    Change,
    LowRank,
    NeedsFramework,
    Replacement,
    TokenRows,
    have_equal_bytes,
    is_saved_whole,
    list_renamed_types,
    list_targets,
    list_tensors,
    match_pattern,
    show,
)
from utils.adapter_source import MAX_CONFIG_BYTES, PREFIX
from utils.exceptions import AdapterError, ModelLoadingError
from utils.model_headers import read_json_object
from utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from utils.tensor_files import FLOATS, Shape, StoredTensor, read_tensor_file

# Keys of adapter_config.json that are read here, or that say nothing about the sum. Any other key with a value is a feature of
# peft that this module does not know.
KNOWN_KEYS = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "init_lora_weights"),
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "trainable_token_indices"),
    *("ensure_weight_tying", "modules_to_tie", "lora_dropout", "bias", "peft_type", "peft_version", "task_type"),
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "runtime_config", "loftq_config"),
    *("megatron_core", "qalora_group_size", "eva_config", "layers_to_transform", "layers_pattern"),
}
# Starts that leave the base as it is; others take something out of it, which the saved adapter must give back.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # store matrices as inputs × outputs
FACTOR = re.compile(r"(.+)\.(?:lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?)")
ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")


class AdapterReader:
    """Turns one adapter into changes, key by key.

    Attributes:
        changes: by the tensor's name in the base's files.
        added: tensors of a reward head that the base does not have.
    """

    def __init__(self, folder: Path, base: BaseTensors) -> None:
        """Opens the adapter.

        Raises:
            AdapterError: its files are missing or damaged.
            NeedsFramework: it uses something of peft that is not known here.
        """
        self.folder, self.base = folder, base
        if not (folder / ADAPTER_WEIGHTS).is_file():
            fix = "name a run folder that finished training"
            raise AdapterError("there is no adapter", where=str(folder), fix=fix, code="no-adapter")
        try:
            self.config = read_json_object(folder / ADAPTER_CONFIG, str(folder), MAX_CONFIG_BYTES)
            self.tensors = read_tensor_file(folder / ADAPTER_WEIGHTS).tensors
        except ModelLoadingError as error:
            message = f"the adapter is damaged: {error.problems[0].message}"
            raise AdapterError(message, where=str(folder), fix="copy the folder again", code="damaged") from error
        self.check_config()
        self.unused = {tensor.name: tensor for tensor in self.tensors}
        self.changes: dict[str, Change] = {}
        self.added: dict[str, StoredTensor] = {}
        self.adapted: set[str] = set()  # modules with factors, as the model names them

    def check_config(self) -> None:
        """Raises NeedsFramework for every setting whose meaning is not known here."""
        config = self.config
        unknown = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
        unknown += ["peft_type"] if config.get("peft_type") != "LORA" else []
        unknown += ["bias"] if config.get("bias", "none") != "none" else []
        unknown += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_STARTS else []
        unknown += ["layers_to_transform"] if config.get("layers_to_transform") is not None else []
        rows = config.get("trainable_token_indices")
        unknown += ["trainable_token_indices"] if rows and not isinstance(rows, dict) else []
        if unknown:
            raise NeedsFramework(f"adapter_config.json sets {unknown[0]}: {config.get(unknown[0])!r}")

    def read(self) -> None:
        """Uses every key once.

        Raises:
            AdapterError: a key that finds no place, a place without its key, or a wrong shape; the key is named.
            NeedsFramework: a place that only transformers finds.
        """
        for key in list(self.unused):
            if key not in self.unused:
                continue
            if not key.startswith(PREFIX):
                raise self.refuse(f"the model has no place for {key}")
            self.read_key(key, key.removeprefix(PREFIX))
        self.check_places()

    def read_key(self, key: str, name: str) -> None:
        """Finds out what a key is, and takes it together with those that belong to it."""
        if found := FACTOR.fullmatch(name):
            self.read_factors(key, found[1])
        elif found := ROWS.fullmatch(name):
            self.read_rows(key, found[1])
        elif ".lora_embedding_" in name or name.endswith(".lora_B.bias"):
            raise NeedsFramework(f"{key} adapts an embedding or a bias")
        elif is_saved_whole(self.config, name):
            self.read_whole(key, name)
        else:
            raise self.refuse(f"the model has no place for {key}")

    def refuse(self, message: str) -> AdapterError:
        """The error for an adapter that does not fit."""
        message = f"the adapter does not fit this model: {message}"
        return AdapterError(message, where=str(self.folder), code="adapter-mismatch")

    def take(self, key: str, shape: Shape) -> StoredTensor:
        """Uses a tensor of the adapter.

        Raises:
            AdapterError: it is not there, or has another shape.
            NeedsFramework: it is no float that is computed with here.
        """
        tensor = self.unused.pop(key, None)
        if tensor is None:
            raise self.refuse(f"it has no {key}")
        if tensor.shape != shape:
            raise self.refuse(f"{key} is {show(tensor.shape)}, and its place is {show(shape)}")
        if tensor.dtype not in FLOATS.values():
            raise NeedsFramework(f"{key} is stored as {tensor.dtype}")
        return tensor

    def read_factors(self, key: str, module: str) -> None:
        """A and B of a module, with its magnitude under DoRA."""
        names = [f"{PREFIX}{module}.{part}.weight" for part in ("lora_A", "lora_B")]
        for name in names:
            if name not in self.unused:
                raise self.refuse(f"it has no {name}")
            if len(self.unused[name].shape) != 2:
                raise self.refuse(f"{name} is {show(self.unused[name].shape)}, and should be a matrix")
        inputs, outputs = self.unused[names[0]].shape[1], self.unused[names[1]].shape[0]
        plain = module.replace(".base_layer", "")  # peft nests the adapters of two parameters of one module
        target, parameter = self.find_target(names[0], plain, (outputs, inputs))
        rank, scale = self.find_scale(f"{plain}.{parameter}" if parameter else plain)
        transposed = self.is_transposed(target, (outputs, inputs), names[0])
        experts = target.shape[0] if len(target.shape) == 3 else 1
        a = self.take(names[0], (experts * rank, inputs))
        b = self.take(names[1], (outputs, experts * rank))
        magnitude = None
        if self.config.get("use_dora"):
            length = f"{PREFIX}{module}.lora_magnitude_vector"
            magnitude = self.take(f"{length}.weight" if f"{length}.weight" in self.unused else length, (outputs,))
        elif key not in names:
            raise self.refuse(f"the model has no place for {key}")
        self.adapted.add(plain)
        self.add_change(target, LowRank(a, b, scale, transposed, magnitude, experts), names[0])

    def find_target(self, key: str, module: str, shape: Shape) -> tuple[StoredTensor, str]:
        """The base's tensor that factors of this shape belong to, and the parameter's name where peft adapted a bare one.

        Raises:
            AdapterError: there is none.
            NeedsFramework: transformers may find it, under another name or in a tensor that it puts together.
        """
        bare = [str(one) for one in self.config.get("target_parameters") or ()]
        if target := self.base.find(f"{module}.weight"):
            return target, "weight" if any(f".{module}.weight".endswith(f".{one}") for one in bare) else ""
        candidates = {name: self.base.find(f"{module}.{name}") for name in {one.rpartition(".")[2] for one in bare}}
        fitting = [
            (tensor, name)
            for name, tensor in candidates.items()
            if tensor and len(tensor.shape) == 3 and sorted(tensor.shape[1:]) == sorted(shape)
        ]
        if len(fitting) == 1:
            return fitting[0]
        if bare:
            raise NeedsFramework(f"the files have no single tensor for {key}: transformers puts experts together")
        raise self.explain_absence(key, module)

    def explain_absence(self, key: str, module: str) -> Exception:
        """Why a key has no place: a tied head has none in the files, transformers renames some weights, or it is wrong."""
        if TIED.fullmatch(f"{module}.weight"):
            return NeedsFramework(f"{key} stands on a head that shares the embedding's matrix")
        if self.base.model_type in list_renamed_types():
            return NeedsFramework(f"transformers renames weights of {self.base.model_type}; {key} is not in the files")
        return self.refuse(f"the model has no place for {key}")

    def find_scale(self, name: str) -> tuple[int, float]:
        """Rank and scale of a module: alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732)."""
        rank = match_pattern(self.config.get("rank_pattern") or {}, name, self.config.get("r"))
        alpha = match_pattern(self.config.get("alpha_pattern") or {}, name, self.config.get("lora_alpha"))
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
            raise self.refuse(f"adapter_config.json gives {name} the rank {rank!r} and alpha {alpha!r}")
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def is_transposed(self, target: StoredTensor, shape: Shape, key: str) -> bool:
        """Whether the base stores inputs × outputs.

        Args:
            shape: (outputs, inputs) of the factors.
        """
        stored, flipped = target.shape[-2:], (shape[1], shape[0])
        conv1d = bool(self.config.get("fan_in_fan_out")) or self.base.model_type in CONV1D_TYPES
        if len(target.shape) == 3:
            if shape == flipped:
                raise NeedsFramework(f"{target.name} is square: only the model knows which side of it {key} enters")
            return stored == flipped
        if len(target.shape) == 2 and stored == flipped and conv1d:
            return True
        if target.shape == shape:
            return False
        raise self.refuse(f"{key} adapts {show(shape)}, and {target.name} is {show(target.shape)}")

    def read_rows(self, key: str, module: str) -> None:
        """Rows of added tokens."""
        target = self.base.find(f"{module}.weight")
        if target is None:
            raise self.explain_absence(key, module)
        indices = (self.config.get("trainable_token_indices") or {}).get(module)
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise self.refuse(f"adapter_config.json does not say which rows {key} replaces")
        if len(target.shape) != 2 or max(indices, default=0) >= max(target.rows, self.base.rows):
            raise self.refuse(f"{key} replaces row {max(indices)}, and {target.name} is {show(target.shape)}")
        self.add_change(target, TokenRows(tuple(indices), self.take(key, (len(indices), target.columns))), key)

    def read_whole(self, key: str, name: str) -> None:
        """A tensor that was trained whole, a new head, or the second copy of one that head and embedding share."""
        shape = self.unused[key].shape
        if target := self.base.find(name):
            grown = (self.base.rows, *target.shape[1:])
            is_grown = self.base.rows > target.shape[0] and shape == grown
            self.add_change(target, Replacement(self.take(key, grown if is_grown else target.shape)), key)
        elif self.base.is_reward and name.startswith(HEAD):
            self.added[name] = self.take(key, shape)
        elif TIED.fullmatch(name) and self.config.get("ensure_weight_tying"):
            self.check_twin(self.take(key, shape))
        else:
            raise self.explain_absence(key, name.rpartition(".")[0])

    def check_twin(self, head: StoredTensor) -> None:
        """The base's head and embedding are one matrix, so the adapter must hold the same one twice.

        Raises:
            AdapterError: it holds two different ones.
        """
        alike = [one for one in self.tensors if (one.dtype, one.shape) == (head.dtype, head.shape) and one is not head]
        if not any(have_equal_bytes(head, one) for one in alike):
            raise self.refuse(
                f"{head.name} shares its matrix with the embedding, which the adapter has another one for"
            )

    def add_change(self, target: StoredTensor, change: Change, key: str) -> None:
        """Notes a change, at most one for each tensor of the base."""
        if target.name in self.changes:
            raise NeedsFramework(f"{key} is a second change of {target.name}")
        if target.dtype not in FLOATS.values():
            raise NeedsFramework(f"{target.name} is stored as {target.dtype}")
        self.changes[target.name] = change

    def check_places(self) -> None:
        """Every place that the configuration names has got its tensors.

        Raises:
            AdapterError: one has not.
            NeedsFramework: the configuration chooses its modules by a rule of peft's.
        """
        names = self.base.name_in_model(self.adapted)
        for module in list_targets(self.config, names):
            if module not in self.adapted:
                raise self.refuse(f"it has no {PREFIX}{module}.lora_A.weight")
        used = {tensor.name for change in self.changes.values() for tensor in list_tensors(change)}
        for module in self.config.get("trainable_token_indices") or {}:
            if f"{PREFIX}{module}.token_adapter.trainable_tokens_delta" not in used:
                raise self.refuse(f"it has no {PREFIX}{module}.token_adapter.trainable_tokens_delta")
        for name, tensor in names.items():
            if tensor.name not in self.changes and is_saved_whole(self.config, name):
                raise self.refuse(f"it has no {PREFIX}{name}")
        if self.base.is_reward and not any(name.startswith(HEAD) for name in (*self.base.tensors, *self.added)):
            raise self.refuse(f"it has no {PREFIX}{HEAD}weight")

"""A finished LoRA adapter on this machine's disk: found and judged before weights are loaded, without a framework."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.exceptions import AdapterError, ModelLoadingError, RecipeError
from utils.model_headers import read_json_object
from utils.model_safety import check_links
from utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource

if TYPE_CHECKING:
    from utils.tensor_files import StoredTensor

MAX_CONFIG_BYTES = 10_000_000
# Keys of adapter_config.json with which a file has peft do more than put matrices on modules: what they do.
FOREIGN_KEYS = {
    "megatron_config": "makes peft import a module that the file names",
    "corda_config": "makes peft read pickles that the file names",
    "lora_ga_config": "makes peft read pickles that the file names",
    "arrow_config": "makes peft load further adapters",
    "layer_replication": "makes peft repeat layers of the base",
}
FACTOR_A = re.compile(r"\.lora_(embedding_)?A(\.|$)")
PREFIX = "base_model.model."


def find_adapter(name: str, source: ModelSource, where: str) -> Path:
    """Finds the folder of `model.adapter` and checks that it can be folded into this base.

    Args:
        name: an adapter folder in the format of PEFT or of mlx-lm, or a run folder that holds one.
        source: the base model.
        where: `file:line` of model.adapter.

    Returns:
        The folder in PEFT's format; of an adapter of mlx-lm's, a converted copy in the cache.

    Raises:
        RecipeError: no such folder, or one without an adapter.
        AdapterError: not safetensors, not LoRA, with tokens of its own, or made for another model.
    """
    from utils.adapter_formats import is_mlx_adapter, open_as_peft

    given = locate_adapter(name, where)
    folder = open_as_peft(given, source, where) if is_mlx_adapter(given) else given
    check_files(folder, where)
    check_kind(folder, where)
    check_base(given, source, where)
    check_fit(folder, source, where)
    return folder


def locate_adapter(name: str, where: str) -> Path:
    """The folder that holds adapter_config.json, in whichever format.

    Raises:
        RecipeError: no such folder, or one without an adapter.
        AdapterError: a link leads out of it.
    """
    asked = Path(name).expanduser()
    folder = asked / "adapter" if (asked / "adapter" / ADAPTER_CONFIG).is_file() else asked
    if not (folder / ADAPTER_CONFIG).is_file():
        what = "trained all weights: name its model/ folder in model.name" if (asked / "model").is_dir() else ""
        fix = what or f"name a run folder that trained with a lora section, or a folder with {ADAPTER_CONFIG}"
        raise RecipeError(f"there is no adapter in {name!r}", where=where, fix=fix, code="no-adapter")
    check_links(folder, AdapterError)
    return folder


def check_files(folder: Path, where: str) -> None:
    """Only safetensors: a .bin file is a pickle, which runs code when it is read."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        is_pickle = (folder / "adapter_model.bin").is_file()
        message = f"the adapter {'is a pickle (.bin)' if is_pickle else 'has no weights'}"
        fix = f"save it with save_pretrained, or with mlx_lm.lora: it then holds {ADAPTER_WEIGHTS} or adapters.safetensors"
        raise AdapterError(message, where=where, fix=fix, code="adapter-files")


def check_kind(folder: Path, where: str) -> None:
    """Folding needs LoRA on an unchanged base and an unchanged vocabulary."""
    if read_adapter_config(folder, where).get("trainable_token_indices"):
        message = "the adapter brings tokens of its own, which this recipe's tokenizer does not have"
        fix = "merge its run (scripts/merge.py), and name the merged folder in model.name"
        raise AdapterError(message, where=where, fix=fix, code="adapter-kind")


def read_adapter_config(folder: Path, where: str) -> dict[str, Any]:
    """adapter_config.json, after a look at what peft would do with it: a stranger may have written it.

    Raises:
        AdapterError: not LoRA, a start that changes the base, a key that names code to import, or a rank beyond that of the
            weights: peft makes the matrices of that rank before it reads a number.
    """
    config = read_adapter_json(folder, where)
    if config.get("peft_type") != "LORA":
        message = f"the adapter is of the type {config.get('peft_type')!r}, and only LoRA is read here"
        raise AdapterError(message, where=where, fix="name a LoRA adapter", code="adapter-kind")
    start = config.get("init_lora_weights")
    if isinstance(start, list | dict) or (isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal")):
        message = f"the adapter was started by {start}, which changes the base, and was not converted when it was saved"
        fix = "save it with path_initial_model_for_weight_conversion, or train it with Tunebook"
        raise AdapterError(message, where=where, fix=fix, code="adapter-kind")
    if named := next((key for key in FOREIGN_KEYS if config.get(key)), None):
        message = f"adapter_config.json sets {named}, which {FOREIGN_KEYS[named]}"
        raise AdapterError(message, where=where, fix="use another copy of the adapter", code="adapter-kind")
    check_numbers(config, where)
    check_targets(config, where)
    check_ranks(config, read_shapes(folder, where), where)
    return config


def read_adapter_json(folder: Path, where: str) -> dict[str, Any]:
    """adapter_config.json as it stands there.

    Raises:
        AdapterError: it cannot be read.
    """
    try:
        return read_json_object(folder / ADAPTER_CONFIG, where, MAX_CONFIG_BYTES)
    except ModelLoadingError as error:
        raise AdapterError(
            error.problems[0].message, where=where, fix="copy the folder again", code="damaged"
        ) from error


def read_pattern(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """What `rank_pattern` or `alpha_pattern` says: regular expression → number."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        message = f"adapter_config.json says {name}: {pattern!r}, which is no table"
        raise AdapterError(message, where=where, fix="use another copy of the adapter", code="adapter-kind")
    return pattern


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Every alpha is a finite number: the sum of base and adapter would be none."""
    for alpha in (config.get("lora_alpha"), *read_pattern(config, "alpha_pattern", where).values()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
            message = f"adapter_config.json says {alpha!r} where a number should stand (lora_alpha, alpha_pattern)"
            raise AdapterError(message, where=where, fix="use another copy of the adapter", code="adapter-kind")


def check_targets(config: Mapping[str, Any], where: str) -> None:
    """Names of modules are lists of text, or one regular expression; patterns of ranks and alphas are expressions, too."""
    patterns = [key for name in ("rank_pattern", "alpha_pattern") for key in read_pattern(config, name, where)]
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_pattern"):
        value = config.get(name)
        patterns += [value] if isinstance(value, str) else []
        is_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value is not None and not isinstance(value, str) and not is_names:
            message = f"adapter_config.json says {name}: {value!r}, which is no list of names"
            raise AdapterError(message, where=where, fix="use another copy of the adapter", code="adapter-kind")
    for pattern in patterns:
        try:
            re.compile(str(pattern))
        except re.error as error:
            message = f"adapter_config.json holds a broken regular expression, {pattern!r}: {error}"
            raise AdapterError(
                message, where=where, fix="use another copy of the adapter", code="adapter-kind"
            ) from error


def check_ranks(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """The ranks that adapter_config.json names are whole numbers, and none is above the largest in the weights."""
    ranks = [config.get("r"), *read_pattern(config, "rank_pattern", where).values()]
    largest = max((shape[0] for name, shape in shapes.items() if FACTOR_A.search(name) and shape), default=0)
    for rank in ranks:
        if type(rank) is not int or not 1 <= rank <= largest:
            message = (
                f"adapter_config.json names the rank {rank!r}, and the largest in the adapter's weights is {largest}"
            )
            raise AdapterError(message, where=where, fix="use another copy of the adapter", code="adapter-rank")


def check_base(folder: Path, source: ModelSource, where: str) -> None:
    """The adapter of a run goes on the base of that run: run.json knows its hash. Silent where either is not here.

    Raises:
        AdapterError: other weights, or a base that had an adapter folded in itself.
    """
    facts_file = folder.parent / "run.json"
    # `export.py` writes adapter_mlx and adapter_peft beside a run's adapter.
    if not folder.name.startswith("adapter") or not facts_file.is_file() or not source.list_weight_files():
        return
    facts = read_json_object(facts_file, where, MAX_CONFIG_BYTES)
    if facts.get("model_hash") not in (None, source.hash_weights()):
        message = f"the adapter was trained on other weights than those of {source.name}"
        fix = f"name the base of {folder.parent} in model.name: its recipe.yaml says which"
        raise AdapterError(message, where=where, fix=fix, code="adapter-mismatch")
    if facts.get("adapter_hash"):
        message = "the adapter was trained on a base that had another adapter folded in"
        fix = "merge its run (scripts/merge.py), and name the merged folder in model.name"
        raise AdapterError(message, where=where, fix=fix, code="adapter-kind")


def check_fit(folder: Path, source: ModelSource, where: str) -> None:
    """Every tensor of the adapter has its place in the base and its shape; silent before the base is downloaded.

    What only the framework can tell is left to it: it has all the memory by then that the ranks ask for.
    """
    if not source.list_weight_files():
        return
    from utils.adapter_changes import NeedsFramework
    from utils.merge_plan import plan_merge

    try:
        is_reward = read_adapter_config(folder, where).get("task_type") == "SEQ_CLS"
        plan_merge(source, [folder], (), is_reward)
    except NeedsFramework:
        return
    except AdapterError as error:
        fix = "name the base model that the adapter was trained on in model.name"
        raise AdapterError(error.problems[0].message, where=where, fix=fix, code="adapter-mismatch") from error


def read_shapes(folder: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of an adapter in PEFT's format, from the checked header of its file."""
    return {tensor.name: tensor.shape for tensor in read_tensors(folder / ADAPTER_WEIGHTS, where)}


def read_tensors(path: Path, where: str) -> tuple[StoredTensor, ...]:
    """What the header of an adapter's weights says, checked.

    Raises:
        AdapterError: damaged, or numbers that are not known.
    """
    from utils.tensor_files import ITEM_BYTES, read_tensor_file

    try:
        tensors = read_tensor_file(path).tensors
    except ModelLoadingError as error:
        message = f"the adapter's weights are damaged: {error.problems[0].message}"
        raise AdapterError(message, where=where, fix="copy the folder again", code="damaged") from error
    if odd := next((tensor for tensor in tensors if tensor.dtype not in ITEM_BYTES), None):
        message = f"the adapter's weights are damaged: {odd.name} has the number format {odd.dtype}"
        raise AdapterError(message, where=where, fix="copy the folder again", code="damaged")
    return tensors

"""What a merged folder holds beside the weights: config, generation config and the tokenizer of the run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

from utils.adapter_changes import NeedsFramework
from utils.mlx_support import list_mlx_keys
from utils.model_source import ModelSource
from utils.tokenizer_utils import TokenizerUtils

SECTION = re.compile(
    r"^MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES = OrderedDict\((.*?)^\)", re.MULTILINE | re.DOTALL
)
ENTRY = re.compile(r"""\(\s*["']([\w.-]+)["'],\s*["'](\w+)["']""")


def plan_config(source: ModelSource, tokenizer: TokenizerUtils, vocabulary: int, is_reward: bool) -> dict[str, Any]:
    """config.json of the merged model: the base's, with what the run changed.

    Args:
        vocabulary: rows of a grown embedding, or 0.

    Raises:
        NeedsFramework: transformers' table of reward models does not show this architecture.
    """
    config = dict(source.config)
    if vocabulary:
        config["vocab_size"] = vocabulary
    if is_reward:
        config["pad_token_id"] = tokenizer.tokenizer.pad_token_id
    if is_reward and not source.is_reward:
        config["architectures"] = [find_reward_architecture(source.model_type)]
        config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    return config


def find_reward_architecture(model_type: str) -> str:
    """Class of the reward model of an architecture, read from transformers' table without importing it.

    Raises:
        NeedsFramework: the table is not there, or has no such architecture.
    """
    package = importlib.util.find_spec("transformers")
    folder = Path(package.origin).parent if package and package.origin else Path()
    path = folder / "models" / "auto" / "modeling_auto.py"
    section = SECTION.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    names = dict(ENTRY.findall(section[1])) if section else {}
    if model_type not in names:
        raise NeedsFramework(f"only transformers knows the reward model of {model_type}")
    return str(names[model_type])


def save_config(source: ModelSource, config: dict[str, Any], folder: Path) -> None:
    """Writes config.json, and copies the generation config and code that the base brings."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    code = sorted(source.folder.glob("*.py")) if "auto_map" in config else []
    for path in (source.folder / "generation_config.json", *code):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def save_companions(tokenizer: TokenizerUtils, folder: Path) -> None:
    """Tokenizer with the template of the training, a config that mlx-lm reads, too, and a generation config that stops where
    the training stopped.

    Without a generation config, the other ids are those of config.json, where transformers would read them.
    """
    tokenizer.save(folder)
    whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if added := list_mlx_keys(whole):
        (folder / "config.json").write_text(json.dumps({**whole, **added}, indent=2) + "\n", encoding="utf-8")
    path = folder / "generation_config.json"
    if path.exists():
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = {key: whole[key] for key in ("bos_token_id", "pad_token_id") if isinstance(whole.get(key), int)}
    config["eos_token_id"] = tokenizer.find_stop_ids()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

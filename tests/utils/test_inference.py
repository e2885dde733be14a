"""The untouched model's answers are kept, and never taken for those of another model, machine or version."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config.structured_config import GenerationSection
from utils.backends import GenerationSettings, MachineFacts
from utils.inference import find_baseline_file
from utils.logging import get_logger
from utils.model_source import ModelSource
from utils.session import load_plain

MACHINE = MachineFacts("cpu", "a cpu", "float32", 1, 512, 1, ())
SETTINGS = GenerationSettings(GenerationSection(), (2,), 0)


def name_file(folder: Path, machine: MachineFacts = MACHINE, **config: int) -> Path:
    """The cache file of one prompt to a new model."""
    source = ModelSource("m", folder, {"vocab_size": 64, **config}, seed=1)
    return find_baseline_file(source, [np.array([3, 4])], SETTINGS, machine, 64)


def test_another_version_of_a_library_has_answers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The name did not hold the versions: after an upgrade the report compared new answers with those of the old kernels.
    find_version, changed = importlib.metadata.version, set[str]()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name in changed else find_version(name))
    eight_bits = replace(MACHINE, quantization="int8")
    plain, quantised = name_file(tmp_path), name_file(tmp_path, eight_bits)
    changed.add("bitsandbytes")
    assert plain == name_file(tmp_path)
    assert quantised != name_file(tmp_path, eight_bits)
    changed.add("torch")
    assert plain != name_file(tmp_path)


def test_another_config_or_machine_has_answers_of_its_own(tmp_path: Path) -> None:
    found = {
        name_file(tmp_path),
        name_file(tmp_path, rope_theta=7),
        name_file(tmp_path, replace(MACHINE, dtype="bfloat16")),
        name_file(tmp_path, replace(MACHINE, device_name="another cpu")),
        # On a CPU nothing else told MLX's answers from torch's.
        name_file(tmp_path, replace(MACHINE, backend="mlx")),
        name_file(tmp_path, replace(MACHINE, quantization="int4", backend="mlx")),
    }
    assert len(found) == 6


def test_progress_counts_single_answers_and_tokens_a_second(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("utils.progress.SECONDS_BETWEEN_LINES", 0.0)
    session = load_plain(str(tiny_llama), GenerationSection(max_new_tokens=4)).open_session()
    prompts = [session.encode([{"role": "user", "content": "word " * length}]) for length in (2, 9, 4)]
    logger = get_logger()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    together = replace(session.responder, batch_size=1).answer(prompts, "Answers")
    progress = caplog.text
    logger.removeHandler(caplog.handler)
    assert "Answers: 1/3 answers" in progress
    assert "Answers: 2/3 answers" in progress
    assert "tokens/s" in progress
    assert len(together) == 3

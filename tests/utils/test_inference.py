"""The untouched model's answers are kept, and never taken for those of another model, machine or version."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config.structured_config import GenerationSection
from utils.backends import GenerationSettings, MachineFacts
from utils.inference import find_baseline_file
from utils.model_source import ModelSource

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
    }
    assert len(found) == 4

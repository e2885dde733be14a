"""Trackers that could not start are refused before there is a run."""

from __future__ import annotations

import pytest

from config.structured_config import TrackingSection
from utils.exceptions import MachineError
from utils.tracking import check_tracking


def test_wandb_online_without_a_key_is_refused_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(MachineError, match="WANDB_API_KEY") as caught:
        check_tracking(TrackingSection(wandb=True), "recipes/x.yaml:9")
    assert caught.value.problems[0].where == "recipes/x.yaml:9"
    check_tracking(TrackingSection(), "recipes/x.yaml:9")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracking(TrackingSection(wandb=True), "recipes/x.yaml:9")

"""Fixtures of tests that evaluate."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from symphony_vlm.evaluation import runner


@pytest.fixture
def one_model_opens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For threads that stand for processes.

    transformers' ``from_pretrained`` replaces functions of torch and of its own classes while it loads; two at once
    would leave them replaced for every later test.
    """
    lock, open_model = threading.Lock(), runner.open_model

    def opened(*arguments: Any, **settings: Any) -> Any:
        with lock:
            return open_model(*arguments, **settings)

    monkeypatch.setattr(runner, "open_model", opened)

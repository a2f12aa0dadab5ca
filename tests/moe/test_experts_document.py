"""docs/experts.md: its code runs, its settings and defaults are those of the package."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import symphony_vlm as sv
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "experts.md").read_text(encoding="utf-8")


def test_the_code_runs(
    language_model: Callable[..., PreTrainedModel],
    token_ids: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    batches = [{"input_ids": ids, "labels": ids} for ids in (token_ids(2, 9), token_ids(2, 9, seed=1))]
    names: dict[str, Any] = {
        "language_model": language_model(),
        "moe_language_model": language_model("mixtral"),
        "batches": batches,
    }
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert isinstance(names["language_model"], sv.SymphonyForCausalLM)
    for name in ("language_model", "moe_language_model"):
        graphs = [graph for _, graph in expert_graphs(names[name])]
        assert graphs and not any(
            torch.equal(graph.adjacency_EE, torch.eye(len(graph.adjacency_EE))) for graph in graphs
        )


def test_the_table_has_the_defaults_of_the_settings() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", DOCUMENT, flags=re.MULTILINE)
    assert len(rows) == 6
    for name, shown in rows:
        value = MoEConfig().to_dict()[name]
        written = f"[{', '.join(value)}]" if isinstance(value, list) else str(value).lower()
        assert shown == (f"{value:g}" if isinstance(value, float) else written)

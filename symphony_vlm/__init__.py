"""symphony_vlm: visual instruction tuning with mixture-of-experts language models and Symphony routers.

>>> import symphony_vlm as sv
>>> model = sv.load("runs/quickstart/symphony_smoe/model")
>>> model.chat("What color is the circle?", images="a.png")

Importing the package imports neither torch nor transformers; names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from symphony_vlm import _imports

__version__ = "0.1.0"

_EXPORTS = {
    "InputError": "symphony_vlm.errors",
    "MoEConfig": "symphony_vlm.moe.configuration",
    "SymphonyForCausalLM": "symphony_vlm.model.language_model",
    "SymphonyLMConfig": "symphony_vlm.model.configuration",
    "SymphonyVLMConfig": "symphony_vlm.model.configuration",
    "SymphonyVLMForConditionalGeneration": "symphony_vlm.model.vlm",
    "SymphonyVLMProcessor": "symphony_vlm.model.processor",
    "calibrate_expert_graphs_": "symphony_vlm.moe.native",
    "export": "symphony_vlm.model.export",
    "load": "symphony_vlm.model.loading",
    "load_language_model": "symphony_vlm.model.loading",
    "register_router": "symphony_vlm.moe.router",
    "set_expert_graph_": "symphony_vlm.moe.expert_graph",
    "symphonize_": "symphony_vlm.moe.native",
    "update_expert_graphs": "symphony_vlm.moe.expert_graph",
    "upcycle_": "symphony_vlm.moe.upcycle",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from symphony_vlm.errors import InputError
    from symphony_vlm.model.configuration import SymphonyLMConfig, SymphonyVLMConfig
    from symphony_vlm.model.export import export
    from symphony_vlm.model.language_model import SymphonyForCausalLM
    from symphony_vlm.model.loading import load, load_language_model
    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
    from symphony_vlm.moe.configuration import MoEConfig
    from symphony_vlm.moe.expert_graph import set_expert_graph_, update_expert_graphs
    from symphony_vlm.moe.native import calibrate_expert_graphs_, symphonize_
    from symphony_vlm.moe.router import register_router
    from symphony_vlm.moe.upcycle import upcycle_

_imports.install()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'symphony_vlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

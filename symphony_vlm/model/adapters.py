"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model, made and merged by PEFT.

A model with adapters is saved as what trained: adapters, routers, modules trained in full (the projector), and every
buffer (expert graphs). Its config.json says in ``adapter`` how they are attached and to which model; `open_adapted`
puts both together again and merges them, so that whoever opens the folder gets a plain model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from symphony_vlm.errors import InputError
from symphony_vlm.model.base_model import BaseModel, find_base
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.text import nearest

__all__ = [
    "Adapters",
    "LoRA",
    "add_adapters_",
    "attach_saved_",
    "freeze_adapted_",
    "linear_layers",
    "merge_adapters_",
    "trained_weights",
]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """How a language model is adapted; the fields are the setting ``lora`` of a stage."""

    rank: int
    alpha: float
    dropout: float = 0.0
    target: str | list[str] = "all-linear"
    experts: bool = False
    quantization: str = "none"


class Adapters:
    """The adapters of a model, at ``model.adapters``.

    Args:
        lora: how they were made.
        base: the model under them, as it is saved.
        tuner: PEFT's object that can merge them.
    """

    def __init__(self, lora: LoRA, base: BaseModel, tuner: Any) -> None:
        self.lora = lora
        self.base = base
        self.tuner = tuner

    def record(self, folder: Path) -> dict[str, Any]:
        """What config.json says in ``adapter``."""
        values = {"lora": dataclasses.asdict(self.lora), "base": self.base.record(folder)}
        return values | {"stacked": self.stacked}

    @property
    def stacked(self) -> list[str]:
        """The expert weights that have adapters, outermost first. PEFT names their adapters by this nesting alone."""
        wrappers = [m for m in self.tuner.model.modules() if hasattr(m, "parameter_name") and hasattr(m, "lora_A")]
        return list(dict.fromkeys(wrapper.parameter_name for wrapper in wrappers))


def add_adapters_(model: Any, lora: LoRA, base: BaseModel) -> None:
    """Puts adapters that change nothing yet on a model's language model, in place.

    Stacked expert weights are no linear layers; PEFT adapts them as parameters. Adapters are fp32 whatever the
    precision of the model.

    Args:
        model: with a `language_model`.
        lora: how.
        base: where the model is saved as it is now.

    Raises:
        InputError: PEFT is not installed, a target is no linear layer, or there are no experts to adapt.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer, LoraModel
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError as error:
        raise InputError(
            f"LoRA needs peft ({error})", where="lora", remedy="pip install 'symphony-vlm[lora]'."
        ) from error
    experts = _expert_weights(model) if lora.experts else []
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=_targets(model, lora),
        target_parameters=experts or None,
        bias="none",
    )
    tuner = LoraModel(model.language_model, config, "default")
    for layer in model.language_model.modules():
        # PEFT refuses dropout as soon as a parameter is among the targets; for the linear layers it is this.
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) and lora.dropout:
            layer.lora_dropout["default"] = nn.Dropout(lora.dropout)
    for name, parameter in model.language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    model.adapters = Adapters(lora, base, tuner)


def freeze_adapted_(model: Any) -> None:
    """Freezes the language model but for adapters and routers: whatever else in it was to train has adapters instead.

    Routers train in full. A gate is a small fp32 matrix, smaller than its adapter would be.
    """
    for name, parameter in model.language_model.named_parameters():
        if ".lora_" not in name and not _is_routing(name):
            parameter.requires_grad_(False)


def trained_weights(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What of a model's weights is not in its base: all that trains, and the buffers.

    Args:
        model: with adapters, frozen as it trains.
        state: its state dict, where an engine has gathered it.
    """
    state = model.state_dict() if state is None else state
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    kept = trained | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in state.items() if name in kept}


@torch.no_grad()
def merge_adapters_(model: Any) -> None:
    """Adds the adapters to the weights and takes them off, in place: W + alpha / rank * B A."""
    model.adapters.tuner.merge_and_unload()
    model.adapters = None
    model.config.adapter = None


def attach_saved_(model: Any, folder: Path, record: dict[str, Any]) -> None:
    """Puts the adapters of a folder on the model they belong to, unmerged, with what else was trained.

    Args:
        model: what `find_base` leads to, open.
        folder: of the adapters.
        record: ``adapter`` in its config.json.

    Raises:
        InputError: they do not fit the model.
    """
    add_adapters_(model, LoRA(**record["lora"]), BaseModel.at(find_base(record["base"], folder)))
    if model.adapters.stacked != record["stacked"]:
        raise InputError(
            f"this version of peft nests the adapters of experts as {model.adapters.stacked}, "
            f"the one that wrote them as {record['stacked']}",
            where=str(folder),
            remedy="Install the version of peft that they were trained with, and merge them.",
        )
    saved = _saved_weights(folder)
    needed = model.state_dict()
    faults = {
        "missing": [name for name in needed if ".lora_" in name and name not in saved],
        "unexpected": [name for name in saved if name not in needed],
        "of another shape": [n for n, tensor in saved.items() if n in needed and tensor.shape != needed[n].shape],
    }
    problems = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in faults.items() if names]
    if problems:
        raise InputError(
            f"the adapters do not fit their model: {'; '.join(problems)}",
            where=str(folder),
            remedy="config.json, the weights and the model must come from one run.",
        )
    model.load_state_dict(saved, strict=False)
    model.config.adapter = record


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the language model that can be adapted, by name within it: not the head, not routers'."""
    head = model.language_model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.language_model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and not _is_routing(f"{name}.weight")
    }


def _targets(model: Any, lora: LoRA) -> list[str]:
    found = list(linear_layers(model))
    if lora.target == "all-linear":
        return found
    for target in lora.target:
        if not any(_ends(name, target) for name in found):
            kinds = sorted({name.rpartition(".")[2] for name in found})
            raise InputError(
                f"{target!r} is the end of no linear layer's name in the language model{nearest(target, kinds)}",
                where="lora.target",
                remedy=f"Layers: {', '.join(kinds)}; or all-linear.",
            )
    return [name for name in found if any(_ends(name, target) for target in lora.target)]


def _expert_weights(model: Any) -> list[str]:
    """The stacked weights by name; biases are left as they are."""
    names = [
        f"{name}.experts.{parameter}"
        for name, layer in sparse_layers(model.language_model)
        for parameter, weight in layer.experts.named_parameters()
        if weight.dim() == 3
    ]
    if not names:
        raise InputError(
            "the language model has no experts to adapt", where="lora.experts", remedy="Set lora.experts: false."
        )
    return names


def _is_routing(name: str) -> bool:
    return ".router." in name or ".shared_expert_gate." in name


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _saved_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError("the folder has no model.safetensors", where=str(folder), remedy="Give a whole folder.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}

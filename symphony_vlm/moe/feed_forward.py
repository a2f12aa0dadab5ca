"""Recognises feed-forward layers by their parts, never by a model's name, and where they hang.

Shape letters: D input size, F hidden size of the feed-forward, O output size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig

__all__ = ["FeedForward", "Placement", "is_native_moe", "placements", "recognise"]

Module = Literal["language", "projector", "vision"]

LAYOUTS: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("gate_proj", "up_proj"), "down_proj", True),  # Llama, Mistral, Qwen, Gemma, SmolLM
    (("gate_up_proj",), "down_proj", True),  # Phi-3
    (("fc1",), "fc2", False),  # CLIP and SigLIP in transformers, timm
    (("c_fc",), "c_proj", False),  # open_clip, GPTBigCode, GPT-Neo
    (("0",), "2", False),  # the projector: linear, activation, linear
)
"""Names of the linear layers into and out of the hidden size, and whether half of the first gates the other half."""

SUPPORTED = "Supported: gated feed-forwards (Llama, Mistral, Qwen, Phi-3, Gemma, SmolLM) and two linear layers (CLIP)."


@dataclass(frozen=True)
class FeedForward:
    """The parts of a dense feed-forward layer: two matrices, perhaps biases, and an activation between them."""

    up: tuple[nn.Linear, ...]
    """Linear layers from D whose outputs are concatenated: gate and up, or one alone."""
    down: nn.Linear
    act_fn: nn.Module
    gated: bool
    """Whether the first half of the hidden values, activated, multiplies the second."""
    dropout: float = 0.0
    """Of the output, in training."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What `SparseMoE` needs to build experts of this form."""
        hidden = sum(part.out_features for part in self.up)
        return {
            "hidden_size": self.up[0].in_features,
            "intermediate_size": hidden // 2 if self.gated else hidden,
            "output_size": self.down.out_features,
            "hidden_act": self.act_fn,
            "gated": self.gated,
            "bias": self.down.bias is not None,
            "dropout": self.dropout,
        }

    @property
    def up_weight(self) -> Tensor:
        """``[2F, D]`` if gated, else ``[F, D]``."""
        return torch.cat([part.weight for part in self.up])

    @property
    def up_bias(self) -> Tensor:
        """``[2F]`` if gated, else ``[F]``."""
        return torch.cat([part.bias for part in self.up])


def recognise(mlp: nn.Module, where: str) -> FeedForward:
    """The parts of a feed-forward layer.

    Args:
        mlp: the layer.
        where: names it in the error, e.g. ``decoder layer 3``.

    Raises:
        InputError: it has other parts, or parts whose effect an expert could not reproduce.
    """
    children = dict(mlp.named_children())
    described = ", ".join(f"{name}: {type(child).__name__}" for name, child in children.items()) or "no parts"
    linear, gated = _linear_parts(children)
    if not linear:
        raise InputError(
            f"{where} has a {type(mlp).__name__} ({described}), which is no feed-forward layer known here",
            where="moe.layers",
            remedy=SUPPORTED,
        )
    # Only GPT's families are known to apply it to the output; on the hidden values an expert could not have it.
    of_gpt = linear and linear[-1] is children.get("c_proj") and isinstance(children.get("dropout"), nn.Dropout)
    dropout = children.pop("dropout") if of_gpt else None
    others = [child for child in children.values() if child not in linear and not _does_nothing(child)]
    with_bias = {part.bias is not None for part in linear}
    if len(others) != 1 or any(True for _ in others[0].parameters()) or len(with_bias) > 1:
        raise InputError(
            f"{where} has a {type(mlp).__name__} ({described}); an expert is one activation between linear layers "
            "that all have biases or all have none",
            where="moe.layers",
            remedy=SUPPORTED,
        )
    return FeedForward(
        up=tuple(linear[:-1]), down=linear[-1], act_fn=others[0], gated=gated, dropout=getattr(dropout, "p", 0.0)
    )


def _linear_parts(children: Mapping[str, nn.Module]) -> tuple[list[nn.Linear], bool]:
    """The linear layers of the layout that fits, the last one leading out, and whether it is gated; or none."""
    for ups, down, gated in LAYOUTS:
        parts = [part for name in (*ups, down) if isinstance(part := children.get(name), nn.Linear)]
        if len(parts) == len(ups) + 1:
            return parts, gated
    return [], False


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def is_native_moe(mlp: nn.Module) -> bool:
    """Whether a layer is one of transformers' own sparse layers: a gate with a matrix, and stacked experts."""
    gate, experts = getattr(mlp, "gate", None), getattr(mlp, "experts", None)
    return isinstance(getattr(gate, "weight", None), Tensor) and isinstance(
        getattr(experts, "gate_up_proj", None), Tensor
    )


@dataclass(frozen=True)
class Placement:
    """A place where a feed-forward layer hangs and experts can be put."""

    owner: nn.Module
    name: str
    module: Module
    layer: int

    @property
    def mlp(self) -> nn.Module:
        """What hangs there now."""
        found: nn.Module = getattr(self.owner, self.name)
        return found

    def replace(self, new: nn.Module) -> None:
        """Hangs something else there."""
        setattr(self.owner, self.name, new)

    @property
    def label(self) -> str:
        """For messages."""
        return {"language": f"decoder layer {self.layer}", "vision": f"vision block {self.layer}"}.get(
            self.module, self.module
        )


def placements(model: nn.Module, config: MoEConfig) -> Iterator[Placement]:
    """Where a model gets experts: ``modules`` and ``layers`` of the settings.

    Args:
        model: a causal LM; or a model with ``moe_modules``, which says where each of its modules is (for
            ``projector`` its owner).
        config: the settings.

    Raises:
        InputError: the model has no such module, or no recognisable layers in it.
    """
    modules: Mapping[str, nn.Module] = getattr(model, "moe_modules", {"language": model})
    for module in config.modules:
        if module not in modules:
            raise InputError(
                f"{type(model).__name__} has no {module!r} to put experts into",
                where="moe.modules",
                remedy=f"It has: {', '.join(modules)}.",
            )
        if module == "projector":
            yield Placement(modules[module], "projector", module, 0)
            continue
        layers = layers_with_mlp(modules[module])
        for index in config.sparse_layers(len(layers)):
            yield Placement(layers[index], "mlp", module, index)


def layers_with_mlp(model: nn.Module) -> Any:
    """The list of a transformer's layers.

    Raises:
        InputError: the model has no such list, or it is ambiguous.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 0
        and all(hasattr(layer, "mlp") for layer in module)
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(found)} lists of layers with an 'mlp', exactly one is needed",
            where="moe.modules",
            remedy=f"Transformers have one. {SUPPORTED}",
        )
    return found[0]

"""Collects what the routers of a language model decide in one forward pass, and what follows from it.

Decoder layers of transformers return hidden states only, so router outputs travel beside them: hooks on the language
model open a fresh record before its forward pass and close it afterwards. Closing before the backward pass is what
makes activation checkpointing safe: its recomputation finds no open record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.losses import load_balancing_loss, router_z_loss
from symphony_vlm.moe.router import RouterOutput
from symphony_vlm.moe.statistics import LoadStatistics

__all__ = ["RoutingRecorder", "sparse_layers"]


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseMoE]]:
    """The sparse layers of a model with their module names, in order."""
    for name, module in model.named_modules():
        if isinstance(module, SparseMoE):
            yield name, module


class RoutingRecorder:
    """Record of the last forward pass of a language model with sparse layers.

    `attach` installs it. In training mode each forward pass also adds to the expert graphs' counts and to the load
    statistics; in evaluation mode nothing but the record changes.
    """

    def __init__(self, config: MoEConfig) -> None:
        self.config = config
        self.outputs: dict[int, RouterOutput] = {}
        """Router output by decoder layer index, of the last forward pass."""
        self.token_mask_T: Tensor | None = None
        """bool, False for padding; None if every token counts."""
        self.statistics = LoadStatistics()
        self._layers: list[SparseMoE] = []

    @classmethod
    def attach(cls, language_model: nn.Module, config: MoEConfig) -> RoutingRecorder:
        """Installs a recorder on a language model; a loss that the model itself computes gets the router losses."""
        recorder = cls(config)
        recorder._layers = [layer for _, layer in sparse_layers(language_model)]
        language_model.register_forward_pre_hook(recorder._open, with_kwargs=True)
        language_model.register_forward_hook(recorder._close, with_kwargs=True, always_call=True)
        return recorder

    def __getstate__(self) -> dict[str, Any]:
        # Recorded tensors hang on an autograd graph, which cannot be copied; a copied model starts without a record.
        return self.__dict__ | {"outputs": {}, "token_mask_T": None}

    def losses(self) -> dict[str, Tensor]:
        """Unweighted router losses of the last forward pass, each the mean over layers, and per layer.

        Keys: ``balance``, ``z``, and ``balance/<layer>``, ``z/<layer>``.
        """
        parts: dict[str, Tensor] = {}
        mask_T = self.token_mask_T
        for layer, out in self.outputs.items():
            parts[f"balance/{layer}"] = load_balancing_loss(
                logits_TE=out.logits_TE, indices_TK=out.indices_TK, token_mask_T=mask_T
            )
            parts[f"z/{layer}"] = router_z_loss(logits_TE=out.logits_TE, token_mask_T=mask_T)
        for kind in ("balance", "z"):
            parts[kind] = torch.stack([parts[f"{kind}/{layer}"] for layer in self.outputs]).mean()
        return parts

    def weighted_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """What the router losses of `losses` add to the total."""
        return self.config.balance_loss_weight * losses["balance"] + self.config.z_loss_weight * losses["z"]

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.outputs = {}
        for layer in self._layers:
            layer.routed = self.outputs
        self.token_mask_T = _token_mask(args, kwargs)

    def _close(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for layer in self._layers:
            layer.routed = None
        if output is None:
            return  # the forward pass raised; the hook runs all the same and must not hide the error
        if module.training:
            self._check_gradient()
            self._count()
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + self.weighted_loss(self.losses()) * _share_of_step(kwargs)

    def _count(self) -> None:
        for layer in self._layers:
            out, router = self.outputs[layer.layer_index], layer.router
            self.statistics.add(layer.layer_index, out, self.token_mask_T)
            if router.expert_graph is not None and router.gate.weight.requires_grad:
                router.expert_graph.count(router.membership(out, self.token_mask_T))

    def _check_gradient(self) -> None:
        for layer in self._layers:
            wanted = torch.is_grad_enabled() and layer.router.gate.weight.requires_grad
            if wanted and not self.outputs[layer.layer_index].logits_TE.requires_grad:
                raise RuntimeError(
                    f"{layer.router.layer_name}: router logits carry no gradient, so the router losses would be "
                    "silently inactive. This is what activation checkpointing with use_reentrant=True does; set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )


def _token_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Which of the tokens entering the model are real, flat bool ``[B * S]``, or None if that is not known."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None:
        return None
    # With a KV cache the mask covers the past too; the tokens of this pass are the last ones.
    return mask[:, -tokens.shape[1] :].reshape(-1).bool()


def _share_of_step(kwargs: dict[str, Any]) -> Tensor | float:
    """This micro-batch's share of the optimizer step, by which the model's own cross entropy is weighted too."""
    labels, num_items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if labels is None or num_items is None:
        return 1.0
    share: Tensor = (labels[:, 1:] != -100).sum() / num_items
    return share

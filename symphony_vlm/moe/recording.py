"""Collects what the routers of a language model decide in one forward pass, and what follows from it.

Decoder layers of transformers return hidden states only, so router outputs travel beside them: hooks on the language
model open a fresh record before its forward pass and close it afterwards. Closing before the backward pass is what
makes activation checkpointing safe: its recomputation finds no open record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import SymphonyGraph
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.losses import load_balancing_loss, router_z_loss
from symphony_vlm.moe.router import RouterOutput
from symphony_vlm.moe.statistics import LoadStatistics
from symphony_vlm.moe.token_graph import connect_token_graphs

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
        self.outputs: dict[int | str, RouterOutput] = {}
        """Router output by layer (`SparseMoE.key`: a decoder layer's index, ``vision.3``) of the last forward pass.

        Compiled steps of decoding are not recorded."""
        self.token_mask_T: Tensor | None = None
        """bool, False for padding; None if every token counts."""
        self.statistics = LoadStatistics()
        self.collecting = False
        """Whether evaluation mode counts too (`collect`)."""
        self._layers: list[SparseMoE] = []
        self._in_front: list[RoutingRecorder] = []
        # Of a pass without images that the modules in front had to take part in; see `idle_images`.
        self._idle: dict[int | str, RouterOutput] = {}

    @classmethod
    def attach(
        cls, language_model: nn.Module, config: MoEConfig, in_front: Sequence[nn.Module] = ()
    ) -> RoutingRecorder:
        """Installs a recorder on a language model; a loss that the model itself computes gets the router losses.

        Args:
            language_model: its own sparse layers are recorded.
            config: weights of the losses.
            in_front: modules that run before the language model in the same pass (vision tower, projector); what
                their sparse layers decided joins the record when the language model's forward pass begins.
        """
        recorder = cls(config)
        for module in in_front:
            other = cls.attach(module, config)
            other.statistics = recorder.statistics
            recorder._in_front.append(other)
        recorder._layers = [layer for _, layer in sparse_layers(language_model)]
        connect_token_graphs(language_model)
        language_model.register_forward_pre_hook(recorder._open, with_kwargs=True)
        language_model.register_forward_hook(recorder._close, with_kwargs=True, always_call=True)
        return recorder

    def __getstate__(self) -> dict[str, Any]:
        # Recorded tensors hang on an autograd graph, which cannot be copied; a copied model starts without a record.
        return self.__dict__ | {"outputs": {}, "token_mask_T": None, "_idle": {}}

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Counts and adds to the statistics in evaluation mode too, and for frozen routers."""
        recorders = [self, *self._in_front]
        for recorder in recorders:
            recorder.collecting = True
        try:
            yield
        finally:
            for recorder in recorders:
                recorder.collecting = False

    @contextmanager
    def idle_images(self) -> Iterator[None]:
        """Around a pass of the modules in front, in evaluation mode, that only keeps other ranks company.

        It counts nowhere. Its router losses are added with a weight of 0, for the backward pass too must do on every
        rank what it does on the others.
        """
        for other in self._in_front:
            other.collecting = False
        try:
            yield
        finally:
            for other in self._in_front:
                other.collecting = self.collecting
                other._idle, other.outputs = other.outputs, {}

    def losses(self) -> dict[str, Tensor]:
        """Unweighted router losses of the last forward pass, each the mean over layers, and per layer.

        Keys: ``balance``, ``z``, and ``balance/<layer>``, ``z/<layer>``.
        """
        parts: dict[str, Tensor] = {}
        for layer, out in (self._idle | self.outputs).items():
            mask_T = self.token_mask_T if isinstance(layer, int) else None  # image features have no padding
            if layer in self._idle:
                mask_T = torch.zeros_like(out.indices_TK[:, 0], dtype=torch.bool)
            parts[f"balance/{layer}"] = load_balancing_loss(
                logits_TE=out.logits_TE, indices_TK=out.indices_TK, token_mask_T=mask_T
            )
            parts[f"z/{layer}"] = router_z_loss(logits_TE=out.logits_TE, token_mask_T=mask_T)
        for kind in ("balance", "z"):
            values = [parts[f"{kind}/{layer}"] for layer in self.outputs]
            parts[kind] = torch.stack(values or [self._nothing_routed()]).mean()
            for layer in self._idle:
                parts[kind] = parts[kind] + parts.pop(f"{kind}/{layer}")
        return parts

    def _nothing_routed(self) -> Tensor:
        """The loss of a pass without images where all sparse layers are in front of the language model."""
        layer = next(layer for recorder in self._in_front for layer in recorder._layers)
        return torch.zeros((), device=layer.experts.down_proj.device)

    def weighted_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """What the router losses of `losses` add to the total."""
        return self.config.balance_loss_weight * losses["balance"] + self.config.z_loss_weight * losses["z"]

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_compiled_step(kwargs):
            return
        self.outputs, self._idle = {}, {}
        for other in self._in_front:
            # Taken, not copied: a pass without images must not find those of the pass before.
            self.outputs |= other.outputs
            self._idle |= other._idle
            other.outputs, other._idle = {}, {}
        for layer in self._layers:
            layer.routed = self.outputs
        self.token_mask_T = _token_mask(args, kwargs)

    def _close(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _is_compiled_step(kwargs):
            return
        for layer in self._layers:
            layer.routed = None
        if output is None:
            return  # the forward pass raised; the hook runs all the same and must not hide the error
        if module.training:
            self._check_gradient()
        if module.training or self.collecting:
            self._count()
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + self.weighted_loss(self.losses()) * _share_of_step(kwargs)

    def _count(self) -> None:
        for layer in self._layers:
            out, router = self.outputs[layer.key], layer.router
            self.statistics.add(layer.key, out, self.token_mask_T)
            if isinstance(router.expert_graph, SymphonyGraph) and (self.collecting or router.is_trained):
                router.expert_graph.count(router.membership(out, self.token_mask_T))

    def _check_gradient(self) -> None:
        if not (self.config.balance_loss_weight or self.config.z_loss_weight):
            return  # counts need no gradient, and there is no other loss
        for layer in self._layers:
            wanted = torch.is_grad_enabled() and layer.router.is_trained
            if wanted and not self.outputs[layer.key].logits_TE.requires_grad:
                raise RuntimeError(
                    f"{layer.router.layer_name}: router logits carry no gradient, so the router losses would be "
                    "silently inactive. This is what activation checkpointing with use_reentrant=True does; set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, or moe.balance_loss_weight and "
                    "moe.z_loss_weight to 0."
                )


def _is_compiled_step(kwargs: dict[str, Any]) -> bool:
    """Whether this is a step of `generate` that is one graph with the model around it, and keeps no record.

    CUDA graphs write every step's results into the same memory, where a record would not last.
    """
    return torch.compiler.is_compiling() and kwargs.get("past_key_values") is not None


def _token_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Which of the tokens entering the model are real, flat bool ``[B * S]``, or None if that is not known."""
    documents = kwargs.get("documents")
    if documents is not None:
        is_real: Tensor = documents.is_real_BS.flatten()
        return is_real
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(mask, Tensor) and mask.dim() == 4 and tokens is not None:
        # ``[B, 1, S, L]``, bool or additive: a real token is seen by somebody, padding by nobody.
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = seen.any(dim=(1, 2)).expand(tokens.shape[0], -1)
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
